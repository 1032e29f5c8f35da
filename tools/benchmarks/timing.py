"""Time and memory of functions, one beside another."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import comb
from typing import NamedTuple

import torch

__all__ = ["Ratio", "interleaved", "median_interval", "peak_bytes", "speed"]

Function = Callable[[], object]


class Ratio(NamedTuple):
    """The median of the rounds' ratios and its 95 % interval."""

    median: float
    low: float
    high: float


def seconds(function: Function, device: str) -> float:
    """CPU time of this process, which a busy machine disturbs least; on a GPU the wall's."""
    if device == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    functions: Mapping[str, Function], rounds: int, device: str, least: float = 0.05
) -> dict[str, list[float]]:
    """Time functions in turn, forwards and backwards, after a warm-up.

    Args:
        functions: What to time, by name.
        rounds: How often.
        device: Where they run.
        least: Seconds; what is shorter is repeated within a round until it takes that long.

    Returns:
        Seconds of one call in each round.
    """
    for function in functions.values():
        function()
    slowest = max(seconds(function, device) for function in functions.values())
    repeats = max(1, min(100, round(least / max(slowest, 1e-9))))

    def repeated(function: Function) -> None:
        for _ in range(repeats):
            function()

    spent: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            spent[name].append(seconds(partial(repeated, functions[name]), device) / repeats)
    return spent


def speed(of: Sequence[float], against: Sequence[float]) -> Ratio:
    """How many times as fast one is as the other, from their seconds round by round."""
    return median_interval([b / a for a, b in zip(of, against, strict=True)])


def median_interval(values: Sequence[float]) -> Ratio:
    """The median and the order statistics that hold the true one in 95 % of cases.

    With fewer than six values no two of them do; then the least and the greatest are given.
    """
    ordered, n = sorted(values), len(values)
    rank, below = 0, 0.5**n  # below: chance that the true median is under ordered[rank]
    while below + comb(n, rank + 1) * 0.5**n <= 0.025:
        rank += 1
        below += comb(n, rank) * 0.5**n
    return Ratio(statistics.median(ordered), ordered[rank], ordered[n - 1 - rank])


def peak_bytes(function: Function, device: str) -> int:
    """The most memory that a call holds at once beyond what was held before.

    On the CPU every allocation of PyTorch's is traced, so the figure is exact and repeats; growth
    of the process depends on what the C library kept from before, and the sum of tensors that
    autograd saved misses what lives only for a moment.

    Args:
        function: What to call.
        device: Where it runs.

    Returns:
        Bytes.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as trace:
        function()
    held = most = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most

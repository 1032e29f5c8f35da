"""What a denoiser has to do in training, in tokens and in floating-point operations."""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmsora.registry import DENOISERS
from mmsora.utils.flops import FlopCounter
from mmsora.utils.process_groups import sequence_group, set_sequence_group

__all__ = ["DenoiserWork"]


class _Shape(NamedTuple):
    """A tensor without its content."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Given = tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]  # to one call, tensors as shapes


class DenoiserWork:
    """Notes what a denoiser is called with while gradients are computed.

    It is counted later, on a copy without memory: each shape once.

    Args:
        denoiser: It.
        config: Its config, of which the copy is built.
    """

    def __init__(self, denoiser: nn.Module, config: Mapping[str, Any]) -> None:
        self._config = copy.deepcopy(config)
        self._copy: nn.Module | None = None
        self._calls: Counter[Given] = Counter()
        self._known: dict[Given, tuple[float, float]] = {}
        self._handle = denoiser.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            named = tuple((name, _outline(kwargs[name])) for name in sorted(kwargs))
            self._calls[tuple(map(_outline, args)), named] += 1

    def clear(self) -> None:
        """Forget the calls."""
        self._calls.clear()

    def total(self) -> tuple[float, float]:
        """Tokens and operations of all calls: forward, and backward as twice as many.

        Returns:
            Of this process' samples; the operations are 0 where they cannot be counted.
        """
        tokens = flop = 0.0
        for given, times in self._calls.items():
            if given not in self._known:
                self._known[given] = self._count(given)
            tokens += times * self._known[given][0]
            flop += times * self._known[given][1]
        return tokens, flop

    def close(self) -> None:
        """Look away."""
        self._handle.remove()

    def _count(self, given: Given) -> tuple[float, float]:
        args, named = given
        batch, _, *size = args[0].shape
        try:
            with torch.device("meta"):
                if self._copy is None:
                    self._copy = DENOISERS.build(self._config)
                inputs = [_tensor(value) for value in args]
                kwargs = {name: _tensor(value) for name, value in named}
            with torch.no_grad(), _whole_samples(), FlopCounter() as counter:
                self._copy(*inputs, **kwargs)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            print_log(f"no TFLOP/s: {type(error).__name__}: {error}", logger="current")
            return 0.0, 0.0
        volume = math.prod(size) / math.prod(getattr(self._copy, "size", size))
        tokens = batch * volume * getattr(self._copy, "num_tokens", 0)
        return tokens, 3.0 * counter.total


def _outline(value: Any) -> Any:
    return _Shape(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _tensor(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, _Shape) else value


@contextmanager
def _whole_samples() -> Iterator[None]:
    """Nobody shares tokens within the block, so nobody is talked to."""
    group = sequence_group()
    set_sequence_group(None)
    try:
        yield
    finally:
        set_sequence_group(group, 1 if group is None else group.size())

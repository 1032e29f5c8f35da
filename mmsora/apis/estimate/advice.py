"""What to switch on where a config does not fit; each advice is tried before it is given."""

import logging
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.logging import print_log

from mmsora.apis.estimate.total import Estimate, changed, estimate, largest_batch
from mmsora.utils.user_error import UserError

__all__ = ["Advice", "advise", "fits", "refuse_what_cannot_fit"]

Options = dict[str, Any]
GB = 1e9
OPTIMIZER = "optim_wrapper.optimizer"
ACCUMULATE = "optim_wrapper.accumulative_counts"
KEPT_8BIT = ("lr", "betas", "eps", "weight_decay")


class Advice(NamedTuple):
    """A change that makes a config fit.

    Attributes:
        options: By dotted keys.
        processes: GPUs it is for.
        estimate: With them.
    """

    options: Options
    processes: int
    estimate: Estimate

    @property
    def text(self) -> str:
        """What to type."""
        words = (shlex.quote(f"{key}={_written(value)}") for key, value in self.options.items())
        return f"--cfg-options {' '.join(words)}"


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def fits(cfg: Config, memory: int, processes: int = 1) -> bool:
    """Whether a config fits on GPUs, by arithmetic.

    Args:
        cfg: The config.
        memory: Bytes of a GPU.
        processes: GPUs.

    Returns:
        The answer.
    """
    return estimate(cfg, processes).total <= memory


def advise(cfg: Config, memory: int, processes: int = 1) -> Iterator[Advice]:
    """What makes a config fit that does not, sought as it is asked for.

    Args:
        cfg: The config.
        memory: Bytes of a GPU.
        processes: GPUs.

    Yields:
        First what leaves the batch as it is, if anything does, tried in the order of
        :func:`_steps`; then a smaller batch with accumulation. Neither has an option that it can
        do without. If neither exists, more GPUs.
    """
    exists = False
    for seek in (_first, _smaller):
        found = seek(cfg, memory, processes)
        if found:
            exists = True
            yield found
    spread = {"parallel.mode": "zero3"}
    for more in (2, 4, 8, 16):
        if not exists and more > processes:
            other = changed(cfg, spread)
            found = _first(other, memory, more) or _smaller(other, memory, more)
            if found:
                exists = True
                yield Advice({**spread, **found.options}, more, found.estimate)


def _steps(cfg: Config, processes: int) -> Iterator[Options]:
    """Changes in the order in which they are worth trying; each goes on top of those before."""
    if cfg.optim_wrapper.get("precision", "off") == "off":
        yield {"optim_wrapper.precision": "bf16"}
    mode = (cfg.get("activation_checkpointing") or {}).get("mode", "none")
    modes = ("none", "selective", "full")
    for stronger in modes[modes.index(mode) + 1 :] if mode in modes else ("full",):
        yield {"activation_checkpointing.mode": stronger}
    optimizer = cfg.optim_wrapper.optimizer
    if str(dict.get(optimizer, "type")).rpartition(".")[2] in ("Adam", "AdamW"):
        kept = {f"{OPTIMIZER}.{key}": optimizer[key] for key in KEPT_8BIT if key in optimizer}
        yield {f"{OPTIMIZER}._delete_": True, f"{OPTIMIZER}.type": "AdamW8bit", **kept}
    zero = ("zero1", "zero2", "zero3")
    mode = (cfg.get("parallel") or {}).get("mode")
    if processes > 1:
        for stronger in zero[zero.index(mode) + 1 :] if mode in zero else zero:
            yield {"parallel.mode": stronger}
    yield {"parallel.mode": "zero3", "parallel.offload": True}


def _first(cfg: Config, memory: int, processes: int) -> Advice | None:
    """The fewest of the steps with which the batch fits."""
    cfg = changed(cfg, {})
    options: Options = {}
    for step in _steps(cfg, processes):
        options |= step
        found = _tried(cfg, options, processes)
        if found and found.estimate.total <= memory:
            return _pruned(cfg, found, memory)
    return None


def _smaller(cfg: Config, memory: int, processes: int) -> Advice | None:
    """The fewest of the steps with which a part of the batch fits, and the parts."""
    cfg = changed(cfg, {})
    options: Options = {}
    for step in [{}, *_steps(cfg, processes)]:
        options |= step
        batch = cfg.train_dataloader.batch_size
        accumulating = {**options, **_in_parts(cfg, 1)}  # gradients stay meanwhile
        most = largest_batch(changed(cfg, accumulating), memory, processes, most=batch - 1)
        part = max((n for n in range(1, most + 1) if batch % n == 0), default=0)
        if part:
            found = _tried(cfg, {**options, **_in_parts(cfg, part)}, processes)
            return found and _pruned(cfg, found, memory)
    return None


def _in_parts(cfg: Config, part: int) -> Options:
    """The same updates from smaller micro-batches; iterations are micro-batches."""
    times = cfg.train_dataloader.batch_size // part
    count = cfg.optim_wrapper.get("accumulative_counts", 1)
    options = {"train_dataloader.batch_size": part, ACCUMULATE: count * times}
    if "max_iters" in cfg.get("train_cfg", {}):
        options["train_cfg.max_iters"] = cfg.train_cfg.max_iters * times
    for number, scheduler in enumerate(cfg.get("param_scheduler") or ()):
        for key in ("begin", "end"):
            if scheduler.get(key):
                options[f"param_scheduler.{number}.{key}"] = scheduler[key] * times
    return options


def _pruned(cfg: Config, found: Advice, memory: int) -> Advice:
    """Without what it fits without."""
    for group in sorted({_group(key) for key in found.options} - {"batch"}):
        fewer = {k: v for k, v in found.options.items() if _group(k) != group}
        without = _tried(cfg, fewer, found.processes) if fewer else None
        if without and without.estimate.total <= memory:
            found = without
    return found


def _group(key: str) -> str:
    """What is changed together: the sizes of accumulation, and all that an optimizer is of."""
    if key.startswith(("train_", "param_scheduler")) or key == ACCUMULATE:
        return "batch"
    return OPTIMIZER if key.startswith(OPTIMIZER) else key


def _tried(cfg: Config, options: Options, processes: int) -> Advice | None:
    try:
        return Advice(dict(options), processes, estimate(changed(cfg, options), processes))
    except UserError:
        return None


def refuse_what_cannot_fit(cfg: Config, memory: int, processes: int = 1) -> None:
    """Do nothing for a config that fits, and warn of one that is close to the limit.

    Args:
        cfg: The config.
        memory: Bytes of a GPU.
        processes: GPUs.

    Raises:
        UserError: It does not fit; with what would.
    """
    try:
        needed = estimate(cfg, processes)
    except Exception as error:  # a network of the user's own may do what the meta device cannot
        reason = " ".join(str(error).split())
        print_log(f"will it fit? unknown: {reason}", "current", logging.WARNING)
        return
    if needed.total - needed.parts["slack"] <= memory:
        if needed.total > memory:
            text = f"may not fit: {needed.total / GB:.1f} GB of {memory / GB:.1f} by arithmetic"
            print_log(text, "current", logging.WARNING)
        return
    parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in needed.parts.items() if size)
    would = [
        f"{one.text} on {one.processes} GPU{'s' * (one.processes > 1)} "
        f"({one.estimate.total / GB:.1f} GB)"
        for one in advise(cfg, memory, processes)
    ]
    raise UserError(
        f"this config needs about {needed.total / GB:.1f} GB on each GPU ({parts}), which has "
        f"{memory / GB:.1f}; what fits: {'; or '.join(would) or 'nothing known'}; "
        "--skip-fit-check goes on all the same"
    )

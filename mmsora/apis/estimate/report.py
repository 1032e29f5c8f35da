"""Estimates as text: for people, for scripts, and as the table of all shipped configs."""

from collections.abc import Iterator, Sequence
from re import match
from typing import Any, NamedTuple

from mmengine.config import Config

from mmsora.apis.estimate.advice import Advice, advise
from mmsora.apis.estimate.total import (
    MOST_SAMPLES,
    Estimate,
    changed,
    estimate,
    largest_batch,
)
from mmsora.utils.config_check import apply_choice
from mmsora.utils.config_names import config_names, load_config
from mmsora.utils.gpus import GPU, GPUS
from mmsora.utils.user_error import UserError

__all__ = ["Machine", "as_dict", "gpus_of", "lines", "machine_of", "most_samples", "on", "table"]

GB, TFLOP = 1e9, 1e12
UNMEASURED = "All of it is arithmetic; nothing here was measured."


class Machine(NamedTuple):
    """Some GPUs of one kind, by the name that layouts of configs have."""

    layout: str
    gpu: str
    gpus: int


MACHINES = (
    Machine("1x4090", "rtx4090", 1),
    Machine("4xa6000", "a6000", 4),
    Machine("2xa100", "a100-80", 2),
    Machine("8xa100", "a100-80", 8),
)


def machine_of(layout: str | None) -> Machine | None:
    """The GPUs that a layout is for, where its name says so."""
    return next((machine for machine in MACHINES if machine.layout == layout), None)


def gpus_of(layout: str | None, wanted: int | None) -> int:
    """How many GPUs are estimated for.

    Args:
        layout: One named ``8xa100`` is for eight.
        wanted: Their number, if one is asked for.

    Returns:
        The number; one where neither names any.

    Raises:
        UserError: The two contradict each other.
    """
    found = match(r"(\d+)x", layout or "")
    if found is None:
        return wanted or 1
    if wanted not in (None, int(found[1])):
        raise UserError(
            f"--layout {layout} is for {found[1]} GPUs, --gpus says {wanted}; drop one"
        )
    return int(found[1])


def most_samples(cfg: Config, memory: int, processes: int) -> str:
    """The largest batch that fits on a GPU, in words.

    Args:
        cfg: The config.
        memory: Bytes of the GPU.
        processes: GPUs.

    Returns:
        A number, or the one that was asked for at most.
    """
    most = max(MOST_SAMPLES, cfg.train_dataloader.batch_size)
    found = largest_batch(cfg, memory, processes, most)
    return f"{found} or more" if found == most else str(found)


def on(cfg: Config, machine: Machine) -> Config:
    """A config for a machine: by its own layout, else with the published batch dealt out.

    Args:
        cfg: The config.
        machine: The GPUs.

    Returns:
        Another config.
    """
    other = changed(cfg, {})
    if machine.layout in cfg.get("layouts", {}):
        apply_choice(other, "layouts", machine.layout)
        return other
    whole = cfg.get("auto_scale_lr", {}).get("base_batch_size")
    count = cfg.optim_wrapper.get("accumulative_counts", 1) * machine.gpus
    if whole and whole % count == 0:
        other.train_dataloader.batch_size = whole // count
    return other


def lines(estimated: Estimate, gpus: Sequence[GPU], mfu: float) -> Iterator[str]:
    """What people read.

    Args:
        estimated: The estimate.
        gpus: To compare with.
        mfu: Share of a GPU's peak that is reached.

    Yields:
        Lines.
    """
    e, cost, share = estimated, estimated.cost, estimated.parallel.sequence * TFLOP
    many = f"{e.processes} GPU{'s' * (e.processes > 1)}, parallel {e.parallel.mode}"
    yield f"{many}: {e.batch} samples on each, {e.global_batch} an update, precision {e.precision}"
    yield UNMEASURED
    yield "\nmemory on each GPU"
    for name, size in e.parts.items():
        note = "   assumed: context, workspaces, and 5 % lost" if name == "slack" else ""
        yield f"  {name:<20}{size / GB:9.2f} GB{note}"
    yield f"  {'not at once':<20}{-e.not_at_once / GB:9.2f} GB   gradients come as others go"
    yield f"  {'together':<20}{e.total / GB:9.2f} GB"
    if e.host:
        yield f"  {'in the host memory':<20}{e.host / GB:9.2f} GB"
    yield "\nwork of an iteration on each GPU"
    for name, count in (
        ("forward", cost.forward),
        ("backward", cost.backward),
        ("frozen parts", cost.frozen),
    ):
        yield f"  {name:<20}{count / share:9.2f} TFLOP"
    yield f"\nat {mfu:.0%} of the vendor's peak, {e.iterations:,} iterations"
    for gpu in gpus:
        hours = e.hours(gpu, mfu)
        yield (
            f"  {gpu.title:<12}{gpu.memory / GB:6.1f} GB  "
            f"{'fits' if e.total <= gpu.memory else 'no  '}  "
            f"{e.seconds(gpu, mfu) * 1e3:10.1f} ms an iteration  {_time(hours):>10}  "
            f"{hours * e.processes:10.{1 if hours > 1 else 3}f} GPU-hours"
        )


def as_dict(estimated: Estimate, gpus: dict[str, GPU], mfu: float) -> dict[str, Any]:
    """What scripts read: bytes, FLOPs, seconds and hours.

    Args:
        estimated: The estimate.
        gpus: To compare with, by name.
        mfu: Share of a GPU's peak that is reached.

    Returns:
        Plain values.
    """
    e = estimated
    return {
        "processes": e.processes,
        "parallel": vars(e.parallel),
        "batch": e.batch,
        "global_batch": e.global_batch,
        "precision": e.precision,
        "iterations": e.iterations,
        "bytes": {**e.parts, "not at once": -e.not_at_once, "together": e.total, "host": e.host},
        "flops": {**e.cost._asdict(), "on each GPU": e.flops},
        "mfu": mfu,
        "gpus": {
            name: {
                "memory": gpu.memory,
                "fits": e.total <= gpu.memory,
                "seconds": e.seconds(gpu, mfu),
                "hours": e.hours(gpu, mfu),
                "gpu_hours": e.hours(gpu, mfu) * e.processes,
            }
            for name, gpu in gpus.items()
        },
    }


def table(names: Sequence[str], mfu: float) -> Iterator[str]:
    """Shipped configs against the machines that people have, in Markdown.

    Args:
        names: Of the configs; none is all.
        mfu: Share of a GPU's peak that is reached.

    Yields:
        Lines.
    """
    titles = [f"{m.gpus} x {GPUS[m.gpu].title}" for m in MACHINES]
    yield f"| config | {' | '.join(titles)} |"
    yield f"|---|{'---|' * len(titles)}"
    for name in names or sorted(config_names()):
        cfg = load_config(name)
        cells = [_cell(on(cfg, machine), machine, mfu) for machine in MACHINES]
        yield f"| `{name}` | {' | '.join(cells)} |"


def _cell(cfg: Config, machine: Machine, mfu: float) -> str:
    gpu, found = GPUS[machine.gpu], estimate(cfg, machine.gpus)
    with_it = ""
    if found.total > gpu.memory:
        advice = next(advise(cfg, gpu.memory, machine.gpus), None)
        if advice is None:
            return f"no: {found.total / GB:.0f} GB"
        found, with_it = advice.estimate, f"; {_words(advice)}"
    hours = found.hours(gpu, mfu)
    return f"{found.total / GB:.1f} GB, {_time(hours)}{with_it}"


def _time(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"


def _words(advice: Advice) -> str:
    options = advice.options
    words = [
        f"`{key}={value}`"
        for key, value in options.items()
        if key.startswith(("activation_checkpointing", "parallel", "optim_wrapper.precision"))
    ]
    if "optim_wrapper.optimizer.type" in options:
        words.append("8-bit AdamW")
    if "train_dataloader.batch_size" in options:
        words.append(f"batch {options['train_dataloader.batch_size']} and accumulation")
    if advice.processes > 1 and "parallel.mode" in options:
        words.append(f"{advice.processes} GPUs")
    return ", ".join(words)

"""Snapshots of averaged weights on disk, and other averages made of them after training."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmsora.engine.ema import Profile, combination
from mmsora.registry import TASK_UTILS
from mmsora.utils.atomic import atomic_path
from mmsora.utils.user_error import UserError

__all__ = ["Posthoc", "Snapshot", "posthoc_ema", "set_aside", "snapshots_of", "write_snapshot"]

FOLDER = "ema_snapshots"
META = "mmsora"


class Snapshot(NamedTuple):
    """Averages of one moment, in one file.

    Attributes:
        path: The file.
        steps: Optimizer steps so far.
        profiles: Of the averages, in the file's order.
        cfg: The run's config as plain values.
    """

    path: Path
    steps: int
    profiles: list[Profile]
    cfg: dict[str, Any]


class Posthoc(NamedTuple):
    """An average made after training.

    Attributes:
        weights: The denoiser's state dict, in float32.
        steps: Optimizer steps so far.
        parts: How many averages it is made of.
        error: Of its profile, relative.
        cfg: The run's config as plain values.
    """

    weights: dict[str, Tensor]
    steps: int
    parts: int
    error: float
    cfg: dict[str, Any]


def write_snapshot(
    snapshot: Snapshot, averages: Sequence[Mapping[str, Tensor]], rest: Mapping[str, Tensor]
) -> None:
    """Write averages whole or not at all.

    Args:
        snapshot: What is written, and where to.
        averages: Averaged weights for each profile.
        rest: What of the denoiser's state dict is not averaged.
    """
    tensors = {f"rest.{k}": v.detach().cpu().clone() for k, v in rest.items()}  # shared or not
    for i, average in enumerate(averages):
        tensors |= {f"{i}.{name}": value.cpu() for name, value in average.items()}
    profiles = [{"type": type(p).__name__, **vars(p)} for p in snapshot.profiles]
    meta = {"steps": snapshot.steps, "profiles": profiles, "cfg": snapshot.cfg}
    packed = {name: value.contiguous() for name, value in tensors.items()}
    with atomic_path(snapshot.path) as temporary:
        save_file(packed, temporary, {META: json.dumps(meta)})


def snapshot_path(run_dir: str | Path, steps: int) -> Path:
    """Where the snapshot of a step lies."""
    return Path(run_dir) / FOLDER / f"step_{steps:08d}.safetensors"


def snapshots_of(run_dir: str | Path) -> list[Snapshot]:
    """The snapshots of a run, by step.

    Args:
        run_dir: The run's directory.

    Returns:
        What is in them but the weights.

    Raises:
        UserError: A file cannot be read.
    """
    return [_read(path) for path in sorted((Path(run_dir) / FOLDER).glob("step_*.safetensors"))]


def _read(path: Path) -> Snapshot:
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads(file.metadata()[META])
        profiles = []
        for values in meta["profiles"]:
            kind = TASK_UTILS.module_dict[values.pop("type")]
            profiles.append(kind(**values))
        return Snapshot(path, meta["steps"], profiles, meta["cfg"])
    except (OSError, SafetensorError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path} is truncated or no EMA snapshot: {error!r}") from error


def set_aside(run_dir: str | Path, steps: int) -> int:
    """Make way for a run that goes on from a step: later snapshots are of an earlier attempt.

    They are moved to a folder ``old`` beside them; halves that a kill left are deleted.

    Args:
        run_dir: The run's directory.
        steps: Optimizer steps that the run goes on from.

    Returns:
        How many snapshots were moved.
    """
    folder = Path(run_dir) / FOLDER
    for half in folder.glob(".step_*.tmp.safetensors"):
        half.unlink()
    first = snapshot_path(run_dir, steps + 1).name
    late = [path for path in folder.glob("step_*.safetensors") if path.name >= first]
    for path in late:
        (folder / "old").mkdir(exist_ok=True)
        path.replace(folder / "old" / path.name)
    return len(late)


def posthoc_ema(run_dir: str | Path, profile: Profile, steps: int | None = None) -> Posthoc:
    """Make an average of any profile from a run's snapshots.

    Args:
        run_dir: The run's directory.
        profile: The wanted one.
        steps: Optimizer steps it is to cover; None is as many as the last snapshot.

    Returns:
        The average.

    Raises:
        UserError: There are no snapshots, or they cannot be read.
        ValueError: The step is past the last one.
    """
    found = snapshots_of(run_dir)
    if not found:
        raise UserError(
            f"{run_dir} holds no EMA snapshots; train with DenoiserEMAHook(profiles=..., "
            "snapshot_interval=...)"
        )
    last = found[-1]
    steps = last.steps if steps is None else steps
    kept = [(each, snapshot.steps) for snapshot in found for each in snapshot.profiles]
    factors, error = combination(kept, (profile, steps))
    weights = _combined(found, factors)
    return Posthoc(weights, steps, len(kept), error, last.cfg)


def _combined(found: Sequence[Snapshot], factors: Tensor) -> dict[str, Tensor]:
    """The state dict; one tensor of one file at a time is in memory besides."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(each.path, "pt")) for each in found]
        parts = [
            (file, str(i))
            for file, each in zip(files, found, strict=True)
            for i in range(len(each.profiles))
        ]
        weights: dict[str, Tensor] = {}
        for key in files[-1].keys():  # noqa: SIM118 - no container, it only has the method
            part, _, name = key.partition(".")
            if part == "rest":
                weights[name] = files[-1].get_tensor(key)
            elif part == "0":
                total = torch.zeros((), dtype=torch.float64)
                for factor, (file, i) in zip(factors, parts, strict=True):
                    total = total + factor * file.get_tensor(f"{i}.{name}")
                weights[name] = total.float()
    return weights

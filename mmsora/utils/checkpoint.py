"""Checkpoint files: plain types, whole or not there, read without running code."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmsora.utils.atomic import atomic_path
from mmsora.utils.user_error import UserError

__all__ = ["latest_checkpoint", "load_checkpoint", "load_weights", "plain", "save_checkpoint"]


def plain(value: Any) -> Any:
    """A copy of plain types only: what is neither number, text, tensor nor container is left out.

    Args:
        value: Anything.

    Returns:
        The copy. Tensors are on the CPU.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items() if _is_plain(v)}
    if isinstance(value, list | tuple):
        items = [plain(v) for v in value if _is_plain(v)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _is_plain(value: Any) -> bool:
    types = Tensor | Mapping | list | tuple | str | bytes | bool | int | float | None
    return isinstance(value, types) and type(value).__module__ != "numpy"


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint; a kill at any moment leaves the old file or the new one, whole.

    Args:
        checkpoint: Plain types and tensors.
        path: Where to.
    """
    with atomic_path(path) as temporary:
        torch.save(dict(checkpoint), temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU. No code in it is run.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        UserError: There is no such file, or it is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        near = [near for near in path.parent.glob("*.pth") if near.name[0] != "."]
        near.sort(key=lambda near: near.stat().st_mtime)
        hint = f"; there are {', '.join(p.name for p in near[-3:])}" if near else ""
        raise UserError(f"checkpoint {path} does not exist{hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any bytes may be fed to the unpickler
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it is empty"
        raise UserError(
            f"checkpoint {path} cannot be read, it is truncated or no checkpoint: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not a dict")
    return content


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load all weights of a module, or name what does not fit.

    Args:
        module: Where to.
        weights: Its state dict.
        source: Where the weights come from, for the message.

    Raises:
        UserError: Keys or shapes differ: the checkpoint is of another architecture.
    """
    own = module.state_dict()
    faults = [f"missing {key}" for key in own if key not in weights]
    faults += [f"unknown {key}" for key in weights if key not in own]
    faults += [
        f"{key} is {tuple(weights[key].shape)} there and {tuple(own[key].shape)} here"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"{source} is of another architecture than the config's "
            f"{type(module).__name__}: {'; '.join(faults[:3])}{more}"
        )
    module.load_state_dict(weights)


def latest_checkpoint(work_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run. Files are whole or not there, so the last one will do.

    Args:
        work_dir: The run's directory.

    Returns:
        Its path, or None when there is none.
    """
    numbered = [
        (int(match[1]), path)
        for path in Path(work_dir).glob("iter_*.pth")
        if (match := re.fullmatch(r"iter_(\d+)\.pth", path.name))
    ]
    return max(numbered)[1] if numbered else None

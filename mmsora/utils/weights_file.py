"""One safetensors file of a denoiser's weights, and in its header what they are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmsora.utils.atomic import atomic_path

__all__ = ["read_weights_file", "write_weights_file"]

KEY = "mmsora"  # in the header, beside the "format" of other libraries


def write_weights_file(
    path: str | Path, weights: Mapping[str, Tensor], part: str = "", meta: Any = None
) -> None:
    """Write the file, whole or not at all.

    Args:
        path: Where to.
        weights: By their names.
        part: What a checkpoint calls them, as ``ema``; without it the file is one of weights
            alone.
        meta: Of the checkpoint, what JSON can hold.
    """
    header = {"format": "pt"}
    if part:
        header[KEY] = json.dumps({"part": part, "meta": meta})
    with atomic_path(path) as temporary:
        save_file({k: v.contiguous() for k, v in weights.items()}, temporary, header)


def read_weights_file(path: str | Path) -> dict[str, Any]:
    """Read a safetensors file, ours or not.

    Args:
        path: The file.

    Returns:
        Of ours a checkpoint of ``meta`` and a part; of another one its weights. They are paged in
        when they are used.
    """
    with safe_open(path, "pt") as file:
        note = (file.metadata() or {}).get(KEY)
    weights = load_file(path)
    said = json.loads(note or "{}")
    if "part" not in said:  # not ours, or a snapshot of averages, which has notes of its own
        return weights
    return {"meta": said["meta"], said["part"]: weights}

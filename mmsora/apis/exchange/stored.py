"""Checkpoints of any kind under one view: what they hold, and their tensors one by one."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsora.utils.checkpoint import latest_checkpoint, load_checkpoint
from mmsora.utils.checkpoint_folder import CheckpointFolder, is_folder
from mmsora.utils.user_error import UserError

__all__ = ["CONFIG_FILE", "CONFIG_KEY", "WEIGHTS_FILE", "Entry", "Stored", "content_of"]

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"  # diffusers'
CONFIG_KEY = "_mmsora_meta"  # in CONFIG_FILE; diffusers' classes pass over such a key


class Entry(NamedTuple):
    """A tensor that was not read.

    Attributes:
        shape: Its sizes.
        dtype: Its type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def values(self) -> int:
        """How many numbers."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """What they take."""
        return self.values * self.dtype.itemsize


class Stored:
    """A checkpoint, of which only what is no tensor has been read.

    Args:
        path: A checkpoint folder, a run's work dir (its newest), a file of ours or of others, or a
            folder of diffusers' kind.

    Attributes:
        path: Of the checkpoint itself.
        kind: What it is, in words.
        meta: What it says of itself; empty where it is not ours.
        entries: The tensors by flat name; the part before the first ``/`` is as in the
            checkpoint, and weights that lie bare are of ``weights``.

    Raises:
        UserError: There is no such checkpoint, or it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.is_dir() and not is_folder(path):
            path = latest_checkpoint(path) or path
        self.path = path
        self._folder = CheckpointFolder(path) if is_folder(path) else None
        self._tensors: dict[str, Tensor] = {}
        if self._folder is not None:
            self.kind = "checkpoint folder"
            self.meta: dict[str, Any] = self._folder.rest.get("meta", {})
            self.entries = {
                name: Entry(tuple(stored.size), stored.properties.dtype)
                for name, stored in self._folder.tensors.items()
            }
            return
        content = content_of(path)
        self.kind = "folder of diffusers' kind" if path.is_dir() else f"{path.suffix} file"
        self.meta = content.get("meta") or {}
        for name, tensor in _tensors(content):
            self._tensors[name if "/" in name else f"weights/{name}"] = tensor
        self.entries = {k: Entry(tuple(v.shape), v.dtype) for k, v in self._tensors.items()}

    @property
    def parts(self) -> list[str]:
        """The parts that hold tensors, in their order."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.entries))

    @property
    def config(self) -> dict[str, Any] | None:
        """The config as plain values, or None."""
        return json.loads(self.meta["cfg"]) if "cfg" in self.meta else None

    @property
    def num_bytes(self) -> int:
        """On the disk."""
        files = self.path.iterdir() if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())

    def named(self, part: str) -> dict[str, str]:
        """Flat names of the tensors of a part, by the rest of the name."""
        start = f"{part}/"
        return {name.removeprefix(start): name for name in self.entries if name.startswith(start)}

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, by its flat name."""
        if self._folder is None:
            return self._tensors[name]
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._folder.read_into({name: tensor})
        return tensor


def content_of(path: Path) -> dict[str, Any]:
    """A checkpoint's content, of a folder of diffusers' kind too.

    Args:
        path: A checkpoint, or such a folder.

    Returns:
        As of ``load_checkpoint``.

    Raises:
        UserError: It cannot be read.
    """
    if not (path / CONFIG_FILE).is_file():
        return load_checkpoint(path)
    content = load_checkpoint(path / WEIGHTS_FILE)
    try:
        said = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path / CONFIG_FILE} cannot be read: {error}") from error
    meta = said.get(CONFIG_KEY)
    return {"meta": meta, meta["part"]: content} if meta else content


def _tensors(tree: Mapping[Any, Any], start: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{start}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{start}{key}/")

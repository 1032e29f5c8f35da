"""Tensors of many samples in a few large files, each written whole or not at all.

A store is a folder::

    manifest.json                  what was stored, and what made it
    shard-000000.safetensors ...   rows_per_shard samples each, the last one fewer
    shared.safetensors             tensors that all samples share, where there are any
    index.json                     the shards with their checksums, once all are there

A shard stacks the tensors of its samples, (samples, ...). Those that differ in shape lie one after
the other, flat, beside ``<key>.shapes``. What is in a shard is a function of its samples alone, so
that it does not matter who wrote it, and when.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mmsora.utils.atomic import atomic_path, write_json
from mmsora.utils.config_check import config_diff
from mmsora.utils.user_error import UserError

__all__ = ["MANIFEST", "FeatureStore", "FeatureWriter", "checksum", "read_manifest"]

FORMAT = 1
MANIFEST, INDEX, SHARED = "manifest.json", "index.json", "shared.safetensors"
CHANGED = "list: files or annotations of the dataset have changed since"
OF_DATA = ("list: ", "rows: ", "samples: ")  # what such a change changes
OPEN_FILES = 64  # of a reader at once
HEADER_SIZE = 8  # bytes, before the header of a safetensors file
DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_manifest(root: str | Path) -> dict[str, Any]:
    """The manifest of a store.

    Args:
        root: Its folder.

    Returns:
        What ``FeatureWriter`` was given.

    Raises:
        UserError: There is none, or of a later format.
    """
    path = Path(root, MANIFEST)
    manifest = _read_json(
        path,
        "no features are stored here; make them: python tools/extract_features.py CONFIG --out "
        f"{root}",
    )
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {manifest.get('format')!r}, this version reads {FORMAT}; extract anew"
        )
    return manifest


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


class FeatureWriter:
    """Writes a store, alone or as one of several processes that know nothing of one another.

    Shard ``k`` is written by process ``k % world``, and a shard that exists is whole. So the work
    may be stopped at any moment, and go on with another number of processes.

    Args:
        root: Folder to write to. One that is there must have the same manifest.
        manifest: Plain values; ``rows`` is the number of samples, ``rows_per_shard`` how many go
            into a file.
        rank: Number of this process.
        world: Number of processes.

    Raises:
        UserError: What is in the folder has another manifest; the differences are named.
    """

    def __init__(
        self, root: str | Path, manifest: Mapping[str, Any], rank: int = 0, world: int = 1
    ) -> None:
        self.root, self.rank, self.world = Path(root), rank, world
        self.manifest = json.loads(json.dumps({"format": FORMAT, **manifest}))
        self.rows, self.rows_per_shard = self.manifest["rows"], self.manifest["rows_per_shard"]
        self.num_shards = -(-self.rows // self.rows_per_shard)
        self._claim()
        self._clean()

    def _claim(self) -> None:
        """Put the manifest where none is, compare it where one is."""
        path = self.root / MANIFEST
        if not path.exists():
            own = path.with_name(f".manifest.{os.getpid()}.json")
            write_json(own, self.manifest)
            with suppress(FileExistsError, FileNotFoundError):  # another process was first
                os.link(own, path)
        changes = config_diff(read_manifest(self.root), self.manifest)
        if changes:
            told = [CHANGED if line.startswith("list: ") else line for line in changes]
            of_data = all(line.startswith(OF_DATA) for line in changes) and CHANGED in told
            fix = (
                "Write to another folder, or delete this one"
                if of_data
                else "Set this back, or write to another folder"
            )
            raise UserError(f"{self.root} holds other features: {'; '.join(told)}. {fix}")

    def _clean(self) -> None:
        """Remove what a process that was killed left of files that are this one's to write."""
        for left in self.root.glob(".*.*"):
            kind, _, number = left.name.split(".")[1].partition("-")
            ours = int(number) % self.world == self.rank if number.isdigit() else self.rank == 0
            if kind == "manifest" or (kind in ("shard", "shared", "index") and ours):
                left.unlink(missing_ok=True)

    def _shard(self, number: int) -> Path:
        return self.root / _shard_name(number)

    def _is_there(self, shard: int) -> bool:
        return self._shard(shard).exists()

    def missing(self) -> list[int]:
        """The shards of this process that are still to be written."""
        own = range(self.rank, self.num_shards, self.world)
        return [number for number in own if not self._is_there(number)]

    def rows_of(self, shard: int) -> range:
        """The samples of a shard."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.rows))

    def write(self, shard: int, records: Sequence[Mapping[str, Tensor]]) -> None:
        """Write a shard.

        Args:
            shard: Its number.
            records: The tensors of each of its samples, under the same keys.

        Raises:
            ValueError: These are not the samples of the shard, or their keys differ.
        """
        if len(records) != len(self.rows_of(shard)):
            raise ValueError(
                f"shard {shard} has {len(self.rows_of(shard))} samples, got {len(records)}"
            )
        _save(_packed(records), self._shard(shard))

    def write_shared(self, tensors: Mapping[str, Tensor]) -> None:
        """Write what all samples share, such as the embedding of no text."""
        if self.rank == 0 and not (self.root / SHARED).exists():
            _save(dict(tensors), self.root / SHARED)

    def finish(self) -> int:
        """Write the index if all shards are there.

        Returns:
            How many shards are missing, of all processes.
        """
        paths = [self._shard(number) for number in range(self.num_shards)]
        missing = sum(not self._is_there(number) for number in range(self.num_shards))
        if not missing:
            shards = []
            for number, path in enumerate(paths):
                layout = _Layout.read(path)
                shards.append(
                    {
                        "file": path.name,
                        "rows": len(self.rows_of(number)),
                        "bytes": path.stat().st_size,
                        "sha256": layout.checksum,
                    }
                )
            write_json(self.root / INDEX, {"rows": self.rows, "shards": shards})
        return missing


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def _packed(records: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a shard from those of its samples."""
    if any(record.keys() != records[0].keys() for record in records):
        raise ValueError(f"all samples of a shard have the same keys, here {sorted(records[0])}")
    packed = {}
    for key in sorted(records[0]):
        values = [record[key] for record in records]
        shapes = {value.shape for value in values}
        if len(shapes) == 1:
            packed[key] = torch.stack(values)
        elif len({value.ndim for value in values}) > 1:
            raise ValueError(f"{key}: samples have {sorted({v.ndim for v in values})} axes")
        else:
            packed[key] = torch.cat([value.flatten() for value in values])
            packed[f"{key}.shapes"] = torch.tensor([list(value.shape) for value in values])
    return packed


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"sha256": checksum(tensors)}))


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and values, of which safetensors itself keeps none."""
    found = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        found.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


class _Tensor(NamedTuple):
    """Where a tensor lies in a shard: its first byte, its type, and the shape of all samples."""

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Layout(NamedTuple):
    """What the header of a shard says."""

    tensors: dict[str, _Tensor]
    checksum: str
    ragged: dict[str, tuple[list[list[int]], list[int]]]  # shape and first number of each sample

    @classmethod
    def read(cls, path: Path) -> "_Layout":
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(HEADER_SIZE), "little")
                if length > os.fstat(file.fileno()).st_size:
                    raise ValueError("cut short")
                header = json.loads(file.read(length))
                found, ends = {}, [0]
                for key, info in header.items():
                    if key != "__metadata__":
                        begin, end = info["data_offsets"]
                        ends.append(end)
                        begin += HEADER_SIZE + length
                        found[key] = _Tensor(begin, DTYPES[info["dtype"]], tuple(info["shape"]))
                if os.fstat(file.fileno()).st_size != HEADER_SIZE + length + max(ends):
                    raise ValueError("cut short, or something was added")
                shapes = {
                    key.removesuffix(".shapes"): _pread(file.fileno(), key, where)
                    for key, where in found.items()
                    if key.endswith(".shapes")
                }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: no whole shard ({error}); delete it and extract again: only what is "
                "missing is made"
            ) from error
        ragged = {}
        for key, value in shapes.items():
            sizes = value.prod(dim=1)
            ragged[key] = value.tolist(), (sizes.cumsum(0) - sizes).tolist()
        return cls(found, header.get("__metadata__", {}).get("sha256", ""), ragged)


def _pread(file: int, what: Any, where: _Tensor) -> Tensor:
    count = math.prod(where.shape)
    buffer = bytearray(count * where.dtype.itemsize)
    if not buffer:
        return torch.empty(where.shape, dtype=where.dtype)
    if os.preadv(file, [buffer], where.begin) != len(buffer):
        raise UserError(f"{what}: cut short")
    return torch.frombuffer(buffer, dtype=where.dtype).view(where.shape)


class FeatureStore:
    """Reads a store, sample by sample in any order, in any number of processes.

    Args:
        root: Its folder.

    Raises:
        UserError: There is none, or it is not complete.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.manifest = read_manifest(root)
        self.index = _read_json(
            self.root / INDEX,
            "the extraction has not come to its end; run tools/extract_features.py again: it goes "
            "on where it stopped",
        )
        self._layouts: dict[int, _Layout] = {}
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return self.manifest["rows"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)

    @property
    def names(self) -> list[str]:
        """The names of a sample's tensors."""
        return [key for key in self._layout(0).tensors if not key.endswith(".shapes")]

    def read(self, key: str, row: int, *part: int) -> Tensor:
        """A tensor of a sample, or a part of it.

        Args:
            key: The tensor's name.
            row: The number of the sample.
            *part: Indices into the first axes of the tensor; the rest is not read.

        Returns:
            The tensor, writable and its own.

        Raises:
            UserError: A file is damaged.
        """
        shard, row = divmod(row, self.manifest["rows_per_shard"])
        layout = self._layout(shard)
        where = layout.tensors[key]
        if key in layout.ragged:
            shapes, begins = layout.ragged[key]
            shape, begin = tuple(shapes[row]), begins[row]
        else:
            shape = where.shape[1:]
            begin = row * math.prod(shape)
        for index in part:
            if not 0 <= index < shape[0]:
                raise IndexError(f"{key}: no part {index} of {shape[0]}")
            shape = shape[1:]
            begin += index * math.prod(shape)
        begin = where.begin + begin * where.dtype.itemsize
        return _pread(self._file(shard), self._path(shard), _Tensor(begin, where.dtype, shape))

    def shared(self) -> dict[str, Tensor]:
        """The tensors that all samples share."""
        path = self.root / SHARED
        return load_file(path) if path.exists() else {}

    def verify(self) -> None:
        """Read everything and compare the checksums.

        Raises:
            UserError: A shard is damaged or missing.
        """
        for number, entry in enumerate(self.index["shards"]):
            self._layout(number)
            if checksum(load_file(self._path(number))) != entry["sha256"]:
                raise UserError(
                    f"{self._path(number)}: its content has changed since it was written; delete "
                    "it and extract again: only what is missing is made"
                )

    def _path(self, shard: int) -> Path:
        return self.root / _shard_name(shard)

    def _layout(self, shard: int) -> _Layout:
        if shard not in self._layouts:
            self._layouts[shard] = _Layout.read(self._path(shard))
        return self._layouts[shard]

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self._path(shard), os.O_RDONLY)
        return self._files[shard]

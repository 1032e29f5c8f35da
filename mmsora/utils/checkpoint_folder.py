"""Checkpoints of one or many processes: folders that are whole or not there.

Tensors lie in the format of ``torch.distributed.checkpoint``, each process' shards in a file of
its own, under flat names such as ``state_dict/denoiser.head.weight``. So they can be read by
another number of processes, which shard them otherwise or not at all. All else is in one small
file of plain types. Reading runs no code that a file may hold.
"""

import errno
import os
import pickle
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from mmsora.utils.user_error import UserError

__all__ = ["CheckpointFolder", "is_folder", "is_whole", "save_folder", "save_folder_behind"]

METADATA = ".metadata"
REST = "rest.pth"
SPARE = 1 << 20  # bytes of disk for what is no tensor


def save_folder(
    checkpoint: Mapping[str, Any], path: str | Path, group: ProcessGroup | None = None
) -> None:
    """Write a checkpoint; all processes call it.

    A kill at any moment leaves the folder whole or not there.

    Args:
        checkpoint: Nested dicts with tensors, sharded or not, and plain types. A tensor that is
            no DTensor is whole in each process that has it; the rest is taken from the first.
        path: The folder, which takes its name when all processes are done.
        group: The processes; by default all.

    Raises:
        UserError: It cannot be written; what was written of it is removed.
    """
    tensors, rest = _split(checkpoint)
    _write(tensors, rest, Path(path), group)


def save_folder_behind(
    checkpoint: Mapping[str, Any], path: str | Path, group: ProcessGroup | None = None
) -> Future[None]:
    """As ``save_folder``, but copy the tensors to the CPU and write while the caller goes on.

    Args:
        checkpoint: As there.
        path: As there.
        group: As there; nothing else may use it meanwhile.

    Returns:
        Tells when it is done, and raises what went wrong.
    """
    tensors, rest = _split(checkpoint)
    copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
    thread = ThreadPoolExecutor(1, "checkpoint")
    future = thread.submit(_write, copies, rest, Path(path), group)
    thread.shutdown(wait=False)
    return future


def _split(tree: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[Any, Any]]:
    """The tensors in nested dicts by their joined names, and all else as it is nested."""
    tensors: dict[str, Tensor] = {}
    rest: dict[Any, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            tensors[str(key)] = value.detach()
        elif isinstance(value, Mapping):
            inner, others = _split(value)
            tensors |= {f"{key}/{name}": tensor for name, tensor in inner.items()}
            if others or not inner:
                rest[key] = others
        else:
            rest[key] = value
    return tensors, rest


def _write(
    tensors: dict[str, Tensor], rest: dict[Any, Any], path: Path, group: ProcessGroup | None
) -> None:
    writer, planner = _Writer(path, rest), DefaultSavePlanner(flatten_state_dict=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it may be
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group)
    except dcp.CheckpointException as error:
        shutil.rmtree(writer.path, ignore_errors=True)
        rank, (cause, _) = next(iter(error.failures.items()))
        if not isinstance(cause, Exception):  # Ctrl-C
            raise cause from None
        reason = cause.strerror if isinstance(cause, OSError) else str(cause)
        room = ""
        if writer.needed:  # the first process knows
            free = shutil.disk_usage(path.parent).free
            room = f" ({writer.needed:,} bytes needed, {free:,} free)"
        raise UserError(
            f"checkpoint {path} cannot be written by rank {rank}: {reason}{room}"
        ) from error


class _Writer(dcp.FileSystemWriter):
    """Writes a hidden folder that takes its name when all of it is on the disk."""

    def __init__(self, path: Path, rest: Mapping[Any, Any]) -> None:
        super().__init__(path.with_name(f".{path.name}.tmp"))
        self.target, self.rest, self.needed = path, rest, 0

    def storage_meta(self) -> StorageMeta:
        """Nothing: by default it is a path, whose class is not of plain types."""
        return StorageMeta()

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """In the first process, before any writes."""
        shutil.rmtree(self.path)  # a kill may have left something
        os.mkdir(self.path)
        self.needed = SPARE + sum(
            item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
            for plan in plans
            for item in plan.items
            if item.tensor_data is not None
        )
        if shutil.disk_usage(self.path).free < self.needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """In the first process, when all have written; they wait for it."""
        super().finish(metadata, results)
        for name in {result.storage_data.relative_path for each in results for result in each}:
            if not Path(self.path, name).exists():
                text = f"{name} is on another machine; all are to share the disk of the work_dir"
                raise OSError(errno.ENOENT, text)
        with open(Path(self.path, REST), "wb") as file:
            torch.save(dict(self.rest), file)
            file.flush()
            os.fsync(file.fileno())
        _sync(self.path)
        old = self.target.with_name(f".{self.target.name}.old.tmp")
        if self.target.exists():  # of an earlier attempt that went on from before
            os.replace(self.target, old)
        os.replace(self.path, self.target)
        _sync(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointFolder:
    """A checkpoint that ``save_folder`` wrote.

    Args:
        path: The folder.

    Attributes:
        rest: All that is no tensor.
        tensors: Size and type of each tensor by its flat name.

    Raises:
        UserError: It is no whole checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._reader = _Reader(self.path)
        with self._errors_told():
            self._metadata = self._reader.read_metadata()
            self.rest: dict[str, Any] = torch.load(self.path / REST, "cpu", weights_only=True)
        self.tensors = cast(dict[str, TensorStorageMetadata], self._metadata.state_dict_metadata)

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            name = Path(error.filename).name
            raise UserError(f"checkpoint {self.path} is not whole: {name} is missing") from error
        except Exception as error:  # any bytes may be fed to the unpicklers
            reason = (str(error).strip() or "it is empty").splitlines()[0]
            if reason.startswith("Weights only"):  # PyTorch goes on to advise running its code
                reason = "it holds more than tensors and plain types"
            raise UserError(f"checkpoint {self.path} cannot be read: {reason}") from error

    @property
    def parts(self) -> set[str]:
        """The first parts of the tensors' names."""
        return {name.partition("/")[0] for name in self.tensors}

    def named(self, part: str) -> dict[str, TensorStorageMetadata]:
        """Size and type of each tensor of a part, by the rest of its name."""
        start = f"{part}/"
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def read_into(self, tree: Mapping[str, Any]) -> None:
        """Fill tensors in place, of DTensors the shards that are here.

        Each process reads on its own, what and when it will.

        Args:
            tree: Nested dicts of tensors of the sizes that the checkpoint has.
        """
        tensors, _ = _split(tree)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(tensors, self._metadata, is_coordinator=True)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        plan = planner.finish_plan(planner.create_local_plan())
        with self._errors_told():
            self._reader.read_data(plan, planner).wait()

    def load(self, parts: Collection[str] | None = None) -> dict[str, Any]:
        """Read whole tensors to the CPU.

        Args:
            parts: First parts of the names of those to read; None reads all.

        Returns:
            All as it was nested when it was saved.
        """
        tensors = {
            name: torch.empty(stored.size, dtype=stored.properties.dtype)
            for name, stored in self.tensors.items()
            if parts is None or name.partition("/")[0] in parts
        }
        self.read_into(tensors)
        content = _copy(self.rest)
        for name, tensor in tensors.items():
            *folders, last = name.split("/")
            place = content
            for folder in folders:
                place = place.setdefault(folder, {})
            place[last] = tensor
        return content


def _copy(tree: Any) -> Any:
    """Nested dicts that may be added to."""
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def is_folder(path: str | Path) -> bool:
    """Whether a folder is a checkpoint, or a part of one."""
    return any(Path(path, name).is_file() for name in (METADATA, REST))


def is_whole(path: str | Path) -> bool:
    """Whether a folder is a checkpoint of which nothing is missing."""
    try:
        CheckpointFolder(path)
    except UserError:
        return False
    return True


class _Reader(dcp.FileSystemReader):
    """Reads a folder without running what is in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What lies where.

        Args:
            *args: Unused: there is one such file, whatever the number of processes.
            **kwargs: Unused.

        Returns:
            The metadata, checked against the files.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is truncated, or one of another folder is asked for.
        """
        with open(Path(self.path, METADATA), "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        ends: dict[str, int] = {}
        for stored in metadata.storage_data.values():
            name = stored.relative_path
            ends[name] = max(ends.get(name, 0), stored.offset + stored.length)
        for name, end in ends.items():
            if Path(name).name != name:
                raise ValueError(f"{METADATA} asks for {name}, which is not in the folder")
            if os.stat(Path(self.path, name)).st_size < end:
                raise ValueError(f"{name} is truncated")
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what describes tensors, and nothing else: a pickle may name any function to call."""

    ALLOWED = {
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        """Only these and PyTorch's types of numbers.

        Args:
            module: Where it is.
            name: What it is called there.

        Returns:
            It.

        Raises:
            ValueError: It is another one.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f"{METADATA} asks for {module}.{name}, which describes no tensor")

"""What datasets of files share: epochs, random choices, and samples that cannot be used."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

from mmsora.datasets.buckets import BucketIndex
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import MediaError

__all__ = ["IMAGE_EXTENSIONS", "VIDEO_EXTENSIONS", "FileDataset", "read_lines", "scan_classes"]

VIDEO_EXTENSIONS = (".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".gif")
IMAGE_EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp")


class FileDataset(BaseDataset):
    """Files that a pipeline makes samples of. Subclasses define ``load_data_list``.

    Indices beyond the length count epochs: ``index + epoch * len(dataset)`` is sample ``index``
    as it is seen in that epoch. All random choices are a function of (seed, index, epoch), and
    the number is the sample's own, from which its noise derives. ``EpochSampler`` gives such
    numbers; with MMEngine's samplers every epoch repeats the choices of the first.

    A sample that the pipeline refuses, or with ``on_error='skip'`` one that cannot be read, counts
    for nothing: the next one of the list keeps its place in the batch, with ``weight`` 0. So in
    each epoch each good file counts exactly once, whatever the number of processes and workers.
    Each file left out is named once in the log; a list without it saves the time that it takes.

    Args:
        data_root: Folder that the paths of the files start from.
        pipeline: Transforms, or dicts of them.
        seed: Of the random choices, not of the run.
        on_error: What to do with files that cannot be read: ``raise`` or ``skip``.
        indices: Take these samples alone, or so many from the start.
        test_mode: Nothing is chosen at random.
    """

    takes_epochs = True  # EpochSampler asks for this

    def __init__(
        self,
        data_root: str,
        pipeline: Sequence[Any] = (),
        seed: int = 0,
        on_error: str = "raise",
        indices: int | Sequence[int] | None = None,
        test_mode: bool = False,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self.seed, self.on_error = seed, on_error
        super().__init__(
            data_root=str(data_root),
            data_prefix={},
            pipeline=list(pipeline),
            indices=indices,
            test_mode=test_mode,
        )

    def full_init(self) -> None:
        """Read the list of files, once."""
        if not self._fully_initialized:
            super().full_init()
            # Shared by the workers of a loader, so that a file is named once and not by each.
            self._skipped = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    @property
    def num_skipped(self) -> int:
        """How many files have been skipped so far."""
        return int(self._skipped.sum())

    def get_cat_ids(self, idx: int) -> list[int]:
        """The class of a sample, for MMEngine's ``ClassBalancedDataset``."""
        return [self.get_data_info(idx)["label"]]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, idx: int) -> Any:
        if idx < 0:
            raise IndexError(f"samples are counted from 0, got {idx}")
        for shift in range(len(self)):
            data = self.prepare_data(idx, shift)
            if data is not None:
                return data
        raise UserError(f"{self.data_root}: none of {len(self)} files gives a sample")

    def prepare_data(self, idx: int, shift: int = 0) -> Any:
        """Make one sample.

        Args:
            idx: Its number, epochs included.
            shift: How many files further the file is that stands in for its own.

        Returns:
            What the pipeline returns, None for a sample that cannot be used.

        Raises:
            MediaError: The file cannot be read, and ``on_error`` is ``raise``.
        """
        epoch, index = divmod(int(idx), len(self))
        number = (index + shift) % len(self)
        results = self.get_data_info(number)
        path = results["path"] = os.path.join(self.data_root, results["path"])
        results["index"], results["test_mode"] = int(idx), self.test_mode
        results["draws"] = Draws(self.seed, [index], epoch)
        if shift:
            results["weight"] = 0.0
        if isinstance(idx, BucketIndex):
            results["bucket"] = idx.size
        try:
            self.fetch(results)
            data = self.pipeline(results)
        except MediaError as error:
            if self.on_error == "raise":
                raise
            data, results["refused"] = None, error.cause
        if data is None and not shift and not self._skipped[number]:
            self._skipped[number] = True
            cause = results.get("refused", "refused by the pipeline")
            print_log(
                f"skipped {path}: {cause}; it counts for nothing "
                f"({self.num_skipped} of {len(self)} skipped so far)",
                logger="current",
                level=logging.WARNING,
            )
        return data

    def fetch(self, results: dict[str, Any]) -> None:
        """What comes before the pipeline: subclasses whose samples are no files add to it."""


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty, without the space around them.

    Args:
        path: The file, UTF-8.

    Returns:
        At least one line.

    Raises:
        UserError: The file cannot be read or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: an empty list")
    return lines


def scan_classes(root: str | Path, extensions: Sequence[str]) -> dict[str, list[str]]:
    """Find the files of each class.

    Args:
        root: Folder with a folder for each class.
        extensions: Endings that count, in lower case, with the dot. Upper case counts too.

    Returns:
        Names of files by name of class, both sorted. Names that start with a dot are left out.

    Raises:
        UserError: There is no such folder, or no class in it, or no file in those.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; set train_dataloader.dataset.data_root")
    with os.scandir(root) as entries:
        classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise UserError(f"{root}: no class folders in it")
    found = {}
    for name in classes:
        files = sorted(os.listdir(os.path.join(root, name)))
        found[name] = [
            file
            for file in files
            if file.lower().endswith(tuple(extensions)) and not file.startswith(".")
        ]
    if not any(found.values()):
        raise UserError(f"{root}: no {', '.join(extensions)} files in its class folders")
    return found

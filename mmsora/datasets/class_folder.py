"""Videos in class folders: UCF-101, and whatever is laid out like it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsora.datasets.file_dataset import (
    VIDEO_EXTENSIONS,
    FileDataset,
    read_lines,
    scan_classes,
)
from mmsora.registry import DATASETS
from mmsora.utils.user_error import UserError

__all__ = ["ClassFolderVideos", "read_classes", "read_split"]


@DATASETS.register_module()
class ClassFolderVideos(FileDataset):
    """Videos ``<data_root>/<class>/<video>``, labelled by class.

    A label is the number of the folder among all class folders, sorted by name. Latte counts so.
    UCF-101's own numbers differ for some classes (there ``Hammering`` comes before
    ``HammerThrow``); ``class_file`` takes those.

    Args:
        data_root: Folder of the class folders.
        pipeline: Transforms, or dicts of them.
        split_file: List of the videos to take, a line ``<class>/<video>`` for each, or
            ``<class>/<video> <number>`` as in UCF-101's ``trainlist01.txt``; the number is not
            used. Default: all videos.
        class_file: List of the classes in the order of their labels, a line ``<class>`` for
            each, or ``<number> <class>`` as in UCF-101's ``classInd.txt``.
        seed: Of the random choices, not of the run.
        on_error: What to do with videos that cannot be read: ``raise`` or ``skip``.
        indices: Take these videos alone, or so many from the start.
        test_mode: Nothing is chosen at random.
    """

    def __init__(
        self,
        data_root: str,
        pipeline: Sequence[Any] = (),
        split_file: str | None = None,
        class_file: str | None = None,
        seed: int = 0,
        on_error: str = "raise",
        indices: int | Sequence[int] | None = None,
        test_mode: bool = False,
    ) -> None:
        self.split_file, self.class_file = split_file, class_file
        super().__init__(data_root, pipeline, seed, on_error, indices, test_mode)

    def load_data_list(self) -> list[dict[str, Any]]:
        """The videos and their labels."""
        found = scan_classes(self.data_root, VIDEO_EXTENSIONS)
        classes = list(found) if self.class_file is None else read_classes(self.class_file)
        unknown = sorted(found.keys() - set(classes))
        if unknown:
            raise UserError(f"{self.class_file}: has no class {unknown[0]!r} of {self.data_root}")
        self._metainfo["classes"] = tuple(classes)
        paths = [f"{name}/{file}" for name, files in found.items() for file in files]
        if self.split_file is not None:
            there, paths = set(paths), read_split(self.split_file)
            missing = [path for path in paths if path not in there]
            if missing:
                raise UserError(
                    f"{self.split_file}: {len(missing)} of {len(paths)} videos are not in "
                    f"{self.data_root}, the first of them is {missing[0]}"
                )
        labels = {name: label for label, name in enumerate(classes)}
        return [{"path": path, "label": labels[path.split("/")[0]]} for path in paths]


def read_split(path: str | Path) -> list[str]:
    """The videos that a list such as ``trainlist01.txt`` or ``testlist01.txt`` names.

    Args:
        path: The list.

    Returns:
        ``<class>/<video>`` for each line.

    Raises:
        UserError: The list cannot be read or is empty.
    """
    names = []
    for line in read_lines(path):
        name, *number = line.rsplit(maxsplit=1)
        names.append(name if number and number[0].isdigit() else line)
    return names


def read_classes(path: str | Path) -> list[str]:
    """The classes that a list such as ``classInd.txt`` names.

    Args:
        path: The list.

    Returns:
        Their names in the order of the list.

    Raises:
        UserError: The list cannot be read or is empty.
    """
    names = []
    for line in read_lines(path):
        number, *name = line.split(maxsplit=1)
        names.append(name[0] if name and number.isdigit() else line)
    return names

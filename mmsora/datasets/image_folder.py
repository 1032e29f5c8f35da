"""Images in class folders, or in a list with their classes: ImageNet."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsora.datasets.file_dataset import IMAGE_EXTENSIONS, FileDataset, read_lines, scan_classes
from mmsora.registry import DATASETS
from mmsora.utils.user_error import UserError

__all__ = ["ImageNetFolder"]


@DATASETS.register_module()
class ImageNetFolder(FileDataset):
    """Images ``<data_root>/<split>/<class>/<image>``, or as a list ``meta/<split>.txt`` has them.

    A label is the number of the folder among all, sorted by name, which for the folders of
    ImageNet (``n01440764`` and so on) is the numbering that everyone uses. A split whose images
    lie in no class folders needs the list, as OpenDataLab's validation images do.

    Args:
        data_root: Folder of the splits.
        pipeline: Transforms, or dicts of them.
        split: Folder of the class folders.
        ann_file: List in ``data_root`` of images in the split and their labels, a line
            ``<path> <label>`` for each; by default ``meta/<split>.txt`` where the split has no
            class folders.
        seed: Of the random choices, not of the run.
        on_error: What to do with images that cannot be read: ``raise`` or ``skip``.
        indices: Take these images alone, or so many from the start.
        test_mode: Nothing is chosen at random.
    """

    def __init__(
        self,
        data_root: str,
        pipeline: Sequence[Any] = (),
        split: str = "train",
        ann_file: str | None = None,
        seed: int = 0,
        on_error: str = "raise",
        indices: int | Sequence[int] | None = None,
        test_mode: bool = False,
    ) -> None:
        self.split, self.list_file = split, ann_file
        super().__init__(data_root, pipeline, seed, on_error, indices, test_mode)

    def load_data_list(self) -> list[dict[str, Any]]:
        """The images and their labels."""
        folder, listed = Path(self.data_root, self.split), self.list_file
        usual = f"meta/{self.split}.txt"
        if listed is None and Path(self.data_root, usual).is_file() and _is_flat(folder):
            listed = usual
        if listed is not None:
            return self._listed(Path(self.data_root, listed), folder)
        found = scan_classes(folder, IMAGE_EXTENSIONS)
        self._metainfo["classes"] = tuple(found)
        return [
            {"path": f"{self.split}/{name}/{file}", "label": label}
            for label, (name, files) in enumerate(found.items())
            for file in files
        ]

    def _listed(self, ann_file: Path, folder: Path) -> list[dict[str, Any]]:
        infos, names = [], {}
        there: dict[str, set[str]] = {}
        for line in read_lines(ann_file):
            path, *label = line.rsplit(maxsplit=1)
            if not (label and label[0].isdigit()):
                raise UserError(f"{ann_file}: a line is <path> <label>, got {line!r}")
            parent, name = os.path.split(path)
            if parent not in there:  # one look at a folder is cheaper than one at each file
                inside = folder / parent
                there[parent] = set(os.listdir(inside)) if inside.is_dir() else set()
            if name not in there[parent]:
                raise UserError(f"{ann_file}: {path} is not in {folder}")
            names[int(label[0])] = parent
            infos.append({"path": os.path.join(self.split, path), "label": int(label[0])})
        if set(names) == set(range(len(names))) and len(set(names.values())) == len(names):
            self._metainfo["classes"] = tuple(names[label] for label in range(len(names)))
        return infos


def _is_flat(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return not any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)

"""Images in class folders: ImageNet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsora.datasets.file_dataset import FileDataset, scan_classes
from mmsora.registry import DATASETS

__all__ = ["ImageNetFolder"]

IMAGE_EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp")


@DATASETS.register_module()
class ImageNetFolder(FileDataset):
    """Images ``<data_root>/<split>/<class>/<image>``, labelled by class.

    A label is the number of the folder among all, sorted by name, which for the folders of
    ImageNet (``n01440764`` and so on) is the numbering that everyone uses.

    Args:
        data_root: Folder of the splits.
        pipeline: Transforms, or dicts of them.
        split: Folder of the class folders.
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
        seed: int = 0,
        on_error: str = "raise",
        indices: int | Sequence[int] | None = None,
        test_mode: bool = False,
    ) -> None:
        self.split = split
        super().__init__(data_root, pipeline, seed, on_error, indices, test_mode)

    def load_data_list(self) -> list[dict[str, Any]]:
        """The images and their labels."""
        found = scan_classes(Path(self.data_root, self.split), IMAGE_EXTENSIONS)
        self._metainfo["classes"] = tuple(found)
        return [
            {"path": f"{self.split}/{name}/{file}", "label": label}
            for label, (name, files) in enumerate(found.items())
            for file in files
        ]

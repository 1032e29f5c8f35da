"""Videos that lie as folders of frames: SkyTimelapse, Taichi-HD."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsora.datasets.file_dataset import IMAGE_EXTENSIONS, FileDataset
from mmsora.registry import DATASETS
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import MediaError

__all__ = ["FrameFolderVideos", "frame_files"]


@DATASETS.register_module()
class FrameFolderVideos(FileDataset):
    """Every folder below ``data_root`` that holds images is a video, of those images.

    The number at the end of a file's name says which frame it is, as ``..._00000034.jpg``; names
    without one are sorted as words. Videos are sorted by path. SkyTimelapse is
    ``sky_train/<id>/<id>_<k>/*.jpg``, Taichi-HD ``frames/train/<clip>/*.png``.

    Args:
        data_root: Folder above those of the frames.
        pipeline: Transforms, or dicts of them.
        min_frames: Leave out folders with fewer. Latte's SkyTimelapse has 49.
        seed: Of the random choices, not of the run.
        on_error: What to do with videos that cannot be read: ``raise`` or ``skip``.
        indices: Take these videos alone, or so many from the start.
        test_mode: Nothing is chosen at random.
    """

    def __init__(
        self,
        data_root: str,
        pipeline: Sequence[Any] = (),
        min_frames: int = 1,
        seed: int = 0,
        on_error: str = "raise",
        indices: int | Sequence[int] | None = None,
        test_mode: bool = False,
    ) -> None:
        if min_frames < 1:
            raise ValueError(f"min_frames must be 1 or more, got {min_frames}")
        self.min_frames = min_frames
        super().__init__(data_root, pipeline, seed, on_error, indices, test_mode)

    def load_data_list(self) -> list[dict[str, Any]]:
        """The folders, and how many frames each has."""
        root = self.data_root
        if not os.path.isdir(root):
            raise UserError(f"{root}: no such folder; set train_dataloader.dataset.data_root")
        counts = {}
        for folder, inside, files in os.walk(root, followlinks=True):
            inside[:] = [name for name in inside if not name.startswith(".")]
            counts[os.path.relpath(folder, root)] = len(_images(files))
        infos = [
            {"path": path, "num_frames": count}
            for path, count in sorted(counts.items())
            if count >= self.min_frames
        ]
        if not infos:
            kinds = ", ".join(IMAGE_EXTENSIONS)
            raise UserError(f"{root}: no folder in it has {self.min_frames} frames ({kinds})")
        return infos

    def fetch(self, results: dict[str, Any]) -> None:
        """Name the frames of the video."""
        results["frame_files"] = frame_files(results["path"])


def frame_files(folder: str | Path) -> list[str]:
    """The frames of a video in their order.

    Args:
        folder: What holds them.

    Returns:
        Their paths, at least one.

    Raises:
        MediaError: The folder cannot be read or has no images.
    """
    try:
        names = _images(os.listdir(folder))
    except OSError as error:
        raise MediaError(folder, error.strerror or error) from error
    if not names:
        raise MediaError(folder, "no frames in it")
    return [os.path.join(folder, name) for name in sorted(names, key=_place)]


def _images(names: Sequence[str]) -> list[str]:
    kinds = tuple(IMAGE_EXTENSIONS)
    return [name for name in names if name.lower().endswith(kinds) and not name.startswith(".")]


def _place(name: str) -> tuple[int, str]:
    """The number at the end of a name, then the name."""
    number = re.search(r"(\d+)$", os.path.splitext(name)[0])
    return (int(number[1]) if number else -1, name)

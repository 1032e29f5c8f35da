"""From files to frames.

``path`` may be a video or an image, which is a video of one frame. Datasets whose samples are no
such files say so: ``frame_files`` names one file for each frame, ``media`` is a file's content,
``cut`` the part (begin, end) of the frames that is the sample, and ``crop`` the part (left, right,
top, bottom) of each.
"""

from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform

from mmsora.registry import TRANSFORMS
from mmsora.utils.video_io import MediaError, probe_video, read_image, read_video

__all__ = ["DecodeVideo", "LoadImage", "SampleFrames"]

RULES = ("stride", "linspace", "slice")
SHORT = ("raise", "skip", "loop")
PHOTOS = (".jpeg", ".jpg", ".bmp")  # the other formats of images may hold films


def _source(results: dict[str, Any]) -> Any:
    return results.get("media", results["path"])


def _image(results: dict[str, Any]) -> np.ndarray:
    """A video of one frame."""
    return read_image(_source(results), name=results["path"])[None]


def _is_photo(results: dict[str, Any]) -> bool:
    return Path(results["path"]).suffix.lower() in PHOTOS


def _extent(results: dict[str, Any]) -> tuple[int, int]:
    """The first frame of a sample, and how many there are."""
    if "frame_files" in results:
        total = len(results["frame_files"])
    elif _is_photo(results):
        total = 1
    else:
        total = probe_video(_source(results), name=results["path"]).frames
    begin, end = results.get("cut") or (0, total)
    if not 0 <= begin < min(end, total):
        raise MediaError(results["path"], f"frames {begin} to {end} of {total} are no clip")
    return begin, min(end, total) - begin


def _read_files(files: list[str]) -> np.ndarray:
    """One frame for each file."""
    read = {file: read_image(file) for file in dict.fromkeys(files)}
    shape = read[files[0]].shape
    for file, frame in read.items():
        if frame.shape != shape:
            sizes = " x ".join(map(str, frame.shape[:2])), " x ".join(map(str, shape[:2]))
            raise MediaError(file, f"{sizes[0]} pixels, {files[0]} is {sizes[1]}")
    return np.stack([read[file] for file in files])


@TRANSFORMS.register_module()
class SampleFrames(BaseTransform):
    """Chooses the frames of a clip: ``path`` gives ``frame_indices``.

    A clip starts at random, by the sample's own draws; at frame 0 in test mode.

    Args:
        num_frames: Frames of a clip.
        stride: Distance of two frames.
        rule: ``stride``: exactly every ``stride``-th frame, from any start that leaves room.
            ``linspace``: as Latte's UCF-101 and FaceForensics loaders do it. Evenly over a
            window of ``num_frames * stride`` frames, rounded down, so that distances differ
            by one; the window never ends with the video's last frame, and is the whole video
            where that is shorter than the window.
            ``slice``: as Latte's SkyTimelapse and Taichi-HD loaders do it. Every ``stride``-th
            frame of such a window.
        short: What to do with a video that has too few frames, which is fewer than the clip
            spans by ``stride`` and fewer than ``num_frames`` by ``linspace``: ``raise`` an
            error, ``skip`` it (another sample takes its place), or ``loop`` it.
    """

    def __init__(
        self, num_frames: int, stride: int = 1, rule: str = "stride", short: str = "raise"
    ) -> None:
        if num_frames < 1 or stride < 1:
            raise ValueError(f"no clip has {num_frames} frames with stride {stride}")
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        if short not in SHORT:
            raise ValueError(f"short must be one of {', '.join(SHORT)}, got {short!r}")
        self.num_frames, self.stride, self.rule, self.short = num_frames, stride, rule, short

    @property
    def needed(self) -> int:
        """The fewest frames that a video must have."""
        return self.num_frames if self.rule == "linspace" else self._span

    @property
    def _span(self) -> int:
        return (self.num_frames - 1) * self.stride + 1

    def last_start(self, total: int) -> int:
        """The latest frame that a clip of a video of ``total`` frames starts at."""
        if self.rule != "stride":
            return max(total - self.num_frames * self.stride - 1, 0)
        return total - self._span

    def indices(self, total: int, start: int) -> np.ndarray:
        """The frames of the clip that starts at ``start`` in a video of ``total`` frames."""
        if self.rule == "linspace":
            end = min(start + self.num_frames * self.stride, total)
            return np.linspace(start, end - 1, self.num_frames, dtype=int)
        return start + self.stride * np.arange(self.num_frames)

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        begin, frames = _extent(results)
        total = frames
        if frames < self.needed:
            cause = (
                f"{frames} frames, {self.needed} are needed; SampleFrames(short='loop') repeats "
                "frames, short='skip' leaves the clip out"
            )
            if self.short == "raise":
                raise MediaError(results["path"], cause)
            if self.short == "skip":
                results["refused"] = cause
                return None
            total = -(-self.needed // frames) * frames
        start = 0
        if not results["test_mode"]:
            choices = self.last_start(total) + 1
            start = int(results["draws"].uniform("clip start").item() * choices)
        results["frame_indices"] = begin + self.indices(total, start) % frames
        return results


@TRANSFORMS.register_module()
class DecodeVideo(BaseTransform):
    """Reads ``frame_indices``, or all frames without them: ``path`` gives ``frames``."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        numbers = results.get("frame_indices")
        if numbers is None and results.get("cut"):
            begin, count = _extent(results)
            numbers = np.arange(begin, begin + count)
        if "frame_files" in results:
            files = results["frame_files"]
            frames = _read_files(files if numbers is None else [files[i] for i in numbers])
        elif _is_photo(results):
            frames = _image(results)
            frames = frames if numbers is None else frames[numbers]
        else:
            frames = read_video(_source(results), numbers, name=results["path"])
        if results.get("crop"):
            frames = self._crop(frames, results)
        results["frames"] = frames
        return results

    @staticmethod
    def _crop(frames: np.ndarray, results: dict[str, Any]) -> np.ndarray:
        left, right, top, bottom = results["crop"]
        height, width = frames.shape[1:3]
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            cause = f"crop {results['crop']} does not fit frames of {height} x {width} pixels"
            raise MediaError(results["path"], cause)
        return frames[:, top:bottom, left:right]


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """Reads an image as a video of one frame: ``path`` gives ``frames``."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        results["frames"] = _image(results)
        return results

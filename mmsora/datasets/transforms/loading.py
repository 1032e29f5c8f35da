"""From files to frames."""

from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform

from mmsora.registry import TRANSFORMS
from mmsora.utils.video_io import MediaError, probe_video, read_image, read_video

__all__ = ["DecodeVideo", "LoadImage", "SampleFrames"]

RULES = ("stride", "linspace")
SHORT = ("raise", "skip", "loop")


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
        if self.rule == "linspace":
            return max(total - self.num_frames * self.stride - 1, 0)
        return total - self._span

    def indices(self, total: int, start: int) -> np.ndarray:
        """The frames of the clip that starts at ``start`` in a video of ``total`` frames."""
        if self.rule == "linspace":
            end = min(start + self.num_frames * self.stride, total)
            return np.linspace(start, end - 1, self.num_frames, dtype=int)
        return start + self.stride * np.arange(self.num_frames)

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        frames = probe_video(results["path"]).frames
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
        results["frame_indices"] = self.indices(total, start) % frames
        return results


@TRANSFORMS.register_module()
class DecodeVideo(BaseTransform):
    """Reads ``frame_indices``, or all frames without them: ``path`` gives ``frames``."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        results["frames"] = read_video(results["path"], results.get("frame_indices"))
        return results


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """Reads an image as a video of one frame: ``path`` gives ``frames``."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        results["frames"] = read_image(results["path"])[None]
        return results

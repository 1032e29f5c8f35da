"""Sizes, crops and flips: the same for all frames of a clip."""

from collections.abc import Callable
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from PIL import Image

from mmsora.registry import TRANSFORMS

__all__ = ["ADMCenterCrop", "RandomFlip", "ResizeCrop"]

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def _each(frames: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(frame))) for frame in frames])


@TRANSFORMS.register_module()
class ResizeCrop(BaseTransform):
    """Resizes frames until they just cover the size, then cuts out the centre.

    Enlarging by ``bilinear`` is what Latte does. Pillow's filters widen when reducing, which
    Latte's do not: frames have no aliasing here. The size is exact for every height and width.

    Args:
        size: Of the result: the side of a square, or height and width.
        resampling: ``nearest``, ``box``, ``bilinear``, ``hamming``, ``bicubic`` or ``lanczos``.
    """

    def __init__(self, size: int | tuple[int, int], resampling: str = "bilinear") -> None:
        height, width = (size, size) if isinstance(size, int) else size
        if height < 1 or width < 1:
            raise ValueError(f"size must be positive, got {size}")
        if resampling not in RESAMPLING:
            names = ", ".join(RESAMPLING)
            raise ValueError(f"resampling must be one of {names}, got {resampling!r}")
        self.height, self.width, self.resampling = height, width, RESAMPLING[resampling]

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        frames = results["frames"]
        rows, columns = frames.shape[1:3]
        scale = max(self.height / rows, self.width / columns)
        top, bottom = self._cut(rows, self.height, scale)
        left, right = self._cut(columns, self.width, scale)
        target, box = (self.width, self.height), (left, top, right, bottom)
        results["frames"] = _each(frames, lambda image: image.resize(target, self.resampling, box))
        return results

    @staticmethod
    def _cut(source: int, target: int, scale: float) -> tuple[float, float]:
        """Where the result begins and ends in the source, a whole pixel of the resized frame."""
        begin = round((max(int(source * scale), target) - target) / 2) / scale
        return begin, min(begin + target / scale, source)


@TRANSFORMS.register_module()
class ADMCenterCrop(BaseTransform):
    """The centre crop of ADM (Dhariwal and Nichol 2021), with which DiT reads ImageNet.

    Halves an image by averages for as long as both sides stay at least ``size``, then resizes
    the shorter side to ``size`` by bicubic interpolation and cuts out the centre.

    Args:
        size: Side of the square.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size must be positive, got {size}")
        self.size = size

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        results["frames"] = _each(results["frames"], self._crop)
        return results

    def _crop(self, image: Image.Image) -> Image.Image:
        while min(image.size) >= 2 * self.size:
            image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
        scale = self.size / min(image.size)
        sides = [round(side * scale) for side in image.size]
        image = image.resize(sides, Image.Resampling.BICUBIC)
        left, top = ((side - self.size) // 2 for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


@TRANSFORMS.register_module()
class RandomFlip(BaseTransform):
    """Mirrors a clip, left to right, by the sample's own draws; never in test mode.

    Args:
        prob: How often.
    """

    def __init__(self, prob: float = 0.5) -> None:
        if not 0 <= prob <= 1:
            raise ValueError(f"prob must be in [0, 1], got {prob}")
        self.prob = prob

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        mirrored = results["draws"].uniform("clip flip").item() < self.prob
        if mirrored and not results["test_mode"]:
            results["frames"] = results["frames"][:, :, ::-1]
        return results

"""The largest square."""

from typing import Any

from mmcv.transforms import BaseTransform

from mmsora.registry import TRANSFORMS

__all__ = ["SquareCrop"]


@TRANSFORMS.register_module()
class SquareCrop(BaseTransform):
    """Cuts out the square in the centre of ``frames``.

    Before ``ResizeCrop`` it makes what Latte makes of SkyTimelapse: there the square begins at a
    whole pixel of the source, without it at a whole pixel of the resized frame.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        frames = results["frames"]
        height, width = frames.shape[1:3]
        side = min(height, width)
        top, left = round((height - side) / 2), round((width - side) / 2)
        results["frames"] = frames[:, top : top + side, left : left + side]
        return results

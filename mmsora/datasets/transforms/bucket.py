"""Brings a clip to the size of its bucket, which came with its number from the sampler."""

from typing import Any

from mmcv.transforms import BaseTransform

from mmsora.datasets.transforms.loading import SampleFrames
from mmsora.datasets.transforms.spatial import ResizeCrop
from mmsora.registry import TRANSFORMS
from mmsora.utils.user_error import UserError

__all__ = ["BucketCrop", "BucketFrames"]


def _size(results: dict[str, Any]) -> tuple[int, int, int]:
    if "bucket" not in results:
        raise UserError(
            f"{results['path']}: came without a bucket; the pipeline needs "
            "train_dataloader.batch_sampler = dict(type=BucketBatchSampler, ...)"
        )
    return results["bucket"]


@TRANSFORMS.register_module()
class BucketFrames(BaseTransform):
    """Chooses as many frames as the bucket has: ``path`` gives ``frame_indices``.

    Args:
        stride: Distance of two frames, the same as in ``Buckets``.
        rule: ``stride`` or ``linspace``, as in ``SampleFrames``.
        short: What to do with a video that has too few frames, as in ``SampleFrames``.
    """

    def __init__(self, stride: int = 1, rule: str = "stride", short: str = "raise") -> None:
        SampleFrames(1, stride, rule, short)  # complains of what is wrong
        self.stride, self.rule, self.short = stride, rule, short

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        chosen = SampleFrames(_size(results)[0], self.stride, self.rule, self.short)
        return chosen.transform(results)


@TRANSFORMS.register_module()
class BucketCrop(BaseTransform):
    """Resizes ``frames`` until they just cover the bucket's size, then cuts out the centre.

    Args:
        resampling: As in ``ResizeCrop``.
    """

    def __init__(self, resampling: str = "bilinear") -> None:
        ResizeCrop(1, resampling)  # complains of what is wrong
        self.resampling = resampling

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        return ResizeCrop(_size(results)[1:], self.resampling).transform(results)

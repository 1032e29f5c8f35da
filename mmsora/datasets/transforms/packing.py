"""From frames to what a model gets."""

from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform

from mmsora.registry import TRANSFORMS
from mmsora.structures.video_sample import VideoSample

__all__ = ["PackVideo"]


@TRANSFORMS.register_module()
class PackVideo(BaseTransform):
    """Packs ``frames`` as ``inputs``, uint8 (C, T, H, W), and the rest as a ``VideoSample``."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        clip = np.ascontiguousarray(results["frames"].transpose(3, 0, 1, 2))
        known = {key: results[key] for key in ("index", "label", "path") if key in results}
        return {"inputs": torch.from_numpy(clip), "data_samples": VideoSample(**known)}

"""From frames to what a model gets."""

from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform

from mmsora.registry import TRANSFORMS
from mmsora.structures.video_sample import VideoSample

__all__ = ["PackVideo"]

KEYS = ("index", "label", "path", "text", "weight")


@TRANSFORMS.register_module()
class PackVideo(BaseTransform):
    """Packs ``frames`` as ``inputs``, uint8 (C, T, H, W), and the rest as a ``VideoSample``.

    Of several captions one is taken by the sample's own draws, the first in test mode.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        clip = np.ascontiguousarray(results["frames"].transpose(3, 0, 1, 2))
        known = {key: results[key] for key in KEYS if key in results}
        if isinstance(known.get("text"), list):
            choice = 0.0 if results["test_mode"] else results["draws"].uniform("caption").item()
            known["text"] = known["text"][int(choice * len(known["text"]))]
        return {"inputs": torch.from_numpy(clip), "data_samples": VideoSample(**known)}

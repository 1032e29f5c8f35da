"""From a list of uint8 clips to one batch of numbers on the device."""

from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor

from mmsora.registry import MODELS

__all__ = ["VideoPreprocessor"]


@MODELS.register_module()
class VideoPreprocessor(BaseDataPreprocessor):
    """Stacks clips, moves them as uint8, then scales to [-1, 1] on the device.

    Cached latents keep their values and become float32 there.
    """

    def __init__(self) -> None:
        super().__init__(non_blocking=True)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Make a batch.

        Args:
            data: ``inputs``, a list of uint8 clips (C, T, H, W) of one size or their stack, or of
                cached latents (1 or 2, c, t, h, w), and ``data_samples``, a list of annotations,
                which stay as they are.
            training: Unused: what is done to clips is the same in training and testing.

        Returns:
            ``inputs`` (B, C, T, H, W) in [-1, 1], or the latents with a batch axis before, and
            ``data_samples``.

        Raises:
            ValueError: Clips are not uint8.
        """
        inputs = data["inputs"]
        cached = inputs[0].ndim == 5 and inputs[0].is_floating_point()
        if not (cached or inputs[0].dtype == torch.uint8):
            raise ValueError(
                f"clips are uint8 tensors (C, T, H, W), the dataset gives {inputs[0].dtype}"
            )
        with torch.autocast("cpu", enabled=False):  # under which no float16 is stacked
            batch = inputs if isinstance(inputs, torch.Tensor) else torch.stack(list(inputs))
        batch = batch.to(self.device, non_blocking=True).float()
        batch = batch if cached else batch / 127.5 - 1
        return {"inputs": batch, "data_samples": data["data_samples"]}

"""Sampling, the same for the command line, notebooks and other programs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor

from mmsora.apis.build import build_model, config_of, fill
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.checkpoint import load_checkpoint
from mmsora.utils.user_error import UserError

__all__ = ["Inferencer"]


class Inferencer:
    """Samples videos from a checkpoint.

    Args:
        checkpoint: The file.
        config: A config, its path or its name; None takes the one in the checkpoint.
        device: Where to compute; None takes a GPU where there is one.
        use_ema: Take the averaged weights where the checkpoint has them.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        config: str | Path | Config | None = None,
        device: str | None = None,
        use_ema: bool = True,
    ) -> None:
        content = load_checkpoint(checkpoint)
        self.model = build_model(config_of(content, checkpoint) if config is None else config)
        fill(self.model, content, checkpoint, use_ema)
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def __call__(
        self,
        labels: Sequence[int] | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        batch_size: int = 50,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Sample.

        The i-th video is a function of (seed, i, its label), whatever the batch size.

        Args:
            labels: A video for each of these classes.
            num_samples: How many videos; with labels or without, they are repeated or cut to it.
                A class-conditional model without labels goes through its classes.
            seed: Of the noise.
            batch_size: How many at a time.
            progress: Called with the number of finished videos after each batch.

        Returns:
            uint8 videos, (B, C, T, H, W), on the CPU.

        Raises:
            UserError: A label is out of range, or given to an unconditional model.
        """
        samples = self._samples(labels, num_samples)
        videos = []
        for start in range(0, len(samples), batch_size):
            videos.append(self.model.predict(samples[start : start + batch_size], seed).cpu())
            if progress is not None:
                progress(min(start + batch_size, len(samples)))
        return torch.cat(videos)

    def _samples(self, labels: Sequence[int] | None, num_samples: int | None) -> list[VideoSample]:
        classes = getattr(self.model.conditioner, "num_classes", 0)
        if labels and not classes:
            raise UserError("the model is unconditional: it takes no labels, use num_samples")
        for label in labels or ():
            if not 0 <= label < classes:
                raise UserError(
                    f"label {label} is out of range: the model knows {classes} classes, "
                    f"0 to {classes - 1}"
                )
        count = num_samples or len(labels or range(classes)) or 1
        if not classes:
            return [VideoSample(index=i) for i in range(count)]
        told = list(labels or range(classes))
        return [VideoSample(index=i, label=told[i % len(told)]) for i in range(count)]

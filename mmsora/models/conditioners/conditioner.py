"""The one place where conditions are dropped, and where "no condition" is defined."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmsora.structures.video_sample import OF_IMAGES, VideoSample
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError

__all__ = ["Conditioner", "images_beside"]


class Conditioner(nn.Module):
    """Turns annotations into keyword arguments of a denoiser.

    What is said of the images beside a clip is of the shape (B, num_images, ...), and called as
    that of the clip with ``image_`` before it. Each is dropped or kept on its own.

    Args:
        drop_prob: Probability that training takes a sample's condition away, so that the network
            learns the unconditional case for classifier-free guidance.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        if not 0 <= drop_prob <= 1:
            raise ValueError(f"drop_prob is a probability, got {drop_prob}")
        self.drop_prob = drop_prob

    def init_weights(self) -> None:
        """Load pretrained weights, where there are any. Building reads no file."""

    @abstractmethod
    def encode(self, samples: Sequence[VideoSample]) -> dict[str, Tensor]:
        """Keyword arguments for the denoiser, each of shape (B, ...)."""

    @abstractmethod
    def null(self, batch: int) -> dict[str, Tensor]:
        """The same for ``batch`` samples of which nothing is said."""

    def forward(
        self, samples: Sequence[VideoSample], draws: Draws | None = None
    ) -> dict[str, Tensor]:
        """Encode, and drop where the draws say so.

        Args:
            samples: Annotations of a batch.
            draws: The batch's random numbers while training; None keeps every condition.

        Returns:
            Keyword arguments for the denoiser.
        """
        cond = self._told(samples, draws, "drop condition")
        images = [
            self._told(
                [_image(sample, i) for sample in samples], draws, f"drop condition of image {i}"
            )
            for i in range(images_beside(samples))
        ]
        if images:
            cond |= {f"image_{k}": torch.stack([one[k] for one in images], 1) for k in cond}
        return cond

    def _told(
        self, samples: Sequence[VideoSample], draws: Draws | None, name: str
    ) -> dict[str, Tensor]:
        return self._dropped(self.encode(samples), draws, name)

    def _dropped(
        self, cond: dict[str, Tensor], draws: Draws | None, name: str
    ) -> dict[str, Tensor]:
        if draws is None or self.drop_prob == 0:
            return cond
        dropped = draws.uniform(name) < self.drop_prob
        null = self.null(len(dropped))
        return {
            key: torch.where(
                dropped.to(value.device).reshape(-1, *[1] * (value.ndim - 1)),
                null[key].to(value),
                value,
            )
            for key, value in cond.items()
        }


def images_beside(samples: Sequence[VideoSample]) -> int:
    """How many of the last frames of each clip of a batch are independent images.

    Args:
        samples: Annotations of the batch.

    Returns:
        Their number, ``num_images`` of each sample.

    Raises:
        UserError: It is not the same for all.
    """
    counts = sorted({int(sample.get("num_images") or 0) for sample in samples})
    if len(counts) > 1:
        raise UserError(
            f"clips of one batch need equally many images beside them, got {counts[0]} and "
            f"{counts[-1]}: give every dataset of the mixture the same num_images"
        )
    return counts[0] if counts else 0


def _image(sample: VideoSample, place: int) -> VideoSample:
    """What is known of one of the images beside a clip."""
    known = {
        name: sample.get(field)[place]
        for name, field in OF_IMAGES.items()
        if sample.get(field) is not None
    }
    return VideoSample(index=sample.get("index"), **known)

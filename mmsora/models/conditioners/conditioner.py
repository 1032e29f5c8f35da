"""The one place where conditions are dropped, and where "no condition" is defined."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws

__all__ = ["Conditioner"]


class Conditioner(nn.Module):
    """Turns annotations into keyword arguments of a denoiser.

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
        cond = self.encode(samples)
        if draws is None or self.drop_prob == 0:
            return cond
        dropped = draws.uniform("drop condition") < self.drop_prob
        null = self.null(len(samples))
        return {
            key: torch.where(
                dropped.to(value.device).reshape(-1, *[1] * (value.ndim - 1)), null[key], value
            )
            for key, value in cond.items()
        }

"""What a VAE is to the rest of the toolbox."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mmsora.utils.draws import Draws
from mmsora.utils.feature_store import checksum

__all__ = ["VAE", "VAEOfFrames", "drawn"]


class VAE(nn.Module):
    """From videos to latents and back. It is frozen; weights arrive in ``init_weights``."""

    def init_weights(self) -> None:
        """Load pretrained weights, where there are any. Building reads no file."""

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Frames, height and width of the latent of a video of ``size``: the same, by default."""
        return size

    def identity(self) -> dict[str, Any]:
        """What latents depend on besides the weights, in plain values.

        A cache of latents keeps it with ``fingerprint``, and is taken by no other VAE.
        """
        return {"type": type(self).__name__}

    def fingerprint(self) -> str:
        """A hash of the weights that latents depend on."""
        return checksum(self.state_dict())

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """The distribution that ``encode`` draws the latent from, by ``drawn``.

        Args:
            video: (B, C, T, H, W) in [-1, 1].

        Returns:
            Its mean and standard deviation, each (B, c, t, h, w); None for the second where the
            latent is not drawn, as by default.
        """
        return self.encode(video), None

    @abstractmethod
    def encode(self, video: Tensor, draws: Draws | None = None) -> Tensor:
        """To the latent.

        Args:
            video: (B, C, T, H, W) in [-1, 1].
            draws: The batch's random numbers, for VAEs whose latent is drawn; None takes the
                mean.

        Returns:
            (B, c, t, h, w), of about unit variance.
        """

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, c, t, h, w) to videos (B, C, T, H, W), about in [-1, 1]."""


class VAEOfFrames(VAE):
    """A frozen one of images, which sees a few frames at once; ``chunk`` says how many."""

    chunk: int

    def train(self, mode: bool = True) -> "VAEOfFrames":
        """Stay in eval mode: the VAE is frozen."""
        return super().train(False)

    def _by_frames(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        parts = [function(part) for part in frames.split(self.chunk)]
        return rearrange(torch.cat(parts), "(b t) c h w -> b c t h w", b=len(x))


def drawn(mean: Tensor, std: Tensor | None, draws: Draws | None) -> Tensor:
    """A latent from its distribution.

    Args:
        mean: (B, c, t, h, w).
        std: Of the same shape; None where the latent is not drawn.
        draws: The batch's random numbers; None takes the mean.

    Returns:
        (B, c, t, h, w).
    """
    if std is None or draws is None:
        return mean
    return mean + std * draws.normal("posterior", mean)

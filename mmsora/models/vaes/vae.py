"""What a VAE is to the rest of the toolbox."""

from abc import abstractmethod

from torch import Tensor, nn

from mmsora.utils.draws import Draws

__all__ = ["VAE"]


class VAE(nn.Module):
    """From videos to latents and back. It is frozen; weights arrive in ``init_weights``."""

    def init_weights(self) -> None:
        """Load pretrained weights, where there are any. Building reads no file."""

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Frames, height and width of the latent of a video of ``size``: the same, by default."""
        return size

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

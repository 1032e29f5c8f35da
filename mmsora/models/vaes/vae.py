"""What a VAE is to the rest of the toolbox."""

from abc import abstractmethod

from torch import Tensor, nn

__all__ = ["VAE"]


class VAE(nn.Module):
    """From videos to latents and back. It is frozen; weights arrive in ``init_weights``."""

    def init_weights(self) -> None:
        """Load pretrained weights, where there are any. Building reads no file."""

    @abstractmethod
    def encode(self, video: Tensor) -> Tensor:
        """Videos (B, C, T, H, W) in [-1, 1] to latents (B, c, t, h, w) of about unit variance."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, c, t, h, w) to videos (B, C, T, H, W), about in [-1, 1]."""

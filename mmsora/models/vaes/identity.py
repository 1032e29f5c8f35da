"""The VAE that is none."""

from torch import Tensor, nn

from mmsora.registry import VAES

__all__ = ["IdentityVAE"]


@VAES.register_module()
class IdentityVAE(nn.Module):
    """Pixels are the latent: for small videos, and for latents that are cached already."""

    def encode(self, video: Tensor) -> Tensor:
        """(B, C, T, H, W) in [-1, 1], returned as it is."""
        return video

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, T, H, W), returned as it is."""
        return latent

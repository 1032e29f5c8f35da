"""The VAE that is none."""

from torch import Tensor

from mmsora.models.vaes.vae import VAE
from mmsora.registry import VAES
from mmsora.utils.draws import Draws

__all__ = ["IdentityVAE"]


@VAES.register_module()
class IdentityVAE(VAE):
    """Pixels are the latent: for small videos, and for latents that are cached already."""

    def encode(self, video: Tensor, draws: Draws | None = None) -> Tensor:
        return video

    def decode(self, latent: Tensor) -> Tensor:
        return latent

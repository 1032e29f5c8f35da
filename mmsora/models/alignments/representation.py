"""REPA: a denoiser's states are pulled towards an encoder's features (arXiv:2410.06940)."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmsora.models.alignments.image_encoder import ImageEncoder
from mmsora.models.layers.linear import linear
from mmsora.registry import MODELS

__all__ = ["RepresentationAlignment"]


@MODELS.register_module()
class RepresentationAlignment(nn.Module):
    """The projected tokens of one block against a frozen encoder's features of the clean video.

    The encoder sees each frame as an image. Where its grid is not that of the tokens, its features
    are resized linearly, along time too.

    Args:
        encoder: Config of an :class:`ImageEncoder`.
        width: Width of the denoiser's tokens; :class:`LatentDiffusion` gives it.
        block: After how many of the denoiser's blocks its tokens are taken.
        projector_width: Of the perceptron between tokens and features.
        weight: Of the loss.
    """

    encoder: ImageEncoder

    def __init__(
        self,
        encoder: dict,
        width: int,
        block: int = 8,
        projector_width: int = 2048,
        weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.encoder = MODELS.build(encoder)
        self.encoder.requires_grad_(False)
        self.block, self.weight = block, weight
        self.projector = nn.Sequential(
            linear(width, projector_width),
            nn.SiLU(),
            linear(projector_width, projector_width),
            nn.SiLU(),
            linear(projector_width, self.encoder.width),
        )

    def init_weights(self) -> None:
        """Load the encoder's weights. The projector was initialised when it was made."""
        self.encoder.init_weights()

    def forward(self, tokens: Tensor, video: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """The loss.

        Args:
            tokens: Of the denoiser, (B, t, h w, width).
            video: Clean, (B, C, T, H, W) in [-1, 1].
            grid: The ``t``, ``h`` and ``w`` of the tokens.

        Returns:
            Minus the mean cosine, weighted, of each sample: (B,) in float32.
        """
        with torch.no_grad():
            features = self.features(video, grid)
        cosine = F.cosine_similarity(self.projector(tokens).float(), features, dim=-1)
        return -self.weight * cosine.flatten(1).mean(1)

    def features(self, video: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """The encoder's features on the denoiser's grid.

        Args:
            video: Clean, (B, C, T, H, W) in [-1, 1].
            grid: Frames, rows and columns of the tokens.

        Returns:
            (B, t, h w, width of the encoder) in float32.

        Raises:
            ValueError: These are no pixels.
        """
        if video.shape[1] not in (1, 3):
            raise ValueError(
                f"alignment needs the clean video's pixels, 1 or 3 channels; got "
                f"{video.shape[1]}: latents from a cache have none. Train on videos, or with "
                "model.alignment=None"
            )
        images = rearrange(video, "b c t h w -> (b t) c h w")
        features = self.encoder(images, grid[1:]).float()
        features = rearrange(features, "(b t) z h w -> b z t h w", b=len(video))
        if features.shape[2:] != grid:
            features = F.interpolate(features, grid, mode="trilinear")
        return rearrange(features, "b z t h w -> b t (h w) z")

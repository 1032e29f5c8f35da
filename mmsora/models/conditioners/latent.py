"""A clip's own latents of another VAE, for what decodes them."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsora.models.conditioners.looking import LookingConditioner
from mmsora.models.vaes.vae import VAE
from mmsora.registry import CONDITIONERS, VAES
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError

__all__ = ["LatentConditioner"]


@CONDITIONERS.register_module()
class LatentConditioner(LookingConditioner):
    """Gives latents, (B, channels, T, h, w), that a first model makes and a second decodes.

    A sample's own field ``latent`` where it has one, as from a cache or from the first model; in
    training else what the encoder makes of the video. Zeros stand for none.

    Args:
        encoder: Config of the VAE whose latents they are.
        channels: Of these.
        drop_prob: Probability that training replaces them by zeros.
        smallest: In training the video is first shrunk to between this and 1 of its height and
            width, so that latents of any grain are known; 1 leaves it.
        name: What the denoiser calls them.
    """

    field = "latent"
    encoder: VAE

    def __init__(
        self,
        encoder: dict,
        channels: int,
        drop_prob: float = 0.1,
        smallest: float = 1.0,
        name: str = "latent",
    ) -> None:
        super().__init__(drop_prob)
        if not 0 < smallest <= 1:
            raise ValueError(f"smallest must be above 0 and at most 1, got {smallest}")
        self._encoder_config = deepcopy(encoder)
        self.encoder = self.build_encoder()
        self.channels, self.smallest, self.name = channels, smallest, name

    def build_encoder(self) -> VAE:
        return VAES.build(deepcopy(self._encoder_config)).requires_grad_(False)

    def identity(self) -> dict[str, Any]:
        """The encoder's, and how far videos are shrunk."""
        return {**super().identity(), "smallest": self.smallest}

    def train_on_seen(self, made_by: dict[str, Any]) -> None:
        """Do without the encoder, whose weights go."""
        super().train_on_seen(made_by)
        self.encoder.to("meta")

    def encode(self, samples: Sequence[VideoSample]) -> dict[str, Tensor]:
        latents = [sample.get(self.field) for sample in samples]
        if any(latent is None for latent in latents):
            raise UserError(
                "a clip has neither pixels nor latents of the stage before; sample that stage "
                "first, or take a dataset or cache that has them"
            )
        return {self.name: torch.stack(latents)}

    def null(self, batch: int) -> dict[str, Tensor]:
        return {self.name: torch.zeros(batch, self.channels, 1, 1, 1)}

    def see(
        self, videos: Tensor, samples: Sequence[VideoSample], draws: Draws | None = None
    ) -> list[Tensor]:
        share = torch.ones(len(samples)) if draws is None else draws.uniform("shrink")
        scales = (self.smallest + (1 - self.smallest) * share).tolist()
        return [
            self._latent(video[None], scale)[0]
            for video, scale in zip(videos, scales, strict=True)
        ]

    def _latent(self, video: Tensor, scale: float) -> Tensor:
        """Of one clip, (1, C, T, H, W); at any scale on the grid of the full size."""
        size = video.shape[2:]
        height, width = (max(round(side * scale), 1) for side in size[1:])
        if (height, width) != tuple(size[1:]):
            frames = video[0].transpose(0, 1)
            small = F.interpolate(frames, (height, width), mode="bilinear", antialias=True)
            video = small.transpose(0, 1)[None]
        latent = self.encoder.encode(video)
        wanted = self.encoder.latent_size((size[0], size[1], size[2]))
        if latent.shape[2:] == wanted:
            return latent
        maps = F.interpolate(
            latent[0].transpose(0, 1), wanted[1:], mode="bilinear", align_corners=True
        )
        return maps.transpose(0, 1)[None]

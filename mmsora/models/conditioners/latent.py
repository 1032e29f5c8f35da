"""A clip's own latents of another VAE, for what decodes them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsora.models.conditioners.conditioner import Conditioner
from mmsora.models.vaes.vae import VAE
from mmsora.registry import CONDITIONERS, VAES
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError

__all__ = ["LatentConditioner"]


@CONDITIONERS.register_module()
class LatentConditioner(Conditioner):
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

    takes_video = True
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
        self.encoder = VAES.build(encoder).requires_grad_(False)
        self.channels, self.smallest, self.name = channels, smallest, name

    def init_weights(self) -> None:
        """The encoder's."""
        self.encoder.init_weights()

    def encode(self, samples: Sequence[VideoSample]) -> dict[str, Tensor]:
        latents = [sample.get("latent") for sample in samples]
        if any(latent is None for latent in latents):
            raise UserError(
                "a clip has neither pixels nor latents of the stage before; sample that stage "
                "first, or take a dataset or cache that has them"
            )
        return {self.name: torch.stack(latents)}

    def null(self, batch: int) -> dict[str, Tensor]:
        return {self.name: torch.zeros(batch, self.channels, 1, 1, 1)}

    @torch.no_grad()
    def look(
        self, videos: Tensor, samples: Sequence[VideoSample], draws: Draws | None = None
    ) -> None:
        """Give each sample that has none its ``latent``.

        Args:
            videos: (B, C, T, H, W) in [-1, 1].
            samples: Their annotations.
            draws: The batch's random numbers while training; None shrinks nothing.
        """
        share = torch.ones(len(samples)) if draws is None else draws.uniform("shrink")
        scales = (self.smallest + (1 - self.smallest) * share).tolist()
        for video, sample, scale in zip(videos, samples, scales, strict=True):
            if sample.get("latent") is None:
                sample.latent = self._latent(video[None], scale)[0]

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

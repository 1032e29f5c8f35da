"""A picture, as CLIP sees it (Radford et al. 2021, arXiv:2103.00020)."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmsora.models.conditioners.looking import LookingConditioner
from mmsora.models.text_encoders.clip_text import read_clip
from mmsora.registry import CONDITIONERS, MODELS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws
from mmsora.utils.feature_store import checksum
from mmsora.utils.user_error import UserError

__all__ = ["CLIPImage", "ImageConditioner"]

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BESIDES = ("text_model.", "text_projection.", "logit_scale")  # in a file of the whole CLIP


@MODELS.register_module()
class CLIPImage(nn.Module):
    """The projected embedding of the middle of an image. Frozen.

    Args:
        folder: Of the weights, in transformers' layout. Nothing is downloaded.
        width: Channels of the embedding; 768 of CLIP ViT-L/14.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str, width: int = 768) -> None:
        super().__init__()
        self.folder, self.width = folder, width
        self.model: Any = None
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1), False)
        self.register_buffer("std", torch.tensor(STD).reshape(3, 1, 1), False)

    def init_weights(self) -> None:
        """Read the weights.

        Raises:
            UserError: The folder is missing or cannot be read, or holds something else or another
                width.
        """
        model = read_clip("CLIPVisionModelWithProjection", self.folder, "images", BESIDES)
        if model.config.projection_dim != self.width:
            raise UserError(
                f"the CLIP in {self.folder} projects images to {model.config.projection_dim} "
                f"channels, the config says {self.width}; set model.conditioner.encoder.width"
            )
        self.model = model.to(self.mean.device)

    def train(self, mode: bool = True) -> "CLIPImage":
        """Stay in eval mode: the encoder is frozen."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """What embeddings depend on, in plain values; ``source`` is the weights' folder."""
        return {"type": type(self).__name__, "width": self.width, "source": self.folder}

    def fingerprint(self) -> str:
        """A hash of the weights."""
        return checksum(self.model.state_dict())

    def forward(self, image: Tensor) -> Tensor:
        """An image (3, H, W) in [-1, 1] to its embedding, (width,) in float32."""
        side = self.model.config.image_size
        scale = side / min(image.shape[1:])
        size = [max(round(length * scale), side) for length in image.shape[1:]]
        x = F.interpolate(image[None].float().to(self.mean), size, mode="bicubic", antialias=True)
        top, left = ((length - side) // 2 for length in size)
        x = x[:, :, top : top + side, left : left + side]
        return self.model(((x + 1) / 2 - self.mean) / self.std).image_embeds[0].float()


@CONDITIONERS.register_module()
class ImageConditioner(LookingConditioner):
    """Gives ``image=``, an encoder's embedding of one picture, (B, width); zeros stand for none.

    A sample's own ``image_embedding`` where it has one, else that of its ``image``, (3, H, W) in
    [-1, 1], which in training is the first frame of its clip. A sample with neither has none.

    Args:
        encoder: Config of the encoder, as :class:`CLIPImage`.
        drop_prob: Probability that training replaces a picture by none.
    """

    field = "image_embedding"
    encoder: CLIPImage

    def __init__(self, encoder: dict, drop_prob: float = 0.9) -> None:
        super().__init__(drop_prob)
        self._encoder_config = deepcopy(encoder)
        self.encoder = self.build_encoder()

    def build_encoder(self) -> CLIPImage:
        return MODELS.build(deepcopy(self._encoder_config)).requires_grad_(False)

    def see(
        self, videos: Tensor, samples: Sequence[VideoSample], draws: Draws | None = None
    ) -> list[Tensor]:
        pictures = [sample.get("image") for sample in samples]
        return [
            self.encoder(video[:, 0] if picture is None else picture)
            for video, picture in zip(videos, pictures, strict=True)
        ]

    def encode(self, samples: Sequence[VideoSample]) -> dict[str, Tensor]:
        return {"image": torch.stack([self._embedding(sample) for sample in samples])}

    def null(self, batch: int) -> dict[str, Tensor]:
        return {"image": self.encoder.mean.new_zeros(batch, self.encoder.width)}

    def _embedding(self, sample: VideoSample) -> Tensor:
        embedding, image = sample.get("image_embedding"), sample.get("image")
        if embedding is not None:
            return embedding.to(self.encoder.mean)
        return self.null(1)["image"][0] if image is None else self.encoder(image)

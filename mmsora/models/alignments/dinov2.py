"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193) as transformers has it."""

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsora.models.alignments.image_encoder import ImageEncoder
from mmsora.registry import MODELS

__all__ = ["DINOv2"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@MODELS.register_module()
class DINOv2(ImageEncoder):
    """The patch tokens after the last norm, of images that are resized by bicubic interpolation.

    Args:
        folder: Of the weights, in transformers' layout. Nothing is downloaded.
        width: Width of the features: 384, 768, 1024 or 1536 for S, B, L and g.
        size: Side that images are resized to; None gives each of the denoiser's tokens one of the
            encoder's, which is REPA's 224 for images of 256 pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str, width: int = 768, size: int | None = None) -> None:
        super().__init__(width)
        self.folder, self.size = folder, size
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1), False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).reshape(3, 1, 1), False)
        self.model: Any = None

    def init_weights(self) -> None:
        """Read the weights.

        Raises:
            FileNotFoundError: The folder is missing or holds no DINOv2.
            ValueError: It holds one of another width or kind.
        """
        model, faults = self._read()
        if faults:
            raise ValueError(f"{self.folder} holds no DINOv2: {'; '.join(faults[:3])}")
        if model.config.hidden_size != self.width:
            raise ValueError(
                f"the DINOv2 in {self.folder} has width {model.config.hidden_size}, the config "
                f"says {self.width}; set model.alignment.encoder.width"
            )
        model.embeddings.interpolate_pos_encoding = MethodType(_positions, model.embeddings)
        self.model = model.float().to(self.mean.device).eval().requires_grad_(False)

    def _read(self) -> tuple[Any, list[str]]:
        """The model, and what its files lack or have too much."""
        try:
            from transformers import Dinov2Model
        except ImportError as error:
            raise ImportError("DINOv2 needs transformers: pip install transformers") from error
        if not Path(self.folder).is_dir():
            raise FileNotFoundError(
                f"there is no folder {self.folder}; put DINOv2's weights there, in transformers' "
                "layout (facebook/dinov2-base on the hub), or set model.alignment.encoder.folder"
            )
        try:
            read: Any = Dinov2Model.from_pretrained
            model, info = read(self.folder, local_files_only=True, output_loading_info=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise FileNotFoundError(
                f"no DINOv2 can be read from {self.folder}: {reason}"
            ) from error
        faults = [f"missing {key}" for key in sorted(info["missing_keys"])]
        rest = sorted(key for key in info["unexpected_keys"] if not key.startswith("classifier"))
        return model, faults + [f"unknown {key}" for key in rest]

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Encode.

        Args:
            images: (N, C, H, W) in [-1, 1], of three channels or a grey one.
            grid: Rows and columns that would be best.

        Returns:
            (N, width, rows, columns), of ``grid`` unless there is a ``size``.
        """
        patch = self.model.config.patch_size
        rows, columns = grid if self.size is None else (self.size // patch, self.size // patch)
        x = ((images.float() + 1) / 2 - self.mean) / self.std  # grey becomes three channels
        x = F.interpolate(x, (rows * patch, columns * patch), mode="bicubic")
        tokens = self.model(x).last_hidden_state[:, 1:]  # the first is of the whole image
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))


def _positions(embeddings: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """The table of positions for another grid, resized as REPA does: without aliasing.

    Args:
        embeddings: Of transformers' model.
        tokens: Unused.
        height: Of the image.
        width: Of the image.

    Returns:
        (1, 1 + rows columns, D).
    """
    table, patch = embeddings.position_embeddings, embeddings.patch_size
    whole, places = table[:, :1], table[:, 1:]
    side, grid = round(places.shape[1] ** 0.5), (height // patch, width // patch)
    if grid == (side, side):
        return table
    places = places.transpose(1, 2).unflatten(2, (side, side))
    places = F.interpolate(places, grid, mode="bicubic", antialias=True)
    return torch.cat([whole, places.flatten(2).transpose(1, 2)], dim=1)

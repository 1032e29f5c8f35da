"""Frozen encoders by their known sizes: their own classes know them when weights are read."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmsora.models.alignments.image_encoder import ImageEncoder
from mmsora.models.conditioners.image import CLIPImage
from mmsora.models.layers.attention import Attention
from mmsora.models.layers.feed_forward import FeedForward
from mmsora.models.text_encoders.text_encoder import TextEncoder
from mmsora.utils.user_error import UserError

__all__ = ["outline_encoders"]

WORDS = 49408  # that CLIP knows
PATCH, PLACES = 14, 1370  # of DINOv2: side of a patch, rows of its table of positions
VIEW = 1 + (224 // PATCH) ** 2  # tokens of an image to CLIP, with the same patches
# Layers and heads by width: CLIP of ViT-B, L and H, and of G; DINOv2 S, B, L and g.
CLIP_SIZES = {512: (12, 8), 768: (12, 12), 1024: (24, 16), 1280: (32, 20)}
# Layers, heads and width by the width of the embedding: CLIP's ViT-L and H of images.
VISION_SIZES = {768: (24, 16, 1024), 1024: (32, 16, 1280)}
DINO_SIZES = {384: (12, 6), 768: (12, 12), 1024: (24, 16), 1536: (40, 24)}


class _Layer(nn.Module):
    """A layer of a plain transformer; with ``scales`` as DINOv2 has them behind both halves."""

    def __init__(self, width: int, heads: int, scales: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), FeedForward(width)
        self.scales = nn.Parameter(torch.ones(2, width)) if scales else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), 2)
        return x + self.mlp(self.norm2(x))


class _Transformer(nn.Module):
    """As many weights as CLIP's text encoder or DINOv2, and as much work."""

    def __init__(self, tables: int, layers: int, heads: int, width: int, scales: bool) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.empty(tables, width))
        self.layers = nn.ModuleList(_Layer(width, heads, scales) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, 1, N, width) to the same."""
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def outline_encoders(model: nn.Module, without_text: bool) -> None:
    """Give encoders of texts and of images inside a model a network of their size.

    Args:
        model: On the meta device; changed in place. Encoders that have weights already stay.
        without_text: Texts come embedded, so that their encoder has no weights.

    Raises:
        UserError: An encoder is of no known size.
    """
    for module in list(model.modules()):
        if isinstance(module, TextEncoder):
            if getattr(module, "model", 0) is None and not without_text:
                tables = WORDS + module.length
                module.outline = _network(module, CLIP_SIZES, tables, scales=False)
            module.forward = partial(_text_states, module)  # type: ignore[method-assign]
        elif isinstance(module, ImageEncoder) and getattr(module, "model", 0) is None:
            tables = 3 * PATCH**2 + PLACES + 3  # the bias, and tokens for the class and the mask
            module.outline = _network(module, DINO_SIZES, tables, scales=True)
            module.forward = partial(_image_features, module)  # type: ignore[method-assign]
        elif isinstance(module, CLIPImage) and module.model is None:
            if module.width not in VISION_SIZES:
                raise UserError(
                    f"no CLIPImage of width {module.width} is known to the estimate; known widths "
                    f"are {', '.join(map(str, VISION_SIZES))}"
                )
            network = _Transformer(3 * PATCH**2 + VIEW, *VISION_SIZES[module.width], scales=False)
            module.model = network.requires_grad_(False)
            module.forward = partial(_image_embedding, module)  # type: ignore[method-assign]


def _network(
    encoder: TextEncoder | ImageEncoder,
    sizes: dict[int, tuple[int, int]],
    tables: int,
    scales: bool,
) -> nn.Module:
    if encoder.width not in sizes:
        known = ", ".join(map(str, sizes))
        raise UserError(
            f"no {type(encoder).__name__} of width {encoder.width} is known to the estimate; "
            f"known widths are {known}"
        )
    network = _Transformer(tables, *sizes[encoder.width], encoder.width, scales)
    return network.requires_grad_(False)


@torch.no_grad()
def _text_states(encoder: TextEncoder, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    shape = (len(texts), encoder.length, encoder.width)
    states, mask = torch.empty(shape, device="meta"), torch.ones(shape[:2], dtype=torch.bool)
    network = getattr(encoder, "outline", None)
    return (states if network is None else network(states[:, None])[:, 0].float()), mask


@torch.no_grad()
def _image_embedding(encoder: CLIPImage, image: Tensor) -> Tensor:
    tables: Tensor = encoder.model.tables
    tokens = F.linear(image.new_empty(1, 1, VIEW, 3 * PATCH**2), tables[: 3 * PATCH**2].T)
    return encoder.model(tokens)[0, 0, 0, : encoder.width].float()


@torch.no_grad()
def _image_features(encoder: ImageEncoder, images: Tensor, grid: tuple[int, int]) -> Tensor:
    side = getattr(encoder, "size", None)
    rows, columns = grid if side is None else (side // PATCH, side // PATCH)
    x = F.interpolate(images.float(), (rows * PATCH, columns * PATCH), mode="bicubic")
    patches = x.new_empty(len(x), 1, rows * columns, 3 * PATCH**2)
    embedded = F.linear(patches, encoder.outline.tables[: 3 * PATCH**2].T)  # type: ignore
    tokens = torch.cat([embedded[:, :, :1], embedded], dim=2)
    out = encoder.outline(tokens)[:, 0, 1:]  # type: ignore
    return out.transpose(1, 2).unflatten(2, (rows, columns)).float()

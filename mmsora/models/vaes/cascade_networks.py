"""The networks around StableCascade's stages B and C, named as in the authors' files."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mmsora.models.layers.linear import linear

__all__ = ["EfficientNetEncoder", "Previewer", "StageA"]

# EfficientNetV2-S: is the expansion fused with the 3x3 convolution, expansion, stride, channels
# and blocks of each part; table 4 of arXiv:2104.00298.
EFFICIENTNET_V2_S = (
    (True, 1, 1, 24, 2),
    (True, 4, 2, 48, 4),
    (True, 4, 2, 64, 4),
    (False, 4, 2, 128, 6),
    (False, 6, 1, 160, 9),
    (False, 6, 2, 256, 15),
)


class EfficientNetEncoder(nn.Module):
    """EfficientNetV2-S without its classifier, and a projection to a few normalised channels.

    Args:
        parts: Fused or not, expansion, stride, channels and blocks of each part.
        width: Channels of the last part.
        channels: Of the latent.
    """

    def __init__(
        self,
        parts: Sequence[tuple[bool, int, int, int, int]] = EFFICIENTNET_V2_S,
        width: int = 1280,
        channels: int = 16,
    ) -> None:
        super().__init__()
        self.channels = channels
        inside = parts[0][3]
        layers: list[nn.Module] = [_convolution(3, inside, 3, stride=2)]
        for fused, expansion, stride, outside, depth in parts:
            blocks = []
            for i in range(depth):
                block_stride = 1 if i else stride
                blocks.append(_InvertedBlock(inside, outside, expansion, block_stride, fused))
                inside = outside
            layers.append(nn.Sequential(*blocks))
        self.backbone = nn.Sequential(*layers, _convolution(inside, width, 1))
        self.mapper = nn.Sequential(
            nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels, affine=False)
        )
        self.halvings = 1 + sum(part[2] == 2 for part in parts)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) normalised as ImageNet's to (N, channels, H / 32, W / 32), rounded
        up."""
        return self.mapper(self.backbone(images))


class _InvertedBlock(nn.Module):
    """EfficientNet's block: to more channels and back, around a 3x3 convolution."""

    def __init__(
        self, inside: int, outside: int, expansion: int, stride: int, fused: bool
    ) -> None:
        super().__init__()
        wide = inside * expansion
        layers: list[nn.Module]
        if fused and expansion == 1:
            layers = [_convolution(inside, outside, 3, stride)]
        elif fused:
            layers = [
                _convolution(inside, wide, 3, stride),
                _convolution(wide, outside, 1, active=False),
            ]
        else:
            layers = [
                _convolution(inside, wide, 1),
                _convolution(wide, wide, 3, stride, groups=wide),
                _SqueezeExcitation(wide, inside // 4),
                _convolution(wide, outside, 1, active=False),
            ]
        self.block = nn.Sequential(*layers)
        self.is_residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x if self.is_residual else self.block(x)


class _SqueezeExcitation(nn.Module):
    """Channels weighted by what all places have of them (arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = nn.functional.silu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * self.fc2(squeezed).sigmoid()


def _convolution(
    inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside, eps=1e-3),
        *([nn.SiLU()] if active else []),
    )


class Previewer(nn.Module):
    """From stage C's latents straight to small pictures.

    Args:
        channels: Of the latent.
        width: Channels at first; they get fewer while the picture gets larger.
    """

    def __init__(self, channels: int = 16, width: int = 512) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.blocks = nn.Sequential(
            *_seen(nn.Conv2d(channels, width, 1)),
            *_seen(nn.Conv2d(width, width, 3, padding=1)),
            *_seen(nn.ConvTranspose2d(width, half, 2, stride=2)),
            *_seen(nn.Conv2d(half, half, 3, padding=1)),
            *_seen(nn.ConvTranspose2d(half, quarter, 2, stride=2)),
            *_seen(nn.Conv2d(quarter, quarter, 3, padding=1)),
            *_seen(nn.ConvTranspose2d(quarter, quarter, 2, stride=2)),
            *_seen(nn.Conv2d(quarter, quarter, 3, padding=1)),
            nn.Conv2d(quarter, 3, 1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (N, channels, h, w) to images (N, 3, 8 h, 8 w), about in [0, 1]."""
        return self.blocks(latents)


def _seen(layer: nn.Conv2d | nn.ConvTranspose2d) -> tuple[nn.Module, ...]:
    return layer, nn.GELU(), nn.BatchNorm2d(layer.out_channels)


class StageA(nn.Module):
    """Paella's VQGAN (arXiv:2211.07292), of which StableCascade leaves the quantisation out.

    A quarter of the height and width.

    Args:
        width: Channels at that size, even.
        depth: Blocks of the decoder at that size.
        channels: Of the latent.
        codes: Of the codebook, which is in the files and not used.
    """

    def __init__(
        self, width: int = 384, depth: int = 12, channels: int = 4, codes: int = 8192
    ) -> None:
        super().__init__()
        half = width // 2
        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, half, 1))
        self.down_blocks = nn.Sequential(
            _MixingBlock(half),
            nn.Conv2d(half, width, 4, stride=2, padding=1),
            _MixingBlock(width),
            nn.Sequential(nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels)),
        )
        self.vquantizer = nn.ModuleDict({"codebook": nn.Embedding(codes, channels)})
        self.up_blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, width, 1)),
            *(_MixingBlock(width) for _ in range(depth)),
            nn.ConvTranspose2d(width, half, 4, stride=2, padding=1),
            _MixingBlock(half),
        )
        self.out_block = nn.Sequential(nn.Conv2d(half, 12, 1), nn.PixelShuffle(2))

    @staticmethod
    def from_public(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' names, of their weights or of diffusers' ``PaellaVQModel``."""
        theirs, ours = "vquantizer.embedding.", "vquantizer.codebook."
        return {key.replace(theirs, ours): value for key, value in weights.items()}

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to latents (N, channels, H / 4, W / 4), not scaled."""
        return self.down_blocks(self.in_block(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, channels, h, w) to images (N, 3, 4 h, 4 w), about in [0, 1]."""
        return self.out_block(self.up_blocks(latents))


class _MixingBlock(nn.Module):
    """Neighbours are mixed, then channels; six numbers say how much. The identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        among_neighbours = nn.Conv2d(width, width, 3, groups=width)
        nn.init.xavier_uniform_(among_neighbours.weight)
        nn.init.zeros_(cast(Tensor, among_neighbours.bias))
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), among_neighbours)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.channelwise = nn.Sequential(
            linear(width, 4 * width), nn.GELU(), linear(4 * width, width)
        )
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.gammas
        h = self.norm1(x.permute(0, 2, 3, 1)) * (1 + scale1) + shift1
        x = x + self.depthwise(h.permute(0, 3, 1, 2)) * gate1
        h = self.norm2(x.permute(0, 2, 3, 1)) * (1 + scale2) + shift2
        return x + self.channelwise(h).permute(0, 3, 1, 2) * gate2

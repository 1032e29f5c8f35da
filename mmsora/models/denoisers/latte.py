"""Latte: latent diffusion transformer for video generation (Ma et al. 2024, arXiv:2401.03048)."""

import torch
from torch import Tensor, nn

from mmsora.models.layers.block import SPACE, TIME, AdaLNBlock
from mmsora.models.layers.embedding import ClockEmbedding
from mmsora.models.layers.linear import linear
from mmsora.models.layers.modulation import AdaLN, modulate
from mmsora.models.layers.patch import PatchEmbed, check_divisible, unpatchify
from mmsora.models.layers.position import sincos_1d, sincos_2d
from mmsora.registry import DENOISERS

__all__ = ["Latte"]


@DENOISERS.register_module()
class Latte(nn.Module):
    """Alternates attention within a frame and along time (the paper's variant 1).

    Zero at initialisation. Takes any number of frames and any height and width that the patch
    divides, whatever ``size`` it was built for.

    Args:
        in_channels: Channels of the latent.
        out_channels: Channels of the output; twice ``in_channels`` when variance is learned.
        size: Frames, height and width of the latent it is made for.
        patch: Side of a spatial patch.
        width: Width of the tokens.
        depth: Number of blocks, spatial and temporal together; even.
        heads: Attention heads.
        num_classes: Class labels; label ``num_classes`` means none. 0 is unconditional.
    """

    pos_embed: Tensor
    temp_embed: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int, int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if depth % 2:
            raise ValueError(f"depth counts spatial and temporal blocks: even, not {depth}")
        frames, height, columns = size
        check_divisible(height, columns, patch)
        self.in_channels, self.size = in_channels, tuple(size)
        self.patch, self.num_classes = patch, num_classes
        self.grid = (height // patch, columns // patch)
        self.embed = PatchEmbed(in_channels, width, patch)
        self.embed_clock = ClockEmbedding(width)
        self.embed_label = nn.Embedding(num_classes + 1, width) if num_classes else None
        if self.embed_label is not None:
            nn.init.normal_(self.embed_label.weight, std=0.02)
        self.blocks = nn.ModuleList(
            AdaLNBlock(width, heads, TIME if i % 2 else SPACE) for i in range(depth)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ada = AdaLN(width, 2)
        self.head = linear(width, patch * patch * out_channels, std=0)
        self.register_buffer("pos_embed", sincos_2d(*self.grid, width).float())
        self.register_buffer("temp_embed", sincos_1d(torch.arange(frames), width).float())

    @property
    def num_tokens(self) -> int:
        """Tokens of one sample of ``size``."""
        return self.size[0] * self.grid[0] * self.grid[1]

    def positions(self, frames: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Tables of positions for a size; the stored ones at the size they were made for.

        Args:
            frames: Number of frames.
            rows: Rows of the grid of patches.
            columns: Columns of the grid of patches.

        Returns:
            Spatial (N, width) and temporal (T, 1, width) tables.
        """
        space, time = self.pos_embed, self.temp_embed
        if (rows, columns) != self.grid:
            space = sincos_2d(rows, columns, space.shape[-1]).to(space)
        if frames != len(time):
            time = sincos_1d(torch.arange(frames), time.shape[-1]).to(time)
        return space, time[:, None]

    def forward(self, x: Tensor, clock: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            x: Noisy latents, (B, in_channels, T, H, W).
            clock: What the diffusion process tells of its time, (B,).
            label: Class labels, (B,); ``num_classes`` is none. Not for an unconditional model.

        Returns:
            (B, out_channels, T, H, W).

        Raises:
            ValueError: The patch does not divide the size, or labels are missing.
        """
        frames, rows, columns = x.shape[2], x.shape[3] // self.patch, x.shape[4] // self.patch
        condition = self.embed_clock(clock)
        if self.embed_label is not None:
            if label is None:
                raise ValueError("a class-conditional Latte needs label=; num_classes is none")
            condition = condition + self.embed_label(label)
        space, time = self.positions(frames, rows, columns)

        x = self.embed(x) + space  # (B, T, N, width)
        for i, block in enumerate(self.blocks):
            if i == 1:
                x = x + time
            x = block(x, condition)

        shift, scale = self.ada(condition)
        return unpatchify(self.head(modulate(self.norm(x), shift, scale)), rows, self.patch)

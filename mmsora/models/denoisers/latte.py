"""Latte: latent diffusion transformer for video generation (Ma et al. 2024, arXiv:2401.03048)."""

import torch
from torch import Tensor, nn

from mmsora.models.layers.attention import Attention
from mmsora.models.layers.block import SPACE, TIME, AdaLNBlock
from mmsora.models.layers.modulation import gated, modulate
from mmsora.models.layers.position import sincos_1d
from mmsora.models.layers.transformer import VideoTransformer, time_table
from mmsora.registry import DENOISERS

__all__ = ["Latte"]


class SpaceTimeBlock(AdaLNBlock):
    """The paper's variant 3: attention in space, then along time, then the perceptron.

    The attention along time has a plain norm and no gate; with a scale and shift in that norm and
    no bias on queries, keys and values there are as many weights as were published.

    Args:
        width: Width of the tokens.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, SPACE)
        self.norm_time = nn.LayerNorm(width, eps=1e-6)
        self.attn_time = Attention(width, heads, qkv_bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, T, N, width) and condition (B, width) to tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(condition)
        x = gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), SPACE))
        x = x + self.attn_time(self.norm_time(x), TIME)
        return gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


@DENOISERS.register_module()
class Latte(VideoTransformer):
    """Attention within each frame and attention along time.

    Args:
        in_channels: Channels of the latent.
        out_channels: Channels of the output; twice ``in_channels`` when variance is learned.
        size: Frames, height and width of the latent it is made for.
        patch: Side of a patch in space, or its frames, rows and columns.
        width: Width of the tokens.
        depth: Number of blocks, spatial and temporal together; even, but for ``joint``.
        heads: Attention heads.
        num_classes: Class labels; label ``num_classes`` means none. 0 is unconditional.
        layout: Order of the blocks: ``interleaved`` alternates them (variant 1, the default),
            ``late`` has all spatial blocks before all temporal ones (variant 2), ``joint`` has
            both attentions in each block (variant 3).
    """

    temp_embed: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int, int],
        patch: int | tuple[int, int, int],
        width: int,
        depth: int,
        heads: int,
        num_classes: int = 0,
        layout: str | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, size, patch, width, num_classes)
        self.blocks = nn.ModuleList(_blocks(layout or "interleaved", width, depth, heads))
        is_temporal = [getattr(block, "axis", None) == TIME for block in self.blocks]
        self._first_temporal = is_temporal.index(True) if any(is_temporal) else 0
        table = sincos_1d(torch.arange(self.grid[0]), width).float()
        self.register_buffer("temp_embed", table)

    def forward(self, x: Tensor, clock: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            x: Noisy latents, (B, in_channels, T, H, W).
            clock: What the diffusion process tells of its time, (B,).
            label: Class labels, (B,); ``num_classes`` is none. Not for an unconditional model.

        Returns:
            (B, out_channels, T, H, W).
        """
        condition = self.condition(clock, label)
        tokens = self.tokens(x)
        for i, block in enumerate(self.blocks):
            if i == self._first_temporal:  # frames are told apart where time first matters
                tokens = tokens + time_table(self.temp_embed, tokens.shape[1])
            tokens = block(tokens, condition)
        return self.output(tokens, condition, x.shape[2:])


def _blocks(layout: str, width: int, depth: int, heads: int) -> list[nn.Module]:
    if layout == "joint":
        return [SpaceTimeBlock(width, heads) for _ in range(depth)]
    if layout not in ("interleaved", "late"):
        raise ValueError(f"layout must be 'interleaved', 'late' or 'joint', got {layout!r}")
    if depth % 2:
        raise ValueError(f"depth counts spatial and temporal blocks: even, not {depth}")
    pair, half = [SPACE, TIME], depth // 2
    axes = pair * half if layout == "interleaved" else [SPACE] * half + [TIME] * half
    return [AdaLNBlock(width, heads, axis) for axis in axes]

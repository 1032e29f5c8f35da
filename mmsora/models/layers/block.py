"""The transformer block of DiT, over any axis of a video."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmsora.models.layers.attention import Attention
from mmsora.models.layers.feed_forward import FeedForward
from mmsora.models.layers.modulation import AdaLN, gated, modulate
from mmsora.models.layers.sequence import SPACE, TIME, WHOLE, Shards

__all__ = ["SPACE", "TIME", "AdaLNBlock", "on_clip"]


class AdaLNBlock(nn.Module):
    """Attention along one axis, then a perceptron, both under adaLN-Zero (arXiv:2212.09748).

    Args:
        width: Width of the tokens.
        heads: Attention heads.
        axis: ``TIME`` or ``SPACE``.
    """

    def __init__(self, width: int, heads: int, axis: int = SPACE) -> None:
        super().__init__()
        self.axis = axis
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = FeedForward(width)
        self.ada = AdaLN(width, 6)

    def forward(
        self, x: Tensor, condition: Tensor, num_images: int = 0, shards: Shards = WHOLE
    ) -> Tensor:
        """Tokens to tokens. A block along time leaves images beside the clip as they are.

        Args:
            x: Tokens, (B, T, N, width).
            condition: (B, width), or of each frame (B, T, width).
            num_images: So many of the last frames are no part of the clip.
            shards: What of the tokens is here: as ``Shards.before`` this attention says.

        Returns:
            Shaped like ``x``.
        """
        if self.axis == SPACE or not num_images:
            return self._whole(x, condition, shards)
        told = condition if condition.ndim == 2 else condition[:, 0]  # a clip's frames are one
        return on_clip(lambda clip: self._whole(clip, told, shards), x, num_images)

    def _whole(self, x: Tensor, condition: Tensor, shards: Shards) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(condition)
        x = gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), self.axis, shards))
        return gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


def on_clip(function: Callable[[Tensor], Tensor], x: Tensor, num_images: int) -> Tensor:
    """Apply a function to a clip's frames and leave the images after them as they are.

    Args:
        function: From frames to as many frames.
        x: Tokens, (B, T, N, width).
        num_images: So many of the last frames are images.

    Returns:
        Shaped like ``x``.
    """
    if not num_images:
        return function(x)
    clip, images = x.split([x.shape[1] - num_images, num_images], dim=1)
    return torch.cat([function(clip), images], dim=1)

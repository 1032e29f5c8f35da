"""The transformer block of DiT, over any axis of a video."""

from torch import Tensor, nn

from mmsora.models.layers.attention import Attention
from mmsora.models.layers.feed_forward import FeedForward
from mmsora.models.layers.modulation import AdaLN, gated, modulate

__all__ = ["SPACE", "TIME", "AdaLNBlock"]

TIME, SPACE = 1, 2  # axes of the tokens (B, T, N, width)


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

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, T, N, width) and condition (B, width) to tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(condition)
        x = gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), self.axis))
        return gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))

"""Layers along time, to stand behind the spatial layers of a network for images."""

import torch
from torch import Tensor, nn

from mmsora.models.layers.attention import Attention
from mmsora.models.layers.block import TIME
from mmsora.models.layers.linear import linear
from mmsora.models.layers.position import sincos_1d

__all__ = ["TemporalLayer"]


class TemporalLayer(nn.Module):
    """Convolution over frames, attention along time or both; the identity at initialisation.

    ``x + layer(norm(x) + code of the frame)``. With ``blend`` it is a learned mean, as in Video
    LDM (arXiv:2304.08818), ``a x + (1 - a) (x + layer(...))``, that starts at a = 1; without, the
    last linear layer starts at zero, as in AnimateDiff (arXiv:2307.04725).

    Args:
        width: Channels of the tokens, even.
        heads: Heads of the attention; 0 for none.
        kernel: Frames that the depthwise convolution sees, odd; 0 for none.
        blend: Start from a learned mean and not from a last layer of zeros.
    """

    def __init__(self, width: int, heads: int = 8, kernel: int = 3, blend: bool = False) -> None:
        super().__init__()
        if not heads and not kernel:
            raise ValueError("a temporal layer needs heads, a kernel or both; got 0 and 0")
        if kernel and kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, or 0 for no convolution; got {kernel}")
        if width % 2:
            raise ValueError(f"the codes of frames are sines and cosines: width {width} is odd")
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.conv = (
            nn.Conv1d(width, width, kernel, padding="same", groups=width) if kernel else None
        )
        self.attn = Attention(width, heads) if heads else None
        self.proj = None if heads else linear(width, width)
        self.alpha = nn.Parameter(torch.ones(())) if blend else None
        if not blend:
            nn.init.zeros_(self.last.weight)

    @property
    def last(self) -> nn.Linear:
        """The layer that all goes through at the end."""
        return self.attn.proj if self.proj is None else self.proj  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of a clip to tokens.

        Args:
            x: (B, T, N, width).

        Returns:
            Shaped like ``x``.
        """
        code = sincos_1d(torch.arange(x.shape[1]), x.shape[-1]).to(x)
        h = self.norm(x) + code[:, None]
        if self.conv is not None:
            batch, frames, tokens, width = h.shape
            rows = h.permute(0, 2, 3, 1).reshape(batch * tokens, width, frames)
            rows = self.conv(rows).view(batch, tokens, width, frames)
            h = h + rows.permute(0, 3, 1, 2)
        h = self.last(h) if self.attn is None else self.attn(h, TIME)
        return x + (h if self.alpha is None else (1 - self.alpha) * h)

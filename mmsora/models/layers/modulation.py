"""Adaptive layer norm (adaLN-Zero of DiT, arXiv:2212.09748, section 3.2).

Shifts, scales and gates are made once for each sample, or for each of its frames where these are
told different things, and broadcast over its tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmsora.models.layers.linear import linear

__all__ = ["AdaLN", "gated", "modulate"]


class AdaLN(nn.Module):
    """Modulation vectors from a condition; zero at initialisation.

    Args:
        width: Width of condition and tokens.
        vectors: How many vectors to make.
    """

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__()
        self.vectors = vectors
        self.linear = linear(width, vectors * width, std=0)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Make the vectors.

        Args:
            condition: (B, width), or of each frame (B, T, width).

        Returns:
            ``vectors`` tensors of shape (B, 1, 1, width) or (B, T, 1, width).
        """
        made = self.linear(F.silu(condition)).unsqueeze(-2)
        return (made[:, None] if condition.ndim == 2 else made).chunk(self.vectors, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x (1 + scale) + shift``."""
    return torch.addcmul(shift, x, 1 + scale)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """``x + gate branch``."""
    return torch.addcmul(x, gate, branch)

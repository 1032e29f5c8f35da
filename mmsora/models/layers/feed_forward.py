"""The two-layer perceptron of a transformer block."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmsora.models.layers.linear import linear

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), linear.

    Args:
        width: Width of the tokens.
        ratio: Hidden width over ``width``.
    """

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = linear(width, ratio * width)
        self.fc2 = linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., width) to (..., width)."""
        hidden = self.fc1(x)
        if hidden.requires_grad:
            return self.fc2(F.gelu(hidden, approximate="tanh"))
        # In place: as much memory anew costs as much time as the function itself.
        return self.fc2(torch.ops.aten.gelu_(hidden, approximate="tanh"))

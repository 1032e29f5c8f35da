"""The two-layer perceptron of a transformer block."""

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
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

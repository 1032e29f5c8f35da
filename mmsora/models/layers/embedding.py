"""Embeddings of the clock."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmsora.models.layers.linear import linear

__all__ = ["ClockEmbedding", "sinusoid"]


def sinusoid(clock: Tensor, channels: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of ``clock`` at geometrically falling frequencies.

    Args:
        clock: Any real numbers, (B,).
        channels: Width of the result, even.
        max_period: The longest period is ``2 pi max_period``.

    Returns:
        float32, (B, channels).
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=clock.device)
    angles = clock.float()[:, None] * torch.exp(steps * (-math.log(max_period) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ClockEmbedding(nn.Module):
    """Sinusoid and a two-layer perceptron.

    Args:
        width: Width of the result.
        channels: Width of the sinusoid.
    """

    def __init__(self, width: int, channels: int = 256) -> None:
        super().__init__()
        self.channels = channels
        self.fc1 = linear(channels, width, std=0.02)
        self.fc2 = linear(width, width, std=0.02)

    def forward(self, clock: Tensor) -> Tensor:
        """Shape (B,) to (B, width)."""
        x = sinusoid(clock, self.channels).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(x)))

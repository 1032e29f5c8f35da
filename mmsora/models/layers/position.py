"""Sine-cosine tables of positions, computed for any size."""

import torch
from torch import Tensor

__all__ = ["sincos_1d", "sincos_2d"]


def sincos_1d(positions: Tensor, width: int) -> Tensor:
    """Sines, then cosines.

    Args:
        positions: (N,).
        width: Width of the table, even.

    Returns:
        float64, (N, width).
    """
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(rows: int, columns: int, width: int) -> Tensor:
    """Table of a grid in row-major order; the column's code comes first, as in DiT.

    Args:
        rows: Height of the grid.
        columns: Width of the grid.
        width: Width of the table, divisible by 4.

    Returns:
        float64, (rows * columns, width).

    Raises:
        ValueError: ``width`` is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, got {width}")
    column_code = sincos_1d(torch.arange(columns), width // 2).repeat(rows, 1)
    row_code = sincos_1d(torch.arange(rows), width // 2).repeat_interleave(columns, dim=0)
    return torch.cat([column_code, row_code], dim=-1)

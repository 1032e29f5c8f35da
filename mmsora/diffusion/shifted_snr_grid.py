"""StableCascade's shift of a grid towards noise."""

import torch
from torch import Tensor

from mmsora.diffusion.grid import Grid, SpacedGrid
from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = ["ShiftedSNRGrid"]


@SCHEDULERS.register_module()
class ShiftedSNRGrid(Grid):
    """Even steps of the path, each moved to where ``sigma / alpha`` is ``shift`` times as large
    (simple diffusion, arXiv:2301.11093): fewer small levels of noise, more large ones.

    StableCascade's stage C is trained on its path as it is and sampled with 2, which on that path
    is what ``CosinePath(shift=2)`` with even steps is.

    Args:
        num_steps: Number of steps.
        shift: 1 is even.
    """

    def __init__(self, num_steps: int, shift: float = 2.0) -> None:
        if shift < 1:  # it would not begin with pure noise
            raise ValueError(f"shift must be at least 1, got {shift}")
        self._even = SpacedGrid(num_steps)
        self.num_steps, self.shift = num_steps, shift

    def __call__(self, path: Path) -> Tensor:
        if path.num_levels is not None:
            raise ValueError(
                f"ShiftedSNRGrid is for paths in continuous time, {type(path).__name__} is a "
                "table; take SpacedGrid or LogSNRGrid"
            )
        times = self._even(path)
        alpha, sigma = path.coefficients(times[:-1])
        return torch.cat([path.time_of(self.shift * sigma / alpha), times[-1:]])

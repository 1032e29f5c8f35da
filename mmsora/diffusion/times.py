"""Where on the path to train, and where to stop while sampling."""

from abc import ABC, abstractmethod
from itertools import accumulate, repeat

import torch
from torch import Tensor

from mmsora.diffusion.level import RandomNumbers
from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = ["Grid", "LogitNormalTimes", "SpacedGrid", "Times", "UniformTimes"]


class Times(ABC):
    """A distribution of training times."""

    @abstractmethod
    def __call__(self, path: Path, draws: RandomNumbers) -> Tensor:
        """Times on the path, float64 of shape (B,)."""


@SCHEDULERS.register_module()
class UniformTimes(Times):
    """All of the path alike."""

    def __call__(self, path: Path, draws: RandomNumbers) -> Tensor:
        return path.time_at(draws.uniform("times"))


@SCHEDULERS.register_module()
class LogitNormalTimes(Times):
    """``sigmoid(n)``, n normal: more often the middle (Stable Diffusion 3, arXiv:2403.03206).

    Args:
        mean: Mean of ``n``. Positive prefers noise.
        std: Standard deviation of ``n``.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.mean, self.std = mean, std

    def __call__(self, path: Path, draws: RandomNumbers) -> Tensor:
        normal = torch.special.ndtri(draws.uniform("times").clamp_min(2.0**-54))
        fraction = torch.sigmoid(self.mean + self.std * normal)
        return path.time_at(fraction.clamp_max(1 - 2.0**-53))  # a wide one rounds up to 1


class Grid(ABC):
    """The times at which a solver stops, from noise to data, both ends included."""

    num_steps: int

    @abstractmethod
    def __call__(self, path: Path) -> Tensor:
        """``num_steps + 1`` times, float64, on the CPU."""


@SCHEDULERS.register_module()
class SpacedGrid(Grid):
    """Even steps.

    On a table of levels: evenly spaced levels, first and last included, then clean data, to the
    last bit those of iDDPM's ``create_diffusion(str(num_steps))`` (arXiv:2102.09672). A single
    step starts at the noisiest level, where iDDPM would take the cleanest.

    Args:
        num_steps: Number of steps.
    """

    def __init__(self, num_steps: int) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        self.num_steps = num_steps

    def __call__(self, path: Path) -> Tensor:
        if path.num_levels is None:
            return torch.linspace(
                path.t_noise, path.t_clean, self.num_steps + 1, dtype=torch.float64
            )
        if self.num_steps > path.num_levels:
            raise ValueError(
                f"{self.num_steps} steps do not fit {path.num_levels} levels; use at most "
                f"{path.num_levels}"
            )
        last = path.num_levels - 1
        stride = last / max(self.num_steps - 1, 1)
        sums = accumulate(repeat(stride, self.num_steps - 1), initial=0.0)  # as iDDPM adds them up
        levels = [round(level) for level in sums] if self.num_steps > 1 else [last]
        return torch.tensor([*reversed(levels), path.t_clean], dtype=torch.float64)

"""Where to stop while sampling."""

from abc import ABC, abstractmethod
from itertools import accumulate, repeat

import torch
from torch import Tensor

from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = ["Grid", "SpacedGrid"]


class Grid(ABC):
    """The times at which a solver stops, from noise to data, both ends included."""

    num_steps: int

    @abstractmethod
    def __call__(self, path: Path) -> Tensor:
        """``num_steps + 1`` times, float64, on the CPU."""


@SCHEDULERS.register_module()
class SpacedGrid(Grid):
    """Even steps.

    On a table of levels one of the two published spacings, then clean data:

    * ``linspace``: first and last level included, to the last bit those of iDDPM's
      ``create_diffusion(str(num_steps))`` (arXiv:2102.09672). A single step starts at the
      noisiest level, where iDDPM would take the cleanest.
    * ``leading``: every so many levels from 0 on, iDDPM's ``create_diffusion("ddimN")``.

    Args:
        num_steps: Number of steps.
        spacing: The spacing on a table.
    """

    def __init__(self, num_steps: int, spacing: str = "linspace") -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if spacing not in ("linspace", "leading"):
            raise ValueError(f"spacing must be 'linspace' or 'leading', got {spacing!r}")
        self.num_steps, self.spacing = num_steps, spacing

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
        places = self._leading if self.spacing == "leading" else self._linspace
        levels = places(path.num_levels)
        return torch.tensor([*reversed(levels), path.t_clean], dtype=torch.float64)

    def _linspace(self, num_levels: int) -> list[int]:
        last = num_levels - 1
        if self.num_steps == 1:
            return [last]
        stride = last / (self.num_steps - 1)
        sums = accumulate(repeat(stride, self.num_steps - 1), initial=0.0)  # as iDDPM adds them up
        return [round(level) for level in sums]

    def _leading(self, num_levels: int) -> list[int]:
        for stride in range(1, num_levels + 1):
            if len(range(0, num_levels, stride)) == self.num_steps:
                return list(range(0, num_levels, stride))
        raise ValueError(
            f"no whole stride over {num_levels} levels makes exactly {self.num_steps} steps; "
            "use the spacing 'linspace' or another number"
        )

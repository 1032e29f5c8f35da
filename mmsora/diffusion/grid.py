"""Where to stop while sampling."""

import math
from abc import ABC, abstractmethod
from itertools import accumulate, repeat

import torch
from torch import Tensor

from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = [
    "Grid",
    "KarrasGrid",
    "LinearQuadraticGrid",
    "LogSNRGrid",
    "ShiftedGrid",
    "SpacedGrid",
    "TrailingGrid",
]


class Grid(ABC):
    """The times at which a solver stops, from noise to data, both ends included.

    Attributes:
        num_steps: Number of steps.
    """

    num_steps: int

    @abstractmethod
    def __call__(self, path: Path) -> Tensor:
        """``num_steps + 1`` times, float64, on the CPU."""


@SCHEDULERS.register_module()
class SpacedGrid(Grid):
    """Even steps, as the path counts them (``Path.time_at``).

    On a table of levels one of the two published spacings, then clean data:

    * ``linspace``: first and last level included, to the last bit those of iDDPM's
      ``create_diffusion(str(num_steps))`` (arXiv:2102.09672). A single step starts at the
      noisiest level; iDDPM's is the cleanest, ``num_steps=[1]``.
    * ``leading``: every so many levels from 0 on, iDDPM's ``create_diffusion("ddimN")``.

    Args:
        num_steps: Number of steps; on a table also the number in each of equal sections, the
            cleanest first, iDDPM's ``create_diffusion("10,15,20")``.
        spacing: The spacing on a table.
        span: First and last time where time is continuous, and steps even in time itself; None
            goes all the way.
        last_step: Length of a last step of its own, where time is continuous: the others, even
            in time, end so far before the last time. None is as long as the others.
    """

    def __init__(
        self,
        num_steps: int | list[int] | tuple[int, ...],
        spacing: str = "linspace",
        span: tuple[float, float] | None = None,
        last_step: float | None = None,
    ) -> None:
        self.sections = list(num_steps) if isinstance(num_steps, list | tuple) else [num_steps]
        for count in self.sections or [0]:
            _check_at_least("num_steps", count, 1)
        if spacing not in ("linspace", "leading"):
            raise ValueError(f"spacing must be 'linspace' or 'leading', got {spacing!r}")
        if spacing == "leading" and len(self.sections) > 1:
            raise ValueError(f"num_steps of {self.sections} sections needs spacing='linspace'")
        if last_step is not None and (last_step <= 0 or self.sections == [1]):
            raise ValueError(
                f"last_step must be positive and the last of two steps or more, got {last_step} "
                f"with num_steps={num_steps}"
            )
        self.from_noise = num_steps == 1
        self.num_steps, self.spacing = sum(self.sections), spacing
        self.span, self.last_step = span, last_step

    def __call__(self, path: Path) -> Tensor:
        if path.num_levels is None:
            return self._continuous(path)
        if self.span is not None or self.last_step is not None:
            raise ValueError(
                f"span and last_step are for continuous time; {type(path).__name__} is a table"
            )
        places = self._leading if self.spacing == "leading" else self._linspace
        levels = places(path.num_levels)
        return torch.tensor([*reversed(levels), path.t_clean], dtype=torch.float64)

    def _continuous(self, path: Path) -> Tensor:
        if len(self.sections) > 1:
            raise ValueError(
                f"num_steps={self.sections} counts levels of a table, and {type(path).__name__} "
                f"is none; give their sum, {self.num_steps}"
            )
        if self.span is None and self.last_step is None:
            return _by_fraction(path, _even(1, 0, self.num_steps + 1))
        first, last = self.span or (path.t_noise, path.t_clean)
        if self.last_step is None:
            return _even(first, last, self.num_steps + 1)
        before = last + math.copysign(self.last_step, first - last)
        return torch.cat([_even(first, before, self.num_steps), _even(last, last, 1)])

    def _linspace(self, num_levels: int) -> list[int]:
        _check_they_fit(self.num_steps, num_levels)
        if self.from_noise:
            return [num_levels - 1]
        size, extra = divmod(num_levels, len(self.sections))
        levels: list[int] = []
        start = 0
        for i, count in enumerate(self.sections):
            width = size + (i < extra)
            _check_they_fit(count, width)
            stride = (width - 1) / max(count - 1, 1)
            sums = accumulate(repeat(stride, count - 1), initial=0.0)  # as iDDPM adds them up
            levels += [start + round(level) for level in sums]
            start += width
        return levels

    def _leading(self, num_levels: int) -> list[int]:
        _check_they_fit(self.num_steps, num_levels)
        for stride in range(1, num_levels + 1):
            if len(range(0, num_levels, stride)) == self.num_steps:
                return list(range(0, num_levels, stride))
        raise ValueError(
            f"no whole stride over {num_levels} levels makes exactly {self.num_steps} steps; "
            "use the spacing 'linspace' or another number"
        )


@SCHEDULERS.register_module()
class TrailingGrid(Grid):
    """Even steps down from the noisiest level of a table, whatever level they end at; then clean
    data (``trailing`` in Lin et al. 2023, arXiv:2305.08891, table 2).

    Args:
        num_steps: Number of steps.
    """

    def __init__(self, num_steps: int) -> None:
        _check_at_least("num_steps", num_steps, 1)
        self.num_steps = num_steps

    def __call__(self, path: Path) -> Tensor:
        if path.num_levels is None:
            return _by_fraction(path, _even(1, 0, self.num_steps + 1))
        _check_they_fit(self.num_steps, path.num_levels)
        steps = torch.arange(self.num_steps, dtype=torch.float64)
        levels = (path.num_levels - steps * (path.num_levels / self.num_steps)).round() - 1
        return torch.cat([levels, _even(path.t_clean, path.t_clean, 1)])


class _RatioGrid(Grid):
    """Steps that are chosen by ``sigma / alpha``, then clean data.

    Args:
        num_steps: Number of steps.
        ratio_min: The least ratio before clean data; None is where the path's even steps end
            (level 0 of a table), and 0.002 where that is 0.
        ratio_max: The first ratio; None starts where the path does, and spaces as if from 80
            where the ratio there is infinite.
    """

    def __init__(
        self, num_steps: int, ratio_min: float | None = None, ratio_max: float | None = None
    ) -> None:
        _check_at_least("num_steps", num_steps, 1)
        if ratio_min is not None and not 0 < ratio_min < (ratio_max or math.inf):
            raise ValueError(
                f"ratio_min must be positive and less than ratio_max, got {ratio_min} and "
                f"{ratio_max}"
            )
        self.num_steps, self.ratio_min, self.ratio_max = num_steps, ratio_min, ratio_max

    def __call__(self, path: Path) -> Tensor:
        clean, noise = _ratio(path, path.t_clean), _ratio(path, path.t_noise)
        lowest = path.time_at(torch.zeros((), dtype=torch.float64)).item()
        most = self.ratio_max or self._most(path, noise)
        least = self.ratio_min or _ratio(path, lowest) or 0.002
        if not clean * (1 - 1e-6) <= least < most <= noise * (1 + 1e-6):
            raise ValueError(
                f"ratio_min and ratio_max must be a range within that of {type(path).__name__}, "
                f"{clean:g} to {noise:g}; got {least:g} and {most:g}"
            )
        if least > clean:
            times = path.time_of(self._between(most, least, self.num_steps))
            times = torch.cat([times, _even(path.t_clean, path.t_clean, 1)])
        else:  # the path itself ends at some noise
            times = path.time_of(self._between(most, least, self.num_steps + 1))
            times[-1] = path.t_clean
        if self.ratio_max is None:
            times[0] = path.t_noise
        alpha, sigma = path.coefficients(times)
        if not ((sigma / alpha).diff() < 0).all():
            raise ValueError(
                f"ratio_min={least:g} is below the least noise of {type(path).__name__} before "
                f"clean data, {_ratio(path, lowest):g}; give a larger one or None"
            )
        return times

    @staticmethod
    def _most(path: Path, noise: float) -> float:
        """Where even spacing starts: at the path's start, or below one of pure noise."""
        if noise < math.inf:
            return noise
        return 80.0 if path.num_levels is None else min(80.0, _ratio(path, path.t_noise - 1))

    @abstractmethod
    def _between(self, most: float, least: float, count: int) -> Tensor:
        """So many falling ratios."""


@SCHEDULERS.register_module()
class KarrasGrid(_RatioGrid):
    """Short steps at little noise: even in ``(sigma / alpha)^(1 / rho)``, then clean data (EDM,
    Karras et al. 2022, arXiv:2206.00364, equation 5).

    Args:
        num_steps: Number of steps.
        ratio_min: The least ``sigma / alpha`` before clean data; None is where the path's even
            steps end (level 0 of a table), and 0.002 where that is 0.
        ratio_max: The first ``sigma / alpha``; None starts where the path does, and spaces as if
            from 80 where the ratio there is infinite.
        rho: 1 is even; the larger the shorter are the steps at little noise.
    """

    def __init__(
        self,
        num_steps: int,
        ratio_min: float | None = None,
        ratio_max: float | None = None,
        rho: float = 7.0,
    ) -> None:
        super().__init__(num_steps, ratio_min, ratio_max)
        if rho <= 0:
            raise ValueError(f"rho must be positive, got {rho}")
        self.rho = rho

    def _between(self, most: float, least: float, count: int) -> Tensor:
        root = 1 / self.rho
        return _even(most**root, least**root, count) ** self.rho


@SCHEDULERS.register_module()
class LogSNRGrid(_RatioGrid):
    """Even in ``log(alpha / sigma)``, then clean data (DPM-Solver, Lu et al. 2022,
    arXiv:2206.00927, section 3.3); diffusers' ``use_lu_lambdas``.

    Args:
        num_steps: Number of steps.
        ratio_min: The least ``sigma / alpha`` before clean data; None is where the path's even
            steps end (level 0 of a table), and 0.002 where that is 0.
        ratio_max: The first ``sigma / alpha``; None starts where the path does, and spaces as if
            from 80 where the ratio there is infinite.
    """

    def _between(self, most: float, least: float, count: int) -> Tensor:
        return _even(math.log(most), math.log(least), count).exp()


@SCHEDULERS.register_module()
class ShiftedGrid(Grid):
    """Even steps of a flow, moved towards noise: ``t -> s t / (1 + (s - 1) t)`` (Stable Diffusion
    3, arXiv:2403.03206, equation 23). ``t`` is the fraction of the way from data to noise.

    Args:
        num_steps: Number of steps.
        shift: ``s``: 1 is even, 3 is Stable Diffusion 3's.
    """

    def __init__(self, num_steps: int, shift: float = 3.0) -> None:
        _check_at_least("num_steps", num_steps, 1)
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self.num_steps, self.shift = num_steps, shift

    def __call__(self, path: Path) -> Tensor:
        _check_a_flow(self, path)
        t = _even(1, 0, self.num_steps + 1)
        return _by_fraction(path, self.shift * t / (1 + (self.shift - 1) * t))


@SCHEDULERS.register_module()
class LinearQuadraticGrid(Grid):
    """The first steps of a flow as short as those of a far finer grid, then ever longer ones
    (Movie Gen, arXiv:2410.13720, section 3.4.2).

    Args:
        num_steps: Number of steps.
        threshold: How far the linear steps go in all: 25 steps of a grid of 1000 are 0.025.
        linear_steps: Number of linear steps; None is half of all.
    """

    def __init__(
        self, num_steps: int, threshold: float = 0.025, linear_steps: int | None = None
    ) -> None:
        _check_at_least("num_steps", num_steps, 2)
        linear = num_steps // 2 if linear_steps is None else linear_steps
        if not 0 < linear < num_steps:
            raise ValueError(f"linear_steps must be in 1 to {num_steps - 1}, got {linear}")
        if not 0 < threshold <= linear / num_steps:
            raise ValueError(
                f"threshold must be in 0 to {linear / num_steps:g} (linear_steps / num_steps), so "
                f"that steps grow; got {threshold}"
            )
        self.num_steps, self.threshold, self.linear_steps = num_steps, threshold, linear

    def __call__(self, path: Path) -> Tensor:
        _check_a_flow(self, path)
        first = self.threshold / self.linear_steps
        steps = torch.arange(self.num_steps + 1, dtype=torch.float64)
        beyond = (steps - self.linear_steps).clamp_min(0)
        # A parabola that goes on where the line ends, as steep as the line there, up to 1.
        growth = (1 - first * self.num_steps) / (self.num_steps - self.linear_steps) ** 2
        return _by_fraction(path, 1 - first * steps - growth * beyond**2)


def _even(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float64)


def _ratio(path: Path, t: float) -> float:
    alpha, sigma = path.coefficients(torch.tensor(t, dtype=torch.float64))
    return (sigma / alpha).item()


def _by_fraction(path: Path, fractions: Tensor) -> Tensor:
    """Times at fractions of the way, from 1 to 0; the ends to the last bit."""
    times = path.time_at(fractions)
    times[0], times[-1] = path.t_noise, path.t_clean
    return times


def _check_a_flow(grid: Grid, path: Path) -> None:
    if path.num_levels is not None:
        raise ValueError(
            f"{type(grid).__name__} is for continuous time, and {type(path).__name__} is a table; "
            "use SpacedGrid, TrailingGrid, KarrasGrid or LogSNRGrid"
        )


def _check_at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_they_fit(num_steps: int, num_levels: int) -> None:
    if num_steps > num_levels:
        raise ValueError(
            f"{num_steps} steps do not fit {num_levels} levels; use at most {num_levels}"
        )

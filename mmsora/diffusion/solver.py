"""Solvers: quadratures of ``dx = x0 d(alpha) + noise d(sigma)`` along the path.

The probability flow of ``x = alpha x0 + sigma noise`` moves with the network's estimates of data
and noise. So the Euler step on any path lands on the path, and DDIM, rectified-flow Euler and
EDM Euler are one class.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mmsora.diffusion.level import Estimate, Level, RandomNumbers
from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = [
    "Ancestral",
    "Denoise",
    "Euler",
    "Heun",
    "Midpoint",
    "Solver",
    "forward_variance",
    "posterior_variance",
    "step",
]

Denoise = Callable[[Tensor, Level], Estimate]


def forward_variance(now: Level, to: Level) -> Tensor:
    """Variance of ``x_now`` given ``x_to``, on any path: DDPM's beta for levels of a table.

    Args:
        now: The noisier level.
        to: The cleaner level.

    Returns:
        Broadcastable against the batch.
    """
    return (now.sigma**2 - (now.alpha / to.alpha * to.sigma) ** 2).clamp_min(0)


def posterior_variance(now: Level, to: Level) -> Tensor:
    """Variance of ``x_to`` given ``x_now`` and the data, on any path.

    DDPM's beta tilde (arXiv:2006.11239, equation 7) for two levels of a table.

    Args:
        now: The noisier level.
        to: The cleaner level.

    Returns:
        Broadcastable against the batch.
    """
    return forward_variance(now, to) * (to.sigma / now.sigma) ** 2


def step(estimate: Estimate, to: Level, variance: Tensor | float = 0.0) -> Tensor:
    """Go to a level with the estimated data and noise, less the noise that is to be drawn anew.

    With variance 0 this is the Euler step of the probability flow; with the posterior's, the
    posterior's mean (DDIM, arXiv:2010.02502, equation 12).

    Args:
        estimate: Data and noise.
        to: Where to go.
        variance: Of the noise that the caller adds.

    Returns:
        ``x`` at ``to``, before that noise.
    """
    if isinstance(variance, float) and variance == 0:
        return to.alpha * estimate.x0 + to.sigma * estimate.noise
    kept = (to.sigma**2 - variance).clamp_min(0).sqrt()
    return to.alpha * estimate.x0 + kept * estimate.noise


class Solver(ABC):
    """A way down the grid."""

    def check(self, path: Path) -> None:
        """Refuse a path that this solver cannot go.

        Args:
            path: The path of the process.

        Raises:
            ValueError: It cannot be gone.
        """

    @abstractmethod
    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        """Go from ``x`` at ``times[0]`` to ``times[-1]``.

        Args:
            denoise: Estimates data and noise at a level.
            x: The batch at the first time, (B, ...).
            path: The path.
            times: The grid, (steps + 1,), on the CPU.
            draws: Where new noise comes from.

        Returns:
            The batch at the last time, shaped like ``x``.
        """


@SCHEDULERS.register_module()
class Euler(Solver):
    """First order: rectified-flow Euler, DDIM and EDM Euler on their paths.

    Args:
        eta: Share of the posterior's standard deviation that is drawn anew at each step: 0 is
            the deterministic flow, 1 is ancestral sampling (DDIM's eta).
    """

    def __init__(self, eta: float = 0.0) -> None:
        self.eta = eta

    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        for i, (now, to) in enumerate(pairwise(path.levels(times))):
            estimate = denoise(x, now)
            if self.eta:
                variance = self.eta**2 * posterior_variance(now, to)
                new = draws.normal(f"solver/{i}", x)
                x = step(estimate, to, variance) + variance.sqrt() * new
            else:
                x = step(estimate, to)
        return x


@SCHEDULERS.register_module()
class Ancestral(Solver):
    """DDPM's sampler: every step draws from the posterior (arXiv:2006.11239, algorithm 2).

    Its variance is the network's own where the network learns it. No noise is added on arrival at
    clean data. Guidance by a gradient moves the mean by that many times the variance, not as far
    as it has moved the estimate (Dhariwal and Nichol 2021, arXiv:2105.05233, algorithm 1).

    Args:
        variance: Of a step where the network does not learn it: the ``posterior``'s, or that of
            the ``forward`` process (DDPM's two choices, section 3.2).
    """

    def __init__(self, variance: str = "posterior") -> None:
        if variance not in ("posterior", "forward"):
            raise ValueError(f"variance must be 'posterior' or 'forward', got {variance!r}")
        self.variance = variance

    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        steps = zip(path.levels(times[:-1]), _ancestral_steps(path, times), strict=True)
        for i, (now, to) in enumerate(steps):
            estimate = denoise(x, now)
            x = torch.add(to.alpha * estimate.x0, estimate.noise, alpha=to.kept)
            if to.log_least > -math.inf:
                std = self._std(estimate, to)
                if estimate.gradient is not None:
                    x = x + (std**2 - to.moved) * estimate.gradient
                new = draws.normal(f"solver/{i}", x)
                x = torch.addcmul(x, std, new) if isinstance(std, Tensor) else x + std * new
        return x

    def _std(self, estimate: Estimate, to: "_AncestralStep") -> Tensor | float:
        if estimate.log_var_mix is not None:
            log = (to.log_most - to.log_least) * estimate.log_var_mix
            return log.add_(to.log_least).exp_()
        return math.exp(to.log_most if self.variance == "forward" else to.log_least)


class _AncestralStep(NamedTuple):
    """Numbers of a step, made once for a whole grid: a step costs little beside the network.

    Attributes:
        alpha: Of the data.
        kept: Of the estimated noise, what is not drawn anew.
        moved: How far a gradient has moved the estimate, as the step's end shows it.
        log_least: Logarithm of the standard deviation of the posterior.
        log_most: The same of the forward process.
    """

    alpha: float
    kept: float
    moved: float
    log_least: float
    log_most: float


def _ancestral_steps(path: Path, times: Tensor) -> list[_AncestralStep]:
    alpha, sigma = path.coefficients(times.double())
    now, to = (
        Level(times[part], alpha[part], sigma[part]) for part in (slice(-1), slice(1, None))
    )
    least, most = posterior_variance(now, to), forward_variance(now, to)
    kept, moved = (to.sigma**2 - least).clamp_min(0).sqrt(), to.alpha / now.alpha * most
    rows = torch.stack([to.alpha, kept, moved, least.log() / 2, most.log() / 2], dim=1)
    return [_AncestralStep(*row) for row in rows.tolist()]


@SCHEDULERS.register_module()
class Heun(Solver):
    """Second order: the trapezoid rule. Two network calls a step, one in the last.

    The last step is Euler's, for predictions that are undefined on clean data (EDM, Karras et
    al. 2022, arXiv:2206.00364, algorithm 1). With churn each step first goes back up the path by
    new noise (algorithm 2).

    Args:
        churn: EDM's S_churn: ``sigma / alpha`` grows by ``churn / steps`` of itself before each
            step, at most by 0.41; 0 is the deterministic flow.
        churn_min: EDM's S_min, the least ``sigma / alpha`` at which there is churn.
        churn_max: EDM's S_max, the greatest.
        churn_noise: EDM's S_noise, standard deviation of the new noise.
    """

    def __init__(
        self,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        churn_noise: float = 1.0,
    ) -> None:
        if churn < 0:
            raise ValueError(f"churn must not be negative, got {churn}")
        self.churn, self.churn_noise = churn, churn_noise
        self.churn_min, self.churn_max = churn_min, churn_max

    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        growth = min(self.churn / (len(times) - 1), math.sqrt(2) - 1)
        for i, (now, to) in enumerate(pairwise(path.levels(times))):
            ratio = now.sigma / now.alpha
            if growth and self.churn_min <= ratio <= self.churn_max and now.alpha > 0:
                low, now = now, path.at(path.time_of(ratio * (1 + growth)), x)
                new = self.churn_noise * draws.normal(f"solver/{i}", x)
                x = now.alpha / low.alpha * x + forward_variance(now, low).sqrt() * new
            a = denoise(x, now)
            if i == len(times) - 2:
                return step(a, to)
            b = denoise(step(a, to), to)
            d_alpha, d_sigma = to.alpha - now.alpha, to.sigma - now.sigma
            x = x + (d_alpha * (a.x0 + b.x0) + d_sigma * (a.noise + b.noise)) / 2
        return x


@SCHEDULERS.register_module()
class Midpoint(Solver):
    """Second order: an Euler step to the middle, whose estimate serves for the whole step.

    The middle is that of the path's own time. Two network calls a step, none of them on arrival.
    From the lowest level of a table to clean data there is no middle: that step is Euler's.
    """

    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        middles = path.levels((times[:-1] + times[1:]) / 2)
        for middle, (now, to) in zip(middles, pairwise(path.levels(times)), strict=True):
            estimate = denoise(x, now)
            if middle.sigma > 0:
                estimate = denoise(step(estimate, middle), middle)
            d_alpha, d_sigma = to.alpha - now.alpha, to.sigma - now.sigma
            x = x + d_alpha * estimate.x0 + d_sigma * estimate.noise
        return x

"""Solvers: quadratures of ``dx = x0 d(alpha) + noise d(sigma)`` along the path.

The probability flow of ``x = alpha x0 + sigma noise`` moves with the network's estimates of data
and noise. So the Euler step on any path lands on the path, and DDIM, rectified-flow Euler and
EDM Euler are one class.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from mmsora.diffusion.level import Estimate, Level, RandomNumbers
from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = [
    "Ancestral",
    "Denoise",
    "Euler",
    "Heun",
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
        for i, (t_now, t_to) in enumerate(pairwise(times)):
            now, to = path.at(t_now, x), path.at(t_to, x)
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

    Its variance is the network's own where the network learns it, else the posterior's. No noise
    is added on arrival at clean data.
    """

    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        for i, (t_now, t_to) in enumerate(pairwise(times)):
            now, to = path.at(t_now, x), path.at(t_to, x)
            estimate = denoise(x, now)
            posterior = posterior_variance(now, to)
            x = step(estimate, to, posterior)
            if to.sigma > 0:
                std = posterior.sqrt()
                if estimate.log_var_mix is not None:
                    most = forward_variance(now, to)
                    std = (most / posterior) ** (estimate.log_var_mix / 2) * std
                x = x + std * draws.normal(f"solver/{i}", x)
        return x


@SCHEDULERS.register_module()
class Heun(Solver):
    """Second order: the trapezoid rule. Two network calls a step, one in the last.

    The last step is Euler's, for predictions that are undefined on clean data (EDM,
    arXiv:2206.00364, algorithm 1).
    """

    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        for i, (t_now, t_to) in enumerate(pairwise(times)):
            now, to = path.at(t_now, x), path.at(t_to, x)
            a = denoise(x, now)
            if i == len(times) - 2:
                return step(a, to)
            b = denoise(step(a, to), to)
            d_alpha, d_sigma = to.alpha - now.alpha, to.sigma - now.sigma
            x = x + (d_alpha * (a.x0 + b.x0) + d_sigma * (a.noise + b.noise)) / 2
        return x

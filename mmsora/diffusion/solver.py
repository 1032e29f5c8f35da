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

__all__ = ["Ancestral", "Denoise", "Euler", "Heun", "Solver", "posterior_std", "step"]

Denoise = Callable[[Tensor, Level], Estimate]


def posterior_std(now: Level, to: Level) -> Tensor:
    """Standard deviation of ``x_to`` given ``x_now`` and the data, on any path.

    DDPM's ``sqrt(beta tilde)`` (arXiv:2006.11239, equation 7) for two levels of a table.

    Args:
        now: The noisier level.
        to: The cleaner level.

    Returns:
        The standard deviation, broadcastable against the batch.
    """
    forward_var = now.sigma**2 - (now.alpha / to.alpha * to.sigma) ** 2
    return (forward_var.clamp_min(0)).sqrt() * to.sigma / now.sigma


def step(
    estimate: Estimate, to: Level, std: Tensor | float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Go to a level with the estimated data and noise, part of the noise drawn anew.

    With ``std`` 0 this is the Euler step of the probability flow; with the posterior's, the
    ancestral step (DDIM, arXiv:2010.02502, equation 12).

    Args:
        estimate: Data and noise.
        to: Where to go.
        std: Standard deviation of the new noise.
        noise: Standard normal numbers shaped like the data; unused when ``std`` is 0.

    Returns:
        ``x`` at ``to``.
    """
    if noise is None:
        return to.alpha * estimate.x0 + to.sigma * estimate.noise
    kept = (to.sigma**2 - std**2).clamp_min(0).sqrt()
    return to.alpha * estimate.x0 + kept * estimate.noise + std * noise


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
                std = self.eta * posterior_std(now, to)
                x = step(estimate, to, std, draws.normal(f"solver/{i}", x))
            else:
                x = step(estimate, to)
        return x


@SCHEDULERS.register_module()
class Ancestral(Euler):
    """DDPM's sampler: every step draws from the posterior (arXiv:2006.11239, algorithm 2)."""

    def __init__(self) -> None:
        super().__init__(eta=1.0)


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

"""Solvers that remember earlier estimates: second order and more for one network call a step."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from mmsora.diffusion.level import Level, RandomNumbers
from mmsora.diffusion.path import Path
from mmsora.diffusion.solver import Denoise, Solver, posterior_variance, step
from mmsora.registry import SCHEDULERS

__all__ = ["AB2", "DPMSolverPP2M", "UniPC"]


@SCHEDULERS.register_module()
class AB2(Solver):
    """Second order: Adams and Bashforth's rule for steps of any length.

    Estimates are carried on in a straight line of the path's own time. The first step is Euler's.
    """

    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        before = None
        for i, (now, to) in enumerate(pairwise(path.levels(times))):
            here = denoise(x, now)
            d_alpha, d_sigma = to.alpha - now.alpha, to.sigma - now.sigma
            x = x + d_alpha * here.x0 + d_sigma * here.noise
            if before is not None:
                ahead = (to.t - now.t) / (now.t - times[i - 1]) / 2
                x = x + ahead * d_alpha * (here.x0 - before.x0)
                x = x + ahead * d_sigma * (here.noise - before.noise)
            before = here
        return x


@SCHEDULERS.register_module()
class DPMSolverPP2M(Solver):
    """DPM-Solver++(2M), and SDE-DPM-Solver++(2M) with noise (Lu et al. 2022, arXiv:2211.01095,
    algorithm 2 and appendix B.4).

    The data are carried on in a straight line of ``log(alpha / sigma)``. First and last step are
    of first order, so a path may start at ``alpha = 0`` and end at ``sigma = 0``.

    Args:
        eta: Share of the posterior's standard deviation that is drawn anew at each step: 0 is
            the deterministic flow, 1 the SDE.
    """

    def __init__(self, eta: float = 0.0) -> None:
        self.eta = eta

    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        levels = path.levels(times)
        before = None
        for i, (now, to) in enumerate(pairwise(levels)):
            here = denoise(x, now)
            variance = self.eta**2 * posterior_variance(now, to) if self.eta else 0.0
            x = step(here, to, variance)
            if before is not None and i < len(levels) - 2:
                ahead = _log_ratio(now, to) / _log_ratio(levels[i - 1], now) / 2
                x = x + ahead * _gain(now, to, variance) * (here.x0 - before)
            if isinstance(variance, Tensor):
                x = x + variance.sqrt() * draws.normal(f"solver/{i}", x)
            before = here.x0
        return x


@SCHEDULERS.register_module()
class UniPC(Solver):
    """UniPC of the data, with B2(h): predicts a step, and corrects it by the estimate that the
    next one needs anyway (Zhao et al. 2023, arXiv:2302.04867, algorithms 5 and 6).

    The first and last steps are of lower order, so a path may start at ``alpha = 0`` and end at
    ``sigma = 0``.

    Args:
        order: 1, 2 or 3: number of estimates that a prediction is made of.
    """

    def __init__(self, order: int = 2) -> None:
        if order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {order}")
        self.order = order

    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        levels = path.levels(times)
        known: list[tuple[Level, Tensor]] = []
        euler = x
        for i, (now, to) in enumerate(pairwise(levels)):
            here = denoise(x, now)
            if known:  # correct the step that led here, by what is seen here
                x = euler + _correction(known[0][0], now, [*known, (now, here.x0)])
            known = [(now, here.x0), *known[: self.order - 1]]
            euler = step(here._replace(noise=(x - now.alpha * here.x0) / now.sigma), to)
            order = min(self.order, len(levels) - 1 - i)
            x = euler + _correction(now, to, known[:order])
        return x


def _log_ratio(now: Level, to: Level) -> Tensor:
    """Growth of ``log(alpha / sigma)``: infinite from ``alpha = 0`` and to ``sigma = 0``."""
    return (to.alpha / to.sigma * now.sigma / now.alpha).log()


def _gain(now: Level, to: Level, variance: Tensor | float = 0.0) -> Tensor:
    """By how much a change of the data at a fixed ``x_now`` moves ``x_to``."""
    kept = (to.sigma**2 - variance).clamp_min(0).sqrt()
    return to.alpha - kept / now.sigma * now.alpha


def _correction(now: Level, to: Level, known: list[tuple[Level, Tensor]]) -> Tensor | float:
    """What other estimates of the data add to an Euler step (arXiv:2302.04867, equation 3).

    Args:
        now: Where the step starts.
        to: Where it ends.
        known: Levels and the data estimated there, that at ``now`` the first.

    Returns:
        Shaped like the data; 0 where nothing else is known.
    """
    (_, here), *others = known
    # At alpha = 0 the logarithm is infinite: an estimate there is no help.
    others = [(level, x0) for level, x0 in others if level.alpha > 0]
    if not others:
        return 0.0
    length = _log_ratio(now, to)
    one = torch.ones_like(length)
    places = [one if level is to else _log_ratio(now, level) / length for level, _ in others]
    weights = [0.5 / places[0]] if len(places) == 1 else _weights(torch.stack(places), length)
    total = sum(weight * (x0 - here) for weight, (_, x0) in zip(weights, others, strict=True))
    return _gain(now, to) * total


def _weights(places: Tensor, length: Tensor) -> Tensor:
    """Weights of differences of the data at ``places`` of a step (0 its start, 1 its end), so that
    polynomials up to their number are integrated exactly.
    """
    phi = whole = torch.expm1(-length)
    moments = []
    for k in range(1, len(places) + 1):
        phi = -phi / length - 1 / math.factorial(k)
        moments.append(math.factorial(k) * phi / whole)
    powers = torch.stack([places**k for k in range(1, len(places) + 1)])
    return torch.linalg.solve(powers, torch.stack(moments))

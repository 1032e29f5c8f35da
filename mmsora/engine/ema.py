"""Profiles of averaged weights: the share that the weights of each optimizer step have.

An average follows ``ema = d(n) ema + (1 - d(n)) weights`` after the n-th optimizer step. With
power-function profiles (Karras et al. 2023, arXiv:2312.02696, section 3.1), averages that were
kept at some steps make up nearly any other, after training (section 3.2 and appendix C).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mmsora.registry import TASK_UTILS

__all__ = ["ConstantEMA", "PowerEMA", "Profile", "WarmupEMA", "combination"]

Kept = tuple["Profile", int]


class Profile:
    """The decay of an average at each optimizer step. Its attributes are its arguments."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).items()))

    def decay_at(self, step: int) -> float:
        """How much of the average stays at a step; steps count from 1."""
        raise NotImplementedError

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in vars(self).items())

    def decays(self, steps: int) -> Tensor:
        """Those of all steps from 0 on, where nothing stays: float64, (steps + 1,)."""
        return torch.tensor([0.0, *map(self.decay_at, range(1, steps + 1))], dtype=torch.float64)


@TASK_UTILS.register_module()
class ConstantEMA(Profile):
    """The same decay at every step.

    Args:
        decay: What stays of the average.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay

    def decay_at(self, step: int) -> float:
        return self.decay


@TASK_UTILS.register_module()
class WarmupEMA(ConstantEMA):
    """At most ``step / (9 + step)``, so that a short run is not held at its start."""

    def decay_at(self, step: int) -> float:
        return min(self.decay, step / (9 + step))

    def __str__(self) -> str:
        return f"{super().__str__()} after a warm-up"


@TASK_UTILS.register_module()
class PowerEMA(Profile):
    """A share that grows as ``step ** gamma``, so that the average widens with the training.

    Args:
        sigma_rel: Standard deviation of the profile, relative to the steps so far.
        gamma: The exponent, in its place.
    """

    def __init__(self, sigma_rel: float | None = None, gamma: float | None = None) -> None:
        if (sigma_rel is None) == (gamma is None):
            raise ValueError(
                f"set one of sigma_rel and gamma, got sigma_rel={sigma_rel} and gamma={gamma}"
            )
        if gamma is None:
            gamma = _gamma_of(float(sigma_rel or 0))
        elif not 0 <= gamma < math.inf:
            raise ValueError(f"gamma must be a number from 0 on, got {gamma}")
        self.gamma = gamma

    @property
    def sigma_rel(self) -> float:
        """Standard deviation of the density proportional to ``t ** gamma`` on [0, 1]."""
        g = self.gamma
        return math.sqrt((g + 1) / (g + 3)) / (g + 2)

    def decay_at(self, step: int) -> float:
        return (1 - 1 / step) ** (self.gamma + 1)

    def __str__(self) -> str:
        return f"sigma_rel={self.sigma_rel:.4g}"


def _gamma_of(sigma_rel: float) -> float:
    """Largest root of ``(g + 2)^2 (g + 3) sigma_rel^2 = g + 1``; uniform shares are the limit."""
    if not 0 < sigma_rel <= 12**-0.5:
        raise ValueError(
            f"sigma_rel must be above 0 and at most 0.2886, a plain mean; got {sigma_rel}"
        )
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def combination(kept: Sequence[Kept], wanted: Kept) -> tuple[Tensor, float]:
    """The best combination of averages in the place of one that was not kept.

    It is by least squares of the shares of all steps, and sums to 1, so that weights that stand
    still come out as they are.

    Args:
        kept: Profile and step of each average.
        wanted: Profile and step of the one to make.

    Returns:
        A factor for each average, float64, and the error of the shares, relative to the wanted
        ones by their 2-norms.

    Raises:
        ValueError: The step is none from 1 to the last one kept.
    """
    last = max(step for _, step in kept)
    if not 1 <= wanted[1] <= last:
        raise ValueError(f"step must be in 1 to {last}, the last one kept; got {wanted[1]}")
    decays = {profile: profile.decays(last) for profile, _ in [*kept, wanted]}
    columns = torch.stack([_shares(decays[p][: step + 1], last) for p, step in kept], dim=1)
    target = _shares(decays[wanted[0]][: wanted[1] + 1], last)[:, None]
    base = columns[:, -1:]
    rest = torch.linalg.lstsq(columns[:, :-1] - base, target - base, driver="gelsd").solution
    factors = torch.cat([rest, 1 - rest.sum(0, keepdim=True)])
    error = (columns @ factors - target).norm() / target.norm()
    return factors[:, 0], float(error)


def _shares(decays: Tensor, last: int) -> Tensor:
    """The share of each step, from 0 to ``last``, in an average with these decays."""
    stays = pad(decays[1:].flip(0).cumprod(0).flip(0), (0, 1), value=1.0)
    return pad((1 - decays) * stays, (0, last + 1 - len(decays)))

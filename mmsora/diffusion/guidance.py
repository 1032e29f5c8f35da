"""Guidance: from several opinions to one."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmsora.diffusion.level import Estimate, Level
from mmsora.diffusion.solver import Denoise
from mmsora.registry import SCHEDULERS
from mmsora.utils.config_calls import suggestion

__all__ = ["Autoguidance", "ClassifierFree", "Guidance", "Opinions"]

# Shares of the strength at a share of noise from 0 (clean) to 1 (pure noise).
SCHEDULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "constant": lambda share, power: torch.ones_like(share),
    "linear": lambda share, power: 2 * (1 - share),
    "cosine": lambda share, power: 1 + torch.cos(math.pi * share),
    "power_cosine": lambda share, power: (1 - torch.cos(math.pi * (1 - share) ** power)) / 2,
}


class Opinions(NamedTuple):
    """What guidance may ask, each at a noisy batch and its level.

    Attributes:
        conditional: The network's output (B, C', ...) under the condition.
        both: That and a second output; None where there is no second opinion.
        read: The data and noise that an output means.
    """

    conditional: Callable[[Tensor, Level], Tensor]
    both: Callable[[Tensor, Level], tuple[Tensor, Tensor]] | None
    read: Callable[[Tensor, Tensor, Level], Estimate]


class Guidance(ABC):
    """Makes one estimator of several opinions.

    Attributes:
        second: Whose the second opinion is: the ``null`` condition's or a ``weak`` network's.
    """

    second: str = "null"

    @abstractmethod
    def __call__(self, opinions: Opinions) -> Denoise:
        """The guided estimator."""


@SCHEDULERS.register_module()
class ClassifierFree(Guidance):
    """``null + scale (cond - null)`` (Ho and Salimans 2022, arXiv:2207.12598).

    Acts on the network's output; every meaning of it is affine in the data, so acting on the data
    would be the same. A learned variance stays the condition's.

    Where it acts goes by the noise's share ``sigma / (alpha + sigma)``, 0 for clean data and 1
    for pure noise: the time ``t`` of rectified flow, ``s / (1 + s)`` at EDM's sigma ``s``. The
    schedules make of ``scale`` the strength ``1 + (scale - 1) f(share)`` with

    * ``constant``: 1;
    * ``linear``: ``2 (1 - share)`` and ``cosine``: ``1 + cos(pi share)``, whose mean over all
      shares is 1 (Wang et al. 2024, arXiv:2404.13040);
    * ``power_cosine``: ``(1 - cos(pi (1 - share)^power)) / 2``, at most 1 (MDT, Gao et al. 2023,
      arXiv:2303.14389).

    Args:
        scale: 1 is no guidance, and costs one network call instead of two.
        channels: Guide only the first so many channels; the others stay conditional. The
            published DiT and SiT guide 3 of 4. None guides all.
        interval: Guide only at these shares of noise, both ends included, and call the network
            once elsewhere (Kynkaanniemi et al. 2024, arXiv:2404.07724). REPA's is (0, 0.7).
        rescale: How far the guided output goes back to the conditional one's standard deviation,
            from 0 to 1 (Lin et al. 2023, arXiv:2305.08891, section 3.4).
        schedule: Of the scale: ``constant``, ``linear``, ``cosine`` or ``power_cosine``.
        power: Of ``power_cosine``.
    """

    def __init__(
        self,
        scale: float,
        channels: int | None = None,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        schedule: str = "constant",
        power: float = 4.0,
    ) -> None:
        if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                f"interval must be two shares of noise, 0 <= low < high <= 1, got {interval}; "
                "write EDM's sigma s as s / (1 + s)"
            )
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale must be from 0 to 1, got {rescale}")
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}{suggestion(schedule, SCHEDULES)}")
        if channels is not None and channels < 1:
            raise ValueError(f"channels must be at least 1, or None for all, got {channels}")
        self.scale, self.channels, self.interval = scale, channels, interval
        self.rescale, self.schedule, self.power = rescale, schedule, power

    def __call__(self, opinions: Opinions) -> Denoise:
        conditional, both, read = opinions

        def guided(x: Tensor, level: Level) -> Estimate:
            strength = self.strength(level)
            if both is None or (isinstance(strength, float) and strength == 1):
                return read(x, conditional(x, level), level)
            cond, other = both(x, level)
            return read(x, self._mix(cond, other, self.channels or x.shape[1], strength), level)

        return guided

    def strength(self, level: Level) -> Tensor | float:
        """The scale at a level, and 1 outside the interval.

        Args:
            level: The level.

        Returns:
            A number, or a tensor where samples have levels of their own.
        """
        if self.interval is None and self.schedule == "constant":
            return float(self.scale)
        share = level.sigma / (level.alpha + level.sigma)
        strength = 1 + (self.scale - 1) * SCHEDULES[self.schedule](share, self.power)
        if self.interval is not None:
            low, high = self.interval
            # Rounding must not put out an end: on a line 0.7 is 0.7 / (0.3 + 0.7).
            inside = (share >= low - 1e-6) & (share <= high + 1e-6)
            strength = torch.where(inside, strength, 1.0)
        # One level for all lies on the CPU, so that to look at it waits for no device.
        return strength.item() if strength.ndim == 0 else strength

    def _mix(self, cond: Tensor, other: Tensor, channels: int, strength: Tensor | float) -> Tensor:
        first, rest = cond[:, :channels], cond[:, channels:]
        other = other[:, :channels]
        mixed = other + strength * (first - other)
        if self.rescale:
            axes = tuple(range(1, mixed.ndim))
            std, wanted = mixed.std(axes, keepdim=True), first.std(axes, keepdim=True)
            ratio = wanted / std.clamp_min(torch.finfo(std.dtype).tiny)  # of no deviation, 0
            mixed = mixed * torch.lerp(torch.ones_like(ratio), ratio, self.rescale)
        return torch.cat([mixed, rest], dim=1)


@SCHEDULERS.register_module()
class Autoguidance(ClassifierFree):
    """``weak + scale (cond - weak)``: away from a weaker network, smaller or trained for less
    time, under the same condition (Karras et al. 2024, arXiv:2406.02507).

    Arguments are those of :class:`ClassifierFree`.
    """

    second = "weak"

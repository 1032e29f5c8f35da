"""Paths whose time runs from 0, data, to 1, noise: those of SiT."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = ["LinearPath", "TrigPath", "VPPath"]

BETA_FIRST, BETA_LAST = 0.1, 20.0  # of the variance-preserving equation


class _UnitPath(Path):
    """A path on [0, 1].

    Args:
        clock_scale: The network is told ``clock_scale * t``.
        span: First and last time.
        reverse_clock: Tell it ``clock_scale * (1 - t)``: SiT's networks count time from noise to
            data, with ``clock_scale=1``.
    """

    def __init__(
        self,
        clock_scale: float = 1000.0,
        span: tuple[float, float] = (0.0, 1.0),
        reverse_clock: bool = False,
    ) -> None:
        if not 0 <= span[0] < span[1] <= 1:
            raise ValueError(f"span must lie in [0, 1] and rise, as (0.0, 1.0), got {span}")
        self.clock_scale, self.reverse_clock = clock_scale, reverse_clock
        self.t_clean, self.t_noise = span

    def clock(self, t: Tensor) -> Tensor:
        return self.clock_scale * (1 - t if self.reverse_clock else t)

    def time_of(self, ratio: Tensor) -> Tensor:
        return self._inverse(ratio).clamp(self.t_clean, self.t_noise)

    @abstractmethod
    def _inverse(self, ratio: Tensor) -> Tensor:
        """The time in [0, 1] at which ``sigma / alpha`` is ``ratio``, which may be infinite."""


@SCHEDULERS.register_module()
class LinearPath(_UnitPath):
    """Rectified flow: ``alpha = 1 - t``, ``sigma = t`` (Liu et al. 2022, arXiv:2209.03003).

    Args:
        clock_scale: The network is told ``clock_scale * t``.
        span: First and last time. Noise prediction is undefined at ``t = 1``: end at 0.999.
        reverse_clock: Tell it ``clock_scale * (1 - t)``, as SiT does.
    """

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(t, dtype=torch.float64)
        return -one, one

    def _inverse(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)


@SCHEDULERS.register_module()
class TrigPath(_UnitPath):
    """``alpha = cos(pi t / 2)``, ``sigma = sin(pi t / 2)``: the trigonometric interpolant
    (Albergo and Vanden-Eijnden 2022, arXiv:2209.15571), SiT's GVP (arXiv:2401.08740).

    Args:
        clock_scale: The network is told ``clock_scale * t``.
        span: First and last time. Noise prediction is undefined at ``t = 1``: end at 0.999.
        reverse_clock: Tell it ``clock_scale * (1 - t)``, as SiT does.
    """

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # The cosine as a sine: exactly 0 at t = 1.
        return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(t.double())
        return -math.pi / 2 * sigma, math.pi / 2 * alpha

    def _inverse(self, ratio: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(ratio)


@SCHEDULERS.register_module()
class VPPath(_UnitPath):
    """The variance-preserving equation of Song et al. 2021 (arXiv:2011.13456, equation 33).

    ``log alpha = -(20 - 0.1) t^2 / 4 - 0.1 t / 2``, ``sigma = sqrt(1 - alpha^2)``; SiT's VP. It
    ends in noise with a little data left, ``alpha = 0.0066``. At ``t = 0`` sigma rises infinitely
    fast, so that a velocity is undefined there.

    Args:
        clock_scale: The network is told ``clock_scale * t``.
        span: First and last time. SiT trains on all of it, and ends its sampling at 0.001.
        reverse_clock: Tell it ``clock_scale * (1 - t)``, as SiT does.
    """

    def __init__(
        self,
        clock_scale: float = 1000.0,
        span: tuple[float, float] = (1e-5, 1.0),
        reverse_clock: bool = False,
    ) -> None:
        super().__init__(clock_scale, span, reverse_clock)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -t * (t * (BETA_LAST - BETA_FIRST) / 4 + BETA_FIRST / 2)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        alpha, sigma = self.coefficients(t)
        slope = -(t * (BETA_LAST - BETA_FIRST) + BETA_FIRST) / 2  # of log alpha
        return alpha * slope, -(alpha**2) * slope / sigma

    def _inverse(self, ratio: Tensor) -> Tensor:
        # The root of (beta_1 - beta_0) t^2 / 2 + beta_0 t = log(1 + ratio^2) = -2 log alpha.
        most = (BETA_LAST + BETA_FIRST) / 2
        log = torch.log1p(ratio**2).clamp_max(most)
        root = (BETA_FIRST**2 + 2 * (BETA_LAST - BETA_FIRST) * log).sqrt()
        return 2 * log / (BETA_FIRST + root)

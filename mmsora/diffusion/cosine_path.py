"""The cosine path in continuous time, of StableCascade."""

import math

import torch
from torch import Tensor

from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = ["CosinePath"]

OFFSET = 0.008  # iDDPM's, arXiv:2102.09672, equation 17
FIRST = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2) ** 2


@SCHEDULERS.register_module()
class CosinePath(Path):
    """iDDPM's squared cosine by its signal-to-noise ratio, as Wuerstchen and StableCascade have it
    (arXiv:2306.00637).

    ``alpha^2 = cos^2((t + s) / (1 + s) pi / 2)`` divided by its value at 0, with s = 0.008, and
    ``sigma^2 = 1 - alpha^2``. ``log(alpha^2 / sigma^2)`` less ``2 log(shift)``, between its
    unshifted ends, is the log-SNR. The network is told the time at which the unshifted path has
    it. Clean data are ``t = 0``: the published samplers keep the data that their last step
    estimates.

    Args:
        shift: By how much the noise outweighs that of the unshifted path: larger for larger
            images (simple diffusion, arXiv:2301.11093). StableCascade samples with 2 (stage C) and
            trains with 1.
        clamp: ``alpha^2`` of the unshifted path lies between this and 1 less this.
    """

    t_clean, t_noise = 0.0, 1.0

    def __init__(self, shift: float = 1.0, clamp: float = 1e-4) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        if not 0 < clamp < 0.5:
            raise ValueError(f"clamp must lie between 0 and 0.5, got {clamp}")
        self.log_shift, self.clamp = 2 * math.log(shift), clamp
        self._most = math.log((1 - clamp) / clamp)

    def log_snr(self, t: Tensor) -> Tensor:
        """``log(alpha^2 / sigma^2)`` in float64, shaped like ``t``; at 0 its limit."""
        cosine = torch.cos((t + OFFSET) / (1 + OFFSET) * (math.pi / 2))
        alpha2 = (cosine**2 / FIRST).clamp(self.clamp, 1 - self.clamp)
        return (torch.logit(alpha2) - self.log_shift).clamp(-self._most, self._most)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr, noisy = self.log_snr(t), t > 0
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        return torch.where(noisy, alpha, 1.0), torch.where(noisy, sigma, 0.0)

    def clock(self, t: Tensor) -> Tensor:
        return self._unshifted_time(self.log_snr(t))

    def time_at(self, fraction: Tensor) -> Tensor:
        return fraction.clamp_min(0.001)

    def time_of(self, ratio: Tensor) -> Tensor:
        log_snr = (-2 * ratio.log()).clamp(-self._most, self._most)
        within = self._unshifted_time(log_snr + self.log_shift).clamp(self.t_clean, self.t_noise)
        end = torch.where(ratio > 0, self.t_noise, self.t_clean)
        return torch.where((ratio > 0) & (log_snr > -self._most), within, end)

    def _unshifted_time(self, log_snr: Tensor) -> Tensor:
        cosine = (torch.sigmoid(log_snr) * FIRST).sqrt()
        return torch.acos(cosine) / (math.pi / 2) * (1 + OFFSET) - OFFSET

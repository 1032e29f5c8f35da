"""The variance-exploding path of EDM."""

import torch
from torch import Tensor

from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = ["VEPath"]


@SCHEDULERS.register_module()
class VEPath(Path):
    """``alpha = 1``, ``sigma = t``: noise is added and the data stay (EDM, arXiv:2206.00364).

    Time is the noise level itself. The network is told ``log(sigma) / 4`` (table 1). Even steps
    are even in ``log(sigma)``, from ``sigma_min`` on; clean data are ``t = 0``, to which EDM's
    last step leads.

    Args:
        sigma_min: The least noise that a network sees.
        sigma_max: The noise that sampling starts from.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min must be positive and below sigma_max, got {sigma_min} and {sigma_max}"
            )
        self.sigma_min = sigma_min
        self.t_clean, self.t_noise = 0.0, sigma_max
        self.prior_std = sigma_max

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(t, dtype=torch.float64)
        return torch.zeros_like(one), one

    def clock(self, t: Tensor) -> Tensor:
        return t.log() / 4

    def time_at(self, fraction: Tensor) -> Tensor:
        return self.sigma_min * (self.t_noise / self.sigma_min) ** fraction

    def time_of(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(self.t_clean, self.t_noise)

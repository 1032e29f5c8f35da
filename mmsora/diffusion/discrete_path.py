"""Tables of noise levels: DDPM, iDDPM and latent diffusion."""

import math

import torch
from torch import Tensor

from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = ["BETAS", "DiscretePath"]


def linear_betas(num_levels: int) -> Tensor:
    """1e-4 to 0.02 over 1000 levels (DDPM); fewer take larger betas, as iDDPM scales them."""
    if num_levels < 20:
        raise ValueError(f"a linear table has at least 20 levels, not {num_levels}: beta > 1")
    scale = 1000 / num_levels
    return torch.linspace(scale * 1e-4, scale * 0.02, num_levels, dtype=torch.float64)


def scaled_linear_betas(num_levels: int) -> Tensor:
    """Evenly spaced roots from 0.00085 to 0.012 (latent diffusion, arXiv:2112.10752)."""
    return torch.linspace(0.00085**0.5, 0.012**0.5, num_levels, dtype=torch.float64) ** 2


def cosine_betas(num_levels: int) -> Tensor:
    """Of a squared cosine, at most 0.999 (iDDPM, arXiv:2102.09672, equation 17)."""
    at = torch.arange(num_levels + 1, dtype=torch.float64) / num_levels
    alpha_bar = ((at + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(0.999)


BETAS = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "cosine": cosine_betas}


@SCHEDULERS.register_module()
class DiscretePath(Path):
    """A table of noise levels, as of DDPM (Ho et al. 2020, arXiv:2006.11239, section 2).

    Times are the level's number, 0 to ``num_levels - 1``; -1 is clean data. The network is told
    the number itself.

    Args:
        betas: Name of the table: ``linear``, ``scaled_linear`` or ``cosine``.
        num_levels: Length of the table.
        zero_terminal_snr: Shift and scale alpha so that the last level is pure noise (Lin et al.
            2023, arXiv:2305.08891, algorithm 1).
    """

    def __init__(
        self, betas: str = "linear", num_levels: int = 1000, zero_terminal_snr: bool = False
    ) -> None:
        if betas not in BETAS:
            raise ValueError(f"unknown table of betas {betas!r}; there are {', '.join(BETAS)}")
        alpha = (1 - BETAS[betas](num_levels)).cumprod(0).sqrt()
        if zero_terminal_snr:
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        self._alpha = torch.cat([alpha.new_ones(1), alpha])
        self._sigma = (1 - self._alpha**2).sqrt()
        self.num_levels: int = num_levels
        self.t_clean, self.t_noise = -1.0, num_levels - 1.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = t.long() + 1
        return self._alpha[index], self._sigma[index]

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Differences from the level below, where a whole table takes one unit of time."""
        index = t.long() + 1
        below = (index - 1).clamp_min(0)
        return (
            (self._alpha[index] - self._alpha[below]) * self.num_levels,
            (self._sigma[index] - self._sigma[below]) * self.num_levels,
        )

    def time_at(self, fraction: Tensor) -> Tensor:
        return (fraction * self.num_levels).floor()

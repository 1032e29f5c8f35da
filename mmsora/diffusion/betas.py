"""Published tables of betas: ``alpha_i^2 = (1 - beta_0) ... (1 - beta_i)``."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["BETAS"]


def _even(first: float, last: float, number: int) -> Tensor:
    return torch.linspace(first, last, number, dtype=torch.float64)


def _ends(num_levels: int) -> tuple[float, float]:
    """DDPM's 1e-4 and 0.02 over 1000 levels; fewer take larger betas, as iDDPM scales them."""
    scale = 1000 / num_levels
    return scale * 1e-4, scale * 0.02


def linear(num_levels: int) -> Tensor:
    """Evenly spaced (DDPM, arXiv:2006.11239, section 4)."""
    return _even(*_ends(num_levels), num_levels)


def scaled_linear(num_levels: int) -> Tensor:
    """Evenly spaced roots from 0.00085 to 0.012 (latent diffusion, arXiv:2112.10752)."""
    return _even(0.00085**0.5, 0.012**0.5, num_levels) ** 2


def squaredcos_cap_v2(num_levels: int) -> Tensor:
    """Of a squared cosine, at most 0.999 (iDDPM, arXiv:2102.09672, equation 17)."""
    at = torch.arange(num_levels + 1, dtype=torch.float64) / num_levels
    alpha_bar = ((at + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(0.999)


def sigmoid(num_levels: int) -> Tensor:
    """A logistic curve between DDPM's ends (GeoDiff, arXiv:2203.02923)."""
    first, last = _ends(num_levels)
    return first + (last - first) * torch.sigmoid(_even(-6, 6, num_levels))


def quad(num_levels: int) -> Tensor:
    """Evenly spaced roots between DDPM's ends."""
    first, last = _ends(num_levels)
    return _even(first**0.5, last**0.5, num_levels) ** 2


def const(num_levels: int) -> Tensor:
    """DDPM's last everywhere."""
    return torch.full((num_levels,), _ends(num_levels)[1], dtype=torch.float64)


def jsd(num_levels: int) -> Tensor:
    """1 / N, 1 / (N - 1), ..., 1 (arXiv:1503.03585): the last level is pure noise."""
    return 1 / _even(num_levels, 1, num_levels)


def _warmup(share: float) -> Callable[[int], Tensor]:
    """Evenly spaced for a share of the table, then constant."""

    def betas(num_levels: int) -> Tensor:
        first, last = _ends(num_levels)
        rising = int(num_levels * share)
        return torch.cat([_even(first, last, rising), const(num_levels)[rising:]])

    return betas


BETAS: dict[str, Callable[[int], Tensor]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "squaredcos_cap_v2": squaredcos_cap_v2,
    "sigmoid": sigmoid,
    "quad": quad,
    "const": const,
    "warmup10": _warmup(0.1),
    "warmup50": _warmup(0.5),
    "jsd": jsd,
}

"""Paths from data to noise: ``x_t = alpha(t) x0 + sigma(t) noise``."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mmsora.diffusion.level import Level, expand
from mmsora.registry import SCHEDULERS

__all__ = ["DiscretePath", "LinearPath", "Path"]


class Path(ABC):
    """A way from data to noise. Not a module: its numbers are float64 and stay so.

    Attributes:
        t_clean: Time at which a sample is finished.
        t_noise: Time at which sampling starts.
        prior_std: Standard deviation of the noise that sampling starts from.
        num_levels: Number of noise levels when time is discrete, else None.
    """

    t_clean: float
    t_noise: float
    prior_std: float = 1.0
    num_levels: int | None = None

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha(t)`` and ``sigma(t)`` in float64, shaped like ``t``."""

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``d alpha / dt`` and ``d sigma / dt`` in float64, shaped like ``t``."""
        t = t.double().contiguous()
        return torch.func.jvp(self.coefficients, (t,), (torch.ones_like(t),))[1]

    def clock(self, t: Tensor) -> Tensor:
        """The number that the network is told at time ``t``, shaped like ``t``."""
        return t

    def time_at(self, fraction: Tensor) -> Tensor:
        """The time at a fraction in [0, 1) of the way from data to noise, shaped like it."""
        return self.t_clean + fraction * (self.t_noise - self.t_clean)

    def at(self, t: Tensor, like: Tensor) -> Level:
        """The level at time ``t``, broadcastable against ``like``.

        Args:
            t: Times of shape () or (B,).
            like: A batch (B, ...).

        Returns:
            The level.
        """
        alpha, sigma = self.coefficients(t.double())
        return Level(t, expand(alpha, like), expand(sigma, like))


@SCHEDULERS.register_module()
class LinearPath(Path):
    """Rectified flow: ``alpha = 1 - t``, ``sigma = t`` (Liu et al. 2022, arXiv:2209.03003).

    Args:
        clock_scale: The network is told ``clock_scale * t``.
        span: First and last time. Noise prediction is undefined at ``t = 1``: end at 0.999.
    """

    def __init__(
        self, clock_scale: float = 1000.0, span: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        self.clock_scale = clock_scale
        self.t_clean, self.t_noise = span

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(t, dtype=torch.float64)
        return -one, one

    def clock(self, t: Tensor) -> Tensor:
        return self.clock_scale * t


@SCHEDULERS.register_module()
class DiscretePath(Path):
    """A table of noise levels, as of DDPM (Ho et al. 2020, arXiv:2006.11239, section 2).

    Times are the level's number, 0 to ``num_levels - 1``; -1 is clean data. The network is told
    the number itself.

    Args:
        betas: Name of the table: ``linear`` grows from 1e-4 to 0.02 over 1000 levels.
        num_levels: Length of the table. Fewer levels take larger betas, as iDDPM scales them.
    """

    def __init__(self, betas: str = "linear", num_levels: int = 1000) -> None:
        if betas != "linear":
            raise ValueError(f"unknown table of betas {betas!r}; there is 'linear'")
        if num_levels < 20:
            raise ValueError(f"a linear table has at least 20 levels, not {num_levels}: beta > 1")
        scale = 1000 / num_levels
        table = torch.linspace(scale * 1e-4, scale * 0.02, num_levels, dtype=torch.float64)
        alpha_bar = torch.cat([table.new_ones(1), (1 - table).cumprod(0)])
        self._alpha, self._sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        self.num_levels = num_levels
        self.t_clean, self.t_noise = -1.0, num_levels - 1.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = t.long() + 1
        return self._alpha[index], self._sigma[index]

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Differences from the level below: the table knows nothing between levels."""
        index = t.long() + 1
        below = (index - 1).clamp_min(0)
        return (
            self._alpha[index] - self._alpha[below],
            self._sigma[index] - self._sigma[below],
        )

    def time_at(self, fraction: Tensor) -> Tensor:
        return (fraction * self._levels).floor()

    @property
    def _levels(self) -> int:
        return len(self._alpha) - 1

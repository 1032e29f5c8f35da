"""Paths from data to noise: ``x_t = alpha(t) x0 + sigma(t) noise``."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mmsora.diffusion.level import Level, expand

__all__ = ["Path"]


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
        """The time at a fraction of the way from data to noise, shaped like it.

        Fractions lie in [0, 1), and may be 1 where time is continuous. Even fractions are what
        the path takes to be even steps.
        """
        return self.t_clean + fraction * (self.t_noise - self.t_clean)

    def time_of(self, ratio: Tensor) -> Tensor:
        """The time at which ``sigma / alpha`` is what is given; the nearest end beyond the path.

        Args:
            ratio: ``sigma / alpha``, float64 of any shape; may be infinite.

        Returns:
            Times, shaped like ``ratio``.
        """
        low = torch.full_like(ratio, self.t_clean)
        high = torch.full_like(ratio, self.t_noise)
        for _ in range(64):
            middle = (low + high) / 2
            alpha, sigma = self.coefficients(middle)
            cleaner = sigma < ratio * alpha
            low, high = torch.where(cleaner, middle, low), torch.where(cleaner, high, middle)
        return high

    def for_size(self, size: Sequence[int]) -> "Path":
        """The path for latents of this size: itself, unless it goes by the resolution.

        Args:
            size: Frames, height and width of the latents.

        Returns:
            The path.
        """
        return self

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

    def levels(self, times: Tensor) -> list[Level]:
        """The levels of a grid, all coefficients at once.

        Args:
            times: Times, (steps + 1,), on the CPU.

        Returns:
            A level of scalars for each, broadcastable against any batch.
        """
        alpha, sigma = self.coefficients(times.double())
        parts = times.unbind(), alpha.unbind(), sigma.unbind()
        return [Level(*level) for level in zip(*parts, strict=True)]

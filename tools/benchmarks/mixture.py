"""A toy whose diffusion is known exactly: a mixture of normal distributions."""

import torch
from torch import Tensor

from mmsora.diffusion.guidance import ClassifierFree, Opinions
from mmsora.diffusion.level import Estimate, Level
from mmsora.diffusion.solver import Denoise

__all__ = ["Mixture"]

CLASSES = 4


class Mixture:
    """Modes of unequal weight and width; class ``k`` of 4 has every fourth mode from ``k`` on.

    Means are scattered so that the data have variance 1; widths are from a twentieth to a third
    of that, and the heaviest mode weighs three times as much as the lightest.

    Args:
        modes: How many.
        dim: Dimensions.
        seed: Of weights, widths and means.
    """

    def __init__(self, modes: int = 12, dim: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        weights = 1 + 2 * torch.linspace(0, 1, modes, dtype=torch.float64)
        order = torch.randperm(modes, generator=generator)
        self.weights = (weights / weights.sum())[order]
        self.stds = torch.linspace(0.05, 1 / 3, modes, dtype=torch.float64)
        means = torch.randn(modes, dim, dtype=torch.float64, generator=generator)
        means = means - self.weights @ means
        spread = (self.weights @ means.square()).mean()
        within = self.weights @ self.stds.square()
        self.means = means * ((1 - within) / spread).sqrt()
        self.dim, self.classes = dim, torch.arange(modes) % CLASSES

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Data, (count, dim) float64."""
        modes = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dim, dtype=torch.float64, generator=generator)
        return self.means[modes] + self.stds[modes, None] * noise

    def log_density(self, x: Tensor, level: Level | None = None) -> Tensor:
        """Of data, or of what they become at a level.

        Args:
            x: (N, dim).
            level: Of the noise; None is clean data.

        Returns:
            Natural logarithms, (N,).
        """
        alpha, sigma = (1.0, 0.0) if level is None else (level.alpha, level.sigma)
        return self._joint(x, alpha, sigma).logsumexp(1)

    def mode_of(self, x: Tensor) -> Tensor:
        """The mode that each sample most likely comes from, (N,)."""
        return self._joint(x, 1.0, 0.0).argmax(1)

    def estimate(self, x: Tensor, level: Level, labels: Tensor | None = None) -> Estimate:
        """What data and noise are in the mean, given the noisy data.

        Args:
            x: The noisy data, (N, dim).
            level: Where on its path.
            labels: The class of each sample, (N,); None where it is not known.

        Returns:
            The exact estimate.
        """
        _, alpha, sigma = level
        joint = self._joint(x, alpha, sigma)
        if labels is not None:
            joint = joint.where(labels[:, None] == self.classes, -torch.inf)
        share = joint.softmax(1) / self._variances(alpha, sigma)  # (N, modes)
        # In each mode the noise is sigma / v (x - alpha m), the data m + alpha s^2 / v (x - ...).
        wide = share * self.stds**2
        noise = sigma * (share.sum(1, keepdim=True) * x - alpha * (share @ self.means))
        x0 = sigma**2 * (share @ self.means) + alpha * wide.sum(1, keepdim=True) * x
        return Estimate(x0, noise)

    def spread(self, x: Tensor, level: Level) -> Tensor:
        """Variance of the data in each dimension, given the noisy data: shaped like ``x``."""
        _, alpha, sigma = level
        variances = self._variances(alpha, sigma)
        share = self._joint(x, alpha, sigma).softmax(1)
        # The data's mean in a mode is a m + b x.
        a, b = sigma**2 / variances, alpha * self.stds**2 / variances
        inner = share @ (a * self.stds**2)
        square = (share * a**2) @ self.means.square() + 2 * x * ((share * a * b) @ self.means)
        square = square + x.square() * (share @ b**2)[:, None]
        x0 = (share * a) @ self.means + x * (share @ b)[:, None]
        return inner[:, None] + square - x0.square()

    def denoiser(self, labels: Tensor | None = None, scale: float = 1.0) -> Denoise:
        """A perfect network, guided where there are labels.

        Args:
            labels: The class of each sample, (N,), or None.
            scale: Of classifier-free guidance.

        Returns:
            ``denoise(x, level)``.
        """
        if labels is None:
            return self.estimate

        def told(x: Tensor, level: Level) -> Tensor:
            return torch.cat(self.estimate(x, level, labels)[:2], dim=1)

        def both(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
            return told(x, level), torch.cat(self.estimate(x, level)[:2], dim=1)

        def read(x: Tensor, output: Tensor, level: Level) -> Estimate:
            return Estimate(*output.chunk(2, dim=1))

        return ClassifierFree(scale, channels=2 * self.dim)(Opinions(told, both, read))

    def _variances(self, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        return (alpha * self.stds) ** 2 + sigma**2

    def _joint(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Logarithm of each mode's share of the density, (N, modes)."""
        variances, means = self._variances(alpha, sigma), alpha * self.means
        squares = x.square().sum(1, keepdim=True) - 2 * x @ means.T + means.square().sum(1)
        normal = -0.5 * (squares / variances + self.dim * (2 * torch.pi * variances).log())
        return self.weights.log() + normal

"""Where on the path to train."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from mmsora.diffusion.level import RandomNumbers
from mmsora.diffusion.part import build_part
from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = [
    "CosMapTimes",
    "LogNormalTimes",
    "LogitNormalTimes",
    "ModeTimes",
    "StratifiedTimes",
    "Times",
    "UniformTimes",
]

LAST = 1 - 2.0**-53  # before 1


class Times(ABC):
    """A distribution of training times, each a function of one uniform number. One that remembers
    is also an ``nn.Module``, so that its memory is saved with the model's.
    """

    def __call__(self, path: Path, draws: RandomNumbers) -> Tensor:
        """Times on the path, float64 of shape (B,)."""
        return self.quantile(path, draws.uniform("times"))

    @abstractmethod
    def quantile(self, path: Path, fraction: Tensor) -> Tensor:
        """The time that is at least as far from the data as ``fraction`` of all.

        Args:
            path: The path.
            fraction: Numbers in [0, 1), float64 of shape (B,).

        Returns:
            Times, float64 of shape (B,); on a table its levels.
        """

    def weigh(self, t: Tensor, losses: Tensor) -> Tensor:
        """Make up for times that are drawn more often than they are to count, and learn from
        their losses: here neither.

        Args:
            t: Times as they were drawn, (B,).
            losses: Of the samples at these times, (B,).

        Returns:
            The losses to train with, (B,).
        """
        return losses


@SCHEDULERS.register_module()
class UniformTimes(Times):
    """All of the path alike."""

    def quantile(self, path: Path, fraction: Tensor) -> Tensor:
        return path.time_at(fraction)


def _normal(fraction: Tensor) -> Tensor:
    return torch.special.ndtri(fraction.clamp_min(2.0**-54))


def _check_std(std: float) -> None:
    if std <= 0:
        raise ValueError(f"std must be positive, got {std}")


@SCHEDULERS.register_module()
class LogitNormalTimes(Times):
    """``sigmoid(n)``, n normal: more often the middle (Stable Diffusion 3, arXiv:2403.03206).

    Args:
        mean: Mean of ``n``. Positive prefers noise.
        std: Standard deviation of ``n``.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        _check_std(std)
        self.mean, self.std = mean, std

    def quantile(self, path: Path, fraction: Tensor) -> Tensor:
        place = torch.sigmoid(self.mean + self.std * _normal(fraction))
        return path.time_at(place.clamp_max(LAST))  # a wide one rounds up to 1


@SCHEDULERS.register_module()
class LogNormalTimes(Times):
    """Where ``sigma / alpha = exp(n)``, n normal (EDM, arXiv:2206.00364, table 1).

    Beyond the path its ends are taken, and on a table the nearest level.

    Args:
        mean: Mean of ``n``.
        std: Standard deviation of ``n``.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        _check_std(std)
        self.mean, self.std = mean, std

    def quantile(self, path: Path, fraction: Tensor) -> Tensor:
        t = path.time_of((self.mean + self.std * _normal(fraction)).exp())
        return t if path.num_levels is None else t.round().clamp(0, path.num_levels - 1)


@SCHEDULERS.register_module()
class ModeTimes(Times):
    """Heavy-tailed around the middle or away from it (Stable Diffusion 3, arXiv:2403.03206,
    equation 20).

    Args:
        scale: In [-1, 2 / (pi - 2)]. 0 is uniform, positive prefers the middle and negative the
            ends.
    """

    def __init__(self, scale: float = 1.29) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale must be in [-1, {2 / (math.pi - 2):.4f}], got {scale}")
        self.scale = scale

    def quantile(self, path: Path, fraction: Tensor) -> Tensor:
        place = fraction - self.scale * ((math.pi / 2 * fraction).sin() ** 2 - fraction)
        return path.time_at(place.clamp(0, LAST))


@SCHEDULERS.register_module()
class CosMapTimes(Times):
    """As often as a cosine schedule sees each ratio of noise to data (Stable Diffusion 3,
    arXiv:2403.03206, section 3.1).
    """

    def quantile(self, path: Path, fraction: Tensor) -> Tensor:
        place = 1 - 1 / ((math.pi / 2 * fraction).tan() + 1)
        return path.time_at(place.clamp_max(LAST))


@SCHEDULERS.register_module()
class StratifiedTimes(Times, nn.Module):
    """Spreads a distribution evenly over the batch of all processes, so that losses of batches
    differ less: one sample is drawn from each of as many equally likely parts.

    Args:
        times: The distribution or its config.
    """

    def __init__(self, times: Times | dict) -> None:
        super().__init__()
        self.times: Times = build_part(SCHEDULERS, "times", times, Times)

    def __call__(self, path: Path, draws: RandomNumbers) -> Tensor:
        return self.quantile(path, draws.stratified("times"))

    def quantile(self, path: Path, fraction: Tensor) -> Tensor:
        return self.times.quantile(path, fraction)

    def weigh(self, t: Tensor, losses: Tensor) -> Tensor:
        return self.times.weigh(t, losses)

"""Where on the path to train."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mmsora.diffusion.level import RandomNumbers
from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = ["LogitNormalTimes", "Times", "UniformTimes"]


class Times(ABC):
    """A distribution of training times."""

    @abstractmethod
    def __call__(self, path: Path, draws: RandomNumbers) -> Tensor:
        """Times on the path, float64 of shape (B,)."""


@SCHEDULERS.register_module()
class UniformTimes(Times):
    """All of the path alike."""

    def __call__(self, path: Path, draws: RandomNumbers) -> Tensor:
        return path.time_at(draws.uniform("times"))


@SCHEDULERS.register_module()
class LogitNormalTimes(Times):
    """``sigmoid(n)``, n normal: more often the middle (Stable Diffusion 3, arXiv:2403.03206).

    Args:
        mean: Mean of ``n``. Positive prefers noise.
        std: Standard deviation of ``n``.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.mean, self.std = mean, std

    def __call__(self, path: Path, draws: RandomNumbers) -> Tensor:
        normal = torch.special.ndtri(draws.uniform("times").clamp_min(2.0**-54))
        fraction = torch.sigmoid(self.mean + self.std * normal)
        return path.time_at(fraction.clamp_max(1 - 2.0**-53))  # a wide one rounds up to 1

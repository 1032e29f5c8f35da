"""Guidance: from two opinions to one."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mmsora.diffusion.level import Estimate, Level
from mmsora.diffusion.solver import Denoise
from mmsora.registry import SCHEDULERS

__all__ = ["ClassifierFree", "Guidance"]


class Guidance(ABC):
    """Makes one estimator of a conditional and an unconditional one."""

    @abstractmethod
    def __call__(self, conditional: Denoise, unconditional: Denoise) -> Denoise:
        """The guided estimator."""


@SCHEDULERS.register_module()
class ClassifierFree(Guidance):
    """``null + scale (cond - null)`` (Ho and Salimans 2022, arXiv:2207.12598).

    Args:
        scale: 1 is no guidance, and costs one network call instead of two.
        channels: Guide only the first so many channels; the others stay conditional. The
            published DiT and SiT guide 3 of 4. None guides all.
    """

    def __init__(self, scale: float, channels: int | None = None) -> None:
        self.scale, self.channels = scale, channels

    def __call__(self, conditional: Denoise, unconditional: Denoise) -> Denoise:
        if self.scale == 1:
            return conditional

        def guided(x: Tensor, level: Level) -> Estimate:
            cond, null = conditional(x, level), unconditional(x, level)
            return cond._replace(
                x0=self._mix(cond.x0, null.x0), noise=self._mix(cond.noise, null.noise)
            )

        return guided

    def _mix(self, cond: Tensor, null: Tensor) -> Tensor:
        if self.channels is None:
            return null + self.scale * (cond - null)
        first, rest = cond[:, : self.channels], cond[:, self.channels :]
        null = null[:, : self.channels]
        return torch.cat([null + self.scale * (first - null), rest], dim=1)

"""Guidance: from two opinions to one."""

from abc import ABC, abstractmethod

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
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, conditional: Denoise, unconditional: Denoise) -> Denoise:
        if self.scale == 1:
            return conditional

        def guided(x: Tensor, level: Level) -> Estimate:
            cond, null = conditional(x, level), unconditional(x, level)
            return Estimate(
                null.x0 + self.scale * (cond.x0 - null.x0),
                null.noise + self.scale * (cond.noise - null.noise),
            )

        return guided

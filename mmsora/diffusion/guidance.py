"""Guidance: from two opinions to one."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmsora.diffusion.level import Estimate, Level
from mmsora.diffusion.solver import Denoise
from mmsora.registry import SCHEDULERS

__all__ = ["ClassifierFree", "Guidance", "Opinions"]


class Opinions(NamedTuple):
    """What guidance may ask, each at a noisy batch and its level.

    Attributes:
        conditional: The network's output (B, C', ...) under the condition.
        both: That and a second output; None where there is no second opinion.
        read: The data and noise that an output means.
    """

    conditional: Callable[[Tensor, Level], Tensor]
    both: Callable[[Tensor, Level], tuple[Tensor, Tensor]] | None
    read: Callable[[Tensor, Tensor, Level], Estimate]


class Guidance(ABC):
    """Makes one estimator of several opinions.

    Attributes:
        second: Whose the second opinion is: the ``null`` condition's or a ``weak`` network's.
    """

    second: str = "null"

    @abstractmethod
    def __call__(self, opinions: Opinions) -> Denoise:
        """The guided estimator."""


@SCHEDULERS.register_module()
class ClassifierFree(Guidance):
    """``null + scale (cond - null)`` (Ho and Salimans 2022, arXiv:2207.12598).

    Acts on the network's output; every meaning of it is affine in the data, so acting on the data
    would be the same. A learned variance stays the condition's.

    Args:
        scale: 1 is no guidance, and costs one network call instead of two.
        channels: Guide only the first so many channels; the others stay conditional. The
            published DiT and SiT guide 3 of 4. None guides all.
    """

    def __init__(self, scale: float, channels: int | None = None) -> None:
        self.scale, self.channels = scale, channels

    def __call__(self, opinions: Opinions) -> Denoise:
        conditional, both, read = opinions

        def guided(x: Tensor, level: Level) -> Estimate:
            if both is None or self.scale == 1:
                return read(x, conditional(x, level), level)
            cond, other = both(x, level)
            return read(x, self._mix(cond, other, self.channels or x.shape[1]), level)

        return guided

    def _mix(self, cond: Tensor, other: Tensor, channels: int) -> Tensor:
        first, rest = cond[:, :channels], cond[:, channels:]
        other = other[:, :channels]
        return torch.cat([other + self.scale * (first - other), rest], dim=1)

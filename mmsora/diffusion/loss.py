"""What a wrong output costs."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from mmsora.diffusion.level import Level
from mmsora.diffusion.path import Path
from mmsora.diffusion.prediction import LearnedRange, Prediction
from mmsora.diffusion.variational import bound_of_step
from mmsora.diffusion.weighting import Weighting
from mmsora.registry import LOSSES

__all__ = ["Hybrid", "Loss", "MSE", "Noised"]


class Noised(NamedTuple):
    """A training batch on its path: ``x = alpha x0 + sigma noise`` at ``level``."""

    x0: Tensor
    noise: Tensor
    x: Tensor
    level: Level


class Loss(ABC):
    """A loss for each sample."""

    @abstractmethod
    def __call__(
        self, path: Path, prediction: Prediction, batch: Noised, output: Tensor
    ) -> Tensor:
        """The loss of each sample.

        Args:
            path: The path.
            prediction: What the output means.
            batch: What the network saw, and what it was made of.
            output: What the network said, (B, ...).

        Returns:
            Losses of shape (B,), in float32.
        """


@LOSSES.register_module()
class MSE(Loss):
    """Mean squared error of the prediction's own target.

    Args:
        weighting: Of the errors at each level: a weighting or its config; None weighs all alike.
    """

    def __init__(self, weighting: Weighting | dict | None = None) -> None:
        self.weighting: Weighting | None = (
            LOSSES.build(weighting) if isinstance(weighting, dict) else weighting
        )

    def __call__(
        self, path: Path, prediction: Prediction, batch: Noised, output: Tensor
    ) -> Tensor:
        errors = self._squares(path, prediction, batch, output)
        if self.weighting is None:
            return errors
        return self.weighting(path, prediction, batch.level.t, errors)

    @staticmethod
    def _squares(path: Path, prediction: Prediction, batch: Noised, output: Tensor) -> Tensor:
        target = prediction.target(path, batch.x0, batch.noise, batch.level)
        told, output = output, prediction.of_target(output, batch.level)
        if output.shape != target.shape:
            channels = target.shape[1] * told.shape[1] // max(output.shape[1], 1)
            raise ValueError(
                f"{type(prediction).__name__} needs an output of shape {tuple(target.shape)}, "
                f"the network gave {tuple(output.shape)}; set the denoiser's out_channels to "
                f"{channels}"
            )
        return (output.float() - target.float()).square().flatten(1).mean(1)


@LOSSES.register_module()
class Hybrid(MSE):
    """iDDPM's hybrid loss: mean squared error, and the variational bound for the variance alone.

    ``L_simple + vlb_weight L_vlb``, the bound in bits for each dimension and with the mean held
    fixed (arXiv:2102.09672, section 3.1), as DiT and Latte train.

    Args:
        vlb_weight: Of the bound; 1 is what DiT and Latte use.
        weighting: Of the squared errors at each level.
    """

    def __init__(self, vlb_weight: float = 1.0, weighting: Weighting | dict | None = None) -> None:
        super().__init__(weighting)
        self.vlb_weight = vlb_weight

    def __call__(
        self, path: Path, prediction: Prediction, batch: Noised, output: Tensor
    ) -> Tensor:
        if not isinstance(prediction, LearnedRange):
            raise ValueError(
                f"Hybrid trains a learned variance, and {type(prediction).__name__} has none; "
                "use LearnedRange, or the loss MSE"
            )
        squares = super().__call__(path, prediction, batch, output)
        mean, variance = prediction.split(output.float())
        fixed = torch.cat([mean.detach(), variance], dim=1)
        estimate = prediction.estimate(path, batch.x, fixed, batch.level)
        bound = bound_of_step(path, batch.x0, batch.x, estimate, batch.level.t)
        return squares + self.vlb_weight * bound

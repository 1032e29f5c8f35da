"""What a wrong output costs."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from mmsora.diffusion.level import Level
from mmsora.diffusion.path import Path
from mmsora.diffusion.prediction import Prediction
from mmsora.registry import LOSSES

__all__ = ["Loss", "MSE", "Noised"]


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
    """Mean squared error of the prediction's own target."""

    def __call__(
        self, path: Path, prediction: Prediction, batch: Noised, output: Tensor
    ) -> Tensor:
        target = prediction.target(path, batch.x0, batch.noise, batch.level)
        if output.shape != target.shape:
            raise ValueError(
                f"{type(prediction).__name__} needs an output of shape {tuple(target.shape)}, "
                f"the network gave {tuple(output.shape)}; set the denoiser's out_channels to "
                f"{target.shape[1]}"
            )
        return (output.float() - target.float()).square().flatten(1).mean(1)

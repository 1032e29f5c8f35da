"""What a wrong output costs."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from mmsora.diffusion.level import Level
from mmsora.diffusion.part import build_part
from mmsora.diffusion.path import Path
from mmsora.diffusion.prediction import LearnedRange, Prediction
from mmsora.diffusion.variational import bound_of_step
from mmsora.diffusion.weighting import Weighting
from mmsora.registry import LOSSES

__all__ = ["Hybrid", "KL", "Loss", "MSE", "Noised"]


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


def _answer(prediction: Prediction, batch: Noised, output: Tensor) -> Tensor:
    """What of an output is to equal the target, once it has the right shape."""
    answer = prediction.of_target(output, batch.level)
    if answer.shape != batch.x0.shape:
        channels = batch.x0.shape[1] * output.shape[1] // max(answer.shape[1], 1)
        raise ValueError(
            f"{type(prediction).__name__} needs an output of shape {tuple(batch.x0.shape)}, "
            f"the network gave {tuple(answer.shape)}; set the denoiser's out_channels to "
            f"{channels}"
        )
    return answer


@LOSSES.register_module()
class MSE(Loss):
    """Mean squared error of the prediction's own target.

    Args:
        weighting: Of the errors at each level: a weighting or its config; None weighs all alike.
    """

    def __init__(self, weighting: Weighting | dict | None = None) -> None:
        self.weighting: Weighting | None = (
            None if weighting is None else build_part(LOSSES, "weighting", weighting, Weighting)
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
        output = _answer(prediction, batch, output)
        return (output.float() - target.float()).square().flatten(1).mean(1)


@LOSSES.register_module()
class Hybrid(MSE):
    """iDDPM's hybrid loss: mean squared error, and the variational bound for the variance alone.

    ``L_simple + vlb_weight L_vlb``, the bound in bits for each dimension and with the mean held
    fixed (arXiv:2102.09672, section 3.1), as DiT and Latte train.

    Args:
        vlb_weight: Of the bound; 1 is what DiT and Latte use.
        weighting: Of the squared errors at each level.
        rescaled: Count the bound ``num_levels / 1000`` times, so that a shorter table changes
            nothing in the balance: iDDPM's ``RESCALED_MSE``.
    """

    def __init__(
        self,
        vlb_weight: float = 1.0,
        weighting: Weighting | dict | None = None,
        rescaled: bool = False,
    ) -> None:
        super().__init__(weighting)
        self.vlb_weight, self.rescaled = vlb_weight, rescaled

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
        scale = (path.num_levels or 0) / 1000 if self.rescaled else 1
        return squares + self.vlb_weight * scale * bound


@LOSSES.register_module()
class KL(Loss):
    """The variational bound alone, which trains mean and variance together (iDDPM's ``KL``).

    In bits for each dimension, of one step (arXiv:2102.09672, equations 4 to 7).

    Args:
        rescaled: Count it ``num_levels`` times, which makes the mean over all levels an estimate
            of the whole bound: iDDPM's ``RESCALED_KL``.
        variance: Of a step, where the network does not learn it: ``posterior`` or ``forward``.
    """

    def __init__(self, rescaled: bool = False, variance: str = "posterior") -> None:
        if variance not in ("posterior", "forward"):
            raise ValueError(f"variance must be 'posterior' or 'forward', got {variance!r}")
        self.rescaled, self.variance = rescaled, variance

    def __call__(
        self, path: Path, prediction: Prediction, batch: Noised, output: Tensor
    ) -> Tensor:
        _answer(prediction, batch, output)
        estimate = prediction.estimate(path, batch.x, output.float(), batch.level)
        bound = bound_of_step(
            path, batch.x0, batch.x, estimate, batch.level.t, variance=self.variance
        )
        return bound * (path.num_levels or 0) if self.rescaled else bound

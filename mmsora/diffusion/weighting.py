"""How much an error counts at each level of noise."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mmsora.diffusion.path import Path
from mmsora.diffusion.prediction import Prediction
from mmsora.registry import LOSSES

__all__ = ["LevelWeighting", "MinSNR", "Weighting"]


class Weighting(ABC):
    """Weighs the errors of a batch. One that learns or remembers is also an ``nn.Module``, so
    that its parameters are trained and its memory is saved with the model's.
    """

    @abstractmethod
    def __call__(self, path: Path, prediction: Prediction, t: Tensor, errors: Tensor) -> Tensor:
        """Weigh.

        Args:
            path: The path.
            prediction: What the network outputs.
            t: Times, (B,).
            errors: Mean squared errors of the prediction's own target, (B,).

        Returns:
            Losses, shaped like ``errors``.
        """


class LevelWeighting(Weighting):
    """A weight that the level alone decides.

    Attributes:
        of: What the weight is meant for: errors of the data (``x0``), of the ``noise``, or of
            the network's ``output`` whatever that is.
    """

    of: str = "output"

    @abstractmethod
    def weight(self, path: Path, t: Tensor) -> Tensor:
        """The weight at times ``t`` (B,), float64 of the same shape."""

    def __call__(self, path: Path, prediction: Prediction, t: Tensor, errors: Tensor) -> Tensor:
        weight = self.weight(path, t)
        if self.of != "output":
            alpha, sigma = path.coefficients(t.double())
            per_error = 1 if self.of == "x0" else (alpha / sigma) ** 2
            weight = weight * per_error / prediction.sensitivity(path, t) ** 2
        return errors * weight.to(errors, non_blocking=True)


@LOSSES.register_module()
class MinSNR(LevelWeighting):
    """``min(SNR, gamma)`` on errors of the data (Hang et al. 2023, arXiv:2303.09556).

    Args:
        gamma: Where the signal-to-noise ratio is cut.
    """

    of = "x0"

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        self.gamma = gamma

    def weight(self, path: Path, t: Tensor) -> Tensor:
        alpha, sigma = path.coefficients(t.double())
        return torch.clamp((alpha / sigma) ** 2, max=self.gamma)

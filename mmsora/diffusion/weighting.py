"""How much an error counts at each level of noise."""

from abc import ABC, abstractmethod

from torch import Tensor

from mmsora.diffusion.path import Path
from mmsora.diffusion.prediction import Prediction
from mmsora.registry import LOSSES

__all__ = [
    "EDMWeighting",
    "LevelWeighting",
    "LikelihoodWeighting",
    "MinSNR",
    "P2",
    "SNRWeighting",
    "VelocityWeighting",
    "Weighting",
    "snr",
]


def snr(path: Path, t: Tensor) -> Tensor:
    """The signal-to-noise ratio ``(alpha / sigma)^2``, float64 shaped like ``t``."""
    alpha, sigma = path.coefficients(t.double())
    return (alpha / sigma) ** 2


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
            per_error = 1 if self.of == "x0" else snr(path, t)
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
        return snr(path, t).clamp_max(self.gamma)


@LOSSES.register_module()
class SNRWeighting(LevelWeighting):
    """``max(SNR, at_least)`` on errors of the data (Salimans and Ho 2022, arXiv:2202.00512).

    Args:
        at_least: 0 weighs all errors of the noise alike; 1 is the paper's truncated SNR.
    """

    of = "x0"

    def __init__(self, at_least: float = 0.0) -> None:
        if at_least < 0:
            raise ValueError(f"at_least must not be negative, got {at_least}")
        self.at_least = at_least

    def weight(self, path: Path, t: Tensor) -> Tensor:
        return snr(path, t).clamp_min(self.at_least)


@LOSSES.register_module()
class P2(LevelWeighting):
    """``1 / (k + SNR)^gamma`` on errors of the noise (Choi et al. 2022, arXiv:2204.00227).

    Args:
        k: Keeps the weight of the noisiest levels finite.
        gamma: 0 weighs all alike; 0.5 and 1 are the paper's.
    """

    of = "noise"

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        if k <= 0 or gamma < 0:
            raise ValueError(f"k must be positive and gamma not negative, got {k} and {gamma}")
        self.k, self.gamma = k, gamma

    def weight(self, path: Path, t: Tensor) -> Tensor:
        return (self.k + snr(path, t)) ** -self.gamma


@LOSSES.register_module()
class EDMWeighting(LevelWeighting):
    """``(s^2 + d^2) / (s d)^2`` on errors of the data (Karras et al. 2022, arXiv:2206.00364,
    table 1), with ``s = sigma / alpha``. It makes the output of EDM's network count alike at all
    levels, so EDMPrediction of the same ``sigma_data`` needs no weighting.

    Args:
        sigma_data: ``d``, the standard deviation of the data.
    """

    of = "x0"

    def __init__(self, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def weight(self, path: Path, t: Tensor) -> Tensor:
        return snr(path, t) + self.sigma_data**-2


def _velocity_of_noise(path: Path, t: Tensor) -> Tensor:
    """By how much the velocity is wrong where the noise is wrong by 1."""
    alpha, sigma = path.coefficients(t.double())
    if (alpha == 0).any():
        raise ValueError(
            f"this weighting is infinite where alpha = 0, a level of this {type(path).__name__}; "
            "take a table without one (zero_terminal_snr=False) or another weighting"
        )
    d_alpha, d_sigma = path.rates(t.double())
    return d_sigma - d_alpha / alpha * sigma


@LOSSES.register_module()
class VelocityWeighting(LevelWeighting):
    """Errors of the velocity, whatever the network outputs: SiT's ``velocity``
    (Ma et al. 2024, arXiv:2401.08740, section 2.3).
    """

    of = "noise"

    def weight(self, path: Path, t: Tensor) -> Tensor:
        return _velocity_of_noise(path, t) ** 2


@LOSSES.register_module()
class LikelihoodWeighting(LevelWeighting):
    """What bounds the likelihood: SiT's ``likelihood`` (Song et al. 2021, arXiv:2101.09258).

    ``w / sigma^2`` on errors of the noise, where ``w = sigma sigma' - alpha' / alpha sigma^2``
    is half the squared diffusion of the path's own stochastic equation.
    """

    of = "noise"

    def weight(self, path: Path, t: Tensor) -> Tensor:
        return _velocity_of_noise(path, t) / path.coefficients(t.double())[1]

"""What the output of a network means.

At a fixed noisy ``x`` every prediction is affine in the data, so all of them are read off one
pair, (data, noise), and guidance may act on that pair whatever the network predicts.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mmsora.diffusion.level import Estimate, Level, expand
from mmsora.diffusion.part import build_part
from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = [
    "EDMPrediction",
    "LearnedRange",
    "NoisePrediction",
    "Prediction",
    "SamplePrediction",
    "ScorePrediction",
    "VPrediction",
    "VelocityPrediction",
]

_HALF = torch.tensor(0.5, dtype=torch.float64)


class Prediction(ABC):
    """The meaning of a network's output."""

    def check(self, path: Path) -> None:
        """Refuse a path on which this prediction cannot be read.

        Args:
            path: The path of the process.

        Raises:
            ValueError: The path reaches a level where the data cannot be recovered.
        """

    def scale_input(self, x: Tensor, level: Level) -> Tensor:
        """What the network sees at ``level``: ``x`` itself unless a prediction says otherwise."""
        return x

    def of_target(self, output: Tensor, level: Level) -> Tensor:
        """What is to equal the target: the output, unless more or something else is said."""
        return output

    def sensitivity(self, path: Path, t: Tensor) -> Tensor:
        """``|d target / d x0|`` at a fixed noisy ``x``, by which errors of the target and of the
        data differ.

        Args:
            path: The path.
            t: Times, (B,).

        Returns:
            float64 of shape (B,).
        """
        alpha, sigma = path.coefficients(t.double())
        # The target is linear in data and noise, and at a fixed x they trade at -alpha / sigma.
        return self.target(path, sigma, -alpha, Level(t, alpha, sigma)).abs() / sigma

    @abstractmethod
    def target(self, path: Path, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """What :meth:`of_target` ought to give, shaped like ``x0``; linear in data and noise."""

    @abstractmethod
    def estimate(self, path: Path, x: Tensor, output: Tensor, level: Level) -> Estimate:
        """Read data and noise off the network's output at ``x``."""


def _refuse_pure_noise(prediction: Prediction, path: Path) -> None:
    alpha, sigma = path.coefficients(torch.tensor(path.t_noise, dtype=torch.float64))
    if alpha < 1e-10 * sigma:
        cure = "let the path end earlier, as LinearPath(span=(0, 0.999))"
        if path.num_levels is not None:
            cure = "take a table without a level of pure noise (zero_terminal_snr=False)"
        raise ValueError(
            f"{type(prediction).__name__} cannot recover the data where alpha = 0, and "
            f"{type(path).__name__} starts there (t = {path.t_noise:g}); {cure}, or use "
            "SamplePrediction, VPrediction, VelocityPrediction or EDMPrediction"
        )


@SCHEDULERS.register_module()
class NoisePrediction(Prediction):
    """The network outputs the noise (DDPM, arXiv:2006.11239, equation 14)."""

    def check(self, path: Path) -> None:
        _refuse_pure_noise(self, path)

    def target(self, path: Path, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return noise

    def estimate(self, path: Path, x: Tensor, output: Tensor, level: Level) -> Estimate:
        return Estimate((x - level.sigma * output).div_(level.alpha), output)


@SCHEDULERS.register_module()
class ScorePrediction(Prediction):
    """The network outputs the score ``-noise / sigma`` (Song et al. 2021, arXiv:2011.13456).

    Its error is that of the noise, ``sigma score + noise``, as in SiT.
    """

    def check(self, path: Path) -> None:
        _refuse_pure_noise(self, path)

    def of_target(self, output: Tensor, level: Level) -> Tensor:
        return -level.sigma * output

    def target(self, path: Path, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return noise

    def estimate(self, path: Path, x: Tensor, output: Tensor, level: Level) -> Estimate:
        noise = self.of_target(output, level)
        return Estimate((x - level.sigma * noise) / level.alpha, noise)


@SCHEDULERS.register_module()
class SamplePrediction(Prediction):
    """The network outputs the data."""

    def target(self, path: Path, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return x0

    def estimate(self, path: Path, x: Tensor, output: Tensor, level: Level) -> Estimate:
        return Estimate(output, (x - level.alpha * output) / level.sigma)


@SCHEDULERS.register_module()
class EDMPrediction(Prediction):
    """EDM's preconditioning (Karras et al. 2022, arXiv:2206.00364, table 1), for any alpha.

    The network sees ``x / norm`` with ``norm^2 = sigma^2 + alpha^2 sigma_data^2``, and its output
    is added to what is known: ``x0 = (alpha sigma_data^2 / norm^2) x + (sigma sigma_data / norm)
    output``. Input and target then have variance 1 at every level, and EDM's loss is the
    unweighted error of the output.

    Args:
        sigma_data: Standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def scale_input(self, x: Tensor, level: Level) -> Tensor:
        return x / self._norm(level)

    def target(self, path: Path, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        # (x0 - c_skip x) / c_out for x = alpha x0 + sigma noise, where sigma may be 0.
        of_x0, of_noise = level.sigma / self.sigma_data, level.alpha * self.sigma_data
        return (of_x0 * x0 - of_noise * noise) / self._norm(level)

    def estimate(self, path: Path, x: Tensor, output: Tensor, level: Level) -> Estimate:
        norm, data = self._norm(level), level.alpha * self.sigma_data
        scaled, output = x / norm**2, output / norm
        return Estimate(
            self.sigma_data * (data * scaled + level.sigma * output),
            level.sigma * scaled - data * output,
        )

    def _norm(self, level: Level) -> Tensor:
        return (level.sigma**2 + (level.alpha * self.sigma_data) ** 2).sqrt()


@SCHEDULERS.register_module()
class VPrediction(Prediction):
    """``v = alpha noise - sigma x0`` (Salimans and Ho 2022, arXiv:2202.00512, section 4)."""

    def target(self, path: Path, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return level.alpha * noise - level.sigma * x0

    def estimate(self, path: Path, x: Tensor, output: Tensor, level: Level) -> Estimate:
        _, alpha, sigma = level
        norm = alpha**2 + sigma**2  # 1 on a variance-preserving path
        return Estimate((alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm)


@SCHEDULERS.register_module()
class VelocityPrediction(Prediction):
    """``dx/dt = alpha' x0 + sigma' noise`` (Lipman et al. 2022, arXiv:2210.02747).

    Args:
        sign: 1 for time that runs from data to noise, as here; -1 where a published network
            counts it from noise to data, as SiT does.
    """

    def __init__(self, sign: int = 1) -> None:
        if sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, got {sign}")
        self.sign = sign

    def check(self, path: Path) -> None:
        end = torch.tensor(path.t_noise, dtype=torch.float64)
        (alpha, sigma), (d_alpha, d_sigma) = path.coefficients(end), path.rates(end)
        if alpha * d_sigma == sigma * d_alpha:
            raise ValueError(
                f"VelocityPrediction cannot be read where {type(path).__name__} stands still, as "
                f"at its end (t = {path.t_noise:g}); use VPrediction"
            )

    def target(self, path: Path, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        d_alpha, d_sigma = self._rates(path, x0, level)
        return self.sign * (d_alpha * x0 + d_sigma * noise)

    def estimate(self, path: Path, x: Tensor, output: Tensor, level: Level) -> Estimate:
        _, alpha, sigma = level
        d_alpha, d_sigma = self._rates(path, x, level)
        velocity = self.sign * output
        # Cramer's rule for x = alpha x0 + sigma noise, v = alpha' x0 + sigma' noise.
        det = alpha * d_sigma - sigma * d_alpha
        return Estimate(
            (d_sigma * x - sigma * velocity) / det, (alpha * velocity - d_alpha * x) / det
        )

    @staticmethod
    def _rates(path: Path, like: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        d_alpha, d_sigma = path.rates(level.t)
        return expand(d_alpha, like), expand(d_sigma, like)


@SCHEDULERS.register_module()
class LearnedRange(Prediction):
    """Half of the output's channels say a mean, the others the variance of a step (iDDPM).

    The logarithm of the variance lies between those of the posterior and of the forward process,
    at ``(v + 1) / 2`` of the way (arXiv:2102.09672, equation 15).

    Args:
        mean: The meaning of the first half: a prediction or its config.
    """

    def __init__(self, mean: Prediction | dict) -> None:
        self.mean: Prediction = build_part(SCHEDULERS, "mean", mean, Prediction)

    def check(self, path: Path) -> None:
        self.mean.check(path)

    def scale_input(self, x: Tensor, level: Level) -> Tensor:
        return self.mean.scale_input(x, level)

    def of_target(self, output: Tensor, level: Level) -> Tensor:
        return self.mean.of_target(self.split(output)[0], level)

    def sensitivity(self, path: Path, t: Tensor) -> Tensor:
        return self.mean.sensitivity(path, t)

    @staticmethod
    def split(output: Tensor) -> tuple[Tensor, Tensor]:
        """The halves of an output.

        Args:
            output: (B, 2 C, ...).

        Returns:
            What is said of the mean and of the variance, each (B, C, ...).

        Raises:
            ValueError: The number of channels is odd.
        """
        if output.shape[1] % 2:
            raise ValueError(
                f"LearnedRange needs two output channels for each of the latent's, the network "
                f"gave {output.shape[1]}; set the denoiser's out_channels to twice in_channels"
            )
        mean, variance = output.chunk(2, dim=1)
        return mean, variance

    def target(self, path: Path, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return self.mean.target(path, x0, noise, level)

    def estimate(self, path: Path, x: Tensor, output: Tensor, level: Level) -> Estimate:
        mean, variance = self.split(output)
        estimate = self.mean.estimate(path, x, mean, level)
        return estimate._replace(log_var_mix=torch.add(_HALF, variance, alpha=0.5))

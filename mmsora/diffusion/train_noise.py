"""The noise that clean data are mixed with in training."""

from torch import Tensor

from mmsora.diffusion.level import RandomNumbers
from mmsora.registry import SCHEDULERS

__all__ = ["TrainNoise"]


@SCHEDULERS.register_module()
class TrainNoise:
    """Standard normal noise, with the published additions.

    Args:
        offset: Of a number that all positions of a channel share, so that a model learns to
            change the mean brightness: ``noise + offset n`` with n (B, C, 1, 1, 1) normal.
        perturbation: Of more noise that the network sees but is not told of: ``x`` is made with
            ``noise + perturbation n``, the target with ``noise`` (Ning et al. 2023,
            arXiv:2301.11706).
    """

    def __init__(self, offset: float = 0.0, perturbation: float = 0.0) -> None:
        for name, value in {"offset": offset, "perturbation": perturbation}.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.offset, self.perturbation = offset, perturbation

    def __call__(self, x0: Tensor, draws: RandomNumbers) -> tuple[Tensor, Tensor]:
        """Draw.

        Args:
            x0: Clean data, (B, C, T, H, W).
            draws: Where the noise comes from.

        Returns:
            The noise that the target is made of and the noise that ``x`` is made of, each shaped
            like ``x0``.
        """
        noise = draws.normal("noise", x0)
        if self.offset:
            noise = noise + self.offset * draws.normal("noise/offset", x0[:, :, :1, :1, :1])
        if not self.perturbation:
            return noise, noise
        return noise, noise + self.perturbation * draws.normal("noise/perturbation", x0)

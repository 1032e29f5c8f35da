"""The noise that clean data are mixed with in training."""

import math

from torch import Tensor
from torch.nn import functional as F

from mmsora.diffusion.level import RandomNumbers
from mmsora.diffusion.part import build_part
from mmsora.registry import SCHEDULERS

__all__ = ["PyramidNoise", "SharedNoise", "TrainNoise"]


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

    def numbers(self, draws: RandomNumbers) -> RandomNumbers:
        """What training and sampling draw from: the draws themselves, by default.

        Args:
            draws: A batch's random numbers.

        Returns:
            The same, or what makes others of them.
        """
        return draws


@SCHEDULERS.register_module()
class PyramidNoise(TrainNoise):
    """Noise of many scales, as StableCascade's stage B is trained with.

    To normal noise that of half the height and width is added ``decay`` times, of a quarter
    ``decay^2`` times and so on, where at least one side is at most ``largest``, down to the first
    with a side of 1; each enlarged to the nearest neighbours, the sum brought back to unit
    variance.

    Args:
        decay: Weight of a scale relative to the one above.
        largest: Height or width from which on noise is added.
    """

    def __init__(self, decay: float = 0.75, largest: int = 16) -> None:
        super().__init__()
        if decay < 0:
            raise ValueError(f"decay must not be negative, got {decay}")
        if largest < 1:
            raise ValueError(f"largest must be at least 1, got {largest}")
        self.decay, self.largest = decay, largest

    def __call__(self, x0: Tensor, draws: RandomNumbers) -> tuple[Tensor, Tensor]:
        noise = draws.normal("noise", x0)
        rows, columns, variance, scale = *x0.shape[-2:], 1.0, 0
        while min(rows, columns) > 1:
            rows, columns, scale = rows // 2, columns // 2, scale + 1
            if min(rows, columns) > self.largest:
                continue
            weight = self.decay**scale
            small = draws.normal(f"noise/scale {scale}", x0[..., :rows, :columns])
            large = F.interpolate(small.flatten(1, 2), x0.shape[-2:], mode="nearest")
            noise = noise + weight * large.view_as(x0)
            variance += weight**2
        noise = noise / math.sqrt(variance)
        return noise, noise


@SCHEDULERS.register_module()
class SharedNoise(TrainNoise):
    """Noise that the frames of a clip have in common, so that they do not flicker.

    ``sqrt(share) n + sqrt(1 - share) n_frame`` with n of the clip and n_frame of each frame (mixed
    noise, PYoCo, arXiv:2305.10474), wherever noise is drawn: in training, where sampling starts
    and in the steps of a solver that adds some.

    Args:
        share: Part of the variance that the frames share, from 0 to 1.
        noise: What is shared, or its config; plain noise by default.
    """

    def __init__(self, share: float = 1.0, noise: TrainNoise | dict | None = None) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, got {share}")
        self.share = share
        self.noise = build_part(SCHEDULERS, "noise", noise or TrainNoise(), TrainNoise)

    def __call__(self, x0: Tensor, draws: RandomNumbers) -> tuple[Tensor, Tensor]:
        return self.noise(x0, self.numbers(draws))

    def numbers(self, draws: RandomNumbers) -> RandomNumbers:
        return _OfClips(draws, self.share)


class _OfClips:
    """Random numbers of which the frames of a clip share a part."""

    def __init__(self, draws: RandomNumbers, share: float) -> None:
        self.uniform, self.stratified = draws.uniform, draws.stratified
        self._draws, self._share = draws, share

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal numbers shaped like ``like``; those that are no video are not shared."""
        if like.ndim != 5:
            return self._draws.normal(name, like)
        of_clip = self._draws.normal(f"{name}/clip", like[:, :, :1]).expand_as(like)
        if self._share == 1:
            return of_clip
        of_frames = self._draws.normal(name, like)
        return math.sqrt(self._share) * of_clip + math.sqrt(1 - self._share) * of_frames

"""Weightings that learn from the errors which they weigh."""

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from mmsora.diffusion.part import build_part
from mmsora.diffusion.path import Path
from mmsora.diffusion.prediction import Prediction
from mmsora.diffusion.weighting import Weighting, snr
from mmsora.registry import LOSSES

__all__ = ["Adaptive", "LearnedUncertainty"]


@LOSSES.register_module()
class Adaptive(Weighting, nn.Module):
    """Divides by what errors of this noise have been of late, so that all levels count alike.

    As Stable Cascade is trained: a running mean of the errors in buckets of the logarithm of the
    signal-to-noise ratio. It moves when gradients are computed, by the errors of all processes,
    and is saved with the model.

    Args:
        buckets: How many, the two beyond the span included.
        span: First and last logarithm that are told apart.
        decay: What a bucket keeps of its mean when it sees new errors.
        limits: Least and greatest weight.
    """

    means: Tensor

    def __init__(
        self,
        buckets: int = 300,
        span: tuple[float, float] = (-10.0, 10.0),
        decay: float = 0.99,
        limits: tuple[float, float] = (1e-7, 1e7),
    ) -> None:
        super().__init__()
        if buckets < 3:
            raise ValueError(f"buckets must be at least 3, got {buckets}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay, self.limits = decay, limits
        self.edges = torch.linspace(*span, buckets - 1, dtype=torch.float64)
        self.register_buffer("means", torch.ones(buckets))

    def __call__(self, path: Path, prediction: Prediction, t: Tensor, errors: Tensor) -> Tensor:
        bucket = torch.searchsorted(self.edges, snr(path, t).log())
        bucket = bucket.to(errors.device, non_blocking=True)
        weight = (1 / self.means[bucket]).clamp(*self.limits)
        if torch.is_grad_enabled():
            self._learn(bucket, errors.detach())
        return errors * weight

    def _learn(self, bucket: Tensor, errors: Tensor) -> None:
        """Each bucket moves once, towards the mean of its errors."""
        buckets = torch.arange(len(self.means), device=errors.device)
        inside = (bucket[:, None] == buckets) & errors.isfinite()[:, None]  # (B, buckets)
        sums = torch.stack([errors[:, None].where(inside, 0).sum(0), inside.float().sum(0)])
        all_reduce(sums)
        total, count = sums
        means = total / count.clamp_min(1)
        moved = self.decay * self.means + (1 - self.decay) * means
        self.means.copy_(torch.where(count > 0, moved, self.means))


@LOSSES.register_module()
class LearnedUncertainty(Weighting, nn.Module):
    """``errors / exp(u) + u``, ``u`` learned for each level: all levels count alike in the end.

    (Karras et al. 2023, arXiv:2312.02696, equations 14 and 15.) ``u`` is a linear function of
    Fourier features of ``log(sigma / alpha) / 4``, 0 to start with. It is trained with the model,
    and of no use afterwards.

    Args:
        weighting: Of the errors before: a weighting or its config; None takes them as they are,
            which is the paper's with EDMPrediction.
        features: How many.
    """

    def __init__(self, weighting: Weighting | dict | None = None, features: int = 128) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        self.weighting: Weighting | None = (
            None if weighting is None else build_part(LOSSES, "weighting", weighting, Weighting)
        )
        # Frequencies are normal and phases uniform, as in the paper, but evenly spread.
        place = torch.arange(features, dtype=torch.float64) + 0.5
        self.frequencies = torch.special.ndtri(place / features)
        self.phases = place * (5**0.5 - 1) / 2
        self.weight = nn.Parameter(torch.zeros(features))

    def __call__(self, path: Path, prediction: Prediction, t: Tensor, errors: Tensor) -> Tensor:
        if self.weighting is not None:
            errors = self.weighting(path, prediction, t, errors)
        uncertainty = self.uncertainty(path, t)
        return errors / uncertainty.exp() + uncertainty

    def uncertainty(self, path: Path, t: Tensor) -> Tensor:
        """``u``: the logarithm of the errors to be expected.

        Args:
            path: The path.
            t: Times, (B,).

        Returns:
            Shape (B,), where the parameters are.
        """
        clock = -snr(path, t).log().clamp(-40, 40) / 8
        angles = 2 * torch.pi * (clock[:, None] * self.frequencies + self.phases)
        features = (2**0.5 * angles.cos()).to(self.weight, non_blocking=True)
        return (features * self.weight).sum(1)

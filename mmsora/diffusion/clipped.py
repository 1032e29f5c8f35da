"""Data that are known to lie in a range."""

import math

from torch import Tensor

from mmsora.diffusion.guidance import Guidance, Opinions
from mmsora.diffusion.level import Estimate, Level, expand
from mmsora.diffusion.part import build_part
from mmsora.diffusion.solver import Denoise
from mmsora.registry import SCHEDULERS

__all__ = ["Clipped"]


@SCHEDULERS.register_module()
class Clipped(Guidance):
    """Keeps the estimated data in ``[-limit, limit]``, as pixels are; the noise follows.

    Args:
        guidance: What makes the estimate: a guidance or its config.
        limit: Largest absolute value of the data.
        percentile: Of each sample's absolute values, as 0.995: where it is above the limit, the
            sample is cut there and divided down to the limit, so that few values saturate (Imagen,
            Saharia et al. 2022, arXiv:2205.11487, dynamic thresholding). None cuts at the limit.
    """

    def __init__(
        self, guidance: Guidance | dict, limit: float = 1.0, percentile: float | None = None
    ) -> None:
        if limit <= 0:
            raise ValueError(f"limit must be positive, got {limit}")
        if percentile is not None and not 0 < percentile <= 1:
            raise ValueError(f"percentile must be above 0 and at most 1, got {percentile}")
        self.guidance: Guidance = build_part(SCHEDULERS, "guidance", guidance, Guidance)
        self.limit, self.percentile = limit, percentile
        self.second = self.guidance.second

    def __call__(self, opinions: Opinions) -> Denoise:
        denoise = self.guidance(opinions)

        def clipped(x: Tensor, level: Level) -> Estimate:
            estimate = denoise(x, level)
            if level.sigma.ndim == 0 and level.sigma == 0:
                return estimate  # there the data are what they are
            x0 = self._clip(estimate.x0)
            noise = (x - level.alpha * x0) / level.sigma
            # A gradient that has moved the data cannot be taken back any more.
            return Estimate(x0, noise, estimate.log_var_mix)

        return clipped

    def _clip(self, x0: Tensor) -> Tensor:
        if self.percentile is None:
            return x0.clamp(-self.limit, self.limit)
        ordered = x0.abs().flatten(1).sort(1).values
        place = self.percentile * (ordered.shape[1] - 1)
        below, above = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
        cut = below.lerp(above, place % 1).clamp_min(self.limit)
        bound = expand(cut, x0)
        return x0.clamp(-bound, bound) * (self.limit / bound)

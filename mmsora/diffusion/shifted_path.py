"""Time that lingers where there is more noise, by the size of the latents."""

import math
from collections.abc import Sequence

from torch import Tensor

from mmsora.diffusion.part import build_part
from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = ["ShiftedPath"]

Size = tuple[int, int, int]


@SCHEDULERS.register_module()
class ShiftedPath(Path):
    """Another path, where training and even steps see ``shift`` times as much noise.

    Larger latents survive more noise. Coefficients, clock and velocity are the other path's at
    each time; the time at a fraction of the way moves to where ``sigma / alpha`` is ``shift``
    times what it was. On the linear path that is ``t -> m t / (1 + (m - 1) t)``. Three rules:

    * no size: always ``shift``;
    * ``base_size``: ``shift * sqrt(n / n_base)`` for n positions (Stable Diffusion 3,
      arXiv:2403.03206, equation 23);
    * ``large_size`` too: its logarithm is linear in n, from ``shift`` at ``base_size`` to
      ``large_shift`` at ``large_size``. FLUX has ``exp(0.5)`` at (1, 32, 32) and ``exp(1.15)``
      at (1, 128, 128).

    Args:
        path: The other path or its config; its time is continuous.
        shift: At ``base_size``, or at any.
        base_size: Frames, height and width of latents.
        large_shift: The shift at ``large_size``.
        large_size: Frames, height and width of larger latents.
    """

    def __init__(
        self,
        path: Path | dict,
        shift: float = 1.0,
        base_size: Size | None = None,
        large_shift: float | None = None,
        large_size: Size | None = None,
    ) -> None:
        self.path: Path = build_part(SCHEDULERS, "path", path, Path)
        self.shift, self.base_size = shift, base_size
        self.large_shift, self.large_size = large_shift, large_size
        self._check()
        self.t_clean, self.t_noise = self.path.t_clean, self.path.t_noise
        self.prior_std = self.path.prior_std

    def _check(self) -> None:
        if self.path.num_levels is not None:
            raise ValueError(
                f"ShiftedPath moves times between the levels of {type(self.path).__name__}, where "
                "a table has none; use a path in continuous time, as LinearPath"
            )
        for name, shift in {"shift": self.shift, "large_shift": self.large_shift}.items():
            if shift is not None and shift <= 0:
                raise ValueError(f"{name} must be positive, got {shift}")
        if (self.large_shift is None) != (self.large_size is None):
            raise ValueError("large_shift and large_size go together; give both or neither")
        if self.large_size is not None:
            if self.base_size is None:
                raise ValueError("large_size needs a base_size, where the shift is `shift`")
            if math.prod(self.large_size) == math.prod(self.base_size):
                raise ValueError("large_size has as many positions as base_size; give another")

    def for_size(self, size: Sequence[int]) -> Path:
        if self.base_size is None:
            return self
        positions, base = math.prod(size), math.prod(self.base_size)
        if self.large_shift is None or self.large_size is None:
            return ShiftedPath(self.path, self.shift * math.sqrt(positions / base))
        share = (positions - base) / (math.prod(self.large_size) - base)
        return ShiftedPath(self.path, self.shift * (self.large_shift / self.shift) ** share)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.path.coefficients(t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.path.rates(t)

    def clock(self, t: Tensor) -> Tensor:
        return self.path.clock(t)

    def time_at(self, fraction: Tensor) -> Tensor:
        alpha, sigma = self.path.coefficients(self.path.time_at(fraction))
        return self.path.time_of(self.shift * sigma / alpha)

    def time_of(self, ratio: Tensor) -> Tensor:
        return self.path.time_of(ratio)

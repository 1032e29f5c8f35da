"""Tables of noise levels: DDPM, iDDPM and latent diffusion."""

import torch
from torch import Tensor

from mmsora.diffusion.betas import BETAS
from mmsora.diffusion.path import Path
from mmsora.registry import SCHEDULERS

__all__ = ["DiscretePath"]


@SCHEDULERS.register_module()
class DiscretePath(Path):
    """A table of noise levels, as of DDPM (Ho et al. 2020, arXiv:2006.11239, section 2).

    Times are the level's number, 0 to ``num_levels - 1``; below 0 is clean data. The network is
    told the number itself. Between two levels ``log(sigma / alpha)`` is linear, except before a
    level of pure noise, where there is nothing but that level.

    Args:
        betas: Name of the table: ``linear``, ``scaled_linear``, ``squaredcos_cap_v2``,
            ``sigmoid``, or one of iDDPM's legacy: ``quad``, ``const``, ``warmup10``,
            ``warmup50``, ``jsd``.
        num_levels: Length of the table.
        zero_terminal_snr: Shift and scale alpha so that the last level is pure noise (Lin et al.
            2023, arXiv:2305.08891, algorithm 1).
    """

    def __init__(
        self, betas: str = "linear", num_levels: int = 1000, zero_terminal_snr: bool = False
    ) -> None:
        alpha = (1 - self._table(betas, num_levels)).cumprod(0).sqrt()
        if zero_terminal_snr:
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        self._alpha = torch.cat([alpha.new_ones(1), alpha])
        self._sigma = (1 - self._alpha**2).sqrt()
        self._ratio = self._sigma / self._alpha
        self.num_levels: int = num_levels
        self.t_clean, self.t_noise = -1.0, num_levels - 1.0

    @staticmethod
    def _table(name: str, num_levels: int) -> Tensor:
        if name not in BETAS:
            raise ValueError(f"unknown table of betas {name!r}; there are {', '.join(BETAS)}")
        if num_levels < 2:
            raise ValueError(f"num_levels must be at least 2, got {num_levels}")
        betas = BETAS[name](num_levels)
        if betas[-1] > 1 or (betas[:-1] >= 1).any():
            raise ValueError(
                f"num_levels={num_levels} is too few for the betas {name!r}: they scale with "
                "1 / num_levels and reach 1; use more levels, as 1000"
            )
        return betas

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index, share = self._place(t)
        alpha, sigma = self._alpha[index], self._sigma[index]
        if share is None:
            return alpha, sigma
        above = (index + 1).clamp_max(self.num_levels)
        low, high = self._ratio[index].log(), self._ratio[above].log()
        log, between = low + share * (high - low), share > 0
        return (
            torch.where(between, torch.sigmoid(-2 * log).sqrt(), alpha),
            torch.where(between, torch.sigmoid(2 * log).sqrt(), sigma),
        )

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Differences from the level below, where a whole table takes one unit of time."""
        index, share = self._place(t)
        d_alpha, d_sigma = self._differences(index)
        if share is None:
            return d_alpha, d_sigma
        above = self._differences((index + 1).clamp_max(self.num_levels))
        return torch.lerp(d_alpha, above[0], share), torch.lerp(d_sigma, above[1], share)

    def time_at(self, fraction: Tensor) -> Tensor:
        return (fraction * self.num_levels).floor()

    def time_of(self, ratio: Tensor) -> Tensor:
        index = torch.searchsorted(self._ratio, ratio.contiguous(), right=True) - 1
        index = index.clamp(1, self.num_levels - 1)
        low, high = self._ratio[index].log(), self._ratio[index + 1].log()
        share = ((ratio.log() - low) / (high - low)).clamp(0, 1)
        share = torch.where(ratio.isinf(), 1.0, share)
        return torch.where(ratio > 0, index - 1 + share, self.t_clean)

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The table's row at or below a time, clean data being row 0; and how far it is to the
        next, or None where all times are levels.
        """
        row = t.long()
        if (row == t).all():
            return (row + 1).clamp_min(0), None
        row = t.double().clamp_min(-1).floor()
        return row.long() + 1, torch.where(t < 0, 0.0, t - row)

    def _differences(self, index: Tensor) -> tuple[Tensor, Tensor]:
        below = (index - 1).clamp_min(0)
        return (
            (self._alpha[index] - self._alpha[below]) * self.num_levels,
            (self._sigma[index] - self._sigma[below]) * self.num_levels,
        )

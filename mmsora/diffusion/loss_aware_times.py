"""Times that go by the losses found there."""

import torch
from mmengine.dist import all_gather
from torch import Tensor, nn

from mmsora.diffusion.path import Path
from mmsora.diffusion.times import Times
from mmsora.registry import SCHEDULERS

__all__ = ["LossSecondMomentTimes"]


@SCHEDULERS.register_module()
class LossSecondMomentTimes(Times, nn.Module):
    """Levels where the loss is large more often, and their losses count less by as much: the same
    loss on average, with less variance (iDDPM, arXiv:2102.09672, section 3.3).

    A level's probability goes by the root of its losses' mean square over the last few; all are
    alike until each has that many. Losses of all processes are remembered, and saved with the
    model. Drawing waits for the device once in an iteration.

    Args:
        num_levels: Length of the path's table.
        history: Losses that are remembered of each level.
        uniform: Share of the draws that goes to all levels alike.
    """

    losses: Tensor
    seen: Tensor

    def __init__(self, num_levels: int = 1000, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        if num_levels < 1 or history < 1:
            raise ValueError(
                f"num_levels and history must be positive, got {num_levels} and {history}"
            )
        if not 0 < uniform <= 1:
            raise ValueError(f"uniform must be in (0, 1], got {uniform}")
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(num_levels, history))
        self.register_buffer("seen", torch.zeros(num_levels, dtype=torch.long))

    def quantile(self, path: Path, fraction: Tensor) -> Tensor:
        if path.num_levels != len(self.seen):
            raise ValueError(
                f"LossSecondMomentTimes(num_levels={len(self.seen)}) does not fit a path with "
                f"num_levels={path.num_levels}; it needs a table of that length"
            )
        total = self.probabilities().cpu().cumsum(0)
        level = torch.searchsorted(total, fraction, right=True)
        return level.clamp_max(len(total) - 1).double()

    def probabilities(self) -> Tensor:
        """Of each level, float64 of shape (num_levels,)."""
        count, history = self.losses.shape
        roots = self.losses.double().square().mean(1).sqrt()
        shares = (1 - self.uniform) * roots / roots.sum() + self.uniform / count
        return torch.where((self.seen >= history).all(), shares, 1 / count)

    def weigh(self, t: Tensor, losses: Tensor) -> Tensor:
        levels = t.long().to(losses.device, non_blocking=True)
        weights = 1 / (len(self.seen) * self.probabilities()[levels])
        if torch.is_grad_enabled():
            finite = losses.detach().float().nan_to_num(0, 0, 0)  # else it would stay
            self._remember(*_of_all_processes(levels, finite))
        return losses * weights.to(losses)

    def _remember(self, levels: Tensor, losses: Tensor) -> None:
        """Put losses in the places of the oldest, (N,)."""
        count, history = self.losses.shape
        same = levels[:, None] == levels
        before, of_level = same.tril(-1).sum(1), same.sum(1)
        slot = levels * history + (self.seen[levels] + before) % history
        outlived = of_level - before > history  # by others of this very batch
        slot = torch.where(outlived, count * history, slot)
        places = torch.cat([self.losses.flatten(), self.losses.new_zeros(1)])
        places[slot] = losses
        self.losses.copy_(places[:-1].view(count, history))
        numbers = torch.arange(count, device=levels.device)
        self.seen.add_((levels[:, None] == numbers).sum(0))


def _of_all_processes(levels: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """In the order in which the samplers dealt the samples out."""
    levels = torch.stack(all_gather(levels.contiguous()), dim=1).flatten()
    return levels, torch.stack(all_gather(losses.contiguous()), dim=1).flatten()

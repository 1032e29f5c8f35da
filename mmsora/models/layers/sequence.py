"""Sequence parallel: the tokens of one sample on several processes.

Tokens (B, T, N, width) are dealt out along time while there is attention in space, and along space
while there is attention along time, with one all-to-all in between (DSP, arXiv:2403.10266).
Attention along the very axis that is dealt out is ``attend_together`` (Ulysses). Shares are equal,
the last ones filled up with zeros, which are cut off before anything looks along that axis.

Gradients of weights are of a process' own tokens. The last gather multiplies them by the number of
processes, so that their mean over all processes is the gradient of one process that does it all.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from mmsora.utils.process_groups import sequence_group

__all__ = ["SPACE", "TIME", "WHOLE", "Shards", "exchange"]

TIME, SPACE = 1, 2  # axes of the tokens (B, T, N, width)
ops = torch.ops._c10d_functional


@dataclass(frozen=True)
class Shards:
    """Where the tokens (B, T, N, width) of a sample are.

    Attributes:
        group: The processes that share them; None: all tokens are here.
        axis: They are dealt out along this, ``TIME`` or ``SPACE``.
        sizes: The whole ``T`` and ``N``.
    """

    group: ProcessGroup | None = None
    axis: int = TIME
    sizes: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, frames: int, tokens: int, training: bool) -> "Shards":
        """How the tokens of a sample are dealt out at first: ready for attention in space.

        Outside of training nothing is shared: one process may sample while the others wait.

        Args:
            frames: The whole T.
            tokens: The whole N.
            training: Whether all processes of the group call the network with the same samples.

        Returns:
            ``WHOLE`` where this process has a sample to itself.
        """
        group = sequence_group() if training else None
        return cls(group, TIME, (frames, tokens)).before(SPACE) if group else WHOLE

    def before(self, attention: int) -> "Shards":
        """Where tokens have to be for attention along an axis: dealt out along the other.

        Where there are fewer frames than processes, they stay dealt out along space, and attention
        in space is done together.
        """
        if self.group is None:
            return self
        has_frames = self.sizes[0] >= self.group.size()
        return replace(self, axis=TIME if attention == SPACE and has_frames else SPACE)

    def move(self, x: Tensor, to: "Shards") -> Tensor:
        """Tokens (B, T, N, width) that are dealt out like this to tokens dealt out like that."""
        if self.group is None or self.axis == to.axis:
            return x
        return exchange(x, self.axis, to.axis, self.sizes[self.axis - 1], self.group)

    def share(self, x: Tensor, axis: int, dim: int) -> Tensor:
        """This process' share of a tensor that all have.

        Args:
            x: Of any shape.
            axis: The tokens' axis that one of its axes goes with.
            dim: Which.

        Returns:
            ``x`` itself where that axis is not dealt out.
        """
        if self.group is None or self.axis != axis:
            return x
        return _share(x, dim, self.group)

    def told(self, condition: Tensor) -> Tensor:
        """What the tokens here are told, of a condition (B, width), or of each frame
        (B, T, width)."""
        return condition if condition.ndim == 2 else self.share(condition, TIME, 1)

    def gather(self, x: Tensor) -> Tensor:
        """The whole tokens (B, T, N, any) from each process' share, for a loss that is the same
        on all of them."""
        if self.group is None:
            return x
        return _Gather.apply(x, self.axis, self.sizes[self.axis - 1], self.group)


WHOLE = Shards()


def exchange(x: Tensor, gathered: int, split: int, length: int, group: ProcessGroup) -> Tensor:
    """From shares along one axis to shares along another: one all-to-all.

    Args:
        x: This process' share.
        gathered: The axis along which it is one.
        split: The axis along which the result is one, filled up with zeros.
        length: Of the whole ``gathered`` axis.
        group: The processes that have shares.

    Returns:
        As many axes as ``x``.
    """
    size = group.size()
    x = _filled(x, split, -(-x.shape[split] // size) * size)
    parts = x.unflatten(split, (size, -1)).movedim(split, 0)
    parts = _AllToAll.apply(parts, group)
    return parts.movedim(0, gathered).flatten(gathered, gathered + 1).narrow(gathered, 0, length)


def _filled(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x


def _share(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    dim %= x.ndim
    length = x.shape[dim]
    share = -(-length // group.size())
    start = min(group.rank() * share, length)
    return _filled(x.narrow(dim, start, min(share, length - start)), dim, share)


class _AllToAll(torch.autograd.Function):
    """Part i of this process becomes part (this process) of process i; so do gradients."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(gradient, ctx.group), None


def _all_to_all(parts: Tensor, group: ProcessGroup) -> Tensor:
    each = [1] * group.size()
    # What is not contiguous would be sent in the wrong order.
    return ops.wait_tensor(ops.all_to_all_single(parts.contiguous(), each, each, group.group_name))


class _Gather(torch.autograd.Function):
    """Shares to the whole; the whole gradient, which all have, to shares of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, length: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        shares = ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
        shares = ops.wait_tensor(shares).unflatten(0, (group.size(), -1))
        return shares.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, length)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        share = _share(gradient, ctx.dim, ctx.group)
        return share * ctx.group.size(), None, None, None

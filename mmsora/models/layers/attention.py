"""Attention: one module, over any axis, behind one dispatcher."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from mmsora.models.layers.linear import linear
from mmsora.models.layers.sequence import SPACE, WHOLE, Shards, exchange

__all__ = ["Attention", "attend", "attend_together"]

# On CPUs the fused kernel loses to plain matrix products in bfloat16, and where the gradients of
# short sequences are wanted.
CPU_FUSED_LENGTH = 64


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention by whichever implementation is fastest for the input.

    Args:
        q: Queries, (..., heads, tokens, head_dim).
        k: Keys, shaped like ``q``.
        v: Values, shaped like ``q``.

    Returns:
        Shaped like ``q``.
    """
    short = q.requires_grad and q.shape[-2] < CPU_FUSED_LENGTH
    if q.device.type == "cpu" and (q.dtype != torch.float32 or short):
        return _plain(q, k, v)
    # The fused kernels take four dimensions; given more, PyTorch falls back to plain ones.
    q4, k4, v4 = (x.flatten(0, -4) for x in (q, k, v))
    return F.scaled_dot_product_attention(q4, k4, v4).view(q.shape)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q3, k3, v3 = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    unused = q3.new_empty(())  # baddbmm scales within the product
    scores = torch.baddbmm(unused, q3, k3.mT, beta=0, alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(-1).to(v.dtype) @ v3).view(q.shape)


def attend_together(q: Tensor, k: Tensor, v: Tensor, length: int, group: ProcessGroup) -> Tensor:
    """Attention along an axis that is dealt out to processes (Ulysses, arXiv:2309.14509).

    Each does it for some heads. Those of all samples, and of all else that is batch, are dealt out
    as one, so that they need not divide among the processes.

    Args:
        q: Queries, (..., heads, tokens here, head_dim).
        k: Keys, shaped like ``q``.
        v: Values, shaped like ``q``.
        length: Of the whole sequence.
        group: The processes that have shares of it.

    Returns:
        Shaped like ``q``.
    """
    qkv = torch.stack([q, k, v], dim=-2).flatten(0, -4)  # (heads of all, tokens here, 3, head_dim)
    whole = exchange(qkv, 1, 0, length, group)
    out = attend(*whole[None].unbind(-2))[0]
    return exchange(out, 0, 1, len(qkv), group).view(q.shape)


class Attention(nn.Module):
    """Multi-head self-attention along one axis of the tokens; all other axes are batch.

    Args:
        width: Width of the tokens.
        heads: Number of heads.
        qkv_bias: Whether queries, keys and values have a bias.
    """

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}")
        self.heads = heads
        self.qkv = linear(width, 3 * width, bias=qkv_bias)
        self.proj = linear(width, width)

    def forward(self, x: Tensor, axis: int, shards: Shards = WHOLE) -> Tensor:
        """Attend.

        Args:
            x: Tokens, (B, T, N, width).
            axis: ``TIME`` to attend along time, ``SPACE`` within a frame.
            shards: What of them is here.

        Returns:
            Shaped like ``x``.
        """
        batch, frames, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, frames, tokens, 3, self.heads, width // self.heads)
        # Only the attention itself is folded: (B, the other axis, heads, this axis, head_dim).
        order = (3, 0, 1, 4, 2, 5) if axis == SPACE else (3, 0, 2, 4, 1, 5)
        q, k, v = qkv.permute(order).unbind(0)
        if shards.group is not None and shards.axis == axis:
            out = attend_together(q, k, v, shards.sizes[axis - 1], shards.group)
        else:
            out = attend(q, k, v)
        back = (0, 1, 3, 2, 4) if axis == SPACE else (0, 3, 1, 2, 4)
        return self.proj(out.permute(back).reshape(batch, frames, tokens, width))

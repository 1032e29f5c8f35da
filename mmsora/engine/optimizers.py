"""Optimizers of packages that not everyone has."""

from collections.abc import Iterable
from typing import Any

import torch

from mmsora.registry import OPTIMIZERS
from mmsora.utils.user_error import UserError

__all__ = ["AdamW8bit"]


@OPTIMIZERS.register_module()
def AdamW8bit(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    min_8bit_size: int = 4096,
) -> torch.optim.Optimizer:
    """AdamW whose state takes 2 bytes for each weight and not 8 (Dettmers et al. 2022,
    arXiv:2110.02861): that of bitsandbytes, ``optimizer=dict(type="AdamW8bit", lr=1e-4)``.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the averages of the gradient and of its square.
        eps: Added to the root of the latter.
        weight_decay: Share of the weights that each step takes away, times ``lr``.
        min_8bit_size: Smaller tensors keep a state of 32 bits.

    Returns:
        The optimizer.

    Raises:
        UserError: There is no GPU, or no bitsandbytes.
    """
    if not torch.cuda.is_available():
        raise UserError("AdamW8bit needs a GPU, and there is none; use AdamW")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"AdamW8bit needs bitsandbytes ({error}); pip install bitsandbytes, or use AdamW"
        ) from error
    return AdamW8bit(
        params,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        min_8bit_size=min_8bit_size,
    )

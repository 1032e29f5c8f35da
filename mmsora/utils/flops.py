"""Floating-point operations of what is run, on any device, the meta device as well."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

__all__ = ["FlopCounter"]


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention(*args)


# Backward through attention counts as twice the forward pass, as through any product: what fused
# kernels compute again for themselves counts nowhere, as is usual where utilisation is reported.
_OPS = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _OPS._scaled_dot_product_flash_attention_for_cpu: _attention,
    _OPS._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _OPS._scaled_dot_product_flash_attention_backward: _attention_backward,
    _OPS._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _OPS._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}


class FlopCounter(TorchDispatchMode):
    """Counts matrix products, convolutions and attention; a multiply-add is two operations.

    Torch's ``FlopCounterMode`` besides keeps tensors alive to tell modules apart, which what
    counts memory would see, and does not know the fused attention of CPUs.

    Attributes:
        total: The operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out

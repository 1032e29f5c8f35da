"""Bytes that a computation would hold on a GPU, found without one: by running it on meta."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["AsOnGPU", "LiveBytes", "num_bytes"]

ROUND = 512  # PyTorch's allocator gives a multiple of it

# What autocast runs in which precision, of CUDA's lists, by the names of functions.
IN_HALF = {
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "scaled_dot_product_attention",
}
IN_FLOAT = {
    *("layer_norm", "group_norm", "softmax", "log_softmax", "exp", "log", "pow", "__pow__"),
    *("rsqrt", "reciprocal", "sum", "prod", "cumsum", "norm", "cdist", "softplus"),
    *("mse_loss", "l1_loss", "smooth_l1_loss", "cosine_similarity"),
}
IN_WIDEST = {"addcmul", "addcdiv", "cross", "dot", "index_put", "scatter_add", "tensordot"}


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within it for as long as they live.

    Args:
        known: Tensors that are there before, and do not count.

    Attributes:
        live: Bytes now, without those of gradients.
        gradients: Bytes of what :meth:`watch` watches.
        peak: The most that ``live`` was.
        peak_total: The most that both were together.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.gradients = self.peak = self.peak_total = 0
        self._sizes: dict[int, int] = {}
        self._before = {t.untyped_storage()._cdata for t in known}

    @contextmanager
    def watch(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Within it, what becomes the gradient of one of these counts as such."""
        hooks = [p.register_post_accumulate_grad_hook(self._accumulated) for p in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        size = self._sizes.pop(parameter.grad.untyped_storage()._cdata, 0)
        self.live, self.gradients = self.live - size, self.gradients + size

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._made(leaf.untyped_storage())
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes or key in self._before:
            return
        self._sizes[key] = size = -(-storage.nbytes() // ROUND) * ROUND
        weakref.finalize(storage, self._died, key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_total = max(self.peak_total, self.live + self.gradients)

    def _died(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


class AsOnGPU(TorchFunctionMode):
    """On the meta device, computes as a GPU would: with autocast and with fused attention.

    The meta device knows neither.

    Args:
        dtype: What autocast computes in; None is float32 without autocast.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self._casts: dict[int, Tensor] | None = None

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Within it weights are cast once, and the casts kept to its end, as by autocast."""
        self._casts = {}
        try:
            with self:
                yield
        finally:
            self._casts = None

    def cover(self, module: nn.Module) -> None:
        """Have a module do so too when it is computed again for the backward pass.

        PyTorch steps out of modes like this one on its way into the backward pass.

        Args:
            module: What is recomputed; before it is told to.
        """
        module.forward = partial(self._again, module.forward)

    def _again(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if self._casts is not None:  # the forward pass
            return forward(*args, **kwargs)
        with self:
            return forward(*args, **kwargs)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        dtype = self._precision(name, args, kwargs)
        if dtype is not None:
            args, kwargs = tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _fused(*args, **kwargs)
        return func(*args, **kwargs)

    def _precision(self, name: str, args: Any, kwargs: Any) -> torch.dtype | None:
        if self.dtype is None:
            return None
        if name in IN_HALF:
            return self.dtype
        if name in IN_FLOAT:
            return torch.float32
        if name in IN_WIDEST:
            given = [x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            return max((d for d in given if d.is_floating_point), key=lambda d: d.itemsize)
        return None

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value.dtype in (dtype, torch.float64):
            return value
        if self._casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(dtype)
        return self._casts[id(value)]


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention that keeps inputs, output and a number for each row, as every fused kernel."""
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, attn_mask, grad, dropout_p, is_causal, scale=scale)[0]

"""One optimizer step, in any precision, on any device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from mmsora.registry import OPTIM_WRAPPERS

__all__ = ["AutocastOptimWrapper"]

DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MEASURE = {"max_norm": float("inf")}  # clips nothing, returns the norm


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """MMEngine's wrapper with autocast on CPU and GPU, and the gradient norm always logged.

    Args:
        optimizer: The optimizer.
        precision: ``off`` for float32, ``bf16``, or ``fp16`` with a gradient scaler.
        accumulative_counts: Micro-batches an update is made of.
        clip_grad: Arguments of ``torch.nn.utils.clip_grad_norm_``; None measures the norm only.
        clip_from: Updates before the first that is clipped; until then the norm is measured only.
    """

    clip_grad_kwargs: dict

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        precision: str = "off",
        accumulative_counts: int = 1,
        clip_grad: dict | None = None,
        clip_from: int = 0,
    ) -> None:
        if precision not in DTYPES:
            raise ValueError(f"precision must be one of {', '.join(DTYPES)}; got {precision!r}")
        super().__init__(
            optimizer=optimizer,
            accumulative_counts=accumulative_counts,
            clip_grad=clip_grad or dict(MEASURE),
        )
        self.clip_from = clip_from
        self._clip: dict = self.clip_grad_kwargs
        self.precision = precision
        self._device = optimizer.param_groups[0]["params"][0].device.type
        self.scaler = torch.amp.GradScaler(self._device, enabled=precision == "fp16")

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of a forward pass, for training and sampling alike."""
        dtype = DTYPES[self.precision]
        with torch.autocast(self._device, dtype=dtype, enabled=dtype is not None):
            yield

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, and no gradient synchronisation but before an update."""
        with super().optim_context(model), self.autocast():
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Backpropagate the (scaled) loss."""
        self.scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        """Unscale, measure and clip the gradients, and update."""
        self.scaler.unscale_(self.optimizer)
        updates = self._inner_count // self._accumulative_counts
        self.clip_grad_kwargs = self._clip if updates > self.clip_from else MEASURE
        self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and, in fp16, the scaler's."""
        state = super().state_dict()
        if self.scaler.is_enabled():
            state["loss_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave, saved in this or another precision."""
        state = dict(state_dict)
        scaler = state.pop("loss_scaler", None)
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        super().load_state_dict(state)

"""One optimizer step, in any precision, on any device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmsora.engine.guard import UpdateGuard, Verdict
from mmsora.engine.parallel.gradients import (
    AgreedScaler,
    average_gradients,
    clip_to_norm,
    clip_to_value,
    gradient_norm,
)
from mmsora.registry import OPTIM_WRAPPERS
from mmsora.utils.values import check_number, check_whole

__all__ = ["AutocastOptimWrapper"]

DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CLIPS = {"norm": {"max_norm", "norm_type"}, "value": {"clip_value"}}


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """MMEngine's wrapper with autocast on CPU and GPU, and the gradient norm always logged.

    Gradients may be sharded: norm, clipping and overflows are those of all processes together.

    Args:
        optimizer: The optimizer.
        precision: ``off`` for float32, ``bf16``, or ``fp16`` with a gradient scaler.
        accumulative_counts: Micro-batches an update is made of.
        clip_grad: ``dict(max_norm=1.0)``, with ``norm_type`` if it is not the 2-norm, or
            ``dict(type="value", clip_value=0.5)``; None measures the norm only.
        clip_from: Updates before the first that is clipped; until then the norm is measured only.
        guard: Arguments of ``UpdateGuard``, which says which updates are skipped.

    Attributes:
        stepped: Whether the last micro-batch ended in an update.
        averages: Whether to average, before an update, the gradients that are not sharded; where
            none are sharded, DistributedDataParallel does.
    """

    stepped: bool = False
    averages: bool = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        precision: str = "off",
        accumulative_counts: int = 1,
        clip_grad: dict | None = None,
        clip_from: int = 0,
        guard: dict | None = None,
    ) -> None:
        if precision not in DTYPES:
            raise ValueError(f"precision must be one of {', '.join(DTYPES)}; got {precision!r}")
        check_whole("accumulative_counts", accumulative_counts)
        check_whole("clip_from", clip_from, least=0)
        super().__init__(optimizer, accumulative_counts)
        self.clip_from = clip_from
        self._clip = _checked_clip(clip_grad or {})
        self.guard = UpdateGuard(**(guard or {}))
        self.precision = precision
        weight = optimizer.param_groups[0]["params"][0]
        is_sharded = isinstance(weight, DTensor)  # and perhaps in the memory of the host
        self._device = weight.device_mesh.device_type if is_sharded else weight.device.type
        self.scaler = AgreedScaler(self._device, enabled=precision == "fp16")

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
        self.guard.note(getattr(getattr(model, "module", model), "last_batch", None))

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """As MMEngine's, which warns of batch norms: of those that are trained."""
        parts = model.modules()
        trained = [m for m in parts if any(p.requires_grad for p in m.parameters(recurse=False))]
        super().initialize_count_status(nn.ModuleList(trained), init_counts, max_counts)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Backpropagate the (scaled) loss; from one that is not finite every gradient is NaN."""
        self.stepped = False
        loss = loss * (1 + (loss - loss).detach())  # times 1, or NaN
        self.scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        """Average, unscale, measure and clip the gradients; update unless the guard objects."""
        groups = self.optimizer.param_groups
        weights = [weight for group in groups for weight in group["params"]]
        if self.averages:
            average_gradients(w for w in weights if not isinstance(w, DTensor))
        self.scaler.unscale_(self.optimizer)
        total = gradient_norm(weights, self._clip.get("norm_type", 2.0))
        norm = float(total)
        self.message_hub.update_scalar("train/grad_norm", norm)
        if self._inner_count // self._accumulative_counts > self.clip_from:
            if "max_norm" in self._clip:
                clip_to_norm(weights, total, self._clip["max_norm"])
            elif "clip_value" in self._clip:
                clip_to_value(weights, self._clip["clip_value"])
        verdict = self.guard.verdict(norm, self.scaler.is_enabled())
        self.stepped = verdict is Verdict.STEP
        if self.stepped:
            self.scaler.step(self.optimizer, **kwargs)
        if self.guard.skipped:
            self.message_hub.update_scalar("train/skipped", self.guard.skipped)
        self.scaler.update(self.scaler.get_scale() if verdict is Verdict.SKIP else None)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, the guard's and, in fp16, the scaler's."""
        state = super().state_dict()
        state["guard"] = self.guard.state_dict()
        if self.scaler.is_enabled():
            state["loss_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave, saved in this or another precision."""
        state = dict(state_dict)
        if guard := state.pop("guard", None):
            self.guard.load_state_dict(guard)
        scaler = state.pop("loss_scaler", None)
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        super().load_state_dict(state)


def _checked_clip(clip_grad: dict[str, Any]) -> dict[str, Any]:
    """What limits the gradients, without its type."""
    limits = dict(clip_grad)
    kind = limits.pop("type", "norm")
    if kind not in CLIPS:
        raise ValueError(f"clip_grad.type must be norm or value, got {kind!r}")
    unknown = sorted(set(limits) - CLIPS[kind])
    if unknown or (limits and not limits.keys() & {"max_norm", "clip_value"}):
        known = " and ".join(sorted(CLIPS[kind]))
        raise ValueError(f"clip_grad of type {kind} takes {known}; got {', '.join(limits)}")
    for name, value in limits.items():
        check_number(f"clip_grad.{name}", value)
    return limits

"""An exponential moving average of the denoiser's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmsora.registry import HOOKS

__all__ = ["DenoiserEMAHook"]


@HOOKS.register_module()
class DenoiserEMAHook(Hook):
    """Averages the denoiser's trained parameters in float32; buffers and frozen parts stay out.

    ``ema = decay ema + (1 - decay) weights`` after each optimizer step.

    The average is saved as ``checkpoint["ema"]``, a state dict of the denoiser.

    Args:
        decay: Of the average.
        warmup: Keep ``decay`` at most ``(1 + n) / (10 + n)`` after ``n`` steps, so that a short
            run is not held at its start. The published DiT, SiT and Latte do not.
    """

    priority = "NORMAL"

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay, self.warmup = decay, warmup
        self.steps = 0
        self._restored: dict[str, Any] | None = None

    def before_train(self, runner: Runner) -> None:
        """Start from the weights as they are, or from what was resumed."""
        self._names, self._weights = [], []
        for name, weight in denoiser_of(runner).named_parameters():
            if weight.requires_grad:
                self._names.append(name)
                self._weights.append(weight)
        self._average = [weight.detach().float().clone() for weight in self._weights]
        if self._restored:
            self.steps = self._restored["ema_steps"]
            for average, name in zip(self._average, self._names, strict=True):
                average.copy_(self._restored["ema"][name])
            self._restored = None

    @torch.no_grad()
    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Update, once for each optimizer step."""
        if not _stepped(runner):
            return
        soft = (1 + self.steps) / (10 + self.steps)
        decay = min(self.decay, soft) if self.warmup else self.decay
        weights: list[Tensor] = [weight.detach() for weight in self._weights]
        if any(weight.dtype != torch.float32 for weight in weights):
            weights = [weight.float() for weight in weights]
        torch._foreach_lerp_(self._average, weights, 1 - decay)
        self.steps += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The denoiser carries the average; afterwards the weights are back, bit for bit."""
        with torch.no_grad():
            kept = [weight.detach().clone() for weight in self._weights]
            for weight, average in zip(self._weights, self._average, strict=True):
                weight.copy_(average)
            try:
                yield
            finally:
                for weight, old in zip(self._weights, kept, strict=True):
                    weight.copy_(old)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the average: the denoiser's state dict with the averaged parameters."""
        state = {k: v.detach().cpu() for k, v in denoiser_of(runner).state_dict().items()}
        for name, average in zip(self._names, self._average, strict=True):
            state[name] = average.cpu()
        checkpoint["ema"], checkpoint["ema_steps"] = state, self.steps

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember the average when a run is resumed; a run that only loads starts its own."""
        if runner._resume and "ema" in checkpoint:
            self._restored = {"ema": checkpoint["ema"], "ema_steps": checkpoint["ema_steps"]}


def _stepped(runner: Runner) -> bool:
    """Whether this iteration ended in an optimizer step."""
    accumulate = runner.optim_wrapper._accumulative_counts
    return (runner.iter + 1) % accumulate == 0 or runner.iter + 1 == runner.max_iters


def denoiser_of(runner: Runner) -> nn.Module:
    """The denoiser of a runner's model, wrapped or not."""
    return model_of(runner).denoiser


def model_of(runner: Runner) -> Any:
    """A runner's model without its wrapper."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model

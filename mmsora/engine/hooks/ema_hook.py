"""Averages of the denoiser's weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmsora.engine.ema import ConstantEMA, Profile, WarmupEMA
from mmsora.engine.ema_snapshots import Snapshot, set_aside, snapshot_path, write_snapshot
from mmsora.registry import HOOKS, TASK_UTILS
from mmsora.utils.config_check import config_dict
from mmsora.utils.shards import local_part, sharded_as, whole
from mmsora.utils.user_error import UserError

__all__ = ["DenoiserEMAHook"]

DTYPES = {"float32": torch.float32, "float16": torch.float16}


@HOOKS.register_module()
class DenoiserEMAHook(Hook):
    """Averages the denoiser's trained parameters in float32; buffers and frozen parts stay out.

    ``ema = decay ema + (1 - decay) weights`` after each optimizer step.

    The average is saved as ``checkpoint["ema"]``, a state dict of the denoiser; it is the one
    that is sampled. Those of further profiles are kept beside it, and at every
    ``snapshot_interval`` steps written to ``ema_snapshots/`` in the run's directory, where
    ``tools/posthoc_ema.py`` makes averages of other profiles from them.

    Args:
        decay: Of the average.
        warmup: Keep ``decay`` at most ``(1 + n) / (10 + n)`` after ``n`` steps, so that a short
            run is not held at its start. The published DiT, SiT and Latte do not.
        profiles: Of further averages, or their configs, e.g. ``dict(type=PowerEMA,
            sigma_rel=0.05)``; each takes the memory of the weights in float32.
        snapshot_interval: Optimizer steps between snapshots of these; the end of training
            is one too. None writes none.
        snapshot_dtype: ``float32``, or ``float16`` for half the disk.
    """

    priority = "NORMAL"

    def __init__(
        self,
        decay: float = 0.9999,
        warmup: bool = True,
        profiles: Sequence[Profile | dict] = (),
        snapshot_interval: int | None = None,
        snapshot_dtype: str = "float32",
    ) -> None:
        built = [TASK_UTILS.build(p) if isinstance(p, dict) else p for p in profiles]
        self.profiles = [WarmupEMA(decay) if warmup else ConstantEMA(decay), *built]
        for profile in built:
            if not isinstance(profile, Profile):
                raise ValueError(
                    f"profiles: {profile!r} is neither a profile nor the config of one; lists of "
                    "dicts are for config files: profiles=[dict(type=PowerEMA, sigma_rel=0.1)]"
                )
        names = [str(profile) for profile in self.profiles]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"profiles: {twice[0]} is kept twice; remove one")
        if snapshot_interval is not None and snapshot_interval < 1:
            raise ValueError(f"snapshot_interval must be at least 1, got {snapshot_interval}")
        if snapshot_interval is not None and not profiles:
            raise ValueError(
                "snapshot_interval needs profiles, e.g. profiles=[dict(type='PowerEMA', "
                "sigma_rel=0.05), dict(type='PowerEMA', sigma_rel=0.1)]"
            )
        if snapshot_dtype not in DTYPES:
            raise ValueError(
                f"snapshot_dtype must be one of {', '.join(DTYPES)}; got {snapshot_dtype!r}"
            )
        self.snapshot_interval, self.snapshot_dtype = snapshot_interval, snapshot_dtype
        self.steps = 0
        self._resumed = False

    def before_train(self, runner: Runner) -> None:
        """Start from the weights as they are, or from what was resumed."""
        if not self._resumed:
            self._start(runner)
        if len(self.profiles) > 1:
            kept = "; ".join(map(str, self.profiles))
            runner.logger.info(f"averages of the weights: {kept}")
        if self.snapshot_interval and is_main_process():
            moved = set_aside(runner.work_dir, self.steps)
            if moved:
                runner.logger.warning(
                    f"{moved} EMA snapshots past step {self.steps} are of an earlier attempt; "
                    "moved to ema_snapshots/old"
                )

    def _start(self, runner: Runner) -> None:
        """Averages of nothing but the weights as they are."""
        trained = {k: v for k, v in denoiser_of(runner).named_parameters() if v.requires_grad}
        self._names, self._weights = list(trained), list(trained.values())
        self._averages = [
            [local_part(weight.detach()).float().clone() for weight in self._weights]
            for _ in self.profiles
        ]

    @torch.no_grad()
    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Update, once for each optimizer step."""
        if not runner.optim_wrapper.stepped:
            return
        self.steps += 1
        weights = [local_part(weight.detach()) for weight in self._weights]
        if any(weight.dtype != torch.float32 for weight in weights):
            weights = [weight.float() for weight in weights]
        for profile, average in zip(self.profiles, self._averages, strict=True):
            torch._foreach_lerp_(average, weights, 1 - profile.decay_at(self.steps))
        interval = self.snapshot_interval
        if interval and (self.steps % interval == 0 or self.is_last_train_iter(runner)):
            self._write_snapshot(runner)

    def _write_snapshot(self, runner: Runner) -> None:
        """All processes gather what is sharded, tensor by tensor; the first one writes."""
        dtype = DTYPES[self.snapshot_dtype]
        averages = [_gathered(state, dtype) for state in self._states()[1:]]
        state = denoiser_of(runner).state_dict()
        rest = _gathered({k: v for k, v in state.items() if k not in self._names})
        if is_main_process():
            path = snapshot_path(runner.work_dir, self.steps)
            snapshot = Snapshot(path, self.steps, self.profiles[1:], config_dict(runner.cfg))
            write_snapshot(snapshot, averages, rest)

    def _states(self) -> list[dict[str, Tensor]]:
        """The averages by the weights' names, sharded as these are."""
        return [
            {
                name: sharded_as(weight, average)
                for name, weight, average in zip(self._names, self._weights, each, strict=True)
            }
            for each in self._averages
        ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The denoiser carries the average; afterwards the weights are back, bit for bit."""
        with torch.no_grad():
            weights = [local_part(weight.detach()) for weight in self._weights]
            kept = [weight.clone() for weight in weights]
            for weight, average in zip(weights, self._averages[0], strict=True):
                weight.copy_(average)
            try:
                yield
            finally:
                for weight, old in zip(weights, kept, strict=True):
                    weight.copy_(old)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the averages: the first within the denoiser's state dict, others by profile."""
        first, *others = self._states()
        checkpoint["ema"] = denoiser_of(runner).state_dict() | first
        checkpoint["ema_steps"] = self.steps
        if others:
            names = map(str, self.profiles[1:])
            checkpoint["ema_profiles"] = dict(zip(names, others, strict=True))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Go on with the averages when a run is resumed; a run that only loads starts its own."""
        folder = getattr(runner, "resumed", None)
        if folder is None or "ema_steps" not in checkpoint:
            return
        self._start(runner)
        first, *others = self._states()
        names = [str(profile) for profile in self.profiles[1:]]
        for name in names:
            if f"ema_profiles/{name}/{self._names[0]}" not in folder.tensors:
                raise UserError(
                    f"DenoiserEMAHook.profiles: the checkpoint holds no average with {name}, and "
                    "one cannot begin in the middle of a run; remove it, or start a new run from "
                    "the checkpoint by load_from"
                )
        more = dict(zip(names, others, strict=True))
        folder.read_into({"ema": first, "ema_profiles": more})
        self.steps, self._resumed = checkpoint["ema_steps"], True


def _gathered(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process; the others only help to gather them."""
    found = {}
    for name, tensor in state.items():
        gathered = whole(tensor.to(dtype or tensor.dtype))
        if is_main_process():
            found[name] = gathered.cpu()
    return found


def denoiser_of(runner: Runner) -> nn.Module:
    """The denoiser of a runner's model, wrapped or not."""
    return model_of(runner).denoiser


def model_of(runner: Runner) -> Any:
    """A runner's model without its wrapper."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model

"""Speed, memory and waiting in the log."""

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmsora.engine.hooks.ema_hook import denoiser_of
from mmsora.registry import HOOKS

__all__ = ["MeanLossHook", "TelemetryHook", "peak_memory"]


def peak_memory() -> float:
    """Peak memory of this process in MiB: resident memory, whatever the device holds."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@HOOKS.register_module()
class TelemetryHook(Hook):
    """Adds ``samples/s``, ``tokens/s``, ``data_wait`` and, without a GPU, ``memory`` to the log.

    The rates are of all ranks together, over the last ``interval`` iterations. ``data_wait`` is
    the share of the time that was spent waiting for data.

    Args:
        interval: Iterations between figures; the logger's own interval is a good one.
    """

    priority = 55  # after IterTimerHook, before LoggerHook

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        """Measure the waiting where it happens: ``data_time`` also holds what hooks took."""
        self._tokens = getattr(denoiser_of(runner), "num_tokens", 0)
        loop = runner.train_loop
        self._data = _Timed(getattr(loop, "dataloader_iterator", iter(())))
        if hasattr(loop, "dataloader_iterator"):  # a loop by epochs has none to be measured
            loop.dataloader_iterator = self._data
        self._running = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Start the clock at the first batch, after those that a resumed run skips."""
        if not self._running:
            self._restart()
            self._running = True

    def _restart(self) -> None:
        self._samples, self._data.seconds, self._start = 0, 0.0, time.perf_counter()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Count, and report at the interval."""
        hub = runner.message_hub
        self._samples += len(data_batch["inputs"]) if data_batch else 0
        if not self.every_n_inner_iters(batch_idx, self.interval):
            return
        seconds = time.perf_counter() - self._start
        rate = self._samples * get_world_size() / seconds
        hub.update_scalar("train/samples/s", rate)
        hub.update_scalar("train/tokens/s", rate * self._tokens)
        hub.update_scalar("train/data_wait", self._data.seconds / seconds)
        if not torch.cuda.is_available():  # with a GPU the log processor reports its memory
            hub.update_scalar("train/memory", peak_memory())
        self._restart()


class _Timed(Iterator):
    """An iterator that counts the seconds of waiting for it."""

    def __init__(self, items: Iterator) -> None:
        self._items, self.seconds = items, 0.0

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - start


@HOOKS.register_module()
class MeanLossHook(Hook):
    """Logs the losses of the global batch: the mean over ranks, not the first rank's own."""

    priority = "HIGHEST"

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Average what RuntimeInfoHook is about to log."""
        if not outputs or get_world_size() == 1:
            return
        values = torch.stack([value.detach().float() for value in outputs.values()])
        all_reduce(values, "mean")
        outputs.update(zip(outputs, values.unbind(), strict=True))

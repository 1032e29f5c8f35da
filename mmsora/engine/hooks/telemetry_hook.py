"""Speed, memory and waiting in the log."""

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmsora.engine.denoiser_work import DenoiserWork
from mmsora.engine.hooks.ema_hook import model_of
from mmsora.registry import HOOKS
from mmsora.utils.gpus import gpu_named
from mmsora.utils.process_groups import data_info

__all__ = ["MeanLossHook", "TelemetryHook", "peak_memory"]


def peak_memory() -> float:
    """Peak memory of this process in MiB: resident memory, whatever the device holds."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@HOOKS.register_module()
class TelemetryHook(Hook):
    """Adds to the log, for the last ``interval`` iterations, without what hooks do between them,
    such as saving and sampling, and without validation:

    - ``samples/s`` and, of transformers, ``tokens/s``, of all processes together;
    - ``TFLOP/s``, of each process: the products of the denoiser, forward and backward as three
      times forward. What is computed again to save memory does not count;
    - ``mfu``, the share of what the GPU's vendor states, where that is known;
    - ``data_wait``, the share of the time that was spent waiting for data;
    - ``memory`` without a GPU, beside MMEngine's with one ``memory_reserved``: peaks, in MiB.

    Args:
        interval: Iterations between figures; the logger's own interval is a good one.
    """

    priority = 55  # after IterTimerHook, before LoggerHook

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        """Measure the waiting where it happens: ``data_time`` also holds what hooks took."""
        loop = runner.train_loop
        self._data = _Timed(getattr(loop, "dataloader_iterator", iter(())))
        if hasattr(loop, "dataloader_iterator"):  # a loop by epochs has none to be measured
            loop.dataloader_iterator = self._data
        denoiser, config = getattr(model_of(runner), "denoiser", None), runner.cfg.get("model", {})
        self._work: DenoiserWork | None = None
        if denoiser is not None and "denoiser" in config:
            self._work = DenoiserWork(denoiser, config["denoiser"])
        self._peak = _peak(runner)
        self._running = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Start the clock; at the first batch anew, after those that a resumed run skips."""
        if not self._running:
            self._restart()
            self._running = True
        self._start = time.perf_counter()

    def _restart(self) -> None:
        self._samples, self._data.seconds, self._seconds = 0, 0.0, 0.0
        if self._work is not None:
            self._work.clear()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Stop the clock, count, and report at the interval."""
        is_end = self.every_n_inner_iters(batch_idx, self.interval)
        if is_end and torch.cuda.is_available():
            torch.cuda.synchronize()  # the work that was asked for is of these iterations
        self._seconds += time.perf_counter() - self._start
        self._samples += len(data_batch["inputs"]) if data_batch else 0
        if not is_end:
            return
        figures = self._figures(self._seconds + self._data.seconds)
        for name, value in figures.items():
            runner.message_hub.update_scalar(f"train/{name}", value)
        self._restart()

    def after_train(self, runner: Runner) -> None:
        """Leave the denoiser alone."""
        if self._work is not None:
            self._work.close()

    def _figures(self, seconds: float) -> dict[str, float]:
        tokens, flop = (0.0, 0.0) if self._work is None else self._work.total()
        world = data_info()[1]
        figures = {"samples/s": self._samples * world / seconds}
        if tokens:
            figures["tokens/s"] = tokens * world / seconds
        figures["data_wait"] = self._data.seconds / seconds
        if flop:
            speed = flop * world / get_world_size() / seconds
            figures["TFLOP/s"] = speed / 1e12
            if self._peak:
                figures["mfu"] = speed / self._peak
        if torch.cuda.is_available():  # the log processor reports what is allocated
            figures["memory_reserved"] = torch.cuda.max_memory_reserved() / 2**20
        else:
            figures["memory"] = peak_memory()
        return figures


def _peak(runner: Runner) -> float | None:
    """What this process' GPU can do in the precision of the run, in FLOP a second."""
    gpu = gpu_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return gpu and gpu.peak(getattr(runner.optim_wrapper, "precision", "off"))


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

"""The loss by the time on the path."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmsora.diffusion.process import TrainedTimes
from mmsora.engine.hooks.ema_hook import model_of
from mmsora.registry import HOOKS

__all__ = ["TimeLossHook"]


@HOOKS.register_module()
class TimeLossHook(Hook):
    """Logs the loss in each part of the path from data to noise, ``loss/t_0.0-0.1`` and so on.

    Parts are even as ``Path.time_at`` counts: uniform times fall into all of them alike. A figure
    is the mean over the samples of all processes since the last one, by their weights; a part
    without any has none. Losses that are not finite are left out.

    Args:
        interval: Iterations between figures.
        buckets: Number of parts.
    """

    priority = "LOW"  # after the losses are logged

    def __init__(self, interval: int = 100, buckets: int = 10) -> None:
        if interval < 1 or buckets < 1:
            raise ValueError(
                f"interval and buckets must be positive, got {interval} and {buckets}"
            )
        self.interval, self.buckets = interval, buckets
        digits = 1 if 10 % buckets == 0 else 2
        ends = [f"{place / buckets:.{digits}f}" for place in range(buckets + 1)]
        self.names = [f"loss/t_{ends[i]}-{ends[i + 1]}" for i in range(buckets)]

    def before_train(self, runner: Runner) -> None:
        """Start from nothing."""
        self._sums: Tensor | None = None  # of weighted losses and of weights, (2, buckets)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Add up where the losses are; talk to the host and to other processes at the interval."""
        model = model_of(runner)
        times = getattr(getattr(model, "diffusion", None), "last_times", None)
        if times is None:  # a model without diffusion
            return
        batch = getattr(model, "last_batch", None)
        samples = batch.samples if batch else ()
        self._add(times, [sample.get("weight", 1.0) for sample in samples])
        if self.every_n_train_iters(runner, self.interval):
            self._report(runner)

    def _add(self, times: TrainedTimes, weights: Sequence[float]) -> None:
        losses = times.losses
        place = torch.linspace(0, 1, self.buckets + 1, dtype=torch.float64)[1:-1]
        bucket = torch.bucketize(times.t.double(), times.path.time_at(place), right=True)
        share = (bucket[:, None] == torch.arange(self.buckets)).double()
        if weights:
            share *= torch.tensor(weights, dtype=torch.float64)[:, None]
        share = share.to(losses.device, non_blocking=True) * losses.isfinite()[:, None]
        losses = losses.double().nan_to_num(0, 0, 0)
        sums = torch.stack([losses @ share, share.sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums

    def _report(self, runner: Runner) -> None:
        if self._sums is None:
            return
        all_reduce(self._sums)  # processes that share a sample count it alike, above and below
        totals, counts = self._sums.tolist()
        self._sums = None
        means = {
            name: total / count
            for name, total, count in zip(self.names, totals, counts, strict=True)
            if count
        }
        if means:
            line = " ".join(f"{means[name]:.4f}" if name in means else "-" for name in self.names)
            runner.logger.info(f"loss by time, from data to noise: {line}")
            step = runner.iter + 1
            runner.visualizer.add_scalars(means | {"iter": step}, step=step)

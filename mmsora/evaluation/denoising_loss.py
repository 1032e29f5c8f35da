"""The loss on samples that are not trained on."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.evaluator import BaseMetric

from mmsora.registry import METRICS

__all__ = ["DenoisingLoss"]


@METRICS.register_module()
class DenoisingLoss(BaseMetric):
    """Means of the losses that ``DenoisingValLoop`` finds, over the path and at places on it.

    ``val/loss`` of the weights and ``val/loss_ema`` of their average, and ``val/loss_ema/t_0.45``
    at 0.45 of the way from data to noise. Each sample counts once and by its weight, whichever
    processes had it; sums are in float64 and in the order of the samples.
    """

    default_prefix = "val"

    def __init__(self) -> None:
        super().__init__(collect_device="gpu")  # by messages, not by files

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        self.results.extend(data_samples)

    def evaluate(self, size: int) -> dict:
        """Gather from all processes and compute.

        Args:
            size: Samples of the dataset. What processes have beyond is the same again.

        Returns:
            The means by name.
        """
        return super().evaluate(len(self.results) * get_world_size())

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """The means.

        Args:
            results: Of each sample ``index``, ``weight``, ``places`` and ``losses``.

        Returns:
            The means by name; nan where no sample counts.
        """
        by_index = {result["index"]: result for result in results}
        samples = [by_index[index] for index in sorted(by_index)]
        weights = torch.tensor([sample["weight"] for sample in samples], dtype=torch.float64)
        means = {}
        for name in samples[0]["losses"]:
            rows = torch.stack([sample["losses"][name] for sample in samples]).double()
            rows = rows.where(weights[:, None] > 0, 0)  # what does not count may not be finite
            curve = (rows * weights[:, None]).sum(0) / weights.sum()
            means[name] = float(curve.mean())
            for place, mean in zip(samples[0]["places"].tolist(), curve.tolist(), strict=True):
                means[f"{name}/t_{place:.4g}"] = mean
        return means

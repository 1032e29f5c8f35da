"""Training on cached latents does without the VAE, and only on those that its VAE made."""

import logging
from collections.abc import Iterator
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmsora.engine.hooks.ema_hook import model_of
from mmsora.registry import HOOKS

__all__ = ["LatentCacheHook"]


@HOOKS.register_module()
class LatentCacheHook(Hook):
    """Compares the VAE of a cache with the model's, and puts that one's weights aside.

    Datasets that give latents have ``latents_of``, what made them. Without such a dataset it does
    nothing.
    """

    def before_run(self, runner: Runner) -> None:
        """Before the model reads its weights.

        Args:
            runner: The runner.

        Raises:
            UserError: The cache is another VAE's.
        """
        model = model_of(runner)
        for dataset in _datasets(runner.train_dataloader.dataset):
            made_by = getattr(dataset, "latents_of", None)
            if made_by is None:
                continue
            if not made_by:
                print_log(
                    f"{dataset.data_root} does not say which VAE made it; it is not compared with "
                    "model.vae",
                    logger="current",
                    level=logging.WARNING,
                )
            model.train_on_latents(made_by)


def _datasets(dataset: Any) -> Iterator[Any]:
    """A dataset and those that it consists of."""
    yield dataset
    parts = [getattr(dataset, name, None) for name in ("dataset", "videos", "images")]
    for part in [*parts, *getattr(dataset, "datasets", ())]:
        if part is not None:
            yield from _datasets(part)

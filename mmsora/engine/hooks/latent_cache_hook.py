"""Training on a cache does without VAE and encoders, and only on what these made."""

import logging
from collections.abc import Iterator
from itertools import product
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmsora.engine.hooks.ema_hook import model_of
from mmsora.models.conditioners.looking import lookers
from mmsora.registry import HOOKS
from mmsora.utils.user_error import UserError

__all__ = ["LatentCacheHook"]


@HOOKS.register_module()
class LatentCacheHook(Hook):
    """Compares VAE and encoders of a cache with the model's, whose weights it puts aside.

    Datasets that give latents have ``latents_of``, what made them, those that give embeddings of
    texts ``texts_of``, and those that give what conditioners see in a clip ``seen_by``, by its
    name. Without such a dataset it does nothing.
    """

    def before_run(self, runner: Runner) -> None:
        """Before the model reads its weights.

        Args:
            runner: The runner.

        Raises:
            UserError: The cache is another VAE's or encoder's, or lacks what the model is told,
                or only one of training and validation has one.
        """
        model, caches = model_of(runner), _caches(runner.train_dataloader)
        if runner.val_loop is not None:
            more = _caches(runner.val_dataloader)
            if bool(more) != bool(caches):
                raise UserError(
                    "val_dataloader and train_dataloader are to give cached latents both, or "
                    "neither: while training goes without the VAE, nothing else can be encoded"
                )
            caches += more
        for dataset in caches:
            made_by = dataset.latents_of
            if not made_by:
                print_log(
                    f"{dataset.data_root} does not say which VAE made it; it is not compared with "
                    "model.vae",
                    logger="current",
                    level=logging.WARNING,
                )
            model.train_on_latents(made_by)
            _compare_sizes(dataset, model.denoiser)
        if getattr(model.conditioner, "takes_text", False):
            _put_text_encoder_aside(model.conditioner, caches)
        for looker, cache in product(lookers(model.conditioner), caches):
            if looker.field not in getattr(cache, "seen_by", ()):
                raise UserError(
                    f"{cache.data_root} has no {looker.field} of its clips, which the model is "
                    "told; extract them with this config"
                )
            looker.train_on_seen(cache.seen_by[looker.field])


def _compare_sizes(cache: Any, denoiser: Any) -> None:
    """Say so where training has another size than what is sampled."""
    sample = cache[0]
    frames, height, width = sample["inputs"].shape[2:]
    found = (frames - (sample["data_samples"].get("num_images") or 0), height, width)
    made_for = tuple(getattr(denoiser, "size", found))
    if found != made_for:
        print_log(
            f"{cache.data_root} has latents of {found} frames, rows and columns, trained on "
            f"as they are; model.denoiser.size, which is sampled, is {made_for}",
            logger="current",
            level=logging.WARNING,
        )


def _put_text_encoder_aside(conditioner: Any, caches: list[Any]) -> None:
    without = [cache for cache in caches if not getattr(cache, "texts_of", None)]
    if without and len(without) < len(caches):
        raise UserError(
            f"{without[0].data_root} has no embeddings of texts and other parts of the data have; "
            "extract it with this config's conditioner too"
        )
    for cache in caches if not without else ():
        conditioner.train_on_embeddings(cache.texts_of, cache.texts())


def _caches(loader: DataLoader) -> list[Any]:
    parts = _datasets(loader.dataset)
    return [part for part in parts if getattr(part, "latents_of", None) is not None]


def _datasets(dataset: Any) -> Iterator[Any]:
    """A dataset and those that it consists of."""
    yield dataset
    parts = [getattr(dataset, name, None) for name in ("dataset", "videos", "images")]
    for part in [*parts, *getattr(dataset, "datasets", ())]:
        if part is not None:
            yield from _datasets(part)

"""Datasets made of datasets: mixtures by weight, and images beside clips."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from mmsora.datasets.buckets import BucketIndex, shapes_of
from mmsora.registry import DATASETS
from mmsora.structures.video_sample import OF_IMAGES
from mmsora.utils.user_error import UserError

__all__ = ["JointImages", "Mixture"]


@DATASETS.register_module()
class Mixture:
    """Several datasets as one, each with a share of every epoch.

    An epoch has as many samples as the datasets together. A dataset whose share is more or less
    than its size is gone through again and again in an order of its own, so that each of its
    samples comes once before any comes twice. Which sample a number stands for is a function of
    (seed, number) alone, and numbers, from which noise derives, are the mixture's.

    Args:
        datasets: Datasets that count epochs, as those of files do, or dicts of them.
        weights: Their shares of the samples; by default their sizes.
        seed: Of the orders.
    """

    takes_epochs = True

    def __init__(
        self,
        datasets: Sequence[Any],
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        self.datasets = [_built(dataset) for dataset in datasets]
        sizes = [len(dataset) for dataset in self.datasets]
        shares = sizes if weights is None else list(weights)
        if not sizes or len(shares) != len(sizes) or min(shares) <= 0:
            raise ValueError(f"{len(sizes)} datasets need as many positive weights, got {weights}")
        self.seed, self.counts = seed, _shares(sum(sizes), shares)
        self._ends = np.cumsum(self.counts)
        classes = {tuple(d.metainfo["classes"]) for d in self.datasets if "classes" in d.metainfo}
        if len(classes) > 1:
            raise ValueError(
                "the datasets have different classes, so their labels mean different things; "
                "class_file gives them the same"
            )
        self.metainfo: dict[str, Any] = {"classes": classes.pop()} if classes else {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, idx: int) -> Any:
        which, number = self.locate(idx)
        data = self.datasets[which][_like(idx, number)]
        data["data_samples"].index = int(idx)
        return data

    def locate(self, idx: int) -> tuple[int, int]:
        """The dataset that a number of the mixture stands for, and the number in it.

        Args:
            idx: The number, epochs included.

        Returns:
            Both; the number in the dataset has its epochs included too.
        """
        if idx < 0:
            raise IndexError(f"samples are counted from 0, got {idx}")
        epoch, slot = divmod(int(idx), len(self))
        which = int(np.searchsorted(self._ends, slot, side="right"))
        count, size = self.counts[which], len(self.datasets[which])
        place = slot - int(self._ends[which]) + count
        if count % size:
            return which, _shuffled(epoch * count + place, size, self.seed + which)
        return which, epoch * count + place  # whole passes: a slot is the same file for ever

    @property
    def shapes(self) -> np.ndarray:
        """Frames, height and width of each sample, for buckets."""
        parts = []
        for which, (dataset, count) in enumerate(zip(self.datasets, self.counts, strict=True)):
            if count % len(dataset):
                raise UserError(
                    f"buckets need the weights of a mixture to give whole passes, and dataset "
                    f"{which} would give {count} samples of {len(dataset)}; leave weights out, "
                    "or name a dataset twice"
                )
            parts += [shapes_of(dataset)] * (count // len(dataset))
        return np.concatenate(parts)

    @property
    def num_skipped(self) -> int:
        """How many files have been skipped so far."""
        return sum(getattr(dataset, "num_skipped", 0) for dataset in self.datasets)


@DATASETS.register_module()
class JointImages:
    """Clips, each with independent images behind its last frame, as Latte trains on both.

    ``inputs`` becomes (C, T + num_images, H, W); the sample has ``num_images``, and
    ``image_labels`` or ``image_texts`` where images have them. Images are gone through in an
    order of their own, each once before any comes twice. An epoch is one of the clips; Latte
    counts by images.

    Args:
        videos: Dataset of clips, or a dict of one.
        images: Dataset of images of the clips' size, or a dict of one. The frames of the videos
            themselves are the same dataset with ``SampleFrames(num_frames=1)``.
        num_images: Images beside each clip.
        seed: Of the order of the images.
    """

    takes_epochs = True

    def __init__(self, videos: Any, images: Any, num_images: int = 8, seed: int = 0) -> None:
        if num_images < 1:
            raise ValueError(f"num_images must be 1 or more, got {num_images}")
        self.videos, self.images = _built(videos), _built(images)
        self.num_images, self.seed = num_images, seed
        self.metainfo = self.videos.metainfo

    def __len__(self) -> int:
        return len(self.videos)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, idx: int) -> Any:
        data = self.videos[idx]
        first = int(idx) * self.num_images
        items = [
            self.images[_like(idx, _shuffled(first + place, len(self.images), self.seed), 1)]
            for place in range(self.num_images)
        ]
        clip, sample = data["inputs"], data["data_samples"]
        size = (*clip.shape[:-3], 1, *clip.shape[-2:])
        for item in items:
            if item["inputs"].shape != size:
                raise UserError(
                    f"{item['data_samples'].path}: an image beside clips of shape "
                    f"{tuple(clip.shape)} must be {size}, got {tuple(item['inputs'].shape)}"
                )
        sample.num_images = self.num_images
        for key, theirs in OF_IMAGES.items():
            known = [item["data_samples"].get(key) for item in items]
            if all(value is not None for value in known):
                sample.set_field(known, theirs)
        return {**data, "inputs": torch.cat([clip, *(item["inputs"] for item in items)], dim=-3)}

    @property
    def num_skipped(self) -> int:
        """How many files have been skipped so far."""
        return sum(getattr(part, "num_skipped", 0) for part in (self.videos, self.images))


def _built(dataset: Any) -> Any:
    """A dataset that counts epochs, from its config where it is one."""
    built = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
    if not getattr(built, "takes_epochs", False):
        raise ValueError(f"{type(built).__name__} takes no indices beyond its length")
    return built


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """A total in parts by weight, each at least 1, what rounding leaves to the largest rests."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    parts = np.maximum(np.floor(exact), 1).astype(int)
    order = np.argsort(-(exact - parts), kind="stable")
    parts[order[: max(total - int(parts.sum()), 0)]] += 1
    return [int(part) for part in parts]


@lru_cache(maxsize=8)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def _shuffled(place: int, size: int, seed: int) -> int:
    """The number at a place of an endless sequence, epochs included, each shuffled."""
    epoch, number = divmod(place, size)
    return int(_order(size, seed, epoch)[number]) + epoch * size


def _like(idx: int, number: int, frames: int | None = None) -> int:
    """A number with the size that another one is wanted in, if it is."""
    if not isinstance(idx, BucketIndex):
        return number
    return BucketIndex(number, (frames or idx.size[0], *idx.size[1:]))

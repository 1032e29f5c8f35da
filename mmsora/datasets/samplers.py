"""The order in which a run goes through its data."""

from collections.abc import Iterator, Sized
from itertools import count, islice

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from mmsora.registry import DATA_SAMPLERS

__all__ = ["EpochSampler"]


@DATA_SAMPLERS.register_module()
class EpochSampler(Sampler):
    """Goes through the data again and again, and tells the dataset in which epoch it is.

    Yields ``index + epoch * len(dataset)`` without end. In each epoch every index comes once,
    in an order that is a function of (seed, epoch); the processes take turns. So random choices
    differ from epoch to epoch with no state that a resumed run would lack.

    Args:
        dataset: One that takes such indices, as datasets of files do.
        shuffle: Whether each epoch has an order of its own.
        seed: Of the orders; by default a random one that all processes agree on. The Runner
            gives the run's.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None) -> None:
        if not getattr(dataset, "takes_epochs", False):
            raise ValueError(
                f"{type(dataset).__name__} takes no indices beyond its length; use InfiniteSampler"
            )
        self.rank, self.world_size = get_dist_info()
        self.size, self.shuffle = len(dataset), shuffle
        self.seed = sync_random_seed() if seed is None else seed

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return islice(self._of_all_processes(), self.rank, None, self.world_size)

    def _of_all_processes(self) -> Iterator[int]:
        for epoch in count():
            order = np.arange(self.size)
            if self.shuffle:
                np.random.default_rng((self.seed, epoch)).shuffle(order)
            yield from (order + epoch * self.size).tolist()

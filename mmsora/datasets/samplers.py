"""The order in which a run goes through its data."""

import logging
from collections.abc import Iterator, Sized
from itertools import count, islice
from typing import Any

import numpy as np
from mmengine.dist import sync_random_seed
from mmengine.logging import print_log
from torch.utils.data import Sampler

from mmsora.registry import DATA_SAMPLERS
from mmsora.utils.process_groups import data_info

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
        self.rank, self.world_size = data_info()
        self.dataset, self.size, self.shuffle = dataset, len(dataset), shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.start = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return islice(self._of_all_processes(), self.rank, None, self.world_size)

    def _of_all_processes(self) -> Iterator[int]:
        first, place = divmod(self.start, self.size)
        for epoch in count(first):
            order = np.arange(self.size)
            if self.shuffle:
                np.random.default_rng((self.seed, epoch)).shuffle(order)
            yield from (order[place:] + epoch * self.size).tolist()
            place = 0

    def state_dict(self, taken: int = 0) -> dict[str, Any]:
        """Where it is, in a few numbers.

        Args:
            taken: Samples that all processes have taken since iteration began. A loader fetches
                ahead, so the sampler cannot know.

        Returns:
            What ``load_state_dict`` takes, of plain types.
        """
        return {"start": self.start + taken, "seed": self.seed, "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start from where another sampler was, with as many processes or not.

        With data of another size the epoch starts anew.

        Args:
            state: What ``state_dict`` gave.
        """
        self.start, self.seed = state["start"], state["seed"]
        if state["size"] != self.size:
            epoch = self.start // state["size"]
            self.start = epoch * self.size
            print_log(
                f"the dataset had {state['size']} samples and has {self.size}; epoch {epoch} "
                "starts anew",
                logger="current",
                level=logging.WARNING,
            )

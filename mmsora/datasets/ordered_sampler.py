"""The order of validation."""

from collections.abc import Iterator, Sized

from torch.utils.data import Sampler

from mmsora.registry import DATA_SAMPLERS
from mmsora.utils.process_groups import data_info

__all__ = ["OrderedSampler"]


@DATA_SAMPLERS.register_module()
class OrderedSampler(Sampler):
    """Each sample once and in order; the processes take turns.

    Where the samples are no multiple of the processes, the first ones come again at the end, so
    that all processes have equally many.

    Args:
        dataset: What is gone through.
        seed: Unused: nothing is random.
    """

    def __init__(self, dataset: Sized, seed: int | None = None) -> None:
        self.rank, self.world_size = data_info()
        self.size = len(dataset)

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        last = len(self) * self.world_size
        return (place % self.size for place in range(self.rank, last, self.world_size))

"""Random numbers that depend on what they are for, and on nothing else.

Every number is a function of (seed, sample index, step, purpose). Neither the rank nor the
worker, the batch size or the order of calls can change it, so two processes with half the batch
each compute what one process computes, and a sample is the same alone or in a batch.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Draws"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): 64 bits in, 64 well mixed out."""
    with np.errstate(over="ignore"):
        z = z + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class Draws:
    """The random numbers of one batch at one step.

    Numbers are made on the CPU, hence equal on every device.

    Args:
        seed: The run's seed.
        indices: Global index of each sample of the batch.
        step: Training iteration; 0 when sampling.
        places: Place of each sample in the batch of all processes; by default there is one.
        total: Size of the batch of all processes.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        step: int = 0,
        places: Sequence[int] | None = None,
        total: int | None = None,
    ) -> None:
        base = _mix(np.asarray([seed % 2**63], dtype=np.uint64))
        of_step = np.asarray([step], dtype=np.uint64)
        self._shared = _mix(base ^ of_step)
        base = _mix(base ^ np.asarray(indices, dtype=np.int64).astype(np.uint64))
        self._base = _mix(base ^ of_step)
        self._places = np.arange(len(self)) if places is None else np.asarray(places)
        self._total = len(self) if total is None else total
        if self._places.shape != (len(self),) or self._places.max(initial=0) >= self._total:
            raise ValueError(
                f"{len(self)} samples need as many places below total = {self._total}, "
                f"got {places}"
            )

    def __len__(self) -> int:
        return len(self._base)

    def _keys(self, name: str) -> np.ndarray:
        return _mix(self._base ^ np.asarray([zlib.crc32(name.encode())], dtype=np.uint64))

    def uniform(self, name: str) -> Tensor:
        """One number in [0, 1) for each sample.

        Args:
            name: The purpose. Another name gives independent numbers.

        Returns:
            float64 tensor of shape (B,) on the CPU.
        """
        return torch.from_numpy((self._keys(name) >> np.uint64(11)) * 2.0**-53)

    def stratified(self, name: str) -> Tensor:
        """One number in [0, 1) for each sample, and one in each of ``total`` equal parts of it.

        Which part is a sample's changes from step to step. Here alone a number depends on a
        sample's place and on the size of the batch, but still not on the number of processes.

        Args:
            name: The purpose. Another name gives independent numbers.

        Returns:
            float64 tensor of shape (B,) on the CPU.
        """
        keys = _mix(self._shared ^ np.asarray([zlib.crc32(name.encode())], dtype=np.uint64))
        order = _mix(keys ^ np.arange(self._total, dtype=np.uint64)).argsort()
        parts = torch.from_numpy(order[self._places])
        return ((parts + self.uniform(name)) / self._total).clamp_max(1 - 2.0**-53)

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal numbers.

        Args:
            name: The purpose. Another name gives independent numbers.
            like: A tensor (B, ...) with the shape, dtype and device wanted.

        Returns:
            A tensor like ``like``.

        Raises:
            ValueError: The batch size of ``like`` is not that of the draws.
        """
        if len(like) != len(self):
            raise ValueError(f"draws are for {len(self)} samples, the tensor has {len(like)}")
        if like.device.type == "meta":
            return torch.empty_like(like)
        generator = torch.Generator()
        rows = torch.empty(like.shape, dtype=torch.float32)
        for row, key in zip(rows, self._keys(name).tolist(), strict=True):
            row.normal_(generator=generator.manual_seed(key >> 1))
        return rows.to(device=like.device, dtype=like.dtype, non_blocking=True)

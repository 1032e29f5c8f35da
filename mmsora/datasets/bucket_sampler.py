"""Batches of one size at a step, the same on every process, that stop and go on anywhere."""

import logging
import zlib
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
from mmengine.logging import print_log
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

from mmsora.datasets.buckets import BucketIndex, Buckets, shapes_of
from mmsora.registry import DATA_SAMPLERS, TASK_UTILS
from mmsora.utils.process_groups import data_info
from mmsora.utils.user_error import UserError

__all__ = ["BucketBatchSampler", "BucketPlan"]


class BucketPlan:
    """Which bucket comes at which step, and how far through its clips it is then.

    The clips of a bucket are a line without end: all of them once, in the order of epoch 0, then
    all of them once in that of epoch 1, and so on. A step takes the next ``batches[k]`` of the
    line of its bucket ``k``. Epoch ``e`` consists of all steps for which the lines have clips up
    to their epoch ``e``, shuffled. What is left of a line by then is less than a batch and comes
    in the epoch after, so no clip is lost or comes twice. All is a function of the arguments.

    Args:
        clips: Number of clips in each bucket.
        batches: How many of them a step takes, over all processes.
        seed: Of the orders.
        given: How many of each line came before ``start``.
        start: The step that the plan starts at.
    """

    def __init__(
        self,
        clips: ArrayLike,
        batches: ArrayLike,
        seed: int,
        given: ArrayLike | None = None,
        start: int = 0,
    ) -> None:
        self.clips, self.batches = np.asarray(clips), np.asarray(batches)
        self.given = np.zeros_like(self.clips) if given is None else np.asarray(given)
        self.seed, self.start = seed, start

    def steps(self, epoch: int) -> np.ndarray:
        """Steps of each bucket from the start of the plan to the start of an epoch."""
        return np.maximum(epoch * self.clips - self.given, 0) // self.batches

    def find(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the number of the step in it."""
        step -= self.start
        high = 1
        while self.steps(high).sum() <= step:
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.steps(middle).sum() > step else (middle, high)
        return low, step - int(self.steps(low).sum())

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The steps of an epoch.

        Args:
            epoch: Its number.

        Returns:
            For each step its bucket, and where in the line of that bucket the batch begins.
        """
        before = self.steps(epoch)
        counts = self.steps(epoch + 1) - before
        buckets = np.repeat(np.arange(len(counts)), counts)
        np.random.default_rng((self.seed, epoch, 0)).shuffle(buckets)
        turns = np.empty_like(buckets)  # how often its bucket came before, in this epoch
        turns[buckets.argsort(kind="stable")] = np.arange(len(buckets)) - np.repeat(
            counts.cumsum() - counts, counts
        )
        begins = self.given + before * self.batches
        return buckets, begins[buckets] + turns * self.batches[buckets]

    def given_at(self, step: int) -> np.ndarray:
        """How many of each line came before a step."""
        epoch, place = self.find(step)
        counts = np.bincount(self.epoch(epoch)[0][:place], minlength=len(self.clips))
        return self.given + (self.steps(epoch) + counts) * self.batches


@DATA_SAMPLERS.register_module()
class BucketBatchSampler(Sampler[list[int]]):
    """Batches of clips of one size: at each step the same size and number on every process.

    Takes the place of ``batch_sampler`` in a loader, without end. A batch of a bucket has as many
    clips as its budget pays for, so steps take about as long and as much memory whatever their
    size. Each clip comes exactly once in each epoch, save that what is left of a bucket, less
    than a batch of all processes, comes in the next (``BucketPlan``).

    The dataset counts epochs as for ``EpochSampler``, and gives its pipeline the bucket's size as
    ``bucket``: see ``BucketFrames`` and ``BucketCrop``.

    Args:
        sampler: Any sampler with ``dataset`` and ``seed``, which are taken from it.
        batch_size: Clips of the costliest bucket that a process takes at a step.
        buckets: ``Buckets``, or a dict of it.
        text_tokens: Tokens that the network puts beside those of the clip.
        width: Of the network. With it a clip costs what a transformer computes for it, n (1 + n /
            (6 width)) for n tokens; without, as many tokens as it has.
        budget: The cost of a step for one process, in place of ``batch_size``.
    """

    def __init__(
        self,
        sampler: Any,
        batch_size: int,
        buckets: Buckets | dict[str, Any],
        text_tokens: int = 0,
        width: int | None = None,
        budget: float | None = None,
    ) -> None:
        self.sampler, self.dataset = sampler, sampler.dataset
        if not getattr(self.dataset, "takes_epochs", False):
            raise ValueError(
                f"{type(self.dataset).__name__} takes no indices beyond its length, which "
                "BucketBatchSampler gives; use a dataset of files"
            )
        self.buckets = TASK_UTILS.build(buckets) if isinstance(buckets, dict) else buckets
        self.rank, self.world_size = data_info()
        bucket_of = self.buckets.assign(shapes_of(self.dataset)).astype(np.int32)
        self._members = _grouped(bucket_of, len(self.buckets.shapes))
        clips = np.array([len(members) for members in self._members])
        if not clips.sum():
            raise UserError(f"none of {len(bucket_of)} clips fits a bucket; see sizes of Buckets")
        self._list = zlib.crc32(bucket_of.tobytes())
        tokens = self.buckets.tokens + text_tokens
        self.costs = tokens * (1 + tokens / (6 * width)) if width else tokens.astype(float)
        self.batch_sizes = self._batch_sizes(budget or batch_size * self.costs.max(), clips)
        self._plan = BucketPlan(clips, self.batch_sizes * self.world_size, int(sampler.seed))
        self._step = 0
        left_out = len(bucket_of) - clips.sum()
        print_log(f"{self.describe()}\n  {left_out} clips left out", logger="current")

    def _batch_sizes(self, budget: float, clips: np.ndarray) -> np.ndarray:
        if budget < self.costs.max():
            size = "x".join(map(str, self.buckets.shapes[self.costs.argmax()]))
            raise ValueError(
                f"budget = {budget:g} does not pay for one clip of {size}, which costs "
                f"{self.costs.max():g}; raise it, or take that size out"
            )
        affordable = np.floor(budget / self.costs + 1e-9).astype(int)
        # A bucket with fewer clips than a step takes would give clips twice at one step.
        return np.minimum(affordable, clips // self.world_size).clip(min=1)

    def describe(self) -> str:
        """A line for each bucket that has clips: size, clips, and batch of a process."""
        rows = zip(self.buckets.shapes, self._plan.clips, self.batch_sizes, strict=True)
        lines = [
            f"  {frames} x {height} x {width}: {clips} clips, batch {size}"
            for (frames, height, width), clips, size in rows
            if clips
        ]
        return "\n".join(["buckets, frames x height x width:", *lines])

    def __len__(self) -> int:
        """Steps of the first epoch."""
        return max(int(self._plan.steps(1).sum()), 1)

    def __iter__(self) -> Iterator[list[int]]:
        first, place = self._plan.find(self._step)
        orders: dict[int, tuple[int, np.ndarray]] = {}
        for epoch in count(first):
            steps = (part[place:].tolist() for part in self._plan.epoch(epoch))
            for bucket, begin in zip(*steps, strict=True):
                yield self._batch(bucket, begin, orders)
            place = 0

    def _batch(
        self, bucket: int, begin: int, orders: dict[int, tuple[int, np.ndarray]]
    ) -> list[int]:
        """The clips of this process at a step."""
        members, end = self._members[bucket], begin + self._plan.batches[bucket]
        places = np.arange(begin + self.rank, end, self.world_size)
        epochs, places = np.divmod(places, len(members))
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            if orders.get(bucket, (-1,))[0] != epoch:
                generator = np.random.default_rng((self._plan.seed, epoch, bucket + 1))
                orders[bucket] = epoch, generator.permutation(members)
            now = epochs == epoch
            numbers[now] = orders[bucket][1][places[now]] + epoch * len(self.dataset)
        size = self.buckets.shapes[bucket]
        return [BucketIndex(number, size) for number in numbers.tolist()]

    def state_dict(self, taken: int = 0) -> dict[str, Any]:
        """Where it is, in a few numbers.

        Args:
            taken: Batches taken since iteration began. A loader fetches ahead, so the sampler
                cannot know.

        Returns:
            What ``load_state_dict`` takes, of plain types.
        """
        plan = self._plan
        return {
            "step": self._step + taken,
            "start": plan.start,
            "seed": plan.seed,
            "list": self._list,
            "clips": plan.clips.tolist(),
            "batches": plan.batches.tolist(),
            "given": plan.given.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start from where another sampler was, walking through nothing.

        With the same clips, budget and number of processes it goes on as the other would have.
        With another budget or number of processes each clip still comes exactly as often, in
        other batches. With other clips or buckets the epoch starts anew.

        Args:
            state: What ``state_dict`` gave.
        """
        names = ("clips", "batches", "seed", "given", "start")
        then = BucketPlan(**{name: state[name] for name in names})
        clips, batches, seed = self._plan.clips, self._plan.batches, then.seed
        self._step = state["step"]
        if state["list"] != self._list:
            epoch = then.find(self._step)[0]
            print_log(
                f"the clips or the buckets changed since; epoch {epoch} starts anew",
                logger="current",
                level=logging.WARNING,
            )
            self._plan = BucketPlan(clips, batches, seed, epoch * clips, self._step)
        elif state["batches"] != batches.tolist():
            self._plan = BucketPlan(clips, batches, seed, then.given_at(self._step), self._step)
        else:
            self._plan = then


def _grouped(bucket_of: np.ndarray, count: int) -> list[np.ndarray]:
    """The members of each bucket."""
    order = bucket_of.argsort(kind="stable")
    borders = np.searchsorted(bucket_of[order], np.arange(count + 1))
    return [order[i:j] for i, j in zip(borders[:-1], borders[1:], strict=True)]

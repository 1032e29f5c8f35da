"""Sizes that clips are trained in, and which of them a clip goes into."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmsora.registry import TASK_UTILS
from mmsora.utils.user_error import UserError

__all__ = ["BucketIndex", "Buckets", "shapes_of"]

KEYS = ("num_frames", "height", "width")
SHORT = ("raise", "skip", "loop")


class BucketIndex(int):
    """The number of a sample, epochs included, with the size that it is wanted in.

    Attributes:
        size: Frames, height and width.
    """

    size: tuple[int, int, int]

    def __new__(cls, number: int, size: tuple[int, int, int]) -> "BucketIndex":
        index = super().__new__(cls, number)
        index.size = size
        return index

    def __getnewargs__(self) -> tuple[int, tuple[int, int, int]]:  # type: ignore[override]
        return int(self), self.size


@TASK_UTILS.register_module()
class Buckets:
    """The sizes (frames, height, width) that clips are brought to, one bucket for each.

    A clip goes to the most pixels that it has: of the pairs in ``sizes`` with no more frames and
    no more area than the clip, to the one with the largest product. A clip smaller than all
    areas is enlarged to the smallest. Then to the aspect ratio nearest to its own.

    Args:
        sizes: Pairs of frames and side. A side stands for all aspect ratios: height times width
            is about its square.
        ratios: Long side over short side; each stands for both orientations.
        factor: Pixels that make one token along time, height and width: the VAE's factor times
            the patch. Heights and widths are multiples; frames are multiples, or one more, as
            VAEs with a first frame of its own need.
        stride: Distance of two frames of a clip, the same as in the pipeline.
        short: What to do with clips that have too few frames for every size: ``raise`` an error,
            ``skip`` them, or put them where the fewest are needed, for a pipeline that loops them
            (``loop``).
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        ratios: Sequence[float] = (1.0, 4 / 3, 16 / 9),
        factor: tuple[int, int, int] = (1, 16, 16),
        stride: int = 1,
        short: str = "raise",
    ) -> None:
        if short not in SHORT:
            raise ValueError(f"short must be one of {', '.join(SHORT)}, got {short!r}")
        if not len(sizes) or not len(ratios) or min(ratios) < 1:
            raise ValueError(
                "sizes are pairs such as (17, 256), ratios are long side over short side, "
                f"got {sizes} and {ratios}"
            )
        self.factor, self.stride, self.short = factor, stride, short
        self._sizes = sorted({(int(t), int(side)) for t, side in sizes})
        for frames, side in self._sizes:
            if frames < 1 or side < 1 or frames % factor[0] not in {0, 1 % factor[0]}:
                raise ValueError(
                    f"sizes: {frames} frames with side {side}; frames must be a multiple of "
                    f"{factor[0]}, or one more"
                )
        both = sorted({*ratios, *(1 / ratio for ratio in ratios)})
        self._planes = [self._plane(side, both) for _, side in self._sizes]
        self.shapes: list[tuple[int, int, int]] = [
            (frames, height, width)
            for (frames, _), plane in zip(self._sizes, self._planes, strict=True)
            for height, width in plane
        ]

    def _plane(self, side: int, ratios: Sequence[float]) -> list[tuple[int, int]]:
        """Heights and widths of a side, from upright to wide."""
        _, rows, columns = self.factor
        plane = {
            (
                max(round(side / ratio**0.5 / rows), 1) * rows,
                max(round(side * ratio**0.5 / columns), 1) * columns,
            )
            for ratio in ratios
        }
        return sorted(plane, key=lambda shape: shape[1] / shape[0])

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of a clip of each bucket, without text."""
        return np.prod(-(-np.array(self.shapes) // np.array(self.factor)), axis=1)

    def assign(self, shapes: np.ndarray) -> np.ndarray:
        """The bucket of each clip.

        Args:
            shapes: Frames, height and width of the clips, int (N, 3).

        Returns:
            Numbers of buckets, int (N,); -1 for clips that are left out.

        Raises:
            UserError: A clip has too few frames, and ``short`` is ``raise``.
        """
        frames, height, width = np.asarray(shapes, dtype=np.int64).reshape(-1, 3).T
        bad = np.flatnonzero((frames < 1) | (height < 1) | (width < 1))
        if len(bad):
            raise UserError(f"sample {bad[0]} of the list has the size {shapes[bad[0]]}")
        frames, least = (frames - 1) // self.stride + 1, self._sizes[0][0]
        few = np.flatnonzero(frames < least)
        if self.short == "raise" and len(few):
            raise UserError(
                f"{len(few)} of {len(frames)} clips have too few frames for every bucket, the "
                f"first is sample {few[0]}: {frames[few[0]]} with stride {self.stride}, "
                f"{least} are needed; add a smaller pair to sizes, or set short='skip' or 'loop'"
            )
        if self.short == "loop":
            frames = np.maximum(frames, least)
        chosen, ratio = self._choose(frames, height * width), np.log(width / height)
        found, first = np.full(len(frames), -1), 0
        for number, plane in enumerate(self._planes):
            members = np.flatnonzero(chosen == number)
            logs = np.log([columns / rows for rows, columns in plane])
            borders = (logs[1:] + logs[:-1]) / 2
            found[members] = first + np.searchsorted(borders, ratio[members])
            first += len(plane)
        return found

    def _choose(self, frames: np.ndarray, area: np.ndarray) -> np.ndarray:
        """The pair of ``sizes`` of each clip, -1 for those with too few frames."""
        chosen = np.full(len(frames), -1)
        pairs = list(enumerate(self._sizes))
        for number, (count, _) in sorted(pairs, key=lambda pair: (-pair[1][1], pair[1][0])):
            chosen[frames >= count] = number
        for number, (count, side) in sorted(
            pairs, key=lambda pair: (pair[1][0] * pair[1][1] ** 2, pair[1])
        ):
            chosen[(frames >= count) & (area >= side**2)] = number
        return chosen


def shapes_of(dataset: Any) -> np.ndarray:
    """Frames, height and width of each sample of a dataset, from its list: nothing is decoded.

    Args:
        dataset: One with an array ``shapes``, or of MMEngine's, with ``num_frames``, ``height``
            and ``width`` in its list.

    Returns:
        An int array (N, 3).

    Raises:
        UserError: The list does not have them.
    """
    if getattr(dataset, "shapes", None) is not None:
        return np.asarray(dataset.shapes)
    found = np.empty((len(dataset), 3), dtype=np.int64)
    for number in range(len(dataset)):
        info = dataset.get_data_info(number)
        try:
            found[number] = [int(info[key]) for key in KEYS]
        except (KeyError, TypeError, ValueError):
            held = ", ".join(f"{key}={info.get(key)!r}" for key in KEYS)
            raise UserError(
                f"{info.get('path', f'sample {number}')}: its entry in the list has {held}; "
                "buckets need all three as whole numbers"
            ) from None
    return found

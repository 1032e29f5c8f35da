"""What a run logged, as curves of bounded length."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Curve", "RunCurves"]

MOST_POINTS = 800
NOT_A_CURVE = ("step", "iter", "epoch", "base_lr")
CLOCKS = ("time", "data_time")  # lines of validation have these too, of another loop


class Curve:
    """A figure over the iterations. A long one is thinned: neighbours become their mean.

    Attributes:
        points: For each point its last step, the mean, the least and the greatest of what it
            stands for, and how many these are.
        last: The last value.
        broken: How many values were not finite; they are no points.
    """

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float, float, int]] = []
        self.last = math.nan
        self.broken = 0
        self._width = 1  # values in a point

    def add(self, step: int, value: float) -> None:
        """Add a value, steps ascending."""
        self.last = value
        if not math.isfinite(value):
            self.broken += 1
            return
        point = (step, value, value, value, 1)
        if self.points and self.points[-1][-1] < self._width:
            point = _merged(self.points.pop(), point)
        self.points.append(point)
        if len(self.points) > MOST_POINTS:
            pairs = [self.points[i : i + 2] for i in range(0, len(self.points), 2)]
            self.points = [_merged(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
            self._width *= 2

    def cut(self, step: int) -> None:
        """Forget what was at a step or after it."""
        while self.points and self.points[-1][0] >= step:
            self.points.pop()


def _merged(one: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[int, float, float, float, int]:
    count = one[4] + other[4]
    mean = one[1] + (other[1] - one[1]) * other[4] / count
    return other[0], mean, min(one[2], other[2]), max(one[3], other[3]), count


class RunCurves:
    """The curves of a run, from all ``*/vis_data/scalars.json`` of its directory.

    A run that was resumed has several; each goes on where it began, and what an earlier one had
    done beyond that is forgotten.

    Args:
        work_dir: Directory of the run.

    Attributes:
        curves: By name, in the order in which they came up.
        step: The last iteration.
    """

    def __init__(self, work_dir: str | Path) -> None:
        self.work_dir = Path(work_dir)
        self.curves: dict[str, Curve] = {}
        self.step = 0
        self._read: dict[Path, int] = {}  # bytes

    def update(self) -> None:
        """Read what was written since the last time."""
        for path in sorted(self.work_dir.glob("*/vis_data/scalars.json")):
            is_new = path not in self._read
            for line in self._new_lines(path):
                if is_new and "step" in line:
                    for curve in self.curves.values():
                        curve.cut(line["step"])
                    is_new = False
                self._add(line)

    def _new_lines(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            for line in file:
                if not line.endswith(b"\n"):  # half of one
                    break
                self._read[path] = self._read.get(path, 0) + len(line)
                try:
                    yield json.loads(line)
                except ValueError:  # left by a kill
                    continue

    def _add(self, line: dict[str, Any]) -> None:
        if "step" not in line:
            return
        self.step = int(line["step"])
        skipped = NOT_A_CURVE if "iter" in line else NOT_A_CURVE + CLOCKS
        for name, value in line.items():
            if name not in skipped and isinstance(value, int | float):
                self.curves.setdefault(name, Curve()).add(self.step, value)

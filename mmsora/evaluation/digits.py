"""The judge of moving-digit clips: reads them, and compares them with real ones.

It shares nothing with the model that it judges but the training clips.
"""

from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.svm import SVC

__all__ = ["ClipSource", "DigitJudge", "motion", "nearest_distances", "report"]

EQUAL = 0.99  # of the best window's sum; faint noise in the background must not decide
HELD_OUT = 500  # clips of the test split to compare with
MIN_ACCURACY = 0.90
MIN_ACCURACY_HELD_OUT = 0.95
SPEED_TOLERANCE = 0.30


class ClipSource(Protocol):
    """What the judge asks of a dataset; ``MovingDigits`` is one."""

    digit_size: int

    def __len__(self) -> int: ...

    def clip(self, index: int) -> tuple[np.ndarray, int]:
        """Frames (T, H, W) uint8 and the digit."""


class DigitJudge:
    """Reads the digit of a clip.

    A support vector machine, trained on crops located in real clips, reads every frame; the
    frames of a clip vote.

    Args:
        train: The training split.
        clips: How many of its clips to learn from, one frame of each.
    """

    def __init__(self, train: ClipSource, clips: int = 4000) -> None:
        self.digit_size = train.digit_size
        frames, labels = _draw(train, min(clips, len(train)))
        numbers = np.arange(len(frames))
        one_each = frames[numbers, numbers % frames.shape[1]]
        self._machine = SVC(C=10, break_ties=True).fit(self._locate(one_each), labels)

    def read(self, clips: np.ndarray) -> np.ndarray:
        """Read the digits.

        Args:
            clips: uint8 (N, T, H, W).

        Returns:
            Labels (N,), each the majority over the clip's frames; of labels with equally many
            frames, the one with the largest sum of decision values.
        """
        count, frames = _checked(clips).shape[:2]
        crops = self._locate(clips.reshape(-1, *clips.shape[2:]))
        decisions = self._machine.decision_function(crops).reshape(count, frames, -1)
        votes = np.eye(decisions.shape[-1])[decisions.argmax(-1)].sum(axis=1)
        leading = votes == votes.max(axis=-1, keepdims=True)
        winners = np.where(leading, decisions.sum(axis=1), -np.inf).argmax(axis=-1)
        return self._machine.classes_[winners]

    def _locate(self, frames: np.ndarray) -> np.ndarray:
        """The digit of each frame (N, H, W), as rows of pixels in [0, 1].

        It is where a window of the digit's size holds the largest sum. A digit with a black
        border fits several windows; the one about the frame's centre of mass is taken.
        """
        size = self.digit_size
        table = np.pad(frames.astype(np.int64).cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
        sums = table[:, size:, size:] - table[:, :-size, size:]
        sums += table[:, :-size, :-size] - table[:, size:, :-size]
        middles = [np.arange(length) + (size - 1) / 2 for length in sums.shape[1:]]
        rows, columns = _centres(frames).T[:, :, None, None]
        far = (middles[0][:, None] - rows) ** 2 + (middles[1] - columns) ** 2
        far[sums < EQUAL * sums.max(axis=(1, 2), keepdims=True)] = np.inf
        top, left = np.unravel_index(far.reshape(len(far), -1).argmin(axis=1), far.shape[1:])
        windows = sliding_window_view(frames, (size, size), axis=(1, 2))
        crops = windows[np.arange(len(frames)), top, left]
        return crops.reshape(len(frames), -1) / 255


def motion(clips: np.ndarray) -> float:
    """How far the centre of mass moves from frame to frame.

    Args:
        clips: uint8 (N, T, H, W).

    Returns:
        Pixels a frame, the mean over all clips; 0 for clips of one frame.
    """
    count, frames = _checked(clips).shape[:2]
    centres = _centres(clips.reshape(-1, *clips.shape[2:])).reshape(count, frames, 2)
    steps = np.linalg.norm(np.diff(centres, axis=1), axis=-1)
    return float(steps.mean()) if steps.size else 0.0


def nearest_distances(
    clips: np.ndarray, training_clips: np.ndarray, chunk: int = 1000
) -> np.ndarray:
    """How far each clip is from the nearest training clip.

    Args:
        clips: uint8 (N, T, H, W).
        training_clips: uint8 (M, T, H, W).
        chunk: Training clips compared at a time; bounds the memory.

    Returns:
        (N,) root mean square differences of pixels in [0, 1]. The search runs in single
        precision, the distance to what it finds is exact.
    """
    if _checked(clips).shape[1:] != _checked(training_clips).shape[1:]:
        raise ValueError(f"clips of {clips.shape[1:]} against {training_clips.shape[1:]}")
    queries = clips.reshape(len(clips), -1).astype(np.float32) / 255
    least = np.full(len(clips), np.inf, np.float32)
    nearest = np.zeros(len(clips), np.int64)
    for start in range(0, len(training_clips), chunk):
        block = training_clips[start : start + chunk]
        keys = block.reshape(len(block), -1).astype(np.float32) / 255
        squares = np.einsum("nd,nd->n", keys, keys) - 2 * queries @ keys.T
        candidates = squares.argmin(axis=1)
        values = squares[np.arange(len(clips)), candidates]
        nearest = np.where(values < least, start + candidates, nearest)
        least = np.minimum(values, least)
    differences = (clips.astype(np.float32) - training_clips[nearest]) / 255
    return np.sqrt(np.square(differences, dtype=np.float64).mean(axis=(1, 2, 3)))


def report(
    clips: np.ndarray, labels: np.ndarray, train: ClipSource, test: ClipSource
) -> dict[str, Any]:
    """Judge sampled clips against real ones.

    Args:
        clips: Sampled clips, uint8 (N, T, H, W).
        labels: The digits that were asked for, (N,).
        train: The training split; all of its clips are searched for the nearest.
        test: The held-out split.

    Returns:
        Figures and, under ``passed``, a verdict for each criterion; ready for JSON.
    """
    labels = np.asarray(labels)
    if _checked(clips).shape[:1] != labels.shape:
        raise ValueError(f"{len(clips)} clips, but labels are {labels.shape}")
    judge = DigitJudge(train)
    real, digits = _draw(test, min(HELD_OUT, len(test)))
    right, right_held_out = judge.read(clips) == labels, judge.read(real) == digits
    training_clips, _ = _draw(train, len(train))
    figures: dict[str, Any] = {
        "num_clips": len(clips),
        "num_held_out": len(real),
        "accuracy": float(right.mean()),
        "accuracy_held_out": float(right_held_out.mean()),
        "accuracy_per_digit": {
            str(k): float(right[labels == k].mean()) for k in np.unique(labels)
        },
        "speed": motion(clips),
        "speed_held_out": motion(real),
        "nearest_train": float(np.median(nearest_distances(clips, training_clips))),
        "nearest_train_held_out": float(np.median(nearest_distances(real, training_clips))),
    }
    speed, real_speed = figures["speed"], figures["speed_held_out"]
    figures["speed_ratio"] = speed / real_speed if real_speed else None
    figures["thresholds"] = {
        "accuracy": MIN_ACCURACY,
        "accuracy_held_out": MIN_ACCURACY_HELD_OUT,
        "speed_ratio": [1 - SPEED_TOLERANCE, 1 + SPEED_TOLERANCE],
        "nearest_train": figures["nearest_train_held_out"],
    }
    figures["passed"] = {
        "accuracy": figures["accuracy"] >= MIN_ACCURACY,
        "accuracy_held_out": figures["accuracy_held_out"] >= MIN_ACCURACY_HELD_OUT,
        "speed_ratio": abs(speed - real_speed) <= SPEED_TOLERANCE * real_speed,
        "nearest_train": figures["nearest_train"] >= figures["nearest_train_held_out"],
    }
    return figures


def _draw(source: ClipSource, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first clips of a dataset (N, T, H, W) and their digits (N,)."""
    clips, labels = zip(*(source.clip(index) for index in range(count)), strict=True)
    return np.stack(clips), np.array(labels)


def _checked(clips: np.ndarray) -> np.ndarray:
    """The clips, if they are any."""
    if clips.dtype != np.uint8 or clips.ndim != 4 or not clips.size:
        raise ValueError(f"clips must be uint8 (N, T, H, W), got {clips.dtype} {clips.shape}")
    return clips


def _centres(frames: np.ndarray) -> np.ndarray:
    """Centres of mass (N, 2), row and column, of frames (N, H, W); the middle of black ones."""
    height, width = frames.shape[1:]
    mass = frames.sum(axis=(1, 2), dtype=np.float64)
    rows = frames.sum(axis=2, dtype=np.float64) @ np.arange(height)
    columns = frames.sum(axis=1, dtype=np.float64) @ np.arange(width)
    middle = np.broadcast_to([(height - 1) / 2, (width - 1) / 2], (len(frames), 2))
    moments = np.stack([rows, columns], axis=1)
    return np.divide(moments, mass[:, None], out=middle.copy(), where=mass[:, None] > 0)

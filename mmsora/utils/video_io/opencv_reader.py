"""Videos by OpenCV, from the start each time: it seeks to the wrong frame in many films."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import cv2
import numpy as np

from mmsora.utils.video_io.media import Frames, Index, Media, MediaError, VideoInfo

__all__ = ["frames", "scan"]

ADVICE = "PyAV may: pip install av"


def scan(media: Media) -> Index:
    """Find the frames, by decoding them; what the header claims is often wrong."""
    times: list[float] = []
    first, moves = None, False
    with _opened(media) as capture:
        while capture.grab():
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC))
            if not moves:  # OpenCV 5 fails at interlaced films and gives what its memory held
                pixels = _pixels(media, capture, len(times) - 1)
                first = pixels if first is None else first
                moves = not np.array_equal(first, pixels)
        claimed = capture.get(cv2.CAP_PROP_FPS)
    if first is None:
        raise MediaError(media.path, f"OpenCV can decode no frame; {ADVICE}")
    if len(times) > 1 and not moves:
        raise MediaError(media.path, f"OpenCV gives the same picture for all frames; {ADVICE}")
    count, span = len(times), times[-1] - times[0]
    rate = 1000 * (count - 1) / span if span > 0 else max(claimed, 0) or 1.0
    return Index(VideoInfo(count, rate, first.shape[0], first.shape[1], count / rate))


def frames(media: Media, index: Index, numbers: list[int]) -> Iterable[Frames]:
    """One way: all frames up to the last one wanted are decoded."""
    yield _by_decoding(media, index, numbers)


def _by_decoding(media: Media, index: Index, numbers: list[int]) -> Frames:
    wanted = set(numbers)
    with _opened(media) as capture:
        for number in range(numbers[-1] + 1):
            if not capture.grab():
                raise MediaError(
                    media.path, f"of {index.info.frames} frames only {number} can be decoded"
                )
            if number in wanted:
                yield number, _pixels(media, capture, number)


def _pixels(media: Media, capture: Any, number: int) -> np.ndarray:
    """RGB pixels of the frame that was grabbed; OpenCV turns them upright."""
    sound, pixels = capture.retrieve()
    if not sound or pixels.ndim != 3:
        raise MediaError(media.path, f"OpenCV cannot convert frame {number}; {ADVICE}")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


@contextmanager
def _opened(media: Media) -> Iterator[Any]:
    with _file(media) as path:
        try:
            capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        except cv2.error as error:
            raise MediaError(media.path, f"OpenCV cannot open it; {ADVICE}") from error
        try:
            if not capture.isOpened():
                raise MediaError(media.path, f"OpenCV cannot open it; {ADVICE}")
            yield capture
        except cv2.error as error:
            raise MediaError(media.path, error.err) from error
        finally:
            capture.release()


def _file(media: Media) -> Any:
    """The path of a file with the content."""
    return nullcontext(str(media.path)) if media.content is None else _written(media.content)


@contextmanager
def _written(content: bytes) -> Iterator[str]:
    handle, path = tempfile.mkstemp()
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        yield path
    finally:
        os.unlink(path)

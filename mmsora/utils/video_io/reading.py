"""Reading of videos and images, by whichever reader suits the file and the installation."""

import logging
import operator
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import cast

import numpy as np
from mmengine.logging import print_log

from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import pillow_reader
from mmsora.utils.video_io.media import (
    Frames,
    Index,
    Media,
    MediaError,
    Reader,
    Source,
    VideoInfo,
    check_whole,
)

__all__ = ["READERS", "VARIABLE", "forget", "probe_video", "read_image", "read_video"]

READERS = ("pyav", "opencv", "torchcodec")
VARIABLE = "MMSORA_VIDEO_READER"
PICTURES = ("gif", "png", "webp")
REMEMBERED_BYTES = 64 << 20  # of indices; a clip's takes some kB, a film's some MB


def probe_video(source: Source, name: str | Path | None = None) -> VideoInfo:
    """What a video holds, counted and not taken from its header, which may be wrong.

    What was found is remembered for as long as the file stays as it is.

    Args:
        source: A file of any format that FFmpeg knows, or its bytes.
        name: What errors call bytes.

    Returns:
        Its number of frames, rate, size and length.

    Raises:
        MediaError: The file cannot be opened, holds no video, or is damaged.
    """
    media = _media(source, name)
    return _index(media, _reader()).info


def read_video(
    source: Source, indices: Iterable[int] | None = None, name: str | Path | None = None
) -> np.ndarray:
    """Read frames, exactly those asked for.

    Frame ``i`` is the one that decoding the file from its start to its end gives as number
    ``i``. To reach it, the reader starts at the keyframe before it where the file's own times
    allow that, and at the beginning where they do not.

    Args:
        source: A file of any format that FFmpeg knows, or its bytes.
        indices: Numbers of the frames, in any order, repeated or not; all frames by default.
        name: What errors call bytes.

    Returns:
        uint8 (T, H, W, 3), upright, in the order of ``indices``.

    Raises:
        MediaError: The file cannot be opened, holds no video, is damaged or has fewer frames.
        ValueError: An index is negative.
    """
    media = _media(source, name)
    index = _index(media, _reader())
    total, _, height, width, _ = index.info
    numbers = range(total) if indices is None else [operator.index(number) for number in indices]
    if min(numbers, default=0) < 0:
        raise ValueError(f"frames are counted from 0, got {min(numbers)}")
    if max(numbers, default=0) >= total:
        raise MediaError(media.path, f"no frame {max(numbers)}, the video has {total} frames")
    clip = np.empty((len(numbers), height, width, 3), np.uint8)
    wanted, order = np.asarray(numbers, dtype=np.int64), sorted(set(numbers))
    if not order:
        return clip
    failed: MediaError | None = None
    for frames in _reader_of(media, _reader()).frames(media, index, order):
        try:
            _fill(clip, wanted, media, frames)
            return clip
        except MediaError as error:
            failed = error  # the next way says what is wrong, or succeeds
    assert failed
    raise failed


def read_image(source: Source, name: str | Path | None = None) -> np.ndarray:
    """Read an image, in the orientation in which its pixels are stored.

    Args:
        source: A file of any format that Pillow knows, or its bytes.
        name: What errors call bytes.

    Returns:
        uint8 (H, W, 3).

    Raises:
        MediaError: The file cannot be opened, is no image, or is damaged.
    """
    return pillow_reader.picture(_media(source, name))


def _media(source: Source, name: str | Path | None) -> Media:
    if isinstance(source, bytes):
        return Media(name or "a file in memory", source)
    return Media(source)


def _index(media: Media, reader: str) -> Index:
    """The index of a file in the state that it is in, remembered."""
    key = reader, *media.key()
    index = _known.get(key)
    if index is None:
        index = _reader_of(media, reader).scan(media)
        _known.put(key, index)
    return index


class _Indices:
    """The indices used last, up to some size altogether."""

    def __init__(self) -> None:
        self.held: OrderedDict[tuple, Index] = OrderedDict()
        self.nbytes = 0
        self.lock = threading.Lock()

    def get(self, key: tuple) -> Index | None:
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
            return self.held.get(key)

    def put(self, key: tuple, index: Index) -> None:
        with self.lock:
            if key not in self.held:
                self.nbytes += index.nbytes
            self.held[key] = index
            while self.nbytes > REMEMBERED_BYTES:
                self.nbytes -= self.held.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self.lock:
            self.held.clear()
            self.nbytes = 0


_known = _Indices()


def forget() -> None:
    """Forget what is known of files, so that the next look at one is like the first."""
    _known.clear()


def _reader_of(media: Media, reader: str) -> Reader:
    """The module that reads this file."""
    name = check_whole(media)
    if name in PICTURES:
        return pillow_reader
    return cast(Reader, import_module(f"mmsora.utils.video_io.{reader}_reader"))


def _reader() -> str:
    """The reader of videos that is asked for, else the best that is installed."""
    return _working(os.environ.get(VARIABLE, ""))


@lru_cache
def _working(asked: str) -> str:
    if asked and asked not in READERS:
        raise UserError(f"{VARIABLE} must be one of {', '.join(READERS)}, got {asked!r}")
    if asked:
        _import(asked)
        return asked
    try:
        _import("pyav")
        return "pyav"
    except UserError as error:
        print_log(
            f"{error}. Videos are read by OpenCV: from their start each time, AV1 and interlaced "
            "ones not at all, and with the colours of BT.601",
            logger="current",
            level=logging.WARNING,
        )
    return "opencv"


def _import(reader: str) -> None:
    package = {"pyav": "av", "opencv": "opencv-python", "torchcodec": "torchcodec"}[reader]
    try:
        import_module(f"mmsora.utils.video_io.{reader}_reader")
    except (ImportError, RuntimeError, OSError) as error:  # a broken package raises any of them
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{package} cannot be imported ({reason}); pip install {package}"
        ) from error


def _fill(clip: np.ndarray, wanted: np.ndarray, media: Media, frames: Frames) -> None:
    """Puts frames into all the places of a clip where their numbers are wanted."""
    for number, pixels in frames:
        if pixels.shape != clip.shape[1:]:
            sizes = " x ".join(map(str, pixels.shape[:2])), " x ".join(map(str, clip.shape[1:3]))
            raise MediaError(
                media.path, f"frame {number} is {sizes[0]} pixels, the first is {sizes[1]}"
            )
        clip[wanted == number] = pixels

"""What readers of media share: files, their kinds, and what may be wrong with them."""

import io
import os
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from mmsora.utils.user_error import UserError

__all__ = ["Index", "Media", "MediaError", "Reader", "Source", "VideoInfo", "check_whole", "kind"]

Source = str | Path | bytes
TOP_BOXES = 1000  # of an mp4; films in many fragments have more, and stop being checked there


class VideoInfo(NamedTuple):
    """What a video holds.

    Attributes:
        frames: Number of frames that are shown.
        fps: Frames per second, the mean.
        height: Pixels of an upright frame.
        width: Pixels of an upright frame.
        duration: Seconds, when each frame is shown for the mean time.
    """

    frames: int
    fps: float
    height: int
    width: int
    duration: float


class MediaError(UserError):
    """A file that cannot be read as a video or image.

    Args:
        path: The file.
        cause: What is wrong with it. A loader's worker passes errors on as one text: then it is
            empty, and the path is that text.
    """

    def __init__(self, path: str | Path, cause: object = "") -> None:
        super().__init__(path, cause)
        self.path, self.cause = path, cause

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}" if self.cause else str(self.path)


class Media(NamedTuple):
    """A file, or what was one.

    Attributes:
        path: What errors call it.
        content: The file's bytes; None where the path is to be opened.
    """

    path: str | Path
    content: bytes | None = None

    def open(self) -> BinaryIO:
        """A binary file at its start."""
        return open(self.path, "rb") if self.content is None else io.BytesIO(self.content)

    def key(self) -> tuple[Any, ...]:
        """Equal for the same content: path, time and size of a file, else a hash."""
        if self.content is not None:
            return (blake2b(self.content, digest_size=16).digest(),)
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise MediaError(self.path, error.strerror or error) from error
        return str(self.path), status.st_mtime_ns, status.st_size


class Index(NamedTuple):
    """Where the frames of a file are.

    Attributes:
        info: What :func:`probe_video` tells.
        times: Presentation times of the frames, sorted; None where frames can only be counted.
        keys: (K, 3): of each keyframe the presentation time, the time to seek to and the number
            of the first frame that is shown from it on.
    """

    info: VideoInfo
    times: np.ndarray | None = None
    keys: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        return 1024 + sum(part.nbytes for part in (self.times, self.keys) if part is not None)


Frames = Iterator[tuple[int, np.ndarray]]


class Reader(Protocol):
    """A module that reads videos."""

    def scan(self, media: Media) -> Index:
        """Find the frames."""

    def frames(self, media: Media, index: Index, numbers: list[int]) -> Iterable[Frames]:
        """Ways to get the frames of these numbers, which ascend; the last is the surest."""


def kind(head: bytes) -> str:
    """The format of a file by its first bytes; empty for those that need no special care."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return "mp4"
    if head[:4] == b"RIFF":
        return {b"WEBP": "webp", b"AVI ": "avi"}.get(head[8:12], "")
    signatures = {b"\x1a\x45\xdf\xa3": "matroska", b"GIF8": "gif", b"\x89PNG": "png"}
    return signatures.get(head[:4], "")


def check_whole(media: Media) -> str:
    """Hold a file's size against what the file itself says.

    A decoder may take a file that was cut between two frames for a shorter film.

    Args:
        media: The file.

    Returns:
        Its kind.

    Raises:
        MediaError: The file cannot be opened, is empty, or ends early.
    """
    try:
        with media.open() as file:
            head = file.read(64)
            size = file.seek(0, os.SEEK_END)
            if not size:
                raise MediaError(media.path, "an empty file")
            name = kind(head)
            needed = NEEDED[name](file, head, size) if name in NEEDED else 0
    except OSError as error:
        raise MediaError(media.path, error.strerror or error) from error
    if needed > size:
        raise MediaError(media.path, f"the file is cut: it has {size:,} of {needed:,} bytes")
    return name


def _mp4_end(file: BinaryIO, _head: bytes, size: int) -> int:
    """Where the last box ends that holds frames or says where they are."""
    position = end = 0
    for _ in range(TOP_BOXES):
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            break
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0: up to the end of the file
            break
        position += length
        if header[4:8] in (b"moov", b"moof", b"mdat"):
            end = position
        if position >= size:
            break
    return end


def _riff_end(_file: BinaryIO, head: bytes, _size: int) -> int:
    length = int.from_bytes(head[4:8], "little")
    return 0 if length == 0xFFFFFFFF else length + 8  # not known when it was written


def _matroska_end(_file: BinaryIO, head: bytes, _size: int) -> int:
    """Where the segment ends, which is all but the header."""
    length, used = _ebml_number(head[4:])
    start = 4 + used + length
    if head[start : start + 4] != b"\x18\x53\x80\x67":
        return 0
    length, used = _ebml_number(head[start + 4 :])
    return 0 if length < 0 else start + 4 + used + length


def _ebml_number(data: bytes) -> tuple[int, int]:
    """A number, -1 for one that is not known, and how many bytes it takes."""
    used = 9 - data[0].bit_length() if data else 9
    if used > 8 or len(data) < used:
        return -1, 0
    bits = 7 * used
    value = int.from_bytes(data[:used], "big") & ((1 << bits) - 1)
    return (-1 if value == (1 << bits) - 1 else value), used


def _gif_end(file: BinaryIO, head: bytes, size: int) -> int:
    """Where the trailer ends, or one byte more than the file has."""
    file.seek(0)
    data = file.read()

    def after_blocks(position: int) -> int:
        while position < size and data[position]:
            position += 1 + data[position]
        return position + 1

    def table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    position = 13 + table(head[10] if size > 10 else 0)
    while position < size:
        if data[position] == 0x3B:
            return position + 1
        if data[position] == 0x2C and position + 9 < size:
            position = after_blocks(position + 11 + table(data[position + 9]))
        else:
            position = after_blocks(position + 2)
    return size + 1


NEEDED = {
    "mp4": _mp4_end,
    "avi": _riff_end,
    "webp": _riff_end,
    "matroska": _matroska_end,
    "gif": _gif_end,
}

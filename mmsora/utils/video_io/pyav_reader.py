"""Videos by PyAV, which is FFmpeg."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from mmsora.utils.video_io.media import Frames, Index, Media, MediaError, VideoInfo

__all__ = ["frames", "scan"]

# Containers whose times tell frames apart and can be sought. In others (AVI has no times for
# B-frames) frames are counted from the start.
TIMED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
WORTH_A_SEEK = 8  # frames that are better sought than decoded in vain
KEPT_BYTES = 16 << 20


class _Decoded:
    """The frames of the file that was counted last: most often they are asked for next."""

    def __init__(self) -> None:
        self.kept: tuple[tuple[Any, ...], list[Any]] = ((), [])

    def keep(self, media: Media, frames: Iterable[Any]) -> list[Any]:
        """Keep frames if they are small altogether, and tell their times."""
        times, kept, nbytes = [], [], 0
        for frame in frames:
            times.append(frame.pts)
            nbytes += sum(plane.buffer_size for plane in frame.planes)
            if nbytes <= KEPT_BYTES:
                kept.append(frame)
        if len(kept) == len(times):
            self.kept = media.key(), kept
        return times

    def take(self, media: Media) -> list[Any]:
        """The frames of a file, empty if they are not kept. They are kept no longer."""
        (key, frames), self.kept = self.kept, ((), [])
        return frames if key and key == media.key() else []


_decoded = _Decoded()


def scan(media: Media) -> Index:
    """Find the frames: by the packets, where these are known to be frames, else by decoding."""
    times, keys = _packet_times(media)
    with _opened(media) as (container, stream):
        decoded = container.decode(stream)
        first = next(decoded, None)
        if first is None:
            raise MediaError(media.path, "no frames")
        stamps = times.tolist()
        # The fields of interlaced frames may be packets of their own, and the first frames of a
        # film that was cut out of a longer one may be impossible to decode.
        seekable = len(keys) > 0 and first.pts == stamps[0] and not first.interlaced_frame
        if not seekable:
            stamps = _decoded.keep(media, _sound(media, itertools.chain([first], decoded)))
        rate = float(_mean_rate(stamps, stream))
    height, width = first.height, first.width
    if first.rotation // 90 % 2:
        height, width = width, height
    info = VideoInfo(len(stamps), rate, height, width, len(stamps) / rate)
    if not seekable:
        return Index(info)
    numbers = np.searchsorted(times, keys[:, 0])
    return Index(info, times, np.column_stack([keys, numbers]))


def frames(media: Media, index: Index, numbers: list[int]) -> Iterable[Frames]:
    """By seeking, unless all are wanted, then by decoding from the start."""
    if index.times is not None and len(numbers) < index.info.frames:
        yield _by_seeking(media, index, numbers)
    yield _by_decoding(media, index, numbers)


def _packet_times(media: Media) -> tuple[np.ndarray, np.ndarray]:
    """Times of the frames and of the keyframes (and where to seek for those), without decoding.

    Both are empty where the container's times do not tell frames apart.
    """
    shown: list[int] = []
    keys: list[tuple[int, int]] = []
    unknown = np.empty(0, np.int64), np.empty((0, 2), np.int64)
    with _opened(media) as (container, stream):
        if container.format.name not in TIMED_FORMATS or stream.codec_context.name == "vp8":
            return unknown  # VP8 has packets that show nothing
        for packet in container.demux(stream):
            if not packet.size:  # the end
                continue
            if packet.is_corrupt:
                raise MediaError(media.path, f"the file ends within frame {len(shown)}")
            if packet.pts is None:
                return unknown
            if packet.is_keyframe:
                start = packet.pts if packet.dts is None else min(packet.pts, packet.dts)
                keys.append((packet.pts, start))
            if not packet.is_discard:  # by an edit list
                shown.append(packet.pts)
    if not (keys and shown) or len(set(shown)) < len(shown):
        return unknown
    return np.array(sorted(shown), np.int64), np.array(sorted(keys), np.int64)


@contextmanager
def _opened(media: Media) -> Iterator[tuple[Any, Any]]:
    """A container and its video; what FFmpeg has against them is a ``MediaError``."""
    try:
        source = str(media.path) if media.content is None else media.open()
        with av.open(source, metadata_errors="replace") as container:
            if container.format.name == "tty":  # FFmpeg plays text files as films of letters
                raise MediaError(media.path, "a text file")
            streams = [
                stream
                for stream in container.streams.video
                if not stream.disposition & Disposition.attached_pic  # the cover of a song
            ]
            if not streams:
                raise MediaError(media.path, "no video stream")
            if streams[0].codec_context is None:
                raise MediaError(media.path, "a codec that FFmpeg does not know")
            streams[0].codec_context.thread_count = 1  # it is the loaders that run in parallel
            yield container, streams[0]
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(media.path, getattr(error, "strerror", None) or error) from error


def _by_seeking(media: Media, index: Index, numbers: list[int]) -> Frames:
    """Each frame is decoded from a keyframe before it, with all frames between the two."""
    assert index.times is not None
    assert index.keys is not None
    times, converter = index.times, VideoReformatter()
    with _opened(media) as (container, stream):
        for seek_to, number, run in _runs(index.keys, numbers):
            container.seek(seek_to, stream=stream)
            pending = deque(run)
            for frame in container.decode(stream):
                if number == len(times):
                    break
                # Frames before the keyframe's may lack what they were made from.
                if frame.pts is not None and frame.pts < times[number]:
                    continue
                if frame.pts != times[number] or frame.is_corrupt:
                    break
                if number == pending[0]:
                    yield pending.popleft(), _pixels(frame, converter)
                number += 1
                if not pending:
                    break
            if pending:
                raise MediaError(
                    media.path, f"frame {number} is damaged or not where it should be"
                )


def _runs(keys: np.ndarray, numbers: list[int]) -> list[tuple[int, int, list[int]]]:
    """Frames to be decoded in one go, each run with the time to seek to and the first number."""
    runs: list[tuple[int, int, list[int]]] = []
    for number in numbers:
        key = int(np.searchsorted(keys[:, 2], number, side="right")) - 1
        _, seek_to, start = keys[max(key, 0)]
        if runs and start <= runs[-1][-1][-1] + WORTH_A_SEEK:
            runs[-1][-1].append(number)
        else:
            runs.append((int(seek_to), int(start), [number]))
    return runs


def _by_decoding(media: Media, index: Index, numbers: list[int]) -> Frames:
    """All frames up to the last one wanted are decoded."""
    wanted, converter, number = set(numbers), VideoReformatter(), -1
    kept = _decoded.take(media)
    if kept:
        yield from ((number, _pixels(kept[number], converter)) for number in numbers)
        return
    with _opened(media) as (container, stream):
        for number, frame in enumerate(_sound(media, container.decode(stream))):
            if index.times is not None and frame.pts != index.times[number]:
                raise MediaError(
                    media.path, f"frame {number} is missing or not where it should be"
                )
            if number in wanted:
                yield number, _pixels(frame, converter)
            if number == numbers[-1]:
                return
    raise MediaError(media.path, f"of {index.info.frames} frames only {number + 1} can be decoded")


def _sound(media: Media, frames: Iterable[Any]) -> Iterator[Any]:
    """Decoded frames, none of them damaged."""
    for frame in frames:
        if frame.is_corrupt:
            raise MediaError(media.path, f"frame at {frame.time} s is damaged")
        yield frame


def _pixels(frame: Any, converter: VideoReformatter) -> np.ndarray:
    """Upright RGB pixels of a decoded frame; setting up a converter takes longer than using it."""
    return np.rot90(converter.reformat(frame, format="rgb24").to_ndarray(), frame.rotation // 90)


def _mean_rate(stamps: list[Any], stream: Any) -> Fraction:
    """Frames per second by the frames' own times, else by what the container claims, else 1."""
    if len(stamps) > 1 and None not in stamps and stamps[-1] > stamps[0]:
        return (len(stamps) - 1) / ((stamps[-1] - stamps[0]) * stream.time_base)
    return stream.average_rate or Fraction(1)

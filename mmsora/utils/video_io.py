"""Reading and writing of videos and images: the only file that opens media.

Frames are uint8 and RGB everywhere, (T, H, W, 3).
"""

import itertools
import math
import operator
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Colorspace, VideoReformatter
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmsora.utils.atomic import atomic_path
from mmsora.utils.user_error import UserError

__all__ = [
    "MediaError",
    "VideoInfo",
    "probe_video",
    "read_image",
    "read_video",
    "viewing_scale",
    "write_image",
    "write_video",
]

VIEWING_SIDE = 128  # pixels; the shorter side of a clip that people are to look at
H264: Final = "libx264"
BT709 = 1  # ITU-T H.273: the same number for primaries, transfer and matrix
LIMITED_RANGE = 1
# Containers whose times tell frames apart and can be sought. In others (AVI has no times for
# B-frames, every GIF frame calls itself a keyframe) frames are counted from the start.
TIMED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
REMEMBERED_FILES = 16384  # some kB each
WORTH_A_SEEK = 8  # frames that are better sought than decoded in vain


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


def viewing_scale(height: int, width: int) -> int:
    """The smallest enlargement that makes the shorter side 128 pixels or more."""
    return math.ceil(VIEWING_SIDE / min(height, width))


def write_video(path: str | Path, frames: np.ndarray | Tensor, fps: float, scale: int = 1) -> None:
    """Write a clip; the extension decides the format.

    - ``.mp4``: H.264, plays everywhere, lossy. Sizes must be even, so a last odd row or column
      is repeated.
    - ``.gif``: exact for grey clips, 256 colours a frame for others. Frame times are multiples
      of 10 ms, rounded so that the length of the clip is kept. A frame equal to the one before
      it is stored as a longer display of that one.
    - ``.png``: animated PNG, lossless. A single frame gives a plain PNG.

    Args:
        path: The file to write, whole or not at all.
        frames: uint8, (T, H, W, 3), (T, H, W, 1) or (T, H, W).
        fps: Frames per second.
        scale: Enlargement; a pixel becomes a square of so many pixels.

    Raises:
        ValueError: The extension is none of the three, or the frames or fps are no clip.
    """
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png}
    extension = Path(path).suffix.lower()
    if extension not in writers:
        raise ValueError(f"a video ends in .mp4, .gif or .png, got {Path(path).name!r}")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    clip = _as_uint8(frames)
    if clip.ndim == 4 and clip.shape[-1] == 1:
        clip = clip[..., 0]
    if not (clip.ndim == 3 or (clip.ndim == 4 and clip.shape[-1] == 3)) or not clip.size:
        raise ValueError(f"frames must be (T, H, W[, 1 or 3]) and not empty, got {clip.shape}")
    clip = clip.repeat(scale, axis=1).repeat(scale, axis=2)
    with atomic_path(path) as temporary:
        writers[extension](temporary, clip, fps)


def write_image(path: str | Path, image: np.ndarray | Tensor) -> None:
    """Write a PNG image.

    Args:
        path: The file to write, whole or not at all.
        image: uint8, (H, W, 3) or (H, W).

    Raises:
        ValueError: The extension is not ``.png``, or the array is no image.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"an image ends in .png, got {Path(path).name!r}")
    pixels = _as_uint8(image)
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)) or not pixels.size:
        raise ValueError(f"an image must be (H, W[, 3]) and not empty, got {pixels.shape}")
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary)


def probe_video(path: str | Path) -> VideoInfo:
    """What a video holds, counted and not taken from its header, which may be wrong.

    What was found is remembered for as long as the file stays as it is.

    Args:
        path: A file of any format that FFmpeg knows.

    Returns:
        Its number of frames, rate, size and length.

    Raises:
        MediaError: The file cannot be opened, holds no video, or is damaged.
    """
    return _index(path).info


def read_video(path: str | Path, indices: Iterable[int] | None = None) -> np.ndarray:
    """Read frames, exactly those asked for.

    Frame ``i`` is the one that decoding the file from its start to its end gives as number
    ``i``. To reach it, the reader starts at the keyframe before it where the file's own times
    allow that, and at the beginning where they do not.

    Args:
        path: A file of any format that FFmpeg knows.
        indices: Numbers of the frames, in any order, repeated or not; all frames by default.

    Returns:
        uint8 (T, H, W, 3), upright, in the order of ``indices``.

    Raises:
        MediaError: The file cannot be opened, holds no video, is damaged or has fewer frames.
        ValueError: An index is negative.
    """
    index = _index(path)
    total, _, height, width, _ = index.info
    numbers = range(total) if indices is None else [operator.index(number) for number in indices]
    if min(numbers, default=0) < 0:
        raise ValueError(f"frames are counted from 0, got {min(numbers)}")
    if max(numbers, default=0) >= total:
        raise MediaError(path, f"no frame {max(numbers)}, the video has {total} frames")
    clip = np.empty((len(numbers), height, width, 3), np.uint8)
    wanted, order = np.asarray(numbers, dtype=np.int64), sorted(set(numbers))
    if indices is not None and index.times is not None:
        with suppress(MediaError):  # decoding from the start says what is wrong, or succeeds
            _fill(clip, wanted, path, _by_seeking(path, index, order))
            return clip
    _fill(clip, wanted, path, _by_decoding(path, index, order))
    return clip


def read_image(path: str | Path) -> np.ndarray:
    """Read an image, in the orientation in which its pixels are stored.

    Args:
        path: A file of any format that Pillow knows.

    Returns:
        uint8 (H, W, 3).

    Raises:
        MediaError: The file cannot be opened, is no image, or is damaged.
    """
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise MediaError(path, "not an image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(path, getattr(error, "strerror", None) or error) from error


class _Index(NamedTuple):
    """Where the frames of a file are.

    Attributes:
        info: What :func:`probe_video` tells.
        times: Presentation times of the frames, sorted; None where frames can only be counted.
        keys: (K, 3): of each keyframe the presentation time, the time to seek to and the number
            of the first frame that is shown from it on.
    """

    info: VideoInfo
    times: np.ndarray | None
    keys: np.ndarray | None


def _index(path: str | Path) -> _Index:
    try:
        status = os.stat(path)
    except OSError as error:
        raise MediaError(path, error.strerror or error) from error
    return _scan(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=REMEMBERED_FILES)
def _scan(path: str | Path, _modified: int, _size: int) -> _Index:
    """The index of a file in the state that the times and sizes stand for."""
    times, keys = _packet_times(path)
    with _opened(path) as (container, stream):
        decoded = container.decode(stream)
        first = next(decoded, None)
        if first is None:
            raise MediaError(path, "no frames")
        stamps = times.tolist()
        # The fields of interlaced frames may be packets of their own, and the first frames of a
        # film that was cut out of a longer one may be impossible to decode.
        seekable = len(keys) > 0 and first.pts == stamps[0] and not first.interlaced_frame
        if not seekable:
            frames = itertools.chain([first], decoded)
            stamps = [frame.pts for frame in _sound(path, frames)]
        rate = float(_mean_rate(stamps, stream))
    height, width = first.height, first.width
    if first.rotation // 90 % 2:
        height, width = width, height
    info = VideoInfo(len(stamps), rate, height, width, len(stamps) / rate)
    if not seekable:
        return _Index(info, None, None)
    numbers = np.searchsorted(times, keys[:, 0])
    return _Index(info, times, np.column_stack([keys, numbers]))


def _packet_times(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Times of the frames and of the keyframes (and where to seek for those), without decoding.

    Both are empty where the container's times do not tell frames apart.
    """
    shown: list[int] = []
    keys: list[tuple[int, int]] = []
    unknown = np.empty(0, np.int64), np.empty((0, 2), np.int64)
    with _opened(path) as (container, stream):
        if container.format.name not in TIMED_FORMATS or stream.codec_context.name == "vp8":
            return unknown  # VP8 has packets that show nothing
        for packet in container.demux(stream):
            if not packet.size:  # the end
                continue
            if packet.is_corrupt:
                raise MediaError(path, f"the file ends within frame {len(shown)}")
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
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """A container and its video; what FFmpeg has against them is a ``MediaError``."""
    try:
        with av.open(str(path)) as container:
            if container.format.name == "tty":  # FFmpeg plays text files as films of letters
                raise MediaError(path, "a text file")
            streams = [
                stream
                for stream in container.streams.video
                if not stream.disposition & Disposition.attached_pic  # the cover of a song
            ]
            if not streams:
                raise MediaError(path, "no video stream")
            streams[0].codec_context.thread_count = 1  # it is the loaders that run in parallel
            yield container, streams[0]
    except (av.FFmpegError, OSError) as error:
        raise MediaError(path, error.strerror or error) from error


def _by_seeking(
    path: str | Path, index: _Index, numbers: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Frames with their numbers, which ascend, each decoded from a keyframe before it."""
    assert index.times is not None
    assert index.keys is not None
    converter = VideoReformatter()
    with _opened(path) as (container, stream):
        for seek_to, run in _runs(index.keys, numbers):
            container.seek(seek_to, stream=stream)
            pending = deque(run)
            for frame in container.decode(stream):
                if frame.pts == index.times[pending[0]] and not frame.is_corrupt:
                    yield pending.popleft(), _pixels(frame, converter)
                    if not pending:
                        break
                elif frame.pts is None or frame.pts >= index.times[pending[0]]:
                    break
            if pending:
                raise MediaError(path, f"frame {pending[0]} is damaged or not where it should be")


def _runs(keys: np.ndarray, numbers: list[int]) -> list[tuple[int, list[int]]]:
    """Frames to be decoded in one go, each run with the time to seek to for it."""
    runs: list[tuple[int, list[int]]] = []
    for number in numbers:
        key = int(np.searchsorted(keys[:, 2], number, side="right")) - 1
        _, seek_to, start = keys[max(key, 0)]
        if runs and start <= runs[-1][1][-1] + WORTH_A_SEEK:
            runs[-1][1].append(number)
        else:
            runs.append((int(seek_to), [number]))
    return runs


def _by_decoding(
    path: str | Path, index: _Index, numbers: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Frames with their numbers, which ascend, decoded from the start."""
    wanted = set(numbers)
    if not wanted:
        return
    converter, number = VideoReformatter(), -1
    with _opened(path) as (container, stream):
        for number, frame in enumerate(_sound(path, container.decode(stream))):
            if index.times is not None and frame.pts != index.times[number]:
                raise MediaError(path, f"frame {number} is missing or not where it should be")
            if number in wanted:
                yield number, _pixels(frame, converter)
            if number == numbers[-1]:
                return
    raise MediaError(path, f"of {index.info.frames} frames only {number + 1} can be decoded")


def _fill(
    clip: np.ndarray,
    wanted: np.ndarray,
    path: str | Path,
    frames: Iterable[tuple[int, np.ndarray]],
) -> None:
    """Puts frames into all the places of a clip where their numbers are wanted."""
    for number, pixels in frames:
        if pixels.shape != clip.shape[1:]:
            sizes = " x ".join(map(str, pixels.shape[:2])), " x ".join(map(str, clip.shape[1:3]))
            raise MediaError(path, f"frame {number} is {sizes[0]} pixels, the first is {sizes[1]}")
        clip[wanted == number] = pixels


def _sound(path: str | Path, frames: Iterable[Any]) -> Iterator[Any]:
    """Decoded frames, none of them damaged."""
    for frame in frames:
        if frame.is_corrupt:
            raise MediaError(path, f"frame at {frame.time} s is damaged")
        yield frame


def _pixels(frame: Any, converter: VideoReformatter) -> np.ndarray:
    """Upright RGB pixels of a decoded frame; setting up a converter takes longer than using it."""
    return np.rot90(converter.reformat(frame, format="rgb24").to_ndarray(), frame.rotation // 90)


def _mean_rate(stamps: list[Any], stream: Any) -> Fraction:
    """Frames per second by the frames' own times, else by what the container claims, else 1."""
    if len(stamps) > 1 and None not in stamps and stamps[-1] > stamps[0]:
        return (len(stamps) - 1) / ((stamps[-1] - stamps[0]) * stream.time_base)
    return stream.average_rate or Fraction(1)


def _as_uint8(values: np.ndarray | Tensor) -> np.ndarray:
    """The values as a uint8 array in the memory of the CPU."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, got {array.dtype}")
    return array


def _write_mp4(path: Path, clip: np.ndarray, fps: float) -> None:
    if H264 not in av.codecs_available:
        raise RuntimeError(f"this build of PyAV has no {H264} encoder; write .gif or .png instead")
    height, width = clip.shape[1:3]
    padding = [(0, 0), (0, height % 2), (0, width % 2)] + [(0, 0)] * (clip.ndim - 3)
    clip = np.pad(clip, padding, mode="edge")
    if clip.ndim == 3:
        clip = np.stack([clip] * 3, axis=-1)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        rate = Fraction(fps).limit_denominator(65535)
        stream = container.add_stream(H264, rate=rate, options={"crf": "18"})
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED_RANGE
        for pixels in clip:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_gif(path: Path, clip: np.ndarray, fps: float) -> None:
    clock = [10 * round(100 * frame / fps) for frame in range(len(clip) + 1)]
    durations = [max(end - start, 10) for start, end in itertools.pairwise(clock)]
    first, *others = map(Image.fromarray, clip)
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)


def _write_png(path: Path, clip: np.ndarray, fps: float) -> None:
    first, *others = map(Image.fromarray, clip)
    if not others:
        first.save(path)
        return
    # Without transparency the two kinds of blending are the same; Pillow merges equal frames
    # of one kind, and a clip must keep its number of frames.
    kinds = [frame % 2 for frame in range(len(clip))]
    first.save(path, save_all=True, append_images=others, duration=1000 / fps, blend=kinds)

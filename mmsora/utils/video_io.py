"""Reading and writing of videos and images: the only file that opens media.

Frames are uint8 and RGB everywhere, (T, H, W, 3).
"""

import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image
from torch import Tensor

from mmsora.utils.atomic import atomic_path

__all__ = ["MediaError", "read_video", "viewing_scale", "write_image", "write_video"]

VIEWING_SIDE = 128  # pixels; the shorter side of a clip that people are to look at
H264: Final = "libx264"
BT709 = 1  # ITU-T H.273: the same number for primaries, transfer and matrix
LIMITED_RANGE = 1


class MediaError(Exception):
    """A file that cannot be read as a video.

    Args:
        path: The file.
        cause: What is wrong with it.
    """

    def __init__(self, path: str | Path, cause: object) -> None:
        super().__init__(path, cause)
        self.path, self.cause = path, cause

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}"


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


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """Read all frames, one after the other.

    Args:
        path: A file of any format that FFmpeg knows.

    Returns:
        uint8 (T, H, W, 3) and the mean number of frames per second (of a plain PNG, which has
        none, what FFmpeg supposes).

    Raises:
        MediaError: The file cannot be opened, holds no video, or is damaged.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(path, "no video stream")
            stream = container.streams.video[0]
            frames, stamps = [], []
            for frame in container.decode(stream):
                frames.append(_pixels(path, frame))
                stamps.append(frame.pts)
            rate = _mean_rate(stamps, stream)
    except (av.FFmpegError, OSError) as error:
        raise MediaError(path, error.strerror or error) from error
    if not frames or not rate:
        raise MediaError(path, "no frames")
    return np.stack(frames), float(rate)


def _pixels(path: str | Path, frame: Any) -> np.ndarray:
    """Upright RGB pixels of a decoded frame."""
    if frame.is_corrupt:
        raise MediaError(path, f"frame at {frame.time} s is damaged")
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def _mean_rate(stamps: list[Any], stream: Any) -> Fraction | None:
    """Frames per second by the frames' own times, else by what the container claims."""
    if len(stamps) > 1 and None not in stamps and stamps[-1] > stamps[0]:
        return (len(stamps) - 1) / ((stamps[-1] - stamps[0]) * stream.time_base)
    return stream.average_rate


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
    durations = [max(end - start, 10) for start, end in pairwise(clock)]
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

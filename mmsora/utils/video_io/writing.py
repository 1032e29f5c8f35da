"""Writing of videos and images."""

import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from torch import Tensor

from mmsora.utils.atomic import atomic_path
from mmsora.utils.user_error import UserError

__all__ = ["viewing_scale", "write_image", "write_video"]

VIEWING_SIDE = 128  # pixels; the shorter side of a clip that people are to look at
H264: Final = "libx264"
VP9: Final = "libvpx-vp9"
FFV1: Final = "ffv1"
BT709 = 1  # ITU-T H.273: the same number for primaries, transfer and matrix
LIMITED_RANGE = 1


def viewing_scale(height: int, width: int) -> int:
    """The smallest enlargement that makes the shorter side 128 pixels or more."""
    return math.ceil(VIEWING_SIDE / min(height, width))


def write_video(path: str | Path, frames: np.ndarray | Tensor, fps: float, scale: int = 1) -> None:
    """Write a clip; the extension decides the format.

    - ``.mp4``: H.264, plays everywhere, lossy. Sizes must be even, so a last odd row or column
      is repeated.
    - ``.webm``: VP9, plays in browsers, lossy. Sizes as for ``.mp4``.
    - ``.mkv``: FFV1, lossless, every size; large, and few players show it.
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
        ValueError: The extension is none of these, or the frames or fps are no clip.
        UserError: PyAV is needed and not installed.
    """
    writers = {
        ".mp4": _write_mp4,
        ".webm": _write_webm,
        ".mkv": _write_mkv,
        ".gif": _write_gif,
        ".png": _write_png,
    }
    extension = Path(path).suffix.lower()
    if extension not in writers:
        raise ValueError(f"a video ends in {', '.join(writers)}, got {Path(path).name!r}")
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


def _as_uint8(values: np.ndarray | Tensor) -> np.ndarray:
    """The values as a uint8 array in the memory of the CPU."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, got {array.dtype}")
    return array


def _write_mp4(path: Path, clip: np.ndarray, fps: float) -> None:
    _write_yuv(path, clip, fps, H264, {"crf": "18"})


def _write_webm(path: Path, clip: np.ndarray, fps: float) -> None:
    options = {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4"}
    _write_yuv(path, clip, fps, VP9, options)


def _write_yuv(
    path: Path, clip: np.ndarray, fps: float, codec: str, options: dict[str, str]
) -> None:
    """With half the colours' resolution, so in even sizes, and tagged as BT.709."""
    av = _pyav(codec)
    height, width = clip.shape[1:3]
    padding = [(0, 0), (0, height % 2), (0, width % 2)] + [(0, 0)] * (clip.ndim - 3)
    clip = np.pad(clip, padding, mode="edge")
    faststart = {"movflags": "faststart"} if codec == H264 else {}
    with av.open(str(path), "w", options=faststart) as container:
        stream = _add_stream(container, clip, fps, codec, "yuv420p", options)
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED_RANGE
        for pixels in clip:
            frame = _frame(av, pixels).reformat(
                format=stream.pix_fmt, dst_colorspace=av.video.reformatter.Colorspace.ITU709
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_mkv(path: Path, clip: np.ndarray, fps: float) -> None:
    av = _pyav(FFV1)
    with av.open(str(path), "w") as container:
        stream = _add_stream(container, clip, fps, FFV1, "bgr0", {"level": "3"})
        for pixels in clip:
            container.mux(stream.encode(_frame(av, pixels).reformat(format="bgr0")))
        container.mux(stream.encode())


def _pyav(codec: str) -> Any:
    """PyAV, with this encoder."""
    try:
        import av
        import av.video.reformatter
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            "PyAV, which writes .mp4, .webm and .mkv, cannot be imported; pip install av, or "
            "write .gif or .png"
        ) from error
    if codec not in av.codecs_available:
        raise UserError(f"this build of PyAV has no {codec} encoder; write .gif or .png instead")
    return av


def _add_stream(
    container: Any,
    clip: np.ndarray,
    fps: float,
    codec: str,
    pixel_format: str,
    options: dict[str, str],
) -> Any:
    rate = Fraction(fps).limit_denominator(65535)
    stream = container.add_stream(codec, rate=rate, options=options)
    stream.height, stream.width = clip.shape[1:3]
    stream.pix_fmt = pixel_format
    return stream


def _frame(av: Any, pixels: np.ndarray) -> Any:
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


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

"""What media files are, beyond what training needs to know: their kind, codec and every frame."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmsora.utils.video_io import reading
from mmsora.utils.video_io.media import Media, MediaError, Source, VideoInfo, check_whole

__all__ = ["MediaFacts", "iterate_video", "media_facts"]

PHOTOS = (".jpeg", ".jpg", ".bmp")


class MediaFacts(NamedTuple):
    """What a file holds.

    Attributes:
        kind: ``video``, ``image`` or ``frames``, which is a folder of images.
        codec: As FFmpeg calls it, or the format of an image; ``unknown`` without PyAV.
        nbytes: Size of the file, or of all files.
        info: Frames, rate, size and length. An image is one frame of no length.
    """

    kind: str
    codec: str
    nbytes: int
    info: VideoInfo


def media_facts(
    source: Source | list[str], name: str | Path | None = None, decode: bool = False
) -> MediaFacts:
    """Look at a file.

    Args:
        source: A video, an image, or the bytes of one; or the images that are a video's frames.
        name: What errors call bytes.
        decode: Decode every frame, which alone finds all damage. Images always are.

    Returns:
        The facts.

    Raises:
        MediaError: It cannot be read.
    """
    if isinstance(source, list):
        return _frames(source, decode)
    media = Media(name or "a file in memory", source) if isinstance(source, bytes) else source
    path = Path(media.path if isinstance(media, Media) else media)
    nbytes = len(source) if isinstance(source, bytes) else _size(path)
    if path.suffix.lower() in PHOTOS:
        height, width, _ = reading.read_image(source, name).shape
        return MediaFacts("image", "jpeg", nbytes, VideoInfo(1, 0.0, height, width, 0.0))
    info = reading.probe_video(source, name)
    if decode:
        for _ in iterate_video(source, name):
            pass
    codec = _codec(media if isinstance(media, Media) else Media(path))
    if info.frames == 1 and codec in reading.PICTURES:
        return MediaFacts("image", codec, nbytes, info._replace(fps=0.0, duration=0.0))
    return MediaFacts("video", codec, nbytes, info)


def iterate_video(source: Source, name: str | Path | None = None) -> Iterator[np.ndarray]:
    """All frames of a video in their order, one at a time.

    Args:
        source: A file, or its bytes.
        name: What errors call bytes.

    Yields:
        uint8 (H, W, 3).

    Raises:
        MediaError: The file cannot be read to its end.
    """
    media = Media(name or "a file in memory", source) if isinstance(source, bytes) else None
    media = media or Media(str(source))
    reader = reading._reader()
    index = reading._index(media, reader)
    ways = reading._reader_of(media, reader).frames(media, index, list(range(index.info.frames)))
    for _, pixels in next(iter(ways)):
        yield pixels


def _frames(files: list[str], decode: bool) -> MediaFacts:
    """Of a folder of frames; without decoding, of the first one alone."""
    first = reading.read_image(files[0])
    height, width, _ = first.shape
    for file in files[1:] if decode else ():
        shape = reading.read_image(file).shape
        if shape != first.shape:
            raise MediaError(
                file, f"{shape[0]} x {shape[1]} pixels, {files[0]} is {height} x {width}"
            )
    kind = Path(files[0]).suffix.lower().lstrip(".").replace("jpg", "jpeg")
    nbytes = sum(_size(Path(file)) for file in files)
    return MediaFacts("frames", kind, nbytes, VideoInfo(len(files), 0.0, height, width, 0.0))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise MediaError(path, error.strerror or error) from error


def _codec(media: Media) -> str:
    name = check_whole(media)
    if name in reading.PICTURES:
        return name
    try:
        av = importlib.import_module("av")
    except (ImportError, RuntimeError, OSError):
        return "unknown"
    try:
        source = str(media.path) if media.content is None else media.open()
        with av.open(source, metadata_errors="replace") as container:
            context = container.streams.video[0].codec_context
            return f"{context.name} {context.pix_fmt}" if context.pix_fmt else context.name
    except (av.FFmpegError, OSError, ValueError, IndexError, AttributeError):
        return "unknown"  # another reader could read it

"""Moving and still pictures by Pillow: GIF, animated PNG, WebP."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from mmsora.utils.video_io.media import Frames, Index, Media, MediaError, VideoInfo

__all__ = ["frames", "picture", "scan"]

MEANT = 100.0  # ms; what browsers make of a frame that is shown for no time


def scan(media: Media) -> Index:
    """Find the frames, by decoding them."""
    with _opened(media) as image:
        clock = [0.0]
        for frame in ImageSequence.Iterator(image):
            frame.load()
            clock.append(clock[-1] + (frame.info.get("duration") or MEANT))
        count = len(clock) - 1
        rate = 1000 * (count - 1) / clock[-2] if count > 1 else 1.0
        info = VideoInfo(count, rate, image.height, image.width, count / rate)
    return Index(info)


def frames(media: Media, index: Index, numbers: list[int]) -> Iterable[Frames]:
    """One way: each frame is a change of the one before it."""
    yield _by_decoding(media, index, numbers)


def picture(media: Media) -> np.ndarray:
    """The pixels of an image, as they are stored."""
    with _opened(media) as image:
        return np.array(image.convert("RGB"))


def _by_decoding(media: Media, index: Index, numbers: list[int]) -> Frames:
    wanted, number = set(numbers), -1
    with _opened(media) as image:
        for number, frame in enumerate(ImageSequence.Iterator(image)):
            if number in wanted:
                yield number, _on_white(frame)
            if number == numbers[-1]:
                return
    raise MediaError(media.path, f"of {index.info.frames} frames only {number + 1} can be decoded")


def _on_white(image: Image.Image) -> np.ndarray:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


@contextmanager
def _opened(media: Media) -> Iterator[Image.Image]:
    """An image; what Pillow has against it is a ``MediaError``."""
    try:
        with media.open() as file, Image.open(file) as image:
            yield image
    except UnidentifiedImageError as error:
        raise MediaError(media.path, "not an image") from error
    except (  # what Pillow was seen to raise for damaged files
        OSError,
        SyntaxError,
        ValueError,
        IndexError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:
        raise MediaError(media.path, getattr(error, "strerror", None) or error) from error

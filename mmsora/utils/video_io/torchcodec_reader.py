"""Videos by TorchCodec, in its exact mode."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torchcodec.decoders import VideoDecoder

from mmsora.utils.video_io.media import Frames, Index, Media, MediaError, VideoInfo

__all__ = ["frames", "scan"]

TIMED_CONTAINERS = (b"ftyp", b"\x1a\x45\xdf\xa3")  # in others it is some frames off
AT_ONCE = 32  # frames


def scan(media: Media) -> Index:
    """Find the frames; TorchCodec reads all packets to count them."""
    with _opened(media) as decoder:
        about = decoder.metadata
        height, width = decoder[0].shape[:2]  # upright
        count, rate = decoder.metadata.num_frames, float(about.average_fps or 1)
    return Index(VideoInfo(count, rate, height, width, count / rate))


def frames(media: Media, index: Index, numbers: list[int]) -> Iterable[Frames]:
    """One way: TorchCodec seeks by the times of all packets."""
    yield _by_seeking(media, numbers)


def _by_seeking(media: Media, numbers: list[int]) -> Frames:
    with _opened(media) as decoder:
        for start in range(0, len(numbers), AT_ONCE):
            part = numbers[start : start + AT_ONCE]
            yield from zip(part, np.asarray(decoder.get_frames_at(part).data), strict=True)


@contextmanager
def _opened(media: Media) -> Iterator[Any]:
    try:
        with media.open() as file:
            head = file.read(8)
        if not (head[4:] == TIMED_CONTAINERS[0] or head[:4] == TIMED_CONTAINERS[1]):
            raise MediaError(
                media.path, "TorchCodec counts frames right in mp4, mov, mkv and webm alone"
            )
        yield VideoDecoder(
            str(media.path) if media.content is None else media.content,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            seek_mode="exact",
        )
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise MediaError(media.path, cause or type(error).__name__) from error

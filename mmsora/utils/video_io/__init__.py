"""Reading and writing of videos and images: the only place that opens media.

Frames are uint8 and RGB everywhere, (T, H, W, 3). Videos are read by PyAV, or by OpenCV where
PyAV is not installed; GIF, animated PNG and WebP by Pillow. ``MMSORA_VIDEO_READER`` in the
environment, ``pyav``, ``opencv`` or ``torchcodec``, chooses another reader of videos.
"""

from mmsora.utils.video_io.media import MediaError, Source, VideoInfo
from mmsora.utils.video_io.reading import probe_video, read_image, read_video
from mmsora.utils.video_io.writing import viewing_scale, write_image, write_video

__all__ = [
    "MediaError",
    "Source",
    "VideoInfo",
    "probe_video",
    "read_image",
    "read_video",
    "viewing_scale",
    "write_image",
    "write_video",
]

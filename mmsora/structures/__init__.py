"""What travels between data, model and hooks."""

from mmsora.structures.video_sample import VideoSample

__all__ = ["VideoSample"]

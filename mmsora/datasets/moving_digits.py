"""Moving digits: a labelled video dataset that needs no download.

Scikit-learn's handwritten digits (8 x 8 pixels, 1,797 of them, from the UCI repository) bounce
in a small frame, as in Moving MNIST (Srivastava et al. 2015, arXiv:1502.04681).
"""

from functools import cache
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from mmsora.registry import DATASETS
from mmsora.structures.video_sample import VideoSample

__all__ = ["MovingDigits"]

TEST_EVERY = 5  # of each digit, every fifth image is held out
SPEED = (0.75, 2.0)  # pixels a frame, for 8-pixel digits in a 16-pixel frame


@cache
def _digits(split: str, digit_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, size, size) uint8 and labels (N,) of one split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.argsort(bunch.target, kind="stable")
    held_out = np.arange(len(order)) % TEST_EVERY == TEST_EVERY - 1
    chosen = order[held_out == (split == "test")]
    images = np.round(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    if digit_size != images.shape[-1]:
        scale = (digit_size, digit_size)
        images = np.stack([cv2.resize(image, scale) for image in images])
    return images, bunch.target[chosen]


@DATASETS.register_module()
class MovingDigits(Dataset):
    """Clips of one digit that bounces in a square frame, labelled by digit.

    A clip is a function of (seed, index): its image, start, direction and speed are.

    Args:
        split: ``train`` or ``test``; the two share no image.
        length: Number of clips.
        num_frames: Frames of a clip.
        frame_size: Side of the frame in pixels.
        digit_size: Side of the digit in pixels; 8 is unscaled.
        seed: Of the clips, not of the run.
        channels: Of a pixel, all alike.
    """

    METAINFO = {"classes": tuple("0123456789")}

    def __init__(
        self,
        split: str = "train",
        length: int = 10000,
        num_frames: int = 8,
        frame_size: int = 16,
        digit_size: int = 8,
        seed: int = 0,
        channels: int = 1,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if digit_size > frame_size:
            raise ValueError(f"digits of {digit_size} px do not fit frames of {frame_size} px")
        self.split, self.length, self.seed, self.channels = split, length, seed, channels
        self.num_frames, self.frame_size, self.digit_size = num_frames, frame_size, digit_size

    @property
    def metainfo(self) -> dict[str, Any]:
        """What MMEngine stores with a checkpoint: the names of the classes."""
        return dict(self.METAINFO)

    def __len__(self) -> int:
        return self.length

    def clip(self, index: int) -> tuple[np.ndarray, int]:
        """Draw one clip.

        Args:
            index: Number of the clip.

        Returns:
            Frames (T, H, W) uint8 and the digit.
        """
        images, labels = _digits(self.split, self.digit_size)
        rng = np.random.default_rng((self.seed, self.split == "test", index))
        number = rng.integers(len(images))
        room = self.frame_size - self.digit_size
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*SPEED) * room / 8
        steps = np.arange(self.num_frames)[:, None]
        free = rng.uniform(0, room, 2) + speed * steps * [np.sin(angle), np.cos(angle)]
        bounced = np.abs((free + room) % (2 * room) - room) if room else np.zeros_like(free)
        frames = np.zeros((self.num_frames, self.frame_size, self.frame_size), np.uint8)
        for frame, (row, column) in zip(frames, np.round(bounced).astype(int), strict=True):
            frame[row : row + self.digit_size, column : column + self.digit_size] = images[number]
        return frames, int(labels[number])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"no clip {index}, there are {self.length} clips")
        frames, label = self.clip(index)
        sample = VideoSample(index=int(index), label=label)
        clip = torch.from_numpy(frames).expand(self.channels, *frames.shape)
        return {"inputs": clip, "data_samples": sample}

"""Small trees of videos and images."""

import numpy as np
import pytest
from PIL import Image

from mmsora.utils.video_io import write_video


def frames(number, count, height=24, width=32):
    """A clip of which frame ``t`` has the grey level ``10 * number + t``."""
    return np.full((count, height, width, 3), 10 * number, np.uint8) + np.arange(
        count, dtype=np.uint8
    ).reshape(-1, 1, 1, 1)


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Class folders b, C and a with 2, 1 and 3 lossless clips of 12 frames, numbered 0 to 5.

    Files in an order that no directory listing gives: C/0, a/1, a/2, a/3, b/4, b/5.
    """
    root = tmp_path_factory.mktemp("videos")
    names = ["C/v_0.png", "a/v_1.png", "a/v_2.png", "a/v_3.png", "b/v_4.png", "b/v_5.png"]
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        write_video(path, frames(number, 12), 8)
        path.rename(path.with_suffix(".avi"))  # FFmpeg looks at the content
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """ImageNet's layout: train/n02/x.JPEG, train/n02/y.jpg, train/n01/z.JPEG, val/n01/w.png."""
    root = tmp_path_factory.mktemp("images")
    names = ["train/n01/z.JPEG", "train/n02/x.JPEG", "train/n02/y.jpg", "val/n01/w.png"]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 30, 3), 50 * number, np.uint8)).save(root / name)
    (root / "train/n01/readme.txt").write_text("no image")
    return root

"""What is written can be read, with the frames, size, rate and colours that went in."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import (
    probe_video,
    read_video,
    viewing_scale,
    write_image,
    write_video,
)

PATCHES = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 100, 30)]


def ramp(frames=6, height=16, width=16):
    """A clip whose frames and pixels all differ, smooth enough for a lossy codec."""
    t, y, x = np.ogrid[:frames, :height, :width]
    grey = (20 + 15 * t + 60 * y / height + 40 * x / width).astype(np.uint8)
    return np.stack([grey, grey // 2 + 40, 200 - grey // 2], axis=-1)


@pytest.mark.parametrize("size", [(16, 16), (1, 1), (2, 2), (17, 31), (90, 45), (128, 130)])
@pytest.mark.parametrize("frames", [1, 3, 8])
def test_mp4_keeps_frames_size_rate_and_content(tmp_path, size, frames):
    clip = np.repeat(ramp(frames, *size)[..., :1], 3, axis=-1)
    write_video(tmp_path / "clip.mp4", clip, 12)
    read = read_video(tmp_path / "clip.mp4")
    height, width = size
    assert read.dtype == np.uint8
    assert read.shape == (frames, height + height % 2, width + width % 2, 3)
    assert probe_video(tmp_path / "clip.mp4").fps == 12
    padded = np.pad(clip, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)], mode="edge")
    assert np.abs(read.astype(int) - padded).max() <= 8


def test_mp4_colours_are_tagged_and_right(tmp_path):
    clip = np.broadcast_to(np.array(PATCHES, np.uint8)[:, None, None], (6, 32, 32, 3))
    write_video(tmp_path / "clip.mp4", clip, 8)
    read = read_video(tmp_path / "clip.mp4")
    assert np.abs(read.astype(int) - clip).max() <= 4
    with av.open(str(tmp_path / "clip.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert context.name == "h264"
        assert context.pix_fmt == "yuv420p"
        assert (context.color_primaries, context.color_trc, context.colorspace) == (1, 1, 1)


@pytest.mark.parametrize("fps", [1, 8, 12.5, 23.976, 60])
def test_mp4_rates(tmp_path, fps):
    write_video(tmp_path / "clip.mp4", ramp(), fps)
    assert probe_video(tmp_path / "clip.mp4").fps == pytest.approx(fps, rel=1e-3)


def test_all_layouts_of_a_grey_clip_are_the_same(tmp_path):
    grey = ramp()[..., 0]
    layouts = [grey, grey[..., None], np.stack([grey] * 3, -1), torch.from_numpy(grey)]
    for extension in ("mp4", "webm", "mkv", "gif", "png"):
        files = []
        for frames in layouts:
            write_video(tmp_path / f"clip.{extension}", frames, 8)
            files.append(read_video(tmp_path / f"clip.{extension}"))
        assert all(np.array_equal(files[0], other) for other in files[1:])


@pytest.mark.parametrize("frames", [1, 6])
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 31)])
def test_png_is_lossless(tmp_path, frames, size):
    clip = np.random.default_rng(0).integers(0, 256, (frames, *size, 3), np.uint8)
    write_video(tmp_path / "clip.png", clip, 24)
    np.testing.assert_array_equal(read_video(tmp_path / "clip.png"), clip)
    with Image.open(tmp_path / "clip.png") as image:
        assert image.is_animated == (frames > 1)
    fps = probe_video(tmp_path / "clip.png").fps
    assert frames == 1 or fps == pytest.approx(24, rel=1e-3)


def test_png_keeps_equal_frames(tmp_path):
    clip = ramp()[[0, 0, 0, 1, 1, 2]]
    write_video(tmp_path / "clip.png", clip, 8)
    np.testing.assert_array_equal(read_video(tmp_path / "clip.png"), clip)


@pytest.mark.parametrize("frames", [1, 6])
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 31)])
def test_matroska_is_lossless(tmp_path, frames, size):
    clip = np.random.default_rng(0).integers(0, 256, (frames, *size, 3), np.uint8)
    write_video(tmp_path / "clip.mkv", clip, 24)
    np.testing.assert_array_equal(read_video(tmp_path / "clip.mkv"), clip)
    write_video(tmp_path / "grey.mkv", clip[..., 0], 24)
    grey = np.stack([clip[..., 0]] * 3, -1)
    np.testing.assert_array_equal(read_video(tmp_path / "grey.mkv"), grey)
    assert probe_video(tmp_path / "clip.mkv").fps == pytest.approx(24, rel=1e-2)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (90, 45)])
def test_webm_keeps_frames_size_and_rate(tmp_path, size):
    clip = np.repeat(ramp(6, *size)[..., :1], 3, axis=-1)
    write_video(tmp_path / "clip.webm", clip, 12)
    read, (height, width) = read_video(tmp_path / "clip.webm"), size
    assert read.shape == (6, height + height % 2, width + width % 2, 3)
    assert np.abs(read[:, :height, :width].astype(int) - clip).mean() <= 4
    assert probe_video(tmp_path / "clip.webm").fps == pytest.approx(12, rel=1e-2)


def test_webm_colours_are_tagged_and_right(tmp_path):
    clip = np.broadcast_to(np.array(PATCHES, np.uint8)[:, None, None], (6, 32, 32, 3))
    write_video(tmp_path / "clip.webm", clip, 8)
    assert np.abs(read_video(tmp_path / "clip.webm").astype(int) - clip).mean() <= 4
    with av.open(str(tmp_path / "clip.webm")) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace) == (1, 1, 1)


def test_gif_of_a_grey_clip_is_lossless(tmp_path):
    clip = np.random.default_rng(0).integers(0, 256, (6, 17, 31), np.uint8)
    write_video(tmp_path / "clip.gif", clip, 8)
    read = read_video(tmp_path / "clip.gif")
    np.testing.assert_array_equal(read, np.stack([clip] * 3, -1))


@pytest.mark.parametrize("fps", [8, 24, 30])
def test_gif_keeps_the_length_of_the_clip(tmp_path, fps):
    write_video(tmp_path / "clip.gif", ramp(7)[[0, 1, 1, 2, 3, 4, 5, 6]], fps)
    with Image.open(tmp_path / "clip.gif") as image:
        durations = []
        for frame in range(image.n_frames):
            image.seek(frame)
            durations.append(image.info["duration"])
    assert len(durations) == 7  # the equal frames became one
    assert sum(durations) == pytest.approx(8000 / fps, abs=5)


def test_gif_rate(tmp_path):
    write_video(tmp_path / "clip.gif", ramp(9), 8)
    assert probe_video(tmp_path / "clip.gif").fps == 8


def test_scale_makes_squares(tmp_path):
    clip = ramp(2, 3, 5)
    write_video(tmp_path / "clip.png", clip, 8, scale=4)
    read = read_video(tmp_path / "clip.png")
    np.testing.assert_array_equal(read, np.kron(clip, np.ones((1, 4, 4, 1), np.uint8)))


@pytest.mark.parametrize(
    ("size", "scale"), [((16, 16), 8), ((1, 9), 128), ((127, 300), 2), ((128, 128), 1)]
)
def test_viewing_scale(size, scale):
    assert viewing_scale(*size) == scale


def test_images(tmp_path):
    for image in (ramp()[0], ramp()[0, ..., 0]):
        write_image(tmp_path / "image.png", torch.from_numpy(image))
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "image.png")), image)


@pytest.mark.parametrize(
    ("name", "frames", "fps", "told"),
    [
        ("clip.avi", ramp(), 8, r"\.mp4, .*\.gif, \.png, got 'clip\.avi'"),
        ("clip.mp4", ramp().astype(np.float32), 8, "uint8.*float32"),
        ("clip.mp4", ramp()[:0], 8, "empty"),
        ("clip.mp4", ramp()[..., :2], 8, r"\(T, H, W"),
        ("clip.mp4", ramp()[None], 8, r"\(T, H, W"),
        ("clip.mp4", ramp(), 0, "fps"),
        ("clip.mp4", ramp(), float("nan"), "fps"),
    ],
)
def test_what_is_no_clip_is_refused(tmp_path, name, frames, fps, told):
    with pytest.raises(ValueError, match=told):
        write_video(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())


def test_what_is_no_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.png"):
        write_image(tmp_path / "image.jpg", ramp()[0])
    with pytest.raises(ValueError, match=r"\(H, W"):
        write_image(tmp_path / "image.png", ramp())


def test_a_failed_encoder_leaves_the_old_file(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", ramp(), 8)
    old = (tmp_path / "clip.mp4").read_bytes()
    monkeypatch.setattr(av, "codecs_available", set())
    with pytest.raises(UserError, match="libx264"):
        write_video(tmp_path / "clip.mp4", ramp(), 8)
    assert (tmp_path / "clip.mp4").read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1

"""Frames are chosen, resized, cropped and flipped as the published loaders do, and exactly."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmsora.datasets import (
    ADMCenterCrop,
    DecodeVideo,
    LoadImage,
    PackVideo,
    RandomFlip,
    ResizeCrop,
    SampleFrames,
    SquareCrop,
)
from mmsora.datasets.transforms import loading
from mmsora.utils.draws import Draws
from mmsora.utils.video_io import MediaError, VideoInfo, write_video


def image(width, height):
    """The synthetic image of the reference figures."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(3 * x + y) % 256, (x + 5 * y) % 256, (x * y // 7) % 256], -1).astype(
        np.uint8
    )


def apply(transform, frames, **results):
    return transform(dict(frames=frames, test_mode=False, **results))["frames"]


# (width, height), mean of the channels, pixels (0, 0), (128, 128) and (255, 255): made by ADM's
# center_crop_arr and Pillow 13.
ADM = [
    (
        (640, 480),
        [127.6929, 127.552, 126.6609],
        [[238, 81, 5], [175, 243, 166], [105, 135, 133]],
    ),
    ((300, 200), [126.0031, 127.32, 125.3982], [[150, 50, 0], [38, 137, 90], [178, 220, 171]]),
    (
        (1000, 1300),
        [128.4775, 128.5169, 127.5185],
        [[155, 246, 33], [107, 166, 119], [43, 69, 128]],
    ),
    ((256, 256), [127.5, 127.5, 122.8891], [[0, 0, 0], [0, 0, 36], [252, 250, 73]]),
    ((257, 300), [127.4995, 127.5003, 125.4047], [[21, 105, 0], [24, 109, 183], [21, 105, 143]]),
]


@pytest.mark.parametrize(("size", "mean", "pixels"), ADM)
def test_the_crop_of_adm(size, mean, pixels):
    (cropped,) = apply(ADMCenterCrop(256), image(*size)[None])
    assert cropped.shape == (256, 256, 3)
    assert cropped.dtype == np.uint8
    np.testing.assert_allclose(cropped.mean((0, 1)), mean, atol=0.01)
    corners = [cropped[side, side].astype(int) for side in (0, 128, 255)]
    assert np.abs(np.array(corners) - pixels).max() <= 1


def test_enlarging_is_what_latte_does():
    """Its centre crop of 320 x 240 to 256 x 256: two frames, of which the mean and pixels."""
    clip = apply(ResizeCrop(256), image(320, 240)[None].repeat(2, 0))
    assert clip.shape == (2, 256, 256, 3)
    assert (clip[0] == clip[1]).all()
    assert clip.mean() / 255 == pytest.approx(0.49733, abs=1e-3)
    expected = [
        [0.46287, 0.15429, 0.0],
        [0.33726, 0.96937, 0.66728],
        [0.19694, 0.75846, 0.12869],
    ]
    for side, pixel in zip((0, 128, 255), expected, strict=True):
        np.testing.assert_allclose(clip[0, side, side] / 255, pixel, atol=1.5 / 255)


def test_the_square_first_is_what_latte_does_to_skytimelapse():
    square = apply(SquareCrop(), image(320, 240)[None].repeat(2, 0))
    np.testing.assert_array_equal(square[1], image(320, 240)[:, 40:280])
    clip = apply(ResizeCrop(256), square)
    assert clip.mean() / 255 == pytest.approx(0.49734, abs=1e-3)
    expected = [
        [0.47059, 0.15686, 0.0],
        [0.34460, 0.97181, 0.70895],
        [0.20392, 0.76078, 0.20784],
    ]
    for side, pixel in zip((0, 128, 255), expected, strict=True):
        np.testing.assert_allclose(clip[0, side, side] / 255, pixel, atol=1.5 / 255)
    upright = apply(SquareCrop(), image(30, 45)[None])
    np.testing.assert_array_equal(upright[0], image(30, 45)[8:38])


# Heights for which a rounded scale made Latte's own crop one pixel too small, and it raised.
UNLUCKY = [98, 103, 107, 161, 187, 196, 197, 206, 214, 237, 239, 249, 253, 322, 347, 374, 389]


@pytest.mark.parametrize("transform", [ResizeCrop(256), ADMCenterCrop(256)])
def test_sizes_are_exact_for_every_height(transform):
    for height in {*UNLUCKY, *range(64, 1081, 37), 255, 256, 257, 511, 512, 513}:
        for width in (height, height + 1, height * 4 // 3):
            frames = np.full((1, height, width, 3), 77, np.uint8)
            for clip in (frames, frames.transpose(0, 2, 1, 3)):
                resized = apply(transform, clip)
                assert resized.shape == (1, 256, 256, 3)
                assert (resized == 77).all()


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (17, 31)])
@pytest.mark.parametrize("source", [(240, 320), (33, 20), (40, 40)])
def test_any_size_is_covered_and_centred(size, source):
    y, x = np.mgrid[: source[0], : source[1]] + 0.5
    clip = np.stack([y * 255 / source[0], x * 255 / source[1], 0 * x], -1).astype(np.uint8)[None]
    resized = apply(ResizeCrop(size), clip)
    assert resized.shape == (1, *size, 3)
    scale = max(size[0] / source[0], size[1] / source[1])
    for axis in (0, 1):
        shown, pixel = (255 * length / source[axis] for length in (size[axis] / scale, 1))
        levels = resized[0, :, :, axis].mean(1 - axis)
        assert np.ptp(levels) == pytest.approx(shown * (1 - 1 / size[axis]), abs=pixel + 2)
        rounding = 255 / (scale * source[axis])  # to whole pixels of the resized frame
        assert levels.mean() == pytest.approx(127.5, abs=pixel / 2 + rounding + 2)


def test_reducing_has_no_aliasing():
    stripes = np.zeros((1, 256, 256, 3), np.uint8)
    stripes[:, :, ::2] = 255
    for resampling in ("box", "bilinear", "bicubic", "lanczos"):
        inner = apply(ResizeCrop(64, resampling), stripes)[:, :, 4:-4]
        assert np.abs(inner.astype(int) - 127.5).max() <= 10


def test_resampling_is_what_its_name_says():
    clip = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"):
        filter = Image.Resampling[name.upper()]
        expected = [np.asarray(Image.fromarray(f).resize((64, 64), filter)) for f in clip]
        np.testing.assert_array_equal(apply(ResizeCrop(64, name), clip), np.stack(expected))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResizeCrop(64, "bilinaer"), "one of nearest, box, .* got 'bilinaer'"),
        (lambda: ResizeCrop((0, 64)), "positive"),
        (lambda: ADMCenterCrop(0), "positive"),
        (lambda: RandomFlip(1.5), "prob"),
        (lambda: SampleFrames(0), "0 frames"),
        (lambda: SampleFrames(4, 0), "stride 0"),
        (lambda: SampleFrames(4, rule="random"), "one of stride, linspace, slice, got 'random'"),
        (lambda: SampleFrames(4, short="pad"), "one of raise, skip, loop, got 'pad'"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


LINSPACE = {
    (0, 48): [0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31, 34, 37, 40, 43, 47],
    (10, 58): [10, 13, 16, 19, 22, 25, 28, 31, 35, 38, 41, 44, 47, 50, 53, 57],
    (0, 20): [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 19],
    (0, 16): list(range(16)),
}


@pytest.mark.parametrize("window", LINSPACE)
def test_linspace_takes_the_frames_that_latte_takes(window):
    start, end = window
    sampler = SampleFrames(16, 3, "linspace")
    assert sampler.indices(max(end, 16), start).tolist() == LINSPACE[window]


@pytest.mark.parametrize(
    ("total", "last"), [(16, 0), (20, 0), (48, 0), (49, 0), (50, 1), (100, 51)]
)
def test_linspace_starts_where_latte_starts(total, last):
    assert SampleFrames(16, 3, "linspace").last_start(total) == last


@pytest.mark.parametrize(("total", "last"), [(46, 0), (47, 1), (100, 54)])
def test_stride_uses_every_start_that_leaves_room(total, last):
    sampler = SampleFrames(16, 3)
    assert sampler.last_start(total) == last
    assert sampler.indices(total, 0).tolist() == list(range(0, 48, 3))
    assert sampler.indices(total, 5).tolist() == list(range(5, 53, 3))
    assert sampler.indices(total, last)[-1] == total - 1


# Windows of Latte's loaders for folders of frames, and the frames that it takes of them.
SLICE = {0: list(range(0, 48, 3)), 5: list(range(5, 53, 3))}


@pytest.mark.parametrize("start", SLICE)
def test_slice_takes_the_frames_that_latte_takes(start):
    assert SampleFrames(16, 3, "slice").indices(100, start).tolist() == SLICE[start]


@pytest.mark.parametrize(("total", "last"), [(46, 0), (48, 0), (49, 0), (50, 1), (100, 51)])
def test_slice_starts_where_latte_starts(total, last):
    sampler = SampleFrames(16, 3, "slice")
    assert sampler.last_start(total) == last
    assert sampler.indices(total, last)[-1] < total
    assert sampler.needed == 46  # of 20 frames Latte takes 7, and cannot make a batch of them


def sample(sampler, total, monkeypatch, index=0, epoch=0, test_mode=False):
    info = VideoInfo(total, 25.0, 240, 320, total / 25)
    monkeypatch.setattr(loading, "probe_video", lambda path, name: info)
    draws = Draws(0, [index], epoch)
    results = sampler(dict(path="clip.avi", draws=draws, test_mode=test_mode))
    return None if results is None else results["frame_indices"].tolist()


@pytest.mark.parametrize("rule", ["stride", "linspace"])
def test_every_start_comes_and_none_beyond(rule, monkeypatch):
    sampler = SampleFrames(4, 3, rule)
    starts = {sample(sampler, 20, monkeypatch, index=index)[0] for index in range(300)}
    assert starts == set(range(11 if rule == "stride" else 8))
    assert sample(sampler, 20, monkeypatch, index=3, test_mode=True)[0] == 0


@pytest.mark.parametrize(
    ("rule", "total", "expected"),
    [
        ("stride", 9, [0, 3, 6, 0]),
        ("stride", 1, [0, 0, 0, 0]),
        ("linspace", 3, [0, 1, 0, 2]),
        ("linspace", 4, [0, 1, 2, 3]),
    ],
)
def test_short_videos(rule, total, expected, monkeypatch):
    loop = sample(SampleFrames(4, 3, rule, "loop"), total, monkeypatch, test_mode=True)
    assert loop == expected
    enough = rule == "linspace" and total == 4
    if not enough:
        with pytest.raises(MediaError, match=f"clip.avi: {total} frames, .* are needed"):
            sample(SampleFrames(4, 3, rule), total, monkeypatch)
    skipped = sample(SampleFrames(4, 3, rule, "skip"), total, monkeypatch)
    assert (skipped is None) != enough


def test_loops_start_anywhere(monkeypatch):
    sampler = SampleFrames(4, 1, short="loop")
    clips = {tuple(sample(sampler, 3, monkeypatch, index=index)) for index in range(50)}
    assert clips == {(0, 1, 2, 0), (1, 2, 0, 1), (2, 0, 1, 2)}


def test_decoding_reads_what_was_chosen(tmp_path):
    clip = np.random.default_rng(0).integers(0, 256, (9, 8, 10, 3), np.uint8)
    write_video(tmp_path / "clip.png", clip, 8)
    results = dict(path=str(tmp_path / "clip.png"), draws=Draws(0, [0]), test_mode=False)
    results = SampleFrames(3, 2)(results)
    chosen = results["frame_indices"]
    np.testing.assert_array_equal(DecodeVideo()(results)["frames"], clip[chosen])
    whole = DecodeVideo()(dict(path=str(tmp_path / "clip.png")))["frames"]
    np.testing.assert_array_equal(whole, clip)


def test_images_are_loaded_as_one_frame(tmp_path):
    pixels = image(20, 10)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frames = LoadImage()(dict(path=str(tmp_path / "a.png")))["frames"]
    np.testing.assert_array_equal(frames, pixels[None])


def test_a_clip_is_flipped_as_a_whole():
    clip = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    mirrored = 0
    for index in range(200):
        flipped = apply(RandomFlip(), clip, draws=Draws(0, [index]))
        mirrored += not np.array_equal(flipped, clip)
        assert np.array_equal(flipped, clip) or np.array_equal(flipped, clip[:, :, ::-1])
    assert 70 < mirrored < 130
    for prob in (0, 1):
        flipped = apply(RandomFlip(prob), clip, draws=Draws(0, [3]))
        np.testing.assert_array_equal(flipped, clip[:, :, ::-1] if prob else clip)
    results = dict(frames=clip, draws=Draws(0, [3]), test_mode=True)
    np.testing.assert_array_equal(RandomFlip(1)(results)["frames"], clip)


def test_packing():
    clip = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    packed = PackVideo()(dict(frames=clip[:, :, ::-1], index=7, label=2, path="a/b.avi", other=1))
    inputs, data = packed["inputs"], packed["data_samples"]
    assert torch.equal(inputs, torch.from_numpy(clip.copy()).permute(3, 0, 1, 2).flip(-1))
    assert inputs.is_contiguous()
    assert dict(data.items()) == dict(index=7, label=2, path="a/b.avi")
    assert "label" not in PackVideo()(dict(frames=clip, index=7))["data_samples"]


@pytest.mark.parametrize("rule", ["stride", "linspace", "slice"])
def test_part_of_a_video(rule, monkeypatch):
    info = VideoInfo(30, 25.0, 24, 32, 1.2)
    monkeypatch.setattr(loading, "probe_video", lambda path, name: info)
    sampler = SampleFrames(3, 2, rule)
    chosen = [
        sampler(dict(path="a.mp4", cut=(10, 18), draws=Draws(0, [n]), test_mode=False))
        for n in range(99)
    ]
    frames = np.stack([results["frame_indices"] for results in chosen])
    assert frames.min() == 10
    assert frames.max() == {"stride": 17, "linspace": 16, "slice": 15}[rule]
    with pytest.raises(MediaError, match=r"frames 30 to 35 of 30 are no clip"):
        sampler(dict(path="a.mp4", cut=(30, 35), draws=Draws(0, [0]), test_mode=False))
    with pytest.raises(MediaError, match=r"a.mp4: 4 frames, 5 are needed|3 are needed"):
        SampleFrames(3, 2, "stride")(
            dict(path="a.mp4", cut=(26, 99), draws=Draws(0, [0]), test_mode=False)
        )


def test_part_of_the_frames(tmp_path):
    clip = np.random.default_rng(0).integers(0, 256, (5, 8, 10, 3), np.uint8)
    write_video(tmp_path / "clip.png", clip, 8)
    results = dict(path=str(tmp_path / "clip.png"), cut=(1, 4), crop=(2, 9, 1, 5))
    np.testing.assert_array_equal(DecodeVideo()(results)["frames"], clip[1:4, 1:5, 2:9])
    for crop in ((0, 11, 0, 8), (0, 10, 0, 9), (3, 3, 0, 8), (-1, 5, 0, 8)):
        with pytest.raises(MediaError, match="does not fit frames of 8 x 10 pixels"):
            DecodeVideo()(dict(path=str(tmp_path / "clip.png"), crop=crop))


def test_photos_are_videos_of_one_frame(tmp_path):
    Image.fromarray(image(20, 10)).save(tmp_path / "a.JPG")
    results = dict(path=str(tmp_path / "a.JPG"), draws=Draws(0, [0]), test_mode=False)
    still = SampleFrames(3, short="loop")(dict(results))
    assert still["frame_indices"].tolist() == [0, 0, 0]
    assert DecodeVideo()(still)["frames"].shape == (3, 10, 20, 3)
    alone = DecodeVideo()(dict(results))["frames"]
    np.testing.assert_array_equal(alone, LoadImage()(dict(results))["frames"])
    content = (tmp_path / "a.JPG").read_bytes()
    inside = dict(results, path="x.tar/a.jpg", media=content)
    np.testing.assert_array_equal(DecodeVideo()(inside)["frames"], alone)


def test_one_of_several_captions():
    def packed(index, test_mode=False, text=("a", "b", "c")):
        frames = np.zeros((1, 2, 2, 3), np.uint8)
        draws = Draws(0, [index])
        results = dict(frames=frames, text=list(text), draws=draws, test_mode=test_mode)
        return PackVideo()(results)["data_samples"].text

    chosen = [packed(index) for index in range(30)]
    assert set(chosen) == {"a", "b", "c"}
    assert chosen == [packed(index) for index in range(30)]
    assert {packed(index, test_mode=True) for index in range(30)} == {"a"}

"""Every pixel of every clip is in the picture, once, at its size."""

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from mmsora.visualization import contact_sheet, video_grid

RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def places(picture, tile):
    """Where a tile (h, w, 3) is found in a picture (H, W, 3)."""
    windows = sliding_window_view(picture, tile.shape)[:, :, 0]
    return np.argwhere((windows == tile).all(axis=(2, 3, 4))).tolist()


def enlarged(frame, scale):
    """A frame (C, H, W) as (H, W, 3)."""
    frame = np.broadcast_to(np.moveaxis(frame, 0, -1), (*frame.shape[1:], 3))
    return frame.repeat(scale, axis=0).repeat(scale, axis=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("titles", [None, "01234", ["a prompt of very many words"] * 5])
@pytest.mark.parametrize("scale", [1, 3])
def test_a_sheet_shows_each_frame_once_in_order(channels, titles, scale):
    clips = noise(5, channels, 3, 6, 9)
    sheet = contact_sheet(clips, titles, columns=2, scale=scale)
    assert sheet.dtype == np.uint8
    assert sheet.ndim == 3
    found = [[places(sheet, enlarged(clip[:, t], scale)) for t in range(3)] for clip in clips]
    assert all(len(spots) == 1 for row in found for spots in row)
    corners = np.array(found)[:, :, 0]
    assert (np.ptp(corners[:, :, 0], axis=1) == 0).all(), "frames of a clip share a row"
    assert (np.diff(corners[:, :, 1], axis=1) > 9 * scale).all(), "in order, and apart"
    tops, lefts = corners[:, 0].T
    assert len(set(tops)) == 3
    assert len(set(lefts)) == 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("titles", [None, range(5)])
def test_a_grid_plays_all_clips(channels, titles):
    clips = noise(5, channels, 4, 7, 6)
    grid = video_grid(clips, titles, scale=2)
    assert grid.shape[0] == 4
    corners = {
        tuple(map(tuple, places(picture, enlarged(clip[:, t], 2))))
        for t, picture in enumerate(grid)
        for clip in clips
    }
    assert len(corners) == 5, "a clip stays in its place"
    assert all(len(spots) == 1 for spots in corners)


@pytest.mark.parametrize("draw", [contact_sheet, video_grid])
def test_tensors_are_as_good_as_arrays(draw):
    clips = noise(3, 1, 2, 8, 8)
    np.testing.assert_array_equal(draw(torch.from_numpy(clips)), draw(clips))


@pytest.mark.parametrize("draw", [contact_sheet, video_grid])
def test_titles_are_drawn_and_differ(draw):
    clips = np.zeros((2, 1, 2, 32, 32), np.uint8)
    pictures = [draw(clips, titles) for titles in (None, ["3", "7"], ["3", "8"], ["", ""])]
    plain, first, second, blank = (np.atleast_3d(picture) for picture in pictures)
    assert first.size > plain.size
    assert (first != second).any()
    assert first.max() > 200, "legible"
    assert blank.max() < 100


@pytest.mark.parametrize("draw", [contact_sheet, video_grid])
def test_long_titles_are_cut_and_lines_joined(draw):
    clips = np.zeros((2, 1, 2, 32, 32), np.uint8)
    assert draw(clips, ["word " * 100, "a\nb"]).shape == draw(clips, ["word " * 9, "a b"]).shape


@pytest.mark.parametrize("draw", [contact_sheet, video_grid])
@pytest.mark.parametrize("count", [1, 2, 10, 40, 200])
def test_pictures_fit_a_screen(draw, count):
    height, width = draw(np.zeros((count, 1, 8, 16, 16), np.uint8)).shape[-3:-1]
    assert count < 10 or 0.5 < width / height < 4


@pytest.mark.parametrize(("count", "across"), [(10, 5), (40, 8), (1, 1), (3, 3)])
def test_rows_are_filled(count, across):
    clips = np.full((count, 1, 1, 32, 32), 255, np.uint8)
    (first_row,) = {tuple(row) for row in contact_sheet(clips)[10:12, :, 0].tolist()}
    assert first_row.count(255) == across * 32


@pytest.mark.parametrize("draw", [contact_sheet, video_grid])
@pytest.mark.parametrize(
    ("clips", "titles", "told"),
    [
        (np.zeros((2, 1, 3, 8, 8), np.uint8), ["one"], "1 titles for 2 clips"),
        (np.zeros((2, 1, 3, 8, 8), np.uint8), [], "0 titles for 2 clips"),
        (np.zeros((2, 1, 3, 8, 8)), None, "uint8.*float64"),
        (np.zeros((2, 2, 3, 8, 8), np.uint8), None, "1 or 3"),
        (np.zeros((2, 3, 8, 8), np.uint8), None, r"\(2, 3, 8, 8\)"),
        (np.zeros((0, 1, 3, 8, 8), np.uint8), None, "no clips"),
    ],
)
def test_what_cannot_be_drawn_is_told(draw, clips, titles, told):
    with pytest.raises(ValueError, match=told):
        draw(clips, titles)

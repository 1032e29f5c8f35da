"""Clips are functions of (seed, index): real digits, inside the frame, moving as promised."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mmsora.datasets import MovingDigits

CLIPS = range(300)


def trimmed(image):
    """The image without its empty borders, as a key, and where it stood."""
    rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    inner = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return (inner.shape, inner.tobytes()), np.array([rows[0], columns[0]])


DIGITS = load_digits()
IMAGES = np.round(DIGITS.images * 255 / 16).astype(np.uint8)
KNOWN = {trimmed(image)[0]: number for number, image in enumerate(IMAGES)}


def located(frame):
    """Which of scikit-learn's images a frame shows, and where its 8 x 8 pixels stand."""
    key, corner = trimmed(frame)
    number = KNOWN[key]
    return number, corner - trimmed(IMAGES[number])[1]


def tracks(dataset, clips=CLIPS):
    """For each clip: its image, label and positions (T, 2)."""
    for index in clips:
        frames, label = dataset.clip(index)
        numbers, positions = zip(*map(located, frames), strict=True)
        assert len(set(numbers)) == 1
        yield numbers[0], label, np.stack(positions)


def test_the_images_can_be_told_apart():
    assert len(KNOWN) == len(IMAGES) == 1797


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_clip_shows_one_digit_inside_the_frame_and_nothing_else(split):
    for number, label, positions in tracks(MovingDigits(split)):
        assert label == DIGITS.target[number]
        assert positions.min() >= 0
        assert positions.max() <= 16 - 8


def test_digits_reach_every_edge():
    positions = np.concatenate([track for *_, track in tracks(MovingDigits())])
    assert (positions.min(0) == 0).all()
    assert (positions.max(0) == 8).all()


def test_splits_share_no_image_and_cover_all_digits():
    shown = {
        split: {number for number, *_ in tracks(MovingDigits(split), range(4000))}
        for split in ("train", "test")
    }
    assert not shown["train"] & shown["test"]
    assert len(shown["train"]) > 1200  # of about 1440
    assert len(shown["test"]) > 350  # of about 360
    for numbers in shown.values():
        assert set(DIGITS.target[list(numbers)]) == set(range(10))


def test_speed_and_direction():
    """In a frame so large that rounding hardly matters; 200 pixels of room are 25 times 8."""
    dataset = MovingDigits(num_frames=3, frame_size=208)
    steps = [np.diff(track, axis=0) for *_, track in tracks(dataset, range(400))]
    free = np.array([step[0] for step in steps if abs(step[0] - step[1]).max() <= 1])
    speed = np.hypot(*free.T) / 25

    assert len(free) > 100
    assert speed.min() > 0.75 - 0.06
    assert speed.max() < 2.0 + 0.06
    assert speed.min() < 0.85
    assert speed.max() > 1.85
    assert set(map(tuple, np.sign(free))) >= {(1, 1), (1, -1), (-1, 1), (-1, -1)}


def test_digits_move_as_fast_after_a_bounce():
    """Distances along a bouncing track are those along the straight one, mirrored at the walls."""
    dataset = MovingDigits(num_frames=12, frame_size=208)
    bounces = 0
    for *_, track in tracks(dataset, range(50)):
        for axis in range(2):
            step = np.abs(np.diff(track[:, axis]))
            usual = np.median(step)
            touched = (track[:-1, axis] < usual + 2) | (track[:-1, axis] > 200 - usual - 2)
            assert (abs(step[~touched] - usual) <= 1.5).all()
            assert (step <= usual + 1.5).all()
            bounces += (np.diff(np.sign(np.diff(track[:, axis]))) != 0).sum()
    assert bounces > 50


def test_a_clip_is_a_function_of_seed_and_index():
    one, other = MovingDigits(seed=3), MovingDigits(seed=3, length=7)
    other[5]
    for index in 6, 0, 3:
        assert torch.equal(one[index]["inputs"], other[index]["inputs"])
        assert one[index]["data_samples"].label == other[index]["data_samples"].label


def test_seeds_indices_and_splits_give_other_clips():
    datasets = MovingDigits(), MovingDigits(seed=1), MovingDigits(split="test")
    clips = [dataset[index]["inputs"] for dataset in datasets for index in CLIPS]
    assert torch.stack(clips).flatten(1).unique(dim=0).shape[0] == 3 * len(CLIPS)


def test_splits_do_not_share_their_motion():
    train, test = (tracks(MovingDigits(split), range(50)) for split in ("train", "test"))
    same = [(one[2] == two[2]).all() for one, two in zip(train, test, strict=True)]
    assert sum(same) < 3


def test_a_longer_clip_begins_with_the_shorter_one():
    short, long = MovingDigits(), MovingDigits(num_frames=20)
    for index in range(20):
        assert (long.clip(index)[0][:8] == short.clip(index)[0]).all()


def test_what_a_model_gets():
    dataset = MovingDigits(length=9)
    item = dataset[4]
    inputs, sample = item["inputs"], item["data_samples"]
    assert len(dataset) == 9
    assert (inputs.shape, inputs.dtype) == ((1, 8, 16, 16), torch.uint8)
    assert (sample.index, sample.label) == (4, dataset.clip(4)[1])
    assert type(sample.index) is type(sample.label) is int
    assert dataset.metainfo == {"classes": tuple("0123456789")}


@pytest.mark.parametrize(
    ("frames", "frame", "digit"), [(1, 16, 8), (5, 32, 8), (3, 40, 20), (4, 8, 8), (2, 16, 4)]
)
def test_sizes_are_free(frames, frame, digit):
    dataset = MovingDigits(num_frames=frames, frame_size=frame, digit_size=digit)
    clips = np.stack([dataset.clip(index)[0] for index in CLIPS])
    assert clips.shape[1:] == (frames, frame, frame)
    assert clips.any((2, 3)).all()
    extents = [np.ptp(np.nonzero(clip[0]), axis=1).max() + 1 for clip in clips]
    assert digit * 0.8 < max(extents) <= digit


def test_iteration_ends():
    assert len(list(MovingDigits(length=3))) == 3
    for index in 3, -1:
        with pytest.raises(IndexError, match=f"no clip {index}, there are 3 clips"):
            MovingDigits(length=3)[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(split="val"), "'train' or 'test', got 'val'"),
        (dict(digit_size=17), "digits of 17 px do not fit frames of 16 px"),
    ],
)
def test_impossible_datasets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MovingDigits(**arguments)


def test_channels_are_all_alike():
    grey, coloured = MovingDigits(num_frames=3)[7], MovingDigits(num_frames=3, channels=3)[7]
    assert coloured["inputs"].shape == (3, 3, 16, 16)
    assert all(torch.equal(channel[None], grey["inputs"]) for channel in coloured["inputs"])

"""A judge is itself judged: by real clips, and by clips that must not pass."""

import json

import numpy as np
import pytest

from mmsora.datasets import MovingDigits
from mmsora.evaluation import DigitJudge, motion, nearest_distances, report

COUNT = 200
RNG = np.random.default_rng(0)


def drawn(dataset, start=0, count=COUNT):
    clips, labels = zip(*map(dataset.clip, range(start, start + count)), strict=True)
    return np.stack(clips), np.array(labels)


@pytest.fixture(scope="module")
def train():
    return MovingDigits("train", length=4000)


@pytest.fixture(scope="module")
def test_split():
    return MovingDigits("test")


@pytest.fixture(scope="module")
def judge(train):
    return DigitJudge(train)


@pytest.fixture(scope="module")
def held_out(test_split):
    """Real clips that the report does not compare with."""
    return drawn(test_split, start=1000)


def test_held_out_digits_are_read(judge, held_out):
    clips, labels = held_out
    assert (judge.read(clips) == labels).mean() >= 0.97


def test_faint_noise_does_not_blind_the_judge(judge, held_out):
    clips, labels = held_out
    noisy = np.clip(clips + RNG.normal(0, 5, clips.shape), 0, 255).astype(np.uint8)
    assert (judge.read(noisy) == labels).mean() >= 0.95


@pytest.mark.parametrize("size", [dict(frame_size=8), dict(frame_size=24, digit_size=12)])
def test_other_sizes(size):
    judge = DigitJudge(MovingDigits("train", length=2000, **size))
    clips, labels = drawn(MovingDigits("test", **size))
    assert (judge.read(clips) == labels).mean() >= 0.95


def test_frames_vote(judge, test_split, held_out):
    """Most frames of one clip and few of another read as the first; as many, as either."""
    clips, _ = held_out
    readings = judge.read(clips)
    one, other = (clips[readings == digit][0] for digit in (0, 1))
    frames = len(one)
    for mine in range(frames + 1):
        mixed = np.concatenate([one[:mine], other[mine:]])
        reading = judge.read(mixed[None])[0]
        assert reading in ({0, 1} if 2 * mine == frames else {0 if 2 * mine > frames else 1})


def test_motion_of_a_known_path():
    clips = np.zeros((2, 4, 16, 16), np.uint8)
    for frame in range(4):
        clips[0, frame, 3 * frame + 1, 4 * frame + 2] = 200  # 5 pixels a frame
        clips[1, frame, 8, 8] = 200
    assert motion(clips[:1]) == pytest.approx(5)
    assert motion(clips) == pytest.approx(2.5)


@pytest.mark.parametrize(
    "clips",
    [np.zeros((2, 4, 8, 8), np.uint8), np.full((2, 4, 8, 8), 9, np.uint8)],
    ids=["black", "grey"],
)
def test_what_stands_still_has_no_speed(clips):
    assert motion(clips) == 0
    assert motion(clips[:, :1]) == 0


@pytest.mark.parametrize("chunk", [7, 50, 1000])
def test_distances_are_those_of_brute_force(train, held_out, chunk):
    known, _ = drawn(train, count=50)
    clips = held_out[0][:20]
    differences = (clips[:, None] / 255 - known[None] / 255).reshape(20, 50, -1)
    expected = np.sqrt((differences**2).mean(-1)).min(1)
    np.testing.assert_allclose(nearest_distances(clips, known, chunk), expected, rtol=1e-6)


def test_a_copy_has_distance_zero(train):
    known, _ = drawn(train, count=300)
    assert (nearest_distances(known[100:200], known) == 0).all()


def test_real_clips_are_reported_as_real(train, test_split, held_out):
    figures = report(*held_out, train, test_split)
    assert figures == json.loads(json.dumps(figures))
    passed = figures["passed"]
    assert passed["accuracy"] is True
    assert passed["accuracy_held_out"] is True
    assert passed["speed_ratio"] is True
    assert figures["accuracy_held_out"] >= 0.97
    assert figures["speed_ratio"] == pytest.approx(1, abs=0.1)
    # Both are held-out clips, so that the medians differ by chance alone.
    assert figures["nearest_train"] == pytest.approx(figures["nearest_train_held_out"], rel=0.1)
    assert set(figures["accuracy_per_digit"]) == set("0123456789")
    assert figures["num_clips"] == COUNT
    assert figures["num_held_out"] == 500
    assert set(passed) == set(figures["thresholds"])


@pytest.mark.parametrize(
    ("spoil", "failed"),
    [
        (lambda clips, labels: (clips, RNG.permutation(labels)), {"accuracy"}),
        (lambda clips, labels: (RNG.integers(0, 256, clips.shape, np.uint8), labels), None),
        (lambda clips, labels: (clips[:, :1].repeat(8, axis=1), labels), {"speed_ratio"}),
        (lambda clips, labels: (np.zeros_like(clips), labels), None),
    ],
    ids=["shuffled labels", "noise", "still", "black"],
)
def test_what_must_not_pass_does_not(train, test_split, held_out, spoil, failed):
    figures = report(*spoil(*held_out), train, test_split)
    wrong = {name for name, passed in figures["passed"].items() if not passed}
    assert (failed or {"accuracy", "speed_ratio"}) <= wrong
    if "accuracy" in wrong:
        assert figures["accuracy"] < 0.25
    assert "accuracy_held_out" not in wrong


def test_copies_of_the_training_clips_do_not_pass(train, test_split):
    figures = report(*drawn(train), train, test_split)
    assert figures["nearest_train"] == 0
    assert figures["passed"]["nearest_train"] is False


def test_real_clips_that_cannot_move_ask_for_no_motion():
    splits = [MovingDigits(split, length=500, frame_size=8) for split in ("train", "test")]
    figures = report(*drawn(splits[1]), *splits)
    assert figures["speed_ratio"] is None
    assert figures["passed"]["speed_ratio"] is True


@pytest.mark.parametrize(
    ("clips", "labels", "told"),
    [
        (np.zeros((2, 1, 8, 16, 16), np.uint8), np.zeros(2), r"\(N, T, H, W\)"),
        (np.zeros((2, 8, 16, 16)), np.zeros(2), "uint8"),
        (np.zeros((2, 8, 16, 16), np.uint8), np.zeros(3), "labels are"),
        (np.zeros((2, 4, 16, 16), np.uint8), np.zeros(2), r"\(4, 16, 16\) against"),
    ],
)
def test_what_cannot_be_judged_is_told(train, test_split, clips, labels, told):
    with pytest.raises(ValueError, match=told):
        report(clips, labels, train, test_split)

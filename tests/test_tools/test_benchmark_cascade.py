"""``tools/benchmark.py cascade``: three stages on moving digits, images first."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmsora.datasets import MovingDigits
from mmsora.utils.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cascade():
    """The module, imported as it is by a script in ``tools``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        patch.chdir(ROOT)
        from benchmarks import cascade, cascade_codecs

        patch.setattr(cascade, "WIDTH", 8)
        patch.setattr(cascade, "HEADS", 2)
        patch.setattr(cascade, "BATCHES", {"image": 4, "video": 2})
        patch.setattr(cascade, "STEPS", {"c": 2, "b": 2})
        patch.setattr(cascade_codecs, "FRAMES", 80)
        yield cascade


@pytest.fixture(scope="module")
def run(cascade, tool, tmp_path_factory):
    """The folder of a run of two iterations, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("cascade"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
        patch.setattr(cascade, "DigitJudge", lambda train: Judge())
        words = f"cascade --iters 4 --clips 3 --work-dir {folder} --out {folder}/o.json"
        words += " --processes 1"
        tool("benchmark").main([*words.split(), "--plot", f"{folder}/p.png"])
    return folder, "\n".join(printed)


class Judge:
    """Reads twos everywhere."""

    def read(self, clips):
        return np.full(len(clips), 2)


def clips(cascade, count=40):
    digits = MovingDigits(**cascade.data_of(cascade.FRAMES, "test", count))
    return np.stack([digits.clip(i)[0] for i in range(count)])


def test_the_table_is_what_was_measured(run):
    folder, printed = run
    figures = json.loads((folder / "o.json").read_text())["figures"]
    assert list(figures)[:2] == ["images, frame by frame", "video"]
    for name, row in figures.items():
        cells = [f"{row['read_right']:.1%}", *(f"{row[k]:.2f}" for k in ("speed", "jolt"))]
        assert f"| {name} | {' | '.join(cells)} | {row['reshaping']:.3f} |" in printed
    assert figures["video"]["read_right"] == pytest.approx(1 / 3)
    assert Image.open(folder / "p.png").width > 500


def test_jobs_of_several_processes_are_those_of_one(cascade):
    jobs = {str(size): partial(np.full, 2, size) for size in (3, 5, 4)}
    seconds = {}
    for processes in (1, 2):
        found = cascade.at_once(jobs, processes, seconds)
        assert {name: made.tolist() for name, made in found.items()} == {
            "3": [3, 3],
            "5": [5, 5],
            "4": [4, 4],
        }
        assert seconds.keys() == jobs.keys()


def test_the_video_stages_are_the_image_stages_and_temporal_layers(run):
    for stage in "cb":
        image = load_checkpoint(next((run[0] / f"{stage}_image").glob("iter_*")))["ema"]
        video = load_checkpoint(next((run[0] / f"{stage}_video").glob("iter_*")))["state_dict"]
        kept = {k.removeprefix("denoiser.image."): v for k, v in video.items() if ".image." in k}
        assert kept.keys() == image.keys()
        assert all(torch.equal(kept[key], image[key]) for key in image)
        assert any("denoiser.temporal." in key for key in video)


def test_a_jolt_is_a_change_of_the_step(cascade):
    frames = np.zeros((1, 4, 32, 32), np.uint8)
    for frame, (row, column) in zip(frames[0], [(4, 4), (6, 4), (8, 4), (8, 7)], strict=True):
        frame[row : row + 16, column : column + 16] = 200
    steps = np.diff(cascade.positions(frames), axis=1)
    assert steps.tolist() == [[[2, 0], [2, 0], [0, 3]]]
    assert cascade.jolt(frames) == pytest.approx((0 + 13**0.5) / 2)
    faint = np.where(frames == 0, 60, frames).astype(np.uint8)  # noise is not the digit
    assert cascade.jolt(faint) == cascade.jolt(frames)


def test_measures_tell_real_clips_from_shuffled_ones(cascade):
    real = clips(cascade)
    frames = real.reshape(-1, *real.shape[2:])
    mixed = np.random.default_rng(0).permutation(frames).reshape(real.shape)
    assert cascade.reshaping(real) < 0.02
    assert cascade.reshaping(mixed) > 0.2
    assert cascade.jolt(mixed) > 4 * cascade.jolt(real)


def test_nothing_to_see_is_not_smooth(cascade):
    black = np.zeros((2, 8, 32, 32), np.uint8)
    row = cascade.measure(black, np.array([0, 1]), Judge())
    assert row["speed"] == row["jolt"] == 0
    smooth = dict(read_right=0.9, jolt=1.0)
    shaky = dict(read_right=0.9, jolt=9.0)
    assert cascade.moves_more_smoothly(smooth, shaky)
    assert not cascade.moves_more_smoothly(shaky, smooth)
    assert not cascade.moves_more_smoothly(smooth | {"read_right": 0.2}, shaky)

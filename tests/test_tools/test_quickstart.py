"""``tools/quickstart.py``: from nothing to a report."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsora.utils.config_names import load_config
from mmsora.utils.video_io import read_video

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quickstart(tool):
    return tool("quickstart")


def test_it_trains_samples_judges_and_reports(
    quickstart, tmp_path, tiny_options, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    options = {
        **tiny_options,
        "experiment_name": "quickstart",
        "model.denoiser.size": (2, 12, 12),
        "train_dataloader.dataset.frame_size": 12,
        "train_dataloader.dataset.length": 300,
    }
    out = tmp_path / "quickstart"
    out.mkdir()
    (out / "iter_999").mkdir()  # of an earlier run
    quickstart.main(
        [
            *("--minutes", "0.1", "--max-iters", "3", "--num-clips", "10", "--work-dir", str(out)),
            *("--cfg-options", *(f"{key}={value}" for key, value in options.items())),
        ]
    )
    assert [path.name for path in out.glob("iter_*")] == ["iter_3"]
    content = np.load(out / "samples.npz")
    assert content["clips"].shape == (10, 2, 12, 12)
    assert content["clips"].dtype == np.uint8
    assert content["labels"].tolist() == list(range(10))
    assert min(Image.open(out / "samples.png").size) > 100
    assert len(read_video(out / "samples.mp4")) == 2
    report = json.loads((out / "report.json").read_text())
    assert report["num_clips"] == 10
    assert report["iterations"] == 3
    assert report["precision"] in ("off", "bf16")
    assert 0 <= report["accuracy"] <= 1
    assert report["accuracy_held_out"] > 0.5  # of 300 clips little is learnt
    assert 0 < report["training_seconds"] < report["seconds"]
    assert report["cpu_seconds"] > 0
    assert report["peak_memory_mib"] > 100
    assert report["checkpoint"] == str(out / "iter_3")
    assert {"speed_ratio", "nearest_train", "nearest_train_held_out", "passed"} <= set(report)
    printed = capsys.readouterr().out
    assert "3 iterations in" in printed
    assert "sampled 10 of 10 clips" in printed
    assert "[quickstart] look at" in printed


@pytest.mark.parametrize("iters", [1, 40, 4000])
def test_the_schedule_fits_the_length(quickstart, iters):
    cfg = load_config("latte_moving_digits")
    quickstart.set_length(cfg, iters)
    warmup, decay = cfg.param_scheduler
    assert cfg.train_cfg.max_iters == iters
    assert decay.end == max(iters, 2)
    assert warmup.end == decay.begin == {1: 1, 40: 8, 4000: 200}[iters]
    samples = next(hook for hook in cfg.custom_hooks if "labels" in hook)
    assert samples.interval == max(iters // 4, 1)


def test_as_many_iterations_as_fit_the_time(quickstart, monkeypatch):
    speeds = {"off": 0.1, "bf16": 0.05}
    monkeypatch.setattr(quickstart, "seconds_per_step", lambda cfg, name, device: speeds[name])
    for minutes, iters in ((1, int(60 * quickstart.SHARE_OF_TRAINING / 0.05)), (600, 4000)):
        cfg = load_config("latte_moving_digits")
        quickstart.fit_to_budget(cfg, quickstart.parse_args(["--minutes", str(minutes)]))
        assert cfg.optim_wrapper.precision == "bf16"
        assert cfg.train_cfg.max_iters == iters


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--config", "latte_moving_digit"], "did you mean latte_moving_digits?"),
        (["--cfg-options", "model.denoiser.detph=2"], "did you mean 'model.denoiser.depth'?"),
        (["--cfg-options", "model.denoiser.size=(8,15,15)"], "is not divisible by patch"),
    ],
)
def test_a_mistake_is_one_line(quickstart, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        quickstart.main(["--work-dir", str(tmp_path / "run"), *arguments])
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1

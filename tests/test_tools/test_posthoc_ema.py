"""``tools/posthoc_ema.py``: snapshots become another average, and what is said of mistakes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook

from mmsora.apis import Inferencer
from mmsora.apis.build import build_model
from mmsora.engine import ConstantEMA, PowerEMA
from mmsora.registry import RUNNERS
from mmsora.utils.checkpoint import load_checkpoint
from mmsora.utils.video_io import read_video

ROOT = Path(__file__).parents[2]
STEPS = 64


class Record(Hook):
    """The weights after each optimizer step, in float64."""

    def before_train(self, runner):
        self.weights = []
        self.after_train_iter(runner)

    def after_train_iter(self, runner, *args, **kwargs):
        own = runner.model.denoiser.named_parameters()
        self.weights.append({k: v.detach().double() for k, v in own if v.requires_grad})

    def average(self, profile, steps):
        """The recurrence."""
        found = self.weights[0]
        for step in range(1, steps + 1):
            decay, new = profile.decay_at(step), self.weights[step]
            found = {k: decay * found[k] + (1 - decay) * new[k] for k in found}
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run with 16 snapshots of two profiles, its config, and its weights."""
    from tests.conftest import tiny

    changes = {
        "train_cfg.max_iters": STEPS,
        "param_scheduler.1.eta_min": 1e-2,  # the weights move to the end
        "custom_hooks.0.profiles": [dict(type="PowerEMA", sigma_rel=s) for s in (0.05, 0.10)],
        "custom_hooks.0.snapshot_interval": STEPS // 16,
    }
    cfg = tiny(tmp_path_factory.mktemp("posthoc") / "run", changes)
    runner, record = RUNNERS.build(cfg), Record()
    runner.register_hook(record)
    runner.train()
    return Path(cfg.work_dir), cfg, record


@pytest.fixture
def make(run, tool, tmp_path):
    """Call it with options to get the file's content."""

    def call(*options, out=tmp_path / "ema.pth"):
        tool("posthoc_ema").main([str(run[0]), *map(str, options), "--out", str(out)])
        return load_checkpoint(out)

    return call


def relative(found, true):
    """Over all weights."""
    square = sum(float((found[k].double() - true[k]).square().sum()) for k in true)
    return (square / sum(float(true[k].square().sum()) for k in true)) ** 0.5


@pytest.mark.parametrize(
    ("options", "profile", "steps"),
    [
        (["--sigma-rel", 0.15], PowerEMA(0.15), STEPS),
        (["--sigma-rel", 0.075], PowerEMA(0.075), STEPS),
        (["--gamma", 10, "--step", 48], PowerEMA(gamma=10), 48),
        (["--decay", 0.8], ConstantEMA(0.8), STEPS),
        (["--sigma-rel", 0.1, "--step", 32], PowerEMA(0.1), 32),  # as it was kept
    ],
    ids=lambda value: str(value),
)
def test_32_averages_of_a_training_make_another_to_a_thousandth(
    run, make, capsys, options, profile, steps
):
    content = make(*options)
    printed = capsys.readouterr()
    assert f"{profile} at step {steps} from 32 averages, its profile met to " in printed.out
    assert printed.err == ""
    true = run[2].average(profile, steps)
    assert relative(content["ema"], true) < 1e-3
    assert relative(run[2].weights[-1], true) > 1e-2  # the average is not the end of training
    assert {value.dtype for value in content["ema"].values()} == {torch.float32}
    assert content["meta"]["ema"]["error"] < 0.05
    assert content["meta"]["ema"]["steps"] == steps


def test_the_file_is_sampled_with_and_without_its_config(run, make, tool, tmp_path):
    work_dir, cfg, _ = run
    ema = make("--sigma-rel", 0.15)["ema"]
    models = build_model(cfg, tmp_path / "ema.pth"), Inferencer(tmp_path / "ema.pth").model
    for model in models:
        own = model.denoiser.state_dict()
        assert own.keys() == ema.keys()
        assert all(torch.equal(own[key], ema[key]) for key in ema)
    cfg.dump(tmp_path / "named.py")
    frames = []
    for arguments in ([str(tmp_path / "named.py")], []):
        out = tmp_path / f"samples{len(frames)}"
        files = ["--checkpoint", str(tmp_path / "ema.pth"), "--out", str(out)]
        tool("infer").main([*arguments, *files, "--labels", "3", "--format", "png"])
        frames.append(read_video(out / "0000_label3_seed0.png"))
    assert np.array_equal(*frames)


def test_by_default_it_lies_in_the_runs_directory(run, tool):
    tool("posthoc_ema").main([str(run[0]), "--sigma-rel", "0.1"])
    assert (run[0] / "ema.pth").is_file()


def test_a_profile_that_the_snapshots_do_not_make_up_is_warned_of(make, capsys):
    make("--sigma-rel", 0.1, "--step", 61)
    error = capsys.readouterr().err
    assert error.startswith("warning: the snapshots hardly make up this profile")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sigma-rel", 0.1, "--step", 65], "step must be in 1 to 64, the last one kept; got 65"),
        (["--sigma-rel", 0.1, "--step", 0], "step must be in 1 to 64"),
        (["--sigma-rel", 0.3], "sigma_rel must be above 0 and at most 0.2886"),
        (["--decay", 1], "decay must be in [0, 1), got 1.0"),
        ([], "one of the arguments --sigma-rel --gamma --decay is required"),
        (["--sigma-rel", 0.1, "--gamma", 3], "not allowed with argument"),
    ],
)
def test_a_mistake_is_one_line(make, capsys, tmp_path, options, words):
    with pytest.raises(SystemExit) as caught:
        make(*options)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "ema.pth").exists()


def test_a_run_without_snapshots_and_a_file_that_is_none(tool, tiny_run, tmp_path, capsys):
    def fails(run_dir):
        with pytest.raises(SystemExit) as caught:
            tool("posthoc_ema").main([str(run_dir), "--sigma-rel", "0.1"])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "holds no EMA snapshots; train with DenoiserEMAHook(profiles=" in fails(tiny_run)
    file = tmp_path / "ema_snapshots/step_00000004.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"half")
    assert "step_00000004.safetensors is truncated or no EMA snapshot" in fails(tmp_path)
    assert not (tmp_path / "ema.pth").exists()


def test_help_loads_nothing_heavy():
    code = """
import runpy, sys
sys.argv = ["tools/posthoc_ema.py", "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not {"torch", "mmengine", "numpy"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: posthoc_ema.py" in result.stdout

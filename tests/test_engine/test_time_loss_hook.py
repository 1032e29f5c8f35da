"""Losses by time: against means taken by hand, by processes, and with nothing waited for."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from torch.utils._python_dispatch import TorchDispatchMode

from mmsora.diffusion import DiscretePath, LinearPath, VEPath
from mmsora.diffusion.process import TrainedTimes
from mmsora.engine import DenoiserWork, ReportHook, TelemetryHook, TimeLossHook
from mmsora.engine.hooks import time_loss_hook
from mmsora.registry import RUNNERS
from mmsora.structures.video_sample import VideoSample

ROOT = Path(__file__).parents[2]


class Board:
    """What a visualizer and a logger were given."""

    def __init__(self):
        self.shown, self.said = [], []

    def add_scalars(self, values, step):
        self.shown.append((step, values))

    def info(self, text):
        self.said.append(text)


def run_of(path, batches):
    """A runner that goes through batches of (times, losses, weights)."""
    board = Board()
    model = SimpleNamespace(diffusion=SimpleNamespace(), last_batch=None)
    runner = SimpleNamespace(model=model, visualizer=board, logger=board, iter=0)

    def step(hook, number):
        t, losses, weights = batches[number]
        t, losses = torch.tensor(t, dtype=torch.float64), torch.tensor(losses)
        model.diffusion.last_times = TrainedTimes(path, t, losses)
        samples = [VideoSample(weight=weight) for weight in weights]
        model.last_batch = SimpleNamespace(samples=samples)
        runner.iter = number
        hook.after_train_iter(runner, number)

    return runner, step, board


def test_means_of_parts_weights_and_intervals():
    nan = float("nan")
    batches = [
        ([0.05, 0.95, 0.3], [1.0, 2.0, 8.0], [1.0, 1.0, 0.0]),  # a stand-in counts for nothing
        ([0.099, 0.9, 0.1], [4.0, 5.0, 7.0], [3.0, 1.0, 1.0]),
        ([0.5, 0.51, 0.5], [nan, 6.0, float("inf")], [1.0, 1.0, 1.0]),
        ([0.2, 0.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]),
    ]
    hook = TimeLossHook(interval=2)
    runner, step, board = run_of(LinearPath(), batches)
    hook.before_train(runner)
    for number in range(4):
        step(hook, number)
    (first, one), (second, other) = board.shown
    assert (first, second) == (2, 4)
    assert one == pytest.approx(
        {"loss/t_0.0-0.1": 13 / 4, "loss/t_0.1-0.2": 7.0, "loss/t_0.9-1.0": 3.5, "iter": 2}
    )
    assert other == pytest.approx(
        {
            "loss/t_0.0-0.1": 2.0,
            "loss/t_0.2-0.3": 1.0,
            "loss/t_0.5-0.6": 6.0,
            "loss/t_0.9-1.0": 3.0,
            "iter": 4,
        }
    )
    assert board.said[0].endswith("to noise: 3.2500 7.0000 - - - - - - - 3.5000")


@pytest.mark.parametrize("path", [DiscretePath(), VEPath(), LinearPath()])
def test_uniform_times_fill_all_parts_alike(path):
    fraction = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    place = (fraction * 10).floor()
    batches = [(path.time_at(fraction).tolist(), place.tolist(), [1.0] * 1000)]
    hook = TimeLossHook(interval=1)
    runner, step, board = run_of(path, batches)
    hook.before_train(runner)
    step(hook, 0)
    assert list(board.shown[0][1].values()) == pytest.approx([*range(10), 1])


def test_parts_of_two_digits():
    assert TimeLossHook(buckets=4).names[1] == "loss/t_0.25-0.50"
    with pytest.raises(ValueError, match="must be positive, got 0 and 10"):
        TimeLossHook(interval=0)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def call(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        self.count += func.overloadpacket in waiting
        return func(*args, **(kwargs or {}))


def test_nothing_is_waited_for_but_at_the_interval(monkeypatch):
    hook = TimeLossHook(interval=3)
    runner, step, board = run_of(LinearPath(), [([0.1, 0.7], [1.0, 2.0], [1.0, 1.0])] * 3)
    hook.before_train(runner)
    step(hook, 0)
    losses = runner.model.diffusion.last_times
    with Waits(monkeypatch) as waits:
        runner.iter = 1
        hook.after_train_iter(runner, 1)
        assert waits.count == 0
        runner.iter = 2
        hook.after_train_iter(runner, 2)
        assert waits.count == 1
    assert losses.losses.sum() == 3
    assert board.shown


@pytest.mark.parametrize("interval", [100, 2])
def test_no_hook_of_a_run_waits_but_at_the_interval(tiny_config, monkeypatch, interval):
    waits = Waits(monkeypatch)

    def watched(method):
        def call(*args, **kwargs):
            before = waits.count
            with waits:
                method(*args, **kwargs)
            seen.append(waits.count - before)

        return call

    seen = []
    for place, name in (
        (TelemetryHook, "before_train_iter"),
        (TelemetryHook, "after_train_iter"),
        (TimeLossHook, "after_train_iter"),
        (ReportHook, "after_train_iter"),
        (DenoiserWork, "_note"),
    ):
        monkeypatch.setattr(place, name, watched(getattr(place, name)))
    hooks = ("telemetry", "time_loss", "report")
    intervals = {f"default_hooks.{name}.interval": interval for name in hooks}
    RUNNERS.build(tiny_config(intervals | {"train_cfg.max_iters": 3})).train()
    assert len(seen) == 15
    assert sum(seen) == (0 if interval == 100 else 1)


def test_a_model_without_diffusion_is_left_alone():
    hook = TimeLossHook(interval=1)
    hook.after_train_iter(SimpleNamespace(model=SimpleNamespace(), iter=0), 0)


def test_the_halves_of_a_batch_give_the_figures_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    t, losses = rng.random(8).tolist(), rng.random(8).tolist()
    weights = [1.0, 0.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0]
    sums, shown = [], []

    def ranks(others):
        return lambda values: (sums.append(values.clone()), values.add_(others))

    for others, part in ((0, slice(0, 4)), (None, slice(4, 8)), (0, slice(0, 8))):
        reduced = ranks(sums[0] if others is None else 0)
        monkeypatch.setattr(time_loss_hook, "all_reduce", reduced)
        batch = tuple(values[part] for values in (t, losses, weights))
        hook = TimeLossHook(interval=1)
        runner, step, board = run_of(LinearPath(), [batch])
        hook.before_train(runner)
        step(hook, 0)
        shown.append(board.shown)
    assert shown[1][0][1] == pytest.approx(shown[2][0][1], rel=1e-12)
    assert shown[0] != shown[2]


class Recorder(Hook):
    """Keeps what every iteration cost, and where."""

    def __init__(self):
        self.t, self.losses = [], []

    def after_train_iter(self, runner, *args, **kwargs):
        times = runner.model.diffusion.last_times
        assert not times.losses.requires_grad
        self.t += times.t.tolist()
        self.losses += times.losses.tolist()


def of_time(scalars, work_dir):
    return [line for line in scalars(work_dir) if any("loss/t_" in name for name in line)]


def test_a_run_of_one_process_and_of_two(tiny_config, tmp_path, scalars):
    every = {"default_hooks.time_loss.interval": 3, "model.conditioner.drop_prob": 0.5}
    cfg = tiny_config(every, work_dir=tmp_path / "one")
    config = tmp_path / "config.py"
    cfg.dump(config)
    runner, recorder = RUNNERS.build(cfg), Recorder()
    runner.register_hook(recorder)
    runner.train()
    lines = of_time(scalars, tmp_path / "one")
    assert [line["step"] for line in lines] == [3, 6]
    for line, part in zip(lines, (slice(0, 12), slice(12, 24)), strict=True):
        t, losses = np.array(recorder.t[part]), np.array(recorder.losses[part])
        bucket = (t * 10).astype(int)
        expected = {
            f"loss/t_{b / 10:.1f}-{(b + 1) / 10:.1f}": losses[bucket == b].mean()
            for b in sorted(set(bucket))
        }
        assert line == pytest.approx(expected | {"iter": line["step"], "step": line["step"]})

    command = ["bash", "tools/dist_train.sh", config, "2", "--work-dir", tmp_path / "two"]
    options = ["train_dataloader.batch_size=2", "experiment_name=two_time_loss"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [*command, "--cfg-options", *options],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    both = of_time(scalars, tmp_path / "two")
    assert both[0] == pytest.approx(lines[0], rel=1e-4)
    assert both[1] == pytest.approx(lines[1], rel=1e-2)  # Adam makes much of rounding
    assert len(list((tmp_path / "two").glob("*/vis_data/run.json"))) == 1
    assert (tmp_path / "two/report.html").is_file()

"""The figures in the log against counted ones."""

import os
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from mmsora.datasets import MovingDigits
from mmsora.engine import MeanLossHook, peak_memory
from mmsora.engine.hooks import telemetry_hook
from mmsora.registry import RUNNERS


class Clock:
    """A clock that only goes on when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


class Spend(Hook):
    """Every iteration computes for ``compute`` seconds and hooks then take ``hooks`` seconds."""

    def __init__(self, clock, compute, hooks):
        self.clock, self.compute, self.hooks = clock, compute, hooks

    def before_train_iter(self, runner, *args, **kwargs):
        self.clock.now += self.compute

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter:
            self.clock.now += self.hooks


def slow_down(clock, monkeypatch):
    """A batch of four takes a second."""
    draw = MovingDigits.__getitem__

    def slow(self, index):
        clock.now += 0.25
        return draw(self, index)

    monkeypatch.setattr(MovingDigits, "__getitem__", slow)


@pytest.mark.parametrize("world", [1, 4])
def test_rates_and_waiting_are_those_of_the_clock(tiny_config, scalars, monkeypatch, world):
    clock = Clock()
    monkeypatch.setattr(telemetry_hook, "time", clock)
    monkeypatch.setattr(telemetry_hook, "get_world_size", lambda: world)
    every = {"default_hooks.telemetry.interval": 2, "default_hooks.logger.interval": 2}
    cfg = tiny_config(every)
    del cfg.default_hooks.mean_loss  # there is one rank, after all
    runner = RUNNERS.build(cfg)
    runner.register_hook(Spend(clock, compute=3.0, hooks=0.0), priority="LOWEST")
    slow_down(clock, monkeypatch)
    runner.train()
    lines = scalars(cfg.work_dir)
    assert [line["step"] for line in lines] == [2, 4, 6]
    tokens = 2 * 2 * 2  # frames, rows, columns of patches
    for line, seconds, waited in zip(lines, (7.0, 8.0, 8.0), (1.0, 2.0, 2.0), strict=True):
        rate = 2 * 4 * world / seconds
        assert line["samples/s"] == pytest.approx(rate)
        assert line["tokens/s"] == pytest.approx(rate * tokens)
        assert line["data_wait"] == pytest.approx(waited / seconds)


def test_waiting_is_a_share_whatever_hooks_take(tiny_config, scalars, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(telemetry_hook, "time", clock)
    runner = RUNNERS.build(tiny_config())
    runner.register_hook(Spend(clock, compute=1.0, hooks=9.0), priority="LOWEST")
    runner.train()
    assert [line["data_wait"] for line in scalars(runner.work_dir)] == [0] * 6


def test_what_a_resumed_run_skips_is_not_counted(tiny_config, tiny_run, scalars, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(telemetry_hook, "time", clock)
    cfg = tiny_config()
    cfg.resume, cfg.load_from = True, str(tiny_run / "iter_3.pth")
    runner = RUNNERS.build(cfg)
    runner.register_hook(Spend(clock, compute=1.0, hooks=0.0), priority="LOWEST")
    slow_down(clock, monkeypatch)
    runner.train()
    rates = [line["samples/s"] for line in scalars(cfg.work_dir)]
    assert rates == pytest.approx([4.0, 2.0, 2.0])


def test_memory_is_in_mib(tiny_run, scalars):
    """Between what this process holds and what the machine has."""
    page = os.sysconf("SC_PAGE_SIZE")
    held = int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20
    assert 0.9 * held < peak_memory() < os.sysconf("SC_PHYS_PAGES") * page / 2**20
    logged = [line["memory"] for line in scalars(tiny_run)]
    assert logged == sorted(logged)
    assert 100 < logged[-1] <= peak_memory()


def test_losses_are_averaged_over_ranks(monkeypatch):
    """With real ranks in test_runner.py."""
    monkeypatch.setattr(telemetry_hook, "get_world_size", lambda: 2)
    monkeypatch.setattr(telemetry_hook, "all_reduce", lambda values, op: values.add_(1))
    outputs = {"loss": torch.tensor(1.0), "loss_diffusion": torch.tensor(3.0)}
    MeanLossHook().after_train_iter(None, 0, outputs=outputs)
    assert outputs == {"loss": 2.0, "loss_diffusion": 4.0}

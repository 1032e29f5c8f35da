"""The figures in the log against counted ones."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook

from mmsora.datasets import MovingDigits
from mmsora.engine import DenoiserWork, MeanLossHook, TelemetryHook, peak_memory
from mmsora.engine.hooks import telemetry_hook
from mmsora.registry import DENOISERS, RUNNERS
from mmsora.utils import process_groups


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


def forward_flop(batch):
    """Of the tiny Latte: 2 frames of 8 x 8 in patches of 4 x 4, width 16, a block of each axis."""
    tokens, width, patch = 2 * 2 * 2, 16, 4 * 4
    linear = tokens * width * (4 * width + 2 * 4 * width)  # attention's and the MLP's
    attention = 2 * width * (2 * 4 * 4 + 4 * 2 * 2)  # queries with keys, and with values
    outside = tokens * width * (patch + patch)
    clock = 256 * width + width * width
    modulation = width * (2 * 6 * width + 2 * width)
    products = 2 * linear + attention + outside + clock + modulation
    return 2 * batch * products


@pytest.mark.parametrize("world", [1, 4])
def test_rates_and_waiting_are_those_of_the_clock(tiny_config, scalars, monkeypatch, world):
    clock = Clock()
    monkeypatch.setattr(telemetry_hook, "time", clock)
    monkeypatch.setattr(telemetry_hook, "get_world_size", lambda: 2 * world)
    monkeypatch.setattr(telemetry_hook, "data_info", lambda: (0, world))  # pairs share samples
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
        flop = 3 * 2 * forward_flop(batch=4)
        assert line["TFLOP/s"] == pytest.approx(flop / 2 / seconds / 1e12)


def test_rates_are_of_training_whatever_is_saved_sampled_and_validated(
    tiny_config, scalars, monkeypatch
):
    """Hooks after the step take nine seconds; with the first step nobody waits for its batch."""
    clock = Clock()
    monkeypatch.setattr(telemetry_hook, "time", clock)
    runner = RUNNERS.build(tiny_config())
    runner.register_hook(Spend(clock, compute=1.0, hooks=9.0), priority="LOWEST")
    slow_down(clock, monkeypatch)
    runner.train()
    lines = scalars(runner.work_dir)
    assert [line["data_wait"] for line in lines] == pytest.approx([0, *[1 / 2] * 5])
    assert [line["samples/s"] for line in lines] == pytest.approx([4, *[4 / 2] * 5])
    flop = 3 * forward_flop(batch=4)
    rates = [line["TFLOP/s"] for line in lines]
    assert rates == pytest.approx([flop / 1e12, *[flop / 2e12] * 5])


def test_what_a_resumed_run_skips_is_not_counted(tiny_config, tiny_run, scalars, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(telemetry_hook, "time", clock)
    cfg = tiny_config()
    cfg.resume, cfg.load_from = True, str(tiny_run / "iter_3")
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


def test_the_names_of_figures_stay(tiny_config, scalars):
    """Other programs read them."""
    cfg = tiny_config({"default_hooks.time_loss.interval": 3, "train_dataloader.batch_size": 32})
    runner = RUNNERS.build(cfg)
    runner.train()
    names = set().union(*scalars(cfg.work_dir))
    assert names == {
        *("iter", "step", "lr", "time", "data_time", "loss", "loss_diffusion", "grad_norm"),
        *("samples/s", "tokens/s", "TFLOP/s", "data_wait", "memory"),
        *(f"loss/t_{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)),
    }


def test_a_slow_loader_shows_as_what_it_takes(tiny_config, scalars, monkeypatch):
    draw = MovingDigits.__getitem__

    def slow(self, index):
        time.sleep(0.1)
        return draw(self, index)

    monkeypatch.setattr(MovingDigits, "__getitem__", slow)
    cfg = tiny_config({"train_dataloader.batch_size": 1, "default_hooks.telemetry.interval": 6})
    cfg.default_hooks.logger.interval = 6
    RUNNERS.build(cfg).train()
    (line,) = scalars(cfg.work_dir)
    assert line["data_wait"] / line["samples/s"] * 6 / 5 == pytest.approx(0.1, rel=0.1)


@DENOISERS.register_module(force=True)
class Product(torch.nn.Module):
    """Multiplies the channels, and a text with itself."""

    num_tokens, size = 6, (1, 2, 3)

    def __init__(self, channels):
        super().__init__()
        self.linear = torch.nn.Linear(channels, 5)

    def forward(self, x, clock, text=None, factor=1):
        assert process_groups.sequence_group() is None  # it would be talked to
        y = self.linear(x.movedim(1, -1)) * clock[:, None, None, None, None] * factor
        return y if text is None else y + (text @ text.mT).sum()


def test_the_work_of_a_denoiser_is_that_of_each_shape(monkeypatch):
    denoiser = Product(4)
    work = DenoiserWork(denoiser, {"type": "Product", "channels": 4})
    x, clock = torch.ones(2, 4, 3, 2, 3), torch.ones(2)
    for _ in range(3):
        denoiser(x, clock)
    denoiser(x[:1, :, :1], clock[:1], factor=2, text=torch.ones(1, 7, 8))
    with torch.no_grad():
        denoiser(x, clock)
    others = process_groups._Sequence(SimpleNamespace(size=lambda: 2), 2)
    monkeypatch.setattr(process_groups, "_sequence", others)
    flop = 3 * (2 * 18 * 4 * 5) * 2 + (2 * 6 * 4 * 5 + 2 * 7 * 7 * 8)
    assert work.total() == (3 * 2 * 18 + 6, 3 * flop)
    assert process_groups._sequence == others
    monkeypatch.setattr(process_groups, "_sequence", None)
    work.clear()
    assert work.total() == (0, 0)
    work.close()
    denoiser(x, clock)
    assert work.total() == (0, 0)


def test_utilisation_is_of_the_peak_of_a_known_gpu(monkeypatch):
    runner = SimpleNamespace(optim_wrapper=SimpleNamespace(precision="bf16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * 2**20)
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert telemetry_hook._peak(runner) == peak
    runner.optim_wrapper.precision = "off"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert telemetry_hook._peak(runner) == 67e12

    hook = TelemetryHook()
    hook._samples, hook._data, hook._peak = 8, SimpleNamespace(seconds=0.5), 100e12
    hook._work = SimpleNamespace(total=lambda: (640.0, 80e12))
    assert hook._figures(2.0) == pytest.approx(
        {
            "samples/s": 4.0,
            "tokens/s": 320.0,
            "data_wait": 0.25,
            "TFLOP/s": 40.0,
            "mfu": 0.4,
            "memory_reserved": 3.0,
        }
    )
    hook._work.total = lambda: (0.0, 80e12)  # a UNet has no tokens
    assert "tokens/s" not in hook._figures(2.0)
    hook._work = None  # a model without a denoiser
    assert set(hook._figures(2.0)) == {"samples/s", "data_wait", "memory_reserved"}

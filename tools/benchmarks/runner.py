"""What an iteration costs in the Runner and in a bare loop."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmsora.registry import RUNNERS
from mmsora.utils.config_check import apply_overrides
from mmsora.utils.config_names import load_config
from mmsora.utils.draws import Draws

__all__ = ["benchmark_runner"]

CONFIG = "configs/quickstart/latte_moving_digits.py"


def tiny_config(iters: int, work_dir: str) -> Config:
    """The quickstart's config with a network that costs next to nothing."""
    cfg = load_config(CONFIG)
    small = {"width": 16, "depth": 2, "heads": 2, "size": (2, 8, 8)}
    data = {"num_frames": 2, "frame_size": 8}
    overrides = {f"model.denoiser.{key}": value for key, value in small.items()}
    overrides |= {f"train_dataloader.dataset.{key}": value for key, value in data.items()}
    overrides["train_dataloader.batch_size"] = 2
    overrides["train_cfg.max_iters"] = iters
    overrides["default_hooks.checkpoint.interval"] = 10 * iters
    apply_overrides(cfg, overrides)
    cfg.work_dir, cfg.log_level = work_dir, "ERROR"
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if "decay" in hook]  # EMA stays
    return cfg


def bare_loop(runner: Runner, iters: int) -> Callable[[], None]:
    """The same training without a Runner: data, loss, backward, clip, step."""
    model = runner.model
    optimizer = torch.optim.AdamW(model.denoiser.parameters(), lr=1e-3, fused=True)
    parameters = list(model.denoiser.parameters())

    dataloader = runner.build_dataloader(runner.cfg.train_dataloader)

    def loop() -> None:
        batches = iter(dataloader)
        for step in range(iters):
            data = model.data_preprocessor(next(batches))
            samples = data["data_samples"]
            draws = Draws(0, [sample.index for sample in samples], step)
            loss = model.loss(data["inputs"], samples, draws)["loss_diffusion"].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return loop


def cpu_ms(function: Callable[[], object], iters: int) -> float:
    """CPU milliseconds an iteration."""
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1e3 / iters


def benchmark_runner(args: argparse.Namespace) -> int:
    """Print what an iteration costs in the Runner and in a bare loop, interleaved.

    Default hooks, a log line every 10 iterations, EMA on; checkpoints and samples off. What
    happens once, as building and the last checkpoint, is not counted.

    Args:
        args: The command line.

    Returns:
        The exit status.
    """
    iters, rounds = args.iters, args.rounds
    torch.set_num_threads(1)
    spent: list[float] = []

    class Stopwatch(Hook):
        """CPU time from the first iteration's start to the last one's end."""

        priority = "LOWEST"

        def before_train_epoch(self, runner: Runner) -> None:
            self.start = time.process_time()

        def after_train_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
            if runner.iter + 1 == iters - 1:  # the last one also saves
                spent.append((time.process_time() - self.start) * 1e3 / (iters - 1))

    bare: list[float] = []
    for number in range(rounds + 1):
        with tempfile.TemporaryDirectory() as work_dir:
            cfg = tiny_config(iters, work_dir)
            cfg.experiment_name = f"benchmark_{number}"
            runner = RUNNERS.build(cfg)
            runner.register_hook(Stopwatch())
            bare.append(cpu_ms(bare_loop(runner, iters), iters))
            runner.train()
    bare, spent = bare[1:], spent[1:]  # the first round warms up
    over = [ours - theirs for ours, theirs in zip(spent, bare, strict=True)]
    print(f"CPU ms an iteration, median (min to max) of {rounds} rounds of {iters}")
    for name, values in (("bare loop", bare), ("Runner", spent), ("Runner over bare", over)):
        middle = statistics.median(values)
        print(f"  {name:18} {middle:6.2f}  ({min(values):.2f} to {max(values):.2f})")
    return 0

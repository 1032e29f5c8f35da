"""One of the processes in which the second makes a loss NaN, in one tiny run after another.

``python guard_worker.py CASES.json FOLDER``, with the environment of a launcher. Each process
writes ``FOLDER/NAME_RANK.json``.
"""

import json
import os
import sys
from pathlib import Path

import torch
from mmengine.hooks import Hook
from torch import distributed

from tests.conftest import tiny


class Poison(Hook):
    """Makes the loss of one sample NaN, on one rank at some iterations; notes all state."""

    priority = "LOWEST"

    def __init__(self, iterations, rank=0):
        self.iterations, self.rank = iterations, rank
        self.states, self.rates, self.stepped = [], [], []

    def before_train(self, runner):
        model = runner.bare_model
        self.original, model.loss, self.runner = model.loss, self.loss, runner

    def loss(self, inputs, samples, draws):
        losses = self.original(inputs, samples, draws)
        if self.runner.iter + 1 in self.iterations and self.runner.rank == self.rank:
            self.sample = samples[1]
            factor = torch.ones(len(samples))
            factor[1] = torch.nan
            losses["loss_diffusion"] = losses["loss_diffusion"] * factor
        return losses

    def after_train_iter(self, runner, *args, **kwargs):
        from mmsora.engine import DenoiserEMAHook

        ema = next(hook for hook in runner.hooks if isinstance(hook, DenoiserEMAHook))
        optimizer = runner.optim_wrapper.optimizer
        state = getattr(optimizer, "optim", optimizer).state  # under ZeRO-1 one within another
        moments = [value for each in state.values() for value in each.values()]
        tensors = [*runner.model.parameters(), *moments, *ema._averages[0]]
        here = [getattr(value, "_local_tensor", value) for value in tensors]
        self.states.append([value.detach().clone() for value in here])
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.stepped.append(runner.optim_wrapper.stepped)

    def kept(self):
        """Of each iteration after the first, whether it changed nothing."""
        pairs = zip(self.states, self.states[1:], strict=False)
        return [all(map(torch.equal, before, after)) for before, after in pairs]


def run(case, folder):
    from mmsora.registry import RUNNERS

    cfg = tiny(folder / "runs" / case["name"], case["changes"])
    cfg.default_hooks.checkpoint = None
    cfg.launcher, cfg.parallel = "pytorch", case["parallel"]
    runner, poison = RUNNERS.build(cfg), Poison(case["iterations"], rank=1)
    runner.register_hook(poison)
    runner.train()
    result = {
        "kept": poison.kept(),
        "stepped": poison.stepped,
        "finite": all(bool(value.isfinite().all()) for value in poison.states[-1]),
        "sample": [poison.sample.index, int(poison.sample.label)] if runner.rank else None,
        "skipped": runner.optim_wrapper.guard.skipped,
        "scale": runner.optim_wrapper.scaler.get_scale(),
        "log": "".join(path.read_text() for path in Path(cfg.work_dir).glob("*/*.log")),
    }
    (folder / f"{case['name']}_{runner.rank}.json").write_text(json.dumps(result))


def main():
    folder = Path(sys.argv[2])
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run(case, folder)
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

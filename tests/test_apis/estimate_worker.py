"""One of the processes that train a tiny model in one mode after another, and count bytes.

``python estimate_worker.py MODES FOLDER``, with the environment of a launcher; MODES by commas.
Each process writes ``FOLDER/RANK.json``.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed

from tests.conftest import tiny

CHANGES = {
    "train_cfg.max_iters": 1,
    "param_scheduler": [],
    "custom_hooks.0.profiles": [{"type": "PowerEMA", "sigma_rel": 0.1}],
    "model.freeze": r"blocks\.0\.attn",
}


def num_bytes(tensors):
    """Of what is on this process, each storage once."""
    here = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in here}
    return sum(storages.values())


def count(cfg):
    """Train one iteration and count what the runner holds, by part."""
    from mmsora.engine import DenoiserEMAHook
    from mmsora.registry import RUNNERS

    runner, found = RUNNERS.build(cfg), {}
    build = runner.build_optim_wrapper

    def build_and_watch(*args):
        wrapper = build(*args)
        step = wrapper.step

        def watched(**kwargs):
            grads = [p.grad for p in runner.model.parameters() if p.grad is not None]
            found["gradients"] = num_bytes(grads)
            step(**kwargs)

        wrapper.step = watched
        return wrapper

    runner.build_optim_wrapper = build_and_watch
    runner.train()
    model, optimizer = runner.bare_model, runner.optim_wrapper.optimizer
    state = getattr(optimizer, "optim", optimizer).state.values()
    ema = next(hook for hook in runner.hooks if isinstance(hook, DenoiserEMAHook))
    found["weights"] = num_bytes([*model.parameters(), *model.buffers()])
    found["optimizer"] = num_bytes(
        [value for each in state for value in each.values() if torch.is_tensor(value)]
    )
    found["averages"] = num_bytes([average for each in ema._averages for average in each])
    return found


def main(modes, folder):
    """Count for each mode."""
    rank, found = os.environ.get("RANK", "0"), {}
    for mode in modes.split(","):
        cfg = tiny(Path(folder, mode), {**CHANGES, "parallel": {"mode": mode}})
        cfg.launcher = "pytorch"
        found[mode] = count(cfg)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])

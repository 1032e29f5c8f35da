"""One of the processes that train the same tiny cases one after another.

``python parallel_worker.py CASES.json FOLDER LAUNCHER``, with LAUNCHER ``none`` for a single
process. The first process writes ``FOLDER/NAME.pt`` for each case: losses and norms of every
iteration, weights at the start, weights and averages at the end, collectives of the last update.
Each of several writes ``FOLDER/checks_RANK.pt`` besides, of a few gradients without a model.
"""

import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from mmengine.hooks import Hook
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmsora.engine import AutocastOptimWrapper, DenoiserEMAHook, SoraRunner
from mmsora.engine.parallel.gradients import average_gradients, gradient_norm
from mmsora.engine.parallel.optimizers import leave_out_frozen, separate_sharded, share_state
from mmsora.registry import RUNNERS

ROOT = Path(__file__).parents[2]
# What launchers say, in the words of ``tests/ranks.py``.
WORDS = {
    "slurm": {"SLURM_PROCID": "RANK", "SLURM_NTASKS": "WORLD_SIZE", "SLURM_LOCALID": "LOCAL_RANK"},
    "mpi": {"PMI_RANK": "RANK", "PMI_SIZE": "WORLD_SIZE", "MPI_LOCALRANKID": "LOCAL_RANK"},
}


def conftest():
    spec = importlib.util.spec_from_file_location("conftest", ROOT / "tests/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Collectives(TorchDispatchMode):
    """Counts calls and bytes of whole tensors by name."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            # The whole comes out of a gathering, and goes into a scattering.
            whole = args[1] if func._opname == "_reduce_scatter_base_" else args[0]
            tensors = whole if isinstance(whole, list | tuple) else [whole]
            self.calls[func._opname] += 1
            self.bytes[func._opname] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


class Record(Hook):
    priority = "LOWEST"

    def __init__(self):
        self.losses, self.norms, self.collectives = [], [], Collectives()

    def before_train(self, runner):
        step, accumulate = runner.model.train_step, runner.optim_wrapper._accumulative_counts
        first = (runner.max_iters - 1) // accumulate * accumulate  # of the last update

        def counted(*args, **kwargs):
            if runner.iter < first:
                return step(*args, **kwargs)
            with self.collectives:
                return step(*args, **kwargs)

        runner.model.train_step = counted

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(float(outputs["loss"]))
        if runner.optim_wrapper.stepped:
            norm = runner.message_hub.get_scalar("train/grad_norm")
            self.norms.append(float(norm.current()))


def whole_of(weight):
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()


def whole(module):
    return {name: whole_of(weight) for name, weight in module.named_parameters()}


def run(case, tools, folder, launcher):
    samples = "custom_hooks.1.interval" in case["changes"]
    cfg = tools.tiny(folder / "runs" / case["name"], case["changes"], samples)
    cfg.default_hooks.checkpoint = None
    if launcher != "none":
        cfg.launcher, cfg.parallel = launcher, case["parallel"]
    runner, record = RUNNERS.build(cfg), Record()
    runner.register_hook(record)
    start = whole(runner.bare_model)
    runner.train()
    model = runner.bare_model
    weights = whole(model)
    ema = next(hook for hook in runner.hooks if isinstance(hook, DenoiserEMAHook))
    with ema.applied():
        averages = whole(model.denoiser)
    if runner.rank == 0:
        result = {
            "losses": record.losses,
            "norms": record.norms,
            "start": start,
            "weights": weights,
            "ema": averages,
            "calls": dict(record.collectives.calls),
            "bytes": dict(record.collectives.bytes),
            "log": "".join(path.read_text() for path in Path(cfg.work_dir).glob("*/*.log")),
        }
        torch.save(result, folder / f"{case['name']}.pt")


def checks(rank, world):
    mesh = init_device_mesh("cpu", (world,))

    def sharded(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)])

    # Of one row only the first process has a share; the last is whole on all.
    sizes = ((1, 3), (5, 2), (4,))
    weights = [torch.nn.Parameter(sharded(torch.zeros(size))) for size in sizes[:2]]
    weights.append(torch.nn.Parameter(torch.zeros(sizes[2])))
    numbers = torch.arange(17.0).split([3, 10, 4])
    for weight, part, size in zip(weights, numbers, sizes, strict=True):
        part = part.view(size)
        weight.grad = sharded(part) if isinstance(weight, DTensor) else part * (1 + rank)
    average_gradients(weights[2:])
    norms = {p: float(gradient_norm(weights, p)) for p in (1.0, 2.0, 3.0, float("inf"))}

    wrapper = AutocastOptimWrapper(torch.optim.SGD(weights, lr=1.0, foreach=False), "fp16")
    scaled = wrapper.scaler.scale(torch.ones(()))
    if rank == 1:
        weights[1].grad.to_local().fill_(float("inf"))
    wrapper.step()

    mixed = torch.optim.SGD(weights, lr=1.0)
    separate_sharded(mixed)
    frozen = torch.nn.Parameter(torch.zeros(3, device="meta"), requires_grad=False)
    groups = [
        {"params": [weights[2], frozen], "lr": 2.0},
        {"params": [torch.nn.Parameter(torch.zeros(1), requires_grad=False)]},
    ]
    partly_frozen = torch.optim.SGD(groups, lr=1.0)
    leave_out_frozen(partly_frozen)
    shared = share_state(partly_frozen)
    return {
        "separated": [[len(w) for w in group["params"]] for group in mixed.param_groups],
        "groups": [(group["lr"], len(group["params"])) for group in shared.param_groups],
        "norms": norms,
        "stepped": wrapper.stepped,
        "scale": (float(scaled), wrapper.scaler.get_scale()),
        "weights": [whole_of(weight) for weight in weights],
    }


def start_filled(numbers):
    """The first process' models start from weights by their names, nowhere zero; the others' from
    zeros, and must be told."""
    build = SoraRunner.build_model

    def filled(self, model):
        model = build(self, model)
        for name, weight in model.named_parameters():
            scale = (3 / weight.shape[-1]) ** 0.5 if weight.ndim > 1 else 0.1
            weight.data.copy_(numbers(name, weight.shape, scale) if self.rank == 0 else 0)
        return model

    SoraRunner.build_model = filled


def main():
    cases, folder, launcher = json.loads(Path(sys.argv[1]).read_text()), *sys.argv[2:]
    for theirs, ours in WORDS.get(launcher, {}).items():
        os.environ[theirs] = os.environ.pop(ours)
    tools = conftest()
    start_filled(tools._filled)
    for case in cases:
        run(case, tools, Path(folder), launcher)
    if distributed.is_initialized():
        rank, world = distributed.get_rank(), distributed.get_world_size()
        torch.save(checks(rank, world), Path(folder) / f"checks_{rank}.pt")
        distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo abort the interpreter's own end now and then


if __name__ == "__main__":
    main()

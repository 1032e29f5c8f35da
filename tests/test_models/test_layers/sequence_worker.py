"""One of four processes that share tokens, by twos and all together.

``python sequence_worker.py CASES.json OUT.json``, with the environment of torchrun. Each case runs
on whole samples first, then on shares of them; the first process writes how far apart they are, on
the worst of the processes, and what was sent.
"""

import importlib.util
import json
import os
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from mmsora.engine.recompute import ActivationCheckpointing
from mmsora.models.denoisers import DiT, Latte
from mmsora.models.layers.attention import attend, attend_together
from mmsora.models.layers.sequence import SPACE, Shards
from mmsora.utils.process_groups import data_info, sequence_group, set_sequence_group

KINDS = {"DiT": DiT, "Latte": Latte}
BATCH = 2  # of each group that shares tokens


def numbers_by_name():
    path = Path(__file__).parents[2] / "conftest.py"
    spec = importlib.util.spec_from_file_location("conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda name, *shape, scale=1.0: module._filled(name, shape, scale).double()


numbers = numbers_by_name()


class Sent(TorchDispatchMode):
    """Counts collectives and the bytes that a process puts into them, by name."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("_c10d_functional", "c10d") and func._opname != "wait_tensor":
            self.calls[func._opname] += 1
            self.bytes[func._opname] += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def compared(found, exact, sent):
    """How far outputs and gradients are apart, in units of the largest number of each."""
    (out, gradients), (whole, wanted) = found, exact
    pairs = zip(gradients, wanted, strict=True)
    return {
        "output": apart(out, whole),
        "gradients": max(apart(ours, theirs) for ours, theirs in pairs),
        "calls": dict(sent.calls),
        "bytes": dict(sent.bytes),
    }


def apart(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def averaged(gradients):
    for gradient in gradients:
        distributed.all_reduce(gradient)
        gradient /= distributed.get_world_size()
    return gradients


def filled(case):
    model = KINDS[case["kind"]](**case["sizes"]).double()
    for name, weight in model.named_parameters():
        scale = (3 / weight.shape[-1]) ** 0.5 if weight.ndim > 1 else 0.5
        weight.data.copy_(numbers(name, *weight.shape, scale=scale))
    return model.float() if case["bf16"] else model


def batch(case):
    count, classes = distributed.get_world_size() * BATCH, case["sizes"]["num_classes"]
    size = case["sizes"]["size"]
    given = {
        "x": numbers("x", count, case["sizes"]["in_channels"], *size),
        "clock": 500 + numbers("clock", count, scale=500.0),
        "target": numbers("target", count, case["sizes"]["out_channels"], *size),
    }
    if case["bf16"]:
        given = {name: value.float() for name, value in given.items()}
    given["label"] = torch.arange(count) % (classes + 1)
    if case["images"]:
        labels = torch.arange(count * case["images"]).view(count, -1)
        given["image_label"] = labels % (classes + 1)
    return given


def step(model, given, case):
    """Outputs and gradients."""
    given = dict(given)
    target = given.pop("target")
    if case["images"]:
        given["num_images"] = case["images"]
    tap = model.tap(case["tap"]) if case["tap"] else nullcontext()
    with torch.autocast("cpu", torch.bfloat16, enabled=case["bf16"]), tap as tokens:
        out = model(**given)
    loss = ((out.to(target) - target) ** 2).flatten(1).mean(1).mean()
    if tokens:
        loss = loss + (tokens[-1] ** 3).flatten(1).mean(1).mean()
    return out.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def shared(case, group, size):
    """A case on whole samples and on shares."""
    model, every = filled(case), batch(case)
    place, groups = distributed.get_rank() // size, distributed.get_world_size() // size
    every = {name: value[: groups * BATCH] for name, value in every.items()}
    mine = slice(place * BATCH, (place + 1) * BATCH)
    whole, exact = step(model, every, case)
    if case["recompute"]:
        ActivationCheckpointing(case["recompute"]).apply(model)
    set_sequence_group(group, size)
    with Sent() as sent:
        out, gradients = step(model, {name: value[mine] for name, value in every.items()}, case)
    assert data_info() == (place, groups)
    set_sequence_group(None)
    return compared((out, averaged(gradients)), (whole[mine], exact), sent)


def alone(heads, tokens, group):
    """Attention alone, along an axis that is dealt out."""
    shape = BATCH, 3, heads, tokens, 4
    qkv = [numbers(name, *shape).requires_grad_() for name in "qkv"]
    weight = numbers("weight", *shape)
    whole = attend(*qkv)
    exact = torch.autograd.grad((whole * weight).sum(), qkv)
    shards = Shards(group, SPACE, (3, tokens))
    with Sent() as sent:
        share = attend_together(*(shards.share(x, SPACE, 3) for x in qkv), tokens, group)
        out = shards.gather(share.flatten(0, 1)).view(shape)
        gradients = torch.autograd.grad((out * weight).sum(), qkv)
    return compared((out, averaged(list(gradients))), (whole, exact), sent)


def one_samples(case, group, size):
    """One process calls the network outside of training, the others do not: nobody waits."""
    model, given = filled(case).eval(), batch(case)
    set_sequence_group(group, size)
    if distributed.get_rank() == 0:
        with torch.no_grad():
            model(given["x"], given["clock"], given["label"])
    assert sequence_group() is group
    set_sequence_group(None)


def worst(results):
    """The largest errors of all processes."""
    errors = torch.tensor([(each["output"], each["gradients"]) for each in results.values()])
    distributed.all_reduce(errors, distributed.ReduceOp.MAX)
    for result, (output, gradients) in zip(results.values(), errors.tolist(), strict=True):
        result.update(output=output, gradients=gradients)
    return results


def main():
    distributed.init_process_group("gloo")
    plan, world, results = json.loads(Path(sys.argv[1]).read_text()), 4, {}
    for size in 2, 4:
        names = "data", "sequence"
        mesh = init_device_mesh("cpu", (world // size, size), mesh_dim_names=names)
        group = mesh.get_group("sequence")
        for name, case in plan["cases"].items():
            results[f"{name}-{size}"] = shared(case, group, size)
        for heads, tokens in plan["alone"]:
            results[f"alone-{heads}-{tokens}-{size}"] = alone(heads, tokens, group)
        one_samples(plan["cases"]["latte"], group, size)
    worst(results)
    if distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()

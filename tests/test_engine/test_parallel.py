"""Every way to spread training over processes makes the weights that one process makes.

The full matrix: ``pytest tests/test_engine/test_parallel.py -m slow``.
"""

import json
import re
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.ranks import start_ranks

WORKER = Path(__file__).with_name("parallel_worker.py")
UPDATES, BATCH = 5, 4
MODES = {
    "ddp": {"mode": "ddp"},
    "zero1": {"mode": "zero1"},
    "zero2": {"mode": "zero2"},
    "zero3": {"mode": "zero3"},
    "zero3+sequence": {"mode": "zero3", "sequence": 2},
    "zero3+offload": {"mode": "zero3", "offload": True},
    "ddp+sequence": {"mode": "ddp", "sequence": 2},
}
# Adam divides by the size of a gradient, so that one of rounding errors alone, as that of the bias
# of the keys, which changes no attention, would make steps of full size. With an eps above such
# errors the size of a step tells of the gradient.
CHANGES = {
    "model.conditioner.drop_prob": 0.5,
    "optim_wrapper.optimizer.eps": 1e-3,
    "optim_wrapper.clip_grad.max_norm": 0.1,
}
UNET = {
    "type": "StableCascade",
    "in_channels": 1,
    "out_channels": 1,
    "size": (1, 8, 8),
    "levels": [{"width": 6, "depth": 1}, {"width": 8, "depth": 1, "heads": 2}],
    "conditions": {"width": 10, "pooled": 5},
    "strided": True,
    "num_classes": 10,
}
KINDS = {
    "latte": {},
    "dit": {"model.denoiser.type": "DiT"},
    # Frozen weights, a trained one outside of the denoiser, groups with settings of their own.
    "parts": {
        "model.freeze": "blocks.0.ada",
        "model.diffusion.loss.weighting": {"type": "LearnedUncertainty", "features": 3},
        "optim_wrapper.optimizer.weight_decay": 0.1,
        "optim_wrapper.paramwise_cfg": {
            "custom_keys": {"blocks": {"lr_mult": 0.5, "decay_mult": 0.0}}
        },
    },
    "by value": {"optim_wrapper.clip_grad": {"type": "value", "clip_value": 0.01}},
    # Of the averages; training then goes on from the weights.
    "sampled": {"custom_hooks.1.interval": 2, "custom_hooks.1.labels": [1]},
    "recomputed": {"activation_checkpointing": {"mode": "full"}},
    # Temporal layers in a frozen network, behind modules that are gathered by themselves.
    "temporal": {
        "model.denoiser": {
            "type": "ImageToVideo",
            "image": UNET,
            "after": {"down_blocks[.]0[.]0": 6, "down_blocks[.]1[.]2": 8},
            "layout": "(b t) c h w",
            "frames": 2,
            "layer": {"heads": 2},
        }
    },
    "largest": {"optim_wrapper.clip_grad": {"max_norm": 0.1, "norm_type": float("inf")}},
}
TOLERANCE = {"off": 1e-6, "bf16": 2e-2, "fp16": 2e-2}


def case(kind, mode, world, precision="off", accumulate=1):
    """A case of ``world`` processes; world 1 is the reference, whatever the mode."""
    share = world // MODES[mode].get("sequence", 1) if world > 1 else 1
    changes = {
        **CHANGES,
        **KINDS[kind],
        # The last update is made of what is left: two micro-batches of three.
        "train_cfg.max_iters": UPDATES if accumulate == 1 else UPDATES * accumulate - 1,
        "train_dataloader.batch_size": BATCH // share,
        "optim_wrapper.precision": precision,
        "optim_wrapper.accumulative_counts": accumulate,
    }
    name = f"{kind}-{mode if world > 1 else 'one'}-{world}-{precision}-{accumulate}"
    return {"name": name, "parallel": MODES[mode], "changes": changes}


def launch(cases, world, folder, launcher):
    """Train cases on ``world`` processes; their results by name."""
    folder = folder / str(world)
    folder.mkdir()
    plan = folder / "cases.json"
    plan.write_text(json.dumps(cases))
    processes = start_ranks([sys.executable, WORKER, plan, folder, launcher], world, folder)
    try:
        codes = [process.wait(timeout=1200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "".join((folder / f"rank_{rank}.txt").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, said
    results = {each["name"]: torch.load(folder / f"{each['name']}.pt") for each in cases}
    checks = [torch.load(folder / f"checks_{rank}.pt") for rank in range(world) if world > 1]
    return results | {f"checks {world}": checks}


def references(cases):
    found = {}
    for each in cases:
        kind, mode, _, precision, accumulate = each["name"].split("-")
        found[kind, precision, accumulate] = case(kind, mode, 1, precision, int(accumulate))
    return list(found.values())


def train(cases, folder):
    """The results of cases, and of the references that they need, by name."""
    results = launch(references(cases), 1, folder, "none")
    for world, launcher in ((2, "slurm"), (4, "mpi")):
        here = [each for each in cases if each["name"].split("-")[2] == str(world)]
        results |= launch(here, world, folder, launcher) if here else {}
    return results


def flat(weights):
    return torch.cat([weight.double().flatten() for weight in weights.values()])


def assert_equal_runs(results, name):
    kind, _, _, precision, accumulate = name.split("-")
    ours, reference = results[name], results[f"{kind}-one-1-{precision}-{accumulate}"]
    tolerance = TOLERANCE[precision]
    assert len(reference["norms"]) == UPDATES
    for key in ("losses", "norms"):
        values = [torch.tensor(result[key]) for result in (ours, reference)]
        torch.testing.assert_close(*values, rtol=tolerance, atol=0)
    assert flat(ours["start"]).equal(flat(reference["start"]))
    for key in ("weights", "ema"):
        assert ours[key].keys() == reference[key].keys()
        got, wanted = flat(ours[key]), flat(reference[key])
        assert (got - wanted).norm() <= tolerance * wanted.norm(), key
        if precision == "off":
            assert (got - wanted).abs().max() <= tolerance, key
    moved = flat(reference["weights"]) - flat(reference["start"])
    apart = flat(ours["weights"]) - flat(reference["weights"])
    assert apart.norm() <= max(tolerance, 1e-5) * moved.norm()
    assert max(reference["norms"]) > 0.2  # is clipped


# A few cases of each kind


def quick():
    named = ("ddp", "zero1", "zero2", "zero3", "zero3+sequence")
    found = [case("latte", mode, 2, "off", 3) for mode in named]
    for mode in ("ddp", "zero1", "zero2"):
        found.append(case("parts", mode, 2, "off", 1))
    for mode in ("ddp", "zero2", "zero3"):
        found.append(case("temporal", mode, 2))
    found.append(case("recomputed", "zero3", 2, "off", 3))
    found.append(case("sampled", "zero2", 2))
    found.append(case("by value", "zero2", 2))
    found.append(case("largest", "zero3", 2))
    found.append(case("dit", "zero3+offload", 2, "bf16", 3))
    found.append(case("dit", "zero2", 2, "bf16"))
    found.append(case("latte", "zero3", 2, "fp16"))
    found.append(case("latte", "zero3+sequence", 4))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(quick(), tmp_path_factory.mktemp("parallel"))


@pytest.mark.parametrize("name", [each["name"] for each in quick()])
def test_processes_make_the_weights_of_one(trained, name):
    assert_equal_runs(trained, name)


def padded(weights, world):
    """Numbers of weights whose rows are dealt out evenly."""
    return sum(-(-w.shape[0] // world) * world * w[0].numel() for w in weights)


def test_collectives_and_bytes_go_by_the_mode(trained):
    """Of the last update, of two micro-batches; bytes are those of the whole tensors."""
    weights = trained["latte-one-1-off-3"]["weights"]
    inside = [weight for name, weight in weights.items() if "blocks." in name]
    numbers = 4 * sum(weight.numel() for weight in weights.values())
    everything, blocks = (4 * padded(w, 2) for w in (weights.values(), inside))
    units, micro = 2 + 1, 2  # two blocks and the rest
    sent = {mode: trained[f"latte-{mode}-2-off-3"] for mode in ("ddp", "zero1", "zero2", "zero3")}

    assert sent["ddp"]["bytes"] == {"allreduce_": numbers}
    assert sent["zero1"]["bytes"] == {"allreduce_": numbers, "broadcast_": numbers}
    assert sent["zero1"]["calls"]["broadcast_"] == 2  # each tells of its share
    assert sent["zero2"]["bytes"] == {
        "_allgather_base_": micro * everything,
        "_reduce_scatter_base_": micro * everything,
        "allreduce_": 4,  # the norm
    }
    assert sent["zero2"]["calls"]["_allgather_base_"] == micro * units
    assert sent["zero3"]["bytes"] == {
        "_allgather_base_": micro * (everything + blocks),
        "_reduce_scatter_base_": micro * everything,
        "allreduce_": 4,
    }
    assert sent["zero3"]["calls"]["_allgather_base_"] == micro * (units + 2)

    half = trained["dit-zero2-2-bf16-1"]
    gathered = 2 * padded(half["weights"].values(), 2)
    assert half["bytes"]["_allgather_base_"] == gathered  # bfloat16
    assert half["bytes"]["_reduce_scatter_base_"] == 2 * gathered  # float32


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_in_shares_are_measured_as_one(trained, world):
    """One share is empty. The gradients of what is whole were averaged: 1 to ``world`` times."""
    numbers = torch.arange(17.0)
    numbers[13:] *= (1 + world) / 2
    for found in trained[f"checks {world}"]:
        for p, norm in found["norms"].items():
            assert norm == pytest.approx(torch.linalg.vector_norm(numbers, p).item(), rel=1e-6)


def test_torch_gets_sharded_and_whole_weights_apart(trained):
    """Of 1 and 5 rows, and of 4 numbers."""
    assert [found["separated"] for found in trained["checks 2"]] == [[[1, 5], [4]]] * 2


def test_frozen_weights_without_memory_do_not_hinder_sharing(trained):
    assert [found["groups"] for found in trained["checks 2"]] == [[(2.0, 1)]] * 2


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_that_overflow_on_one_process_are_skipped_by_all(trained, world):
    for found in trained[f"checks {world}"]:
        assert not found["stepped"]
        assert found["scale"] == (2.0**16, 2.0**15)
        assert all(weight.eq(0).all() for weight in found["weights"])


def test_the_log_says_what_each_process_holds(trained):
    total = sum(weight.numel() for weight in trained["latte-one-1-off-3"]["weights"].values())
    lines = {
        "latte-zero1-2-off-3": ("parallel zero1: 2 processes (data 2)", total),
        "latte-zero3-2-off-3": ("parallel zero3: 2 processes (data 2)", total / 2),
        "latte-zero3+sequence-4-off-1": (
            "parallel zero3: 4 processes (data 2 x sequence 2)",
            total / 4,
        ),
    }
    for name, (start, here) in lines.items():
        found = re.search(rf"{re.escape(start)}; this one holds (\S+) M of", trained[name]["log"])
        assert float(found[1]) == pytest.approx(here / 1e6, abs=0.006), name


# The full matrix


def matrix():
    named = ("ddp", "zero1", "zero2", "zero3", "zero3+sequence")
    every = product(("latte", "dit"), named, (2, 4), ("off", "bf16"), (1, 3))
    return [case(*each) for each in every]


@pytest.fixture(scope="module")
def trained_all(tmp_path_factory):
    return train(matrix(), tmp_path_factory.mktemp("matrix"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [each["name"] for each in matrix()])
def test_the_full_matrix(trained_all, name):
    assert_equal_runs(trained_all, name)

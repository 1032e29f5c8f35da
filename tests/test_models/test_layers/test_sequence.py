"""Processes that share the tokens of samples compute what one process does, and send no more than
they must."""

import json
import os
import socket
import subprocess
import sys
from math import ceil, prod
from pathlib import Path

import pytest

from mmsora.models import LatentDiffusion, latent_diffusion
from mmsora.models.layers.sequence import SPACE, TIME, WHOLE, Shards

WORKER = Path(__file__).with_name("sequence_worker.py")
ROOT = Path(__file__).parents[3]
WORLD, BATCH = 4, 2
ALONE = [(3, 7), (2, 8), (1, 3)]  # heads and tokens


def case(kind, frames, depth, patch=(1, 2, 2), size=(4, 6), heads=3, layout=None, **more):
    """A network and how it is run; ``size`` in pixels is 6 patches."""
    sizes = dict(
        in_channels=3, out_channels=4, size=(frames, *size), patch=patch, width=24, depth=depth,
        heads=heads, num_classes=5,
    )  # fmt: skip
    if kind == "Latte":
        sizes["layout"] = layout
    usual = dict(recompute=None, bf16=False, images=0, tap=0)
    return dict(kind=kind, sizes=sizes, **usual | more)


CASES = {
    "dit": case("DiT", 5, 3),
    "dit_image": case("DiT", 1, 3),
    "dit_image_tapped": case("DiT", 1, 3, tap=2),
    "dit_image_full": case("DiT", 1, 3, recompute="full"),
    "dit_image_selective": case("DiT", 1, 3, recompute="selective"),
    "dit_image_bf16": case("DiT", 1, 3, bf16=True),
    "latte": case("Latte", 5, 4),
    "latte_heads": case("Latte", 5, 4, heads=2),
    "latte_short": case("Latte", 2, 4),
    "latte_even": case("Latte", 4, 4, size=(8, 6)),
    "latte_thick": case("Latte", 10, 4, patch=(2, 2, 2)),
    "latte_tapped": case("Latte", 5, 4, tap=2),
    "latte_images": case("Latte", 7, 4, images=2),
    "latte_bf16": case("Latte", 5, 4, bf16=True),
    "late": case("Latte", 5, 4, layout="late"),
    "late_full": case("Latte", 5, 4, layout="late", recompute="full"),
    "joint": case("Latte", 5, 2, layout="joint"),
    "joint_images": case("Latte", 7, 2, layout="joint", images=2),
    "joint_full": case("Latte", 5, 2, layout="joint", recompute="full"),
    "joint_selective": case("Latte", 5, 2, layout="joint", recompute="selective"),
}
EVERY = [f"{name}-{size}" for size in (2, 4) for name in CASES]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of all cases, in one launch."""
    folder = tmp_path_factory.mktemp("sequence")
    plan, out = folder / "cases.json", folder / "out.json"
    plan.write_text(json.dumps({"cases": CASES, "alone": ALONE}))
    common = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
    }  # fmt: skip
    logs = [folder / f"{rank}.txt" for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, plan, out],
            env={**common, "RANK": str(rank)},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), "\n".join(log.read_text()[-2000:] for log in logs)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", EVERY)
def test_shares_make_the_outputs_and_gradients_of_the_whole(results, name):
    tolerance = 2e-2 if "bf16" in name else 1e-12
    assert results[name]["output"] < tolerance
    assert results[name]["gradients"] < tolerance


# By the first word of a case's name.
SWITCHES = {"dit": 0, "latte": 4 - 1, "late": 1, "joint": 2 * 2}  # of time and space, forward
IN_SPACE = {"dit": 3, "latte": 2}  # attentions
LAST = {"dit": TIME, "latte": SPACE, "late": SPACE, "joint": TIME}  # the axis dealt out at the end


def switched(sides, width, size):
    """Numbers that a process puts into a switch of time and space."""
    return size * prod(ceil(side / size) for side in sides) * BATCH * width


def of_heads(heads, length, head_dim, size):
    """Numbers that a process puts into the two all-to-alls of an attention: q, k, v; and out."""
    return size * ceil(heads / size) * ceil(length / size) * (3 + 1) * head_dim


@pytest.mark.parametrize("name", EVERY)
def test_what_is_sent_in_a_step(results, name):
    name, size, sent = *name.rsplit("-", 1), results[name]
    network, size, options = name.split("_")[0], int(size), CASES[name]["sizes"]
    width, heads, patch = (options[key] for key in ("width", "heads", "patch"))
    sides = [side // step for side, step in zip(options["size"], patch, strict=True)]
    tokens = sides[0], prod(sides[1:])
    # Forward, backward; what is in a block is sent again where blocks are recomputed.
    passes = 3 if "full" in name and network != "late" else 2
    if tokens[0] < size:  # too few frames to deal out
        last, calls = SPACE, passes * 2 * IN_SPACE[network]
        one = of_heads(BATCH * tokens[0] * heads, tokens[1], width // heads, size)
        numbers = passes * IN_SPACE[network] * one
    else:
        last, calls = LAST[network], passes * SWITCHES[network]
        numbers = calls * switched(tokens, width, size)
    here = [ceil(n / size) if axis == last else n for axis, n in enumerate(tokens, TIME)]
    whole = BATCH * prod(here) * prod(patch) * options["out_channels"]
    # Bytes of a number: what layers make has autocast's type, tokens between blocks are float32.
    made, between = (2, 4) if CASES[name]["bf16"] else (8, 8)

    assert sent["calls"].get("all_to_all_single", 0) == calls
    each = made if last == SPACE and network == "dit" else between
    assert sent["bytes"].get("all_to_all_single", 0) == each * numbers
    assert sent["calls"]["all_gather_into_tensor"] == (2 if CASES[name]["tap"] else 1)
    if not CASES[name]["tap"]:
        assert sent["bytes"]["all_gather_into_tensor"] == made * whole
    assert set(sent["calls"]) <= {"all_to_all_single", "all_gather_into_tensor"}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("heads", "tokens"), ALONE)
def test_attention_along_an_axis_that_is_dealt_out(results, heads, tokens, size):
    result = results[f"alone-{heads}-{tokens}-{size}"]
    assert result["output"] < 1e-12
    assert result["gradients"] < 1e-12
    assert result["calls"] == {"all_to_all_single": 4, "all_gather_into_tensor": 1}
    numbers = of_heads(BATCH * 3 * heads, tokens, 4, size)
    assert result["bytes"]["all_to_all_single"] == 2 * 8 * numbers


def test_switches_move_a_quarter_of_what_ulysses_does(results):
    """Of four attentions over 4 x 12 tokens of width 24; with depth, 3 / 16 goes to a quarter."""
    switches = results["latte_even-4"]["bytes"]["all_to_all_single"]
    ulysses = 2 * 8 * of_heads(BATCH * 4 * 3, 12, 24 // 3, 4)  # as measured above
    assert switches / (4 * ulysses) == 3 / 16


def test_a_process_with_a_sample_to_itself_shares_nothing(filled):
    assert Shards.of(5, 6, training=True) is WHOLE
    x = filled("x", (2, 5, 6, 8))
    assert WHOLE.before(SPACE) is WHOLE
    assert WHOLE.move(x, WHOLE) is WHOLE.share(x, TIME, 1) is WHOLE.gather(x) is x


def test_a_network_that_cannot_share_tokens_is_refused(monkeypatch, tiny_config):
    monkeypatch.setattr(latent_diffusion, "sequence_group", lambda: "a group")
    model = dict(tiny_config().model)
    model.pop("type")
    LatentDiffusion(**model)
    image = dict(model["denoiser"], type="DiT", size=(1, 8, 8))
    places = dict(after={r"blocks\.\d+": 16}, layout="(b t) 1 n c")
    model["denoiser"] = dict(type="ImageToVideo", image=image, frames=2, **places)
    with pytest.raises(ValueError, match=r"parallel\.sequence: ImageToVideo cannot share"):
        LatentDiffusion(**model)

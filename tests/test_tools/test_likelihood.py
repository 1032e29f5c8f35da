"""``tools/likelihood.py``: figures that the library's functions give, and mistakes."""

import json
import math

import pytest
import torch

from mmsora import diffusion as D
from mmsora.apis import Inferencer
from mmsora.datasets import MovingDigits
from mmsora.utils.draws import Draws

FEW = "--num-samples", 5, "--batch-size", 2, "--steps", 3


@pytest.fixture(scope="module")
def likelihood(tool):
    return tool("likelihood")


@pytest.fixture(scope="module")
def checkpoint(tiny_run):
    return tiny_run / "iter_6"


@pytest.fixture
def run(likelihood, checkpoint, tmp_path):
    def call(*arguments, checkpoint=checkpoint):
        out = tmp_path / "likelihood.json"
        arguments = ["--checkpoint", checkpoint, "--out", out, *arguments]
        likelihood.main([str(argument) for argument in arguments])
        return json.loads(out.read_text())

    return call


@pytest.fixture
def fails(likelihood, capsys, tmp_path):
    """The one line on stderr."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            likelihood.main([*map(str, arguments), "--out", str(tmp_path / "out.json")])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert not (tmp_path / "out.json").exists()
        return error

    return call


def expected(checkpoint, split, places, **options):
    model = Inferencer(checkpoint).model
    dataset = MovingDigits(split, num_frames=2, frame_size=8)
    batch = [dataset[i] for i in places]
    x0 = torch.stack([sample["inputs"] for sample in batch]) / 127.5 - 1
    label = torch.tensor([sample["data_samples"].label for sample in batch])
    parts = model.diffusion, model.denoiser, x0, {"label": label}, Draws(4, places)
    return D.bits_per_dimension(D.log_likelihood(*parts, **options).log_p, x0)


def test_the_figures_are_the_library_s(run, checkpoint, capsys):
    found = run("--num-samples", 5, "--batch-size", 2, "--split", "test", "--seed", 4)
    bits = expected(checkpoint, "test", [0, 2000, 4000, 6000, 8000])
    assert found["samples"] == pytest.approx(bits.tolist(), rel=1e-4)
    mean = found["bits_per_dim"]
    assert mean["mean"] == pytest.approx(bits.mean().item(), rel=1e-4)
    assert mean["standard_error"] == pytest.approx(bits.std().item() / math.sqrt(5), rel=1e-3)
    facts = {"method": "ode", "solver": "heun2", "steps": 3, "split": "test", "num_samples": 5}
    facts |= {"of": "latents", "latent_shape": [1, 2, 8, 8], "seed": 4, "ema": True}
    assert {key: found[key] for key in facts} == facts
    told = capsys.readouterr().out
    assert "4 of 5 samples" in told
    assert f"bits/dim  {mean['mean']:12.4f}{mean['standard_error']:12.4f}" in told
    assert f"nats      {mean['mean'] * 128 * math.log(2):12.1f}" in told
    assert "negative log-likelihood, 5 samples, latents of 1 x 2 x 8 x 8 numbers" in told


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
def test_solvers(run, checkpoint, solver):
    found = run("--num-samples", 2, "--seed", 4, "--solver", solver)
    if solver == "dopri5":
        options = {"solver": D.DormandPrince(), "trace": "fixed"}
    else:
        options = {"solver": D.RungeKutta(solver)}
    bits = expected(checkpoint, "train", [0, 5000], **options)
    assert found["samples"] == pytest.approx(bits.tolist(), rel=1e-4)
    assert (found["split"], found["solver"]) == ("train", solver)


def test_the_batch_size_changes_nothing(run):
    one, other = (run("--num-samples", 5, "--batch-size", size)["samples"] for size in (1, 5))
    assert one == pytest.approx(other, rel=1e-5)


def test_the_variational_bound(run, checkpoint, capsys):
    found = run(*FEW, "--method", "bound")
    assert (found["method"], found["solver"]) == ("bound", None)
    assert all(math.isfinite(value) for value in found["samples"])
    assert "variational bound of it" in capsys.readouterr().out
    assert found["samples"] != run(*FEW, "--method", "bound", "--seed", 1)["samples"]


def test_weights_and_config_are_those_asked_for(run, tiny_config, tmp_path):
    tiny_config().dump(tmp_path / "named.py")
    named = run(tmp_path / "named.py", *FEW)
    assert named["samples"] == run(*FEW)["samples"]
    raw = run(*FEW, "--no-ema")
    assert raw["ema"] is False
    assert raw["samples"] != named["samples"]


def test_mistakes(fails, checkpoint):
    assert "nowhere.pth" in fails("--checkpoint", "nowhere.pth")
    assert "at least 2 for an error, got 1" in fails(
        "--checkpoint", checkpoint, "--num-samples", 1
    )
    error = fails("--checkpoint", checkpoint, "--num-samples", 10001)
    assert error == "error: --num-samples 10001: the dataset has 10000\n"
    assert "split must be" in fails("--checkpoint", checkpoint, "--split", "valid")
    assert "--batch-size must be at least 1" in fails(
        "--checkpoint", checkpoint, "--batch-size", 0
    )
    table = ["model.diffusion.path._delete_=True", "model.diffusion.path.type=DiscretePath"]
    error = fails("--checkpoint", checkpoint, "--cfg-options", *table)
    assert error.count("\n") == 1
    assert "take the variational bound (tools/likelihood.py --method bound)" in error

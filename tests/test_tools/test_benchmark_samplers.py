"""``tools/benchmark.py samplers``: few steps beside the published 250."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmsora import diffusion as D

ROOT = Path(__file__).parents[2]
PATHS = {"table": D.DiscretePath(), "flow": D.LinearPath(), "ve": D.VEPath()}


@pytest.fixture(scope="module")
def benchmarks():
    """The modules, imported as they are by a script in ``tools``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        from benchmarks import bookkeeping, mixture, plot, sampler_toy, samplers

        yield {
            module.__name__.split(".")[1]: module
            for module in (bookkeeping, mixture, plot, sampler_toy, samplers)
        }
        for name in [name for name in sys.modules if name.startswith("benchmarks")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def mixture(benchmarks):
    return benchmarks["mixture"].Mixture()


@pytest.fixture(scope="module")
def toy(benchmarks):
    return benchmarks["sampler_toy"].Toy(256, 20_000, 100)


def level_of(path, t, like):
    return path.at(torch.tensor(t, dtype=torch.float64), like)


def noisy(mixture, level, count=7):
    generator = torch.Generator().manual_seed(3)
    x0 = mixture.sample(count, generator)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    return level.alpha * x0 + level.sigma * noise


LEVELS = [("table", 999.0), ("table", 300.5), ("table", 0.0), ("flow", 0.9), ("flow", 0.05)]
LEVELS += [("ve", 3.0)]


@pytest.mark.parametrize(("path", "t"), LEVELS)
def test_estimates_are_those_of_the_density(mixture, path, t):
    """Tweedie: the noise is ``-sigma`` times the gradient of the log-density."""
    level = level_of(PATHS[path], t, torch.empty(7, 16))
    x = noisy(mixture, level).requires_grad_()
    score = torch.autograd.grad(mixture.log_density(x, level).sum(), x)[0]
    estimate = mixture.estimate(x, level)
    torch.testing.assert_close(estimate.noise, -level.sigma * score, rtol=1e-8, atol=1e-8)
    back = level.alpha * estimate.x0 + level.sigma * estimate.noise
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("path", "t"), LEVELS)
def test_the_spread_is_that_of_the_density(mixture, path, t):
    """``d x0 / d x = alpha / sigma^2`` times the covariance."""
    level = level_of(PATHS[path], t, torch.empty(7, 16))
    x = noisy(mixture, level)
    slopes = [
        torch.func.jacrev(lambda one: mixture.estimate(one[None], level).x0[0])(row).diagonal()
        for row in x
    ]
    expected = torch.stack(slopes) * level.sigma**2 / level.alpha
    torch.testing.assert_close(mixture.spread(x, level), expected, rtol=1e-6, atol=1e-10)


def test_the_ends_of_a_path_are_finite(mixture):
    x = mixture.sample(5, torch.Generator().manual_seed(0))
    clean = mixture.estimate(x, level_of(PATHS["flow"], 0.0, x))
    torch.testing.assert_close(clean.x0, x)
    assert clean.noise.abs().max() == 0
    pure = mixture.estimate(x, level_of(PATHS["flow"], 1.0, x))
    torch.testing.assert_close(pure.noise, x)
    torch.testing.assert_close(pure.x0, (mixture.weights @ mixture.means).expand(5, 16))


def test_the_data_have_the_variance_of_noise(mixture):
    x = mixture.sample(100_000, torch.Generator().manual_seed(0))
    assert x.var().item() == pytest.approx(1, abs=0.01)
    assert x.mean().item() == pytest.approx(0, abs=0.01)
    shares = torch.bincount(mixture.mode_of(x)) / len(x)
    torch.testing.assert_close(shares.double(), mixture.weights, rtol=0, atol=5e-3)


def test_a_class_is_every_fourth_mode(mixture):
    """In pure noise the data are known by their class alone."""
    pure = level_of(PATHS["flow"], 1.0, torch.empty(4, 16))
    x0 = mixture.estimate(torch.zeros(4, 16).double(), pure, torch.arange(4)).x0
    for label, found in enumerate(x0):
        weights, means = mixture.weights[label::4], mixture.means[label::4]
        torch.testing.assert_close(found, weights @ means / weights.sum())


def test_guidance_goes_beyond_the_condition(mixture):
    level = level_of(PATHS["flow"], 0.6, torch.empty(7, 16))
    x, labels = noisy(mixture, level), torch.arange(7) % 4
    cond, null = mixture.estimate(x, level, labels), mixture.estimate(x, level)
    found = mixture.denoiser(labels, 4.0)(x, level)
    torch.testing.assert_close(found.x0, null.x0 + 4 * (cond.x0 - null.x0))
    torch.testing.assert_close(found.noise, null.noise + 4 * (cond.noise - null.noise))


def test_the_exact_flow_ends_in_the_mixture(toy):
    for row in toy.exact():
        assert abs(row.nll) < 4 * toy.floor.nll
        assert row.tv < toy.floor.tv + 4 * toy.floor.tv_std
    assert max(change for _, change in toy.ends.values()) < 1e-3


def test_figures_of_a_sampler(benchmarks, toy):
    """More steps come nearer; a variance that is learned fits better than either of the two."""
    samplers = benchmarks["samplers"]
    euler, few, many = samplers.PUBLISHED[3][0], 20, 100
    near, far = toy.measure(euler, many), toy.measure(euler, few)
    assert (near.calls, far.calls) == (many, few)
    assert near.median < far.median / 3
    assert near.guided_median < far.guided_median / 3
    small, large, learned = (toy.measure(one, 100).nll for one, _ in samplers.PUBLISHED[:3])
    assert small < -2 * toy.floor.nll < 2 * toy.floor.nll < large
    assert abs(learned) < min(-small, large)


def test_samplers_keep_to_the_budget(benchmarks, toy):
    for sampler in benchmarks["samplers"].CANDIDATES:
        row = toy.measure(sampler, sampler.steps(10))
        assert 9 <= row.calls <= 10, sampler.name
        assert (row.median is None) == sampler.stochastic


def test_the_two_loops_of_the_bookkeeping_agree(benchmarks):
    cost = benchmarks["bookkeeping"].measure_bookkeeping((2, 3, 1, 4, 5), 1)
    assert cost.difference < 1e-5
    assert 0 < cost.ours_ms < 50


def test_a_plot(benchmarks):
    plot = benchmarks["plot"]
    curves = [plot.Curve("a", [(10, 0.1), (50, 0.001)]), plot.Curve("b", [(100, 0.01)])]
    panels = [plot.Panel("title", "calls", curves, [10, 50, 100])] * 3
    image = plot.draw_panels(panels)
    assert image.width == 2 * plot.WIDTH
    assert image.height > 2 * plot.HEIGHT
    colours = {colour for _, colour in image.convert("RGB").getcolors(10_000)}
    assert set(plot.COLOURS[:2]) <= colours
    assert plot.COLOURS[2] not in colours


def test_a_quick_run(benchmarks, tool, tmp_path, capsys):
    out, picture = tmp_path / "figures.json", tmp_path / "plot.png"
    arguments = ["samplers", "--quick", "--rounds", "1"]
    arguments += ["--out", str(out), "--plot", str(picture)]
    assert tool("benchmark").main(arguments) == 0
    record = json.loads(out.read_text())
    samplers = benchmarks["samplers"]
    count = 2 + len(samplers.PUBLISHED) + len(samplers.CANDIDATES) * len(samplers.BUDGETS)
    assert len(record["rows"]) == count
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == count + 1
    assert "| DDIM | table | 250 | 250 |" in printed
    assert all(math.isfinite(row["nll"]) for row in record["rows"])
    assert len(record["bars"]) == 8 + len(record["bookkeeping"])
    assert Image.open(picture).format == "PNG"
    assert picture.stat().st_size < 100_000


@pytest.mark.slow
def test_the_bars(benchmarks, tool, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert tool("benchmark").main(["samplers", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["change_of_exact_ends"] < 2e-6
    assert all(bar["met"] for bar in record["bars"])

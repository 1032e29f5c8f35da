"""``tools/benchmark.py``: what the Runner costs, and our networks beside a textbook's."""

import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = ["--batch", "2", "--depth", "2", "--side", "16", "--frames", "4", "--rounds", "2"]
TIMED = ["inference", "train-fp32", "train-bf16"]


@pytest.fixture
def measure(tool, monkeypatch, capsys):
    """The printed figures by name: median, least and greatest."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "tools")

    def run(*arguments):
        tool("benchmark").main(["runner", *arguments])
        out = capsys.readouterr().out
        lines = re.findall(r"^  (\w.*?) +(-?[\d.]+)  \((-?[\d.]+) to (-?[\d.]+)\)$", out, re.M)
        return {name: tuple(map(float, figures)) for name, *figures in lines}

    return run


@pytest.fixture
def tools(monkeypatch):
    """Makes ``benchmarks`` importable, as it is for a script in ``tools``."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32


def test_it_prints_what_an_iteration_costs(measure):
    figures = measure("--iters", "20", "--rounds", "1")
    assert list(figures) == ["bare loop", "Runner", "Runner over bare"]
    bare, runner, over = (median for median, *_ in figures.values())
    assert 0 < bare < 100
    assert over == pytest.approx(runner - bare, abs=0.02)


@pytest.mark.slow
def test_the_runner_costs_a_millisecond_at_most(measure):
    median, *_ = measure()["Runner over bare"]
    assert median <= 1


def test_every_row_of_the_networks(tools, tool, tmp_path, capsys):
    what = [*TIMED, "memory", "optimizer", "ema", "step"]
    path = tmp_path / "figures.json"
    arguments = ["network", "--models", "DiT-S/8", "Latte-S/8", "--what", *what, *TINY]
    arguments += ["--peak-tflops", "1", "--out", str(path)]
    assert tool("benchmark").main(arguments) == 0

    figures = json.loads(path.read_text())
    found = {(row["model"], row["what"], row["pair"]) for row in figures["rows"]}
    for model in "DiT-S/8", "Latte-S/8":
        pairs = {(each, pair) for each in [*TIMED, "optimizer", "ema", "step"]
                 for pair in ("ours / textbook", "A/A")}  # fmt: skip
        pairs |= {("outputs", "ours - textbook"), ("memory", "ours / textbook")}
        if model == "DiT-S/8":
            pairs |= {(each, "textbook / diffusers") for each in TIMED}
        assert {row[1:] for row in found if row[0] == model} == pairs
    for row in figures["rows"]:
        low, median, high = (row["ratio"][key] for key in ("low", "median", "high"))
        assert 0 < low <= median <= high
        if row["what"] == "memory":
            assert 0.5 < median < 1
        if row["what"] == "outputs":
            assert median < 1e-5
            assert row["verdict"] == "ok"

    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith(("DiT-S/8", "Latte-S/8"))]
    assert len(table) == len(figures["rows"])
    assert figures["noisy"] == any(line.startswith("WARNING: noisy run") for line in lines)


def test_other_outputs_are_a_failure(tools, tool, monkeypatch, capsys):
    from benchmarks import cases

    monkeypatch.setattr(cases, "load_denoiser", lambda ours, weights: None)
    arguments = ["network", "--models", "DiT-S/8", "--what", "memory", *TINY]
    assert tool("benchmark").main(arguments) == 1
    assert re.search(r"outputs .* MISSED", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["DiT-S/2", "Latte-S/4"])
def test_the_textbook_is_our_network(tools, name):
    from benchmarks.cases import Sizes, build_case

    case = build_case(name, Sizes(depth=4, batch=2, frames=3, side=8, device="cpu"))
    gradients = []
    for key in "ours", "textbook":
        model, forward = case.sides[key]
        (forward() ** 2).mean().backward()
        gradients.append(sum(p.grad.double().norm() ** 2 for p in model.parameters()
                             if p.grad is not None))  # fmt: skip
    assert case.difference < 1e-5
    assert float(gradients[0]) == pytest.approx(float(gradients[1]), rel=1e-4)


def test_an_unknown_network_is_named(tools):
    from benchmarks.cases import Sizes, build_case

    with pytest.raises(ValueError, match=r"no network 'DiT-S'; .* as DiT-S/2"):
        build_case("DiT-S", Sizes(depth=1, batch=1, frames=1, side=8, device="cpu"))


def test_the_interval_is_that_of_order_statistics(tools):
    from benchmarks.timing import median_interval

    assert median_interval([3.0, 1.0, 2.0]) == (2, 1, 3)
    assert median_interval(range(1, 16)) == (8, 4, 12)  # 96.5 %, from the tables


def test_memory_counts_what_is_held_at_once(tools):
    from benchmarks.timing import peak_bytes

    def allocate():
        first = torch.empty(1000)
        del first
        second = torch.empty(2000), torch.empty(500)
        return second

    assert 10_000 <= peak_bytes(allocate, "cpu") < 10_500


def test_bars_are_met_or_missed(tools):
    from benchmarks.table import Row, bar_of, verdict
    from benchmarks.timing import Ratio

    bar = bar_of("train-fp32", "Latte-S/2", "cpu")
    assert bar == "low >= 1.00"
    assert bar_of("train-fp32", "Latte-XL/2", "cpu") == bar_of("step", "DiT-S/2", "cpu") == ""
    for low, expected in (1.0, "ok"), (0.99, "MISSED"):
        row = Row("Latte-S/2", "train-fp32", "ours / textbook", Ratio(1.1, low, 1.2), bar, "")
        assert verdict(row) == expected

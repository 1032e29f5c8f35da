"""``tools/benchmark.py``: what the Runner costs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def measure(tool, monkeypatch, capsys):
    """The printed figures by name: median, least and greatest."""
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        tool("benchmark").main(["runner", *arguments])
        out = capsys.readouterr().out
        lines = re.findall(r"^  (\w.*?) +(-?[\d.]+)  \((-?[\d.]+) to (-?[\d.]+)\)$", out, re.M)
        return {name: tuple(map(float, figures)) for name, *figures in lines}

    return run


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

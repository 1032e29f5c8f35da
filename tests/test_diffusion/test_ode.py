"""Integration in the path's own time: order, ends, and what is refused.

What the authors' own code gives is in ``test_sit_samplers.py``.
"""

import math
import sys

import pytest
import torch

from mmsora import diffusion as D

SHAPE = 2, 3, 4, 5, 6
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}
MEAN, STD = 0.5, 0.3

each_method = pytest.mark.parametrize("method", ORDERS)


def process(path, solver, grid, prediction=None):
    parts = D.UniformTimes(), solver, grid, D.ClassifierFree(1.0), D.MSE()
    return D.Diffusion(path, prediction or D.VelocityPrediction(sign=-1), *parts)


def ideal(x, clock):
    """The velocity of normal data by SiT's clock."""
    t = clock.to(x).reshape(-1, 1, 1, 1, 1)
    residual = (x - t * MEAN) / (t**2 * STD**2 + (1 - t) ** 2)
    return MEAN + t * STD**2 * residual - (1 - t) * residual


def growth(t, state):
    """Two states of different shapes: ``exp(sin t)`` and ``-cos t``."""
    a, b = state
    return torch.cos(t) * a, torch.sin(t).expand_as(b)


def error(solver, times):
    """Of both states, from where they are known."""
    start, end = times[0], times[-1]
    a = torch.full((2, 3), math.exp(math.sin(start)), dtype=torch.float64)
    b = torch.full((4,), -math.cos(start), dtype=torch.float64)
    a, b = solver.integrate(growth, (a, b), times)
    assert (a.shape, b.shape) == ((2, 3), (4,))
    differences = a - math.exp(math.sin(end)), b + math.cos(end)
    return [part.abs().max().item() for part in differences]


@each_method
@pytest.mark.parametrize("ends", [(0.0, 1.5), (1.7, 0.2)])
def test_order(method, ends):
    solver = D.RungeKutta(method)
    coarse, fine = (
        error(solver, torch.linspace(*ends, steps + 1, dtype=torch.float64)) for steps in (8, 16)
    )
    for large, small in zip(coarse, fine, strict=True):
        assert math.log2(large / small) == pytest.approx(ORDERS[method], abs=0.35)


@each_method
def test_uneven_steps(method):
    times = torch.tensor([1.7, 1.5, 1.49, 1.0, 0.9, 0.4], dtype=torch.float64)
    assert max(error(D.RungeKutta(method), times)) < {1: 0.5, 2: 0.05, 4: 1e-3}[ORDERS[method]]


@pytest.mark.parametrize("ends", [(0.0, 1.5), (1.7, 0.2)])
@pytest.mark.parametrize("overshoot", [False, True])
def test_adaptive_steps_keep_the_tolerance(ends, overshoot):
    times = torch.tensor(ends, dtype=torch.float64)
    for tolerance in 1e-3, 1e-8:
        solver = D.DormandPrince(tolerance, tolerance, overshoot)
        assert max(error(solver, times)) < (20 if overshoot else 3) * tolerance


@pytest.mark.parametrize("overshoot", [False, True])
def test_adaptive_steps_stay_on_the_path(overshoot):
    """Noise prediction at the very end, in single precision, which rounds 0.2 up."""
    times, ends = [], torch.tensor([0.9, 0.3, 0.2], dtype=torch.float64)

    def told(x, clock):
        times.append(clock[0].item())
        return torch.sin(x)

    x = torch.ones(SHAPE)
    path = D.LinearPath(clock_scale=1.0, span=(0.0, 0.999))
    solver = D.DormandPrince(1e-2, overshoot=overshoot)
    process(path, solver, lambda path: ends, D.NoisePrediction()).sample(told, x, {}, None, None)
    assert max(times) <= 0.9 + 1e-6
    assert (min(times) < 0.19) == overshoot
    if not overshoot:
        assert min(times) == pytest.approx(0.2)


def test_adaptive_steps_take_the_ends_of_the_grid_alone():
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    path = D.LinearPath(1.0, reverse_clock=True)
    coarse, fine = (
        process(path, D.DormandPrince(), D.SpacedGrid(steps)).sample(ideal, x, {}, None, None)
        for steps in (1, 40)
    )
    assert torch.equal(coarse, fine)
    tight = process(path, D.DormandPrince(1e-6, 1e-8), D.SpacedGrid(1))
    many = process(path, D.RungeKutta("rk4"), D.SpacedGrid(60))
    expected = many.sample(ideal, x, {}, None, None)
    torch.testing.assert_close(tight.sample(ideal, x, {}, None, None), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(coarse, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    "solver", [D.RungeKutta("euler"), D.DormandPrince(), D.DormandPrince(overshoot=True)]
)
def test_gaussian_data_come_back(solver):
    noise = torch.randn(40, 4, 5, 5, 5, generator=torch.Generator().manual_seed(0))
    diffusion = process(D.LinearPath(1.0, reverse_clock=True), solver, D.SpacedGrid(249))
    x = diffusion.sample(ideal, noise, {}, None, None)
    assert (x.mean().item(), x.std().item()) == pytest.approx((MEAN, STD), abs=0.01)


@pytest.mark.parametrize("path", [D.TrigPath(), D.VPPath(span=(0.01, 1.0))])
def test_the_same_flow_as_along_alpha_and_sigma(path):
    """The other solvers' steps differ, and their limit does not."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = (
        process(path, solver, D.SpacedGrid(400), D.VPrediction()).sample(
            lambda x, clock: torch.tanh(x) * (clock / 1000).reshape(-1, 1, 1, 1, 1),
            x, {}, None, None,
        )
        for solver in (D.RungeKutta("heun2"), D.Heun())
    )  # fmt: skip
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-4)


@each_method
def test_no_number_leaves_the_device(method):
    x = torch.empty(SHAPE, device="meta")
    diffusion = process(D.TrigPath(), D.RungeKutta(method), D.SpacedGrid(5))
    assert diffusion.sample(ideal, x, {}, None, None).shape == SHAPE


@pytest.mark.parametrize("solver", [D.RungeKutta("rk4"), D.DormandPrince()])
def test_times_end_on_the_grid(solver):
    """To the last bit, whatever the state's precision: beyond its end a path may be undefined."""
    times, asked = torch.linspace(0.6, 0.001, 40, dtype=torch.float64) ** 3, []

    def field(t, state):
        asked.append(t.item())
        return (torch.zeros_like(state[0]),)

    solver.integrate(field, (torch.zeros(1, dtype=torch.float32),), times)
    assert times[0] == max(asked)
    assert times[-1] <= min(asked) < 1.001 * times[-1]
    if isinstance(solver, D.RungeKutta):
        assert asked[3::4] == times[1:].tolist()


@pytest.mark.parametrize("solver", [D.RungeKutta(), D.DormandPrince()])
def test_a_table_is_refused(solver):
    with pytest.raises(ValueError, match="continuous time, and DiscretePath has 1000 levels"):
        process(D.DiscretePath(), solver, D.SpacedGrid(5), D.VPrediction())


def test_mistakes():
    with pytest.raises(ValueError, match="unknown method 'heun'; did you mean 'heun2'"):
        D.RungeKutta("heun")
    with pytest.raises(ValueError, match="rtol must be positive, got 0"):
        D.DormandPrince(rtol=0)
    with pytest.raises(ValueError, match="atol must be positive, got -1"):
        D.DormandPrince(atol=-1)


def test_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ValueError, match="pip install torchdiffeq") as caught:
        D.DormandPrince()
    assert "\n" not in str(caught.value)

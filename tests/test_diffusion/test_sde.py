"""SiT's stochastic samplers on data whose ideal network is known, and what they refuse.

What the authors' own code gives is in ``test_sit_samplers.py``.
"""

import pytest
import torch

from mmsora import diffusion as D
from mmsora.utils.draws import Draws

SHAPE = 2, 3, 4, 5, 6
FORMS = ["constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"]
MEAN, STD = 0.5, 0.3
PATHS = {"linear": D.LinearPath(), "trig": D.TrigPath(), "vp": D.VPPath()}
VE = D.VEPath(sigma_max=20.0)

each_solver = pytest.mark.parametrize("solver", [D.EulerMaruyama, D.StochasticHeun])


class Ideal(D.Prediction):
    """Knows the data's distribution, and needs no network."""

    def target(self, path, x0, noise, level):
        return x0

    def estimate(self, path, x, output, level):
        _, alpha, sigma = level
        residual = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return D.Estimate(MEAN + alpha * STD**2 * residual, sigma * residual)


class Numbers:
    """Draws of one generator, and their names."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.names = []

    def normal(self, name, like):
        self.names.append(name)
        return torch.randn(like.shape, dtype=like.dtype, generator=self.generator)


class Bent(D.LinearPath):
    """Sigma is the square of time, so that even steps of time are uneven in sigma."""

    def coefficients(self, t):
        return 1 - t**2, t**2

    def rates(self, t):
        return -2 * t, 2 * t


def process(path, solver, grid, prediction=None):
    parts = D.UniformTimes(), solver, grid, D.ClassifierFree(1.0), D.MSE()
    return D.Diffusion(path, prediction or Ideal(), *parts)


def silent(x, clock):
    return torch.zeros_like(x)


def network(x, clock):
    return torch.tanh(x) + torch.sin(clock.to(x).reshape(-1, 1, 1, 1, 1))


def spread(path, solver, grid):
    """Mean and deviation of 20,000 samples."""
    draws = Numbers()
    noise = draws.normal("start", torch.empty(40, 4, 5, 5, 5))
    x = process(path, solver, grid).sample(silent, noise, {}, None, draws)
    return x.mean().item(), x.std().item()


@pytest.mark.parametrize(
    ("name", "form", "solver"),
    [
        *(("linear", form, D.EulerMaruyama) for form in FORMS),
        *(("trig", form, D.StochasticHeun) for form in FORMS),
        *(("vp", "sbdm", solver) for solver in (D.EulerMaruyama, D.StochasticHeun)),
    ],
)
def test_gaussian_data_come_back(name, form, solver):
    grid = D.SpacedGrid(200, last_step=0.01)
    found = spread(PATHS[name], solver(form, last_step="euler"), grid)
    assert found == pytest.approx((MEAN, STD), abs=0.01)


@pytest.mark.parametrize("last", ["mean", "tweedie", "euler", "none"])
@each_solver
def test_gaussian_data_come_back_by_any_last_step(solver, last):
    grid = D.SpacedGrid(250, last_step=None if last == "none" else 0.04)
    if last == "tweedie":  # of the data, what is certain: the rest of the variance is missing
        alpha, sigma = 0.96, 0.04
        std = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) ** 0.5
    else:
        std = STD
    found = spread(PATHS["linear"], solver(last_step=last), grid)
    assert found == pytest.approx((MEAN, std), abs=0.01)


@each_solver
@pytest.mark.parametrize("norm", [0.0, 0.5, 2.0])
def test_any_amount_of_noise_is_balanced(solver, norm):
    grid = D.SpacedGrid(250, last_step=0.01)
    assert spread(Bent(), solver("sigma", norm), grid) == pytest.approx((MEAN, STD), abs=0.01)


@each_solver
def test_times_may_be_any(solver):
    """EDM's are the noise levels themselves, and no solver asks for clean data."""
    times = torch.linspace(20**0.5, 0.1**0.5, 600, dtype=torch.float64) ** 2
    times = torch.cat([times, torch.zeros(1, dtype=torch.float64)])
    found = spread(VE, solver("sigma", 0.5, "euler"), lambda path: times)
    assert found == pytest.approx((MEAN, STD), abs=0.02)


@each_solver
def test_without_new_noise_it_is_the_flow(solver):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    rule = {D.EulerMaruyama: "euler", D.StochasticHeun: "heun2"}[solver]
    prediction, grid = D.VelocityPrediction(), D.SpacedGrid(8)
    found, flow = (
        process(Bent(), part, grid, prediction).sample(network, x, {}, None, Numbers())
        for part in (solver(norm=0.0, last_step="mean"), D.RungeKutta(rule))
    )
    # The last step is Euler's.
    times = torch.linspace(1, 0, 9, dtype=torch.float64)
    before = process(Bent(), D.RungeKutta(rule), lambda path: times[:-1], prediction)
    last = process(Bent(), D.RungeKutta("euler"), lambda path: times[-2:], prediction)
    parts = before.sample(network, x, {}, None, None)
    torch.testing.assert_close(found, last.sample(network, parts, {}, None, None))
    assert torch.equal(found, flow) or rule == "heun2"


@each_solver
@pytest.mark.parametrize(("last", "noises", "calls"), [("mean", 4, 5), ("none", 5, 5)])
def test_noise_is_drawn_for_each_step_by_name(solver, last, noises, calls):
    draws, clocks = Numbers(), []

    def counted(x, clock):
        clocks.append(clock)
        return network(x, clock)

    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    parts = solver(last_step=last), D.SpacedGrid(5), D.VelocityPrediction()
    process(D.LinearPath(), *parts).sample(counted, x, {}, None, draws)
    assert draws.names == [f"solver/{i}" for i in range(noises)]
    assert len(clocks) == (calls if solver is D.EulerMaruyama else 9)


@each_solver
def test_heun_takes_an_euler_step_to_clean_data(solver):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    parts = solver(last_step="none"), D.SpacedGrid(5), D.VelocityPrediction()
    assert process(D.LinearPath(), *parts).sample(network, x, {}, None, Numbers()).isfinite().all()


@each_solver
def test_a_sample_is_the_same_alone_and_in_a_batch(solver):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    diffusion = process(D.LinearPath(), solver(), D.SpacedGrid(5), D.VelocityPrediction())
    both = diffusion.sample(network, x, {}, None, Draws(0, [3, 8]))
    alone = diffusion.sample(network, x[1:], {}, None, Draws(0, [8]))
    torch.testing.assert_close(both[1:], alone)


@each_solver
@pytest.mark.parametrize(
    ("form", "last"),
    [
        *((form, "mean") for form in FORMS),
        *(("sigma", last) for last in ("tweedie", "euler", "none")),
    ],
)
def test_no_number_leaves_the_device(solver, form, last):
    x = torch.empty(SHAPE, device="meta")
    parts = solver(form, last_step=last), D.SpacedGrid(5), D.VelocityPrediction()
    found = process(D.LinearPath(), *parts).sample(network, x, {}, None, Draws(0, [3, 8]))
    assert found.shape == SHAPE
    assert found.device.type == "meta"


@pytest.mark.parametrize("steps", [5, 700])
def test_sbdm_starts_inside(steps):
    """A thousandth of the path, but never beyond the first step."""
    times = []

    def told(x, clock):
        times.append(clock[0].item())
        return x

    parts = D.EulerMaruyama("sbdm"), D.SpacedGrid(steps), D.VelocityPrediction()
    x = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    process(D.LinearPath(clock_scale=1.0), *parts).sample(told, x, {}, None, Numbers())
    assert times[0] == pytest.approx(1 - min(1e-3, 0.5 / steps))
    assert times[1] == pytest.approx(1 - 1 / steps)
    assert times == sorted(times, reverse=True)


@each_solver
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(diffusion="sigmaa"), "unknown diffusion 'sigmaa'; did you mean 'sigma'"),
        (dict(diffusion="SBDM"), "unknown diffusion 'SBDM'; did you mean 'sbdm'"),
        (dict(diffusion="inccreasing-decreasing"), "did you mean 'increasing-decreasing'"),
        (dict(last_step="Mean"), "unknown last_step 'Mean'; did you mean 'mean'"),
        (dict(norm=-1.0), "norm must not be negative, got -1"),
    ],
)
def test_mistakes(solver, arguments, message):
    with pytest.raises(ValueError, match=message):
        solver(**arguments)


@each_solver
def test_what_a_path_must_have(solver):
    with pytest.raises(ValueError, match=f"{solver.__name__} integrates in continuous time"):
        process(D.DiscretePath(), solver(), D.SpacedGrid(5))
    for form in ("linear", "decreasing", "increasing-decreasing"):
        with pytest.raises(ValueError, match=f"{form!r} is a function of times from 0 to 1"):
            process(VE, solver(form), lambda path: torch.tensor([20.0, 1.0, 0.0]))

"""If data are Gaussian the ideal network is known, and sampling must give the data back.

The network here works out its time from its clock alone, and by formulas of its own, so a path
that tells a wrong clock or has wrong coefficients is noticed too.
"""

import math

import numpy as np
import pytest
import torch

from mmsora import diffusion as D
from mmsora.utils.draws import Draws

MEAN = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64).reshape(1, 3, 1, 1, 1)
STD = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64).reshape(1, 3, 1, 1, 1)
SAMPLES = 8000  # of each channel

# DDPM's table from the paper: cumulative products, clean data first.
ALPHA = np.sqrt(np.cumprod(np.concatenate([[1.0], 1 - np.linspace(1e-4, 0.02, 1000)])))
SIGMA = np.sqrt(1 - ALPHA**2)


def linear_time(clock):
    """Alpha, sigma and their rates at a clock of rectified flow."""
    t = clock / 1000
    return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


def table_level(clock):
    """The same at a clock of DDPM; rates are differences, times the levels."""
    now = clock.round().long().numpy() + 1
    rates = [1000 * (values[now] - values[now - 1]) for values in (ALPHA, SIGMA)]
    values = ALPHA[now], SIGMA[now], *rates
    return tuple(torch.from_numpy(value) for value in values)


OUTPUTS = {
    D.NoisePrediction: lambda a, s, da, ds, x0, noise: noise,
    D.VPrediction: lambda a, s, da, ds, x0, noise: a * noise - s * x0,
    D.VelocityPrediction: lambda a, s, da, ds, x0, noise: da * x0 + ds * noise,
}


def ideal_network(time, prediction):
    def network(x, clock):
        level = [value.reshape(-1, 1, 1, 1, 1) for value in time(clock.double())]
        alpha, sigma = level[:2]
        residual = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        x0, noise = MEAN + alpha * STD**2 * residual, sigma * residual
        output = OUTPUTS[type(prediction)](*level, x0, noise)
        return (output * getattr(prediction, "sign", 1)).to(x)

    return network


def process(path, prediction, solver, steps):
    parts = D.UniformTimes(), solver, D.SpacedGrid(steps), D.ClassifierFree(1.0), D.MSE()
    return D.Diffusion(path, prediction, *parts)


def start(samples, dtype=torch.float32):
    """Noise of 3 channels, 20 numbers of each in a clip."""
    draws = Draws(seed=1, indices=range(samples // 20))
    return draws.normal("start", torch.empty(samples // 20, 3, 5, 2, 2, dtype=dtype)), draws


LINEAR, TABLE = (D.LinearPath(), linear_time), (D.DiscretePath(), table_level)
SHORT = (D.LinearPath(span=(0.0, 0.999)), linear_time)
PAIRS = {
    "linear, velocity": (*LINEAR, D.VelocityPrediction()),
    "linear, velocity reversed": (*LINEAR, D.VelocityPrediction(sign=-1)),
    "linear, v": (*LINEAR, D.VPrediction()),
    "linear, noise": (*SHORT, D.NoisePrediction()),
    "table, velocity": (*TABLE, D.VelocityPrediction()),
    "table, velocity reversed": (*TABLE, D.VelocityPrediction(sign=-1)),
    "table, v": (*TABLE, D.VPrediction()),
    "table, noise": (*TABLE, D.NoisePrediction()),
}
SOLVERS = {
    "euler": (D.Euler(), 400),
    "euler, half noise": (D.Euler(eta=0.5), 200),
    "heun": (D.Heun(), 50),
    "ancestral": (D.Ancestral(), 400),
}

each_pair = pytest.mark.parametrize(("path", "time", "prediction"), PAIRS.values(), ids=PAIRS)


@each_pair
@pytest.mark.parametrize(("solver", "steps"), SOLVERS.values(), ids=SOLVERS)
def test_sampling_gives_the_data(path, time, prediction, solver, steps):
    noise, draws = start(SAMPLES)
    diffusion = process(path, prediction, solver, steps)
    x = diffusion.sample(ideal_network(time, prediction), noise, {}, None, draws)

    whitened = (x - MEAN) / STD
    assert whitened.mean((0, 2, 3, 4)).abs().max() < 0.05
    assert (whitened.std((0, 2, 3, 4)) - 1).abs().max() < 0.045


@each_pair
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_flow_ends_where_it_must(path, time, prediction, solver):
    """The exact flow keeps a number's distance from the mean, counted in standard deviations."""
    solver, steps = SOLVERS[solver]
    noise, draws = start(100)
    diffusion = process(path, prediction, solver, steps)
    x = diffusion.sample(ideal_network(time, prediction), noise, {}, None, draws)

    assert ((x - MEAN) / STD - noise).abs().max() < 0.04


@pytest.mark.parametrize(("solver", "order"), [(D.Euler(), 1), (D.Heun(), 2)])
@pytest.mark.parametrize("prediction", [D.VelocityPrediction(), D.VPrediction()])
def test_order_of_convergence(solver, order, prediction):
    noise, draws = start(100, torch.float64)

    def error(steps):
        diffusion = process(D.LinearPath(), prediction, solver, steps)
        x = diffusion.sample(ideal_network(linear_time, prediction), noise, {}, None, draws)
        return (x - MEAN - STD * noise).abs().max().item()

    coarse, fine = error(40), error(80)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)
    assert fine < 0.1**order


def learned_network(grid):
    """The ideal network that knows the exact variance of a step of a grid, too."""
    ideal = ideal_network(table_level, D.NoisePrediction())
    below = dict(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True))

    def network(x, clock):
        alpha, sigma, *_ = (value[:1] for value in table_level(clock.double()))
        alpha_to, sigma_to, *_ = table_level(torch.tensor([below[clock[0].item()]]))
        forward = sigma**2 - (alpha / alpha_to * sigma_to) ** 2
        posterior = forward * (sigma_to / sigma) ** 2
        of_data = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
        exact = posterior + (alpha_to * forward / sigma**2) ** 2 * of_data
        mix = (exact / posterior).log() / (forward / posterior).log()
        mix = mix if sigma_to > 0 else torch.zeros_like(STD)
        return torch.cat([ideal(x, clock), (2 * mix - 1).expand_as(x).to(x)], dim=1)

    return network


def test_with_the_exact_variance_few_steps_are_enough():
    """Each step is then drawn from the true distribution, however long it is."""
    path, grid, solver = D.DiscretePath(), D.SpacedGrid(10), D.Ancestral()

    def spread(prediction, network):
        noise, draws = start(SAMPLES)
        x = process(path, prediction, solver, 10).sample(network, noise, {}, None, draws)
        whitened = (x - MEAN) / STD
        assert whitened.mean((0, 2, 3, 4)).abs().max() < 0.05
        return whitened.std((0, 2, 3, 4))

    learned = spread(D.LearnedRange(D.NoisePrediction()), learned_network(grid(path)))
    assert (learned - 1).abs().max() < 0.03
    fixed = spread(D.NoisePrediction(), ideal_network(table_level, D.NoisePrediction()))
    assert (fixed - 1).abs().min() > 0.05


def test_noise_prediction_refuses_a_path_that_starts_in_pure_noise():
    with pytest.raises(ValueError, match=r"alpha = 0.*span=\(0, 0\.999\)"):
        process(D.LinearPath(), D.NoisePrediction(), D.Euler(), 10)

"""Normal data, whose ideal network is known: orders, exact steps and guidance in closed form.

That every combination of parts gives the data back is in ``test_product.py``.
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


def linear_level(clock):
    """Alpha and sigma at a clock of rectified flow."""
    return 1 - clock / 1000, clock / 1000


def table_level(clock):
    """The same at a clock of DDPM."""
    now = clock.round().long().numpy() + 1
    return torch.from_numpy(ALPHA[now]), torch.from_numpy(SIGMA[now])


def ideal_network(level_of, data_std=STD):
    """Predicts v. ``std`` is a condition: the data's deviation."""

    def network(x, clock, std=data_std):
        alpha, sigma = (value.reshape(-1, 1, 1, 1, 1) for value in level_of(clock.double()))
        residual = (x - alpha * MEAN) / (alpha**2 * std**2 + sigma**2)
        x0, noise = MEAN + alpha * std**2 * residual, sigma * residual
        return (alpha * noise - sigma * x0).to(x)

    return network


def process(path, prediction, solver, grid, scale=1.0):
    parts = D.UniformTimes(), solver, grid, D.ClassifierFree(scale), D.MSE()
    return D.Diffusion(path, prediction, *parts)


def start(samples, dtype=torch.float32):
    """Noise of 3 channels, 20 numbers of each in a clip."""
    draws = Draws(seed=1, indices=range(samples // 20))
    return draws.normal("start", torch.empty(samples // 20, 3, 5, 2, 2, dtype=dtype)), draws


ORDERS = {
    "Euler": (D.Euler(), 1),
    "Heun": (D.Heun(), 2),
    "Midpoint": (D.Midpoint(), 2),
    "AB2": (D.AB2(), 2),
    "DPM-Solver++ 2M": (D.DPMSolverPP2M(), 2),
    "UniPC 1": (D.UniPC(1), 2),  # the corrector's
    "UniPC 2": (D.UniPC(2), 3),
    "UniPC 3": (D.UniPC(3), 2),  # of its lower orders at the ends
    "euler": (D.RungeKutta("euler"), 1),
    "midpoint": (D.RungeKutta("midpoint"), 2),
    "heun2": (D.RungeKutta("heun2"), 2),
    "rk4": (D.RungeKutta("rk4"), 4),
}


@pytest.mark.parametrize(("solver", "order"), ORDERS.values(), ids=ORDERS)
def test_order_of_convergence(solver, order):
    """The exact flow keeps a number's distance from the mean, counted in deviations."""
    path = D.TrigPath(span=(0.02, 0.99))
    times = torch.tensor([path.t_noise, path.t_clean], dtype=torch.float64)
    (first, last), (most, least) = path.coefficients(times)
    noise, _ = start(100, torch.float64)

    def level_of(clock):
        return (clock * math.pi / 2000).cos(), (clock * math.pi / 2000).sin()

    def error(steps):
        x = first * MEAN + (first**2 * STD**2 + most**2).sqrt() * noise
        diffusion = process(path, D.VPrediction(), solver, D.LogSNRGrid(steps))
        x = diffusion.sample(ideal_network(level_of), x, {}, None, None)
        return ((x - last * MEAN) / (last**2 * STD**2 + least**2).sqrt() - noise).abs().max()

    coarse, fine = error(40), error(80)
    assert math.log2(coarse / fine) > order - 0.15
    assert fine < 0.1**order


def learned_network(grid):
    """The ideal network that knows the exact variance of a step of a grid, too."""
    ideal = ideal_network(table_level)
    below = dict(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True))

    def network(x, clock):
        alpha, sigma = (value[:1] for value in table_level(clock.double()))
        alpha_to, sigma_to = table_level(torch.tensor([below[clock[0].item()]]))
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
        x = process(path, prediction, solver, grid).sample(network, noise, {}, None, draws)
        whitened = (x - MEAN) / STD
        assert whitened.mean((0, 2, 3, 4)).abs().max() < 0.05
        return whitened.std((0, 2, 3, 4))

    learned = spread(D.LearnedRange(D.VPrediction()), learned_network(grid(path)))
    assert (learned - 1).abs().max() < 0.03
    fixed = spread(D.VPrediction(), ideal_network(table_level))
    assert (fixed - 1).abs().min() > 0.05


@pytest.mark.parametrize("steps", [3, 7])
def test_the_forward_variance_is_exact_for_data_like_noise(steps):
    """Then few steps are enough, too (DDPM, section 3.2): the effects of all draws add up to 1."""

    class Effects:
        def normal(self, name, like):
            numbers = torch.zeros_like(like)
            numbers[2 + int(name.removeprefix("solver/"))] = 1
            return numbers

    path = D.DiscretePath()
    noise = torch.zeros(steps + 2, 3, 1, 5, 4, dtype=torch.float64)
    noise[1] = 1
    ancestral = process(path, D.VPrediction(), D.Ancestral("forward"), D.SpacedGrid(steps))
    network = ideal_network(table_level, torch.ones_like(STD))
    x = ancestral.sample(network, noise, {}, None, Effects())

    variance = (x[1:] - x[0]).square().sum(0)
    # The last step draws nothing: what its level lacks of the data is missing.
    torch.testing.assert_close(variance, torch.full_like(variance, ALPHA[1] ** 2))


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_guidance_by_wider_data(scale):
    """The flow's deviation is the product of the conditions', each to the power of its share."""
    path, width = D.VEPath(), 2.0

    def deviation(sigma):
        ours, others = ((std**2 + sigma**2).sqrt() for std in (STD, width * STD))
        return ours**scale * others ** (1 - scale)

    network = ideal_network(lambda clock: (torch.ones_like(clock), (4 * clock).exp()))
    guided = process(path, D.VPrediction(), D.UniPC(3), D.KarrasGrid(60), scale)
    noise, _ = start(100, torch.float64)
    x = (MEAN + deviation(torch.tensor(80.0)) * noise) / path.prior_std
    x = guided.sample(network, x, {"std": STD}, {"std": width * STD}, None)

    expected = MEAN + deviation(torch.tensor(0.0)) * noise
    torch.testing.assert_close(x, expected, rtol=0, atol=0.01)


def test_noise_prediction_refuses_a_path_that_starts_in_pure_noise():
    with pytest.raises(ValueError, match=r"alpha = 0.*span=\(0, 0\.999\)"):
        process(D.LinearPath(), D.NoisePrediction(), D.Euler(), D.SpacedGrid(10))

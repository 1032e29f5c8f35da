"""The same network, noise and steps must give what diffusers' schedulers give.

The Gaussian test proves that the parts agree with each other. This one pins the conventions they
cannot prove: the clock a network is told, the table of levels, the ends of the grid, the variance.
"""

from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

from mmsora import diffusion as D

SHAPE = 2, 3, 4, 5, 6
STEPS = 25
FLOW_STEPS = 16  # sixteenths are exact: a clock in float32 is then the same however it is computed


def network(x, clock):
    """Depends strongly on the clock, on every axis, and on nothing random."""
    clock = clock.to(x).reshape(-1, *[1] * (x.ndim - 1))
    axes = sum(x.roll(1, dims=axis) / axis for axis in range(1, x.ndim))
    return torch.tanh(axes + torch.sin(1.7 * clock)) + torch.sin(0.9 * clock)


class SequentialDraws:
    """Numbers in the order of the calls, as diffusers draws them."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def normal(self, name, like):
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ours(path, prediction, solver, grid):
    parts = D.UniformTimes(), solver, grid, D.ClassifierFree(1.0), D.MSE()
    diffusion = D.Diffusion(path, prediction, *parts)
    return diffusion.sample(network, start(), {}, None, SequentialDraws())


def theirs(scheduler, **options):
    x, generator = start(), torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        output = network(x, t.expand(len(x)))
        x = scheduler.step(output, t, x, generator=generator, **options).prev_sample
    return x


def assert_equal(actual, expected):
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def ending_clean(times):
    """A grid of given times, then clean data."""
    return lambda path: torch.tensor([*times, path.t_clean], dtype=torch.float64)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "prediction"),
    [("epsilon", D.NoisePrediction()), ("v_prediction", D.VPrediction())],
)
def test_euler_is_ddim(name, prediction, eta, spacing):
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing=spacing, prediction_type=name,
        beta_start=1e-4, beta_end=0.02,
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    grid = ending_clean(scheduler.timesteps.tolist())

    actual = ours(D.DiscretePath(), prediction, D.Euler(eta), grid)

    assert_equal(actual, theirs(scheduler, eta=eta))


@pytest.mark.parametrize("steps", [10, STEPS, 250])
@pytest.mark.parametrize(
    ("name", "prediction"),
    [("epsilon", D.NoisePrediction()), ("v_prediction", D.VPrediction())],
)
def test_ancestral_is_ddpm(name, prediction, steps):
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False, timestep_spacing="linspace", prediction_type=name,
        variance_type="fixed_small",
    )  # fmt: skip
    scheduler.set_timesteps(steps)

    actual = ours(D.DiscretePath(), prediction, D.Ancestral(), D.SpacedGrid(steps))

    assert_equal(actual, theirs(scheduler))


def test_euler_is_rectified_flow():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / FLOW_STEPS, FLOW_STEPS))
    parts = D.LinearPath(), D.VelocityPrediction(), D.Euler(), D.SpacedGrid(FLOW_STEPS)

    assert_equal(ours(*parts), theirs(scheduler))


def test_heun_is_the_heun_of_rectified_flow():
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(FLOW_STEPS)
    times = scheduler.sigmas.unique().flip(0).double()  # inner ones stand twice; 0 is the last
    parts = D.LinearPath(), D.VelocityPrediction(), D.Heun(), lambda path: times

    # They make their clock by another route in float32, an ulp off.
    scheduler.timesteps = (scheduler.sigmas[:-1].double() * 1000).float()
    assert len(times) == FLOW_STEPS + 1
    assert_equal(ours(*parts), theirs(scheduler))


def test_table_is_that_of_ddpm():
    level = torch.arange(1000)
    alpha, sigma = D.DiscretePath().coefficients(level.double())
    table = diffusers.DDPMScheduler().alphas_cumprod.double()
    torch.testing.assert_close(alpha, table.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(sigma**2, 1 - table, rtol=1e-5, atol=1e-7)
    assert D.DiscretePath().coefficients(torch.tensor(-1.0)) == (1, 0)


@pytest.mark.parametrize("levels", [100, 1000])
def test_every_table_goes_from_clean_data_to_noise(levels):
    """A shorter table has larger betas."""
    path = D.DiscretePath(num_levels=levels)
    alpha, sigma = path.coefficients(torch.arange(-1, levels).double())
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert alpha[-1] < 0.01
    assert (1 - alpha[1] ** 2).item() == pytest.approx(0.1 / levels)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


@pytest.mark.parametrize("steps", [2, 10, 20, 25, 50, 100, 250, 500, 1000])
def test_spaced_grid_is_linspace(steps):
    scheduler = diffusers.DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    assert D.SpacedGrid(steps)(D.DiscretePath()).tolist() == [*scheduler.timesteps.tolist(), -1]


def iddpm_levels(levels, steps):
    """The levels that iDDPM keeps: a fractional stride is added up, and each sum rounded."""
    kept, position = [], 0.0
    for _ in range(steps):
        kept.append(round(position))
        position += (levels - 1) / (steps - 1)
    return kept


@pytest.mark.parametrize("levels", [20, 50, 1000])
def test_spaced_grid_is_that_of_iddpm(levels):
    path = D.DiscretePath(num_levels=levels)
    for steps in range(2, levels + 1):
        grid = D.SpacedGrid(steps)(path).tolist()
        assert grid == [*reversed(iddpm_levels(levels, steps)), -1], steps


@pytest.mark.parametrize(
    ("steps", "total"), [(250, 124875), (50, 24975), (20, 9990), (5, 2498), (2, 999)]
)
def test_spaced_grid_has_the_published_sums(steps, total):
    assert D.SpacedGrid(steps)(D.DiscretePath())[:-1].sum() == total


def test_one_step_starts_at_the_noisiest_level():
    assert D.SpacedGrid(1)(D.DiscretePath()).tolist() == [999, -1]
    assert D.SpacedGrid(1)(D.LinearPath()).tolist() == [1, 0]


def test_noised_batch_is_theirs():
    x0, t = start(), torch.tensor([17, 801])
    parts = D.UniformTimes(), D.Euler(), D.SpacedGrid(2), D.ClassifierFree(1.0), D.MSE()
    prediction = D.VPrediction()
    batch = D.Diffusion(D.DiscretePath(), prediction, *parts).noised(
        x0, t.double(), SequentialDraws()
    )
    scheduler = diffusers.DDIMScheduler()
    noise = SequentialDraws().normal("noise", x0)

    torch.testing.assert_close(batch.noise, noise)
    assert_equal(batch.x, scheduler.add_noise(x0, noise, t))
    target = prediction.target(D.DiscretePath(), x0, noise, batch.level)
    assert_equal(target, scheduler.get_velocity(x0, noise, t))


def test_noised_batch_of_a_flow_is_theirs():
    x0, t = start(), torch.tensor([0.25, 0.875], dtype=torch.float64)
    parts = D.UniformTimes(), D.Euler(), D.SpacedGrid(2), D.ClassifierFree(1.0), D.MSE()
    path, prediction = D.LinearPath(), D.VelocityPrediction()
    batch = D.Diffusion(path, prediction, *parts).noised(x0, t, SequentialDraws())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()

    assert_equal(batch.x, scheduler.scale_noise(x0, path.clock(t).float(), batch.noise))
    assert_equal(prediction.target(path, x0, batch.noise, batch.level), batch.noise - x0)


def test_the_network_here_would_notice_a_wrong_clock():
    """Half a step of the clock must matter, else the tests above prove less than they say."""
    x = start()
    clocks = torch.linspace(0, 999, 50)
    outputs = [network(x, (clock + shift).expand(2)) for clock in clocks for shift in (0, 0.5)]
    for now, shifted in list(pairwise(outputs))[::2]:
        assert (now - shifted).abs().max() > 0.1

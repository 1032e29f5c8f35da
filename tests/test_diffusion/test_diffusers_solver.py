"""Diffusers' schedulers behind our call give what they give by themselves."""

import builtins

import diffusers
import numpy as np
import pytest
import torch

from mmsora import diffusion as D
from mmsora.diffusion.diffusers_solver import EXPLODING, ON_A_LINE, ON_A_TABLE
from mmsora.utils.draws import Draws

# Numpy's, of diffusers' code.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SHAPE = 2, 3, 4, 5, 6
STEPS = 12
STOCHASTIC = (
    "DDPM", "DDPMParallel", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "LCM", "SASolver",
    "TCD", "FlowMatchLCM",
)  # fmt: skip
FROM_PURE_NOISE = (
    "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DPMSolverMultistep",
    "EulerAncestralDiscrete", "EulerDiscrete", "LCM", "TCD", "UniPCMultistep",
)  # fmt: skip


def network(x, clock):
    clock = clock.to(x).reshape(-1, 1, 1, 1, 1)
    axes = sum(x.roll(1, dims=axis) / axis for axis in range(1, x.ndim))
    return torch.tanh(axes + torch.sin(clock / 50)) + torch.sin(clock / 90)


def start(indices=range(2)):
    return Draws(5, indices).normal("start", torch.empty(len(indices), *SHAPE[1:]))


def ours(path, prediction, solver, grid, x=None, indices=range(2)):
    parts = D.UniformTimes(), solver, grid, D.ClassifierFree(1.0), D.MSE()
    diffusion = D.Diffusion(path, prediction, *parts)
    x = start(indices) if x is None else x
    return diffusion.sample(network, x, {}, None, Draws(3, indices))


def theirs(scheduler, x, indices=range(2), **options):
    numbers = Draws(3, indices).uniform("solver/generators").tolist()
    generators = [torch.Generator().manual_seed(int(number * 2**53)) for number in numbers]
    if "generator" in scheduler.step.__code__.co_varnames:
        options["generator"] = generators
    for t in scheduler.timesteps:
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        output = network(scale(x, t), t.float().expand(len(x)))
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def scheduler_of(name, **options):
    scheduler_class = getattr(diffusers, f"{name}Scheduler")
    known = scheduler_class.__init__.__wrapped__.__code__.co_varnames
    return scheduler_class(**{key: value for key, value in options.items() if key in known})


def assert_equal(actual, expected, digits=1e-4):
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() < digits * expected.abs().max()


TABLE = {
    "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False,
    "set_alpha_to_one": True, "lower_order_final": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ON_A_TABLE)
def test_on_a_table(name):
    scheduler = scheduler_of(name, **TABLE)
    scheduler.set_timesteps(STEPS)
    parts = D.DiscretePath(), D.NoisePrediction(), D.DiffusersSolver(name)

    expected = theirs(scheduler, start() * scheduler.init_noise_sigma)

    assert_equal(ours(*parts, D.SpacedGrid(STEPS)), expected)


@pytest.mark.parametrize("name", [name for name in ON_A_TABLE if name in FROM_PURE_NOISE])
def test_on_a_table_that_starts_in_pure_noise(name):
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = scheduler_of(name, prediction_type="v_prediction", **TABLE, **options)
    scheduler.set_timesteps(STEPS)
    solver = D.DiffusersSolver(name, {"timestep_spacing": "trailing"})
    path = D.DiscretePath(zero_terminal_snr=True)

    expected = theirs(scheduler, start() * scheduler.init_noise_sigma)

    assert_equal(ours(path, D.VPrediction(), solver, D.TrailingGrid(STEPS)), expected)


@pytest.mark.parametrize("name", ON_A_TABLE)
def test_others_refuse_pure_noise(name):
    solver, path = D.DiffusersSolver(name), D.DiscretePath(zero_terminal_snr=True)
    if name in FROM_PURE_NOISE:
        assert ours(path, D.VPrediction(), solver, D.TrailingGrid(5)).isfinite().all()
    else:
        with pytest.raises(ValueError, match=f"{name} cannot start in pure noise"):
            ours(path, D.VPrediction(), solver, D.TrailingGrid(5))


@pytest.mark.parametrize("name", [name for name in ON_A_LINE if name.startswith("FlowMatch")])
def test_on_a_line(name):
    scheduler = scheduler_of(name)
    if name == "FlowMatchHeunDiscrete":
        scheduler.set_timesteps(STEPS)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    parts = D.LinearPath(), D.VelocityPrediction(), D.DiffusersSolver(name)

    assert_equal(ours(*parts, D.SpacedGrid(STEPS)), theirs(scheduler, start()))


@pytest.mark.parametrize("name", [name for name in ON_A_LINE if not name.startswith("FlowMatch")])
def test_multistep_schedulers_on_a_line(name):
    """Sixteenths of 1,000 that are whole: else they round the clock that they tell."""
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", **TABLE}
    scheduler = scheduler_of(name, **options)
    scheduler.set_timesteps(8)
    scheduler.timesteps = scheduler.sigmas[:-1] * 1000
    parts = D.LinearPath(), D.VelocityPrediction(), D.DiffusersSolver(name)

    assert_equal(ours(*parts, D.SpacedGrid(8)), theirs(scheduler, start()), digits=1e-3)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "UniPCMultistep"])
def test_a_shifted_path_is_followed(name):
    path = D.ShiftedPath(D.LinearPath(), shift=3.0)
    grid, prediction = D.SpacedGrid(STEPS), D.VelocityPrediction()
    seen = []

    def note(x, clock):
        seen.append(clock[0].item())
        return network(x, clock)

    parts = D.UniformTimes(), D.DiffusersSolver(name), grid, D.ClassifierFree(1.0), D.MSE()
    D.Diffusion(path, prediction, *parts).sample(note, start(), {}, None, Draws(3, range(2)))
    assert seen == pytest.approx((1000 * grid(path)[:-1]).tolist(), abs=2e-3)


@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
@pytest.mark.parametrize("name", EXPLODING)
def test_on_the_path_of_edm(name, sigma_data):
    scheduler = scheduler_of(name, sigma_data=sigma_data, sigma_min=0.01, sigma_max=40.0)
    scheduler.set_timesteps(STEPS)
    path, prediction = D.VEPath(0.01, 40.0), D.EDMPrediction(sigma_data)
    solver = D.DiffusersSolver(name, {"sigma_data": sigma_data})

    expected = theirs(scheduler, start() * 40)

    assert_equal(ours(path, prediction, solver, D.KarrasGrid(STEPS)), expected)


@pytest.mark.parametrize("name", EXPLODING)
def test_what_the_network_predicts_does_not_matter(name):
    """Noise prediction through the schedulers of EDM is Euler's or 2M's step all the same."""
    twin = D.Euler() if name == "EDMEuler" else D.DPMSolverPP2M()
    parts = D.VEPath(), D.NoisePrediction()
    grid = D.KarrasGrid(STEPS)

    assert_equal(ours(*parts, D.DiffusersSolver(name), grid), ours(*parts, twin, grid))


def test_arguments_reach_the_scheduler():
    scheduler = scheduler_of("DDIM", timestep_spacing="trailing", **TABLE)
    scheduler.set_timesteps(STEPS)
    solver = D.DiffusersSolver("DDIMScheduler", {"timestep_spacing": "trailing"}, {"eta": 0.7})
    parts = D.DiscretePath(), D.NoisePrediction(), solver

    assert_equal(ours(*parts, D.SpacedGrid(STEPS)), theirs(scheduler, start(), eta=0.7))


def test_the_table_is_the_path_s():
    path = D.DiscretePath("squaredcos_cap_v2", num_levels=200)
    solver = D.DiffusersSolver("DDIM", {"timestep_spacing": "trailing"})
    parts = path, D.VPrediction()
    grid = D.TrailingGrid(10)

    assert_equal(ours(*parts, solver, grid), ours(*parts, D.Euler(), grid), digits=1e-3)


@pytest.mark.parametrize("name", [*ON_A_TABLE, "FlowMatchLCM"])
def test_noise_depends_on_the_draws_alone(name):
    line = name.startswith("Flow")
    path = D.LinearPath() if line else D.DiscretePath()
    prediction = D.VelocityPrediction() if line else D.VPrediction()
    parts = path, prediction, D.DiffusersSolver(name), D.SpacedGrid(6)

    together = ours(*parts, indices=[4, 9])
    torch.manual_seed(0)
    alone = ours(*parts, indices=[9])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)

    elsewhere = ours(*parts, x=start([4, 9]), indices=[4, 8])
    moved = not torch.equal(together[1], elsewhere[1])
    assert moved == (name in STOCHASTIC)
    torch.testing.assert_close(together[0], elsewhere[0], rtol=1e-4, atol=1e-4)


def test_built_of_a_config():
    solver = D.DiffusersSolver("UniPCMultistepScheduler", {"solver_order": 3})
    assert (solver.name, solver.options) == ("UniPCMultistep", {"solver_order": 3})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: D.DiffusersSolver("DDIMM"), "'DDIMM'; did you mean 'DDIM'"),
        (lambda: D.DiffusersSolver("DDIMInverse"), "unknown scheduler 'DDIMInverse'"),
        (lambda: D.DiffusersSolver("DDIM", {"clip_smaple": 1}), "options: .*'clip_sample'"),
        (lambda: D.DiffusersSolver("DDIM", None, {"etaa": 1}), "step_options: .*'eta'"),
    ],
)
def test_impossible_solvers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("DDIM", D.LinearPath()), ("EDMEuler", D.LinearPath()), ("EDMEuler", D.DiscretePath()),
        ("FlowMatchEulerDiscrete", D.DiscretePath()), ("FlowMatchEulerDiscrete", D.VEPath()),
        ("UniPCMultistep", D.TrigPath()), ("DDIM", D.VPPath()),
    ],
)  # fmt: skip
def test_a_scheduler_on_a_path_that_is_not_its_own(name, path):
    with pytest.raises(ValueError, match=f"{name} does not run on {type(path).__name__}"):
        ours(path, D.VPrediction(), D.DiffusersSolver(name), D.SpacedGrid(4))


def test_without_diffusers(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **options):
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install diffusers"):
        D.DiffusersSolver("DDIM")

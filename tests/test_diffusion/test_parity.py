"""The same network, noise and steps must give what diffusers' schedulers give.

The Gaussian test proves that the parts agree with each other. This one pins the conventions they
cannot prove: the clock a network is told, the table of levels, the ends of the grid, the variance.

Twins: DDIM and DDIMInverse, EulerDiscrete, EDMEuler, FlowMatchEulerDiscrete (Euler); DDPM,
EulerAncestralDiscrete (Ancestral, Euler with eta = 1); HeunDiscrete, FlowMatchHeunDiscrete (Heun);
LMSDiscrete of order 2 (AB2); DPMSolverMultistep, EDMDPMSolverMultistep (DPMSolverPP2M);
UniPCMultistep (UniPC). Midpoint and Heun's churn have none.
"""

import inspect
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

from mmsora import diffusion as D

# Numpy's, of diffusers' code.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

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

    def __init__(self, dtype=None):
        self.generator, self.dtype = torch.Generator().manual_seed(1), dtype

    def normal(self, name, like):
        dtype = self.dtype or like.dtype
        return torch.randn(like.shape, generator=self.generator, dtype=dtype).to(like.dtype)


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ours(path, prediction, solver, grid, dtype=None):
    parts = D.UniformTimes(), solver, grid, D.ClassifierFree(1.0), D.MSE()
    diffusion = D.Diffusion(path, prediction, *parts)
    return diffusion.sample(network, start(), {}, None, SequentialDraws(dtype))


def theirs(scheduler, std=1.0, clocks=None, **options):
    x, generator = std * start(), torch.Generator().manual_seed(1)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    clocks = scheduler.timesteps if clocks is None else clocks
    for t, clock in zip(scheduler.timesteps, clocks, strict=True):
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        output = network(scale(x, t), clock.expand(len(x)))
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def without_rounding(scheduler, path, times):
    """Their numbers in single precision replaced by the same in double precision."""
    alpha, sigma = path.coefficients(times)
    exact = sigma if isinstance(path, D.LinearPath) else sigma / alpha
    if scheduler.sigmas.numel() != exact.numel():  # inner ones stand twice
        exact = torch.cat([exact[:1], exact[1:-1].repeat_interleave(2), exact[-1:]])
    torch.testing.assert_close(scheduler.sigmas.double(), exact, rtol=1e-4, atol=1e-7)
    scheduler.sigmas = exact


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


@pytest.mark.parametrize("steps", [10, STEPS])
def test_ancestral_is_ddpm_with_the_larger_variance(steps):
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False, timestep_spacing="linspace", variance_type="fixed_large"
    )
    scheduler.set_timesteps(steps)
    parts = D.DiscretePath(), D.NoisePrediction(), D.Ancestral("forward"), D.SpacedGrid(steps)

    assert_equal(ours(*parts), theirs(scheduler))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_euler_is_ddim_from_pure_noise(eta):
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, beta_start=1e-4, beta_end=0.02,
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    path = D.DiscretePath(zero_terminal_snr=True)

    actual = ours(path, D.VPrediction(), D.Euler(eta), D.TrailingGrid(STEPS))

    assert_equal(actual, theirs(scheduler, eta=eta))


def test_euler_backwards_is_ddim_inversion():
    """They tell the network the level that it is to reach; the one where it is, here."""
    scheduler = diffusers.DDIMInverseScheduler(
        clip_sample=False, beta_start=1e-4, beta_end=0.02, set_alpha_to_one=True
    )
    scheduler.set_timesteps(STEPS)
    times = torch.tensor([-1, *scheduler.timesteps], dtype=torch.float64)
    path, prediction = D.DiscretePath(), D.NoisePrediction()
    exact = path.coefficients(torch.arange(1000.0))[0] ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, rtol=1e-5, atol=0)
    scheduler.alphas_cumprod = exact
    parts = D.UniformTimes(), D.Euler(), D.SpacedGrid(2), D.ClassifierFree(1.0), D.MSE()
    denoise = D.Diffusion(path, prediction, *parts).denoiser(network, {})

    actual = D.Euler()(denoise, start(), path, times, SequentialDraws())

    assert_equal(actual, theirs(scheduler, clocks=times[:-1]))


def test_a_shifted_grid_is_theirs():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / FLOW_STEPS, FLOW_STEPS))
    parts = D.LinearPath(), D.VelocityPrediction(), D.Euler(), D.ShiftedGrid(FLOW_STEPS, 3.0)
    without_rounding(scheduler, D.LinearPath(), parts[-1](D.LinearPath()))
    clocks = scheduler.sigmas[:-1] * 1000

    assert_equal(ours(*parts), theirs(scheduler, clocks=clocks.float()))


class RoundedClock(D.DiscretePath):
    """The multistep schedulers tell a network the nearest level."""

    def clock(self, t):
        return t.round()


class Exploding(RoundedClock):
    """The table's ratios with ``alpha = 1``: so the schedulers of k-diffusion count."""

    def coefficients(self, t):
        alpha, sigma = super().coefficients(t)
        return torch.ones_like(alpha), sigma / alpha


class ScaledNoisePrediction(D.NoisePrediction):
    def scale_input(self, x, level):
        return x / (1 + level.sigma**2).sqrt()


OPTIONS = {"beta_start": 1e-4, "beta_end": 0.02}
SPACINGS = {
    "linspace": ({"timestep_spacing": "linspace"}, None),
    "trailing": ({"timestep_spacing": "trailing"}, D.TrailingGrid(STEPS)),
    "karras": ({"use_karras_sigmas": True}, D.KarrasGrid(STEPS)),
    "log-SNR": ({"use_lu_lambdas": True}, D.LogSNRGrid(STEPS)),
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_2m_is_the_multistep_dpm_solver(algorithm, name, spacing):
    options, grid = SPACINGS[spacing]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type=algorithm, prediction_type=name, **OPTIONS, **options
    )
    scheduler.set_timesteps(STEPS)
    grid = grid or ending_clean(scheduler.timesteps.tolist())
    path = RoundedClock()
    without_rounding(scheduler, path, grid(path))
    prediction = D.NoisePrediction() if name == "epsilon" else D.VPrediction()
    solver = D.DPMSolverPP2M(eta=float(algorithm.startswith("sde")))

    actual = ours(path, prediction, solver, grid, torch.float32)

    assert_equal(actual, theirs(scheduler))


def flow(scheduler_class, **options):
    """A scheduler at 24 steps of a flow from 0.96 on; there no logarithm is infinite."""
    scheduler = scheduler_class(
        use_flow_sigmas=True, prediction_type="flow_prediction", **OPTIONS, **options
    )
    scheduler.set_timesteps(24)
    times = torch.arange(24, -1, -1, dtype=torch.float64) / 25
    scheduler.timesteps, scheduler.sigmas = (times[:-1] * 1000).round().long(), times
    return scheduler, D.LinearPath(span=(0.0, 0.96)), lambda path: times


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_2m_is_the_multistep_dpm_solver_of_a_flow(eta):
    algorithm = "sde-dpmsolver++" if eta else "dpmsolver++"
    scheduler, path, grid = flow(diffusers.DPMSolverMultistepScheduler, algorithm_type=algorithm)
    parts = D.VelocityPrediction(), D.DPMSolverPP2M(eta), grid, torch.float32

    assert_equal(ours(path, *parts), theirs(scheduler))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "karras"])
@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
def test_unipc(name, spacing, order):
    options, grid = SPACINGS[spacing]
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order, prediction_type=name, **OPTIONS, **options
    )
    scheduler.set_timesteps(STEPS)
    grid = grid or ending_clean(scheduler.timesteps.tolist())
    path = RoundedClock()
    without_rounding(scheduler, path, grid(path))
    prediction = D.NoisePrediction() if name == "epsilon" else D.VPrediction()

    assert_equal(ours(path, prediction, D.UniPC(order), grid), theirs(scheduler))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_of_a_flow(order):
    scheduler, path, grid = flow(diffusers.UniPCMultistepScheduler, solver_order=order)

    assert_equal(ours(path, D.VelocityPrediction(), D.UniPC(order), grid), theirs(scheduler))


@pytest.mark.parametrize("steps", [5, STEPS])
def test_euler_is_edm_euler(steps):
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(steps)
    parts = D.VEPath(), D.EDMPrediction(), D.Euler(), D.KarrasGrid(steps)

    assert_equal(ours(*parts), theirs(scheduler, std=80))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_2m_is_the_multistep_dpm_solver_of_edm(eta):
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++"
    )
    scheduler.set_timesteps(STEPS)
    path, grid = D.VEPath(), D.KarrasGrid(STEPS)
    without_rounding(scheduler, path, grid(path))
    parts = D.EDMPrediction(), D.DPMSolverPP2M(eta), grid

    assert_equal(ours(path, *parts), theirs(scheduler, std=80))


K_DIFFUSION = {
    "Euler": (diffusers.EulerDiscreteScheduler, D.Euler(), {}),
    "ancestral": (diffusers.EulerAncestralDiscreteScheduler, D.Ancestral(), {}),
    "eta = 1": (diffusers.EulerAncestralDiscreteScheduler, D.Euler(eta=1.0), {}),
    "Heun": (diffusers.HeunDiscreteScheduler, D.Heun(), {}),
    "AB2": (diffusers.LMSDiscreteScheduler, D.AB2(), {"order": 2}),
}


class Stretched(Exploding):
    """Time is the noise level, as those schedulers have it, told as the table's level."""

    t_clean = 0.0

    def coefficients(self, t):
        return torch.ones_like(t), t

    def clock(self, t):
        return self.time_of(t).round()


@pytest.mark.parametrize(
    ("name", "karras"),
    [(name, False) for name in K_DIFFUSION] + [(name, True) for name in ("Euler", "Heun", "AB2")],
)
def test_schedulers_of_k_diffusion(name, karras):
    scheduler_class, solver, options = K_DIFFUSION[name]
    kind = {"use_karras_sigmas": True} if karras else {"timestep_spacing": "trailing"}
    scheduler = scheduler_class(**OPTIONS, **kind)
    scheduler.set_timesteps(STEPS)
    path, grid = Exploding(), SPACINGS["karras" if karras else "trailing"][1]
    times = grid(path)
    without_rounding(scheduler, path, times)
    ratios = path.coefficients(times)[1]
    path = Stretched()
    path.t_noise = path.prior_std = ratios[0].item()

    actual = ours(path, ScaledNoisePrediction(), solver, lambda path: ratios)

    expected = theirs(scheduler, path.prior_std, scheduler.timesteps.round(), **options)
    assert_equal(actual, expected)


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

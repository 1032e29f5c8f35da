"""The diffusion of DiT and Latte against numbers written down when the authors' code was run.

Two stubs stand for the network. Inputs are functions of their names, and images are one frame.
"""

import diffusers
import numpy as np
import pytest
import torch

from mmsora import diffusion as D
from mmsora.diffusion.betas import BETAS
from mmsora.diffusion.bound import prior_bound
from mmsora.diffusion.level import Level
from mmsora.diffusion.solver import forward_variance, posterior_variance
from mmsora.diffusion.variational import (
    bound_of_step,
    discretized_nll,
    gaussian_kl,
    log_variance_range,
    step_down,
)
from tests.stubs import At

DIGITS = 5e-12  # twelve were written down
LEVELS = [0, 1, 10, 100, 500, 900, 998, 999]
TIMES = torch.tensor([0.0, 350.0, 999.0], dtype=torch.float64)
BOUND = [2.8246307, 0.0027127315, 0.0095567945]
SQUARES = [1.5234702, 0.37792492, 0.6491518]

ARRAYS = {
    "betas": [
        0.0001, 0.00011991991992, 0.000299199199199, 0.00209199199199, 0.01005995996,
        0.0180279279279, 0.0199800800801, 0.02,
    ],
    "alphas_cumprod": [
        0.9999, 0.999780092072, 0.997806572508, 0.895141590898, 0.077796658365, 0.000270244519558,
        4.11819363814e-05, 4.03582976538e-05,
    ],
    "alphas_cumprod_prev": [
        1, 0.9999, 0.998105204786, 0.897018145675, 0.0785872428818, 0.000275205911903,
        4.20215299142e-05, 4.11819363814e-05,
    ],
    "sqrt_alphas_cumprod": [
        0.99994999875, 0.99989003999, 0.998902684203, 0.946119226576, 0.278920523384,
        0.0164391155345, 0.00641731535624, 0.00635281808757,
    ],
    "sqrt_one_minus_alphas_cumprod": [
        0.01, 0.0148292929005, 0.0468340420224, 0.323818481718, 0.960314189021, 0.99986486861,
        0.99997940882, 0.999979820648,
    ],
    "log_one_minus_alphas_cumprod": [
        -9.21034037198, -8.42230160863, -6.12228989368, -2.25514432359, -0.0809895356692,
        -0.000270281042189, -4.11827843806e-05, -4.03591120718e-05,
    ],
    "sqrt_recip_alphas_cumprod": [
        1.00005000375, 1.0001099721, 1.00109852122, 1.05694924266, 3.58525069388, 60.8305232662,
        155.828402453, 157.410457252,
    ],
    "sqrt_recipm1_alphas_cumprod": [
        0.0100005000375, 0.014830923709, 0.0468854902114, 0.342259699013, 3.44296711253,
        60.822303153, 155.825193762, 157.40728081,
    ],
    "posterior_variance": [
        0, 5.4531876613e-05, 0.000258463620408, 0.00205455352997, 0.0100513357789,
        0.0180278384601, 0.0199800633042, 0.0199999835266,
    ],
    "posterior_log_variance_clipped": [
        -9.8167251353, -9.8167251353, -8.26075560735, -6.18769671499, -4.60004973998,
        -4.01583813469, -3.91302033739, -3.9120238291,
    ],
    "posterior_mean_coef1": [
        1, 0.54529149951, 0.13627785977, 0.0188954555855, 0.00305805707563, 0.000299152112682,
        0.00012952423623, 0.000128351487172,
    ],
    "posterior_mean_coef2": [
        0, 0.454708498991, 0.863722069287, 0.981076102553, 0.994104350757, 0.990940122089,
        0.989958723491, 0.989948678268,
    ],
}  # fmt: skip
COSINE = "squaredcos_cap_v2"
TABLES = {
    COSINE: [
        4.1284224822e-05, 4.61417527367e-05, 8.9871362453e-05, 0.000531899155698,
        0.00315569144159, 0.0197418558724, 0.749999392901, 0.999,
    ],
    "quad": [
        0.0001, 0.0001026483644, 0.0001280411986, 0.0005361674973, 0.005742071068, 0.01648594837,
        0.01996280852, 0.02,
    ],
    "linear": [
        0.0001, 0.0001199199199, 0.0002991991992, 0.002091991992, 0.01005995996, 0.01802792793,
        0.01998008008, 0.02,
    ],
    "warmup10": [0.0001, 0.000301010101, 0.00211010101, 0.02, 0.02, 0.02, 0.02, 0.02],
    "warmup50": [
        0.0001, 0.0001398797595, 0.0004987975952, 0.004087975952, 0.02, 0.02, 0.02, 0.02,
    ],
    "const": [0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02],
    "jsd": [0.001, 0.001001001001, 0.00101010101, 0.001111111111, 0.002, 0.01, 0.5, 1],
}  # fmt: skip
SPACINGS = {
    ("linspace", 250): ([0, 4, 8, 12, 16, 20], [987, 991, 995, 999], 124875),
    ("linspace", 50): ([0, 20, 41, 61, 82, 102], [938, 958, 979, 999], 24975),
    ("linspace", 100): ([0, 10, 20, 30, 40, 50], [969, 979, 989, 999], 49950),
    ("linspace", 20): ([0, 53, 105, 158, 210, 263], [841, 894, 946, 999], 9990),
    ("linspace", 10): ([0, 111, 222, 333, 444, 555], [666, 777, 888, 999], 4995),
    ("linspace", 5): ([0, 250, 500, 749, 999], [250, 500, 749, 999], 2498),
    ("linspace", 2): ([0, 999], [0, 999], 999),
    ("leading", 50): ([0, 20, 40, 60, 80, 100], [920, 940, 960, 980], 24500),
    ("leading", 250): ([0, 4, 8, 12, 16, 20], [984, 988, 992, 996], 124500),
    ("leading", 100): ([0, 10, 20, 30, 40, 50], [960, 970, 980, 990], 49500),
    ("leading", 25): ([0, 40, 80, 120, 160, 200], [840, 880, 920, 960], 12000),
    ("leading", 20): ([0, 50, 100, 150, 200, 250], [800, 850, 900, 950], 9500),
}
NOISED = (0.99896596, 27.688351, [
    1.183145, -0.6281198, -0.4760167, -0.7031719, -0.1521382, 0.34705, 0.6427824, 0.05790557,
])  # fmt: skip
MEAN = (0.98065327, 27.176666, [
    1.169015, -0.6371615, -0.4849455, 0.8263149, 1.301048, -1.295529, -1.33901, -1.233648,
])  # fmt: skip
LOG_VARIANCE = (2.4530466, 183.19226, [
    -9.727963, -9.428421, -9.344459, -4.952664, -4.95392, -3.912024, -3.912024, -3.912024,
])  # fmt: skip
VARIANCE = (0.0082551484, 0.33936125, [
    5.959353e-05, 8.040606e-05, 8.744866e-05, 0.007064561, 0.007055697, 0.01999998, 0.01999999,
    0.01999998,
])  # fmt: skip
PRED_XSTART = (68.998037, 2063.4735, [
    1.169015, -0.6371615, -0.4849455, 0.09008229, 0.866477, -157.886, -158.2183, -157.5588,
])  # fmt: skip
DDIM, DDIM1, DDPM = D.Euler(), D.Euler(eta=1.0), D.Ancestral()
SAMPLERS = {
    "ddim, 10": (DDIM, "linspace", 10, 1.970688, 44.82948, [
        -1.653469, -2.916453, 2.106773, 1.992722, -1.710357, 0.3695618, -2.246174, -1.060274,
    ]),
    "ddpm, 10": (DDPM, "linspace", 10, 1.301398, 29.48131, [
        -1.814824, 0.6864746, -1.755842, 1.238893, -0.893425, -0.9466656, -1.465493, 1.025444,
    ]),
    "ddim, ddim50": (DDIM, "leading", 50, 2.068051, 47.04428, [
        -1.735159, -3.060538, 2.210861, 2.091171, -1.794858, 0.3878203, -2.357147, -1.112658,
    ]),
    "ddpm, ddim50": (DDPM, "leading", 50, 1.332717, 30.21893, [
        -1.832228, 2.394459, 0.565661, -0.78655, -0.6621394, 1.049255, -0.8849213, 0.4164245,
    ]),
    "ddim, 50": (DDIM, "linspace", 50, 2.067533, 47.03251, [
        -1.734725, -3.059773, 2.210304, 2.090649, -1.794409, 0.3877229, -2.356558, -1.112379,
    ]),
    "ddpm, 50": (DDPM, "linspace", 50, 1.333721, 30.24269, [
        -1.828859, 2.458215, 0.5539539, -0.7856849, -0.6262099, 1.05747, -0.8066931, 0.4023156,
    ]),
    "ddim, 250": (DDIM, "linspace", 250, 2.086523, 47.4645, [
        -1.750658, -3.087881, 2.230607, 2.109852, -1.810889, 0.3912846, -2.378203, -1.122597,
    ]),
    "ddpm, 250": (DDPM, "linspace", 250, 1.334189, 30.18926, [
        1.586468, 0.1022884, -0.528072, -1.254416, 1.011025, 3.932748, 0.5700417, 1.068171,
    ]),
    "ddim with eta 1, 50": (DDIM1, "linspace", 50, 1.303038, 29.54098, [
        -1.842009, 2.385954, 0.4784499, -0.7522317, -0.5319347, 0.9595972, -0.7374298, 0.369911,
    ]),
}  # fmt: skip
LATTE_DDIM = {2048: -51.15281, 3070: -11.69463, 3071: -87.60094}
GUIDED = (0.97474751, 22.179556, [
    -0.9265129, -1.547952, 0.9752671, 0.9620354, -0.8454039, 0.1208074, -0.972441, -0.6901757,
])  # fmt: skip
CLIPPED_MEAN = (0.90561057, 25.097025, [
    1.0, -0.6371615, -0.4849455, 0.8263149, 1.301048, -1.275393, -1.318831, -1.213554,
])  # fmt: skip
PRIOR = [3.0231036e-05, 2.7614435e-05, 2.6601496e-05]
# Totals; then of the first image three terms, errors of the data and errors of the noise.
BOUNDS = {
    "a": ([176.28867, 194.53117, 203.00026], [4.3782787, 3.280406, 1.8761817],
          [20544.059, 2467.8879, 292.43906], [0.8291567, 0.82881415, 0.63752615]),
    "b": ([135.82259, 146.40598, 194.53841], [0.00022109831, 0.014752675, 0.049167931],
          [1.0374801, 11.097404, 7.6590834], [4.1872492e-05, 0.0037269469, 0.016697044]),
}  # fmt: skip
REVERSED = (0.98543748, 22.43732, [
    -0.8260011, -1.451833, 1.067151, 1.011601, -0.8546212, 0.2018687, -1.122389, -0.5259112,
])  # fmt: skip


def column(clock, x):
    return clock.to(x).reshape(-1, *[1] * (x.ndim - 1))


def stub_a(x, clock):
    t = column(clock, x) / 1000
    return torch.cat([torch.sin(x + t), torch.cos(2 * x - t)], dim=1)


def stub_b(x, clock):
    t = (column(clock, x) + 1) / 1000
    return torch.cat([x * t.sqrt(), torch.cos(2 * x - t)], dim=1)


STUBS = {"a": stub_a, "b": stub_b}


class Given:
    """Draws whose noise is given."""

    def __init__(self, noise):
        self.noise = noise

    def normal(self, name, like):
        return self.noise


class Replayed:
    """Torch's own generator after ``manual_seed(0)``, in the order of the calls."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.names = []

    def uniform(self, name):
        """The four numbers that ``numpy.random`` gives after ``seed(0)``."""
        return torch.from_numpy(np.random.RandomState(0).random_sample(4))

    def normal(self, name, like):
        self.names.append(name)
        return torch.randn(like.shape, generator=self.generator)


def process(t=TIMES, solver=DDPM, grid=None, loss=None, path=None, prediction=None, guidance=None):
    return D.Diffusion(
        path or D.DiscretePath(), prediction or D.LearnedRange(D.NoisePrediction()),
        At(t), solver, grid or D.SpacedGrid(250),
        guidance or D.ClassifierFree(1.0), loss or D.Hybrid(),
    )  # fmt: skip


@pytest.fixture
def images(filled):
    """Data and noise, (3, 4, 1, 8, 8)."""
    return [filled(name, (3, 4, 8, 8)).unsqueeze(2) for name in ("x0", "noise")]


@pytest.fixture
def start(filled):
    return filled("z", (2, 4, 8, 8)).unsqueeze(2)


def assert_golden(x, golden, abs=1e-5):
    """Deviation, norm and eight places of a tensor."""
    std, norm, values = golden
    count = x.numel()
    places = [0, 1, count // 7, count // 3, count // 2, 2 * count // 3, count - 2, count - 1]
    assert x.flatten()[places].tolist() == pytest.approx(values, rel=1e-5, abs=abs)
    assert x.std(correction=0).item() == pytest.approx(std, rel=1e-5, abs=abs)
    assert x.norm().item() == pytest.approx(norm, rel=1e-5)


# Tables


def arrays(path):
    """The published tables, read off the path."""
    t = torch.arange(-1, path.num_levels).double()
    alpha, sigma = path.coefficients(t)
    now, to = Level(t[1:], alpha[1:], sigma[1:]), Level(t[:-1], alpha[:-1], sigma[:-1])
    like = torch.empty(path.num_levels, 1, dtype=torch.float64)
    return {
        "betas": forward_variance(now, to),
        "alphas_cumprod": now.alpha**2,
        "alphas_cumprod_prev": to.alpha**2,
        "sqrt_alphas_cumprod": now.alpha,
        "sqrt_one_minus_alphas_cumprod": now.sigma,
        "log_one_minus_alphas_cumprod": 2 * now.sigma.log(),
        "sqrt_recip_alphas_cumprod": 1 / now.alpha,
        "sqrt_recipm1_alphas_cumprod": now.sigma / now.alpha,
        "posterior_variance": posterior_variance(now, to),
        "posterior_log_variance_clipped": log_variance_range(path, t[1:], like)[0].flatten(),
        "posterior_mean_coef1": to.alpha * forward_variance(now, to) / now.sigma**2,
        "posterior_mean_coef2": now.alpha / to.alpha * (to.sigma / now.sigma) ** 2,
    }


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name):
    actual = arrays(D.DiscretePath())[name]
    assert actual[LEVELS].tolist() == pytest.approx(ARRAYS[name], rel=DIGITS, abs=1e-15)


@pytest.mark.parametrize("name", TABLES)
def test_betas(name):
    betas = BETAS[name](1000)
    assert betas.shape == (1000,)
    assert betas[LEVELS].tolist() == pytest.approx(TABLES[name], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "betas"), [("linear", ARRAYS["betas"]), (COSINE, TABLES[COSINE])]
)
def test_betas_to_the_last_digit(name, betas):
    assert BETAS[name](1000)[LEVELS].tolist() == pytest.approx(betas, rel=DIGITS)


def test_one_beta_of_the_cosine_is_cut():
    assert (BETAS[COSINE](1000) == 0.999).sum() == 1


def test_all_levels_are_a_grid_too():
    grid = D.SpacedGrid(1000)(D.DiscretePath())
    assert grid.dtype == torch.float64
    assert grid.tolist() == list(range(999, -2, -1))


def test_levels_of_uniform_times():
    t = D.UniformTimes()(D.DiscretePath(), Replayed())
    assert t.tolist() == [548, 715, 602, 544]


def test_the_noise_is_the_published_one():
    first = Replayed().normal("any", torch.empty(2, 2)).flatten().tolist()
    expected = [1.5409960746765137, -0.293428897857666, -2.1787893772125244, 0.5684312582015991]
    assert first == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("steps", [50, 250])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_spacings_are_those_of_diffusers(spacing, steps):
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    grid = D.SpacedGrid(steps, spacing)(D.DiscretePath())
    assert grid[:-1].tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize(("spacing", "steps"), SPACINGS, ids=str)
def test_spacings(spacing, steps):
    first, last, total = SPACINGS[spacing, steps]
    levels = D.SpacedGrid(steps, spacing)(D.DiscretePath()).flip(0).long().tolist()
    assert levels[0] == -1
    levels = levels[1:]
    assert len(levels) == steps
    assert (levels[: len(first)], levels[-len(last) :]) == (first, last)
    assert sum(levels) == total


def test_a_section_of_one_step_is_its_cleanest_level():
    assert D.SpacedGrid([1])(D.DiscretePath()).tolist() == [0, -1]
    assert D.SpacedGrid([1, 1])(D.DiscretePath()).tolist() == [500, 0, -1]


def test_spacings_that_are_none():
    with pytest.raises(ValueError, match="no whole stride over 1000 levels makes exactly 300"):
        D.SpacedGrid(300, "leading")(D.DiscretePath())
    with pytest.raises(ValueError, match="spacing must be 'linspace' or 'leading', got 'ddim'"):
        D.SpacedGrid(10, "ddim")


def test_betas_of_a_respaced_process():
    path = D.DiscretePath()
    t = D.SpacedGrid(250)(path).flip(0)
    alpha, sigma = path.coefficients(t)
    now, to = Level(t[1:], alpha[1:], sigma[1:]), Level(t[:-1], alpha[:-1], sigma[:-1])
    betas = forward_variance(now, to)[[0, 1, 100, 248, 249]]
    expected = [0.0001, 0.000599065564476, 0.0318445327076, 0.0772193054561, 0.0775193449924]
    assert betas.tolist() == pytest.approx(expected, rel=DIGITS)
    bars = [0.9999, 0.999300994342, 0.192006420954, 4.37497495852e-05, 4.03582976538e-05]
    assert (now.alpha**2)[[0, 1, 100, 248, 249]].tolist() == pytest.approx(bars, rel=DIGITS)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", dict(beta_start=1e-4, beta_end=0.02)),
        ("scaled_linear", dict(beta_start=0.00085, beta_end=0.012)),
        ("squaredcos_cap_v2", {}),
        ("sigmoid", dict(beta_start=1e-4, beta_end=0.02)),
    ],
)
@pytest.mark.parametrize("rescaled", [False, True])
def test_tables_are_those_of_diffusers(name, options, rescaled):
    path = D.DiscretePath(name, zero_terminal_snr=rescaled)
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=name, rescale_betas_zero_snr=rescaled, **options
    )
    alpha, sigma = path.coefficients(torch.arange(1000).double())
    bar = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(alpha**2, bar, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sigma**2, 1 - bar, rtol=1e-4, atol=1e-6)
    assert (alpha[-1] == 0) == rescaled
    assert (sigma[-1] == 1) == rescaled


def test_zero_terminal_snr_keeps_the_first_level_and_refuses_noise_prediction():
    path = D.DiscretePath(zero_terminal_snr=True)
    first = torch.tensor([0.0])
    assert path.coefficients(first)[0] == pytest.approx(D.DiscretePath().coefficients(first)[0])
    with pytest.raises(ValueError, match="alpha = 0"):
        process(path=path)
    process(path=path, prediction=D.LearnedRange(D.VPrediction()))


# One step


def test_q_sample(images):
    x0, noise = images
    assert_golden(process().noised(x0, TIMES, Given(noise)).x, NOISED)


def test_p_mean_variance(images):
    x0, _ = images
    diffusion = process()
    estimate = diffusion.prediction.estimate(
        diffusion.path, x0, stub_a(x0, TIMES), diffusion.path.at(TIMES, x0)
    )
    mean, log_variance = step_down(diffusion.path, x0, estimate, TIMES)
    assert_golden(mean, MEAN)
    assert_golden(log_variance, LOG_VARIANCE)
    assert_golden(estimate.x0, PRED_XSTART)
    assert_golden(log_variance.exp(), VARIANCE, abs=0)


def test_p_mean_variance_of_clipped_data(images):
    """A step to the level below is the mean and the noise that is drawn."""
    x0, _ = images
    diffusion, rows = process(guidance=D.Clipped(D.ClassifierFree(1.0))), []
    denoise = diffusion.denoiser(stub_a, {})
    for x, t in zip(x0.split(1), TIMES, strict=True):
        estimate = denoise(x, diffusion.path.at(t, x))
        assert estimate.x0.abs().max() <= 1
        mean, _ = step_down(diffusion.path, x, estimate, t)
        diffusion.grid = lambda path, t=t: torch.stack([t, t - 1])
        no_noise = Given(torch.zeros_like(x))
        torch.testing.assert_close(diffusion.sample(stub_a, x, {}, None, no_noise), mean)
        rows.append(mean)
    assert_golden(torch.cat(rows), CLIPPED_MEAN)


def test_p_sample_with_a_gradient(start):
    """Of ``-x^2 / 2``, which is ``-x``."""
    guidance = D.ClassifierGuidance(lambda x, level: -x.square().flatten(1).sum(1) / 2)
    diffusion = process(guidance=guidance)
    diffusion.grid = lambda path: torch.tensor([500.0, 499.0], dtype=torch.float64)
    assert_golden(diffusion.sample(stub_a, start, {}, None, Replayed()), GUIDED)


@pytest.mark.parametrize("means", ["noise", "data"])
def test_vb_terms(images, means):
    """Of the noise that the network predicts, and of its output read as data."""
    x0, noise = images
    diffusion = process()
    batch = diffusion.noised(x0, TIMES, Given(noise))
    output = stub_a(batch.x, TIMES)
    estimate = diffusion.prediction.estimate(diffusion.path, batch.x, output, batch.level)
    if means == "data":
        estimate = estimate._replace(x0=output[:, :4])
    expected = BOUND if means == "noise" else [26.547611, 0.0021117984, 8.051357e-07]
    bound = bound_of_step(diffusion.path, x0, batch.x, estimate, TIMES)
    assert bound.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("stub", STUBS)
def test_calc_bpd_loop(images, stub):
    """Ten steps. The totals of stub A are over 100, and hold too."""
    x0, _ = images
    draws = Replayed()
    bound = D.variational_bound(process(grid=D.SpacedGrid(10)), STUBS[stub], x0, {}, draws)
    total, *first = BOUNDS[stub]
    assert draws.names == [f"bound/{i}" for i in range(10)]
    assert bound.total.tolist() == pytest.approx(total, rel=1e-5)
    # There 1 - sigma^2 comes of single precision, which is worth 6e-10.
    assert bound.prior.tolist() == pytest.approx(PRIOR, abs=7e-10)
    for actual, expected in zip(bound[2:], first, strict=True):
        assert actual[0, :3].tolist() == pytest.approx(expected, rel=1e-5)


def test_prior_bpd(images):
    x0, _ = images
    prior = prior_bound(D.DiscretePath(), x0, torch.tensor(999.0))
    assert prior.tolist() == pytest.approx([3.023104e-05, 2.761443e-05, 2.66015e-05], abs=7e-10)
    bar, squares = ARRAYS["alphas_cumprod"][-1], x0.double().square().mean((1, 2, 3, 4))
    exact = (bar * squares - bar - np.log1p(-bar)) / 2 / np.log(2)
    assert prior.tolist() == pytest.approx(exact.tolist(), rel=1e-6)


def test_parts_of_the_bound():
    kl = gaussian_kl(*(torch.tensor(value) for value in (0.3, -1.0, -0.2, 0.5)))
    assert kl.item() == pytest.approx(0.43738141655921936, rel=1e-6)
    x = torch.tensor([-1.0, -0.5, 0.0, 0.7, 1.0])
    nll = discretized_nll(x, torch.zeros(5), torch.tensor(-1.0))
    expected = [
        5.740358829498291, 5.689914703369141, 4.7670745849609375, 6.5706915855407715,
        5.740349769592285,
    ]  # fmt: skip
    assert nll.tolist() == pytest.approx(expected, rel=2e-5)
    # Black counts all that is darker: the distribution function itself.
    z = torch.tensor([-2.0, 0.0, 1.0])
    tail = (-discretized_nll(torch.full((3,), -1.0), 1 / 255 - 1 - z, torch.zeros(3))).exp()
    assert tail.tolist() == pytest.approx([0.022701144218, 0.5, 0.841192007065], rel=1e-5)


# Losses


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_training_losses(images, weight):
    x0, noise = images
    loss = process(loss=D.Hybrid(weight)).loss(stub_a, x0, {}, Given(noise))
    expected = [mse + weight * bound for mse, bound in zip(SQUARES, BOUND, strict=True)]
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_training_loss_without_learned_variance(images):
    x0, noise = images
    diffusion = process(loss=D.MSE(), prediction=D.NoisePrediction())
    loss = diffusion.loss(lambda x, clock: stub_a(x, clock)[:, :4], x0, {}, Given(noise))
    assert loss.tolist() == pytest.approx(SQUARES, rel=1e-5)
    both = process(loss=D.MSE()).loss(stub_a, x0, {}, Given(noise))
    assert torch.equal(both, loss)  # the variance is then not trained


def test_training_losses_of_videos(filled):
    x0, noise = (filled(name, (2, 6, 4, 8, 8)).transpose(1, 2) for name in ("x5", "n5"))
    t = torch.tensor([0.0, 700.0], dtype=torch.float64)
    loss = process(t).loss(stub_a, x0, {}, Given(noise))
    assert loss.tolist() == pytest.approx([4.3864098, 0.39710629], rel=1e-5)


def test_training_losses_of_predicted_data(images):
    x0, noise = images
    prediction = D.LearnedRange(D.SamplePrediction())
    loss = process(loss=D.MSE(), prediction=prediction).loss(stub_a, x0, {}, Given(noise))
    assert loss.tolist() == pytest.approx([0.08871267, 0.74470174, 1.3595843], rel=1e-5)
    loss = process(loss=D.Hybrid(), prediction=prediction).loss(stub_a, x0, {}, Given(noise))
    assert loss.tolist() == pytest.approx([26.636324, 0.74681354, 1.3595852], rel=1e-5)


def test_training_losses_on_a_cosine_table(images):
    """Against iDDPM's formulas, written out in float64."""
    x0, noise = (value.double() for value in images)
    betas = BETAS[COSINE](1000)
    bar = (1 - betas).cumprod(0)
    t, (b, a) = TIMES.long()[1:], (betas, bar)
    before = a[t - 1]
    losses = process(TIMES[1:], path=D.DiscretePath(COSINE)).loss(
        stub_a, x0[1:].float(), {}, Given(noise[1:].float())
    )
    x0, noise = x0[1:], noise[1:]
    now, prev, beta = (v.reshape(-1, 1, 1, 1, 1) for v in (a[t], before, b[t]))
    x = now.sqrt() * x0 + (1 - now).sqrt() * noise
    eps, v = stub_a(x, TIMES[1:]).chunk(2, dim=1)
    tilde = beta * (1 - prev) / (1 - now)
    log_var = (v + 1) / 2 * beta.log() + (1 - v) / 2 * tilde.log()
    shift = beta * prev.sqrt() / (1 - now) * ((x - (1 - now).sqrt() * eps) / now.sqrt() - x0)
    kl = 0.5 * (log_var - tilde.log() - 1 + (tilde + shift**2) / log_var.exp())
    expected = ((eps - noise) ** 2 + kl / torch.log(torch.tensor(2.0))).mean((1, 2, 3, 4))
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_bound_trains_the_variance_alone(images):
    x0, noise = images
    diffusion = process()
    batch = diffusion.noised(x0, TIMES, Given(noise))

    def gradient(loss):
        output = stub_a(batch.x, TIMES).requires_grad_()
        loss(diffusion.path, diffusion.prediction, batch, output).sum().backward()
        return output.grad.split(4, dim=1)

    mean, variance = gradient(D.Hybrid())
    only_mean, nothing = gradient(D.MSE())
    assert torch.equal(mean, only_mean)
    assert not nothing.any()
    assert (variance != 0).flatten(1).any(1).all()


def test_hybrid_needs_a_learned_variance_and_twice_the_channels(images):
    x0, noise = images
    with pytest.raises(ValueError, match="trains a learned variance, and NoisePrediction has"):
        process(prediction=D.NoisePrediction()).loss(lambda x, clock: x, x0, {}, Given(noise))
    with pytest.raises(ValueError, match="LearnedRange needs two output channels.* gave 3"):
        process().loss(lambda x, clock: x[:, :3], x0, {}, Given(noise))
    with pytest.raises(ValueError, match="gave \\(3, 2, 1, 8, 8\\).*out_channels to 8"):
        process().loss(lambda x, clock: x, x0, {}, Given(noise))


# Sampling


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(start, name):
    solver, spacing, steps, *golden = SAMPLERS[name]
    diffusion = process(solver=solver, grid=D.SpacedGrid(steps, spacing))
    x = diffusion.sample(stub_b, start, {}, None, Replayed())
    assert_golden(x, golden, abs=1e-4)


def test_samplers_of_videos(filled):
    """Values above 100 are no goldens."""
    diffusion = process(solver=DDIM, grid=D.SpacedGrid(10))
    start = filled("x5", (2, 6, 4, 8, 8)).transpose(1, 2)
    x = diffusion.sample(stub_a, start, {}, None, Replayed()).transpose(1, 2)
    assert x.mean().item() == pytest.approx(-34.389218, rel=1e-4)
    for place, value in LATTE_DDIM.items():
        assert x.flatten()[place].item() == pytest.approx(value, rel=1e-4)


def test_the_flow_runs_backwards_too(start):
    """DDIM inversion: one step of Euler to a noisier level."""
    levels = D.SpacedGrid(50)(D.DiscretePath()).flip(0)[1:]
    diffusion = process(solver=DDIM, grid=lambda path: levels[[10, 11]])
    assert_golden(diffusion.sample(stub_a, start, {}, None, Replayed()), REVERSED)


def test_no_noise_on_arrival(start):
    draws = Replayed()
    process(grid=D.SpacedGrid(3)).sample(stub_b, start, {}, None, draws)
    assert draws.names == ["solver/0", "solver/1"]
    last = process(grid=lambda path: torch.tensor([0.0, -1.0], dtype=torch.float64))
    x = last.sample(stub_b, start, {}, None, Replayed())
    alpha, sigma = D.DiscretePath().coefficients(torch.tensor(0.0))
    eps = stub_b(start, torch.zeros(2))[:, :4]
    torch.testing.assert_close(x, ((start - sigma * eps) / alpha).float())


def test_the_deterministic_flow_draws_nothing(start):
    draws = Replayed()
    process(solver=DDIM, grid=D.SpacedGrid(5)).sample(stub_b, start, {}, None, draws)
    assert draws.names == []


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_learned_variance_is_that_of_diffusers(start, steps):
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False, timestep_spacing="linspace", variance_type="learned_range"
    )
    scheduler.set_timesteps(steps)
    x, generator = start, torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        output = stub_b(x, t.expand(len(x)))
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    ours = process(grid=D.SpacedGrid(steps)).sample(stub_b, start, {}, None, Replayed())
    assert (ours - x).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_ddim_is_that_of_diffusers(start, steps):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(stub_b(x, t.expand(len(x)))[:, :4], t, x).prev_sample
    diffusion = process(solver=DDIM, grid=D.SpacedGrid(steps, "leading"))
    ours = diffusion.sample(stub_b, start, {}, None, Replayed())
    assert (ours - x).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("steps", "departure"), [(10, 0.2016633), (50, 0.0508623), (250, 0.0087376)]
)
def test_ddim_of_diffusers_departs_on_the_other_spacing(start, steps, departure):
    """Its level below is a fixed stride away, where the grid's is not."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(stub_b(x, t.expand(len(x)))[:, :4], t, x).prev_sample
    diffusion = process(solver=DDIM, grid=D.SpacedGrid(steps))
    ours = diffusion.sample(stub_b, start, {}, None, Replayed())
    assert (ours - x).abs().max().item() == pytest.approx(departure, rel=2e-3)


def test_a_sample_is_the_same_alone_and_in_a_batch(start):
    """Learned variance and all."""
    from mmsora.utils.draws import Draws

    diffusion = process(grid=D.SpacedGrid(4))
    both = diffusion.sample(stub_b, start, {}, None, Draws(0, [3, 8]))
    alone = diffusion.sample(stub_b, start[1:], {}, None, Draws(0, [8]))
    torch.testing.assert_close(both[1:], alone)

"""Each path against its published formulas, and against itself: rates, inverse, clock."""

import math

import diffusers
import numpy as np
import pytest
import torch

from mmsora import diffusion as D
from mmsora.utils.draws import Draws

SHAPE = 3, 2, 4, 6, 5
PATHS = {
    "linear": D.LinearPath(),
    "linear, cut": D.LinearPath(span=(0.001, 0.999)),
    "trig": D.TrigPath(),
    "vp": D.VPPath(),
    "ve": D.VEPath(),
    "ve, narrow": D.VEPath(0.1, 3.0),
    "cosine": D.CosinePath(),
    "cosine, shifted": D.CosinePath(shift=2.0),
    "shifted linear": D.ShiftedPath(D.LinearPath(), 3.0),
    "shifted vp": D.ShiftedPath(D.VPPath(), 0.5),
}
TABLES = {
    "linear": D.DiscretePath(),
    "cosine": D.DiscretePath("squaredcos_cap_v2"),
    "pure noise": D.DiscretePath("scaled_linear", zero_terminal_snr=True),
    "jsd": D.DiscretePath("jsd", num_levels=37),
}
INSIDE = torch.tensor([0.03, 0.2, 0.5, 0.77, 0.97], dtype=torch.float64)
LEVELS = torch.arange(1000, dtype=torch.float64)

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def inside(path):
    """Times between the ends."""
    return path.t_clean + INSIDE * (path.t_noise - path.t_clean)


def ratio(path, t):
    alpha, sigma = path.coefficients(t)
    return sigma / alpha


# What every path has


@each_path
def test_rates_are_differences(path):
    t = inside(path)
    h = 1e-6 * path.t_noise
    above, below = path.coefficients(t + h), path.coefficients(t - h)
    for rate, high, low in zip(path.rates(t), above, below, strict=True):
        torch.testing.assert_close(rate, (high - low) / (2 * h), rtol=1e-7, atol=1e-8)


@each_path
def test_rates_are_the_derivative(path):
    t = inside(path)
    for actual, expected in zip(path.rates(t), D.Path.rates(path, t), strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@each_path
def test_the_ratio_knows_its_time(path):
    t = inside(path)
    torch.testing.assert_close(path.time_of(ratio(path, t)), t, rtol=1e-9, atol=0)
    torch.testing.assert_close(D.Path.time_of(path, ratio(path, t)), t, rtol=1e-9, atol=0)
    scalar = path.time_of(ratio(path, t[1]))
    assert scalar.shape == ()
    assert scalar.item() == pytest.approx(t[1].item())


@each_path
@pytest.mark.parametrize("time_of", [lambda path, r: path.time_of(r), D.Path.time_of])
def test_beyond_the_path_are_its_ends(path, time_of):
    times = time_of(path, torch.tensor([0.0, 1e9, math.inf], dtype=torch.float64))
    ends = torch.tensor([path.t_clean, path.t_noise, path.t_noise], dtype=torch.float64)
    torch.testing.assert_close(times, ends, rtol=0, atol=1e-8)


@each_path
def test_noise_grows_all_the_way(path):
    t = path.time_at(torch.linspace(0.02, 0.98, 97, dtype=torch.float64))
    assert (t.diff() > 0).all()
    assert (ratio(path, t).diff() > 0).all()
    assert path.t_clean <= t[0] <= t[-1] <= path.t_noise


@each_path
def test_a_level_of_each_sample(path):
    x = torch.zeros(SHAPE)
    t = inside(path)[:3]
    level = path.at(t, x)
    alpha, sigma = path.coefficients(t)
    assert level.alpha.shape == level.sigma.shape == (3, 1, 1, 1, 1)
    torch.testing.assert_close(level.alpha.flatten(), alpha.float())
    torch.testing.assert_close(level.sigma.flatten(), sigma.float())
    assert path.for_size(SHAPE[2:]) is path


# One after the other


@pytest.mark.parametrize("kind", [D.LinearPath, D.TrigPath, D.VPPath])
def test_clocks_of_sit(kind):
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    assert kind().clock(t).tolist() == [250, 1000]
    assert kind(clock_scale=1.0).clock(t).tolist() == [0.25, 1]
    assert kind(clock_scale=1.0, reverse_clock=True).clock(t).tolist() == [0.75, 0]
    with pytest.raises(ValueError, match=r"span must lie in \[0, 1\] and rise"):
        kind(span=(0.0, 1.5))
    with pytest.raises(ValueError, match="rise.*got"):
        kind(span=(0.9, 0.1))


def test_the_trigonometric_path_ends_in_noise_alone():
    alpha, sigma = D.TrigPath().coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert (alpha.tolist(), sigma.tolist()) == ([1, 0], [0, 1])


def test_the_variance_preserving_path():
    """Against the integral of the equation's own beta, and with digits at its clean end."""
    path = D.VPPath()
    t = torch.tensor([1e-9, 0.3, 1.0], dtype=torch.float64)
    steps = torch.linspace(0, 1, 100001, dtype=torch.float64)[:, None] * t
    log_alpha = -0.5 * torch.trapezoid(0.1 + (20 - 0.1) * steps, steps, dim=0)
    alpha, sigma = path.coefficients(t)
    torch.testing.assert_close(alpha, log_alpha.exp(), rtol=1e-8, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(3, dtype=torch.float64))
    assert sigma[0].item() == pytest.approx(math.sqrt(-2 * log_alpha[0].item()), rel=1e-9, abs=0)
    assert (path.t_clean, path.t_noise, path.prior_std) == (1e-5, 1, 1)


def test_the_path_of_edm():
    path = D.VEPath()
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    assert [value.tolist() for value in path.coefficients(sigma)] == [[1, 1, 1], sigma.tolist()]
    assert path.clock(sigma).tolist() == pytest.approx([math.log(s) / 4 for s in sigma.tolist()])
    assert (path.t_clean, path.t_noise, path.prior_std) == (0, 80, 80)
    times = path.time_at(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert times.tolist() == pytest.approx([0.002, 0.4, 80], rel=1e-12)
    for bad in (0.0, 1.0), (3.0, 2.0):
        with pytest.raises(ValueError, match="sigma_min must be positive and below sigma_max"):
            D.VEPath(*bad)


# The cosine path of StableCascade

LOG_SNR = [9.21, 3.55, 2.18, 1.31, 0.61, -0.03, -0.66, -1.37, -2.27, -3.70, -9.21]


def test_log_snr_of_stable_cascade():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    plain, shifted = D.CosinePath().log_snr(t), D.CosinePath(shift=2.0).log_snr(t)
    assert plain.tolist() == pytest.approx(LOG_SNR, abs=0.006)
    bar = diffusers.DDPMWuerstchenScheduler()._alpha_cumprod(t, "cpu")
    torch.testing.assert_close(plain, (bar / (1 - bar)).log(), rtol=0, atol=1e-5)
    assert shifted[:-1].tolist() == pytest.approx((plain - 1.386294).tolist()[:-1], abs=1e-5)
    assert shifted[-1] == plain[-1]  # no less than the unshifted end

    noisy = t[1:]
    for path, log_snr in (D.CosinePath(), plain), (D.CosinePath(shift=2.0), shifted):
        alpha, sigma = path.coefficients(noisy)
        torch.testing.assert_close((alpha**2 / sigma**2).log(), log_snr[1:])
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


def test_the_cosine_path_tells_the_time_of_its_level():
    t = torch.linspace(0.02, 0.98, 13, dtype=torch.float64)
    plain, shifted = D.CosinePath(), D.CosinePath(shift=2.0)
    torch.testing.assert_close(plain.clock(t), t)
    told = shifted.clock(t)
    torch.testing.assert_close(ratio(plain, told[:-1]), ratio(shifted, t[:-1]))
    torch.testing.assert_close(ratio(shifted, t[:-1]), 2 * ratio(plain, t[:-1]))
    assert (told > t).all()


def test_the_cosine_path_ends_in_clean_data_and_does_not_train_there():
    path = D.CosinePath(shift=2.0)
    assert path.coefficients(number(0.0)) == (1, 0)
    assert path.coefficients(number(1e-9))[1] > 0.01
    assert path.time_at(torch.tensor([0.0, 0.0005, 0.5])).tolist() == pytest.approx(
        [0.001, 0.001, 0.5]
    )
    with pytest.raises(ValueError, match="shift must be positive, got 0"):
        D.CosinePath(shift=0.0)
    with pytest.raises(ValueError, match="clamp must lie between 0 and 0.5"):
        D.CosinePath(clamp=0.5)


def test_sampling_on_the_cosine_path_is_that_of_wuerstchen():
    """All steps but the last, which keeps the data alone."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler = diffusers.DDPMWuerstchenScheduler()
    scheduler.set_timesteps(20)
    seen = []

    def network(x, clock):
        return torch.tanh(x + torch.sin(9 * clock.double()).reshape(-1, 1, 1, 1, 1))

    def noted(x, clock):
        seen.append(x)
        return network(x, clock)

    class Sequential:
        generator = torch.Generator().manual_seed(1)

        def normal(self, name, like):
            return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)

    path = D.CosinePath()
    parts = D.UniformTimes(), D.Ancestral(), D.SpacedGrid(20), D.ClassifierFree(1.0), D.MSE()
    process = D.Diffusion(path, D.NoisePrediction(), *parts)
    process.sample(noted, x, {}, None, Sequential())

    generator = torch.Generator().manual_seed(1)
    for t, ours in zip(scheduler.timesteps[:-1], seen, strict=True):
        assert (ours - x).abs().max() < 1e-5 * x.abs().max()
        t = t.double().expand(len(x))
        output = network(x, path.clock(t).float())  # 0.994 at 1, by their pipeline too
        x = scheduler.step(output, t, x, generator=generator).prev_sample


# Shifts by the size


@pytest.mark.parametrize("shift", [0.4, 1.0, 3.0])
def test_a_shifted_flow(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    t = torch.arange(1, 1001, dtype=torch.float64).flip(0) / 1000
    path = D.ShiftedPath(D.LinearPath(), shift)
    torch.testing.assert_close(path.time_at(t), shift * t / (1 + (shift - 1) * t))
    torch.testing.assert_close(path.time_at(t).float(), scheduler.sigmas)
    assert path.time_at(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


@pytest.mark.parametrize("size", [(1, 64, 64), (1, 128, 128), (5, 32, 48)])
def test_a_shift_by_the_root_of_the_positions(size):
    path = D.ShiftedPath(D.LinearPath(), 1.5, base_size=(1, 64, 64)).for_size(size)
    m = 1.5 * math.sqrt(math.prod(size) / 4096)
    assert path.time_at(number(0.3)).item() == pytest.approx(m * 0.3 / (1 + (m - 1) * 0.3))


@pytest.mark.parametrize("size", [(1, 32, 32), (1, 64, 96), (1, 128, 128), (1, 160, 128)])
def test_a_shift_by_an_exponential(size):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tokens = math.prod(size) / 4
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    sigmas = np.linspace(1, 1 / 8, 8)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    path = D.ShiftedPath(
        D.LinearPath(), math.exp(0.5), (1, 32, 32), math.exp(1.15), (1, 128, 128)
    ).for_size(size)
    times = path.time_at(torch.from_numpy(sigmas))
    torch.testing.assert_close(times.float(), scheduler.sigmas[:-1])
    torch.testing.assert_close(path.clock(times).float(), scheduler.timesteps)


def test_a_shift_is_of_times_alone():
    """Velocity, level and clock at a time are as without it."""
    base = D.LinearPath(clock_scale=7.0, span=(0.0, 0.999))
    path = D.ShiftedPath(base, 3.0)
    t = torch.tensor([0.1, 0.6], dtype=torch.float64)
    for name in ("coefficients", "rates", "clock", "time_of"):
        for actual, expected in zip(getattr(path, name)(t), getattr(base, name)(t), strict=True):
            assert torch.equal(actual, expected)
    assert (path.t_clean, path.t_noise, path.prior_std) == (0, 0.999, 1)
    assert D.ShiftedPath(D.VEPath(), 2.0).prior_std == 80


def test_a_shift_multiplies_noise_on_any_path():
    fraction = torch.tensor([0.1, 0.4, 0.6], dtype=torch.float64)
    for base in D.VPPath(), D.TrigPath(), D.CosinePath(), D.VEPath():
        path = D.ShiftedPath(base, 2.5)
        expected = 2.5 * ratio(base, base.time_at(fraction))
        torch.testing.assert_close(ratio(path, path.time_at(fraction)), expected)


def test_a_process_trains_and_samples_where_the_size_says():
    told = []

    def network(x, clock):
        told.extend(clock.tolist())
        return x

    class Middle(Draws):
        def uniform(self, name):
            return torch.full((2,), 0.5, dtype=torch.float64)

    process = D.Diffusion(
        path=dict(type="ShiftedPath", path=dict(type="LinearPath"), base_size=(2, 3, 4)),
        prediction=dict(type="VelocityPrediction"),
        train_times=dict(type="UniformTimes"),
        solver=dict(type="Euler"),
        grid=dict(type="SpacedGrid", num_steps=2),
        guidance=dict(type="ClassifierFree", scale=1.0),
        loss=dict(type="MSE"),
    )
    for size in (2, 3, 4), (2, 12, 16), (2, 3, 4):
        process.loss(network, torch.zeros(2, 3, *size), {}, Middle(0, range(2)))
    assert told == pytest.approx([500, 500, 800, 800, 500, 500])

    told.clear()
    process.sample(network, torch.zeros(2, 3, 2, 12, 16), {}, None, Middle(0, range(2)))
    assert told == pytest.approx([1000, 1000, 800, 800])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(path=D.DiscretePath()), "between the levels of DiscretePath.*LinearPath"),
        (dict(shift=0.0), "shift must be positive, got 0"),
        (dict(base_size=(1, 2, 3), large_shift=-1.0, large_size=(1, 4, 4)), "large_shift must be"),
        (dict(base_size=(1, 2, 3), large_shift=2.0), "go together"),
        (dict(large_shift=2.0, large_size=(1, 2, 3)), "needs a base_size"),
        (dict(base_size=(1, 2, 3), large_shift=2.0, large_size=(3, 2, 1)), "as many positions"),
    ],
)
def test_impossible_shifts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        D.ShiftedPath(**{"path": D.LinearPath(), **arguments})


# Between the levels of a table


@each_table
def test_whole_numbers_are_the_table(table):
    t = torch.arange(-1, table.num_levels).double()
    mixed = torch.stack([t, t - 0.25], dim=1)  # so that the batch has fractions too
    for alone, together in zip(table.coefficients(t), table.coefficients(mixed), strict=True):
        assert torch.equal(together[:, 0], alone)
    assert table.coefficients(number(-0.3)) == table.coefficients(number(-3.0)) == (1, 0)


@each_table
def test_between_levels_the_logarithm_is_straight(table):
    low = torch.arange(table.num_levels - 2).double()
    share = torch.linspace(0.05, 0.95, len(low), dtype=torch.float64)
    logs = [ratio(table, t).log() for t in (low, low + share, low + 1)]
    torch.testing.assert_close(logs[1], torch.lerp(logs[0], logs[2], share))
    alpha, sigma = table.coefficients(low + share)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


@each_table
def test_a_table_knows_the_time_of_a_ratio(table):
    whole = torch.arange(-1, table.num_levels).double()
    assert torch.equal(table.time_of(ratio(table, whole)), whole)
    between = torch.linspace(0.01, table.num_levels - 2.02, 300, dtype=torch.float64)
    torch.testing.assert_close(table.time_of(ratio(table, between)), between)
    square = table.time_of(ratio(table, between).reshape(2, 150).T)
    torch.testing.assert_close(square, between.reshape(2, 150).T)
    assert table.time_of(number(math.inf)) == table.num_levels - 1
    assert table.time_of(number(1e-9)) == 0
    torch.testing.assert_close(
        D.Path.time_of(table, ratio(table, between)), between, rtol=1e-8, atol=1e-8
    )


def test_times_of_ratios_are_those_of_diffusers():
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02)
    table = ratio(TABLES["linear"], LEVELS).numpy()
    sigmas = np.geomspace(0.005, 300, 97)
    expected = scheduler._sigma_to_t(sigmas, np.log(table))
    actual = TABLES["linear"].time_of(torch.from_numpy(sigmas))
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["pure noise", "jsd"])
def test_nothing_lies_before_pure_noise(name):
    table = TABLES[name]
    end = table.num_levels - 1
    assert table.coefficients(number(float(end))) == (0, 1)
    for share in (0.2, 0.8):
        assert table.coefficients(number(end - share)) == (0, 1)
    last = ratio(table, number(end - 1.0))
    assert table.time_of(2 * last) == end - 1


@each_table
def test_rates_of_a_table_are_its_differences(table):
    whole = torch.arange(table.num_levels).double()
    above, below = table.coefficients(whole), table.coefficients(whole - 1)
    for rate, high, low in zip(table.rates(whole), above, below, strict=True):
        assert torch.equal(rate, (high - low) * table.num_levels)
    for rate, halves in zip(table.rates(whole), table.rates(whole[:-1] + 0.5), strict=True):
        torch.testing.assert_close(halves, (rate[1:] + rate[:-1]) / 2)


def test_a_time_beyond_the_table_is_an_error():
    with pytest.raises(IndexError):
        D.DiscretePath().coefficients(number(1000.0))

"""What each solver computes, how often it asks the network, and how fast its error falls."""

import math
from itertools import pairwise

import pytest
import torch

from mmsora import diffusion as D
from mmsora.utils.draws import Draws

SHAPE = 2, 3, 4, 5, 6
SOLVERS = {
    "Euler": D.Euler(),
    "Euler, eta": D.Euler(eta=0.5),
    "ancestral": D.Ancestral(),
    "ancestral, forward": D.Ancestral("forward"),
    "Heun": D.Heun(),
    "Heun, churn": D.Heun(churn=2.0, churn_noise=1.1),
    "midpoint": D.Midpoint(),
    "AB2": D.AB2(),
    "2M": D.DPMSolverPP2M(),
    "SDE-2M": D.DPMSolverPP2M(eta=1.0),
    "UniPC-1": D.UniPC(1),
    "UniPC-2": D.UniPC(2),
    "UniPC-3": D.UniPC(3),
}
STOCHASTIC = {"Euler, eta", "ancestral", "ancestral, forward", "Heun, churn", "SDE-2M"}
PATHS = {
    "linear": D.LinearPath(),
    "trigonometric": D.TrigPath(),
    "VP": D.VPPath(),
    "VE": D.VEPath(),
    "table": D.DiscretePath(),
    "zero terminal SNR": D.DiscretePath(zero_terminal_snr=True),
}
each_solver = pytest.mark.parametrize("name", SOLVERS)
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def normal(dtype=torch.float64):
    return Draws(7, range(2)).normal("start", torch.empty(SHAPE, dtype=dtype))


def gaussian(x, level, mean=0.5, std=0.6):
    """The ideal estimate of normal data."""
    residual = (x - level.alpha * mean) / (level.alpha**2 * std**2 + level.sigma**2)
    return D.Estimate(mean + level.alpha * std**2 * residual, level.sigma * residual)


def two_modes(x, level):
    """The ideal estimate of data at -1 and 1, each with a spread of 0.3."""
    variance = level.alpha**2 * 0.09 + level.sigma**2
    centre = torch.tanh(level.alpha * x / variance)
    x0 = (level.sigma**2 * centre + level.alpha * 0.09 * x) / variance
    return D.Estimate(x0, (level.sigma * x - level.alpha * level.sigma * centre) / variance)


class Counted:
    def __init__(self, denoise):
        self.denoise, self.times = denoise, []

    def __call__(self, x, level):
        self.times.append(level.t.item())
        return self.denoise(x, level)


def solve(solver, path, times, denoise=gaussian, x=None, draws=None):
    x = normal() * path.prior_std if x is None else x
    return solver(denoise, x, path, times, draws or Draws(3, range(len(x))))


# Network calls


CALLS = {"Heun": 11, "Heun, churn": 11, "midpoint": 12}  # of 6 steps; the others make one each


@each_solver
@each_path
def test_network_calls(name, path):
    denoise = Counted(gaussian)
    times = D.KarrasGrid(6)(path)
    x = solve(SOLVERS[name], path, times, denoise)

    table_end = name == "midpoint" and path.num_levels is not None
    assert len(denoise.times) == CALLS.get(name, 6) - table_end
    assert min(denoise.times) > path.t_clean
    assert x.isfinite().all()


@each_solver
def test_one_step_is_a_step(name):
    """From noise to data at once; of most solvers the estimated data."""
    path = PATHS["linear"]
    times = torch.tensor([1.0, 0.0], dtype=torch.float64)
    x = solve(SOLVERS[name], path, times)
    if name == "midpoint":
        assert x.isfinite().all()
    else:
        torch.testing.assert_close(x, torch.full_like(x, 0.5))


# What the loop must not do


@each_solver
@each_path
def test_solvers_run_on_the_meta_device(name, path):
    x = solve(SOLVERS[name], path, D.KarrasGrid(5)(path), x=torch.empty(SHAPE, device="meta"))
    assert (x.device.type, x.shape, x.dtype) == ("meta", SHAPE, torch.float32)


@each_solver
@each_path
def test_the_dtype_stays_and_single_precision_is_enough(name, path):
    times = D.KarrasGrid(8)(path)
    exact = solve(SOLVERS[name], path, times)
    x = solve(SOLVERS[name], path, times, x=normal(torch.float32) * path.prior_std)
    assert x.dtype == torch.float32
    assert (x - exact).abs().max() < 2e-5 * exact.abs().max()


@each_solver
@each_path
def test_a_sample_is_the_same_alone_and_in_a_batch(name, path):
    times, x = D.KarrasGrid(5)(path), normal() * path.prior_std
    together = solve(SOLVERS[name], path, times, two_modes, x, Draws(3, [4, 9]))
    alone = solve(SOLVERS[name], path, times, two_modes, x[1:], Draws(3, [9]))
    torch.testing.assert_close(together[1:], alone)


@each_solver
def test_only_stochastic_solvers_draw(name):
    class NoDraws:
        def normal(self, name, like):
            raise LookupError(name)

    path = PATHS["table"]
    if name in STOCHASTIC:
        with pytest.raises(LookupError, match="solver/0"):
            solve(SOLVERS[name], path, D.SpacedGrid(5)(path), draws=NoDraws())
    else:
        solve(SOLVERS[name], path, D.SpacedGrid(5)(path), draws=NoDraws())


# Convergence


ORDERS = {
    "Euler": 1, "Heun": 2, "midpoint": 2, "AB2": 2, "2M": 2, "UniPC-1": 2, "UniPC-2": 3,
    "UniPC-3": 4,
}  # fmt: skip


def reference(path, first, last, x):
    """The flow in many fourth-order steps of ``log(alpha / sigma)``."""
    logs = torch.linspace(math.log(first), math.log(last), 2001, dtype=torch.float64).exp()
    levels = [path.at(t, x) for t in path.time_of(logs)]
    for now, middle, to in zip(levels[:-2:2], levels[1:-1:2], levels[2::2], strict=True):
        d_log = ((to.sigma * now.alpha) / (to.alpha * now.sigma)).log()

        def slope(y, level):  # of y = x / alpha by log(sigma / alpha)
            return two_modes(y * level.alpha, level).noise * level.sigma / level.alpha

        y = x / now.alpha
        k1 = slope(y, now)
        k2 = slope(y + d_log / 2 * k1, middle)
        k3 = slope(y + d_log / 2 * k2, middle)
        k4 = slope(y + d_log * k3, to)
        x = to.alpha * (y + d_log / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return x


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("path_name", ["linear", "trigonometric", "VP", "VE"])
def test_order_of_convergence(name, path_name):
    """Between two noisy levels, where the flow is smooth, on steps of two lengths in turn."""
    path, first, last = PATHS[path_name], 3.0, 0.3
    level = path.at(path.time_of(torch.tensor(first, dtype=torch.float64)), normal())
    x = level.sigma * normal() + level.alpha * normal().flip(0).sign()
    expected = reference(path, first, last, x)

    def error(steps):
        even = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        even[1:-1:2] += 0.3 / steps
        even = torch.cat([even, 1 + torch.full((1,), 1e-9)])  # the last may be of lower order
        times = path.time_of((math.log(first) + even * math.log(last / first)).exp())
        return (solve(SOLVERS[name], path, times, two_modes, x) - expected).abs().max().item()

    coarse, fine = error(40), error(80)
    assert math.log2(coarse / fine) > ORDERS[name] - 0.25
    if ORDERS[name] == 1:
        assert math.log2(coarse / fine) < 1.25


@pytest.mark.parametrize("path_name", ["linear", "zero terminal SNR"])
@pytest.mark.parametrize(
    ("name", "most"),
    [("Heun", 0.03), ("midpoint", 0.01), ("AB2", 0.03), ("2M", 0.02), ("UniPC-2", 0.01)],
)
def test_from_pure_noise_to_clean_data(name, most, path_name):
    """There alpha is 0 and here sigma: their logarithms are infinite."""
    path = PATHS[path_name]
    x = solve(SOLVERS[name], path, D.KarrasGrid(40)(path))
    assert (x - (0.5 + 0.6 * normal())).abs().max() < most


@pytest.mark.parametrize("path_name", ["linear", "VP", "VE", "table"])
@pytest.mark.parametrize("name", sorted(STOCHASTIC - {"ancestral, forward"}))
def test_stochastic_solvers_keep_the_distribution(name, path_name):
    path = PATHS[path_name]
    solver = D.Heun(churn=10.0) if name == "Heun, churn" else SOLVERS[name]
    draws = Draws(1, range(200))
    x = draws.normal("start", torch.empty(200, 3, 4, 2, 5)) * path.prior_std
    x = solver(gaussian, x, path, D.KarrasGrid(100)(path), draws)
    assert x.mean().item() == pytest.approx(0.5, abs=0.02)
    assert x.std().item() == pytest.approx(0.6, abs=0.045)


# By the formula


def test_churn_is_edm_s_algorithm_2():
    """Written out for alpha = 1."""
    churn, low, high, std = 8.0, 0.05, 50.0, 1.007
    sigmas = D.KarrasGrid(18)(D.VEPath())
    draws = Draws(5, range(2))

    def denoised(x, sigma):
        return two_modes(x, D.Level(sigma, torch.ones_like(sigma), sigma)).x0

    x = normal() * 80
    gammas = []
    for i, (t, t_next) in enumerate(pairwise(sigmas)):
        gamma = min(churn / 18, math.sqrt(2) - 1) if low <= t <= high else 0.0
        gammas.append(gamma)
        t_hat = t + gamma * t
        x_hat = x + (t_hat**2 - t**2).sqrt() * std * draws.normal(f"solver/{i}", x)
        d = (x_hat - denoised(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if t_next > 0:
            x = x_hat + (t_next - t_hat) * (d + (x - denoised(x, t_next)) / t_next) / 2

    assert gammas[0] == gammas[-1] == 0 < max(gammas) == math.sqrt(2) - 1
    solver = D.Heun(churn, low, high, std)
    actual = solve(solver, D.VEPath(), sigmas, two_modes, normal() * 80, draws)
    torch.testing.assert_close(actual, x)


def test_churn_goes_back_up_any_path():
    """``sigma / alpha`` grows, and the marginals stay."""
    path, seen = PATHS["trigonometric"], []

    def denoise(x, level):
        seen.append((level.sigma / level.alpha).item())
        return gaussian(x, level)

    times = torch.tensor([0.5, 0.25, 0.1], dtype=torch.float64)
    solve(D.Heun(churn=0.4), path, times, denoise)
    ratios = [math.tan(math.pi / 2 * t) for t in (0.5, 0.25)]
    assert seen == pytest.approx([1.2 * ratios[0], ratios[1], 1.2 * ratios[1]])


def test_ab2_is_the_rule_of_the_books():
    """On alpha = 1 the flow is ``dx / d sigma = noise``."""
    sigmas = torch.tensor([4.0, 2.5, 1.0, 0.8], dtype=torch.float64)
    path, x, before = D.VEPath(), normal(), None
    for i, (now, to) in enumerate(pairwise(sigmas)):
        slope = two_modes(x, path.at(now, x)).noise
        step = to - now
        if i == 0:
            x = x + step * slope
        else:
            share = step / (2 * (now - sigmas[i - 1]))
            x = x + step * ((1 + share) * slope - share * before)
        before = slope
    torch.testing.assert_close(solve(D.AB2(), path, sigmas, two_modes, normal()), x)


def test_midpoint_is_the_rule_of_the_books():
    path, times = D.LinearPath(), torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)

    def slope(x, t):
        estimate = two_modes(x, path.at(t, x))
        return estimate.noise - estimate.x0

    x = normal()
    for now, to in pairwise(times):
        middle = x + (to - now) / 2 * slope(x, now)
        x = x + (to - now) * slope(middle, (now + to) / 2)
    torch.testing.assert_close(solve(D.Midpoint(), path, times, two_modes, normal()), x)


def test_variances_of_ancestral_sampling():
    """DDPM's two, of one step of its table."""
    path, draws = D.DiscretePath(), Draws(3, range(2))
    times = torch.tensor([500.0, 499.0], dtype=torch.float64)
    beta = 1e-4 + 500 / 999 * (0.02 - 1e-4)
    (_, now), (_, to) = (path.coefficients(t) for t in times)
    noise = draws.normal("solver/0", normal())
    alone = [
        solve(D.Ancestral(name), path, times, draws=draws)
        - solve(D.Ancestral(name), path, times, draws=Zeros())
        for name in ("forward", "posterior")
    ]
    torch.testing.assert_close(alone[0], math.sqrt(beta) * noise)
    torch.testing.assert_close(alone[1], math.sqrt(beta) * to / now * noise)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("solver", [D.Euler, D.DPMSolverPP2M])
def test_eta_is_a_share_of_the_standard_deviation(solver, eta):
    path, draws = D.VEPath(), Draws(3, range(2))
    times = torch.tensor([5.0, 3.0], dtype=torch.float64)
    alone = solve(solver(eta), path, times, draws=draws)
    alone = alone - solve(solver(eta), path, times, draws=Zeros())
    std = eta * 3 / 5 * math.sqrt(5**2 - 3**2)
    torch.testing.assert_close(alone, std * draws.normal("solver/0", normal()))


class Zeros:
    def normal(self, name, like):
        return torch.zeros_like(like)


def test_a_learned_variance_is_taken_whatever_the_other_is():
    path = D.DiscretePath()

    def learned(x, level):
        return gaussian(x, level)._replace(log_var_mix=torch.full_like(x, 0.3))

    times = D.SpacedGrid(5)(path)
    results = [solve(D.Ancestral(name), path, times, learned) for name in ("forward", "posterior")]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: D.Ancestral("large"), "variance must be .*'large'"),
        (lambda: D.Heun(churn=-1), "churn must not be negative, got -1"),
        (lambda: D.UniPC(4), "order must be 1, 2 or 3, got 4"),
    ],
)
def test_impossible_solvers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

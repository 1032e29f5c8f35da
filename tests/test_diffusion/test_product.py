"""Every path with every prediction and every solver, on data whose ideal network is known.

The network works out its level from its clock alone, and by formulas of its own, so a path that
tells a wrong clock or has wrong coefficients is noticed too. Paths and solvers meet in all pairs,
and each meets all predictions; the other combinations are slow, and
``bash tools/run_tests.sh --slow -k product`` runs them.
"""

import math

import numpy as np
import pytest
import torch

from mmsora import diffusion as D
from mmsora.utils.draws import Draws

SIGMA_DATA = 0.7

# Levels by what the network is told: alpha, sigma and their rates.


def linear(clock):
    t = clock / 1000
    return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


def sit(clock):
    return linear(1000 * (1 - clock))


def trig(clock):
    angle, rate = clock * math.pi / 2000, math.pi / 2
    return angle.cos(), angle.sin(), -rate * angle.sin(), rate * angle.cos()


def vp(clock):
    t = clock / 1000
    alpha = (-(19.9 * t**2 / 4 + 0.05 * t)).exp()
    sigma, slope = (1 - alpha**2).sqrt(), -(19.9 * t + 0.1) / 2
    return alpha, sigma, slope * alpha, -slope * alpha**2 / sigma


def ve(clock):
    sigma = (4 * clock).exp()
    return torch.ones_like(sigma), sigma, torch.zeros_like(sigma), torch.ones_like(sigma)


def cosine(clock):
    alpha = ((clock + 0.008) / 1.008 * math.pi / 2).cos() / math.cos(0.008 / 1.008 * math.pi / 2)
    nothing = torch.full_like(alpha, math.nan)  # no prediction needs its rates
    return alpha, (1 - alpha**2).sqrt(), nothing, nothing


def table(betas, zero=False):
    """Levels, clean data first; between them the logarithm of sigma / alpha is a line."""
    alpha = np.sqrt(np.cumprod(1 - betas))
    if zero:
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha = np.concatenate([[1.0], alpha])
    sigma, rows = np.sqrt(1 - alpha**2), np.arange(len(alpha))
    with np.errstate(divide="ignore"):
        logs = np.log(sigma / alpha)
    rates = [len(betas) * np.diff(values, prepend=values[0]) for values in (alpha, sigma)]

    def level(clock):
        row = clock.numpy() + 1
        near = row.round().astype(int)
        with np.errstate(invalid="ignore"):
            ratio = np.exp(np.interp(row, rows, logs))
            between = 1 / np.sqrt(1 + ratio**2), ratio / np.sqrt(1 + ratio**2)
        now = [
            np.where(row == near, at[near], line)
            for at, line in zip((alpha, sigma), between, strict=True)
        ]
        return tuple(
            torch.from_numpy(value) for value in (*now, *(np.interp(row, rows, r) for r in rates))
        )

    return level


DDPM = np.linspace(1e-4, 0.02, 1000)
SCALED = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
PATHS = {
    "linear": (D.LinearPath(), linear),
    "linear, cut": (D.LinearPath(span=(0.0, 0.999)), linear),
    "linear, SiT's clock": (D.LinearPath(1.0, reverse_clock=True), sit),
    "trig": (D.TrigPath(), trig),
    "trig, cut": (D.TrigPath(span=(0.0, 0.999)), trig),
    "vp": (D.VPPath(), vp),
    "ve": (D.VEPath(), ve),
    "cosine": (D.CosinePath(), cosine),
    "cosine, shifted": (D.CosinePath(shift=2.0), cosine),
    "shifted linear": (D.ShiftedPath(D.LinearPath(), 3.0), linear),
    "shifted vp": (D.ShiftedPath(D.VPPath(), 2.0), vp),
    "table": (D.DiscretePath(), table(DDPM)),
    "table, pure noise": (
        D.DiscretePath("scaled_linear", zero_terminal_snr=True),
        table(SCALED, zero=True),
    ),
}
PURE_NOISE = ["linear", "linear, SiT's clock", "trig", "shifted linear", "table, pure noise"]

# What the network says, by the level and the posterior means of data and noise.
OUTPUTS = {
    D.NoisePrediction: lambda a, s, da, ds, x0, noise: noise,
    D.SamplePrediction: lambda a, s, da, ds, x0, noise: x0,
    D.VPrediction: lambda a, s, da, ds, x0, noise: a * noise - s * x0,
    D.VelocityPrediction: lambda a, s, da, ds, x0, noise: da * x0 + ds * noise,
    D.ScorePrediction: lambda a, s, da, ds, x0, noise: -noise / s,
    D.EDMPrediction: lambda a, s, da, ds, x0, noise: (
        (s / SIGMA_DATA * x0 - a * SIGMA_DATA * noise) / (s**2 + (SIGMA_DATA * a) ** 2).sqrt()
    ),
}
PREDICTIONS = {
    "noise": D.NoisePrediction(),
    "sample": D.SamplePrediction(),
    "v": D.VPrediction(),
    "velocity": D.VelocityPrediction(),
    "velocity reversed": D.VelocityPrediction(sign=-1),
    "score": D.ScorePrediction(),
    "EDM": D.EDMPrediction(SIGMA_DATA),
    "learned range of noise": D.LearnedRange(D.NoisePrediction()),
    "learned range of EDM": D.LearnedRange(D.EDMPrediction(SIGMA_DATA)),
}


def diffusers(name, **options):
    return D.DiffusersSolver(f"{name}Scheduler", {"timestep_spacing": "trailing", **options})


# Steps, and the largest error of a number in standard deviations of the data: the truncation
# error, by the order and not by chance.
FLOWS = {
    "Euler": (D.Euler(), 200, 0.018),
    "Heun": (D.Heun(), 40, 0.012),
    "Midpoint": (D.Midpoint(), 40, 0.004),
    "AB2": (D.AB2(), 60, 0.011),
    "DPM-Solver++ 2M": (D.DPMSolverPP2M(), 60, 0.004),
    "UniPC 1": (D.UniPC(1), 60, 0.011),
    "UniPC 2": (D.UniPC(2), 60, 0.002),
    "UniPC 3": (D.UniPC(3), 60, 0.002),
    "Runge-Kutta euler": (D.RungeKutta("euler"), 200, 0.018),
    "Runge-Kutta midpoint": (D.RungeKutta("midpoint"), 40, 0.006),
    "Runge-Kutta heun2": (D.RungeKutta("heun2"), 40, 0.012),
    "Runge-Kutta rk4": (D.RungeKutta("rk4"), 20, 0.005),
    "Dormand-Prince": (D.DormandPrince(1e-5, 1e-7), 2, 0.001),
    "diffusers' DPM-Solver++": (diffusers("DPMSolverMultistep"), 60, 0.04),
    "diffusers' DDIM": (diffusers("DDIM"), 200, 0.02),
    "diffusers' Euler": (D.DiffusersSolver("FlowMatchEulerDiscreteScheduler"), 200, 0.02),
    "diffusers' EDM Euler": (D.DiffusersSolver("EDMEulerScheduler"), 200, 0.02),
}
DRAWN = {
    "Euler, half the noise": (D.Euler(eta=0.5), 200, 0.025),
    "Euler, all the noise": (D.Euler(eta=1.0), 200, 0.04),
    "Ancestral": (D.Ancestral(), 200, 0.04),
    "Ancestral, forward": (D.Ancestral("forward"), 200, 0.035),
    "Heun with churn": (D.Heun(churn=20.0), 100, 0.008),
    "SDE-DPM-Solver++ 2M": (D.DPMSolverPP2M(eta=1.0), 80, 0.006),
    "Euler-Maruyama sigma": (D.EulerMaruyama(), 200, 0.016),
    "Euler-Maruyama sbdm": (D.EulerMaruyama("sbdm", last_step="tweedie"), 200, 0.02),
    "Euler-Maruyama constant": (D.EulerMaruyama("constant", last_step="euler"), 200, 0.014),
    "stochastic Heun sigma": (D.StochasticHeun(last_step="none"), 100, 0.03),
    "stochastic Heun sbdm": (D.StochasticHeun("sbdm", last_step="tweedie"), 100, 0.03),
}
SOLVERS = FLOWS | DRAWN
IN_TIME = (D.RungeKutta, D.DormandPrince, D.EulerMaruyama, D.StochasticHeun)


def why_not(path, prediction, solver):
    """What is said against a combination, or None."""
    if path in PURE_NOISE and prediction in ("noise", "score", "learned range of noise"):
        return "cannot recover the data where alpha = 0"
    if path.startswith("cosine") and prediction.startswith("velocity"):
        return "CosinePath stands still"
    part, is_table = SOLVERS[solver][0], path.startswith("table")
    if is_table and isinstance(part, IN_TIME):
        return "integrates in continuous time"
    if isinstance(part, D.DiffusersSolver):
        straight = path.startswith(("linear", "shifted linear"))
        runs = {"DPMSolverMultistep": is_table or straight, "DDIM": is_table}
        runs |= {"FlowMatchEulerDiscrete": straight, "EDMEuler": path == "ve"}
        return None if runs[part.name] else "does not run on"
    return None


PAIRS = [pytest.param(path, solver, id=f"{path}-{solver}") for solver in SOLVERS for path in PATHS]


def some(every):
    """Of all pairs of a path and a solver one in so many, each with the next prediction."""
    names = list(PREDICTIONS)
    for k, solver in enumerate(SOLVERS):
        for i, path in enumerate(PATHS):
            prediction = names[(i + k) % len(names)]
            if (i - k) % every == 0:
                yield pytest.param(path, prediction, solver, id=f"{path}-{prediction}-{solver}")


class Normal:
    """Normal data, other ones in each channel."""

    mean = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64).reshape(1, 3, 1, 1, 1)
    std = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64).reshape(1, 3, 1, 1, 1)

    def at(self, alpha, sigma):
        """Mean and deviation of the noisy data."""
        return alpha * self.mean, (alpha**2 * self.std**2 + sigma**2).sqrt()

    def estimate(self, x, alpha, sigma):
        mean, std = self.at(alpha, sigma)
        residual = (x - mean) / std**2
        return self.mean + alpha * self.std**2 * residual, sigma * residual


class TwoModes:
    """Unequal modes, alike everywhere: numbers keep their order and so their quantile."""

    modes = ((0.3, -1.5, 0.3), (0.7, 1.0, 0.5))  # weight, mean, deviation

    def parts(self, alpha, sigma):
        return [(w, alpha * m, (alpha**2 * s**2 + sigma**2).sqrt()) for w, m, s in self.modes]

    def below(self, x, alpha, sigma):
        """The share of the noisy data that is less."""
        parts = self.parts(alpha, sigma)
        return sum(w * torch.special.ndtr((x - m) / s) for w, m, s in parts)

    def quantile(self, share, alpha, sigma):
        low, high = torch.full_like(share, -1000.0), torch.full_like(share, 1000.0)
        for _ in range(60):
            middle = (low + high) / 2
            less = self.below(middle, alpha, sigma) < share
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        return low

    def estimate(self, x, alpha, sigma):
        score, total = 0, 0
        for w, m, s in self.parts(alpha, sigma):
            density = w / s * (-(((x - m) / s) ** 2) / 2).exp() + 1e-300
            score, total = score - density * (x - m) / s**2, total + density
        noise = -sigma * score / total
        x0 = (x - sigma * noise) / alpha.clamp_min(1e-12)
        pure = sum(w * m for w, m, _ in self.modes)
        return torch.where(alpha > 1e-12, x0, pure), noise


def ideal_network(level_of, prediction, data):
    mean = getattr(prediction, "mean", prediction)

    def network(x, clock):
        level = [value.reshape(-1, 1, 1, 1, 1) for value in level_of(clock.double())]
        alpha, sigma = level[:2]
        if isinstance(mean, D.EDMPrediction):
            x = x * (sigma**2 + (SIGMA_DATA * alpha) ** 2).sqrt()
        output = OUTPUTS[type(mean)](*level, *data.estimate(x, alpha, sigma))
        output = output * getattr(mean, "sign", 1)
        if mean is not prediction:  # the posterior's variance
            output = torch.cat([output, -torch.ones_like(output)], dim=1)
        return output.to(x)

    return network


def parts_of(path, prediction, solver, data):
    """The process, a network, and the first and the last level."""
    (path, level_of), prediction = PATHS[path], PREDICTIONS[prediction]
    solver, steps, _ = SOLVERS[solver]

    def grid(path):
        times = D.LogSNRGrid(steps)(path)
        # A flow in time looks at its end, and is not to be asked for clean data.
        return times[:-1] if isinstance(solver, D.RungeKutta | D.DormandPrince) else times

    others = D.UniformTimes(), solver, grid, D.ClassifierFree(1.0), D.MSE()
    process = D.Diffusion(path, prediction, *others)
    times = grid(path)
    ends = path.coefficients(times[0]), path.coefficients(times[-1])
    return process, ideal_network(level_of, prediction, data), *ends


def refused(path, prediction, solver):
    """Whether a combination is none; then it must say so."""
    why = why_not(path, prediction, solver)
    if why is None:
        return False
    noise, draws = torch.zeros(2, 3, 1, 5, 4), Draws(0, range(2))

    def build_and_sample():
        process, network, *_ = parts_of(path, prediction, solver, Normal())
        process.sample(network, noise, {}, None, draws)

    with pytest.raises(ValueError, match=why):
        build_and_sample()
    return True


class OneEach:
    """Draws that are 1 in a row of their own and 0 elsewhere."""

    def __init__(self):
        self.names = ["mean", "start"]

    def normal(self, name, like):
        if name not in self.names:
            self.names.append(name)
        numbers = torch.zeros_like(like)
        numbers[self.names.index(name)] = 1
        return numbers

    def uniform(self, name):
        return torch.zeros(2)


def check_normal(path, prediction, solver):
    """All is linear in the noise, so that the effect of each draw gives the exact deviation.

    Without draws, it is the exact flow which must come out.
    """
    if refused(path, prediction, solver):
        return
    data, (_, steps, tolerance) = Normal(), SOLVERS[solver]
    process, network, first, last = parts_of(path, prediction, solver, data)
    draws, rows = OneEach(), steps + 3 if solver in DRAWN else 2
    noise = draws.normal("start", torch.empty(rows, 3, 1, 2, 4, dtype=torch.float64))
    mean, std = data.at(*first)
    x = (mean + std * noise) / process.path.prior_std
    x = process.sample(network, x, {}, None, draws)

    assert (len(draws.names) > 2) == (solver in DRAWN)
    mean, std = data.at(*last)
    whitened = (x - mean) / std
    effects = whitened[1:] - whitened[0]
    spread = effects.square().sum(0).sqrt() if solver in DRAWN else effects[0]
    assert whitened[0].abs().max() < tolerance
    assert (spread - 1).abs().max() < tolerance


def check_modes(path, prediction, solver):
    """Without draws every number keeps its quantile; with them, all together have those."""
    if refused(path, prediction, solver):
        return
    data, (_, _, tolerance) = TwoModes(), SOLVERS[solver]
    process, network, first, last = parts_of(path, prediction, solver, data)
    count = 6000 if solver in DRAWN else 120
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    mixed = share[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    x = data.quantile(mixed, *first).reshape(3, -1, 1, 5, 4) / process.path.prior_std
    x = process.sample(network, x, {}, None, Draws(2, range(3))).flatten()

    if solver in FLOWS:
        assert (data.below(x, *last) - mixed).abs().max() < tolerance / 2
        return
    assert (data.below(x.sort().values, *last) - share).abs().max() < 0.03
    left = x < -0.4
    assert left.double().mean() == pytest.approx(0.3, abs=0.02)
    assert x[left].std() == pytest.approx(0.3, abs=0.03)
    assert x[~left].std() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("path", "prediction", "solver"), [*some(1)])
def test_normal_data(path, prediction, solver):
    check_normal(path, prediction, solver)


@pytest.mark.parametrize(("path", "prediction", "solver"), [*some(4)])
def test_two_modes(path, prediction, solver):
    check_modes(path, prediction, solver)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "solver"), PAIRS)
def test_product_on_normal_data(path, solver):
    for prediction in PREDICTIONS:
        check_normal(path, prediction, solver)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "solver"), PAIRS)
def test_product_on_two_modes(path, solver):
    for prediction in PREDICTIONS:
        check_modes(path, prediction, solver)

"""The variational bound, on tables, respaced tables and continuous paths."""

import math

import numpy as np
import pytest
import torch

from mmsora import diffusion as D
from mmsora.diffusion.bound import prior_bound
from mmsora.diffusion.variational import bound_of_step, log_variance_range, step_down
from mmsora.utils.draws import Draws

SHAPE = 3, 4, 2, 5, 6
PATHS = {
    "table": D.DiscretePath(),
    "cosine table": D.DiscretePath("squaredcos_cap_v2"),
    "linear": D.LinearPath(),
    "linear, cut": D.LinearPath(span=(0.01, 0.99)),
}


def data(seed=0):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).double()
    return (0.6 * x).clip(-1, 1)


def column(value):
    return value.reshape(-1, 1, 1, 1, 1)


def network(x, clock, label):
    return torch.tanh(x) * column(label) + torch.sin(column(clock) / 300)


def learned(x, clock, label):
    return torch.cat([network(x, clock, label), torch.cos(2 * x - column(clock) / 1000)], dim=1)


LABEL = torch.tensor([1.0, 0.5, -1.0])


def process(path, prediction=None, grid=None):
    parts = D.UniformTimes(), D.Euler(), grid or D.SpacedGrid(6), D.ClassifierFree(1.0), D.MSE()
    return D.Diffusion(path, prediction or D.VPrediction(), *parts)


def by_hand(path, output, x0, draws, times, choice):
    """Sohl-Dickstein's bound in NumPy, from alpha and sigma alone; ``choice`` of the variance."""
    rows = []
    a, s = (value.numpy() for value in path.coefficients(times))
    x0 = x0.numpy()
    for i in range(len(times) - 1):
        noise = draws.normal(f"bound/{i}", torch.from_numpy(x0)).numpy()
        x = a[i] * x0 + s[i] * noise
        v, mix = output(torch.from_numpy(x), path.clock(times[i]).expand(3))
        guess = (a[i] * x - s[i] * v.numpy()) / (a[i] ** 2 + s[i] ** 2)
        ratio = a[i] / a[i + 1]
        most = s[i] ** 2 - ratio**2 * s[i + 1] ** 2
        of_x0, of_x = a[i + 1] * most / s[i] ** 2, ratio * (s[i + 1] / s[i]) ** 2
        true, said = of_x0 * x0 + of_x * x, of_x0 * guess + of_x * x
        j = min(i, len(times) - 3)
        least = (s[j] ** 2 - (a[j] / a[j + 1]) ** 2 * s[j + 1] ** 2) * (s[j + 1] / s[j]) ** 2
        last = i == len(times) - 2
        variance = {
            "posterior": least,
            "forward": least if last else most,
            "learned": most ** mix.numpy() * least ** (1 - mix.numpy()),
        }[choice] * np.ones_like(x)
        if last:
            z = np.stack([x0 - said + h / 255 for h in (1, -1)]) / np.sqrt(variance)
            upper, lower = (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
            upper, lower = np.where(x0 > 0.999, 1, upper), np.where(x0 < -0.999, 0, lower)
            term = -np.log(np.maximum(upper - lower, 1e-12))
        else:
            gap = (true - said) ** 2
            term = (np.log(variance / least) - 1 + (least + gap) / variance) / 2
        rows.append(term.mean((1, 2, 3, 4)) / math.log(2))
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("choice", ["posterior", "forward", "learned"])
def test_terms_are_those_of_the_definition(path, choice):
    x0, draws = data(), Draws(0, [3, 8, 5])
    if choice == "learned":
        diffusion, net, options = process(path, D.LearnedRange(D.VPrediction())), learned, {}
    else:
        diffusion, net, options = process(path), network, {"variance": choice}
    bound = D.variational_bound(diffusion, net, x0, {"label": LABEL}, draws, **options)

    def output(x, clock):
        said = learned(x, clock.float(), LABEL)
        return said[:, :4], (said[:, 4:] + 1) / 2

    expected = by_hand(path, output, x0, draws, D.SpacedGrid(6)(path), choice)
    assert bound.terms.shape == bound.x0_mse.shape == bound.noise_mse.shape == (3, 6)
    np.testing.assert_allclose(bound.terms.numpy(), expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(bound.total, bound.prior + bound.terms.sum(1))


def test_errors_are_of_the_estimate():
    x0, draws, path = data(), Draws(0, range(3)), D.LinearPath()
    bound = D.variational_bound(process(path), network, x0, {"label": LABEL}, draws)
    for i, t in enumerate(D.SpacedGrid(6)(path)[:-1]):
        noise = draws.normal(f"bound/{i}", x0)
        level = path.at(t, x0)
        x = level.alpha * x0 + level.sigma * noise
        v = network(x, path.clock(t).float().expand(3), LABEL)
        said = D.VPrediction().estimate(path, x, v, level)
        for actual, guess, truth in [
            (bound.x0_mse, said.x0, x0), (bound.noise_mse, said.noise, noise),
        ]:  # fmt: skip
            expected = (guess - truth).square().mean((1, 2, 3, 4))
            torch.testing.assert_close(actual[:, i], expected)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_who_knows_the_data_pays_for_the_last_step_alone(path):
    x0, draws = data(), Draws(0, range(3))
    bound = D.variational_bound(process(path, Oracle()), lambda x, clock: x0, x0, {}, draws)
    assert bound.terms[:, :-1].abs().max() < 1e-12
    assert not bound.x0_mse.any()
    assert bound.terms[:, -1].min() > 0


class Oracle(D.Prediction):
    """The output is the data."""

    def target(self, path, x0, noise, level):
        return x0

    def estimate(self, path, x, output, level):
        return D.Estimate(output, (x - level.alpha * output) / level.sigma)


def test_a_sample_is_bounded_the_same_alone_and_in_a_batch():
    diffusion = process(D.DiscretePath(), D.LearnedRange(D.VPrediction()))

    def bound(rows, indices):
        label = {"label": LABEL[rows]}
        return D.variational_bound(diffusion, learned, data()[rows], label, Draws(0, indices))

    together, alone = bound(slice(None), [4, 9, 2]), bound(slice(1, 2), [9])
    for values, value in zip(together, alone, strict=True):
        torch.testing.assert_close(values[1:2], value)
        assert values[:, 0].unique().numel() == 3 if values.ndim == 2 else True


def test_the_network_is_told_the_original_levels():
    told = []

    def noted(x, clock, label):
        told.append(clock.tolist())
        return network(x, clock, label)

    bound = D.variational_bound(
        process(D.DiscretePath(), grid=D.SpacedGrid(5)), noted, data().float(),
        {"label": LABEL.clone().requires_grad_()}, Draws(0, range(3)),
    )  # fmt: skip
    assert told == [[level] * 3 for level in (999, 749, 500, 250, 0)]
    assert bound.total.dtype == torch.float32
    assert not bound.total.requires_grad


def test_a_whole_table_is_the_grid_where_none_is_given():
    path, x = D.DiscretePath(), data()
    t = torch.tensor([0.0, 1.0, 640.0], dtype=torch.float64)
    estimate = D.Estimate(torch.tanh(x), x, torch.sigmoid(x))
    whole = D.SpacedGrid(1000)(path).flip(0)
    for said in estimate, estimate._replace(log_var_mix=None):
        implied = bound_of_step(path, data(1), x, said, t)
        torch.testing.assert_close(implied, bound_of_step(path, data(1), x, said, t, whole))
    # One level for the batch, or one for each sample.
    for i, level in enumerate(t):
        torch.testing.assert_close(
            bound_of_step(path, data(1), x, estimate, level)[i],
            bound_of_step(path, data(1), x, estimate, t)[i],
        )


def test_the_range_of_the_variance_is_that_of_the_step():
    """Of long steps: between the levels of the grid, not of the table."""
    path = D.DiscretePath()
    grid = torch.tensor([-1.0, 0.0, 300.0, 700.0], dtype=torch.float64)
    t = torch.tensor([700.0, 300.0, 0.0], dtype=torch.float64)
    bar = {k: path.coefficients(torch.tensor(float(k)))[0].item() ** 2 for k in (0, 300, 700)}
    first = 1 - bar[300] / bar[0], 1 - bar[700] / bar[300]
    least, most = log_variance_range(path, t, data(), grid)
    tilde = [
        first[1] * (1 - bar[300]) / (1 - bar[700]), first[0] * (1 - bar[0]) / (1 - bar[300]),
    ]  # fmt: skip
    expected = [*tilde, tilde[-1]]
    assert least.exp().flatten().tolist() == pytest.approx(expected, rel=1e-9)
    betas = [first[1], first[0], 1 - bar[0]]
    assert most.exp().flatten().tolist() == pytest.approx(betas, rel=1e-9)


@pytest.mark.parametrize(("path", "t"), [(D.LinearPath(), 0.9), (D.DiscretePath(), 600.0)])
def test_prior_bound(path, t):
    """Against torch.distributions."""
    x0, t = data(), torch.tensor(t, dtype=torch.float64)
    alpha, sigma = path.coefficients(t)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(alpha * x0, sigma), normal(0.0, 1.0))
    expected = kl.mean((1, 2, 3, 4)) / math.log(2)
    torch.testing.assert_close(prior_bound(path, x0, t), expected)


def test_a_wide_prior():
    class Exploding(D.LinearPath):
        prior_std = 3.0

        def coefficients(self, t):
            return torch.ones_like(t), 3 * t

    x0 = data()
    expected = (x0 / 3).square().mean((1, 2, 3, 4)) / 2 / math.log(2)
    actual = prior_bound(Exploding(), x0, torch.tensor(1.0))
    torch.testing.assert_close(actual, expected)


def test_what_has_no_bound_is_refused():
    x, t = data(), torch.zeros(3)
    estimate = D.Estimate(x, x)
    with pytest.raises(ValueError, match="needs a DiscretePath, or a grid on LinearPath"):
        bound_of_step(D.LinearPath(), x, x, estimate, t)
    with pytest.raises(ValueError, match="grid of at least 2 steps"):
        D.variational_bound(
            process(D.LinearPath(), grid=D.SpacedGrid(1)), network, x, {"label": LABEL},
            Draws(0, range(3)),
        )  # fmt: skip
    with pytest.raises(ValueError, match="variance .* 'fixed'"):
        step_down(D.DiscretePath(), x, estimate, t, variance="fixed")

"""Training and sampling by a whole process, and the small parts that it is made of."""

import math
from statistics import NormalDist

import pytest
import torch

from mmsora import diffusion as D
from mmsora.diffusion.level import expand
from mmsora.utils.draws import Draws
from tests.stubs import At

SHAPE = 3, 2, 4, 5, 3  # as wide as the batch: a vector of the batch must not meet the width

PREDICTIONS = {
    "noise": D.NoisePrediction(),
    "v": D.VPrediction(),
    "velocity": D.VelocityPrediction(),
    "velocity reversed": D.VelocityPrediction(sign=-1),
}
PATHS = {"linear": D.LinearPath(span=(0.0, 0.999)), "table": D.DiscretePath()}

each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_solver = pytest.mark.parametrize(
    "solver", [D.Euler(), D.Euler(eta=0.5), D.Heun(), D.Ancestral()]
)


def process(path, prediction, solver=None, scale=1.0, times=None):
    parts = times or D.UniformTimes(), solver or D.Euler(), D.SpacedGrid(5)
    return D.Diffusion(path, prediction, *parts, D.ClassifierFree(scale), D.MSE())


def column(value):
    return value.reshape(-1, 1, 1, 1, 1)


def network(x, clock, label=None):
    label = torch.zeros(len(x)) if label is None else label
    return torch.tanh(x) + torch.sin(column(clock)) + column(label)


def data(shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Fractions:
    """Draws with given uniform numbers and no noise."""

    def __init__(self, values):
        self.values = torch.as_tensor(values, dtype=torch.float64)

    def uniform(self, name):
        return self.values

    def normal(self, name, like):
        return torch.zeros_like(like)


# Training


@each_path
@each_prediction
def test_loss_is_of_each_sample_alone(path, prediction):
    x0, label = data(), torch.tensor([0.0, 1.0, -2.0])
    diffusion = process(path, prediction)

    together = diffusion.loss(network, x0, {"label": label}, Draws(0, [7, 3, 5], step=2))
    alone = [
        diffusion.loss(network, x0[i : i + 1], {"label": label[i : i + 1]}, Draws(0, [n], step=2))
        for i, n in enumerate([7, 3, 5])
    ]

    assert together.shape == (3,)
    torch.testing.assert_close(together, torch.cat(alone))
    assert together.unique().numel() == 3


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("noise", lambda t, x0, noise: noise),
        ("v", lambda t, x0, noise: (1 - t) * noise - t * x0),
        ("velocity", lambda t, x0, noise: noise - x0),
        ("velocity reversed", lambda t, x0, noise: x0 - noise),
    ],
)
def test_loss_is_the_error_of_the_target(name, target):
    """Written out for rectified flow."""
    x0, draws = data(), Draws(0, range(3))
    t, noise = draws.uniform("times") * 0.999, draws.normal("noise", x0)
    x = (1 - column(t)) * x0 + column(t) * noise

    loss = process(PATHS["linear"], PREDICTIONS[name]).loss(network, x0, {}, draws)

    error = network(x, (1000 * t).float()) - target(column(t), x0, noise)
    torch.testing.assert_close(loss, error.square().mean((1, 2, 3, 4)).float())


@each_path
@each_prediction
def test_estimate_reads_the_target(path, prediction):
    x0, noise = data().double(), data().flip(0).double()
    level = path.at(path.time_at(torch.tensor([0.2, 0.5, 0.8])), x0)
    x = level.alpha * x0 + level.sigma * noise

    target = prediction.target(path, x0, noise, level)
    estimate = prediction.estimate(path, x, target, level)

    torch.testing.assert_close(estimate.x0, x0)
    torch.testing.assert_close(estimate.noise, noise)


def test_an_output_with_wrong_channels_is_named():
    diffusion = process(D.LinearPath(), D.VelocityPrediction())

    def learns_variance(x, clock):
        return torch.cat([x, x], dim=1)

    with pytest.raises(ValueError, match="out_channels to 2"):
        diffusion.loss(learns_variance, data(), {}, Draws(0, range(3)))


def test_velocity_has_two_signs():
    with pytest.raises(ValueError, match="1 or -1"):
        D.VelocityPrediction(sign=0)


# Sampling


@pytest.mark.parametrize("null", [None, {"label": torch.zeros(3)}])
def test_without_guidance_a_step_calls_the_network_once(null):
    calls = []

    def counted(x, clock, label):
        calls.append(label)
        return network(x, clock, label)

    label = torch.ones(3)
    diffusion = process(D.LinearPath(), D.VelocityPrediction(), scale=3.0 if null is None else 1.0)
    diffusion.sample(counted, data(), {"label": label}, null, Draws(0, range(3)))

    assert len(calls) == 5
    assert all(call is label for call in calls)


@each_path
@each_prediction
@each_solver
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_guidance_is_an_extrapolation_of_outputs(path, prediction, solver, scale):
    label, null = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, 0.0, 0.25])

    def extrapolated(x, clock):
        cond, none = network(x, clock, label), network(x, clock, null)
        return none + scale * (cond - none)

    x, draws = data().double(), Draws(0, range(3))
    guided = process(path, prediction, solver, scale)
    plain = process(path, prediction, solver)
    actual = guided.sample(network, x, {"label": label}, {"label": null}, draws)
    expected = plain.sample(extrapolated, x, {}, None, draws)

    assert (actual - expected).abs().max() < 1e-6 * expected.abs().max()


@each_path
@each_prediction
@each_solver
def test_a_sample_is_the_same_alone_and_in_a_batch(path, prediction, solver):
    diffusion = process(path, prediction, solver)
    together = diffusion.sample(network, data(), {}, None, Draws(0, [4, 9, 2]))
    alone = diffusion.sample(network, data()[1:2], {}, None, Draws(0, [9]))
    torch.testing.assert_close(together[1:2], alone)


@each_path
@each_solver
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_everything_runs_on_the_meta_device(path, solver, scale):
    """There a number cannot be read, so nothing waits for the device in the middle."""
    diffusion = process(path, D.VPrediction(), solver, scale)
    x = data().to("meta")

    def anything(x, clock):
        assert clock.device == x.device
        assert clock.shape == (3,)
        return x * column(clock)

    sample = diffusion.sample(anything, x, {}, {}, Draws(0, range(3)))
    loss = diffusion.loss(anything, x, {}, Draws(0, range(3)))

    assert (sample.device.type, sample.shape) == ("meta", SHAPE)
    assert (loss.device.type, loss.shape) == ("meta", (3,))


@each_path
@each_solver
def test_a_half_precision_network_costs_no_more_digits_than_its_own(path, solver):
    seen = set()

    def rounded(x, clock):
        seen.update([x.dtype, clock.dtype])
        return torch.tanh(x).bfloat16()

    diffusion = process(path, D.NoisePrediction(), solver, scale=3.0)
    x = diffusion.sample(rounded, data(), {}, {}, Draws(0, range(3)))
    widened = diffusion.sample(
        lambda x, clock: rounded(x, clock).float(), data(), {}, {}, Draws(0, range(3))
    )
    assert {x.dtype} == seen == {torch.float32}
    assert torch.equal(x, widened)


def test_sampling_starts_at_the_prior():
    class Wide(D.LinearPath):
        prior_std = 80.0

    seen = []

    def note(x, clock):
        seen.append(x)
        return x

    process(Wide(), D.VelocityPrediction()).sample(note, data(), {}, None, Draws(0, range(3)))
    torch.testing.assert_close(seen[0], 80 * data())


def test_a_process_is_built_of_configs():
    diffusion = D.Diffusion(
        path=dict(type="LinearPath", clock_scale=10.0),
        prediction=dict(type="VelocityPrediction", sign=-1),
        train_times=dict(type="LogitNormalTimes"),
        solver=dict(type="Heun"),
        grid=dict(type="SpacedGrid", num_steps=7),
        guidance=dict(type="ClassifierFree", scale=2.0),
        loss=dict(type="MSE"),
    )
    assert isinstance(diffusion.solver, D.Heun)
    assert isinstance(diffusion.loss_function, D.MSE)
    assert (diffusion.path.clock_scale, diffusion.prediction.sign) == (10.0, -1)
    assert (diffusion.grid.num_steps, diffusion.guidance.scale) == (7, 2.0)


# Times and paths


def test_uniform_times_visit_every_level_alike():
    path = D.DiscretePath()
    middles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert D.UniformTimes()(path, Fractions(middles)).tolist() == list(range(1000))


@pytest.mark.parametrize("levels", [20, 37, 64, 1000])
def test_times_stay_on_the_table(levels):
    path = D.DiscretePath(num_levels=levels)
    ends = Fractions([0.0, 1 - 2.0**-53])
    assert D.UniformTimes()(path, ends).tolist() == [0, levels - 1]
    assert D.LogitNormalTimes(std=50.0)(path, ends).tolist() == [0, levels - 1]


def test_uniform_times_fill_the_span():
    path = D.LinearPath(span=(0.1, 0.9))
    times = D.UniformTimes()(path, Fractions([0.0, 0.25, 0.5]))
    assert times.tolist() == pytest.approx([0.1, 0.3, 0.5])


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5), (-1.0, 2.0)])
def test_logit_normal_has_its_quantiles(mean, std):
    fractions = [0.001, 0.1, 0.25, 0.5, 0.9, 0.999]
    times = D.LogitNormalTimes(mean, std)(D.LinearPath(), Fractions(fractions))
    quantiles = [NormalDist(mean, std).inv_cdf(u) for u in fractions]
    assert times.tolist() == pytest.approx([1 / (1 + math.exp(-q)) for q in quantiles], rel=1e-9)


def test_logit_normal_survives_the_ends_of_the_draws():
    times = D.LogitNormalTimes()(D.LinearPath(), Fractions([0.0, 1 - 2.0**-53]))
    assert 0 < times[0] < 0.001
    assert 0.999 < times[1] < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: D.LogitNormalTimes(std=0.0), "positive"),
        (lambda: D.SpacedGrid(0), "at least 1"),
        (lambda: D.SpacedGrid(31)(D.DiscretePath(num_levels=30)), "31 steps do not fit 30 levels"),
        (lambda: D.DiscretePath(num_levels=19), "num_levels=19 is too few .* 'linear'"),
        (lambda: D.DiscretePath("const", num_levels=20), "num_levels=20 is too few .* 'const'"),
        (lambda: D.DiscretePath("jsd", num_levels=1), "at least 2, got 1"),
        (lambda: D.DiscretePath("cubic"), "'cubic'"),
    ],
)
def test_impossible_parts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_rates_are_the_derivative_of_the_coefficients(shape):
    class Trigonometric(D.Path):
        t_clean, t_noise = 0.0, 1.0

        def coefficients(self, t):
            return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)

    t = torch.full((), 0.3, dtype=torch.float64).expand(shape)
    angle = torch.full(shape, 0.3 * math.pi / 2, dtype=torch.float64)
    alpha, sigma = Trigonometric().rates(t)
    torch.testing.assert_close(alpha, -math.pi / 2 * torch.sin(angle))
    torch.testing.assert_close(sigma, math.pi / 2 * torch.cos(angle))

    linear = D.LinearPath()
    for actual, expected in zip(D.Path.rates(linear, t), linear.rates(t), strict=True):
        torch.testing.assert_close(actual, expected)


def test_linear_path_is_a_straight_line():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    path = D.LinearPath()
    alpha, sigma = path.coefficients(t)
    d_alpha, d_sigma = path.rates(t)
    assert (alpha.tolist(), sigma.tolist()) == ([1, 0.75, 0], [0, 0.25, 1])
    assert (d_alpha.tolist(), d_sigma.tolist()) == ([-1, -1, -1], [1, 1, 1])
    assert path.clock(t).tolist() == [0, 250, 1000]


def test_even_steps_of_a_flow():
    grid = D.SpacedGrid(4)(D.LinearPath())
    assert grid.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert grid.dtype == torch.float64


# The one place where vectors of the batch meet tensors


def test_expand_meets_the_batch_axis():
    value = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    expanded = expand(value, data())
    assert expanded.shape == (3, 1, 1, 1, 1)
    assert expanded.dtype == torch.float32
    torch.testing.assert_close((expanded * torch.ones(SHAPE))[:, 0, 0, 0, 0], value.float())


def test_expand_leaves_scalars_alone():
    value = torch.tensor(0.5, dtype=torch.float64)
    assert expand(value, data()) is value


@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (3, 1), (3, 3), (1, 1, 1, 1, 3)])
def test_expand_refuses_what_only_happens_to_broadcast(shape):
    with pytest.raises(ValueError, match=r"\(\) or \(3,\)"):
        expand(torch.ones(shape), data())


def ideal(path, prediction, mean=0.3, std=0.7):
    """The best network for normal data."""

    def network(x, clock):
        t = clock.double() / getattr(path, "clock_scale", 1)
        alpha, sigma = (expand(value, x) for value in path.coefficients(t))
        share = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x0 = mean + share * (x - alpha * mean)
        noise = (x - alpha * x0) / sigma
        return prediction.target(path, x0, noise, D.Level(t, alpha, sigma))

    return network


@pytest.mark.parametrize("kind", ["linear", "table"])
def test_inversion_finds_the_noise(kind):
    path = PATHS[kind]
    prediction = D.VelocityPrediction() if kind == "linear" else D.NoisePrediction()
    noise, errors = data().double(), []
    for steps in (50, 200):
        parts = D.UniformTimes(), D.Euler(), D.SpacedGrid(steps), D.ClassifierFree(1.0), D.MSE()
        diffusion, draws = D.Diffusion(path, prediction, *parts), Draws(0, range(3))
        network = ideal(path, prediction)
        made = diffusion.sample(network, noise, {}, None, draws)
        found = diffusion.invert(network, made, {}, None, draws)
        errors.append((found - noise).abs().max().item())
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.1


def test_a_path_may_go_by_the_size():
    class Sized(D.LinearPath):
        def for_size(self, size):
            return D.LinearPath(span=(0.0, size[0] / 10))

    diffusion = process(Sized(), D.VelocityPrediction())
    seen = []

    def spy(x, clock):
        seen.append(clock[0].item())
        return x

    noise = data()  # four frames
    diffusion.sample(spy, noise, {}, None, Draws(0, range(3)))
    assert seen[0] == pytest.approx(400)
    seen.clear()
    diffusion.invert(spy, noise, {}, None, Draws(0, range(3)))
    assert seen[-1] < 400
    t = diffusion.for_size((2, 4, 4)).path.t_noise
    assert t == 0.2
    seen.clear()
    diffusion.train_times = At(fraction=[0.5] * 3)
    diffusion.loss(spy, noise, {}, Draws(0, range(3)))
    assert seen[0] == pytest.approx(200)


PARTS = {
    "path": D.DiscretePath(),
    "prediction": D.VPrediction(),
    "train_times": D.UniformTimes(),
    "solver": D.Euler(),
    "grid": D.SpacedGrid(5),
    "guidance": D.ClassifierFree(1.0),
    "loss": D.MSE(),
}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"solver": "Heun"}, r"solver must be a Solver, solver=dict\(type=.* in a config; got"),
        ({"solver": {"type": "LinearPath"}}, "solver must be a Solver.*got LinearPath"),
        ({"guidance": None}, "guidance must be a Guidance.*got None"),
        ({"loss": {"type": "MinSNR"}}, "loss must be a Loss.*got MinSNR"),
        ({"grid": D.SpacedGrid(2000)}, "2000 steps do not fit 1000 levels"),
        ({"grid": D.ShiftedGrid(5)}, "ShiftedGrid"),
        ({"solver": D.RungeKutta()}, "RungeKutta integrates in continuous time"),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_they_are_put_together(parts, words):
    with pytest.raises(ValueError, match=words):
        D.Diffusion(**PARTS | parts)


@pytest.mark.parametrize("weighting", [D.VelocityWeighting(), D.LikelihoodWeighting()])
def test_a_weighting_that_is_infinite_says_so(weighting):
    path, t = D.DiscretePath(zero_terminal_snr=True), torch.tensor([3.0, 999.0])
    with pytest.raises(ValueError, match="infinite where alpha = 0"):
        weighting(path, D.VPrediction(), t, torch.ones(2))

"""What outputs mean, on every path on which they can be read."""

import diffusers
import pytest
import torch

from mmsora import diffusion as D
from mmsora.utils.draws import Draws

SHAPE = 3, 2, 4, 6, 5
MEAN, STD = 0.4, 0.6

PATHS = {
    "linear": D.LinearPath(),
    "linear, cut": D.LinearPath(span=(0.001, 0.999)),
    "trig": D.TrigPath(),
    "vp": D.VPPath(),
    "ve": D.VEPath(),
    "cosine": D.CosinePath(),
    "shifted": D.ShiftedPath(D.LinearPath(span=(0.0, 0.999)), 3.0),
    "table": D.DiscretePath(),
    "pure noise": D.DiscretePath(zero_terminal_snr=True),
    "jsd": D.DiscretePath("jsd", num_levels=50),
}
PREDICTIONS = {
    "noise": D.NoisePrediction(),
    "score": D.ScorePrediction(),
    "sample": D.SamplePrediction(),
    "v": D.VPrediction(),
    "velocity": D.VelocityPrediction(),
    "velocity reversed": D.VelocityPrediction(sign=-1),
    "edm": D.EDMPrediction(0.7),
}
ENDS_IN_PURE_NOISE = {"linear", "trig", "pure noise", "jsd"}
REFUSED = {(path, name) for path in ENDS_IN_PURE_NOISE for name in ("noise", "score")} | {
    ("cosine", "velocity"),
    ("cosine", "velocity reversed"),
}
PAIRS = [(path, name) for path in PATHS for name in PREDICTIONS if (path, name) not in REFUSED]

each_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS)


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def column(value):
    return value.reshape(-1, 1, 1, 1, 1)


def ideal_output(prediction, path, x0, noise, level):
    """The output whose meaning is the target."""
    target = prediction.target(path, x0, noise, level)
    return -target / level.sigma if isinstance(prediction, D.ScorePrediction) else target


def times(path):
    """One early, one in the middle, and the noisiest of all."""
    inner = path.time_at(torch.tensor([0.1, 0.55], dtype=torch.float64))
    return torch.cat([inner, torch.tensor([path.t_noise], dtype=torch.float64)])


@each_pair
def test_data_and_noise_are_read_off_the_target(path, prediction):
    path, prediction = PATHS[path], PREDICTIONS[prediction]
    prediction.check(path)
    x0, noise = data(), data(1)
    level = path.at(times(path), x0)
    x = level.alpha * x0 + level.sigma * noise

    output = ideal_output(prediction, path, x0, noise, level)
    estimate = prediction.estimate(path, x, output, level)

    torch.testing.assert_close(estimate.x0, x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(estimate.noise, noise, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        prediction.of_target(output, level), prediction.target(path, x0, noise, level)
    )


@each_pair
def test_any_output_is_read_in_keeping_with_the_noisy_batch(path, prediction):
    path, prediction = PATHS[path], PREDICTIONS[prediction]
    x, output = data(), data(1)
    level = path.at(times(path), x)
    estimate = prediction.estimate(path, x, output, level)
    again = level.alpha * estimate.x0 + level.sigma * estimate.noise
    torch.testing.assert_close(again, x, rtol=1e-8, atol=1e-8)


@each_pair
def test_sensitivity_is_that_of_the_target(path, prediction):
    """What the target changes by where data change and the noisy batch does not."""
    path, prediction = PATHS[path], PREDICTIONS[prediction]
    t, x0, noise = times(path), data(), data(1)
    level = path.at(t, x0)
    change = data(2)
    moved = x0 + change, noise - level.alpha / level.sigma * change

    before = prediction.target(path, x0, noise, level)
    after = prediction.target(path, *moved, level)
    expected = column(prediction.sensitivity(path, t)) * change.abs()
    assert prediction.sensitivity(path, t).dtype == torch.float64
    torch.testing.assert_close((after - before).abs(), expected, rtol=1e-7, atol=1e-10)


def test_sensitivities_of_a_flow():
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    path, alpha = D.LinearPath(), 1 - t
    norm = (t**2 + 0.49 * alpha**2).sqrt()
    expected = {
        "noise": alpha / t,
        "score": alpha / t,
        "sample": torch.ones(2),
        "v": (alpha**2 + t**2) / t,
        "velocity": 1 / t,
        "velocity reversed": 1 / t,
        "edm": norm / (0.7 * t),
    }
    for name, prediction in PREDICTIONS.items():
        actual = prediction.sensitivity(path, t)
        torch.testing.assert_close(actual, expected[name].double())
        assert torch.equal(D.LearnedRange(prediction).sensitivity(path, t), actual)


@each_pair
def test_the_flow_ends_where_it_must(path, prediction):
    """With the best network for normal data; even steps, as the path counts them."""
    path, prediction = PATHS[path], PREDICTIONS[prediction]

    def network(x, clock):
        level = current[-1]
        alpha, sigma = level.alpha, level.sigma
        if isinstance(prediction, D.EDMPrediction):
            x = x * (sigma**2 + 0.49 * alpha**2).sqrt()
        assert clock.tolist() == pytest.approx([path.clock(level.t).item()] * 3)
        residual = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        x0, noise = MEAN + alpha * STD**2 * residual, sigma * residual
        return ideal_output(prediction, path, x0, noise, level)

    current = []

    class Noting(D.Euler):
        def __call__(self, denoise, x, path, times, draws):
            def noted(x, level):
                current.append(level)
                return denoise(x, level)

            return super().__call__(noted, x, path, times, draws)

    def grid(path):
        if path.num_levels is not None:
            return torch.arange(path.num_levels - 1, -2, -1, dtype=torch.float64)
        t = path.time_at(torch.linspace(1, 0, 401, dtype=torch.float64))
        return torch.cat([t[:-1], torch.tensor([path.t_clean], dtype=torch.float64)])

    parts = D.UniformTimes(), Noting(), grid, D.ClassifierFree(1.0), D.MSE()
    noise = data()
    x = D.Diffusion(path, prediction, *parts).sample(network, noise, {}, None, None)
    start = torch.stack(path.coefficients(torch.tensor(path.t_noise, dtype=torch.float64)))
    scale = STD * path.prior_std / (start[0] ** 2 * STD**2 + start[1] ** 2).sqrt()
    shift = MEAN - scale / path.prior_std * start[0] * MEAN
    slack = 0.12 if path.num_levels == 50 else 0.03
    assert (x - shift - scale * noise).abs().max() < slack


# What cannot be read


@pytest.mark.parametrize(("path", "prediction"), sorted(REFUSED))
def test_what_cannot_be_read_is_refused(path, prediction):
    message = (
        "alpha = 0.*EDMPrediction" if path in ENDS_IN_PURE_NOISE else "CosinePath stands still"
    )
    for part in PREDICTIONS[prediction], D.LearnedRange(PREDICTIONS[prediction]):
        with pytest.raises(ValueError, match=message):
            part.check(PATHS[path])


def test_a_process_checks_its_parts():
    parts = D.UniformTimes(), D.Euler(), D.SpacedGrid(3), D.ClassifierFree(1.0), D.MSE()
    with pytest.raises(ValueError, match="ScorePrediction cannot recover the data"):
        D.Diffusion(D.TrigPath(), D.ScorePrediction(), *parts)
    with pytest.raises(ValueError, match="sigma_data must be positive, got 0"):
        D.EDMPrediction(0)


# EDM


def test_preconditioning_is_that_of_diffusers():
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.7)
    path, prediction = D.VEPath(), PREDICTIONS["edm"]
    x, output = data(), data(1)
    for value in 0.002, 0.3, 80.0:
        sigma = torch.tensor(value, dtype=torch.float64)
        level = path.at(sigma.expand(3), x)
        torch.testing.assert_close(
            prediction.scale_input(x, level), scheduler.precondition_inputs(x, sigma)
        )
        torch.testing.assert_close(path.clock(sigma), scheduler.precondition_noise(sigma))
        torch.testing.assert_close(
            prediction.estimate(path, x, output, level).x0,
            scheduler.precondition_outputs(x, output, sigma),
        )


def test_edm_sees_any_path_as_its_own():
    """Divided by alpha, a level of any path is one of the variance-exploding path."""
    path, own, prediction = D.TrigPath(), D.VEPath(), PREDICTIONS["edm"]
    x, output, t = data(), data(1), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    level = path.at(t, x)
    same = own.at((level.sigma / level.alpha).flatten(), x)
    scaled = x / level.alpha
    torch.testing.assert_close(
        prediction.scale_input(x, level), prediction.scale_input(scaled, same)
    )
    actual = prediction.estimate(path, x, output, level)
    expected = prediction.estimate(own, scaled, output, same)
    torch.testing.assert_close(actual.x0, expected.x0)
    torch.testing.assert_close(actual.noise, expected.noise)


def test_edm_at_pure_noise_outputs_the_data():
    x, output, prediction = data(), data(1), PREDICTIONS["edm"]
    level = D.LinearPath().at(torch.ones(3), x)
    estimate = prediction.estimate(D.LinearPath(), x, output, level)
    torch.testing.assert_close(estimate.x0, 0.7 * output)
    torch.testing.assert_close(estimate.noise, x)


def test_the_loss_of_edm_is_plain():
    """Equation 2 with the weight of table 1 is the plain error of the output."""
    x0, draws = data(), Draws(0, range(3))
    parts = D.UniformTimes(), D.Euler(), D.SpacedGrid(3), D.ClassifierFree(1.0), D.MSE()
    process = D.Diffusion(D.VEPath(), D.EDMPrediction(0.5), *parts)

    def network(x, clock):
        return torch.tanh(x + column(clock).to(x))

    loss = process.loss(network, x0, {}, draws)

    sigma = 0.002 * (80 / 0.002) ** draws.uniform("times")
    s, noise = column(sigma), draws.normal("noise", x0)
    x = x0 + s * noise
    norm = (s**2 + 0.25).sqrt()
    data_ = 0.25 / norm**2 * x + s * 0.5 / norm * network(x / norm, (sigma.log() / 4).float())
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = weight * (data_ - x0).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=0)


def test_targets_of_edm_have_variance_one():
    path, prediction = D.VPPath(), D.EDMPrediction(0.5)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 200, 10, 10, generator=generator).double()
    level = path.at(torch.tensor([0.05, 0.4, 1.0], dtype=torch.float64), x0)
    target = prediction.target(path, 0.5 * x0, noise, level)
    seen = prediction.scale_input(level.alpha * 0.5 * x0 + level.sigma * noise, level)
    for values in target, seen:
        torch.testing.assert_close(
            values.flatten(1).std(1), torch.ones(3).double(), rtol=0.02, atol=0
        )


# Score and learned variance


def test_a_score_loss_is_that_of_the_noise():
    """SiT's ``(sigma score + noise)^2``."""
    x0, draws = data(), Draws(0, range(3))
    parts = D.UniformTimes(), D.Euler(), D.SpacedGrid(3), D.ClassifierFree(1.0), D.MSE()
    path = D.VPPath(clock_scale=1.0)
    loss = D.Diffusion(path, D.ScorePrediction(), *parts).loss(
        lambda x, clock: torch.tanh(x), x0, {}, draws
    )
    t, noise = path.time_at(draws.uniform("times")), draws.normal("noise", x0)
    alpha, sigma = (column(value) for value in path.coefficients(t))
    error = sigma * torch.tanh(alpha * x0 + sigma * noise) + noise
    torch.testing.assert_close(loss, error.square().mean((1, 2, 3, 4)).float())


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_variance_beside_any_mean(name):
    mean, path = PREDICTIONS[name], PATHS["table"]
    x, output, variance = data(), data(1), data(2)
    level = path.at(times(path), x)
    both = torch.cat([output, variance], dim=1)
    learned = D.LearnedRange(mean)
    estimate = learned.estimate(path, x, both, level)
    assert torch.equal(estimate.x0, mean.estimate(path, x, output, level).x0)
    assert torch.equal(estimate.log_var_mix, (variance + 1) / 2)
    assert torch.equal(learned.of_target(both, level), mean.of_target(output, level))
    assert torch.equal(learned.scale_input(x, level), mean.scale_input(x, level))

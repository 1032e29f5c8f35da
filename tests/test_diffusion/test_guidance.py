"""Guidance: what it makes of outputs, at which levels, and what it costs."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from mmsora import diffusion as D
from mmsora.diffusion import process as process_module
from mmsora.diffusion.solver import forward_variance, posterior_variance
from mmsora.utils.draws import Draws

SHAPE = 3, 4, 2, 5, 6


def data(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def column(value):
    return value.reshape(-1, 1, 1, 1, 1)


def network(x, clock, label):
    return torch.tanh(x) + torch.sin(column(clock) / 300) * column(label) + x * column(label)


def process(guidance, path=None, prediction=None, solver=None, steps=5):
    parts = D.UniformTimes(), solver or D.Euler(), D.SpacedGrid(steps), guidance, D.MSE()
    return D.Diffusion(path or D.LinearPath(), prediction or D.VPrediction(), *parts)


def level(t, path=None):
    return (path or D.LinearPath()).at(torch.tensor(t, dtype=torch.float64), data())


LABEL, NULL = torch.tensor([1.0, 0.5, -1.0]), torch.tensor([0.25, 0.0, 0.1])
OUTPUTS = data(1), data(2)


class Counted:
    """Opinions that are fixed, and a list of what was asked; the output is the noise."""

    def __init__(self, first=None, second=None):
        self.first = OUTPUTS[0] if first is None else first
        self.second = OUTPUTS[1] if second is None else second
        self.asked = []

    def conditional(self, x, level):
        self.asked.append("one")
        return self.first

    def both(self, x, level):
        self.asked.append("both")
        return self.first, self.second

    def opinions(self):
        return D.Opinions(
            self.conditional, self.both, lambda x, output, level: D.Estimate(x, output)
        )


def output(guidance, t=0.5, counted=None, path=None):
    """What guidance makes of the two outputs."""
    counted = counted or Counted()
    return guidance(counted.opinions())(data(), level(t, path)).noise


# Classifier-free guidance


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [4.0, 4.0, 4.0, 4.0]),
        ("linear", [7.0, 5.5, 4.0, 1.6]),
        ("cosine", [7.0, 4 + 3 * math.sqrt(0.5), 4.0, 1 + 3 * (1 - math.cos(math.pi / 10))]),
        ("power_cosine", [4.0, 1 + 1.5 * (1 - math.cos(math.pi * 0.75**4)),
                          1 + 1.5 * (1 - math.cos(math.pi / 16)),
                          1 + 1.5 * (1 - math.cos(math.pi * 1e-4))]),
    ],
)  # fmt: skip
def test_schedules_of_the_scale(schedule, expected):
    guidance = D.ClassifierFree(4.0, schedule=schedule)
    for t, strength in zip([0.0, 0.25, 0.5, 0.9], expected, strict=True):
        assert guidance.strength(level(t)) == pytest.approx(strength, rel=1e-12)
        mixed = OUTPUTS[1] + strength * (OUTPUTS[0] - OUTPUTS[1])
        torch.testing.assert_close(output(guidance, t), mixed)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_keep_the_mean_strength(schedule):
    guidance = D.ClassifierFree(3.0, schedule=schedule)
    shares = (torch.arange(1000) + 0.5) / 1000
    strengths = [guidance.strength(level(share.item())) for share in shares]
    assert sum(strengths) / 1000 == pytest.approx(3.0, rel=1e-6)


def test_the_power_of_the_power_cosine():
    guidance = D.ClassifierFree(3.0, schedule="power_cosine", power=1.0)
    assert guidance.strength(level(0.25)) == pytest.approx(1 + (1 + math.sqrt(0.5)))


def test_a_level_goes_by_its_share_of_noise():
    class Exploding(D.Path):  # EDM's: x = x0 + s noise
        t_clean, t_noise = 0.0, 80.0

        def coefficients(self, t):
            return torch.ones_like(t), t

    guidance = D.ClassifierFree(2.0, interval=(0.28 / 1.28, 2.9 / 3.9))
    for sigma, calls in [(0.2, "one"), (0.3, "both"), (2.9, "both"), (3.0, "one")]:
        counted = Counted()
        output(guidance, sigma, counted, Exploding())
        assert counted.asked == [calls]
    linear = D.ClassifierFree(2.0, schedule="linear")
    assert linear.strength(level(3.0, Exploding())) == pytest.approx(1 + 2 / 4)
    table = D.DiscretePath()
    alpha, sigma = table.coefficients(torch.tensor(300.0))
    expected = 1 + 2 * alpha / (alpha + sigma)
    assert linear.strength(level(300.0, table)) == pytest.approx(expected.item())


def test_outside_its_interval_a_step_costs_one_call():
    """The interval of REPA, on the grid 1, 0.9, ..., 0.1: both ends of it are inside."""
    seen = []

    def noted(x, clock, label):
        seen.append((round(clock[0].item()), label is LABEL))
        return network(x, clock, label)

    guidance = D.ClassifierFree(3.0, interval=(0.1, 0.7))
    x = process(guidance, steps=10).sample(
        noted, data(), {"label": LABEL}, {"label": NULL}, Draws(0, range(3))
    )
    assert [clock for clock, own in seen if own] == list(range(1000, 0, -100))
    assert [clock for clock, own in seen if not own] == list(range(700, 0, -100))

    def by_hand(x, clock):
        cond = network(x, clock, LABEL)
        if clock[0] > 701:
            return cond
        return cond + 2 * (cond - network(x, clock, NULL))

    plain = process(D.ClassifierFree(1.0), steps=10)
    torch.testing.assert_close(x, plain.sample(by_hand, data(), {}, None, Draws(0, range(3))))


@pytest.mark.parametrize(
    ("guidance", "t"),
    [
        (D.ClassifierFree(1.0), 0.5),
        (D.ClassifierFree(1.0, schedule="linear", rescale=0.7), 0.5),
        (D.ClassifierFree(4.0, schedule="linear"), 1.0),
        (D.ClassifierFree(4.0, schedule="power_cosine"), 1.0),
        (D.ClassifierFree(4.0, interval=(0.0, 0.4), rescale=0.7), 0.5),
    ],
)
def test_no_strength_costs_one_call(guidance, t):
    counted = Counted()
    assert output(guidance, t, counted) is OUTPUTS[0]
    assert counted.asked == ["one"]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_other_channels_stay_conditional(channels):
    first, second = (torch.cat([value, value.flip(1)], dim=1) for value in OUTPUTS)
    actual = output(D.ClassifierFree(4.0, channels=channels), counted=Counted(first, second))
    torch.testing.assert_close(
        actual[:, :channels], (4 * first - 3 * second)[:, :channels], rtol=1e-12, atol=1e-12
    )
    assert torch.equal(actual[:, channels:], first[:, channels:])
    # All channels are all of the data's: a learned variance comes after them.
    everything = output(D.ClassifierFree(4.0), counted=Counted(first, second))
    torch.testing.assert_close(everything[:, :4], (4 * first - 3 * second)[:, :4])
    assert torch.equal(everything[:, 4:], first[:, 4:])


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("channels", [None, 3])
def test_rescaling_is_that_of_diffusers(rescale, channels):
    first, second = OUTPUTS[0], 3 * OUTPUTS[1] + 1
    actual = output(D.ClassifierFree(4.0, channels, rescale=rescale), 0.5, Counted(first, second))
    own = slice(channels)
    mixed = (4 * first - 3 * second)[:, own]
    expected = rescale_noise_cfg(mixed, first[:, own], guidance_rescale=rescale)
    torch.testing.assert_close(actual[:, own], expected, rtol=1e-12, atol=1e-12)
    if channels:
        assert torch.equal(actual[:, channels:], first[:, channels:])


def test_rescaling_survives_a_network_that_says_nothing():
    silent = torch.zeros(SHAPE)
    actual = output(D.ClassifierFree(4.0, rescale=0.7), counted=Counted(silent, silent))
    assert torch.equal(actual, silent)


def test_each_sample_may_have_its_own_level():
    guidance = D.ClassifierFree(3.0, interval=(0.0, 0.6), schedule="linear", rescale=0.5)
    times = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    batched = D.LinearPath().at(times, data())
    together = guidance(Counted().opinions())(data(), batched).noise
    for i, t in enumerate(times.tolist()):
        torch.testing.assert_close(together[i], output(guidance, t)[i])
    torch.testing.assert_close(together[1], OUTPUTS[0][1])


def test_autoguidance_leaves_a_weaker_network_behind():
    def weak(x, clock, label):
        return 0.5 * network(x, clock, label)

    def extrapolated(x, clock, label):
        strong, other = network(x, clock, label), weak(x, clock, label)
        return torch.cat([(other + 2.5 * (strong - other))[:, :3], strong[:, 3:]], dim=1)

    cond, draws = {"label": LABEL}, Draws(0, range(3))
    auto = process(D.Autoguidance(2.5, channels=3))
    actual = auto.sample(network, data(), cond, {"label": NULL}, draws, weak=weak)
    plain = process(D.ClassifierFree(1.0)).sample(extrapolated, data(), cond, None, draws)
    torch.testing.assert_close(actual, plain)
    with pytest.raises(ValueError, match="Autoguidance needs a weaker network"):
        auto.sample(network, data(), cond, {"label": NULL}, draws)


@pytest.mark.parametrize("wrap", [lambda g: g, D.Clipped], ids=["bare", "clipped"])
def test_one_batch_gives_what_two_calls_give(monkeypatch, wrap):
    sizes = []

    def of_two(x, clock, label, text):
        sizes.append((len(x), len(clock), len(label), len(text)))
        return network(x, clock, label) + text.sum((1, 2)).reshape(-1, 1, 1, 1, 1)

    text = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(5))
    cond, null = {"label": LABEL, "text": text}, {"label": NULL, "text": 0 * text}
    diffusion = process(wrap(D.ClassifierFree(3.0, interval=(0.0, 0.7))))
    results = {}
    for joint in (False, True):
        monkeypatch.setattr(
            process_module, "_prefers_one_batch", lambda device, joint=joint: joint
        )
        results[joint] = diffusion.sample(of_two, data(), cond, null, Draws(0, range(3)))
        steps = 5 if joint else 8
        assert len(sizes) == steps
        expected = {3, 6} if joint else {3}
        assert {size for group in sizes for size in group} == expected
        assert all(len(set(group)) == 1 for group in sizes)
        sizes.clear()
    torch.testing.assert_close(results[True], results[False])


# The gradient of a function


def quadratic(x, level):
    """Of another size for each sample, and at each level."""
    weight = 1 + torch.arange(len(x)).to(x)
    return -(weight * x.square().flatten(1).sum(1)) * (1 + level.sigma.reshape(-1).to(x)) / 2


def gradient(x, level):
    return -column(1 + torch.arange(len(x)).to(x)) * x * (1 + level.sigma)


def test_a_gradient_moves_noise_and_the_data_with_it():
    """The new noise is that of Dhariwal and Nichol's algorithm 2."""
    x, path = data(), D.DiscretePath()
    now = path.at(torch.tensor([10.0, 300.0, 900.0]), x)
    plain = process(D.ClassifierFree(1.0), path).denoiser(network, {"label": LABEL})(x, now)
    guided = process(D.ClassifierGuidance(quadratic, 0.5), path).denoiser(
        network, {"label": LABEL}
    )(x, now)
    push = 0.5 * gradient(x, now)
    torch.testing.assert_close(guided.gradient, push)
    torch.testing.assert_close(guided.noise, plain.noise - (1 - now.alpha**2).sqrt() * push)
    torch.testing.assert_close(now.alpha * guided.x0 + now.sigma * guided.noise, x)


@pytest.mark.parametrize("variance", ["posterior", "forward"])
@pytest.mark.parametrize("learned", [False, True])
def test_ancestral_adds_its_variance_times_the_gradient(variance, learned):
    """Algorithm 1, on steps so long that its move is far from that of the estimate."""
    x, path = data(), D.DiscretePath()
    grid = torch.tensor([700.0, 300.0], dtype=torch.float64)
    mix = torch.sigmoid(OUTPUTS[0])

    def said(x, clock):
        return torch.cat([torch.tanh(x), 2 * mix - 1], 1) if learned else torch.tanh(x)

    prediction = D.NoisePrediction()
    prediction = D.LearnedRange(prediction) if learned else prediction

    def sampled(guidance):
        diffusion = process(guidance, path, prediction, D.Ancestral(variance))
        diffusion.grid = lambda path: grid
        return diffusion.sample(said, x, {}, None, Draws(0, range(3)))

    now, to = (path.at(t, x) for t in grid)
    least, most = posterior_variance(now, to), forward_variance(now, to)
    fixed = most if variance == "forward" else least
    own = (mix * most.log() + (1 - mix) * least.log()).exp() if learned else fixed
    actual = sampled(D.ClassifierGuidance(quadratic, 2.0)) - sampled(D.ClassifierFree(1.0))
    torch.testing.assert_close(actual, own * 2 * gradient(x, now), rtol=1e-9, atol=1e-9)


MEASURED, ERROR, STD = 2.0, 0.5, 1.5


def log_prob_of_the_measurement(x, level):
    """The data are normal around 0 with deviation STD, measured with a normal error."""
    alpha, sigma = level.alpha, level.sigma
    norm = alpha**2 * STD**2 + sigma**2
    mean, variance = alpha * STD**2 * x / norm, STD**2 * sigma**2 / norm + ERROR**2
    return -((MEASURED - mean) ** 2 / variance / 2).flatten(1).sum(1)


@pytest.mark.parametrize(
    ("path", "solver", "steps"),
    [
        (D.LinearPath(), D.Euler(), 200),
        (D.LinearPath(), D.Heun(), 50),
        (D.LinearPath(), D.Ancestral(), 500),
        (D.DiscretePath(), D.Ancestral(), 500),
        (D.DiscretePath(), D.Ancestral("forward"), 500),
    ],
    ids=["euler", "heun", "ancestral, linear", "ancestral", "ancestral, forward"],
)
def test_guided_samples_follow_the_posterior(path, solver, steps):
    """Bayes: samples of the prior, guided by a measurement, are samples given it."""

    def ideal(x, clock):
        alpha, sigma = path.coefficients(clock.double() / (1 if path.num_levels else 1000))
        alpha, sigma = column(alpha), column(sigma)
        return (1 - STD**2) * alpha * sigma * x / (alpha**2 * STD**2 + sigma**2)

    draws = Draws(0, range(40))
    start = draws.normal("start", torch.empty(40, 4, 3, 5, 5, dtype=torch.float64))
    guidance = D.ClassifierGuidance(log_prob_of_the_measurement)
    diffusion = process(guidance, path, solver=solver, steps=steps)
    x = diffusion.sample(ideal, start, {}, None, draws)
    gain = STD**2 / (STD**2 + ERROR**2)
    assert x.mean().item() == pytest.approx(gain * MEASURED, abs=0.03)
    assert x.std().item() == pytest.approx(gain**0.5 * ERROR, abs=0.02)


def test_a_gradient_comes_on_top_of_another_guidance():
    x, now = data(), level(0.4)
    free = D.ClassifierFree(3.0)
    opinions = Counted().opinions()
    plain, guided = (g(opinions)(x, now) for g in (free, D.ClassifierGuidance(quadratic, 1, free)))
    torch.testing.assert_close(guided.noise, plain.noise - now.sigma * gradient(x, now))
    assert D.ClassifierGuidance(quadratic).second == "null"
    assert D.ClassifierGuidance(quadratic, guidance=D.Autoguidance(2.0)).second == "weak"
    built = D.ClassifierGuidance(quadratic, 1, dict(type="Autoguidance", scale=2.0))
    assert isinstance(built.guidance, D.Autoguidance)


def test_pure_noise_is_not_guided():
    asked = []

    def noted(x, level):
        asked.append(level.t.item())
        return quadratic(x, level)

    diffusion = process(D.ClassifierGuidance(noted))
    x = diffusion.sample(network, data(), {"label": LABEL}, None, Draws(0, range(3)))
    assert asked == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert x.isfinite().all()


def test_a_gradient_is_taken_where_none_is_wanted():
    expected = process(D.ClassifierGuidance(quadratic)).denoiser(network, {"label": LABEL})(
        data(), level(0.3)
    )
    with torch.inference_mode():
        x = data()
        actual = process(D.ClassifierGuidance(quadratic)).denoiser(network, {"label": LABEL})(
            x, level(0.3)
        )
    torch.testing.assert_close(actual.noise, expected.noise)
    assert not x.requires_grad
    assert not expected.noise.requires_grad


def test_the_function_is_of_each_sample():
    guidance = D.ClassifierGuidance(lambda x, level: -x.square().sum())
    with pytest.raises(ValueError, match=r"of shape \(3,\), got \(\); sum over the other axes"):
        guidance(Counted().opinions())(data(), level(0.3))


# Data in a range


@pytest.mark.parametrize("limit", [1.0, 0.25])
def test_clipped_data_and_the_noise_that_belongs_to_them(limit):
    x, now = data(), D.LinearPath().at(torch.tensor([0.2, 0.5, 0.8]), data())
    plain, clipped = (
        process(g).denoiser(network, {"label": LABEL})(x, now)
        for g in (D.ClassifierFree(1.0), D.Clipped(D.ClassifierFree(1.0), limit))
    )
    assert plain.x0.abs().max() > limit
    assert torch.equal(clipped.x0, plain.x0.clip(-limit, limit))
    torch.testing.assert_close(now.alpha * clipped.x0 + now.sigma * clipped.noise, x)


@pytest.mark.parametrize("percentile", [0.5, 0.93, 1.0])
def test_a_percentile_cuts_as_diffusers_does(percentile):
    """Samples of which one needs no cut."""
    x0 = data() * column(torch.tensor([0.1, 1.0, 5.0]))
    scheduler = DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=1e9
    )
    opinions = Counted().opinions()._replace(read=lambda x, output, level: D.Estimate(x0, output))
    clipped = D.Clipped(D.ClassifierFree(1.0), percentile=percentile)(opinions)
    actual = clipped(data(), level(0.5))
    torch.testing.assert_close(actual.x0, scheduler._threshold_sample(x0))
    torch.testing.assert_close(0.5 * actual.x0 + 0.5 * actual.noise, data())
    halved = D.Clipped(D.ClassifierFree(1.0), limit=0.5, percentile=percentile)(opinions)
    expected = scheduler._threshold_sample(2 * x0) / 2
    torch.testing.assert_close(halved(data(), level(0.5)).x0, expected)


def test_clipping_keeps_a_variance_and_leaves_clean_data_alone():
    mix = torch.sigmoid(data(7))
    opinions = (
        Counted().opinions()._replace(read=lambda x, output, level: D.Estimate(3 * x, output, mix))
    )
    clipped = D.Clipped(D.ClassifierFree(1.0))(opinions)
    assert clipped(data(), level(0.5)).log_var_mix is mix
    assert torch.equal(clipped(data(), level(0.0)).x0, 3 * data())


def test_what_is_clipped_says_whose_the_second_opinion_is():
    weak = D.Clipped(D.Autoguidance(2.0))
    assert (weak.second, D.Clipped(D.ClassifierFree(2.0)).second) == ("weak", "null")
    with pytest.raises(ValueError, match="Clipped needs a weaker network"):
        process(weak).denoiser(network, {"label": LABEL}, {"label": NULL})


def test_clipping_after_a_gradient_keeps_the_mean_where_it_cut():
    """The mean of the step is then that of the cut data, however they came to be."""
    x, path = data(), D.DiscretePath()
    guidance = D.Clipped(D.ClassifierGuidance(quadratic, 5.0))
    diffusion = process(guidance, path, D.NoisePrediction(), D.Ancestral())
    diffusion.grid = lambda path: torch.tensor([700.0, 300.0], dtype=torch.float64)
    draws = Draws(0, range(3))
    actual = diffusion.sample(lambda x, clock: torch.tanh(x), x, {}, None, draws)
    now, to = (path.at(t, x) for t in diffusion.grid(path))
    push = 5 * gradient(x, now)
    x0 = (x - now.sigma * (torch.tanh(x) - now.sigma * push)) / now.alpha
    beta, least = forward_variance(now, to), posterior_variance(now, to)
    mean = to.alpha * beta / now.sigma**2 * x0.clip(-1, 1)
    mean = mean + now.alpha / to.alpha * (to.sigma / now.sigma) ** 2 * x
    torch.testing.assert_close(actual, mean + least.sqrt() * draws.normal("solver/0", x))


# All together

GUIDANCES = {
    "free": D.ClassifierFree(3.0, 3, (0.1, 0.7), 0.7, "cosine"),
    "auto": D.Autoguidance(2.0),
    "gradient": D.ClassifierGuidance(quadratic, 1.0, D.ClassifierFree(2.0)),
    "clipped": D.Clipped(D.ClassifierFree(2.0)),
    "percentile": D.Clipped(D.Autoguidance(2.0), percentile=0.995),
}
each_guidance = pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)


@each_guidance
@pytest.mark.parametrize("solver", [D.Euler(), D.Ancestral()])
def test_guidance_runs_on_the_meta_device(guidance, solver):
    """There a number cannot be read, so nothing waits for the device in the middle."""
    x, label = data().to("meta"), {"label": LABEL.to("meta")}
    diffusion = process(guidance, solver=solver)
    sample = diffusion.sample(network, x, label, label, Draws(0, range(3)), weak=network)
    assert (sample.device.type, sample.shape) == ("meta", SHAPE)


@each_guidance
@pytest.mark.parametrize("solver", [D.Euler(), D.Heun(), D.Ancestral()])
def test_a_guided_sample_is_the_same_alone_and_in_a_batch(guidance, solver):
    if guidance is GUIDANCES["gradient"]:
        guidance = D.ClassifierGuidance(lambda x, level: -x.square().flatten(1).sum(1))
    diffusion = process(guidance, solver=solver)

    def weak(x, clock, label):
        return network(x, 0 * clock, label)

    def sampled(rows, indices):
        cond, null = {"label": LABEL[rows]}, {"label": NULL[rows]}
        draws = Draws(0, indices)
        return diffusion.sample(network, data().float()[rows], cond, null, draws, weak)

    together, alone = sampled(slice(None), [4, 9, 2]), sampled(slice(1, 2), [9])
    assert together.dtype == torch.float32
    torch.testing.assert_close(together[1:2], alone)


def test_guidance_is_built_of_configs():
    config = dict(
        type="Clipped",
        limit=2.0,
        guidance=dict(type="ClassifierFree", scale=3.0, interval=[0.0, 0.7], rescale=0.7),
    )
    guidance = process(config).guidance
    assert isinstance(guidance, D.Clipped)
    assert list(guidance.guidance.interval) == [0.0, 0.7]
    assert (guidance.limit, guidance.guidance.rescale, guidance.second) == (2.0, 0.7, "null")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: D.ClassifierFree(2.0, interval=(0.5, 0.5)), "interval .* got \\(0.5, 0.5\\)"),
        (
            lambda: D.ClassifierFree(2.0, interval=(0.28, 2.9)),
            "EDM's sigma s as s / \\(1 \\+ s\\)",
        ),
        (lambda: D.Autoguidance(2.0, rescale=1.5), "rescale must be from 0 to 1, got 1.5"),
        (lambda: D.ClassifierFree(2.0, schedule="cosin"), "'cosin'; did you mean 'cosine'"),
        (lambda: D.ClassifierFree(2.0, channels=0), "channels must be at least 1.* got 0"),
        (lambda: D.Clipped(D.ClassifierFree(1.0), limit=0.0), "limit must be positive, got 0.0"),
        (lambda: D.Clipped(D.ClassifierFree(1.0), percentile=99.5), "percentile .* got 99.5"),
    ],
)
def test_impossible_guidance_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

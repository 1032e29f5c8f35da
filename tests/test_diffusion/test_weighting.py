"""What an error counts, whatever the network predicts."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from mmsora import diffusion as D

TABLE, LINEAR = D.DiscretePath(), D.LinearPath(span=(0.0, 0.999))
LEVELS = torch.tensor([0.0, 3.0, 120.0, 400.0, 999.0], dtype=torch.float64)
TIMES = torch.tensor([0.001, 0.2, 0.5, 0.8, 0.999], dtype=torch.float64)
PREDICTIONS = {
    "noise": D.NoisePrediction(),
    "v": D.VPrediction(),
    "velocity": D.VelocityPrediction(),
    "velocity reversed": D.VelocityPrediction(sign=-1),
    "data": D.SamplePrediction(),
    "score": D.ScorePrediction(),
    "EDM": D.EDMPrediction(),
    "learned range": D.LearnedRange(D.VPrediction()),
}
WEIGHTINGS = {
    "min-SNR": D.MinSNR(),
    "SNR": D.SNRWeighting(),
    "truncated SNR": D.SNRWeighting(1.0),
    "P2": D.P2(),
    "EDM": D.EDMWeighting(),
    "velocity": D.VelocityWeighting(),
    "likelihood": D.LikelihoodWeighting(),
}

each_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
each_place = pytest.mark.parametrize(
    ("path", "t"), [(TABLE, LEVELS), (LINEAR, TIMES)], ids=["table", "linear"]
)


def weights(weighting, path, prediction, t):
    return weighting(path, prediction, t, torch.ones(len(t), dtype=torch.float64))


def ratio(path, t):
    alpha, sigma = path.coefficients(t)
    return (alpha / sigma) ** 2


# A table is variance preserving, so its closed forms are the published ones.
PUBLISHED = {
    "min-SNR, noise": (D.MinSNR(), "noise", lambda r: r.clamp(max=5) / r),
    "min-SNR, v": (D.MinSNR(), "v", lambda r: r.clamp(max=5) / (r + 1)),
    "min-SNR of 2, v": (D.MinSNR(2.0), "learned range", lambda r: r.clamp(max=2) / (r + 1)),
    "SNR, noise": (D.SNRWeighting(), "noise", lambda r: r * 0 + 1),
    "min-SNR, data": (D.MinSNR(), "data", lambda r: r.clamp(max=5)),
    "SNR, data": (D.SNRWeighting(), "data", lambda r: r),
    "SNR, v": (D.SNRWeighting(), "v", lambda r: r / (1 + r)),
    "truncated SNR, noise": (D.SNRWeighting(1.0), "noise", lambda r: (1 / r).clamp(min=1)),
    "P2, noise": (D.P2(), "noise", lambda r: 1 / (1 + r)),
    "P2 of 0.5 and k 2, noise": (D.P2(2.0, 0.5), "noise", lambda r: (2 + r) ** -0.5),
    "EDM, noise": (D.EDMWeighting(0.5), "noise", lambda r: 1 + 4 / r),
}


@pytest.mark.parametrize(("weighting", "name", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_forms(weighting, name, expected):
    actual = weights(weighting, TABLE, PREDICTIONS[name], LEVELS)
    torch.testing.assert_close(actual, expected(ratio(TABLE, LEVELS)), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("weighting", "of"), [(D.MinSNR(), "x0"), (D.P2(), "noise")])
def test_the_weight_itself_is_for_errors_of_data_or_noise(weighting, of):
    assert weighting.of == of
    r = ratio(TABLE, LEVELS)
    expected = r.clamp(max=5) if of == "x0" else 1 / (1 + r)
    torch.testing.assert_close(weighting.weight(TABLE, LEVELS), expected)


@pytest.mark.parametrize("name", ["noise", "v"])
def test_min_snr_is_that_of_diffusers_scripts(name):
    snr = compute_snr(DDPMScheduler(), LEVELS.long()).double()
    expected = snr.clamp(max=5) / (snr if name == "noise" else snr + 1)
    actual = weights(D.MinSNR(5.0), TABLE, PREDICTIONS[name], LEVELS)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)  # theirs is float32


@each_place
@each_weighting
def test_an_error_costs_the_same_whatever_is_predicted(path, t, weighting):
    """Two guesses at the data are an error of each target; the weighted ones are equal."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, guess = torch.randn(3, 5, 2, 3, 1, 4, generator=generator, dtype=torch.float64)
    level = path.at(t, x0)
    x = level.alpha * x0 + level.sigma * noise

    def cost(prediction):
        output = prediction.target(path, guess, (x - level.alpha * guess) / level.sigma, level)
        errors = (output - prediction.target(path, x0, noise, level)).square()
        return weighting(path, prediction, t, errors.mean((1, 2, 3, 4)))

    costs = [cost(prediction) for prediction in PREDICTIONS.values()]
    for other in costs[1:]:
        torch.testing.assert_close(other, costs[0], rtol=1e-6, atol=0)
    error = (guess - x0).square().mean((1, 2, 3, 4))
    r = 1 if weighting.of == "x0" else ratio(path, t)
    torch.testing.assert_close(costs[0], weighting.weight(path, t) * r * error, rtol=1e-6, atol=0)


@each_place
@pytest.mark.parametrize("sign", [1, -1])
def test_the_velocity_weighs_a_velocity_alike(path, t, sign):
    actual = weights(D.VelocityWeighting(), path, D.VelocityPrediction(sign), t)
    torch.testing.assert_close(actual, torch.ones_like(t))


def test_likelihood_of_rectified_flow():
    weight = D.LikelihoodWeighting().weight(LINEAR, TIMES)
    torch.testing.assert_close(weight, 1 / (TIMES * (1 - TIMES)))


def test_likelihood_of_a_variance_preserving_path():
    """There ``w`` is half of beta, the rate at which the log of alpha squared falls."""
    path, beta = D.VPPath(), 19.9 * TIMES + 0.1
    sigma = path.coefficients(TIMES)[1]
    weight = D.LikelihoodWeighting().weight(path, TIMES)
    torch.testing.assert_close(weight, beta / 2 / sigma**2)


def test_edm_counts_its_networks_output_alike():
    """``c_out`` squared undoes the weight (arXiv:2206.00364, equation 144)."""
    path, t = D.VEPath(), torch.tensor([0.002, 0.5, 3.0, 80.0], dtype=torch.float64)
    weight = D.EDMWeighting(0.4).weight(path, t)
    torch.testing.assert_close(weight, (t**2 + 0.16) / (0.4 * t) ** 2)
    c_out = 0.4 * t / (t**2 + 0.16).sqrt()
    torch.testing.assert_close(weight * c_out**2, torch.ones_like(t))


@each_place
def test_edm_prediction_needs_no_edm_weighting(path, t):
    prediction = D.EDMPrediction(sigma_data=0.4)
    actual = weights(D.EDMWeighting(0.4), path, prediction, t)
    torch.testing.assert_close(actual, torch.ones_like(t))
    assert (weights(D.EDMWeighting(0.5), path, prediction, t) - 1).abs().max() > 0.1


@each_weighting
def test_weights_are_numbers_of_the_errors_own_kind(weighting):
    for path, t in (TABLE, LEVELS), (LINEAR, TIMES):
        for prediction in PREDICTIONS.values():
            weighted = weighting(path, prediction, t, torch.ones(5))
            assert weighted.dtype == torch.float32
            assert weighted.isfinite().all()
            assert (weighted > 0).all()
    meta = weighting(path, prediction, t, torch.ones(5, device="meta"))
    assert (meta.device.type, meta.shape) == ("meta", (5,))


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_a_loss_takes_the_config_of_a_weighting(gamma):
    loss = D.MSE(weighting=dict(type="MinSNR", gamma=gamma))
    assert loss.weighting.gamma == gamma


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: D.MinSNR(0.0), "gamma must be positive"),
        (lambda: D.SNRWeighting(-1.0), "at_least must not be negative"),
        (lambda: D.P2(k=0.0), "k must be positive"),
        (lambda: D.P2(gamma=-1.0), "gamma not negative"),
        (lambda: D.EDMWeighting(0.0), "sigma_data must be positive"),
        (lambda: D.Adaptive(buckets=2), "at least 3"),
        (lambda: D.Adaptive(decay=1.0), r"decay must be in \[0, 1\)"),
        (lambda: D.LearnedUncertainty(features=0), "at least 1"),
    ],
)
def test_impossible_weightings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Weightings that learn


def test_adaptive_moves_each_bucket_once_to_the_mean_of_its_errors():
    weighting = D.Adaptive(decay=0.75)
    t = torch.tensor([100.0, 800.0, 100.0], dtype=torch.float64)
    errors = torch.tensor([3.0, 0.5, 5.0], requires_grad=True)
    first = weighting(TABLE, D.NoisePrediction(), t, errors)
    assert torch.equal(first, errors)  # a mean starts at 1
    second = weighting(TABLE, D.NoisePrediction(), t, errors)
    means = torch.tensor([0.75 + 0.25 * 4, 0.75 + 0.25 * 0.5, 0.75 + 0.25 * 4])
    torch.testing.assert_close(second, errors / means)
    assert (weighting.means != 1).sum() == 2
    gradient = torch.autograd.grad(second.sum(), errors)[0]
    torch.testing.assert_close(gradient, 1 / means)


def test_adaptive_buckets_are_of_the_logarithm_of_the_signal_to_noise_ratio():
    """The edges of five buckets are -3, -1, 1 and 3."""
    weighting = D.Adaptive(buckets=5, span=(-3.0, 3.0), decay=0.0)
    t = torch.sigmoid(-torch.tensor([-9.0, -2.0, 0.0, 2.0, 9.0], dtype=torch.float64) / 2)
    weighting(D.LinearPath(), D.VPrediction(), t, torch.arange(2.0, 7.0))
    assert weighting.means.tolist() == [2, 3, 4, 5, 6]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    weighting(D.LinearPath(), D.VPrediction(), ends, torch.tensor([8.0, 9.0]))
    assert weighting.means.tolist() == [9, 3, 4, 5, 8]


def test_adaptive_makes_all_levels_count_alike():
    weighting = D.Adaptive(decay=0.9)
    errors = torch.tensor([4.0, 1.0, 0.3, 0.05, 1e-3])
    for _ in range(200):
        weighted = weighting(TABLE, D.NoisePrediction(), LEVELS, errors)
    torch.testing.assert_close(weighted, torch.ones(5), rtol=1e-5, atol=0)


def test_adaptive_learns_nothing_from_validation_and_from_what_is_no_number():
    weighting = D.Adaptive(limits=(0.5, 2.0), decay=0.0)
    args = TABLE, D.NoisePrediction(), LEVELS
    with torch.no_grad():
        weighting(*args, torch.full((5,), 9.0))
    weighting(*args, torch.tensor([math.nan, math.inf, -math.inf, math.nan, math.inf]))
    assert (weighting.means == 1).all()
    weighting(*args, torch.tensor([9.0, 0.1, 1.5, 1.0, 0.8]))
    weight = weighting(*args, torch.ones(5))
    torch.testing.assert_close(weight, torch.tensor([0.5, 2.0, 1 / 1.5, 1.0, 1.25]))


def test_adaptive_is_saved():
    one, other = D.Adaptive(), D.Adaptive()
    one(TABLE, D.NoisePrediction(), LEVELS, torch.arange(5.0))
    assert list(one.state_dict()) == ["means"]
    assert not list(one.parameters())
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.means, other.means)


def test_uncertainty_starts_with_the_errors_themselves():
    weighting = D.LearnedUncertainty()
    errors = torch.tensor([4.0, 1.0, 0.3, 0.05, 1e-3])
    assert torch.equal(weighting(TABLE, D.NoisePrediction(), LEVELS, errors), errors)
    assert [p.shape for p in weighting.parameters()] == [(128,)]


def test_uncertainty_is_the_published_loss():
    weighting = D.LearnedUncertainty(dict(type="MinSNR", gamma=2.0), features=3)
    weighting.weight.data = torch.tensor([0.5, -0.3, 0.2])
    errors = torch.tensor([4.0, 1.0, 0.3, 0.05, 1e-3])
    plain = D.MinSNR(2.0)(TABLE, D.NoisePrediction(), LEVELS, errors)
    clock = -ratio(TABLE, LEVELS).log() / 8  # a quarter of log(sigma / alpha)
    features = [
        math.sqrt(2) * torch.cos(2 * math.pi * (f * clock + p))
        for f, p in zip(weighting.frequencies, weighting.phases, strict=True)
    ]
    u = (0.5 * features[0] - 0.3 * features[1] + 0.2 * features[2]).float()
    actual = weighting(TABLE, D.NoisePrediction(), LEVELS, errors)
    torch.testing.assert_close(actual, plain * torch.exp(-u) + u)


def test_uncertainty_learns_the_logarithm_of_the_errors():
    weighting, prediction = D.LearnedUncertainty(), D.NoisePrediction()
    errors = torch.tensor([4.0, 1.0, 0.3, 0.05, 1e-2])
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        weighting(TABLE, prediction, LEVELS, errors).sum().backward()
        optimizer.step()
    torch.testing.assert_close(
        weighting.uncertainty(TABLE, LEVELS).exp().detach(), errors, rtol=1e-2, atol=0
    )
    needs = torch.ones(5, requires_grad=True)
    weighting(TABLE, prediction, LEVELS, needs).sum().backward()
    torch.testing.assert_close(needs.grad, 1 / errors, rtol=1e-2, atol=0)


def test_uncertainty_can_tell_levels_apart_and_survives_the_ends():
    """Frequencies are normal, so that neighbours are alike and far levels free."""
    weighting = D.LearnedUncertainty(features=2000)
    assert weighting.frequencies.std().item() == pytest.approx(1, abs=0.01)
    phases = weighting.phases % 1
    spread = phases.sort().values - (torch.arange(2000) + 0.5) / 2000
    assert spread.abs().max() < 0.002
    correlation = torch.corrcoef(torch.stack([weighting.frequencies, phases]))[0, 1]
    assert abs(correlation) < 0.01
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    weighting.weight.data.fill_(0.01)
    assert weighting.uncertainty(D.LinearPath(), ends).isfinite().all()


@pytest.mark.parametrize("make", [D.Adaptive, D.LearnedUncertainty])
def test_autocast_costs_no_digits(make):
    def losses(enabled):
        weighting = make()
        for parameter in weighting.parameters():
            parameter.data.copy_(torch.linspace(-0.1, 0.1, len(parameter)))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(3):
                loss = weighting(TABLE, D.NoisePrediction(), LEVELS, torch.arange(5.0) / 3)
        return loss

    assert losses(True).dtype == torch.float32
    assert torch.equal(losses(True), losses(False))


@pytest.mark.parametrize("config", [dict(type="Adaptive"), dict(type="LearnedUncertainty")])
def test_nothing_waits_for_the_device(config):
    """On the meta device no number can be read."""
    weighting = D.MSE(dict(type="LearnedUncertainty", weighting=config)).weighting.to("meta")
    losses = weighting(TABLE, D.NoisePrediction(), LEVELS, torch.ones(5, device="meta"))
    assert (losses.device.type, losses.shape) == ("meta", (5,))

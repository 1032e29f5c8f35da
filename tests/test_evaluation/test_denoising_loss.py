"""The loss at places of the path: against closed forms, and as a metric of samples."""

import math

import pytest
import torch

from mmsora.diffusion import (
    MSE,
    Adaptive,
    Ancestral,
    ClassifierFree,
    Diffusion,
    DiscretePath,
    Euler,
    LearnedUncertainty,
    LinearPath,
    LossSecondMomentTimes,
    MinSNR,
    NoisePrediction,
    SpacedGrid,
    UniformTimes,
    VelocityPrediction,
)
from mmsora.evaluation import DenoisingLoss
from mmsora.utils.draws import Draws

SHAPE = (3, 4, 5, 6)
PLACES = (torch.arange(5, dtype=torch.float64) + 0.5) / 5


def flow():
    return Diffusion(
        LinearPath(),
        VelocityPrediction(),
        UniformTimes(),
        Euler(),
        SpacedGrid(3),
        ClassifierFree(1.0),
        MSE(),
    )


def ddpm(weighting=None, times=None):
    return Diffusion(
        DiscretePath(),
        NoisePrediction(),
        times or UniformTimes(),
        Ancestral(),
        SpacedGrid(3),
        ClassifierFree(1.0),
        MSE(weighting),
    )


def silent(x, clock):
    """A network that says nothing: its loss is the noise's mean square."""
    return torch.zeros_like(x)


def results_of(process, network, count, std=1.0):
    """What the loop hands to the metric, of Gaussian data."""
    results = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        x0 = std * torch.randn(1, *SHAPE, generator=generator)
        first = index * len(PLACES)
        draws = Draws(3, range(first, first + len(PLACES)))
        x0 = x0.expand(len(PLACES), *SHAPE)
        losses = {"loss": process.losses_at(network, x0, {}, draws, PLACES)}
        results.append(dict(index=index, weight=1.0, places=PLACES, losses=losses))
    return results


def metrics_of(results):
    metric = DenoisingLoss()
    for result in results:
        metric.process(None, [result])
    return metric.evaluate(len(results))


# What the losses are


def test_the_best_network_for_gaussian_data_has_the_loss_that_it_must_have():
    """Of ``noise - x0`` the best guess is ``c x``; what is left is known at each time."""
    std, process = 0.6, flow()

    def best(x, clock):
        t = (clock / 1000).reshape(-1, 1, 1, 1, 1)
        return x * (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)

    metrics = metrics_of(results_of(process, best, count=300, std=std))
    variance = (1 - PLACES) ** 2 * std**2 + PLACES**2  # of x
    expected = 1 + std**2 - (PLACES - (1 - PLACES) * std**2) ** 2 / variance
    assert expected.max() / expected.min() > 2
    error = 4 * math.sqrt(2 / (300 * math.prod(SHAPE)))  # four standard errors
    for place, loss in zip(PLACES.tolist(), expected.tolist(), strict=True):
        assert metrics[f"val/loss/t_{place:.4g}"] == pytest.approx(loss, rel=error)
    assert metrics["val/loss"] == pytest.approx(float(expected.mean()), rel=error)


def test_on_a_table_places_are_levels_and_weights_are_those_of_training():
    process = ddpm(MinSNR(gamma=5.0))
    draws = Draws(1, range(5))
    x0 = torch.randn(5, *SHAPE)
    losses = process.losses_at(silent, x0, {}, draws, PLACES)
    alpha, sigma = process.path.coefficients(torch.tensor([100.0, 300, 500, 700, 900]))
    ratio = (alpha / sigma) ** 2
    weight = ratio.clamp_max(5.0) / ratio
    squares = draws.normal("noise", x0).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, (squares * weight).float())
    assert not losses.requires_grad


@pytest.mark.parametrize(
    ("make", "inner"),
    [
        (Adaptive, None),
        (LearnedUncertainty, None),
        (lambda: LearnedUncertainty(MinSNR()), MinSNR()),
    ],
)
def test_what_learns_of_the_loss_is_left_out_and_learns_nothing(make, inner):
    weighting = make()
    for parameter in weighting.parameters():
        torch.nn.init.normal_(parameter)
    times = LossSecondMomentTimes(1000)
    process = ddpm(weighting, times)
    before = [t.clone() for part in (weighting, times) for t in part.state_dict().values()]
    x0, draws = torch.randn(5, *SHAPE), Draws(1, range(5))
    found = process.losses_at(silent, x0, {}, draws, PLACES)
    assert torch.equal(found, ddpm(inner).losses_at(silent, x0, {}, draws, PLACES))
    after = [t for part in (weighting, times) for t in part.state_dict().values()]
    assert all(map(torch.equal, before, after))
    assert process.loss_function.weighting is weighting
    assert process.last_times is None


# The metric


def rows(count, places=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape, names = (count, places), ("loss", "loss_ema")
    losses = {name: torch.rand(shape, generator=generator) for name in names}
    return [
        {
            "index": index,
            "weight": 1.0,
            "places": torch.tensor([0.1, 0.5, 0.9]),
            "losses": {name: losses[name][index] for name in names},
        }
        for index in range(count)
    ]


def test_means_are_by_name_and_place():
    results = rows(4)
    metrics = metrics_of(results)
    expected = torch.stack([result["losses"]["loss_ema"] for result in results]).double()
    assert metrics["val/loss_ema"] == pytest.approx(float(expected.mean()), rel=1e-12)
    assert metrics["val/loss_ema/t_0.5"] == pytest.approx(float(expected[:, 1].mean()), rel=1e-12)
    assert len(metrics) == 2 * (1 + 3)
    assert metrics["val/loss"] != metrics["val/loss_ema"]


def test_order_and_repeats_change_nothing_bit_for_bit():
    results = rows(23)
    for i, result in enumerate(results):  # so that no sum is exact
        result["losses"]["loss"] *= 100.0 ** (i % 7)
    expected = metrics_of(results)
    assert metrics_of(results[::-1]) == expected
    assert metrics_of(results[11:] + results + results[:3]) == expected


def test_samples_count_by_their_weight_and_what_cannot_be_read_does_not():
    results = rows(3)
    results[0]["weight"] = 0.0
    results[0]["losses"]["loss"] = torch.tensor([math.nan] * 3)
    results[2]["weight"] = 3.0
    one, other = (result["losses"]["loss"].double() for result in results[1:])
    expected = float(((one + 3 * other) / 4).mean())
    assert metrics_of(results)["val/loss"] == pytest.approx(expected, rel=1e-12)


def test_a_loss_that_is_not_finite_shows():
    results = rows(3)
    results[1]["losses"]["loss"] = torch.tensor([1.0, math.nan, 1.0])
    metrics = metrics_of(results)
    assert math.isnan(metrics["val/loss"])
    assert math.isnan(metrics["val/loss/t_0.5"])
    assert math.isfinite(metrics["val/loss/t_0.1"])

"""The noise of training: offset and input perturbation."""

import math

import pytest
import torch

from mmsora import diffusion as D
from mmsora.utils.draws import Draws

SHAPE = 500, 3, 2, 4, 5
DRAWS = Draws(0, range(500))


def noises(draws=DRAWS, **options):
    return D.TrainNoise(**options)(torch.empty(SHAPE, dtype=torch.float64), draws)


def test_plain_noise_is_the_draw_itself():
    target, seen = noises()
    assert seen is target
    assert torch.equal(target, DRAWS.normal("noise", target))


@pytest.mark.parametrize("offset", [0.1, 0.5])
def test_offset_is_shared_by_a_channel(offset):
    target, seen = noises(offset=offset)
    assert seen is target
    assert target.var().item() == pytest.approx(1 + offset**2, rel=0.02)
    added = target - DRAWS.normal("noise", target)
    torch.testing.assert_close(added, added[:, :, :1, :1, :1].expand(SHAPE))
    assert added.std().item() == pytest.approx(offset, rel=0.05)
    channels = torch.corrcoef(added[:, :, 0, 0, 0].T)
    assert (channels - torch.eye(3)).abs().max() < 4 / math.sqrt(500)
    places = target.flatten(2).transpose(0, 2).flatten(1)  # (places, channels x samples)
    correlation = torch.corrcoef(places)
    between = correlation[~torch.eye(len(correlation), dtype=torch.bool)].mean()
    assert between.item() == pytest.approx(offset**2 / (1 + offset**2), abs=0.02)


@pytest.mark.parametrize("perturbation", [0.1, 0.4])
def test_perturbation_is_seen_and_not_asked_for(perturbation):
    target, seen = noises(perturbation=perturbation)
    assert torch.equal(target, DRAWS.normal("noise", target))
    added = seen - target
    assert added.std().item() == pytest.approx(perturbation, rel=0.02)
    assert added.mean().abs() < 4 * perturbation / math.sqrt(added.numel())
    both = torch.corrcoef(torch.stack([added.flatten(), target.flatten()]))
    assert both[0, 1].abs() < 4 / math.sqrt(added.numel())


def test_both_at_once():
    target, seen = noises(offset=0.2, perturbation=0.3)
    assert torch.equal(target, noises(offset=0.2)[0])
    torch.testing.assert_close(seen - target, torch.sub(*reversed(noises(perturbation=0.3))))


def test_a_sample_is_the_same_alone_and_in_a_batch():
    noise = D.TrainNoise(offset=0.2, perturbation=0.3)
    together = noise(torch.empty(3, *SHAPE[1:]), Draws(1, [4, 9, 2], 7))
    alone = noise(torch.empty(1, *SHAPE[1:]), Draws(1, [9], 7))
    for whole, one in zip(together, alone, strict=True):
        assert torch.equal(whole[1:2], one)


def test_the_network_sees_perturbed_noise_and_is_asked_for_the_plain():
    parts = D.UniformTimes(), D.Euler(), D.SpacedGrid(2), D.ClassifierFree(1.0), D.MSE()
    diffusion = D.Diffusion(
        D.DiscretePath(), D.NoisePrediction(), *parts,
        train_noise=dict(type="TrainNoise", perturbation=0.3),
    )  # fmt: skip
    x0, draws = torch.ones(3, 2, 4, 5, 3), Draws(0, range(3))
    target, seen = diffusion.train_noise(x0, draws)
    t = diffusion.train_times(diffusion.path, draws)
    level = diffusion.path.at(t, x0)
    given = []

    def perfect(x, clock):
        given.append(x)
        return target

    assert torch.equal(diffusion.loss(perfect, x0, {}, draws), torch.zeros(3))
    torch.testing.assert_close(given[0], level.alpha * x0 + level.sigma * seen)


@pytest.mark.parametrize("name", ["offset", "perturbation"])
def test_negative_amounts_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -0.1"):
        D.TrainNoise(**{name: -0.1})

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


# Noise of many scales, and noise that frames share.


def test_pyramid_noise_is_normal_of_unit_variance_and_smooth():
    x0 = torch.empty(200, 2, 3, 12, 20, dtype=torch.float64)
    target, seen = D.PyramidNoise()(x0, Draws(0, range(200)))
    assert seen is target
    assert target.mean().item() == pytest.approx(0, abs=0.02)
    assert target.var().item() == pytest.approx(1, rel=0.02)
    parts = 0.75 ** (2 * torch.arange(4.0))  # 12 x 20, 6 x 10, 3 x 5 and 1 x 2
    beside = (target[..., 0, 0] * target[..., 0, 1]).mean()  # one cell of all coarser scales
    assert beside.item() == pytest.approx(float(parts[1:].sum() / parts.sum()), abs=0.07)
    apart = (target[..., 0, 0] * target[..., -1, -1]).mean()
    assert apart.item() == pytest.approx(0, abs=0.07)
    frames = (target[:, :, 0] * target[:, :, 1]).mean()
    assert frames.item() == pytest.approx(0, abs=0.02)


def test_pyramid_noise_by_hand():
    x0 = torch.empty(2, 3, 4, 8, 4, dtype=torch.float64)
    draws = Draws(3, [5, 6])
    target, _ = D.PyramidNoise(decay=0.5, largest=3)(x0, draws)
    noise = draws.normal("noise", x0)
    for scale, height, width in [(1, 4, 2), (2, 2, 1)]:  # 4 x 2 has a side of at most 3
        small = draws.normal(f"noise/scale {scale}", x0[..., :height, :width])
        large = small.repeat_interleave(2**scale, -2).repeat_interleave(2**scale, -1)
        noise = noise + 0.5**scale * large
    torch.testing.assert_close(target, noise / (1 + 0.25 + 0.0625) ** 0.5)


def test_pyramid_noise_leaves_large_scales_out():
    x0 = torch.empty(2, 3, 2, 40, 60, dtype=torch.float64)
    draws = Draws(3, [5, 6])
    names = []
    draws.normal = lambda name, like, normal=draws.normal: names.append(name) or normal(name, like)
    D.PyramidNoise()(x0, draws)
    assert names == ["noise", *(f"noise/scale {i}" for i in (2, 3, 4, 5))]  # 20 x 30 is too large


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("noise", [None, dict(type="PyramidNoise")])
def test_frames_share_a_part_of_the_noise(share, noise):
    x0 = torch.empty(150, 2, 3, 8, 10, dtype=torch.float64)
    shared = D.SharedNoise(share, noise)
    target, _ = shared(x0, Draws(0, range(150)))
    assert target.var().item() == pytest.approx(1, rel=0.05)
    between = (target[:, :, 0] * target[:, :, 2]).mean() / target.var()
    assert between.item() == pytest.approx(share, abs=0.03)
    apart = (target[:-1] * target[1:]).mean()  # clips do not
    assert apart.item() == pytest.approx(0, abs=0.03)
    again, _ = shared(x0[7:9], Draws(0, [7, 8]))
    assert torch.equal(again, target[7:9])


def test_a_solver_adds_shared_noise_too():
    draws = D.SharedNoise().numbers(Draws(0, [4, 5]))
    step = draws.normal("step 3", torch.empty(2, 3, 4, 5, 6))
    assert torch.equal(step, step[:, :, :1].expand_as(step))
    assert not torch.equal(step[0], step[1])
    assert not torch.equal(step, draws.normal("step 4", step))
    assert draws.normal("else", torch.empty(2, 7)).shape == (2, 7)
    assert torch.equal(draws.uniform("u"), Draws(0, [4, 5]).uniform("u"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: D.PyramidNoise(decay=-1), "decay must not be negative"),
        (lambda: D.PyramidNoise(largest=0), "largest must be at least 1"),
        (lambda: D.SharedNoise(1.5), "share must be from 0 to 1"),
    ],
)
def test_wrong_arguments_of_pyramid_and_shared_noise(make, message):
    with pytest.raises(ValueError, match=message):
        make()

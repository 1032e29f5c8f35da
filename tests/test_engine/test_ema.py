"""Profiles of averages: their shares, and averages made of others."""

import math
from functools import cache

import pytest
import torch

from mmsora.engine import ConstantEMA, PowerEMA, Profile, WarmupEMA, combination


def averaged(profile, weights):
    """The recurrence in float64: the average after each step; weights are (steps + 1, ...)."""
    found = [weights[0]]
    for step, new in enumerate(weights[1:], start=1):
        decay = profile.decay_at(step)
        found.append(decay * found[-1] + (1 - decay) * new)
    return torch.stack(found)


def shares(profile, step):
    """Of each step in the average: what the recurrence makes of unit vectors."""
    return averaged(profile, torch.eye(step + 1, dtype=torch.float64))[step]


def power(n, gamma):
    k = torch.arange(n + 1, dtype=torch.float64)
    upper = (k / n) ** (gamma + 1)
    return upper.diff(prepend=upper[:1])  # nothing of step 0


def constant(n, decay):
    k = torch.arange(n + 1, dtype=torch.float64)
    return (1 - decay * (k > 0).double()) * decay ** (n - k)


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (PowerEMA(gamma=0), torch.tensor([0.0, *[1 / 40] * 40], dtype=torch.float64)),
        (PowerEMA(gamma=5.5), power(40, 5.5)),
        (PowerEMA(sigma_rel=0.1), power(40, 6.937203937601809)),
        (ConstantEMA(0.9), constant(40, 0.9)),
        (ConstantEMA(0), torch.eye(41, dtype=torch.float64)[40]),
    ],
    ids=lambda value: str(value) if isinstance(value, Profile) else "",
)
def test_the_shares_are_those_of_the_closed_form(profile, expected):
    torch.testing.assert_close(shares(profile, 40), expected, rtol=1e-12, atol=1e-15)
    factors, error = combination([(profile, 40)], (profile, 40))
    assert (factors.tolist(), error) == ([1.0], 0.0)


def test_a_warm_up_is_a_growing_decay_and_then_a_constant_one():
    decays = [WarmupEMA(0.6).decay_at(step) for step in range(1, 16)]
    assert decays[:3] == [1 / 10, 2 / 11, 3 / 12]
    assert decays[12:] == [13 / 22, 0.6, 0.6]
    assert str(WarmupEMA(0.6)) == "decay=0.6 after a warm-up"


def test_the_known_exponents_of_the_paper():
    assert PowerEMA(sigma_rel=0.05).gamma == pytest.approx(16.97, abs=5e-3)
    assert PowerEMA(sigma_rel=0.10).gamma == pytest.approx(6.94, abs=5e-3)
    assert PowerEMA(sigma_rel=12**-0.5).gamma == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.001, 0.02, 0.15, 0.28])
def test_sigma_rel_is_the_width_of_the_shares(sigma_rel):
    profile = PowerEMA(sigma_rel)
    assert profile.sigma_rel == pytest.approx(sigma_rel, rel=1e-9)
    assert str(profile) == f"sigma_rel={sigma_rel}"
    n = 20_000
    share, k = power(n, profile.gamma), torch.arange(n + 1) / n
    mean = (share * k).sum()
    assert math.sqrt((share * (k - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PowerEMA(), "one of sigma_rel and gamma, got sigma_rel=None and gamma=None"),
        (lambda: PowerEMA(0.1, 6.9), "one of sigma_rel and gamma"),
        (lambda: PowerEMA(0), "sigma_rel must be above 0 and at most 0.2886"),
        (lambda: PowerEMA(0.29), "at most 0.2886, a plain mean; got 0.29"),
        (lambda: PowerEMA(float("nan")), "sigma_rel must be"),
        (lambda: PowerEMA(gamma=-0.5), "gamma must be a number from 0 on, got -0.5"),
        (lambda: PowerEMA(gamma=math.inf), "gamma must be"),
        (lambda: ConstantEMA(1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: WarmupEMA(-0.1), "decay must be in"),
    ],
)
def test_arguments_that_make_no_profile(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_profiles_are_equal_when_their_arguments_are():
    assert PowerEMA(gamma=2) == PowerEMA(gamma=2) != PowerEMA(gamma=3)
    assert ConstantEMA(0.9) != WarmupEMA(0.9)
    assert len({PowerEMA(gamma=2), PowerEMA(gamma=2), WarmupEMA(0.9), ConstantEMA(0.9)}) == 3


# Averages made of others

STEPS = 640


def trajectories():
    """Weights of each step, (steps + 1, 300): what moves slowly, at random, and all of it."""
    generator = torch.Generator().manual_seed(3)
    noise = [
        torch.randn(size, 300, generator=generator, dtype=torch.float64)
        for size in (1, 1, STEPS + 1, STEPS + 1)
    ]
    t = torch.arange(STEPS + 1, dtype=torch.float64)[:, None] / STEPS
    rates = torch.logspace(-0.5, 2.5, 300, dtype=torch.float64)
    drift = (1 - torch.exp(-t * rates)) * noise[0]
    walk = noise[2].cumsum(0) / STEPS**0.5
    return {"drift": drift, "walk": walk, "all": noise[1] + drift + 0.3 * walk + 0.02 * noise[3]}


KEPT = [(PowerEMA(sigma_rel), STEPS * i // 16) for i in range(1, 17) for sigma_rel in (0.05, 0.10)]


@cache
def all_shares(profile):
    """Those in the average after each step, (steps + 1, steps + 1)."""
    return averaged(profile, torch.eye(STEPS + 1, dtype=torch.float64))


def relative(found, true):
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("kind", ["drift", "walk", "all"])
@pytest.mark.parametrize("step", [STEPS, STEPS * 3 // 4], ids=["end", "earlier"])
@pytest.mark.parametrize(
    "profile",
    [PowerEMA(0.15), PowerEMA(0.075), PowerEMA(gamma=10.0), ConstantEMA(1 - 16 / STEPS)],
    ids=lambda value: str(value) if isinstance(value, Profile) else "",
)
def test_32_averages_make_another_to_a_thousandth(profile, step, kind):
    weights = trajectories()[kind]
    factors, error = combination(KEPT, (profile, step))
    assert len(factors) == 32
    assert factors.sum().item() == pytest.approx(1, abs=1e-12)
    parts = torch.stack([all_shares(each)[n] for each, n in KEPT])
    share = all_shares(profile)[step]
    true = share @ weights
    assert relative(factors @ (parts @ weights), true) < 1e-3
    assert relative(factors @ (parts @ weights).float().double(), true) < 1e-3
    assert error == pytest.approx(relative(factors @ parts, share), rel=1e-6)
    assert error < 0.02


def test_more_snapshots_make_a_better_profile_and_a_step_between_them_a_poor_one():
    def error(count, step=STEPS):
        kept = [
            (PowerEMA(s), STEPS * i // count) for i in range(1, count + 1) for s in (0.05, 0.1)
        ]
        return combination(kept, (PowerEMA(0.15), step))[1]

    assert error(8) > 3 * error(16) > 9 * error(32)
    assert error(16, STEPS * 19 // 32) > 0.1


def test_what_was_kept_comes_out_as_it_is():
    factors, error = combination(KEPT, KEPT[9])
    assert factors.argmax() == 9
    torch.testing.assert_close(factors, torch.eye(32, dtype=torch.float64)[9], rtol=0, atol=1e-9)
    assert error < 1e-9


def test_averages_that_are_the_same_do_no_harm():
    kept = [(PowerEMA(0.05), 1), (PowerEMA(0.1), 1), (PowerEMA(0.1), 2)]
    factors, error = combination(kept, (PowerEMA(0.2), 2))
    assert error < 1e-12
    assert factors.isfinite().all()


@pytest.mark.parametrize("step", [0, STEPS + 1])
def test_a_step_that_no_average_covers(step):
    with pytest.raises(ValueError, match=f"step must be in 1 to 640, .* got {step}"):
        combination(KEPT, (PowerEMA(0.1), step))


def test_a_profile_of_ones_own():
    class Mean(Profile):
        def decay_at(self, step):
            return (step - 1) / step

    torch.testing.assert_close(shares(Mean(), 7), shares(PowerEMA(gamma=0), 7))
    assert combination([(PowerEMA(gamma=0), 7)], (Mean(), 7))[1] < 1e-12

"""Where to train: distributions against their densities, and what remembers losses."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from mmsora import diffusion as D
from mmsora.utils.draws import Draws

MANY = 20_000
TABLE, LINEAR = D.DiscretePath(), D.LinearPath()
FRACTIONS = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
ENDS = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)

# The share of times below t on rectified flow, where sigma / alpha = t / (1 - t).
SHARES = {
    "uniform": (D.UniformTimes(), lambda t: t),
    "logit-normal": (D.LogitNormalTimes(), lambda t: stats.norm.cdf(np.log(t / (1 - t)))),
    "logit-normal, noisy": (
        D.LogitNormalTimes(0.8, 0.5),
        lambda t: stats.norm.cdf(np.log(t / (1 - t)), 0.8, 0.5),
    ),
    "log-normal": (
        D.LogNormalTimes(),
        lambda t: stats.norm.cdf(np.log(t / (1 - t)), -1.2, 1.2),
    ),
    "log-normal, noisy": (
        D.LogNormalTimes(1.0, 0.5),
        lambda t: stats.norm.cdf(np.log(t / (1 - t)), 1.0, 0.5),
    ),
    "cos-map": (D.CosMapTimes(), lambda t: 2 / np.pi * np.arctan2(t, 1 - t)),
    "mode of 0": (D.ModeTimes(0.0), lambda t: t),
    "stratified": (
        D.StratifiedTimes(dict(type="LogitNormalTimes", mean=-0.5)),
        lambda t: stats.norm.cdf(np.log(t / (1 - t)), -0.5),
    ),
}
ALL = {name: times for name, (times, _) in SHARES.items()}
ALL |= {f"mode of {scale}": D.ModeTimes(scale) for scale in (-1.0, 0.81, 1.29, 1.7519)}

each_times = pytest.mark.parametrize("times", ALL.values(), ids=ALL)


@pytest.mark.parametrize(("times", "share"), SHARES.values(), ids=SHARES)
def test_distributions(times, share):
    t = times.quantile(LINEAR, FRACTIONS).numpy()
    assert share(t) == pytest.approx(FRACTIONS.numpy(), abs=1e-9)
    drawn = times(LINEAR, Draws(3, range(MANY))).numpy()
    assert stats.kstest(drawn, share).pvalue > 0.01


@pytest.mark.parametrize("scale", [-1.0, -0.3, 0.81, 1.29, 1.75])
def test_mode(scale):
    """Equations 19 and 20 of arXiv:2403.03206, whose u runs the other way."""
    u = 1 - FRACTIONS
    expected = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(D.ModeTimes(scale).quantile(LINEAR, FRACTIONS), expected)
    drawn = D.ModeTimes(scale)(LINEAR, Draws(0, range(MANY))).numpy()
    assert stats.ks_2samp(drawn, expected.numpy()).statistic < 0.015
    assert D.ModeTimes(scale).quantile(LINEAR, FRACTIONS).diff().min() > 0


def test_cos_map_has_the_published_density():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    fraction = (2 / math.pi * torch.atan(t / (1 - t))).requires_grad_()
    (slope,) = torch.autograd.grad(D.CosMapTimes().quantile(LINEAR, fraction).sum(), fraction)
    torch.testing.assert_close(1 / slope, 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2))


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4, 0.3)])
def test_log_normal_is_of_the_noise_itself_on_edms_path(mean, std):
    drawn = D.LogNormalTimes(mean, std)(D.VEPath(), Draws(1, range(MANY)))
    assert stats.kstest(drawn.log().numpy(), "norm", (mean, std)).pvalue > 0.01


@pytest.mark.parametrize("path", [D.TrigPath(), D.VPPath(), D.LinearPath(span=(0.01, 0.9))])
def test_log_normal_follows_the_ratio_of_any_path(path):
    alpha, sigma = path.coefficients(D.LogNormalTimes(-1.0, 0.5).quantile(path, FRACTIONS))
    expected = stats.norm.ppf(FRACTIONS.numpy(), -1.0, 0.5)
    assert (sigma / alpha).log().numpy() == pytest.approx(expected, abs=1e-6)


def test_log_normal_takes_the_nearest_level():
    t = D.LogNormalTimes().quantile(TABLE, FRACTIONS)
    assert torch.equal(t, t.round())
    alpha, sigma = TABLE.coefficients(t)
    wanted = torch.special.ndtri(FRACTIONS) * 1.2 - 1.2
    inside = (t > 0) & (t < 999)
    assert inside.sum() > 900
    assert ((sigma / alpha).log() - wanted)[inside].abs().max() < 0.2
    noisier, cleaner = (TABLE.coefficients(t[inside] + step) for step in (1, -1))
    for (alpha, sigma), sign in ((noisier, 1), (cleaner, -1)):
        assert ((((sigma / alpha).log() - wanted[inside]) * sign) > 0).all()


@each_times
@pytest.mark.parametrize(
    "path",
    [TABLE, D.DiscretePath(num_levels=37), LINEAR, D.LinearPath(span=(0.1, 0.9)), D.VEPath()],
)
def test_times_stay_on_the_path(path, times):
    t = times.quantile(path, torch.cat([ENDS, FRACTIONS]))
    assert (t.dtype, t.shape, t.device.type) == (torch.float64, (1003,), "cpu")
    assert t.isfinite().all()
    first = 0.0 if path.num_levels else path.t_clean
    assert (t >= first).all()
    assert (t <= path.t_noise).all()
    assert (t[3:].diff() >= 0).all()
    if path.num_levels:
        assert torch.equal(t, t.floor())


@pytest.mark.parametrize("wide", [D.LogitNormalTimes(std=50.0), D.LogNormalTimes(std=100.0)])
def test_wide_distributions_reach_the_ends_of_the_table(wide):
    assert wide.quantile(TABLE, ENDS[[0, 2]]).tolist() == [0, 999]


@each_times
def test_plain_times_leave_losses_alone(times):
    losses = torch.rand(3)
    assert times.weigh(torch.zeros(3), losses) is losses


def test_stratified_times_take_each_part_once():
    times = D.StratifiedTimes(D.CosMapTimes())
    t = times(LINEAR, Draws(0, range(64), 5))
    edges = D.CosMapTimes().quantile(LINEAR, torch.arange(64, dtype=torch.float64) / 64)
    assert sorted((torch.searchsorted(edges, t, right=True) - 1).tolist()) == list(range(64))
    assert list(times.state_dict()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: D.LogitNormalTimes(std=0.0), "std must be positive"),
        (lambda: D.LogNormalTimes(std=-1.0), "std must be positive"),
        (lambda: D.ModeTimes(1.76), r"scale must be in \[-1, 1\.7519\], got 1\.76"),
        (lambda: D.ModeTimes(-1.01), "scale must be in"),
        (lambda: D.LossSecondMomentTimes(history=0), "must be positive"),
        (lambda: D.LossSecondMomentTimes(num_levels=0), "must be positive"),
        (lambda: D.LossSecondMomentTimes(uniform=0.0), r"uniform must be in \(0, 1\]"),
        (
            lambda: D.LossSecondMomentTimes(50).quantile(TABLE, FRACTIONS),
            "num_levels=50.* does not fit a path with num_levels=1000",
        ),
        (
            lambda: D.LossSecondMomentTimes().quantile(LINEAR, FRACTIONS),
            "num_levels=None; it needs a table",
        ),
    ],
)
def test_impossible_times_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Times that go by the losses


LEVELS = 20
SHORT = D.DiscretePath(num_levels=LEVELS)
PROFILE = torch.linspace(0.2, 3.0, LEVELS)


def warmed_up(history=10, losses=PROFILE, uniform=0.001):
    times = D.LossSecondMomentTimes(LEVELS, history, uniform)
    for _ in range(history):
        times.weigh(torch.arange(LEVELS).double(), losses)
    return times


def test_uniform_until_every_level_has_its_history():
    times, levels = D.LossSecondMomentTimes(LEVELS, history=3), torch.arange(LEVELS).double()
    alike = torch.full((LEVELS,), 1 / LEVELS, dtype=torch.float64)
    times.weigh(levels, PROFILE)
    times.weigh(levels, PROFILE)
    times.weigh(levels[1:], PROFILE[1:])
    times.weigh(levels[1:], PROFILE[1:])
    assert torch.equal(times.probabilities(), alike)
    middles = (levels + 0.5) / LEVELS
    assert torch.equal(times.quantile(SHORT, middles), levels)
    assert torch.equal(times.weigh(levels[:1], PROFILE[:1]), PROFILE[:1])
    assert not torch.equal(times.probabilities(), alike)


def test_probabilities_go_by_the_root_of_the_mean_square():
    """And a thousandth goes to all alike."""
    times, levels = D.LossSecondMomentTimes(LEVELS, history=2), torch.arange(LEVELS).double()
    times.weigh(levels, PROFILE)
    times.weigh(levels, PROFILE.flip(0) * 2)
    roots = ((PROFILE.double() ** 2 + 4 * PROFILE.double().flip(0) ** 2) / 2).sqrt()
    expected = 0.999 * roots / roots.sum() + 0.001 / LEVELS
    torch.testing.assert_close(times.probabilities(), expected, rtol=1e-6, atol=0)
    assert times.probabilities().sum().item() == pytest.approx(1)
    fractions = torch.arange(100_000, dtype=torch.float64) / 100_000
    shares = times.quantile(SHORT, fractions).long().bincount(minlength=LEVELS) / 100_000
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("repeats", [2, 3, 8])
def test_only_the_last_losses_of_a_level_are_remembered(repeats):
    """However many of a level there are in a batch."""
    times = D.LossSecondMomentTimes(LEVELS, history=3)
    rng, seen = np.random.default_rng(0), {level: [] for level in range(LEVELS)}
    for step in range(12):
        levels = rng.integers(0, LEVELS, 5).repeat(repeats)
        losses = rng.random(len(levels)).astype(np.float32) + step
        for level, loss in zip(levels, losses, strict=True):
            seen[level].append(loss)
        times.weigh(torch.from_numpy(levels).double(), torch.from_numpy(losses))
    for level, losses in seen.items():
        expected = sorted([0.0, 0.0, 0.0, *losses][-3:])
        assert sorted(times.losses[level].tolist()) == pytest.approx(expected)
    assert times.seen.tolist() == [len(losses) for losses in seen.values()]


def test_the_weighted_loss_has_the_same_mean_and_less_spread():
    times = warmed_up()
    t = times(SHORT, Draws(0, range(50_000)))
    with torch.no_grad():
        weighed = times.weigh(t, PROFILE[t.long()])
    assert weighed.dtype == torch.float32
    assert weighed.mean().item() == pytest.approx(PROFILE.mean().item(), rel=2e-3)
    assert PROFILE[t.long()].mean() > 1.2 * PROFILE.mean()
    assert weighed.std() < 0.05 * PROFILE.std()


def test_losses_are_weighed_as_they_were_drawn():
    """The memory moves afterwards, and keeps what the network lost rather than its weight."""
    times = warmed_up()
    t, losses = torch.tensor([3.0, 19.0]), torch.tensor([9.0, 0.1], requires_grad=True)
    expected = losses / (LEVELS * times.probabilities()[[3, 19]].float())
    weighed = times.weigh(t, losses)
    torch.testing.assert_close(weighed, expected)
    assert weighed.requires_grad
    assert times.losses[3].max() == 9
    assert times.losses[19].min().item() == pytest.approx(0.1)


def test_validation_is_not_remembered_nor_what_is_no_number():
    times = warmed_up()
    before = times.losses.clone()
    with torch.no_grad():
        times.weigh(torch.tensor([5.0]), torch.tensor([100.0]))
    assert torch.equal(times.losses, before)
    times.weigh(torch.tensor([5.0, 6.0]), torch.tensor([math.nan, math.inf]))
    assert times.probabilities().isfinite().all()
    assert times.probabilities()[6] < times.probabilities()[7]


def test_the_memory_is_saved():
    times, other = warmed_up(), D.LossSecondMomentTimes(LEVELS)
    assert sorted(times.state_dict()) == ["losses", "seen"]
    assert not list(times.parameters())
    other.load_state_dict(times.state_dict())
    assert torch.equal(other.probabilities(), times.probabilities())
    wrapped = D.StratifiedTimes(times)
    assert sorted(wrapped.state_dict()) == ["times.losses", "times.seen"]
    t = wrapped(SHORT, Draws(0, range(8)))
    torch.testing.assert_close(
        wrapped.weigh(t, torch.ones(8)), warmed_up().weigh(t, torch.ones(8))
    )


def test_remembering_does_not_wait_for_the_device():
    """On the meta device no number can be read."""
    times = D.LossSecondMomentTimes(LEVELS).to("meta")
    losses = times.weigh(torch.tensor([3.0, 5.0]), torch.ones(2, device="meta"))
    assert (losses.device.type, losses.shape) == ("meta", (2,))


# Several processes


def one_of(rank, world, folder):
    """What a process of a job sees, and its memory afterwards."""
    total = 12
    weighting, times = D.Adaptive(buckets=6, span=(-4.0, 4.0), decay=0.5), warmed_up(2)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
    stratified = D.StratifiedTimes(times)
    drawn = []
    for step in range(3):
        places = range(rank, total, world)
        indices = [100 * step + place for place in places]
        t = stratified(SHORT, Draws(0, indices, step, places, total))
        drawn.append(t)
        errors = Draws(0, indices, step).uniform("errors").float() + 0.1
        times.weigh(t, weighting(SHORT, D.NoisePrediction(), t, errors))
    torch.save([weighting.means, times.losses, times.seen, drawn], f"{folder}/{world}-{rank}.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_several_processes_remember_what_one_does(tmp_path):
    one_of(0, 1, tmp_path)
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=one_of, args=(rank, 2, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]

    means, losses, seen, drawn = torch.load(tmp_path / "1-0.pt")
    halves = [torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2)]
    for half in halves:
        torch.testing.assert_close(half[0], means)
        torch.testing.assert_close(half[1], losses)
        assert torch.equal(half[2], seen)
    for step, whole in enumerate(drawn):
        assert torch.equal(torch.stack([half[3][step] for half in halves], 1).flatten(), whole)

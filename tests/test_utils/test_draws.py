"""Random numbers depend on (seed, index, step, purpose), on all of them and on nothing else."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from mmsora.utils.draws import Draws

MANY = 20_000
CLIP = 2, 3, 4, 5


def clips(indices, name="noise", dtype=torch.float32, **key):
    like = torch.empty(len(indices), *CLIP, dtype=dtype)
    return Draws(key.get("seed", 0), indices, key.get("step", 0)).normal(name, like)


def uniform(seed=0, indices=range(MANY), step=0, name="times"):
    return Draws(seed, indices, step).uniform(name)


def firsts(seed=0, indices=range(MANY), step=0, name="times"):
    """The first normal number of every sample."""
    return Draws(seed, indices, step).normal(name, torch.empty(len(indices), 1))[:, 0]


def test_a_sample_is_the_same_in_any_batch():
    together = clips([5, 3, 9, 3])
    for row, index in zip(together, [5, 3, 9, 3], strict=True):
        assert torch.equal(row, clips([index])[0])
    numbers = uniform(indices=[5, 3, 9, 3]).tolist()
    assert numbers == [uniform(indices=[index]).item() for index in (5, 3, 9, 3)]


def test_the_order_of_calls_does_not_matter():
    like = torch.empty(2, *CLIP)
    one, two = Draws(0, [1, 2]), Draws(0, [1, 2])
    first = one.uniform("a"), one.normal("b", like), one.normal("c", like)
    second = two.normal("c", like), two.normal("b", like), two.uniform("a")
    for x, y in zip(first, reversed(second), strict=True):
        assert torch.equal(x, y)


def test_the_global_generator_neither_helps_nor_is_touched():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1]
    x = clips([1, 2]), uniform(indices=[1, 2])
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(7)
    assert torch.equal(x[0], clips([1, 2]))
    assert torch.equal(x[1], uniform(indices=[1, 2]))


KEYS = {
    "seed": (dict(), dict(seed=1)),
    "large seed": (dict(seed=2**62), dict(seed=2**62 + 1)),
    "negative seed": (dict(seed=1), dict(seed=-1)),
    "step": (dict(), dict(step=1)),
    "late step": (dict(step=10**9), dict(step=10**9 + 1)),
    "name": (dict(), dict(name="timer")),
    "next index": (dict(), dict(indices=range(1, MANY + 1))),
    "large index": (dict(), dict(indices=range(2**40, 2**40 + MANY))),
    "negative index": (dict(indices=range(1, MANY + 1)), dict(indices=range(-1, -MANY - 1, -1))),
    "seed and index": (dict(seed=3), dict(seed=4, indices=range(1, MANY + 1))),
    "index and step": (dict(step=3), dict(step=4, indices=range(1, MANY + 1))),
    "seed and step": (dict(seed=1), dict(step=1)),
}


@pytest.mark.parametrize("draw", [uniform, firsts])
@pytest.mark.parametrize(("one", "other"), KEYS.values(), ids=KEYS)
def test_every_part_of_the_key_gives_other_and_unrelated_numbers(one, other, draw):
    x, y = draw(**one).double(), draw(**other).double()
    assert (x == y).sum() < 5
    correlation = np.corrcoef(x.numpy(), y.numpy())[0, 1]
    assert abs(correlation) < 4 / MANY**0.5


def test_seed_index_and_step_cannot_be_exchanged():
    """All small triples: none stands for another."""
    numbers = [uniform(seed, range(40), step).tolist() for seed in range(40) for step in range(40)]
    assert np.unique(numbers).size == 40**3


def test_neighbours_are_unrelated():
    for draw in uniform, firsts:
        x = draw().double().numpy()
        assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 4 / MANY**0.5
    x = clips(range(200)).flatten(1).double().numpy()
    correlations = np.corrcoef(x)[np.triu_indices(200, 1)]
    assert abs(correlations).max() < 6 / x.shape[1] ** 0.5
    assert stats.kstest(correlations * x.shape[1] ** 0.5, "norm").statistic < 0.02


@pytest.mark.parametrize("seed", [0, -5, 2**63 - 1])
def test_uniform_numbers_are_uniform(seed):
    x = uniform(seed)
    assert x.dtype == torch.float64
    assert x.min() >= 0
    assert x.max() < 1
    assert stats.kstest(x.numpy(), "uniform").pvalue > 0.01
    by_step = [Draws(seed, [3], step).uniform("times").item() for step in range(2000)]
    assert stats.kstest(by_step, "uniform").pvalue > 0.01


@pytest.mark.parametrize("seed", [0, -5, 2**63 - 1])
def test_normal_numbers_are_normal(seed):
    assert stats.kstest(firsts(seed).numpy(), "norm").pvalue > 0.01
    within = Draws(seed, [0]).normal("noise", torch.empty(1, MANY))[0]
    assert stats.kstest(within.numpy(), "norm").pvalue > 0.01


def test_normal_numbers_are_shaped_like_the_tensor():
    for dtype in torch.float32, torch.float64, torch.bfloat16:
        x = clips([4, 7], dtype=dtype)
        assert (x.shape, x.dtype) == ((2, *CLIP), dtype)
        assert torch.equal(x, clips([4, 7]).to(dtype))
    meta = Draws(0, [1]).normal("noise", torch.empty(1, *CLIP, device="meta"))
    assert (meta.shape, meta.device.type) == ((1, *CLIP), "meta")


def test_a_tensor_of_another_batch_size_is_refused():
    assert len(Draws(0, [1, 2])) == 2
    with pytest.raises(ValueError, match="for 2 samples, the tensor has 3"):
        Draws(0, [1, 2]).normal("noise", torch.empty(3, *CLIP))


# What this must print today, tomorrow and on another machine: samples are to be made again.
SCRIPT = """
import torch
from mmsora.utils.draws import Draws
draws = Draws(seed=2026, indices=[0, 123456789, -4], step=17)
print(*draws.uniform("times").tolist())
print(*draws.normal("noise", torch.empty(3, 32))[:, ::16].flatten().tolist())
"""
UNIFORM = [0.015352130915311957, 0.5368285027583515, 0.31043808936218087]
NORMAL = [0.8454961, 1.1373225, -1.1157788, -0.1006613, 0.3932541, -0.4124294]


def test_numbers_are_the_same_in_every_process():
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    lines = [[float(x) for x in line.split()] for line in process.stdout.splitlines()]
    assert lines[0] == UNIFORM
    assert lines[1] == pytest.approx(NORMAL, abs=1e-6)  # vector units round as they like


# Spread over the batch of all processes


def spread(total=64, seed=0, step=0, name="times"):
    return Draws(seed, range(total), step).stratified(name)


@pytest.mark.parametrize("total", [1, 2, 7, 64, 1000])
def test_each_part_has_one_sample(total):
    x = spread(total)
    assert (x.dtype, x.shape) == (torch.float64, (total,))
    assert sorted((x * total).floor().tolist()) == list(range(total))
    assert x.min() >= 0
    assert x.max() < 1


def test_within_its_part_and_over_the_steps_a_sample_is_anywhere():
    """So that no place of the batch is tied to a noise level."""
    inside = torch.cat([spread(64, step=step) * 64 % 1 for step in range(50)])
    assert stats.kstest(inside.numpy(), "uniform").pvalue > 0.01
    places = torch.stack([spread(64, 1, step) for step in range(1000)], dim=1)
    pvalues = [stats.kstest(by_step, "uniform").pvalue for by_step in places.numpy()]
    assert stats.kstest(pvalues, "uniform").pvalue > 0.01
    assert torch.corrcoef(places[[3, 4]])[0, 1].abs() < 4 / 1000**0.5


@pytest.mark.parametrize("key", [dict(seed=1), dict(step=1), dict(name="timer")], ids=str)
def test_the_parts_change_with_seed_step_and_name(key):
    parts, others = ((x * 1000).floor() for x in (spread(1000), spread(1000, **key)))
    assert (parts == others).sum() < 10
    assert torch.corrcoef(torch.stack([parts, others]))[0, 1].abs() < 4 / 1000**0.5


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_parts_of_one_batch(world):
    """Process r has the samples r, r + world, ... as the samplers deal them out."""
    indices, whole = list(range(100, 124)), Draws(0, range(100, 124), 3).stratified("times")
    for rank in range(world):
        places = range(rank, 24, world)
        mine = Draws(0, indices[rank::world], 3, places, 24)
        assert torch.equal(mine.stratified("times"), whole[rank::world])
        plain = Draws(0, indices[rank::world], 3)
        assert torch.equal(mine.uniform("times"), plain.uniform("times"))


@pytest.mark.parametrize(("places", "total"), [([0, 1], 3), ([0, 1, 3], 3), (None, 2)])
def test_places_outside_the_batch_are_refused(places, total):
    with pytest.raises(ValueError, match="3 samples need as many places below total"):
        Draws(0, [5, 6, 7], 0, places, total)

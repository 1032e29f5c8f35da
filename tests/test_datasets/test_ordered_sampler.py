"""The order of validation."""

import pytest

from mmsora.datasets import OrderedSampler, ordered_sampler
from mmsora.registry import DATA_SAMPLERS


@pytest.mark.parametrize(("size", "world"), [(7, 1), (7, 2), (8, 2), (7, 3), (2, 4), (1, 3)])
def test_each_sample_comes_and_all_processes_have_equally_many(monkeypatch, size, world):
    taken = []
    for rank in range(world):
        monkeypatch.setattr(ordered_sampler, "data_info", lambda rank=rank: (rank, world))
        sampler = DATA_SAMPLERS.build(dict(type="mmsora.OrderedSampler", dataset=range(size)))
        taken.append(list(sampler))
        assert list(sampler) == taken[-1]
        assert len(sampler) == len(taken[-1]) == -(-size // world)
    in_turns = [index for turn in zip(*taken, strict=True) for index in turn]
    assert in_turns == [place % size for place in range(len(in_turns))]
    assert set(in_turns) == set(range(size))


def test_a_loader_gives_it_the_seed_of_the_run():
    assert list(OrderedSampler(range(3), seed=5)) == [0, 1, 2]

"""Every index once in each epoch, over all processes, in an order of its own."""

from itertools import islice

import pytest

from mmsora.datasets import EpochSampler, samplers


class Clips(list):
    takes_epochs = True


CLIPS = Clips(range(10))


def take(count, **arguments):
    return list(islice(EpochSampler(CLIPS, **arguments), count))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 16])
def test_every_index_comes_once_in_each_epoch(world_size, monkeypatch):
    ranks = []
    for rank in range(world_size):
        monkeypatch.setattr(samplers, "data_info", lambda rank=rank: (rank, world_size))
        ranks.append(take(60 // world_size + 1, seed=5))
    monkeypatch.setattr(samplers, "data_info", lambda: (0, 1))
    together = [number for turn in zip(*ranks, strict=True) for number in turn]
    assert together[:40] == take(40, seed=5)
    for epoch in range(4):
        numbers = together[10 * epoch : 10 * epoch + 10]
        assert sorted(numbers) == list(range(10 * epoch, 10 * epoch + 10))


def test_orders_go_by_seed_and_epoch():
    numbers = take(40, seed=0)
    epochs = [[n - 10 * e for n in numbers[10 * e : 10 * e + 10]] for e in range(4)]
    assert len({tuple(order) for order in epochs}) == 4
    assert take(40, seed=0) == numbers
    assert take(40, seed=1) != numbers
    following = take(20, seed=1)
    assert [n % 10 for n in following[:10]] != epochs[1]


def test_it_can_be_gone_through_again():
    sampler = EpochSampler(CLIPS, seed=0)
    assert list(islice(sampler, 15)) == list(islice(sampler, 15))


def test_without_shuffling():
    assert take(25, shuffle=False) == list(range(25))


def test_without_a_seed():
    assert sorted(take(10)) == list(range(10))
    assert len(EpochSampler(CLIPS)) == 10


def test_numbers_are_plain():
    assert {type(number) for number in take(20, seed=0)} == {int}


def test_datasets_that_know_no_epochs_are_refused():
    with pytest.raises(ValueError, match="list takes no indices beyond .* use InfiniteSampler"):
        EpochSampler([1, 2, 3])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_it_goes_on_where_another_stopped(world_size, monkeypatch):
    straight, first = take(60, seed=5), EpochSampler(CLIPS, seed=5)
    second = EpochSampler(CLIPS, seed=6)
    second.load_state_dict(first.state_dict(13))
    ranks = []
    for rank in range(world_size):
        monkeypatch.setattr(samplers, "data_info", lambda rank=rank: (rank, world_size))
        resumed = EpochSampler(CLIPS, seed=7)
        resumed.load_state_dict(second.state_dict(10))
        ranks.append(list(islice(resumed, 36 // world_size)))
    assert [number for turn in zip(*ranks, strict=True) for number in turn] == straight[23:59]


def test_data_of_another_size_starts_the_epoch_anew(monkeypatch):
    lines = []
    monkeypatch.setattr(samplers, "print_log", lambda line, **_: lines.append(line))
    state = EpochSampler(CLIPS, seed=5).state_dict(23)
    grown = EpochSampler(Clips(range(11)), seed=5)
    grown.load_state_dict(state)
    assert sorted(islice(grown, 11)) == list(range(22, 33))
    assert lines == ["the dataset had 10 samples and has 11; epoch 2 starts anew"]

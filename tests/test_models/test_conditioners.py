"""Conditions: dropped by the draws alone, and null in one place."""

import pytest
import torch

from mmsora.models import Conditioner, LabelConditioner
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws

CLASSES = 10


def samples(labels):
    return [VideoSample(index=i, label=label) for i, label in enumerate(labels)]


def dropped(drop_prob, indices, step=0, seed=0):
    conditioner = LabelConditioner(CLASSES, drop_prob)
    labels = [i % CLASSES for i in indices]
    cond = conditioner(samples(labels), Draws(seed, indices, step))
    assert set(cond) == {"label"}
    kept = cond["label"] == torch.tensor(labels)
    assert (cond["label"][~kept] == CLASSES).all()
    return ~kept


@pytest.mark.parametrize("drop_prob", [0.1, 0.5])
def test_as_many_are_dropped_as_asked_for(drop_prob):
    count = 20_000
    share = dropped(drop_prob, range(count)).double().mean()
    deviation = (drop_prob * (1 - drop_prob) / count) ** 0.5
    assert abs(share - drop_prob) < 4 * deviation


def test_probabilities_0_and_1_mean_never_and_always():
    assert not dropped(0.0, range(1000)).any()
    assert dropped(1.0, range(1000)).all()


def test_dropping_is_a_function_of_the_draws():
    whole = dropped(0.5, range(64))
    torch.manual_seed(123)
    assert torch.equal(torch.cat([dropped(0.5, range(32)), dropped(0.5, range(32, 64))]), whole)
    assert torch.equal(dropped(0.5, list(reversed(range(64)))), whole.flip(0))
    for others in (dropped(0.5, range(64), step=1), dropped(0.5, range(64), seed=1)):
        assert not torch.equal(others, whole)


def test_who_is_dropped_says_nothing_of_times_and_noise():
    draws = Draws(0, range(20_000))
    conditioner = LabelConditioner(CLASSES, 0.5)
    gone = conditioner(samples([0] * len(draws)), draws)["label"] == CLASSES
    for name in ("times", "noise", "start"):
        difference = draws.uniform(name)[gone].mean() - draws.uniform(name)[~gone].mean()
        assert abs(difference) < 4 * (1 / 12 / 5_000) ** 0.5


def test_sampling_keeps_every_condition():
    labels = LabelConditioner(CLASSES, drop_prob=1.0)(samples([3, 7]))["label"]
    assert labels.tolist() == [3, 7]
    assert labels.dtype == torch.int64


def test_null_is_the_label_after_the_last():
    assert LabelConditioner(CLASSES).null(3)["label"].tolist() == [CLASSES] * 3


@pytest.mark.parametrize("label", [-1, CLASSES, 99])
def test_a_label_out_of_range_is_named(label):
    message = f"label {label} is out of range: the model knows 10 classes, 0 to 9"
    with pytest.raises(ValueError, match=message):
        LabelConditioner(CLASSES)(samples([0, label]))


@pytest.mark.parametrize("drop_prob", [-0.1, 1.1])
def test_drop_prob_is_a_probability(drop_prob):
    with pytest.raises(ValueError, match="is a probability"):
        LabelConditioner(CLASSES, drop_prob)


def test_all_that_a_sample_is_told_is_dropped_together():
    """Whatever the shapes are: here a sequence and a mask, as of a text."""

    class Text(Conditioner):
        def encode(self, samples):
            return {"text": torch.ones(len(samples), 3, 2), "mask": torch.ones(len(samples), 3)}

        def null(self, batch):
            return {"text": torch.zeros(batch, 3, 2), "mask": torch.zeros(batch, 3)}

    cond = Text(0.5)(samples([None] * 64), Draws(0, range(64)))
    told = cond["mask"][:, 0]
    assert 10 < told.sum() < 54
    assert torch.equal(cond["mask"], told[:, None].expand(64, 3))
    assert torch.equal(cond["text"], told[:, None, None].expand(64, 3, 2))

"""Conditions: dropped by the draws alone, and null in one place."""

import pytest
import torch

from mmsora.models import Conditioner, LabelConditioner, images_beside
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError

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


# Images beside a clip


def with_images(count=64, images=3):
    made = samples([i % CLASSES for i in range(count)])
    for sample in made:
        sample.num_images = images
        sample.image_labels = [(sample.index + 1 + place) % CLASSES for place in range(images)]
    return made


def test_images_have_labels_of_their_own():
    cond = LabelConditioner(CLASSES)(with_images(12))
    assert cond["label"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert cond["image_label"].shape == (12, 3)
    assert cond["image_label"].dtype == torch.int64
    assert cond["image_label"][8].tolist() == [9, 0, 1]
    assert set(LabelConditioner(CLASSES)(with_images(2, images=0))) == {"label"}


def test_images_are_dropped_one_by_one():
    """As often as clips, and whoever else is."""
    count, prob = 20_000, 0.3
    made, draws = with_images(count), Draws(0, range(count))
    cond = LabelConditioner(CLASSES, prob)(made, draws)
    gone = torch.stack([cond["label"], *cond["image_label"].unbind(1)]) == CLASSES
    assert torch.equal(gone[0], draws.uniform("drop condition") < prob)
    kept = torch.tensor([sample.image_labels for sample in made])
    assert torch.equal(cond["image_label"][~gone[1:].T], kept[~gone[1:].T])
    shares = gone.double().mean(1)
    assert (shares - prob).abs().max() < 4 * (prob * (1 - prob) / count) ** 0.5
    together = (gone.double() @ gone.double().T / count).fill_diagonal_(prob**2)
    assert (together - prob**2).abs().max() < 4 * (prob**2 * (1 - prob**2) / count) ** 0.5


def test_the_clip_is_dropped_as_it_is_without_images():
    """A run that goes over to joint training keeps what its clips are told."""
    draws = Draws(0, range(64))
    conditioner = LabelConditioner(CLASSES, 0.5)
    joint, alone = conditioner(with_images(), draws), conditioner(with_images(images=0), draws)
    assert torch.equal(joint["label"], alone["label"])
    fewer = conditioner(with_images(images=1), draws)
    assert torch.equal(fewer["image_label"], joint["image_label"][:, :1])


def test_a_batch_has_one_number_of_images():
    assert images_beside(with_images(4)) == 3
    assert images_beside(samples([1, 2])) == images_beside([]) == 0
    with pytest.raises(UserError, match="equally many images beside them, got 1 and 3: give"):
        images_beside([*with_images(2, 1), *with_images(2)])
    with pytest.raises(UserError, match="equally many images beside them, got 0 and 3: give"):
        LabelConditioner(CLASSES)([*samples([1]), *with_images(2)])


def test_a_sample_without_a_label_is_refused():
    with pytest.raises(UserError, match="a clip, or an image beside one, has no label"):
        LabelConditioner(CLASSES)([VideoSample(index=0)])
    with pytest.raises(UserError, match="a clip, or an image beside one, has no label"):
        LabelConditioner(CLASSES)([VideoSample(index=0, label=1, num_images=2)])
    far = VideoSample(index=0, label=1, num_images=2, image_labels=[1, 10])
    with pytest.raises(ValueError, match="label 10 is out of range"):
        LabelConditioner(CLASSES)([far])

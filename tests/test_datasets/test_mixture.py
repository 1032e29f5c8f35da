"""Mixtures give each dataset its share; images stand beside clips."""

from collections import Counter

import pytest
import torch
from mmengine.registry import init_default_scope

from mmsora.datasets import EpochSampler, JointImages, Mixture
from mmsora.datasets.buckets import BucketIndex, shapes_of
from mmsora.datasets.mixture import _shares
from mmsora.registry import DATASETS
from mmsora.structures import VideoSample
from mmsora.utils.config_check import check_config
from mmsora.utils.config_names import load_config
from mmsora.utils.user_error import UserError


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmsora")


class Numbers:
    """Clips whose pixels are their numbers, epochs included."""

    takes_epochs = True

    def __init__(self, size, offset=0, frames=2, classes=None, label=None):
        self.size, self.offset, self.frames, self.label = size, offset, frames, label
        self.metainfo = {} if classes is None else {"classes": classes}
        self.asked = []

    def __len__(self):
        return self.size

    def __getitem__(self, idx):
        self.asked.append(idx)
        sample = VideoSample(index=int(idx), path=f"clip {idx}")
        if self.label is not None:
            sample.label, sample.text = self.label + idx % self.size, f"text {idx}"
        inputs = torch.full((3, self.frames, 4, 6), self.offset + int(idx))
        return {"inputs": inputs, "data_samples": sample}

    @property
    def shapes(self):
        return [[self.frames, 4 + self.offset, number + 1] for number in range(self.size)]


def number(item):
    return int(item["inputs"][0, 0, 0, 0])


def test_without_weights_it_is_one_after_the_other():
    mixture = Mixture([Numbers(3), Numbers(2, 100)])
    assert [number(item) for item in mixture] == [0, 1, 2, 100, 101]
    assert [number(mixture[index]) for index in range(5, 10)] == [3, 4, 5, 102, 103]
    assert [item["data_samples"].index for item in mixture] == list(range(5))


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [
        (10, [1, 1], [5, 5]),
        (10, [0.7, 0.2, 0.1], [7, 2, 1]),
        (10, [1, 1, 1], [4, 3, 3]),
        (100, [1, 1e-9], [99, 1]),
        (9, [2, 1], [6, 3]),
    ],
)
def test_shares(total, weights, shares):
    assert _shares(total, weights) == shares


def test_every_epoch_has_the_shares_and_no_sample_comes_twice_before_all_came():
    parts = Numbers(7), Numbers(23, 1000)
    mixture = Mixture(parts, weights=[2, 1], seed=3)
    assert (len(mixture), mixture.counts) == (30, [20, 10])
    sampler = iter(EpochSampler(mixture, seed=0))
    seen = []
    for _ in range(30):
        epoch = [mixture[next(sampler)] for _ in range(30)]
        assert sum(number(item) < 1000 for item in epoch) == 20
        seen += sorted(epoch, key=lambda item: item["data_samples"].index)
    indices = [item["data_samples"].index for item in seen]
    assert indices == list(range(900))  # unique, so each has noise of its own
    for part, size in zip(parts, (7, 23), strict=True):
        # Numbers of the part, epochs included: all of an epoch before any of the next
        numbers = part.asked
        assert max(Counter(numbers).values()) == 1
        counts = Counter(number % size for number in numbers)
        assert max(counts.values()) - min(counts.values()) <= 1
    orders = [tuple(n % 7 for n in sorted(parts[0].asked) if n // 7 == e) for e in range(3)]
    assert len(set(orders)) == 1  # sorted: complete passes


def test_orders_differ_from_pass_to_pass_and_go_by_the_seed():
    def numbers(seed):
        mixture = Mixture([Numbers(7), Numbers(23)], weights=[2, 1], seed=seed)
        return [mixture.locate(index + 30 * epoch)[1] for epoch in range(7) for index in range(20)]

    one = numbers(0)
    passes = [tuple(n % 7 for n in one[start : start + 7]) for start in range(0, 140, 7)]
    assert len(set(passes)) > 15
    assert one == numbers(0)
    assert one != numbers(1)


def test_a_number_always_gives_the_same_sample():
    mixtures = [Mixture([Numbers(7), Numbers(23, 1000)], [5, 1]) for _ in range(2)]
    indices = [61, 5, 29, 300, 61, 0]
    first = [number(mixtures[0][index]) for index in indices]
    assert first == [number(mixtures[1][index]) for index in reversed(indices)][::-1]


def test_sizes_for_buckets():
    parts = Numbers(3), Numbers(2, 100)
    assert shapes_of(Mixture(parts)).tolist() == [*parts[0].shapes, *parts[1].shapes]
    mixture = Mixture([*parts, parts[1], parts[1]], weights=[3, 2, 2, 2])
    assert len(shapes_of(mixture)) == len(mixture) == 9
    thrice = Mixture([Numbers(2), Numbers(4, 100)], weights=[4, 2])
    with pytest.raises(UserError, match="dataset 1 would give 2 samples of 4"):
        shapes_of(thrice)
    mixture[BucketIndex(4, (2, 8, 8))]
    assert parts[1].asked[-1].size == (2, 8, 8)
    assert parts[1].asked[-1] == 1


def test_whole_passes_keep_a_slots_size():
    mixture = Mixture([Numbers(2), Numbers(4, 100)], weights=[2, 1])
    assert mixture.counts == [4, 2]
    for index in range(4):
        assert {mixture.locate(index + 6 * epoch)[1] % 2 for epoch in range(5)} == {index % 2}
    repeated = [mixture.locate(index + 6 * epoch)[1] for epoch in range(5) for index in range(4)]
    assert repeated == list(range(20))  # each time by draws of its own


def test_classes():
    one, other = Numbers(3, classes=("a", "b")), Numbers(2, classes=["a", "b"])
    assert Mixture([one, other, Numbers(1)]).metainfo == {"classes": ("a", "b")}
    with pytest.raises(ValueError, match="the datasets have different classes"):
        Mixture([one, Numbers(2, classes=("a", "c"))])


def test_it_builds_from_a_config(videos, images):
    pipeline = [dict(type="SampleFrames", num_frames=1), dict(type="DecodeVideo")]
    pipeline += [dict(type="ResizeCrop", size=16), dict(type="PackVideo")]
    clips = dict(type="ClassFolderVideos", data_root=str(videos), pipeline=pipeline)
    still = dict(type="ImageNetFolder", data_root=str(images), pipeline=pipeline)
    mixture = DATASETS.build(dict(type="Mixture", datasets=[clips, clips | dict(seed=1)]))
    assert len(mixture) == 12
    assert mixture[11]["data_samples"].path.endswith("b/v_5.avi")
    assert mixture.num_skipped == 0
    joint = DATASETS.build(dict(type="JointImages", videos=clips, images=still, num_images=2))
    assert joint[0]["inputs"].shape == (3, 3, 16, 16)


@pytest.mark.parametrize(
    ("datasets", "weights", "message"),
    [
        ([], None, "0 datasets"),
        ([Numbers(2)], [1, 2], "1 datasets need as many positive weights"),
        ([Numbers(2), Numbers(2)], [1, 0], "positive weights"),
        ([[1, 2]], None, "list takes no indices beyond its length"),
    ],
)
def test_impossible_mixtures(datasets, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(datasets, weights)
    with pytest.raises(IndexError, match="counted from 0"):
        Mixture([Numbers(2)])[-1]


def test_images_stand_behind_the_clip():
    joint = JointImages(Numbers(3), Numbers(5, 100, frames=1, label=7), num_images=2)
    assert len(joint) == 3
    item = joint[4]  # clip 1 of the second epoch
    assert item["inputs"].shape == (3, 4, 4, 6)
    levels = item["inputs"][0, :, 0, 0].tolist()
    assert levels[:2] == [4, 4]
    sample = item["data_samples"]
    assert (sample.index, sample.num_images) == (4, 2)
    assert sample.image_labels == [7 + (level - 100) % 5 for level in levels[2:]]
    assert sample.image_texts == [f"text {level - 100}" for level in levels[2:]]


def test_each_image_comes_once_before_any_comes_twice():
    images = Numbers(5, frames=1)
    joint = JointImages(Numbers(3), images, num_images=2)
    for index in range(15):
        joint[index]
    assert sorted(images.asked) == list(range(30))
    assert [sorted(images.asked[s : s + 5]) for s in range(0, 30, 5)] == [
        list(range(s, s + 5)) for s in range(0, 30, 5)
    ]
    passes = [tuple(n % 5 for n in images.asked[s : s + 5]) for s in range(0, 30, 5)]
    assert len(set(passes)) > 3
    again = JointImages(Numbers(3), Numbers(5, frames=1), num_images=2)
    assert torch.equal(again[11]["inputs"], joint[11]["inputs"])
    other = JointImages(Numbers(3), Numbers(5, frames=1), num_images=2, seed=1)
    assert any(not torch.equal(other[n]["inputs"], joint[n]["inputs"]) for n in range(5))


def test_images_without_labels_and_in_buckets():
    images = Numbers(5, frames=1)
    joint = JointImages(Numbers(3), images, num_images=2)
    assert "image_labels" not in joint[0]["data_samples"]
    joint[BucketIndex(1, (2, 4, 6))]
    assert images.asked[-1].size == (1, 4, 6)


def test_images_of_another_size():
    with pytest.raises(UserError, match=r"clip \d: .* must be \(3, 1, 4, 6\), got \(3, 2, 4, 6\)"):
        JointImages(Numbers(3), Numbers(5))[0]
    with pytest.raises(ValueError, match="num_images must be 1 or more, got 0"):
        JointImages(Numbers(3), Numbers(5), num_images=0)


def test_images_beside_cached_latents():
    """Mean and standard deviation, (2, c, t, h, w): the frames are the third axis."""

    class Latents(Numbers):
        def __getitem__(self, idx):
            item = super().__getitem__(idx)
            return {**item, "inputs": item["inputs"].float()[None].repeat(2, 1, 1, 1, 1)}

    joint = JointImages(Latents(3), Latents(5, 100, frames=1), num_images=2)
    item = joint[1]["inputs"]
    assert item.shape == (2, 3, 4, 4, 6)
    assert (item[:, :, :2] == 1).all()
    assert (item[:, :, 2:] >= 100).all()


def test_a_config_with_parts_is_looked_into(videos):
    cfg = load_config("latte_s2_own_clips")
    part = dict(type="ClassFolderVideos", data_root=str(videos))
    cfg.train_dataloader.dataset = dict(type="Mixture", datasets=[part, part], weights=[1, 2])
    check_config(cfg)
    cfg.train_dataloader.dataset = dict(type="Mixture", datasets=[part | dict(data_rot="x")])
    with pytest.raises(UserError, match="data_rot"):
        check_config(cfg)

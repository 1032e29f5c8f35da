"""Images in class folders are videos of one frame."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image

from mmsora.registry import DATASETS
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import MediaError

BASES = Path(__file__).parents[2] / "configs/_base_/datasets"
PIPELINE = [
    dict(type="LoadImage"),
    dict(type="ADMCenterCrop", size=16),
    dict(type="RandomFlip"),
    dict(type="PackVideo"),
]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmsora")


def build(root, **arguments):
    cfg = dict(type="ImageNetFolder", data_root=str(root), pipeline=PIPELINE)
    return DATASETS.build(cfg | arguments)


def test_images_are_labelled_by_sorted_folder(images):
    dataset = build(images)
    samples = [item["data_samples"] for item in dataset]
    assert [sample.path for sample in samples] == [
        f"{images}/train/{name}" for name in ("n01/z.JPEG", "n02/x.JPEG", "n02/y.jpg")
    ]
    assert [sample.label for sample in samples] == [0, 1, 1]
    assert dataset.metainfo["classes"] == ("n01", "n02")


def test_an_image_is_a_video_of_one_frame(images):
    inputs = build(images)[1]["inputs"]
    assert (inputs.shape, inputs.dtype) == ((3, 1, 16, 16), torch.uint8)
    assert (inputs.int() - 50).abs().max() <= 1


def test_other_splits(images):
    assert len(build(images, split="val")) == 1
    assert len(build(images / "train", split="")) == 3
    with pytest.raises(UserError, match="test: no such folder"):
        build(images, split="test")


def test_flips_are_drawn_for_each_epoch(tmp_path):
    (tmp_path / "train/n01").mkdir(parents=True)
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255
    Image.fromarray(pixels).save(tmp_path / "train/n01/a.png")
    dataset = build(tmp_path)
    flipped = [bool(dataset[epoch]["inputs"][0, 0, 0, 0] == 0) for epoch in range(100)]
    assert 30 < sum(flipped) < 70
    assert flipped == [bool(dataset[epoch]["inputs"][0, 0, 0, 0] == 0) for epoch in range(100)]
    assert not any((build(tmp_path, test_mode=True)[e]["inputs"][0, 0, 0, 0] == 0) for e in (0, 9))


def test_damaged_images(tmp_path):
    (tmp_path / "train/n01").mkdir(parents=True)
    (tmp_path / "train/n01/a.JPEG").write_text("not found")
    with pytest.raises(MediaError, match=r"a\.JPEG: not an image"):
        build(tmp_path)[0]


@pytest.mark.parametrize("size", [256, 512])
def test_the_base_configs(images, size):
    loader = Config.fromfile(BASES / f"imagenet_{size}.py").train_dataloader
    assert loader.batch_size == 32
    loader.dataset.data_root, loader.num_workers, loader.batch_size = str(images), 0, 4
    loader.pin_memory = False
    batch = next(iter(Runner.build_dataloader(loader, seed=0)))
    assert [tuple(clip.shape) for clip in batch["inputs"]] == [(3, 1, size, size)] * 4
    assert sorted(sample.index for sample in batch["data_samples"][:3]) == [0, 1, 2]

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


@pytest.fixture
def flat(images, tmp_path):
    """OpenDataLab's validation images: in no class folders, with a list."""
    (tmp_path / "val").mkdir()
    (tmp_path / "meta").mkdir()
    for name, source in (("b.JPEG", "n02/x.JPEG"), ("a 1.JPEG", "n01/z.JPEG")):
        (tmp_path / "val" / name).write_bytes((images / "train" / source).read_bytes())
    (tmp_path / "meta/val.txt").write_text("b.JPEG 65\r\na 1.JPEG 970\n\n")
    return tmp_path


def test_images_in_no_class_folders_are_labelled_by_the_list(flat):
    samples = [item["data_samples"] for item in build(flat, split="val")]
    assert [sample.label for sample in samples] == [65, 970]
    assert [sample.path for sample in samples] == [f"{flat}/val/b.JPEG", f"{flat}/val/a 1.JPEG"]
    (flat / "meta/val.txt").unlink()
    with pytest.raises(UserError, match="val: no class folders in it"):
        build(flat, split="val")


def test_class_folders_need_no_list_and_a_list_may_be_given(images, tmp_path):
    for path in images.rglob("*.*"):
        copied = tmp_path / path.relative_to(images)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/train.txt").write_text("n02/y.jpg 1\nn01/z.JPEG 0\n")
    assert len(build(tmp_path)) == 3
    dataset = build(tmp_path, ann_file="meta/train.txt")
    assert [item["data_samples"].label for item in dataset] == [1, 0]
    assert dataset.metainfo["classes"] == ("n01", "n02")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("b.JPEG\n", "a line is <path> <label>, got 'b.JPEG'"),
        ("c.JPEG 3\n", "val.txt: c.JPEG is not in .*val"),
        ("no/b.JPEG 3\n", "val.txt: no/b.JPEG is not in .*val"),
        ("", "val.txt: an empty list"),
    ],
)
def test_lists_that_do_not_fit_are_refused(flat, text, words):
    (flat / "meta/val.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        build(flat, split="val")

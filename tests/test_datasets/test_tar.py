"""Samples are read from their places in tar files."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from PIL import Image
from torch.utils.data import DataLoader

from mmsora.datasets import EpochSampler
from mmsora.datasets.buckets import shapes_of
from mmsora.registry import DATASETS
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import MediaError, write_video

IMAGES = [
    dict(type="SampleFrames", num_frames=1),
    dict(type="DecodeVideo"),
    dict(type="PackVideo"),
]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmsora")


def image(level):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 24, 3), level, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write(path, members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    """Two shards with the images 0 to 4, whose grey level is 40 times the number."""
    about = {"caption": ["two", "zwei"], "label": 9, "num_frames": 1, "height": 16, "width": 24}
    write(
        tmp_path / "00.tar",
        [
            ("a.txt", b" nought\n again "),
            ("a.jpg", image(0)),
            ("b.jpg", image(40)),
            ("b.cls", b"3"),
            ("b.score.txt", b"ignored"),
            ("readme", b"no sample"),
        ],
    )
    write(
        tmp_path / "01.tar",
        [
            ("x/c.jpeg", image(80)),
            ("x/c.json", json.dumps(about).encode()),
            ("y/c.JPG", image(120)),
            (f"{'long' * 60}.jpg", image(160)),
        ],
    )
    (tmp_path / "other.zip").touch()
    return tmp_path


def build(root, pipeline=IMAGES, **arguments):
    cfg = dict(type="TarVideos", data_root=str(root), pipeline=pipeline)
    return DATASETS.build(cfg | arguments)


def level(item):
    return int(item["inputs"].float().mean().round())


def test_samples_and_what_lies_beside_them(shards):
    items = list(build(shards, test_mode=True))
    assert [level(item) for item in items] == [0, 40, 80, 120, 160]
    samples = [item["data_samples"] for item in items]
    assert [sample.get("text") for sample in samples] == ["nought again", None, "two", None, None]
    assert [sample.get("label") for sample in samples] == [None, 3, 9, None, None]
    assert [sample.path for sample in samples][:3] == [
        f"{shards}/{name}" for name in ("00.tar/a.jpg", "00.tar/b.jpg", "01.tar/x/c.jpeg")
    ]


def test_captions_of_a_list_are_drawn(shards):
    assert {build(shards)[2 + 5 * e]["data_samples"].text for e in range(20)} == {"two", "zwei"}


def test_sizes_for_buckets(shards):
    assert shapes_of(build(shards, indices=[2])).tolist() == [[1, 16, 24]]


def test_some_of_the_files(shards):
    assert [level(item) for item in build(shards, pattern="*1.tar")] == [80, 120, 160]
    write(shards / "deep/02.tar", [("a.jpg", image(200))])
    assert [level(item) for item in build(shards, pattern="*/*.tar")] == [200]
    with pytest.raises(UserError, match=r"no \*.tgz in it"):
        build(shards, pattern="*.tgz")


def test_workers_read_the_same(shards):
    dataset = build(shards)
    loaders = [
        iter(
            DataLoader(
                dataset, 2, sampler=EpochSampler(dataset, seed=0), num_workers=n, collate_fn=list
            )
        )
        for n in (0, 2)
    ]
    for _ in range(6):
        for one, other in zip(*map(next, loaders), strict=True):
            assert one["data_samples"].index == other["data_samples"].index
            assert torch.equal(one["inputs"], other["inputs"])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_videos(tmp_path, format):
    members = []
    for number in range(3):
        frames = 10 * number + np.arange(6, dtype=np.uint8).reshape(6, 1, 1)
        write_video(tmp_path / "clip.gif", np.broadcast_to(frames, (6, 16, 24)), 8)
        members += [(f"{number}.gif", (tmp_path / "clip.gif").read_bytes())]
    members.insert(1, ("0.txt", b"nought"))
    write(tmp_path / "shards/0.tar", members, format)
    pipeline = [dict(type="SampleFrames", num_frames=2, stride=3), *IMAGES[1:]]
    dataset = build(tmp_path / "shards", pipeline, test_mode=True)
    assert [item["inputs"][0, :, 0, 0].tolist() for item in dataset] == [
        [0, 3],
        [10, 13],
        [20, 23],
    ]


def test_broken_samples(tmp_path):
    write(tmp_path / "0.tar", [("a.jpg", image(0)), ("b.jpg", b"no image"), ("c.jpg", b"")])
    with pytest.raises(MediaError, match=r"0.tar/b.jpg: not an image"):
        build(tmp_path)[1]
    dataset = build(tmp_path, on_error="skip")
    assert [item["data_samples"].get("weight", 1) for item in dataset] == [1, 0, 0]
    assert dataset.num_skipped == 2


def test_a_tar_that_changed(tmp_path):
    path = write(tmp_path / "0.tar", [("a.jpg", image(0)), ("b.jpg", image(10))])
    dataset = build(tmp_path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(MediaError, match=r"0.tar/a.jpg: the tar file ends within it"):
        dataset[0]
    path.unlink()
    with pytest.raises(MediaError, match=r"0.tar/b.jpg: No such file"):
        dataset[1]


def gzipped(path):
    with tarfile.open(path, "w:gz"):
        pass


def short(path):
    whole = write(path, [("a.jpg", image(0)), ("b.jpg", image(10))])
    whole.write_bytes(whole.read_bytes()[:700])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (gzipped, "not a whole tar file without compression"),
        (short, "not a whole tar file without compression"),
        (lambda path: path.write_bytes(b""), "not a whole tar file without compression"),
        (lambda path: write(path, [("a.txt", b"words")]), "no .avi, .* files in its 1 tar files"),
        (lambda path: write(path, [("a.mp4", b""), ("a.jpg", b"")]), "two files are sample 'a'"),
        (lambda path: write(path, [("a.cls", b"cat")]), "a.cls: invalid literal"),
        (lambda path: write(path, [("a.json", b"[1]")]), "a.json: "),
    ],
)
def test_tars_that_make_no_sense(tmp_path, make, words):
    make(tmp_path / "0.tar")
    with pytest.raises(UserError, match=words):
        build(tmp_path)

"""In each epoch every good file counts once; a broken one never, and it is named once."""

from itertools import islice

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from torch.utils.data import DataLoader

from mmsora.datasets import EpochSampler, samplers
from mmsora.registry import DATASETS
from mmsora.utils.video_io import write_video

BROKEN = [3, 4, 17, 30, 49]
GOOD = sorted(set(range(50)) - set(BROKEN))
PIPELINE = [
    dict(type="SampleFrames", num_frames=2),
    dict(type="DecodeVideo"),
    dict(type="PackVideo"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """50 clips of 4 frames in two classes; clip ``n`` has the grey levels 5 n to 5 n + 3."""
    root = tmp_path_factory.mktemp("fifty")
    for number in range(50):
        path = root / "ab"[number // 25] / f"{number:02d}.avi"
        path.parent.mkdir(exist_ok=True)
        grey = 5 * number + np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
        write_video(path.with_suffix(".png"), np.broadcast_to(grey, (4, 6, 8, 3)), 8)
        path.with_suffix(".png").rename(path)
    whole = sorted(root.rglob("*.avi"))
    for number, content in zip(
        BROKEN,
        [b"", b"<html>not found</html>", whole[17].read_bytes()[:60], b"\0" * 999, b"RIFF"],
        strict=True,
    ):
        whole[number].write_bytes(content)
    return root


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmsora")


def build(folder):
    cfg = dict(type="ClassFolderVideos", data_root=str(folder), pipeline=PIPELINE)
    return DATASETS.build(cfg | dict(on_error="skip"))


def told(item):
    """Index, clip, first frame and weight."""
    sample = item["data_samples"]
    return (sample.index, *divmod(int(item["inputs"][0, 0, 0, 0]), 5), sample.get("weight", 1))


def through(folder, epochs, workers=0):
    dataset = build(folder)
    sampler = EpochSampler(dataset, seed=0)
    loader = DataLoader(dataset, 5, sampler=sampler, num_workers=workers, collate_fn=list)
    items = [item for batch in islice(loader, 10 * epochs) for item in batch]
    return dataset, [told(item) for item in items]


def test_every_good_clip_counts_once_in_each_epoch(folder):
    dataset, seen = through(folder, epochs=3)
    assert len(seen) == 150
    for epoch in range(3):
        part = seen[50 * epoch : 50 * epoch + 50]
        assert sorted(index for index, *_ in part) == list(range(50 * epoch, 50 * epoch + 50))
        counted = [(index % 50, clip) for index, clip, _, weight in part if weight == 1]
        assert sorted(clip for _, clip in counted) == GOOD
        assert all(index == clip for index, clip in counted)
        stand_ins = {index % 50: clip for index, clip, _, weight in part if weight == 0}
        assert stand_ins == {3: 5, 4: 5, 17: 18, 30: 31, 49: 0}
    assert len({weight for *_, weight in seen}) == 2


def test_it_is_a_function_of_the_number_alone(folder, monkeypatch):
    _, alone = through(folder, epochs=2)
    assert through(folder, epochs=2, workers=2)[1] == alone
    dataset, expected = build(folder), {index: rest for index, *rest in alone}
    for index in reversed(range(40, 60)):  # as after a resume
        assert list(told(dataset[index])[1:]) == expected[index]
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(samplers, "data_info", lambda rank=rank: (rank, 2))
        numbers = list(islice(EpochSampler(dataset, seed=0), 50))
        ranks.append([told(dataset[number]) for number in numbers])
    together = [item for turn in zip(*ranks, strict=True) for item in turn]
    assert together == alone


def test_each_is_named_and_counted_once(folder, monkeypatch):
    lines = []
    monkeypatch.setattr(
        "mmsora.datasets.file_dataset.print_log", lambda text, **_: lines.append(text)
    )
    dataset, _ = through(folder, epochs=3)
    assert dataset.num_skipped == 5
    assert sorted(line.split(":")[0] for line in lines) == [
        f"skipped {folder}/{'ab'[number // 25]}/{number:02d}.avi" for number in BROKEN
    ]
    assert sorted(line[line.index("(") :] for line in lines) == [
        f"({count} of 50 skipped so far)" for count in range(1, 6)
    ]


def test_a_file_is_named_in_its_own_place(folder):
    """And not where it might have stood in for another, so that two workers cannot both do it."""
    dataset = build(folder)
    assert told(dataset[3])[1] == 5
    assert dataset.num_skipped == 1
    dataset[4]
    assert dataset.num_skipped == 2


def test_workers_count_together(folder):
    dataset, _ = through(folder, epochs=1, workers=2)
    assert dataset.num_skipped == 5

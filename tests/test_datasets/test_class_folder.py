"""Videos in class folders: labels, lists, epochs, and clips that cannot be used."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmsora.datasets import ClassFolderVideos, EpochSampler, SampleFrames
from mmsora.datasets.class_folder import read_classes, read_split
from mmsora.registry import DATASETS
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import MediaError, write_video

BASES = Path(__file__).parents[2] / "configs/_base_/datasets"
PIPELINE = [
    dict(type="SampleFrames", num_frames=3, stride=2),
    dict(type="DecodeVideo"),
    dict(type="RandomFlip"),
    dict(type="PackVideo"),
]
SHORT = [dict(type="SampleFrames", num_frames=8, short="skip"), *PIPELINE[1:]]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmsora")


def build(root, pipeline=PIPELINE, **arguments):
    cfg = dict(type="ClassFolderVideos", data_root=str(root), pipeline=pipeline)
    return DATASETS.build(cfg | arguments)


def shown(item):
    """The number of the clip and the number of its first frame."""
    return divmod(int(item["inputs"][0, 0, 0, 0]), 10)


def write_list(path, *lines):
    path.write_text("\r\n".join(lines) + "\n\n")
    return str(path)


def test_labels_are_the_numbers_of_the_sorted_folders(videos):
    dataset = build(videos)
    assert len(dataset) == 6
    assert dataset.metainfo["classes"] == ("C", "a", "b")
    samples = [item["data_samples"] for item in dataset]
    assert [sample.label for sample in samples] == [0, 1, 1, 1, 2, 2]
    assert [sample.index for sample in samples] == list(range(6))
    assert [sample.path for sample in samples][:2] == [
        str(videos / "C/v_0.avi"),
        str(videos / "a/v_1.avi"),
    ]
    assert [dataset.get_cat_ids(index) for index in (0, 5)] == [[0], [2]]


def test_what_a_model_gets(videos):
    item = build(videos)[4]
    assert set(item) == {"inputs", "data_samples"}
    assert (item["inputs"].shape, item["inputs"].dtype) == ((3, 3, 24, 32), torch.uint8)
    assert item["inputs"].is_contiguous()
    number, start = shown(item)
    assert number == 4
    assert (item["inputs"][0, :, 0, 0] == 40 + start + torch.tensor([0, 2, 4])).all()


def test_a_sample_is_a_function_of_seed_index_and_epoch(videos):
    one, other = build(videos), build(videos)
    numbers = [5, 0, 17, 6, 12, 0]
    first = {number: one[number]["inputs"] for number in numbers}
    for number in reversed(numbers):
        assert torch.equal(other[number]["inputs"], first[number])
        assert torch.equal(one[number]["inputs"], first[number])
        assert one[number]["data_samples"].index == number


def test_epochs_and_seeds_choose_other_frames_of_the_same_clips(videos):
    dataset = build(videos)
    chosen = [shown(dataset[2 + 6 * epoch]) for epoch in range(60)]
    assert {number for number, _ in chosen} == {2}
    assert {start for _, start in chosen} == set(range(8))  # 12 frames, a clip spans 5
    other = build(videos, seed=1)
    assert [shown(other[2 + 6 * epoch]) for epoch in range(60)] != chosen


def test_the_start_is_drawn_for_index_and_epoch(videos):
    draws = Draws(7, [2], 5)
    assert shown(build(videos, seed=7)[2 + 5 * 6])[1] == int(
        draws.uniform("clip start").item() * 8
    )


def test_nothing_is_random_in_test_mode(videos):
    dataset = build(videos, test_mode=True)
    assert [shown(dataset[2 + 6 * epoch]) for epoch in range(9)] == [(2, 0)] * 9


def test_lists_choose_videos(videos, tmp_path):
    train = write_list(tmp_path / "trainlist01.txt", "b/v_5.avi 3", "C/v_0.avi 1", "a/v_2.avi 2")
    dataset = build(videos, split_file=train)
    assert [shown(item)[0] for item in dataset] == [5, 0, 2]
    assert [item["data_samples"].label for item in dataset] == [2, 0, 1]
    test = write_list(tmp_path / "testlist01.txt", "a/v_1.avi", "b/v_4.avi")
    assert [shown(item)[0] for item in build(videos, split_file=test)] == [1, 4]


def test_a_list_of_classes_numbers_them(videos, tmp_path):
    classes = write_list(tmp_path / "classInd.txt", "1 a", "2 none of it", "3 b", "4 C")
    dataset = build(videos, class_file=classes)
    assert dataset.metainfo["classes"] == ("a", "none of it", "b", "C")
    assert [item["data_samples"].label for item in dataset] == [3, 0, 0, 0, 2, 2]


def test_lists_are_read_as_people_write_them(tmp_path):
    path = write_list(tmp_path / "list.txt", "A/v 1.avi 12", "B c/v_2.avi", " D/x.mp4\t3 ")
    assert read_split(path) == ["A/v 1.avi", "B c/v_2.avi", "D/x.mp4"]
    path = write_list(tmp_path / "classes.txt", "1 Apply Make up", "Diving", "3\tFencing")
    assert read_classes(path) == ["Apply Make up", "Diving", "Fencing"]


def test_part_of_the_videos(videos):
    assert len(build(videos, indices=2)) == 2
    assert [shown(item)[0] for item in build(videos, indices=[5, 1])] == [5, 1]
    assert [shown(item)[0] for item in build(videos).get_subset([3, 4])] == [3, 4]


def copy(videos, tmp_path):
    root = tmp_path / "videos"
    shutil.copytree(videos, root)
    return root


def test_what_is_no_video_is_left_out(videos, tmp_path):
    root = copy(videos, tmp_path)
    (root / "readme.txt").write_text("not a class")
    (root / ".hidden").mkdir()
    (root / "a/notes.txt").write_text("not a video")
    (root / "a/._v_1.avi").write_text("left by another system")
    (root / "b/v_5.avi").rename(root / "b/v_5.AVI")
    dataset = build(root)
    assert len(dataset) == 6
    assert dataset.metainfo["classes"] == ("C", "a", "b")


def nothing(root):
    shutil.rmtree(root)


def no_class(root):
    for folder in root.iterdir():
        shutil.rmtree(folder)


def no_video(root):
    for path in root.glob("*/*.avi"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nothing, "no such folder"),
        (no_class, "no class folders"),
        (no_video, "no .avi, .mp4, .mkv, .webm, .mov, .m4v, .mpg, .gif files"),
    ],
)
def test_empty_trees_are_refused(videos, tmp_path, change, words):
    root = copy(videos, tmp_path)
    change(root)
    with pytest.raises(UserError) as caught:
        build(root)
    assert str(root) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("key", "lines", "words"),
    [
        ("split_file", ["a/v_1.avi", "a/v_9.avi 1", "d/v_1.avi"], ["2 of 3", "a/v_9.avi"]),
        ("split_file", [], ["an empty list"]),
        ("class_file", ["1 a", "2 b"], ["no class 'C'"]),
    ],
)
def test_lists_that_do_not_fit_are_refused(videos, tmp_path, key, lines, words):
    path = write_list(tmp_path / "list.txt", *lines)
    with pytest.raises(UserError) as caught:
        build(videos, **{key: path})
    for word in [path, *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ["split_file", "class_file"])
def test_lists_that_are_not_there_are_refused(videos, key):
    with pytest.raises(UserError, match="missing.txt: No such file"):
        build(videos, **{key: "missing.txt"})


def test_wrong_arguments(videos):
    with pytest.raises(ValueError, match="'raise' or 'skip', got 'ignore'"):
        build(videos, on_error="ignore")
    with pytest.raises(IndexError, match="counted from 0"):
        build(videos)[-1]


@pytest.fixture
def log(monkeypatch):
    """What is written to the log."""
    lines = []
    monkeypatch.setattr(
        "mmsora.datasets.file_dataset.print_log", lambda text, **_: lines.append(text)
    )
    return lines


def test_short_clips_are_an_error_by_default(videos):
    with pytest.raises(MediaError, match=r"v_2\.avi: 12 frames, 13 are needed"):
        build(videos, [SampleFrames(num_frames=13)])[2]


def test_short_clips_may_be_skipped(videos, tmp_path, log):
    root = copy(videos, tmp_path)
    for name in ("a/v_3", "b/v_4"):
        write_video(root / f"{name}.png", np.zeros((5, 24, 32, 3), np.uint8), 8)
        (root / f"{name}.png").replace(root / f"{name}.avi")
    dataset = build(root, SHORT)
    for epoch in range(3):
        items = [dataset[index + 6 * epoch] for index in range(6)]
        assert [shown(item)[0] for item in items] == [0, 1, 2, 5, 5, 5]
        assert [item["data_samples"].label for item in items] == [0, 1, 1, 2, 2, 2]
        assert [item["data_samples"].index - 6 * epoch for item in items] == list(range(6))
    starts = {tuple(shown(dataset[index + 6 * e])[1] for index in (3, 4, 5)) for e in range(9)}
    assert len(starts) > 3  # each by its own draws
    assert dataset.num_skipped == 2
    assert [line.split(";")[0] for line in log] == [
        f"skipped {root}/a/v_3.avi: 5 frames, 8 are needed",
        f"skipped {root}/b/v_4.avi: 5 frames, 8 are needed",
    ]
    assert "(2 of 6 skipped so far)" in log[1]


def test_skipped_clips_are_counted_across_workers(videos, tmp_path):
    root = copy(videos, tmp_path)
    (root / "a/v_1.avi").write_bytes(b"")
    dataset = build(root, on_error="skip")
    sampler = EpochSampler(dataset, seed=0)
    loader = iter(DataLoader(dataset, 2, sampler=sampler, num_workers=2, collate_fn=list))
    for _ in range(9):
        next(loader)
    assert dataset.num_skipped == 1


def test_no_clip_is_long_enough(videos, log):
    dataset = build(videos, [dict(type="SampleFrames", num_frames=13, short="skip")])
    with pytest.raises(UserError, match="none of 6 files gives a sample"):
        dataset[0]
    assert len(log) == 1


def test_damaged_files(videos, tmp_path, log):
    root = copy(videos, tmp_path)
    (root / "b/v_5.avi").write_text("not found")
    with pytest.raises(MediaError, match=r"v_5\.avi"):
        build(root)[5]
    dataset = build(root, on_error="skip")
    assert shown(dataset[5])[0] == 0
    assert len(log) == 1
    assert "v_5.avi" in log[0]


def test_workers_give_what_one_process_gives(videos):
    dataset = build(videos)
    loaders = [
        iter(
            DataLoader(
                dataset, 3, sampler=EpochSampler(dataset, seed=0), num_workers=n, collate_fn=list
            )
        )
        for n in (0, 2)
    ]
    for _ in range(5):
        for one, other in zip(*map(next, loaders), strict=True):
            assert one["data_samples"].index == other["data_samples"].index
            assert torch.equal(one["inputs"], other["inputs"])


def test_the_base_config_of_ucf101(tmp_path):
    write_video(tmp_path / "YoYo.mp4", np.zeros((60, 24, 32), np.uint8), 25)
    root = tmp_path / "UCF-101/YoYo"
    root.mkdir(parents=True)
    (tmp_path / "YoYo.mp4").rename(root / "v_YoYo_g01_c01.avi")
    loader = Config.fromfile(BASES / "ucf101_16x256.py").train_dataloader
    loader.dataset.data_root, loader.num_workers = str(root.parent), 0
    loader.pin_memory = False
    batch = next(iter(Runner.build_dataloader(loader, seed=0)))
    assert [tuple(clip.shape) for clip in batch["inputs"]] == [(3, 16, 256, 256)] * 5
    assert [sample.index for sample in batch["data_samples"]] == list(range(5))


def test_classes_build_as_strings_do(videos):
    dataset = ClassFolderVideos(str(videos), PIPELINE)
    assert torch.equal(dataset[1]["inputs"], build(videos)[1]["inputs"])

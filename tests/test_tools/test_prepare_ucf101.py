"""``tools/prepare/ucf101.py``: what it says of whole and of broken trees."""

import numpy as np
import pytest

from mmsora.utils.video_io import write_video

NAMES = ["Archery/v_1", "Archery/v_2", "YoYo/v_1"]


@pytest.fixture(scope="module")
def ucf101(tool):
    return tool("prepare/ucf101")


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "UCF-101"
    for number, name in enumerate(NAMES):
        path = root / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, np.zeros((4 + number, 16, 24), np.uint8), 25)
        path.rename(path.with_suffix(".avi"))
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 YoYo\n")
    for split in (1, 2, 3):
        (lists / f"trainlist0{split}.txt").write_text("Archery/v_1.avi 1\nYoYo/v_1.avi 2\n")
        (lists / f"testlist0{split}.txt").write_text("Archery/v_2.avi\n")
    return tmp_path


def test_all_of_it(ucf101, tree, monkeypatch, capsys):
    monkeypatch.setattr(ucf101, "CLASSES", 2)
    monkeypatch.setattr(ucf101, "CLIPS", 3)
    monkeypatch.setattr(ucf101, "LISTS", {"trainlist01.txt": 2, "testlist01.txt": 1})
    assert ucf101.main(["--root", str(tree)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed] == [
        ["classes", "2"],
        ["clips", "3"],
        ["trainlist01.txt", "2", "clips"],
        ["testlist01.txt", "1", "clips"],
        ["frames", "4", "to", "6", "in", "a", "clip"],
        ["pixels", "24x16"],
        ["3", "of", "3", "clips", "can", "be", "read"],
    ]


def test_a_part_of_it_is_warned_about(ucf101, tree, capsys):
    (tree / "UCF-101/YoYo/v_1.avi").unlink()
    (tree / "ucfTrainTestlist/testlist02.txt").unlink()
    (tree / "ucfTrainTestlist/classInd.txt").write_text("1 Archery\n2 Billiards\n")
    root, lists = str(tree / "UCF-101"), str(tree / "ucfTrainTestlist")
    assert ucf101.main(["--root", root, "--lists", lists, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "warning: UCF-101 has 101 classes, here are 2",
        "warning: UCF-101 has 13,320 clips, here are 2",
        "warning: trainlist01.txt: 1 clips are not there, the first is YoYo/v_1.avi",
        "warning: trainlist01.txt names 9,537 clips in UCF-101, here 2",
        "testlist02.txt is missing",
        "warning: classInd.txt names other classes",
        "2 of 2 clips can be read",
    ):
        assert words in printed


def test_without_lists(ucf101, tree, capsys):
    assert ucf101.main(["--root", str(tree), "--lists", str(tree / "nowhere")]) == 0
    assert "nowhere: no such folder, the lists are not checked" in capsys.readouterr().out


def test_unreadable_clips_are_named(ucf101, tree, capsys):
    broken = tree / "UCF-101/Archery/v_2.avi"
    broken.write_bytes(broken.read_bytes()[:300])
    assert ucf101.main(["--root", str(tree)]) == 1
    printed = capsys.readouterr().out
    assert f"unreadable: {broken}: " in printed
    assert "2 of 3 clips can be read" in printed


@pytest.mark.parametrize("content", [None, "empty"])
def test_no_tree_is_one_line(ucf101, tmp_path, capsys, content):
    root = tmp_path / "data"
    if content:
        root.mkdir()
    with pytest.raises(SystemExit) as caught:
        ucf101.main(["--root", str(root)])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {root}: no ")


def test_the_official_lists_add_up(ucf101):
    for split in (1, 2, 3):
        named = ucf101.LISTS[f"trainlist0{split}.txt"] + ucf101.LISTS[f"testlist0{split}.txt"]
        assert named == ucf101.CLIPS

"""A file is whole or it is the old one."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mmsora.utils.atomic import atomic_path, write_json, write_text

ROOT = Path(__file__).parents[2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "folder" / "weights.pth"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".pth"
        assert temporary.name.startswith(".")
        temporary.write_bytes(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert names(target.parent) == ["weights.pth"]


def test_a_failure_leaves_the_old_file(tmp_path):
    target = tmp_path / "notes.txt"
    write_text(target, "old")
    with pytest.raises(TypeError), atomic_path(target) as temporary, temporary.open("w") as file:
        file.writelines(["ne", None])
    assert target.read_text() == "old"
    assert names(tmp_path) == ["notes.txt"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):
        pass
    assert names(tmp_path) == []


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    target = tmp_path / "weights.pth"
    target.write_bytes(b"old")
    code = f"""
import time
from mmsora.utils.atomic import atomic_path
with atomic_path({str(target)!r}) as temporary:
    temporary.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert target.read_bytes() == b"old"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"


def test_others_may_read_what_they_might_read_before(tmp_path):
    write_text(tmp_path / "ours", "")
    (tmp_path / "theirs").touch()
    ours, theirs = (stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("ours", "theirs"))
    assert ours == theirs


def test_text_and_json(tmp_path):
    write_text(tmp_path / "a.txt", "数字 7")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "数字 7"
    write_json(tmp_path / "a.json", {"prompt": "数字", "seed": 0})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"prompt": "数字", "seed": 0}
    assert "数字" in text
    assert text.endswith("}\n")


def test_an_object_that_is_no_json_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert (tmp_path / "a.json").read_text() == "1\n"

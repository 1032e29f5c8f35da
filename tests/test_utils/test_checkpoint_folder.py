"""Checkpoints as folders: what is in them, what is refused, and what a full disk leaves."""

import io
import os
import pickle
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from mmsora.utils import checkpoint_folder
from mmsora.utils.checkpoint import latest_checkpoint, load_checkpoint
from mmsora.utils.checkpoint_folder import (
    CheckpointFolder,
    is_whole,
    save_folder,
    save_folder_behind,
)
from mmsora.utils.user_error import UserError
from tests.ranks import start_ranks

CONTENT = {
    "meta": {"iter": 3, "classes": ("a", "b"), "nothing": None, "empty": {}},
    "state_dict": {
        "denoiser.head.weight": torch.randn(3, 5, generator=torch.manual_seed(0)),
        "denoiser.head.bias": torch.arange(3).bfloat16(),
        "scale": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 4, dtype=torch.long),
    },
    "ema_profiles": {"sigma_rel=0.05": {"denoiser.head.weight": torch.ones(3, 5)}},
    "rng": {0: {"cpu": torch.arange(7, dtype=torch.uint8)}},
    "schedulers": [{"last": torch.ones(2)}],
}


@pytest.fixture
def saved(tmp_path):
    save_folder(CONTENT, tmp_path / "run/iter_3")
    return tmp_path / "run/iter_3"


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        assert {*map(str, one)} == {*map(str, other)}
        return all(equal(value, other[str(key)]) for key, value in one.items())
    if isinstance(one, list):
        return all(map(equal, one, other))
    return type(one) is type(other) and one == other


# What is in it


def test_what_was_saved_is_read(saved):
    assert [path.name for path in saved.parent.iterdir()] == ["iter_3"]
    assert equal(CONTENT, load_checkpoint(saved))
    folder = CheckpointFolder(saved)
    assert folder.rest["meta"] == CONTENT["meta"]
    assert folder.parts == {"state_dict", "ema_profiles", "rng"}
    assert folder.named("state_dict")["denoiser.head.weight"].size == (3, 5)


def test_only_the_parts_asked_for_are_read(saved):
    content = load_checkpoint(saved, ["rng"])
    assert "state_dict" not in content
    assert content["rng"]["0"]["cpu"].tolist() == [*range(7)]
    assert content["meta"] == CONTENT["meta"]
    assert set(load_checkpoint(saved, [])) == {"meta", "schedulers"}


def test_tensors_are_filled_in_place_and_nothing_else(saved):
    weight, other = torch.zeros(5, 3).T, torch.zeros(3)
    CheckpointFolder(saved).read_into({"state_dict": {"denoiser.head.weight": weight}})
    assert torch.equal(weight, CONTENT["state_dict"]["denoiser.head.weight"])
    assert not other.any()
    with pytest.raises(ValueError, match="denoiser.head.weight"):
        CheckpointFolder(saved).read_into({"state_dict": {"denoiser.head.weight": torch.ones(3)}})


def test_another_one_of_its_name_is_replaced(saved):
    save_folder({"meta": {"iter": 4}, "ema": {"weight": torch.ones(1)}}, saved)
    assert set(load_checkpoint(saved)) == {"meta", "ema"}
    assert [path.name for path in saved.parent.iterdir()] == ["iter_3"]


def test_what_is_saved_behind_is_what_it_was(tmp_path):
    weight = torch.ones(1000, 1000)
    saving = save_folder_behind({"ema": {"weight": weight}, "meta": {}}, tmp_path / "iter_1")
    weight.zero_()
    assert saving.result() is None
    assert torch.equal(
        load_checkpoint(tmp_path / "iter_1")["ema"]["weight"], torch.ones(1000, 1000)
    )


# What is refused


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def poisoned(metadata, mark):
    """The metadata with something more than tensors in it, and what the error says."""
    yield Evil(mark), "mkdir"
    bytes_ = pickle.loads(metadata)
    bytes_.state_dict_metadata["state_dict/scale"] = BytesStorageMetadata()
    yield bytes_, "BytesStorageMetadata"
    nested = pickle.loads(metadata)
    nested.planner_data = {"a": [Evil(mark)]}
    yield nested, "mkdir"
    away = pickle.loads(metadata)
    for stored in away.storage_data.values():
        stored.relative_path = f"../{stored.relative_path}"
    yield away, "which is not in the folder"
    yield print, "builtins.print"


def test_metadata_that_would_run_code_is_refused(saved, tmp_path):
    metadata = (saved / ".metadata").read_bytes()
    for content, words in poisoned(metadata, tmp_path / "ran"):
        (saved / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=rf"iter_3 cannot be read: \.metadata asks .*{words}"):
            load_checkpoint(saved)
        assert not (tmp_path / "ran").exists()
        assert not is_whole(saved)
    (saved / ".metadata").write_bytes(metadata)
    assert is_whole(saved)


def test_shards_and_the_rest_run_no_code_either(saved, tmp_path):
    evil = io.BytesIO()
    torch.save(Evil(tmp_path / "ran"), evil)
    rest = (saved / "rest.pth").read_bytes()
    (saved / "rest.pth").write_bytes(evil.getvalue())
    with pytest.raises(UserError, match=r"iter_3 cannot be read: it holds more than tensors"):
        load_checkpoint(saved)
    (saved / "rest.pth").write_bytes(rest)

    (shard,) = saved.glob("*.distcp")
    with open(shard, "r+b") as file:  # in the place of the first tensor
        file.write(evil.getvalue())
    with pytest.raises(UserError, match=r"iter_3 cannot be read: .*"):
        load_checkpoint(saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [".metadata", "rest.pth", "__0_0.distcp"])
def test_half_a_checkpoint_is_told_by_what_is_missing(saved, name):
    size = (saved / name).stat().st_size
    os.truncate(saved / name, size - 1)
    assert not is_whole(saved)
    with pytest.raises(UserError, match=r"iter_3 cannot be read: "):
        load_checkpoint(saved)
    (saved / name).unlink()
    with pytest.raises(UserError, match=rf"iter_3 is not whole: {name} is missing$"):
        load_checkpoint(saved)


def test_a_file_in_it_is_told_from_the_checkpoint(saved):
    for name in (".metadata", "rest.pth", "__0_0.distcp"):
        with pytest.raises(UserError, match=r"is a part of the checkpoint .*iter_3; give the"):
            load_checkpoint(saved / name)


# A full disk


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(saved, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(checkpoint_folder.shutil, "disk_usage", lambda path: usage)
    words = r"iter_4 cannot be written by rank 0: No space left on device \(1,048,717 bytes needed"
    with pytest.raises(UserError, match=rf"{words}, 1,000 free\)$"):
        save_folder(CONTENT, saved.with_name("iter_4"))
    assert [path.name for path in saved.parent.iterdir()] == ["iter_3"]
    assert is_whole(saved)


def test_a_disk_that_is_full_at_last_leaves_the_old_checkpoint(saved, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for path in (saved, saved.with_name("iter_4")):
        with pytest.raises(UserError, match=r"cannot be written by rank 0: No space left on dev"):
            save_folder(CONTENT | {"meta": {}}, path)
        with pytest.raises(UserError, match="No space left"):
            save_folder_behind(CONTENT | {"meta": {}}, path).result()
    assert [path.name for path in saved.parent.iterdir()] == ["iter_3"]
    assert equal(CONTENT, load_checkpoint(saved))


# A kill


def killed_at(moment, path):
    """Save in a process that is killed before its n-th change of the disk; whether it was."""
    process = os.fork()
    if process == 0:
        left = [moment]

        def killing(change):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **kwargs)

            return call

        for name in ("open", "mkdir", "fsync", "replace", "unlink", "rmdir", "rename"):
            setattr(os, name, killing(getattr(os, name)))
        save_folder({"ema": {"weight": torch.full((3,), 2.0)}, "meta": {}}, path)
        os._exit(0)
    return os.waitpid(process, 0)[1] != 0


@pytest.mark.parametrize("is_there", [False, True], ids=["a new one", "one of its name"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, is_there):
    moment, newest = 0, set()
    while True:
        run = tmp_path / str(moment)
        for name in ("iter_3", "iter_4"):
            save_folder({"ema": {"weight": torch.ones(3)}, "meta": {}}, run / name)
        if is_there:
            save_folder({"ema": {"weight": torch.zeros(3)}, "meta": {}}, run / "iter_5")
        (run / ".iter_5.tmp").mkdir()
        (run / ".iter_5.tmp/__3_0.distcp").touch()  # of more processes, killed before
        was_killed = killed_at(moment, run / "iter_5")
        latest = latest_checkpoint(run)
        first, *same = load_checkpoint(latest)["ema"]["weight"].tolist()
        assert same == [first, first]
        newest.add((latest.name, first))
        if not was_killed:
            break
        moment += 1
    assert moment > 8
    # Between two names the one before it is the newest.
    assert newest == {("iter_4", 1.0), ("iter_5", 2.0)} | (
        {("iter_5", 0.0)} if is_there else set()
    )
    assert sorted(file.name for file in latest.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "rest.pth",
    ]


# Several processes


def test_four_processes_save_what_two_and_one_read(tmp_path):
    worker = Path(__file__).with_name("folder_worker.py")
    processes = start_ranks([sys.executable, worker, tmp_path], 4, tmp_path)
    codes = [process.wait(timeout=120) for process in processes]
    assert codes == [0] * 4, (tmp_path / "rank_0.txt").read_text()[-3000:]
    for name in ("iter_3", "iter_4"):
        content = load_checkpoint(tmp_path / name)
        assert content["meta"] == {"written_by": 0, "classes": ("a", "b")}
        assert [content["rng"][str(i)]["cpu"].tolist() for i in range(4)] == [
            [i] * 4 for i in range(4)
        ]
        sizes = {"rows": 6, "few": 2, "one": 1, "many": 9}
        for name, rows in sizes.items():
            tensor = content["state_dict"][name]
            assert len(tensor) == rows
            assert torch.equal(tensor.flatten(), torch.arange(float(tensor.numel())) + len(name))
        assert content["state_dict"]["whole"].tolist() == [1.5, 2.5]

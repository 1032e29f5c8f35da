"""Shards: what is read is what was written, whoever wrote it, and damage is noticed."""

import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pytest
import torch

from mmsora.utils.feature_store import FeatureStore, FeatureWriter, checksum
from mmsora.utils.user_error import UserError

ROWS, PER_SHARD = 23, 5
MANIFEST = {"rows": ROWS, "rows_per_shard": PER_SHARD, "vae": {"type": "Some", "scale": 0.5}}


def record(row, ragged=True):
    generator = torch.Generator().manual_seed(row)
    found = {
        "moments": torch.randn(2, 2, 3, 1, 4, 5, generator=generator),
        "half": torch.randn(7, generator=generator).half(),
        "number": torch.tensor(row),
    }
    if ragged:  # as the states of texts of different lengths, and clips of different sizes
        found["text"] = torch.randn(row % 4, 6, generator=generator).bfloat16()
        found["clip"] = torch.randn(2, 1 + row % 3, 4 + row % 2, generator=generator)
        found["mask"] = torch.ones(row % 4, dtype=torch.bool)
    return found


def write(root, rank=0, world=1, manifest=MANIFEST, shards=None):
    writer = FeatureWriter(root, manifest, rank, world)
    for shard in writer.missing() if shards is None else shards:
        writer.write(shard, [record(row) for row in writer.rows_of(shard)])
    return writer


def content(root):
    return {path.name: path.read_bytes() for path in Path(root).iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "whole"
    assert write(root).finish() == 0
    return root


def test_what_is_read_is_what_was_written(whole):
    store = FeatureStore(whole)
    assert len(store) == ROWS
    assert set(store.names) == set(record(0))
    for row in torch.randperm(ROWS).tolist():
        for key, value in record(row).items():
            found = store.read(key, row)
            assert found.dtype == value.dtype
            assert torch.equal(found, value), (key, row)


def test_a_part_is_a_part(whole):
    store = FeatureStore(whole)
    for row in (0, 7, 22):
        expected = record(row)
        assert torch.equal(store.read("moments", row, 1), expected["moments"][1])
        assert torch.equal(store.read("moments", row, 1, 0), expected["moments"][1, 0])
        assert torch.equal(store.read("clip", row, 1), expected["clip"][1])
    with pytest.raises(IndexError, match="no part 2 of 2"):
        store.read("moments", 0, 2)


def test_a_reader_passes_to_other_processes(whole):
    store = FeatureStore(whole)
    store.read("half", 3)
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.read("half", 3), record(3)["half"])


def test_no_more_files_are_open_than_a_few(tmp_path, monkeypatch):
    monkeypatch.setattr("mmsora.utils.feature_store.OPEN_FILES", 2)
    write(tmp_path).finish()
    store = FeatureStore(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for row in [*range(ROWS), *range(ROWS)]:
        assert store.read("number", row) == row
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    del store
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_processes_writes_the_same_bytes(whole, tmp_path, world):
    for rank in reversed(range(world)):
        writer = write(tmp_path, rank, world)
        assert writer.missing() == []
        assert (writer.finish() == 0) == (rank == 0)
    assert content(tmp_path) == content(whole)


def test_only_what_is_missing_is_written_again(whole, tmp_path):
    write(tmp_path).finish()
    (tmp_path / "shard-000002.safetensors").unlink()
    (tmp_path / ".shard-000002.123.tmp.safetensors").write_bytes(b"half of it")
    (tmp_path / ".shard-000001.123.tmp.safetensors").write_bytes(b"half of it")
    (tmp_path / ".manifest.123.json").write_bytes(b"{")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard*")}
    assert FeatureWriter(tmp_path, MANIFEST, 1, 2).missing() == []
    assert (tmp_path / ".shard-000002.123.tmp.safetensors").exists()  # another's
    assert not (tmp_path / ".shard-000001.123.tmp.safetensors").exists()
    writer = FeatureWriter(tmp_path, MANIFEST, 0, 2)
    assert writer.missing() == [2]
    assert writer.finish() == 1
    write(tmp_path, 0, 2).finish()
    assert content(tmp_path) == content(whole)
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())


def test_another_manifest_is_refused_and_the_difference_named(tmp_path):
    write(tmp_path, shards=[0])
    before = content(tmp_path)
    other = {**MANIFEST, "vae": {"type": "Some", "scale": 0.6}, "rows": 24}
    with pytest.raises(UserError, match="holds other features") as caught:
        FeatureWriter(tmp_path, other)
    assert "vae.scale: 0.5 -> 0.6" in str(caught.value)
    assert "rows: 23 -> 24" in str(caught.value)
    assert content(tmp_path) == before


def test_what_all_share(tmp_path):
    shared = {"null.text": torch.randn(3, 6).bfloat16()}
    FeatureWriter(tmp_path, MANIFEST, 1, 2).write_shared({})
    write(tmp_path).write_shared(shared)
    FeatureWriter(tmp_path, MANIFEST).finish()
    assert torch.equal(FeatureStore(tmp_path).shared()["null.text"], shared["null.text"])


# Damage


def test_a_flipped_bit_is_found(whole, tmp_path):
    write(tmp_path).finish()
    FeatureStore(tmp_path).verify()
    path = tmp_path / "shard-000003.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-000003\.safetensors: its content has changed"):
        FeatureStore(tmp_path).verify()


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:100], lambda data: data[:-1], lambda data: data + b"x"],
)
def test_a_file_of_another_length_is_no_shard(tmp_path, damage):
    write(tmp_path).finish()
    path = tmp_path / "shard-000001.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    store = FeatureStore(tmp_path)
    store.read("number", 0)
    with pytest.raises(UserError, match=r"shard-000001\.safetensors: no whole shard"):
        store.read("number", 6)


def test_what_is_no_store_or_not_complete_says_so(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        FeatureStore(tmp_path)
    write(tmp_path, shards=[0]).finish()
    with pytest.raises(UserError, match="has not come to its end"):
        FeatureStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="format 2, this version reads 1"):
        FeatureStore(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        FeatureStore(tmp_path)


def test_wrong_records_are_refused(tmp_path):
    writer = FeatureWriter(tmp_path, MANIFEST)
    with pytest.raises(ValueError, match="shard 4 has 3 samples, got 2"):
        writer.write(4, [record(0), record(1)])
    with pytest.raises(ValueError, match="the same keys"):
        writer.write(4, [record(0), record(1), record(2, ragged=False)])
    with pytest.raises(ValueError, match=r"number: samples have \[0, 1\] axes"):
        writer.write(4, [record(0), record(1), {**record(2), "number": torch.zeros(2)}])
    assert not list(tmp_path.glob("*shard*"))


def test_the_checksum_knows_names_types_shapes_and_values():
    one = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3).int()},
        {"a": torch.tensor([[0.0] * 3, [0.0, 0.0, 1e-30]])},
    ]
    assert len({checksum(tensors) for tensors in [one, *others]}) == 5
    assert checksum(one) == checksum({"a": torch.zeros(3, 2).T})


# Killed


def slow(root, rank, pipe):
    writer = FeatureWriter(root, MANIFEST, rank, 2)
    pipe.send("ready")
    for shard in writer.missing():
        writer.write(shard, [record(row) for row in writer.rows_of(shard)])
        time.sleep(0.01)
    writer.finish()


def test_killed_and_started_again_it_gives_the_same_bytes(whole, tmp_path):
    fork = multiprocessing.get_context("fork")
    for number in range(6):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=slow, args=(tmp_path, number % 2, theirs))
        process.start()
        ours.recv()
        time.sleep(number * 0.003)
        process.kill()
        process.join()
    for rank in range(2):
        write(tmp_path, rank, 2).finish()
    assert content(tmp_path) == content(whole)

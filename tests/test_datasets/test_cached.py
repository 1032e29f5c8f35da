"""Cached latents: samples as the dataset itself gives them, from shards and from npy files."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmsora.datasets import CachedLatents, EpochSampler, NpyLatents, stack_latents
from mmsora.utils.draws import Draws
from mmsora.utils.feature_store import FeatureWriter
from mmsora.utils.npy_store import NpyWriter
from mmsora.utils.user_error import UserError

SAMPLES, CLIPS = 9, 2
VAE = {"type": "Some", "weights": "abc"}


def moments(number, clip=0):
    generator = torch.Generator().manual_seed(100 * number + clip)
    return torch.randn(2, 2, 4, 3, 5, 6, generator=generator)  # flips, mean and std, c, t, h, w


def annotation(number, clip=0):
    known = {"label": number % 3, "path": f"{number}.png", "text": f"número {number}, {clip}"}
    return torch.tensor(list(json.dumps(known).encode()), dtype=torch.uint8)


def manifest(**changes):
    about = dict(layout="shards", rows=SAMPLES * CLIPS, rows_per_shard=4, samples=SAMPLES)
    about |= dict(clips=CLIPS, flip=0.3, seed=5, vae=VAE, classes=["a", "b", "c"])
    return about | changes


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("cached") / "latents"
    writer = FeatureWriter(root, manifest())
    for shard in writer.missing():
        places = [divmod(row, CLIPS) for row in writer.rows_of(shard)]
        records = [
            {
                "moments": moments(*place),
                "annotation": annotation(*place),
                "sample.states": torch.full((place[0], 2), place[0]),
            }
            for place in places
        ]
        writer.write(shard, records)
    assert writer.finish() == 0
    return root


def test_a_sample_is_its_epoch_s_clip_side_and_annotation(cache):
    dataset = CachedLatents(cache)
    assert len(dataset) == SAMPLES
    assert dataset.metainfo == {"classes": ("a", "b", "c")}
    assert dataset.latents_of == VAE
    sides = []
    for idx in range(5 * SAMPLES):
        epoch, number = divmod(idx, SAMPLES)
        side = int(Draws(5, [number], epoch).uniform("clip flip").item() < 0.3)
        data = dataset[idx]
        sample = data["data_samples"]
        assert torch.equal(data["inputs"], moments(number, epoch % CLIPS)[side])
        assert (sample.index, sample.label) == (idx, number % 3)
        assert sample.text == f"número {number}, {epoch % CLIPS}"
        assert torch.equal(sample.states, torch.full((number, 2), number))
        sides.append(side)
    assert 0.1 < np.mean(sides) < 0.5
    assert [data["data_samples"].index for data in dataset] == list(range(SAMPLES))
    with pytest.raises(IndexError, match="counted from 0"):
        dataset[-1]


def test_the_seed_of_flips_and_none_in_test_mode(cache):
    own, other, still = (
        CachedLatents(cache),
        CachedLatents(cache, seed=6),
        CachedLatents(cache, test_mode=True),
    )
    places = range(4 * SAMPLES)
    assert any(not torch.equal(own[i]["inputs"], other[i]["inputs"]) for i in places)
    for i in places:
        epoch, number = divmod(i, SAMPLES)
        assert torch.equal(still[i]["inputs"], moments(number, epoch % CLIPS)[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_loader(cache, workers):
    dataset = CachedLatents(cache)
    sampler = EpochSampler(dataset, seed=0)
    loader = DataLoader(dataset, 4, sampler=sampler, num_workers=workers, collate_fn=stack_latents)
    seen = []
    for _, batch in zip(range(9), loader, strict=False):
        assert batch["inputs"].shape == (4, 2, 4, 3, 5, 6)
        for inputs, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
            assert torch.equal(inputs, dataset[sample.index]["inputs"])
            seen.append(sample.index % SAMPLES)
    assert sorted(seen) == sorted(list(range(SAMPLES)) * 4)


# One file for each


@pytest.fixture
def npy(tmp_path):
    """As MiniSora-DiT's extract_features.py writes them."""
    for kind in ("features", "labels"):
        (tmp_path / f"imagenet256_{kind}").mkdir()
    for n in range(12):
        latent = np.full((1, 4, 3, 5), n, np.float32)
        np.save(tmp_path / f"imagenet256_features/{n}.npy", latent)
        np.save(tmp_path / f"imagenet256_labels/{n}.npy", np.array([n + 100]))
    return tmp_path


def test_npy_files_are_paired_by_name(npy):
    dataset = NpyLatents(npy)
    assert len(dataset) == 12
    assert dataset.latents_of == {}
    for idx in (0, 2, 10, 11, 13):
        data = dataset[idx]
        assert data["inputs"].shape == (1, 4, 1, 3, 5)
        assert data["inputs"].dtype == torch.float32
        assert (data["inputs"] == idx % 12).all()  # 10 comes after 9, not after 1
        sample = data["data_samples"]
        assert (sample.index, sample.label) == (idx, idx % 12 + 100)


@pytest.mark.parametrize("kind", ["features", "labels"])
def test_a_missing_partner_is_named(npy, kind):
    (npy / f"imagenet256_{kind}/3.npy").unlink()
    with pytest.raises(UserError, match=rf"imagenet256_{kind}/3\.npy: missing, its partner"):
        NpyLatents(npy)
    (npy / f"imagenet256_{kind}/10.npy").unlink()
    with pytest.raises(UserError, match=rf"imagenet256_{kind}/3\.npy and 1 more: missing"):
        NpyLatents(npy)


def test_files_that_are_no_latents_are_named(npy):
    (npy / "imagenet256_features/3.npy").write_bytes(b"half")
    np.save(npy / "imagenet256_features/4.npy", np.zeros((2, 4, 3, 5), np.float32))
    dataset = NpyLatents(npy)
    with pytest.raises(UserError, match=r"features/3\.npy: cannot be read"):
        dataset[3]
    with pytest.raises(UserError, match=r"features/4\.npy: a latent is \(1, c, h, w\), got \(2,"):
        dataset[4]
    with pytest.raises(UserError, match="imagenet512_features: no such folder"):
        NpyLatents(npy, name="imagenet512")
    (npy / "a_features").mkdir()
    with pytest.raises(UserError, match=r"a_features: no \.npy files"):
        NpyLatents(npy, name="a")


def test_what_we_write_can_be_read_by_others_and_by_us(tmp_path):
    about = manifest(layout="npy", rows=5, rows_per_shard=2, samples=5, clips=1)
    records = [{"moments": moments(n)[0, 0, :, :1], "annotation": annotation(n)} for n in range(5)]
    for rank in (1, 0):
        writer = NpyWriter(tmp_path, about, rank, 2)
        for shard in writer.missing():
            writer.write(shard, [records[row] for row in writer.rows_of(shard)])
        assert writer.missing() == []
    assert writer.finish() == 0
    dataset = NpyLatents(tmp_path)
    assert (len(dataset), dataset.latents_of) == (5, VAE)
    for n in range(5):
        latent = np.load(tmp_path / f"imagenet256_features/{n}.npy")
        label = np.load(tmp_path / f"imagenet256_labels/{n}.npy")
        assert (latent.shape, latent.dtype) == ((1, 4, 5, 6), np.float32)
        assert (label.shape, label.dtype, label.item()) == ((1,), np.int64, n % 3)
        assert torch.equal(dataset[n]["inputs"][0], records[n]["moments"])
    with pytest.raises(UserError, match="read it as NpyLatents"):
        CachedLatents(tmp_path)
    writer = NpyWriter(tmp_path / "clips", about)
    with pytest.raises(UserError, match="sample 0 has 3 frames: the npy layout is for images"):
        writer.write(
            0, [{"moments": moments(n)[0, 0], "annotation": annotation(n)} for n in (0, 1)]
        )
    nothing = torch.tensor(list(b"{}"), dtype=torch.uint8)
    with pytest.raises(UserError, match="sample 0 has no label"):
        writer.write(0, [{"moments": moments(0)[0, 0, :, :1], "annotation": nothing}] * 2)

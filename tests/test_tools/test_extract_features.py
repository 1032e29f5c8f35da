"""``tools/extract_features.py``: the loss from a cache is the loss, and nothing is lost."""

import json
import multiprocessing
import random
import re
import shutil
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from mmsora.apis import build_model
from mmsora.datasets import CachedLatents, NpyLatents
from mmsora.models import CLIPText, FrameVAE, IdentityVAE
from mmsora.registry import CONDITIONERS, DATASETS, RUNNERS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import write_video

TINY = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    block_out_channels=[8, 16],
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
)
IMAGES = 14
CLASSES = 3


@pytest.fixture(scope="module")
def extract_tool(tool):
    return tool("extract_features")


@pytest.fixture(scope="module")
def extract(extract_tool):
    return extract_tool.main


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Call it with a seed for the folder of a tiny VAE."""
    root = tmp_path_factory.mktemp("vae")

    def make(seed=0):
        path = root / f"tiny{seed}"
        if not path.exists():
            torch.manual_seed(seed)
            AutoencoderKL(**TINY).save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """ImageNet's layout: three classes of small random images."""
    root = tmp_path_factory.mktemp("images")
    for number in range(IMAGES):
        path = root / f"train/n{number % CLASSES}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 255, (3, 4, 3), np.uint8)).resize((20, 16)).save(path)
    return root


@pytest.fixture
def config(tiny_config, images, vae):
    """Call it for a config of images."""

    def make(seed=0, changes=None):
        cfg = tiny_config(
            {
                "model.denoiser.in_channels": 4,
                "model.denoiser.out_channels": 4,
                "model.denoiser.size": (1, 8, 8),
                "model.denoiser.num_classes": CLASSES,
                "model.conditioner.num_classes": CLASSES,
                "train_cfg.max_iters": 3,
                "param_scheduler.1.end": 6,
            },
        )
        cfg.model.vae = dict(type="FrameVAE", pretrained=vae(seed), config=TINY)
        cfg.train_dataloader.dataset = dict(
            type="ImageNetFolder",
            data_root=str(images),
            pipeline=[
                dict(type="LoadImage"),
                dict(type="ADMCenterCrop", size=16),
                dict(type="RandomFlip"),
                dict(type="PackVideo"),
            ],
        )
        cfg.train_dataloader.sampler = dict(type="EpochSampler")
        cfg.default_hooks.latent_cache = dict(type="LatentCacheHook")
        for key, value in (changes or {}).items():
            cfg.merge_from_dict({key: value})
        return cfg

    return make


def options(cfg, out, *more):
    path = out.parent / f"{cfg.experiment_name}.py"
    cfg.dump(path)
    few = ["--rows-per-shard", "4", "--batch-size", "3"]
    return [str(path), "--out", str(out), *few, *map(str, more)]


def content(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def from_cache(cfg, out, **more):
    cfg.train_dataloader.dataset = dict(type="CachedLatents", data_root=str(out), **more)
    return cfg


def losses_of(model, dataset, indices, step=3):
    batch = model.data_preprocessor(
        {key: [dataset[i][key] for i in indices] for key in ("inputs", "data_samples")}
    )
    loss = model.loss(**batch, draws=Draws(0, indices, step))
    return loss["loss_diffusion"]


# The loss


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("float16", 5e-3)])
def test_the_loss_is_that_of_the_files_in_every_epoch(
    extract, config, tmp_path, fill_weights, dtype, rtol
):
    cfg = config()
    extract(options(cfg, tmp_path / "cache", "--dtype", dtype))
    files, cached = DATASETS.build(cfg.train_dataloader.dataset), CachedLatents(tmp_path / "cache")
    model = build_model(cfg)
    fill_weights(model.denoiser)
    indices = [0, 7, 13, IMAGES + 3, 2 * IMAGES + 7, 9 * IMAGES]
    expected = losses_of(model, files, indices)
    model.train_on_latents(cached.latents_of)
    found = losses_of(model, cached, indices)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
    assert found.std() > 0.01
    for index in indices:
        one, other = (dataset[index]["data_samples"] for dataset in (files, cached))
        assert dict(one.items()) == dict(other.items())


def test_training_is_the_same_and_needs_no_vae(
    extract, config, tmp_path, scalars, monkeypatch, images
):
    cfg = config()
    extract(options(cfg, tmp_path / "cache"))
    cfg.work_dir = str(tmp_path / "files")
    RUNNERS.build(cfg).train()
    cached = from_cache(config(), tmp_path / "cache")
    cached.work_dir = str(tmp_path / "cached")
    monkeypatch.setattr(FrameVAE, "init_weights", lambda self: pytest.fail("weights were read"))
    runner = RUNNERS.build(cached)
    runner.train()
    assert all(weight.is_meta for weight in runner.model.vae.parameters())
    one, other = ([line["loss"] for line in scalars(tmp_path / n)] for n in ("files", "cached"))
    assert len(one) == 3
    assert one == pytest.approx(other, rel=1e-5)


def test_clips_of_several_epochs(extract, config, tmp_path):
    """Two epochs are kept as they are; the third is the first again."""
    for number in range(3):
        frames = np.arange(12, dtype=np.uint8).reshape(-1, 1, 1, 1) + np.uint8(50 * number)
        path = tmp_path / f"videos/{number}/{number}.png"
        path.parent.mkdir(parents=True)
        write_video(path, frames.repeat(16, axis=1).repeat(20, axis=2).repeat(3, axis=3), 8)
        path.rename(path.with_suffix(".avi"))  # FFmpeg looks at the content
    cfg = config(changes={"model.vae": dict(type="IdentityVAE", _delete_=True)})
    cfg.train_dataloader.dataset = dict(
        type="ClassFolderVideos",
        data_root=str(tmp_path / "videos"),
        pipeline=[
            dict(type="SampleFrames", num_frames=2),
            dict(type="DecodeVideo"),
            dict(type="PackVideo"),
        ],
    )
    extract(options(cfg, tmp_path / "cache", "--clips", 2))
    files, cached = DATASETS.build(cfg.train_dataloader.dataset), CachedLatents(tmp_path / "cache")
    assert (len(files), len(cached)) == (3, 3)
    for index in range(6):
        video = files[index]["inputs"] / 127.5 - 1
        assert torch.equal(cached[index]["inputs"], video[None])  # no deviation: one part
    assert any(not torch.equal(cached[i]["inputs"], cached[i + 3]["inputs"]) for i in range(3))
    assert torch.equal(cached[4]["inputs"], cached[10]["inputs"])


def test_the_vae_is_there_only_while_it_decodes(extract, config, tmp_path, monkeypatch, vae):
    cfg = config()
    extract(options(cfg, tmp_path / "cache"))
    cached = from_cache(config(), tmp_path / "cache")
    cached.custom_hooks = [dict(type="SampleHook", interval=2, labels=[0, 2])]
    read, decoded = [], []
    init, decode = FrameVAE.init_weights, FrameVAE.decode

    def counted(self):
        read.append(1)
        init(self)

    def looked_at(self, latent):
        decoded.append(next(self.parameters()).device.type)
        return decode(self, latent)

    monkeypatch.setattr(FrameVAE, "init_weights", counted)
    monkeypatch.setattr(FrameVAE, "decode", looked_at)
    runner = RUNNERS.build(cached)
    runner.train()
    assert decoded == ["cpu"] * 2
    assert len(read) == 3  # once to see that it can be
    assert all(weight.is_meta for weight in runner.model.vae.parameters())
    assert (tmp_path / "run/samples/iter_000003.png").exists()
    model = build_model(cached, tmp_path / "run/iter_3")  # to sample with
    assert not any(weight.is_meta for weight in model.vae.parameters())


def test_npy_files_train_too(extract, config, tmp_path, vae):
    cfg = config()
    extract(options(cfg, tmp_path / "npy", "--layout", "npy"))
    dataset = NpyLatents(tmp_path / "npy")
    files = DATASETS.build(cfg.train_dataloader.dataset)
    frames = FrameVAE(vae(), TINY)
    frames.init_weights()
    for i in range(IMAGES):  # its own flip and noise of epoch 0
        video = files[i]["inputs"][None] / 127.5 - 1
        expected = frames.encode(video, Draws(0, [i]))[0]
        torch.testing.assert_close(dataset[i]["inputs"][0], expected, rtol=1e-4, atol=1e-5)
        assert dataset[i]["data_samples"].label == files[i]["data_samples"].label
    cfg.train_dataloader.dataset = dict(type="NpyLatents", data_root=str(tmp_path / "npy"))
    RUNNERS.build(cfg).train()
    assert (tmp_path / "run/iter_3").exists()


# Refused


def test_what_does_not_fit_is_refused_and_named(extract, config, tmp_path, capsys):
    extract(options(config(), tmp_path / "cache"))
    before = content(tmp_path / "cache")
    for changes, named in (
        ({"model.vae.scale": 0.5}, "vae.scale: 0.18215 -> 0.5"),
        ({"train_dataloader.dataset.pipeline.1.size": 12}, "dataset.pipeline.1.size: 16 -> 12"),
        ({"train_dataloader.dataset.pipeline.2.prob": 0.1}, "flip: 0.5 -> 0.1"),
        ({"train_dataloader.dataset.indices": [1, 2]}, "samples: 14 -> 2"),
        ({"seed": 1}, "vae.weights: '"),
        ({"--dtype": "float16"}, "dtype: 'float32' -> 'float16'"),
    ):
        more = [word for item in changes.items() if item[0][0] == "-" for word in item]
        seed = changes.pop("seed", 0)
        changes = {} if more else changes
        capsys.readouterr()
        with pytest.raises(SystemExit):
            extract(options(config(seed, changes), tmp_path / "cache", *more))
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{tmp_path / 'cache'} holds other features" in error
        assert named in error
        assert "Set this back, or write to another folder" in error
    assert content(tmp_path / "cache") == before


def test_data_that_has_changed_since_needs_another_folder(extract, config, tmp_path, capsys):
    shutil.copytree(config().train_dataloader.dataset.data_root, tmp_path / "images")
    cfg = config(changes={"train_dataloader.dataset.data_root": str(tmp_path / "images")})
    extract(options(cfg, tmp_path / "cache"))
    folder = tmp_path / "images/train/n1"
    for change in (
        lambda: (folder / "1.png").rename(folder / "one.png"),
        lambda: shutil.copy(folder / "one.png", folder / "more.png"),
    ):
        change()
        capsys.readouterr()
        with pytest.raises(SystemExit):
            extract(options(cfg, tmp_path / "cache"))
        error = capsys.readouterr().err
        assert "list: files or annotations of the dataset have changed since" in error
        assert error.endswith(". Write to another folder, or delete this one\n")
    assert f"samples: {IMAGES} -> {IMAGES + 1}" in error


def test_a_cache_that_is_not_there(tmp_path):
    with pytest.raises(UserError) as caught:
        CachedLatents(str(tmp_path / "latents"))
    assert str(caught.value) == (
        f"{tmp_path}/latents/manifest.json: no such file; no features are stored here; make them: "
        f"python tools/extract_features.py CONFIG --out {tmp_path}/latents"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.vae.scale": 0.5}, r"scale=0\.18215 there, 0\.5 here"),
        ({"model.vae.config.latent_channels": 5}, "latent_channels"),
        ({"seed": 1}, "the weights in .*tiny1 are others"),
    ],
)
def test_a_run_refuses_another_vae(extract, config, tmp_path, changes, named):
    extract(options(config(), tmp_path / "cache"))
    seed = changes.pop("seed", 0)
    cfg = from_cache(config(seed, changes), tmp_path / "cache")
    with pytest.raises(UserError, match=f"made by another VAE than model.vae.*{named}"):
        RUNNERS.build(cfg).train()


def test_the_same_weights_under_another_name_are_the_same(extract, config, tmp_path, vae):
    extract(options(config(), tmp_path / "cache"))
    (tmp_path / "copy").symlink_to(vae())
    cfg = config(changes={"model.vae.pretrained": str(tmp_path / "copy")})
    RUNNERS.build(from_cache(cfg, tmp_path / "cache")).train()


def test_mistakes(extract, config, tmp_path, capsys):
    def error(cfg, *more):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            extract(options(cfg, tmp_path / "out", *more))
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert "--share is K/N" in error(config(), "--share", "2/2")
    assert "--layout npy keeps one clip" in error(config(), "--layout", "npy", "--clips", 2)
    moved = {
        "train_dataloader.dataset.pipeline": [
            dict(type="LoadImage"),
            dict(type="RandomFlip"),
            dict(type="ADMCenterCrop", size=16),
            dict(type="PackVideo"),
        ]
    }
    assert "must stand just before PackVideo" in error(config(changes=moved))
    nested = config()
    inner = nested.train_dataloader.dataset
    nested.train_dataloader.dataset = dict(type="Mixture", datasets=[inner, inner])
    assert "extract each by itself" in error(nested)
    digits = config(
        changes={
            "model.vae": dict(type="IdentityVAE", _delete_=True),
            "train_dataloader.dataset": dict(type="MovingDigits", length=4, _delete_=True),
            "train_dataloader.sampler": dict(type="InfiniteSampler", _delete_=True),
        }
    )
    assert "MovingDigits is the same every epoch" in error(digits, "--clips", 2)
    broken = config(changes={"model.vae.scale": 1e6})
    assert "is not finite in torch.float16" in error(broken, "--dtype", "float16")
    assert "--verify" not in error(config(), "--verify")


def test_loss_of_latents_that_nobody_compared(config):
    model = build_model(config())
    with pytest.raises(UserError, match="LatentCacheHook"):
        model(torch.zeros(1, 2, 4, 1, 8, 8), [])


# Killed, and several at once


@pytest.fixture
def start(extract):
    """Call it with a command line to run the tool in a process of its own."""
    fork = multiprocessing.get_context("fork")

    def call(words):
        process = fork.Process(target=extract, args=(words,))
        process.start()
        return process

    return call


def test_killed_at_ten_moments_nothing_is_lost(extract, start, config, tmp_path):
    small, rng = ["--batch-size", 1, "--rows-per-shard", 1], random.Random(0)
    begin = time.perf_counter()
    extract(options(config(), tmp_path / "whole", *small))
    whole = time.perf_counter() - begin
    words, killed = options(config(), tmp_path / "killed", *small), 0
    for _ in range(10):
        process = start(words)
        process.join(rng.uniform(0.1, 0.6) * whole)
        killed += process.exitcode is None
        process.kill()
        process.join()
    assert killed >= 3
    extract(words)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    extract([*words, "--verify"])


def test_two_processes_make_every_sample_once(extract, start, config, tmp_path, monkeypatch):
    extract(options(config(), tmp_path / "one"))
    words = options(config(), tmp_path / "two")
    pair = [start([*words, "--share", f"{k}/2"]) for k in range(2)]
    for process in pair:
        process.join()
        assert process.exitcode == 0
    assert content(tmp_path / "two") == content(tmp_path / "one")
    shards = sorted((tmp_path / "two").glob("shard*"))
    assert sum(len(load_file(shard)["moments"]) for shard in shards) == IMAGES
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    extract(options(config(), tmp_path / "third"))
    names = {path.name for path in (tmp_path / "third").glob("shard*")}
    assert names == {"shard-000001.safetensors"}
    assert not (tmp_path / "third/index.json").exists()


def test_it_says_how_fast_it_is_and_reads_in_workers(extract, config, tmp_path, capsys):
    extract(options(config(), tmp_path / "out", "--workers", 2))
    told = capsys.readouterr().out
    assert f"{IMAGES} of {IMAGES} images, " in told
    assert " images/s" in told
    assert f"{tmp_path / 'out'}: {IMAGES} samples, " in told


# Texts

CAPTIONS = ["a cat", "the fox", "dogs run"]
LENGTH, WIDTH = 9, 12
CLIP_TEXT = "mmsora.models.text_encoders.clip_text.CLIPText"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Call it with a seed for the folder of a CLIP of random weights, which reads letters."""
    root = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]

    def make(seed=0):
        path = root / f"tiny{seed}"
        if not path.exists():
            torch.manual_seed(seed)
            model = CLIPTextModel(CLIPTextConfig(
                vocab_size=len(words), hidden_size=WIDTH, intermediate_size=16,
                num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=LENGTH,
                bos_token_id=0, eos_token_id=1, pad_token_id=1,
            ))  # fmt: skip
            for weight in model.parameters():
                torch.nn.init.normal_(weight, std=0.3)
            model.save_pretrained(path)
            (path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
            (path / "merges.txt").write_text("#version: 0.2\n")
        return str(path)

    return make


@pytest.fixture
def text_config(config, images, clip):
    """Call it for a config of images with captions."""
    files = sorted(images.rglob("*.png"))
    lines = [
        json.dumps({"path": str(path.relative_to(images)), "text": CAPTIONS[i % 3]})
        for i, path in enumerate(files)
    ]
    (images / "list.jsonl").write_text("\n".join(lines))

    def make(seed=0, prompts=("a fox", "cats"), **encoder):
        cfg = config()
        cfg.model.denoiser.num_classes = 0
        cfg.model.denoiser.text = (LENGTH, WIDTH)
        encoder = dict(type=CLIP_TEXT, folder=clip(seed), length=LENGTH, width=WIDTH) | encoder
        cfg.model.conditioner = dict(type="TextConditioner", encoder=encoder, drop_prob=0.7)
        cfg.train_dataloader.dataset.type = "AnnotatedVideos"
        cfg.train_dataloader.dataset.ann_file = "list.jsonl"
        cfg.custom_hooks = [dict(type="SampleHook", interval=2, prompts=list(prompts))]
        return cfg

    return make


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("float16", 5e-3)])
def test_the_loss_of_texts_is_that_of_the_files(
    extract, text_config, tmp_path, fill_weights, dtype, rtol
):
    cfg = text_config()
    extract(options(cfg, tmp_path / "cache", "--dtype", dtype))
    files, cached = DATASETS.build(cfg.train_dataloader.dataset), CachedLatents(tmp_path / "cache")
    model = build_model(cfg)
    fill_weights(model.denoiser)
    indices = [0, 7, 13, IMAGES + 3, 2 * IMAGES + 7, 9 * IMAGES]
    dropped = Draws(0, indices, 3).uniform("drop condition") < 0.7
    assert 0 < dropped.sum() < len(indices)
    expected = losses_of(model, files, indices)
    model.train_on_latents(cached.latents_of)
    model.conditioner.train_on_embeddings(cached.texts_of, cached.texts())
    found = losses_of(model, cached, indices)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
    for sample in (cached[i]["data_samples"] for i in indices):
        states, mask = model.conditioner.encoder([sample.text])
        torch.testing.assert_close(sample.text_embedding, states[0], rtol=rtol, atol=rtol)
        assert torch.equal(sample.text_mask, mask[0])
    assert set(cached.texts()) == {"", "a fox", "cats"}


def test_training_and_sampling_need_no_text_encoder(
    extract, text_config, tmp_path, scalars, monkeypatch
):
    cfg = text_config()
    extract(options(cfg, tmp_path / "cache"))
    cfg.work_dir = str(tmp_path / "files")
    RUNNERS.build(cfg).train()
    cached = from_cache(text_config(), tmp_path / "cache")
    cached.work_dir = str(tmp_path / "cached")
    with monkeypatch.context() as patch:
        patch.setattr(CLIPText, "init_weights", lambda self: pytest.fail("weights were read"))
        RUNNERS.build(cached).train()
    one, other = ([line["loss"] for line in scalars(tmp_path / n)] for n in ("files", "cached"))
    assert len(one) == 3
    assert one == pytest.approx(other, rel=1e-5)
    for name in ("iter_000002.png", "iter_000003.png"):
        sheets = [tmp_path / folder / "samples" / name for folder in ("files", "cached")]
        first, second = (np.asarray(Image.open(sheet)).astype(int) for sheet in sheets)
        assert np.abs(first - second).max() <= 1
    model = build_model(cached, tmp_path / "cached/iter_3")  # to sample any text with
    model.predict([VideoSample(index=0, text="some other")])


def test_other_prompts_are_added_and_nothing_else_is_made(extract, text_config, tmp_path):
    extract(options(text_config(), tmp_path / "cache"))
    cached = from_cache(text_config(prompts=["dogs"]), tmp_path / "cache")
    with pytest.raises(UserError, match="the cache has no embedding of 'dogs'; run tools/extr"):
        RUNNERS.build(cached).train()
    before = content(tmp_path / "cache")
    extract(options(text_config(), tmp_path / "cache"))
    assert content(tmp_path / "cache") == before
    extract(options(text_config(prompts=["dogs"]), tmp_path / "cache"))
    after = content(tmp_path / "cache")
    assert {name for name in after if after[name] != before[name]} == {"shared.safetensors"}
    assert set(CachedLatents(tmp_path / "cache").texts()) == {"", "dogs"}
    (tmp_path / "cache/shared.safetensors").unlink()
    with pytest.raises(UserError, match="no embedding of the empty text; run"):
        CachedLatents(tmp_path / "cache").texts()


def test_another_text_encoder_is_refused(extract, text_config, tmp_path, clip, capsys):
    extract(options(text_config(), tmp_path / "cache"))
    with pytest.raises(SystemExit):
        extract(options(text_config(1), tmp_path / "cache"))
    assert "text.weights: '" in capsys.readouterr().err
    for cfg, named in (
        (text_config(1), "the weights in .*tiny1 are others"),
        (text_config(length=7), "length=9 there, 7 here"),
    ):
        with pytest.raises(UserError, match=f"by another text encoder than model.*{named}"):
            RUNNERS.build(from_cache(cfg, tmp_path / "cache")).train()
    (tmp_path / "copy").symlink_to(clip())
    same = from_cache(text_config(folder=str(tmp_path / "copy")), tmp_path / "cache")
    RUNNERS.build(same).train()


@pytest.fixture
def encoder_of(extract_tool, tmp_path):
    """Call it with a config for its conditioner, and for what encodes samples as they are."""

    def make(cfg):
        args = extract_tool.parse_args(options(cfg, tmp_path / "out"))
        conditioner = extract_tool.conditioner_of(cfg, args)
        conditioner.init_weights()
        return conditioner, extract_tool.Encoder(cfg, args, IdentityVAE(), conditioner, 0.0, 0)

    return make


def sample_of(**known):
    inputs = torch.zeros(3, 3, 4, 6, dtype=torch.uint8)
    return [{"inputs": inputs, "data_samples": VideoSample(**known)}]


def test_mistakes_with_texts(extract, text_config, encoder_of, tmp_path, capsys):
    def error(cfg, *more):
        with pytest.raises(SystemExit):
            extract(options(cfg, tmp_path / "out", *more))
        return capsys.readouterr().err

    assert "holds no texts" in error(text_config(), "--layout", "npy")
    for known in ({}, {"text": "cats", "num_images": 1}):  # found late: no list shows them
        with pytest.raises(UserError, match="sample 3: it, or an image beside it, has no text"):
            encoder_of(text_config())[1](sample_of(index=3, **known))


@pytest.fixture
def refused(extract, text_config, images, tmp_path, capsys, monkeypatch):
    """Call it with entries of the list that are changed for why it is refused, with no work."""
    entries = [json.loads(line) for line in (images / "list.jsonl").read_text().split("\n")]

    def error(change, drop=(), **dataset):
        changed = [change(dict(entry), number) for number, entry in enumerate(entries)]
        (images / "list.jsonl").write_text("\n".join(map(json.dumps, changed)))
        cfg = text_config()
        cfg.train_dataloader.dataset.update(dataset)
        for key in drop:
            del cfg.train_dataloader.dataset[key]
        for part in (CLIPText, FrameVAE):
            monkeypatch.setattr(part, "init_weights", lambda _: pytest.fail("weights were read"))
        capsys.readouterr()
        with pytest.raises(SystemExit):
            extract(options(cfg, tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        found = capsys.readouterr().err
        assert found.count("\n") == 1
        return found

    return error


class Listed:
    """A list of which the pipeline refuses, or gives texts to, some that have none."""

    def __init__(self, texts, made):
        self.texts, self.made = texts, made

    def __len__(self):
        return len(self.texts)

    def get_data_info(self, idx):
        return {"path": str(idx), "text": self.texts[idx]}

    def __getitem__(self, idx):
        sample = VideoSample(index=idx, **self.made[idx])
        return {"inputs": torch.zeros(3, 1, 4, 4), "data_samples": sample}


@pytest.mark.parametrize("texts", [(None, None, None), ("a cat", None, None)])
def test_texts_that_a_pipeline_gives_and_samples_that_it_refuses(extract_tool, text_config, texts):
    conditioner = CONDITIONERS.build(text_config().model.conditioner)
    given, skipped = dict(text="a fox"), dict(text="cats", weight=0.0)
    extract_tool.check_texts(Listed(texts, [given] * 3), conditioner)
    extract_tool.check_texts(Listed(texts, [given, skipped, skipped]), conditioner)
    extract_tool.check_texts(Listed(texts, [{}] * 3), None)  # of a model without texts
    with pytest.raises(UserError, match="sample 2: no text|Listed gives no captions; take"):
        extract_tool.check_texts(Listed(texts, [skipped, skipped, {}]), conditioner)


@pytest.mark.parametrize("text", ["", None, []])
def test_captions_that_lack_are_found_before_anything_is_encoded(refused, images, text):
    found = refused(lambda entry, n: entry | ({"text": text} if n in (5, IMAGES - 1) else {}))
    assert re.search(
        rf"{images}/train/n\d/\d+\.png: no text to embed, as in 2 of {IMAGES} samples \(an empty "
        rf"caption counts as none\); write captions for them, or take them out of {images}/list",
        found,
    )
    assert json.loads((images / "list.jsonl").read_text().split("\n")[5])["path"] in found


def test_lists_without_any_caption(refused, images):
    def told(entry, _):
        return {"path": entry["path"], "description": entry["text"]}

    fix = "; name one with train_dataloader.dataset.columns.text=NAME\n"
    found = refused(told)
    assert f"{images}/list.jsonl: no caption column among description, path{fix}" in found
    assert "no caption column among path, text" in refused(
        lambda entry, _: entry, columns={"text": None}
    )
    found = refused(lambda entry, _: entry | {"text": ""})
    assert f"no caption in its column text, among path, text{fix}" in found


def test_data_without_captions(refused):
    found = refused(lambda entry, _: entry, ["ann_file"], type="ImageNetFolder")
    assert "train_dataloader.dataset: ImageNetFolder gives no captions; take data" in found


def test_texts_of_images_beside_a_clip_are_embedded(encoder_of, text_config):
    conditioner, encoder = encoder_of(text_config())
    sample = dict(text="a cat", num_images=2, image_texts=["fox", "dogs"])
    record = encoder(sample_of(index=0, **sample))[0]
    states, mask = conditioner.encoder(["a cat", "fox", "dogs"])
    torch.testing.assert_close(record["sample.text_embedding"], states[0])
    assert torch.equal(record["sample.text_mask"], mask[0])
    torch.testing.assert_close(record["sample.image_text_embeddings"], states[1:])


def test_a_mixture_of_caches_with_and_without_texts_is_refused(
    extract, config, text_config, tmp_path
):
    extract(options(config(), tmp_path / "without"))
    extract(options(text_config(), tmp_path / "cache"))
    cfg = text_config()
    parts = [dict(type="CachedLatents", data_root=str(tmp_path / n)) for n in ("cache", "without")]
    cfg.train_dataloader.dataset = dict(type="Mixture", datasets=parts)
    with pytest.raises(UserError, match="without has no embeddings of texts and other parts"):
        RUNNERS.build(cfg).train()

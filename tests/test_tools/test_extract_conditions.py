"""What conditioners see in clips is cached with the latents, so that stage B needs no pixels."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from mmsora.apis import build_model
from mmsora.datasets import CachedLatents
from mmsora.models.conditioners.looking import lookers
from mmsora.models.vaes.cascade_networks import EfficientNetEncoder, StageA
from mmsora.registry import CONDITIONERS, DATASETS, RUNNERS
from mmsora.structures.video_sample import OF_IMAGES
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError

STAGE_A = dict(width=8, depth=1, channels=4, codes=1)
COMPRESSOR = dict(
    parts=[[True, 1, 1, 4, 1], [True, 2, 2, 4, 1], [True, 2, 2, 6, 1]], width=8, channels=3
)
SIZE, FILES, CLASSES, EMBEDDED = (16, 24), 9, 3, 10
CLIPS, FRAMES = 5, 3


@pytest.fixture(scope="module")
def main(tool):
    return tool("extract_features").main


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Call it with a part and a seed for the file or folder of its weights."""
    root = tmp_path_factory.mktemp("weights")

    def make(part, seed=0):
        path = root / f"{part}{seed}"
        torch.manual_seed(seed)
        if part == "clip":
            sizes = dict(hidden_size=16, intermediate_size=24, projection_dim=EMBEDDED)
            sizes |= dict(num_hidden_layers=1, num_attention_heads=2, image_size=12, patch_size=4)
            model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes))
            model.save_pretrained(path)
            return str(path)
        network = StageA(**STAGE_A) if part == "stage_a" else EfficientNetEncoder(**COMPRESSOR)
        path = path.with_suffix(".safetensors")
        save_file(network.eval().state_dict(), path)
        return str(path)

    return make


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(FILES):
        path = root / f"train/n{number % CLASSES}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (4, 6, 3), np.uint8)
        Image.fromarray(pixels).resize(SIZE[::-1]).save(path)
    return str(root)


@pytest.fixture
def config(tiny_config, images, weights):
    """Call it for a stage B that is told a class, the compressor's latent and a picture."""

    def make(seed=0, flips=True, **effnet):
        compressor = dict(
            type="CascadeCompressor",
            pretrained=weights("compressor", seed),
            config=COMPRESSOR,
        )
        parts = dict(
            label=dict(type="LabelConditioner", num_classes=CLASSES),
            effnet=dict(
                type="LatentConditioner", encoder=compressor, channels=3, name="effnet", **effnet
            ),
            image=dict(
                type="ImageConditioner",
                encoder=dict(type="CLIPImage", folder=weights("clip"), width=EMBEDDED),
                drop_prob=0.3,
            ),
        )
        cfg = tiny_config({"train_cfg.max_iters": 3, "param_scheduler.1.end": 6})
        cfg.model.vae = dict(type="CascadeStageA", pretrained=weights("stage_a"), config=STAGE_A)
        cfg.model.conditioner = dict(type="SeveralConditioner", parts=parts)
        cfg.model.denoiser = dict(
            type="StableCascade",
            in_channels=4,
            out_channels=4,
            size=(1, SIZE[0] // 4, SIZE[1] // 4),
            levels=[dict(width=8, depth=1), dict(width=8, depth=1, heads=2)],
            conditions=dict(width=8, pooled=6, effnet=3, image=EMBEDDED),
            strided=True,
            num_classes=CLASSES,
        )
        steps = [dict(type="LoadImage"), dict(type="RandomFlip"), dict(type="PackVideo")]
        if not flips:
            del steps[1]
        cfg.train_dataloader.dataset = dict(
            type="ImageNetFolder", data_root=images, pipeline=steps
        )
        cfg.train_dataloader.sampler = dict(type="EpochSampler")
        return cfg

    return make


@pytest.fixture
def extract(main, tmp_path):
    """Call it with a config for the folder of its cache."""

    def run(cfg, name="cache", *more):
        path = tmp_path / f"{name}.py"
        cfg.dump(path)
        main([str(path), "--out", str(tmp_path / name), "--rows-per-shard", "4", *more])
        return str(tmp_path / name)

    return run


def from_cache(cfg, folder, work_dir=None):
    cfg.train_dataloader.dataset = dict(type="CachedLatents", data_root=folder)
    cfg.work_dir = work_dir or cfg.work_dir
    return cfg


def losses_of(model, dataset, indices):
    batch = {key: [dataset[i][key] for i in indices] for key in ("inputs", "data_samples")}
    loss = model.loss(**model.data_preprocessor(batch), draws=Draws(0, indices, 3))
    return loss["loss_diffusion"]


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("float16", 5e-3)])
def test_the_loss_is_that_of_the_files_on_either_side(config, extract, fill_weights, dtype, rtol):
    cfg = config()
    cached = CachedLatents(extract(cfg, "cache", "--dtype", dtype))
    files = DATASETS.build(cfg.train_dataloader.dataset)
    model = build_model(cfg)
    fill_weights(model.denoiser)
    indices = [0, 5, FILES + 3, 2 * FILES + 5, 9 * FILES, 3]
    expected = losses_of(model, files, indices)
    model.train_on_latents(cached.latents_of)
    for part in lookers(model.conditioner):
        part.train_on_seen(cached.seen_by[part.field])
    torch.testing.assert_close(losses_of(model, cached, indices), expected, rtol=rtol, atol=0)
    sides = [cached[index]["data_samples"] for index in (5, FILES + 5, 2 * FILES + 5)]
    for field in ("latent", "image_embedding"):
        assert len({side.get(field).numpy().tobytes() for side in sides}) == 2


def test_what_the_denoiser_is_told_matters_to_the_loss(config, extract, fill_weights):
    cfg = config()
    cached = CachedLatents(extract(cfg))
    model = build_model(cfg)
    fill_weights(model.denoiser)
    model.train_on_latents(cached.latents_of)
    plain = losses_of(model, cached, range(FILES))
    for field in ("latent", "image_embedding"):
        batch = [cached[i] for i in range(FILES)]
        for item in batch:
            setattr(item["data_samples"], field, 1 - item["data_samples"].get(field))
        assert (losses_of(model, batch, range(FILES)) != plain).sum() > FILES / 3


@pytest.fixture
def joint_config(config, tmp_path):
    """A config of stage B with temporal layers, of clips with two images beside each."""
    for number in range(CLIPS):
        path = tmp_path / f"clips/n{number % CLASSES}/{number}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(100 + number).integers(0, 255, (FRAMES, 4, 6, 3), np.uint8)
        first, *rest = (Image.fromarray(frame).resize(SIZE[::-1]) for frame in pixels)
        first.save(path, save_all=True, append_images=rest)
    cfg = config(flips=False)
    parts = cfg.model.conditioner.parts
    state = load_file(parts.effnet.encoder.pretrained)
    state["mapper.1.running_var"].zero_()  # untrained, it makes nearly the same of everything
    parts.effnet.encoder.pretrained = str(tmp_path / "compressor.safetensors")
    save_file(state, parts.effnet.encoder.pretrained)
    cfg.model.denoiser = dict(
        type="ImageToVideo",
        image=cfg.model.denoiser,
        after={"down_blocks[.]1[.]2": 8},
        layout="(b t) c h w",
        frames=FRAMES,
        layer=dict(heads=2),
    )
    steps = [dict(type="SampleFrames", num_frames=FRAMES), dict(type="DecodeVideo")]
    cfg.train_dataloader.dataset = dict(
        type="JointImages",
        videos=dict(
            type="ClassFolderVideos",
            data_root=str(tmp_path / "clips"),
            pipeline=[*steps, dict(type="PackVideo")],
        ),
        images=cfg.train_dataloader.dataset,
        num_images=2,
    )
    return cfg


def test_what_is_seen_in_images_beside_a_clip_is_cached(joint_config, extract, fill_weights):
    cfg = joint_config
    cached = CachedLatents(extract(cfg, "cache", "--clips", "2"))
    files = DATASETS.build(cfg.train_dataloader.dataset)
    model = build_model(cfg)
    fill_weights(model.denoiser)
    indices = [0, 4, CLIPS + 1, 2 * CLIPS - 1]  # two epochs, with other images beside each clip
    batch = {key: [files[i][key] for i in indices] for key in ("inputs", "data_samples")}
    data = model.data_preprocessor(batch)
    told = [cached[i]["data_samples"] for i in indices]
    assert [sample.num_images for sample in told] == [2] * 4
    for part in lookers(model.conditioner):
        seen = part.see_all(data["inputs"], data["data_samples"])
        assert set(seen) == {part.field, OF_IMAGES[part.field]}
        for field, values in seen.items():
            stored = torch.stack([sample.get(field) for sample in told])
            assert stored.std(0).mean() > 0.1
            torch.testing.assert_close(stored, torch.stack(list(values)), rtol=1e-5, atol=1e-5)
    expected = losses_of(model, files, indices)
    model.train_on_latents(cached.latents_of)
    for part in lookers(model.conditioner):
        part.train_on_seen(cached.seen_by[part.field])
    found = losses_of(model, cached, indices)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    others = {i: cached[i] for i in indices}
    for item in others.values():
        item["data_samples"].image_latents = item["data_samples"].image_latents.flip(0)
    assert (losses_of(model, others, indices) - found).abs().max() > 1e-3 * found.max()


def test_training_is_the_same_and_needs_no_encoder(
    config, extract, tmp_path, scalars, monkeypatch
):
    folder = extract(config(flips=False))
    cfg = config(flips=False)
    cfg.work_dir = str(tmp_path / "files")
    RUNNERS.build(cfg).train()
    cached = from_cache(config(flips=False), folder, str(tmp_path / "cached"))
    for kind in ("CascadeCompressor", "CascadeStageA"):
        monkeypatch.setattr(
            f"mmsora.models.vaes.cascade_codec.{kind}.init_weights",
            lambda self: pytest.fail("weights were read"),
        )
    runner = RUNNERS.build(cached)
    runner.train()
    parts = {part.field: part.encoder for part in lookers(runner.model.conditioner)}
    assert all(weight.is_meta for weight in parts["latent"].parameters())
    assert parts["image_embedding"].model is None
    own = {id(weight) for weight in runner.model.parameters()}
    groups = runner.optim_wrapper.param_groups
    assert all(id(weight) in own for group in groups for weight in group["params"])
    one, other = ([line["loss"] for line in scalars(tmp_path / n)] for n in ("files", "cached"))
    assert len(one) == 3
    assert one == pytest.approx(other, rel=1e-5)


def test_another_encoder_or_another_scale_is_refused(config, extract, weights):
    folder = extract(config(0))
    for cfg, named in (
        (config(1), "the weights in .*compressor1.safetensors are others"),
        (config(0, smallest=0.5), "smallest=1.0 there, 0.5 here"),
    ):
        with pytest.raises(UserError, match=f"the cache's latent was made by another.*{named}"):
            RUNNERS.build(from_cache(cfg, folder)).train()


def test_the_same_weights_in_another_place_are_taken(config, extract, tmp_path):
    cached, cfg = CachedLatents(extract(config())), config()
    effnet, image = (cfg.model.conditioner.parts[name].encoder for name in ("effnet", "image"))
    effnet.pretrained = str(shutil.copy(effnet.pretrained, tmp_path / "moved.safetensors"))
    image.folder = str(shutil.copytree(image.folder, tmp_path / "moved"))
    parts = lookers(CONDITIONERS.build(cfg.model.conditioner))
    assert {part.field for part in parts} == {"latent", "image_embedding"}
    for part in parts:
        made_by = cached.seen_by[part.field]
        part.train_on_seen(made_by)
        with pytest.raises(UserError, match="the weights in .*moved.* are others"):
            part.train_on_seen(made_by | {"weights": "of another"})


def test_a_cache_without_what_the_model_is_told(config, extract):
    plain = config()
    del plain.model.conditioner.parts["effnet"]
    folder = extract(plain)
    with pytest.raises(UserError, match="cache has no latent of its clips.* extract them"):
        RUNNERS.build(from_cache(config(), folder)).train()


def test_each_epoch_that_is_kept_is_shrunk_by_its_own(config, extract):
    cached = CachedLatents(extract(config(smallest=0.5), "cache", "--clips", "2"))
    (one, flip), (other, _) = (
        (cached[epoch * FILES]["data_samples"].latent, cached._store.read("seen.latent", epoch))
        for epoch in (0, 1)
    )
    assert flip.shape == (2, 3, 1, 2, 3)
    assert not torch.equal(one, other)


def test_epochs_that_differ_in_nothing_else_are_shrunk_differently(config, extract):
    store = CachedLatents(
        extract(config(flips=False, smallest=0.5), "cache", "--clips", "2")
    )._store
    for row in range(0, 2 * FILES, 2):  # both epochs of a picture
        one, other = (store.read("moments", row + epoch) for epoch in (0, 1))
        assert torch.equal(one, other)
    seen = [[store.read("seen.latent", 2 * i + epoch) for i in range(FILES)] for epoch in (0, 1)]
    differ = [not torch.equal(one, other) for one, other in zip(*seen, strict=True)]
    assert sum(differ) > FILES / 2


def test_npy_files_have_no_place_for_it(config, extract, capsys):
    with pytest.raises(SystemExit):
        extract(config(), "npy", "--layout", "npy")
    assert "--layout npy holds no latent, image_embedding" in capsys.readouterr().err

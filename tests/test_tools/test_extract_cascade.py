"""The compressor's latents of StableCascade, computed once, train its temporal layers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmsora.datasets import CachedLatents, MovingDigits
from mmsora.engine import LatentCacheHook
from mmsora.engine.hooks import latent_cache_hook
from mmsora.models.vaes.cascade_codec import CascadeCompressor
from mmsora.models.vaes.cascade_networks import EfficientNetEncoder
from mmsora.registry import DENOISERS, MODELS, RUNNERS
from mmsora.utils.checkpoint import load_checkpoint
from mmsora.utils.config_check import apply_overrides
from mmsora.utils.draws import Draws

CODEC = dict(
    parts=[[True, 1, 1, 4, 1], [True, 2, 2, 4, 1], [True, 2, 2, 6, 1]], width=8, channels=3
)
FRAMES, SIDE, CLIPS = 3, 24, 5
LATENT = (3, FRAMES, 3, 3)


@pytest.fixture
def config(tiny_config, tmp_path, fill_weights):
    """Call it with a dataset for a small stage C with temporal layers, frozen but for these."""
    weights = str(tmp_path / "encoder.safetensors")
    save_file(fill_weights(EfficientNetEncoder(**CODEC)).state_dict(), weights)

    def make(dataset):
        cfg = tiny_config()
        image = dict(
            type="StableCascade",
            in_channels=3,
            out_channels=3,
            size=(1, 3, 3),
            levels=[dict(width=8, depth=1, heads=2)],
            conditions=dict(width=8, pooled=6),
            num_classes=10,
        )
        apply_overrides(
            cfg,
            {
                "model.denoiser": dict(
                    type="ImageToVideo",
                    image=image,
                    after={"(down|up)_blocks[.]0[.]2": 8},
                    layout="(b t) c h w",
                    frames=FRAMES,
                    layer=dict(heads=2),
                ),
                "model.vae": dict(type="CascadeCompressor", pretrained=weights, config=CODEC),
                "train_dataloader.dataset": dataset,
            },
        )
        return cfg

    return make


DIGITS = dict(length=CLIPS, num_frames=FRAMES, frame_size=SIDE, channels=3)


def clips():
    return MovingDigits(**DIGITS)


@pytest.fixture
def cache(config, tool, tmp_path):
    folder, file = tmp_path / "latents", tmp_path / "digits.py"
    config(dict(type="MovingDigits", **DIGITS)).dump(file)
    tool("extract_features").main([str(file), "--out", str(folder), "--dtype", "float16"])
    return folder


def test_what_is_cached_is_what_the_compressor_makes(cache, config):
    stored = CachedLatents(str(cache))
    assert len(stored) == CLIPS
    model = MODELS.build(config(dict(type="MovingDigits", **DIGITS)).model)
    model.vae.init_weights()
    for i in range(CLIPS):
        video = clips()[i]["inputs"][None].float() / 127.5 - 1
        latent = model.vae.encode(video)[0]
        assert latent.shape == LATENT
        assert stored[i]["inputs"].shape == (1, *LATENT)
        torch.testing.assert_close(stored[i]["inputs"][0].float(), latent, rtol=1e-3, atol=1e-3)
        assert stored[i]["data_samples"].label == clips()[i]["data_samples"].label


def test_what_is_cached_is_of_its_own_clip_and_frame(config, tool, tmp_path):
    """With weights of which latents differ; those above make nearly the same of everything."""
    torch.manual_seed(0)
    network = EfficientNetEncoder(**CODEC).eval()
    save_file(network.state_dict(), tmp_path / "encoder.safetensors")
    config(dict(type="MovingDigits", **DIGITS)).dump(tmp_path / "digits.py")
    tool("extract_features").main([f"{tmp_path}/digits.py", "--out", f"{tmp_path}/latents"])
    stored = CachedLatents(str(tmp_path / "latents"))
    latents = torch.stack([stored[i]["inputs"][0] for i in range(CLIPS)])
    vae = CascadeCompressor(str(tmp_path / "encoder.safetensors"), None, CODEC)
    vae.init_weights()
    videos = torch.stack([clips()[i]["inputs"] for i in range(CLIPS)]).float() / 127.5 - 1
    torch.testing.assert_close(latents, vae.encode(videos))
    for axis in (0, 2):  # clips, frames
        assert latents.std(axis).mean() > 0.1 * latents.std()
        assert not torch.allclose(latents, latents.roll(1, axis), atol=0.1 * latents.std())


def test_temporal_layers_train_on_them_as_on_the_clips(cache, config, tmp_path, fill_weights):
    cached = config(dict(type="CachedLatents", data_root=str(cache)))
    cached.load_from = str(tmp_path / "image.safetensors")
    image = fill_weights(DENOISERS.build(cached.model.denoiser.image)).state_dict()
    save_file(image, cached.load_from)
    RUNNERS.build(cached).train()
    state = load_checkpoint(tmp_path / "run/iter_6")["state_dict"]
    assert all(torch.equal(state[f"denoiser.image.{key}"], image[key]) for key in image)
    assert state["denoiser.temporal.0.attn.proj.weight"].any()
    assert not any(key.startswith("vae.") for key in state)
    losses = []
    for dataset in (CachedLatents(str(cache)), clips()):
        model = MODELS.build(cached.model)
        model.load_state_dict(state, strict=False)
        model.vae.init_weights()
        if made_by := getattr(dataset, "latents_of", None):
            model.train_on_latents(made_by)
        batch = [dataset[i] for i in (4, 1)]
        names = ("inputs", "data_samples")
        data = model.data_preprocessor({name: [item[name] for item in batch] for name in names})
        losses.append(model.loss(*data.values(), Draws(0, [4, 1], 3))["loss_diffusion"])
    torch.testing.assert_close(*losses, rtol=2e-3, atol=1e-4)


def test_a_run_from_a_cache_in_half_precision_is_resumed_to_the_bit(cache, config, tmp_path):
    changes = {
        "optim_wrapper.precision": "bf16",
        "default_hooks.checkpoint.interval": 3,
        "model.denoiser.train_image": True,
    }

    def run(name, **resume):
        cfg = config(dict(type="CachedLatents", data_root=str(cache)))
        apply_overrides(cfg, changes)
        cfg.work_dir = str(tmp_path / name)
        cfg.update(resume)
        runner = RUNNERS.build(cfg)
        runner.train()
        own = {id(weight) for weight in runner.model.parameters()}
        held = [w for group in runner.optim_wrapper.param_groups for w in group["params"]]
        assert held
        assert all(id(weight) in own for weight in held)  # no memory of the VAE stays
        return load_checkpoint(Path(cfg.work_dir) / "iter_6")["state_dict"]

    whole = run("whole")
    halves = run("again", load_from=str(tmp_path / "whole/iter_3"), resume=True)
    assert whole.keys() == halves.keys()
    assert all(torch.equal(halves[key], value) for key, value in whole.items())
    start = load_checkpoint(tmp_path / "whole/iter_3")["state_dict"]
    assert not all(torch.equal(start[key], value) for key, value in whole.items())


@pytest.mark.parametrize("frames", [FRAMES, FRAMES + 1])
def test_a_cache_of_another_size_than_the_model_s_is_told(cache, config, monkeypatch, frames):
    said = []
    monkeypatch.setattr(latent_cache_hook, "print_log", lambda line, **_: said.append(line))
    cfg = config(dict(type="CachedLatents", data_root=str(cache)))
    cfg.model.denoiser.frames = frames
    runner = RUNNERS.build(cfg)
    runner._train_dataloader = runner.build_dataloader(cfg.train_dataloader)
    LatentCacheHook().before_run(runner)
    lines = [line for line in said if "latents of (3, 3, 3)" in line and "is (4, 3, 3)" in line]
    assert len(lines) == frames - FRAMES


def test_a_frame_of_480_by_832_takes_12480_bytes():
    with torch.device("meta"):
        compressor = CascadeCompressor("effnet_encoder.safetensors")
        latent = compressor.encode(torch.empty(1, 3, 2, 480, 832))
    assert latent.shape == (1, 16, 2, 15, 26)
    assert latent[:, :, 0].half().nbytes == 16 * 15 * 26 * 2 == 12_480

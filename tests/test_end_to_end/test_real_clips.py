"""Latte on real clips through a frame VAE: configs/latte_ucf.py, made small."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope

from mmsora.apis import build_model
from mmsora.registry import DATASETS, RUNNERS
from mmsora.structures import VideoSample
from mmsora.utils.checkpoint import load_checkpoint
from mmsora.utils.config_check import apply_overrides
from mmsora.utils.config_names import load_config
from mmsora.utils.draws import Draws
from mmsora.utils.video_io import probe_video, read_video, write_image, write_video
from mmsora.visualization.contact_sheet import contact_sheet

CLIPS = Path(__file__).parents[2].parent / "shared/data/clips"
SIDE, FRAMES = 32, 4
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
pytestmark = pytest.mark.skipif(not CLIPS.is_dir(), reason=f"the clips are not in {CLIPS}")


@pytest.fixture(scope="module")
def ucf(tmp_path_factory):
    """A tree like UCF-101's: a class for each clip, and short pieces of it as .avi files."""
    root = tmp_path_factory.mktemp("ucf")
    for number, path in enumerate(sorted(CLIPS.glob("*.mp4"))):
        name = f"Class{number}"
        for start in (0, 200):
            frames = read_video(path, range(start, start + 60))[:, ::5, ::5]
            film = root / name / f"v_{name}_g01_c{start:02d}.mp4"
            write_video(film, frames, fps=30)
            film.rename(film.with_suffix(".avi"))
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny AutoencoderKL, untrained, in diffusers' layout."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(**VAE).save_pretrained(folder)
    return folder


def options(ucf, vae, iters):
    """What makes configs/latte_ucf.py small."""
    return {
        "model.vae.pretrained": str(vae),
        "model.vae.config": VAE,
        "model.denoiser.size": (FRAMES, SIDE // 2, SIDE // 2),
        "model.denoiser.width": 64,
        "model.denoiser.depth": 2,
        "model.denoiser.heads": 2,
        "model.denoiser.num_classes": 4,
        "model.conditioner.num_classes": 4,
        "model.diffusion.grid.num_steps": 4,
        "train_dataloader.batch_size": 2,
        "train_dataloader.num_workers": 0,
        "train_dataloader.pin_memory": False,
        "train_dataloader.dataset.data_root": str(ucf),
        "train_dataloader.dataset.pipeline.0.num_frames": FRAMES,
        "train_dataloader.dataset.pipeline.2.size": SIDE,
        "train_cfg.max_iters": iters,
        "optim_wrapper.precision": "off",
        "custom_hooks.1.labels": [0, 3],
    }


def small(ucf, vae, iters, work_dir, changes=None):
    cfg = load_config("latte_ucf")
    apply_overrides(cfg, options(ucf, vae, iters) | (changes or {}))
    cfg.work_dir, cfg.experiment_name = str(work_dir), f"real_{iters}_{Path(work_dir).name}"
    return cfg


def test_it_trains_resumes_and_is_sampled(ucf, vae, tmp_path, tool):
    for iters, resume in ((10, []), (20, ["--resume"])):
        changes = options(ucf, vae, iters) | {"experiment_name": f"real_clips_{iters}"}
        words = [f"{key}={value}" for key, value in changes.items()]
        words = ["latte_ucf", "--work-dir", tmp_path / "run", *resume, "--cfg-options", *words]
        tool("train").main([str(word) for word in words])
    weights = load_checkpoint(tmp_path / "run/iter_20")["state_dict"]
    assert not any(key.startswith("vae.") for key in weights)

    out = tmp_path / "out"
    words = ["--checkpoint", tmp_path / "run/iter_20", "--labels", "3", "Class1", "--out", out]
    words += ["--num-frames", 6, "--size", "48x64", "--fps", 5, "--dtype", "bf16"]
    tool("infer").main([str(word) for word in words])
    films = sorted(out.glob("*.mp4"))
    assert [film.name.split("_")[1] for film in films] == ["label3", "label1"]
    for film in films:
        info = probe_video(film)
        assert info.frames == 6
        assert info.fps == pytest.approx(5)
        scale = json.loads(film.with_suffix(".json").read_text())["fps"]
        assert scale == 5
        assert info.height / info.width == 48 / 64


def train_vae(folder, frames):
    """Teach the tiny VAE a few frames (N, 3, H, W) in [-1, 1]."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(**VAE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (0.5 + 0.5 * math.cos(math.pi * step / 600))
        posterior = model.encode(frames).latent_dist
        loss = (model.decode(posterior.sample()).sample - frames).abs().mean()
        (loss + 1e-4 * posterior.kl().mean() / frames[0].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        scale = 1 / model.encode(frames).latent_dist.mean.std().item()
    model.save_pretrained(folder)
    return scale


@pytest.mark.slow
def test_four_clips_are_learned_by_heart(ucf, tmp_path):
    """The loss at fixed times and noise falls below a fifth, and samples look like the clips.

    With MMSORA_PICTURE set to a path the picture of both is kept there.
    """
    for film in ucf.rglob("*_c200.avi"):
        film.unlink()
    cfg = small(ucf, "unused", 1500, tmp_path / "run")
    init_default_scope("mmsora")
    spec = cfg.train_dataloader.dataset
    spec.pipeline = [step for step in spec.pipeline if "Flip" not in str(step["type"])]
    spec.test_mode = True  # always the first frames
    dataset = DATASETS.build(spec)
    clips = torch.stack([dataset[i]["inputs"] for i in range(4)])
    labels = [dataset[i]["data_samples"].label for i in range(4)]
    frames = clips.transpose(1, 2).flatten(0, 1).float() / 127.5 - 1
    scale = train_vae(tmp_path / "vae", frames)

    changes = {
        "model.vae.pretrained": str(tmp_path / "vae"),
        "model.vae.scale": scale,
        "model.denoiser.width": 128,
        "model.denoiser.depth": 4,
        "model.denoiser.heads": 4,
        "model.diffusion.grid.num_steps": 50,
        "model.diffusion.guidance.scale": 1.0,
        "train_dataloader.batch_size": 8,
        "optim_wrapper.optimizer.lr": 1e-3,
        "optim_wrapper.precision": "bf16",
        "optim_wrapper.clip_from": 0,
        "custom_hooks.0.warmup": True,
        "custom_hooks.0.decay": 0.99,
    }
    apply_overrides(cfg, changes)
    video = clips.float() / 127.5 - 1
    samples = [VideoSample(index=i, label=label) for i, label in enumerate(labels)]

    def fixed_loss(model):
        with torch.no_grad():
            losses = [
                model.loss(video, samples, Draws(7, range(4), step))["loss_diffusion"]
                for step in range(16)
            ]
        return torch.stack(losses).mean().item()

    start = fixed_loss(build_model(cfg))
    RUNNERS.build(cfg).train()
    model = build_model(cfg, tmp_path / "run/iter_1500")
    end = fixed_loss(model)
    made = model.predict(samples, seed=1)
    both = torch.stack([clips, made], dim=1).flatten(0, 1)
    titles = [f"{name} {label}" for label in labels for name in ("clip", "sample")]
    write_image(tmp_path / "both.png", contact_sheet(both, titles, scale=3))
    if "MMSORA_PICTURE" in os.environ:
        shutil.copy(tmp_path / "both.png", os.environ["MMSORA_PICTURE"])
    print(f"loss at fixed times and noise: {start:.4f} -> {end:.4f}")
    assert end < start / 5
    difference = np.abs(made.numpy().astype(float) - clips.numpy()).mean(axis=(1, 2, 3, 4))
    apart = np.abs(clips.numpy().astype(float) - clips.roll(1, 0).numpy()).mean()
    assert difference.max() < apart / 2

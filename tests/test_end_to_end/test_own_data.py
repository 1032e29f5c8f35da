"""A config of two lines trains on clips in any layout: one tree for each, made of real clips."""

import csv
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmsora.utils.checkpoint import latest_checkpoint
from mmsora.utils.video_io import read_video, write_image, write_video

DATA = Path(__file__).parents[2].parent / "shared/data"
CLIPS, GIFS = DATA / "clips", DATA / "captioned_gifs"
SIDE, FRAMES = 32, 4
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
pytestmark = pytest.mark.skipif(not CLIPS.is_dir(), reason=f"the clips are not in {CLIPS}")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny AutoencoderKL, untrained, in diffusers' layout."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(**VAE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Short pieces of the clips: (name, caption, frames, content of a file)."""
    folder, made = tmp_path_factory.mktemp("pieces"), []
    with (CLIPS / "captions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            frames = read_video(CLIPS / row["path"], range(24))[:, ::5, ::5]
            write_video(folder / row["path"], frames, fps=24)
            content = (folder / row["path"]).read_bytes()
            made.append((row["path"], row["text"], frames, content))
    return made


def imagenet(root, clips):
    for number, (name, _, frames, _) in enumerate(clips):
        path = root / f"train/n{number:08d}/{Path(name).stem}.JPEG"
        path.parent.mkdir(parents=True)
        Image.fromarray(frames[0]).save(path)
    return {"type": "ImageNetFolder"}


def opendatalab(root, clips):
    lines = []
    for number, (name, _, frames, _) in enumerate(clips):
        path = root / f"val/{Path(name).stem}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frames[0]).save(path)
        lines.append(f"{path.name} {number}\n")
    (root / "meta").mkdir()
    (root / "meta/val.txt").write_text("".join(lines))
    return {"type": "ImageNetFolder", "split": "val"}


def ucf(root, clips):
    lines = []
    for number, (name, _, _, content) in enumerate(clips):
        path = root / f"UCF-101/Class{number}/v_Class{number}_g01_c01{Path(name).suffix}"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        lines.append(f"{path.relative_to(root / 'UCF-101')} {number + 1}\n")
    (root / "trainlist01.txt").write_text("".join(lines))
    split = str(root / "trainlist01.txt")
    return {"type": "ClassFolderVideos", "data_root": f"{root}/UCF-101", "split_file": split}


def frame_folders(root, clips):
    for name, _, frames, _ in clips:
        for number, frame in enumerate(frames):
            folder = root / f"sky_train/{Path(name).stem}/{Path(name).stem}_1"
            write_image(folder / f"{Path(name).stem}_1_{number}.png", frame)
    return {"type": "FrameFolderVideos"}


def _listed(root, clips):
    """The videos, and an entry for each as Open-Sora's lists have it."""
    entries = []
    for name, text, frames, content in clips:
        (root / "videos").mkdir(exist_ok=True)
        (root / "videos" / name).write_bytes(content)
        size = dict(zip(("num_frames", "height", "width"), frames.shape, strict=False))
        entries.append({"path": f"videos/{name}", "text": text, **size, "fps": 24})
    return entries


def open_sora_csv(root, clips):
    entries = _listed(root, clips)
    with (root / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(entries[0]))
        writer.writeheader()
        writer.writerows(entries)
    return {"type": "AnnotatedVideos", "ann_file": "train.csv"}


def jsonl(root, clips):
    lines = [
        json.dumps({"file_name": entry["path"], "caption": entry["text"]})
        for entry in _listed(root, clips)
    ]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return {"type": "AnnotatedVideos"}


def parquet(root, clips):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    table = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    table.write_table(pyarrow.Table.from_pylist(_listed(root, clips)), root / "metadata.parquet")
    return {"type": "AnnotatedVideos"}


def pairs(root, clips):
    for entry in _listed(root, clips):
        (root / entry["path"]).with_suffix(".txt").write_text(entry["text"])
    return {"type": "AnnotatedVideos"}


def pixabay100(root, clips):
    """GIFs that are named by their captions, and the list that lite-sora reads."""
    entries = []
    (root / "videos").mkdir()
    for path in sorted(GIFS.glob("*.gif")):
        (root / "videos" / path.name).write_bytes(path.read_bytes())
        entries.append({"path": f"videos/{path.name}", "text": path.stem.replace("_", ", ")})
    (root / "metadata.json").write_text(json.dumps(entries))
    return {"type": "AnnotatedVideos"}


def tar(root, clips):
    with tarfile.open(root / "00000.tar", "w") as file:
        for number, (name, text, _, content) in enumerate(clips):
            for kind, data in ((Path(name).suffix, content), (".txt", text.encode())):
                member = tarfile.TarInfo(f"{number:05d}{kind}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return {"type": "TarVideos"}


LAYOUTS = [
    imagenet,
    opendatalab,
    ucf,
    frame_folders,
    open_sora_csv,
    jsonl,
    parquet,
    pairs,
    pixabay100,
    tar,
]


def train(tool, vae, work_dir, dataset, frames=FRAMES, iters=2, batch=2):
    """Run configs/own_data/latte_s2_own_clips.py, made small, on a dataset."""
    changes = {
        "model.vae.pretrained": str(vae),
        "model.vae.config": VAE,
        "model.denoiser.size": (frames, SIDE // 2, SIDE // 2),
        "model.denoiser.width": 32,
        "model.denoiser.depth": 2,
        "model.denoiser.heads": 2,
        "model.diffusion.grid.num_steps": 2,
        "train_dataloader.batch_size": batch,
        "train_dataloader.num_workers": 0,
        "train_dataloader.pin_memory": False,
        "train_dataloader.dataset.pipeline.0.num_frames": frames,
        "train_dataloader.dataset.pipeline.2.size": SIDE,
        "train_cfg.max_iters": iters,
        "optim_wrapper.precision": "off",
        "custom_hooks.1.num_samples": 1,
        "default_hooks.logger.interval": 1,
        "experiment_name": work_dir.parent.name,
    }
    changes |= {f"train_dataloader.dataset.{key}": value for key, value in dataset.items()}
    words = [f"{key}={value}" for key, value in changes.items()]
    words = ["latte_s2_own_clips", "--work-dir", work_dir, "--cfg-options", *words]
    tool("train").main([str(word) for word in words])


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_every_layout_trains_by_config_alone(make, clips, vae, tmp_path, tool, scalars):
    root = tmp_path / "data"
    root.mkdir()
    dataset = {"data_root": str(root), "on_error": "raise"} | make(root, clips)
    images = dataset["type"] == "ImageNetFolder"
    train(tool, vae, tmp_path / "run", dataset, frames=1 if images else FRAMES)
    losses = [entry["loss"] for entry in scalars(tmp_path / "run") if "loss" in entry]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_broken_files_do_not_stop_a_run(clips, vae, tmp_path, tool):
    """Five of fifty: the run ends, and its log names and counts each of the five once."""
    root, broken = tmp_path / "data/class", {2, 11, 12, 37, 49}
    root.mkdir(parents=True)
    whole = clips[0][3]
    for number in range(50):
        content = [b"", b"<html>", whole[:99], whole[:-500], b"\0" * 99][number % 5]
        (root / f"{number:02d}.mp4").write_bytes(content if number in broken else whole)
    dataset = {"type": "ClassFolderVideos", "data_root": str(root.parent)}
    train(tool, vae, tmp_path / "run", dataset, iters=15, batch=10)  # three epochs
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run/iter_15"
    (log,) = (tmp_path / "run").rglob("*.log")
    named = re.findall(r"skipped \S+/class/(\d+)\.mp4: .*\((\d) of 50 skipped", log.read_text())
    assert {int(number) for number, _ in named} == broken
    assert [int(count) for _, count in named] == [1, 2, 3, 4, 5]

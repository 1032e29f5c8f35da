"""A cascade of three stages on moving digits: images first, then temporal layers alone.

Stage C makes latents of the compressor from a label, stage B those of stage A from C's, and stage
A pixels. The video cascade is the frozen image cascade with temporal layers; it is compared with
the image cascade applied frame by frame.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import quickstart
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from benchmarks.cascade_codecs import (
    COMPRESSOR,
    PREVIEW_WIDTH,
    STAGE_A,
    Codecs,
    train_codecs,
)
from mmsora.apis import Inferencer
from mmsora.datasets.moving_digits import MovingDigits
from mmsora.evaluation.digits import DigitJudge, motion
from mmsora.utils.atomic import write_json
from mmsora.utils.config_check import apply_overrides, check_config
from mmsora.utils.config_names import load_config
from mmsora.utils.video_io import write_image
from mmsora.visualization.contact_sheet import contact_sheet

__all__ = ["benchmark_cascade"]

SIDE, DIGIT, FRAMES = 32, 16, 8
WIDTH, HEADS = 64, 4
SHARES = {"c_image": 1.0, "b_image": 0.5, "c_video": 1.5, "b_video": 0.25}  # of the iterations
BATCHES = {"image": 64, "video": 8}
STEPS = {"c": 20, "b": 10}  # of sampling
SCALES = {"c": 2.0, "b": 1.1}  # of guidance
BATCH = 50  # clips sampled at a time
INK = 64  # grey level from which on a pixel is the digit's
SHOWN = (3, 7)
ROWS = {  # stages C and B of each cascade
    "images, frame by frame": ("c_image", "b_image"),
    "video": ("c_video", "b_video"),
    "video, stage B without temporal layers": ("c_video", "b_image"),
}


def data_of(frames: int, split: str = "train", length: int = 100_000) -> dict[str, Any]:
    """Arguments of ``MovingDigits``."""
    return {
        "split": split,
        "length": length,
        "num_frames": frames,
        "frame_size": SIDE,
        "digit_size": DIGIT,
        "channels": 3,
    }


def image_denoiser(stage: str) -> dict[str, Any]:
    """Stage C or B, small."""
    told = {"width": WIDTH, "pooled": WIDTH}
    if stage == "c":
        channels, side = COMPRESSOR["channels"], SIDE // 8
        levels = [{"width": WIDTH, "depth": 2, "heads": HEADS}] * 2
    else:
        channels, side = STAGE_A["channels"], SIDE // 4
        levels = [{"width": WIDTH // 2, "depth": 2}, {"width": WIDTH, "depth": 2, "heads": HEADS}]
        told["effnet"] = COMPRESSOR["channels"]  # type: ignore[assignment]
    return {
        "type": "StableCascade",
        "in_channels": channels,
        "out_channels": channels,
        "size": (1, side, side),
        "levels": [dict(level) for level in levels],
        "conditions": told,
        "strided": stage == "b",
        "num_classes": 10,
    }


def video_denoiser(stage: str) -> dict[str, Any]:
    """The same, frozen, with temporal layers behind its attention."""
    places = {"c": "(down|up)_blocks[.][01]", "b": "down_blocks[.]1|up_blocks[.]0"}
    return {
        "type": "ImageToVideo",
        "image": image_denoiser(stage),
        "after": {f"({places[stage]})[.](2|5)": WIDTH},  # the groups' attention
        "layout": "(b t) c h w",
        "frames": FRAMES,
        "layer": {"heads": HEADS, "kernel": 3},
    }


def diffusion_of(stage: str, is_video: bool) -> dict[str, Any]:
    """The quickstart's rectified flow; the frames of a clip share the noise of stage B."""
    return {
        "type": "Diffusion",
        "path": {"type": "LinearPath", "clock_scale": 1.0},
        "prediction": {"type": "VelocityPrediction"},
        "train_times": {"type": "LogitNormalTimes"},
        "solver": {"type": "Euler"},
        "grid": {"type": "SpacedGrid", "num_steps": STEPS[stage]},
        "guidance": {"type": "ClassifierFree", "scale": SCALES[stage]},
        "loss": {"type": "MSE"},
        "train_noise": {"type": "SharedNoise" if stage == "b" and is_video else "TrainNoise"},
    }


def model_of(stage: str, is_video: bool, codecs: Codecs) -> dict[str, Any]:
    """A stage with its codec, and what it is told."""
    label = {"type": "LabelConditioner", "num_classes": 10, "drop_prob": 0.1}
    compressor = {
        "type": "CascadeCompressor",
        "pretrained": codecs.encoder,
        "previewer": codecs.previewer,
        "config": COMPRESSOR,
        "preview_width": PREVIEW_WIDTH,
    }
    stage_a = {
        "type": "CascadeStageA",
        "pretrained": codecs.stage_a,
        "config": STAGE_A,
        "scale": codecs.scale,
    }
    effnet = {
        "type": "LatentConditioner",
        "encoder": compressor,
        "channels": COMPRESSOR["channels"],
        "name": "effnet",
    }
    several = {"type": "SeveralConditioner", "parts": {"label": label, "effnet": effnet}}
    return {
        "type": "LatentDiffusion",
        "data_preprocessor": {"type": "VideoPreprocessor"},
        "vae": compressor if stage == "c" else stage_a,
        "conditioner": label if stage == "c" else several,
        "denoiser": video_denoiser(stage) if is_video else image_denoiser(stage),
        "diffusion": diffusion_of(stage, is_video),
    }


def config_of(part: str, options: Any, codecs: Codecs) -> Config:
    """The quickstart's config with another model and larger digits.

    Args:
        part: ``c_image``, ``b_image``, ``c_video`` or ``b_video``.
        options: The command line.
        codecs: Files of the codecs.

    Returns:
        The config.
    """
    stage, kind = part.split("_")
    is_video = kind == "video"
    cfg = load_config("latte_moving_digits")
    apply_overrides(
        cfg,
        {
            "model": model_of(stage, is_video, codecs),
            "train_dataloader.batch_size": BATCHES[kind],
            "train_dataloader.dataset": {"type": "MovingDigits"}
            | data_of(FRAMES if is_video else 1),
            "optim_wrapper.precision": options.precision,
            "optim_wrapper.optimizer.lr": 2e-3,
        },
    )
    check_config(cfg)
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if "labels" not in hook]  # no pictures
    quickstart.set_length(cfg, max(int(options.iters * SHARES[part]), 1))
    if is_video:
        cfg.load_from = options.trained[f"{stage}_image"]
    cfg.work_dir = str(Path(options.work_dir) / part)
    cfg.experiment_name = f"cascade_{part}"  # MMEngine's log and message hub go by it
    return cfg


def sample(rows: tuple[str, str], options: Any) -> np.ndarray:
    """Clips of a cascade, the digits in turn.

    Args:
        rows: Its stages C and B, by the names of their trainings.
        options: The command line.

    Returns:
        uint8 (N, T, H, W).
    """
    dtype = "bf16" if options.precision == "bf16" else "fp32"
    stage_c, stage_b = (options.trained[part] for part in rows)
    cascade = Inferencer(stage_b, dtype=dtype, prior=Inferencer(stage_c, dtype=dtype))
    videos = cascade(num_samples=options.clips, seed=1, batch_size=BATCH, num_frames=FRAMES)
    return videos.float().mean(dim=1).round().byte().numpy()


def positions(clips: np.ndarray) -> np.ndarray:
    """Where the digit is, row and column, (N, T, 2): the mean place of its pixels."""
    ink = (clips >= INK).astype(np.float64)
    mass = np.maximum(ink.sum(axis=(2, 3)), 1)
    places = np.arange(clips.shape[-1])
    rows, columns = ink.sum(axis=3) @ places / mass, ink.sum(axis=2) @ places / mass
    return np.stack([rows, columns], axis=-1)


def jolt(clips: np.ndarray) -> float:
    """By how much the digit's step from frame to frame changes, in pixels; the mean of all."""
    return float(np.linalg.norm(np.diff(positions(clips), n=2, axis=1), axis=-1).mean())


def reshaping(clips: np.ndarray) -> float:
    """How the digit's picture changes from frame to frame, wherever it is: the mean root mean
    square, pixels being from 0 to 1."""
    half = DIGIT // 2
    padded = np.pad(clips / 255, ((0, 0), (0, 0), (half, half), (half, half)))
    corners = np.round(positions(clips)).astype(int)
    cut = np.stack(
        [
            [
                frame[row : row + DIGIT, column : column + DIGIT]
                for frame, (row, column) in zip(clip, corner, strict=True)
            ]
            for clip, corner in zip(padded, corners, strict=True)
        ]
    )
    return float(np.sqrt(np.square(np.diff(cut, axis=1)).mean(axis=(2, 3))).mean())


def measure(clips: np.ndarray, labels: np.ndarray, judge: DigitJudge) -> dict[str, float]:
    """What the judge makes of clips.

    Args:
        clips: uint8 (N, T, H, W).
        labels: The digits that were asked for, (N,).
        judge: Who reads.

    Returns:
        The figures by name.
    """
    return {
        "read_right": float((judge.read(clips) == labels).mean()),
        "speed": motion(np.where(clips >= INK, clips, 0).astype(np.uint8)),
        "jolt": jolt(clips),
        "reshaping": reshaping(clips),
    }


def moves_more_smoothly(video: dict[str, float], images: dict[str, float]) -> bool:
    """Whether the digits of the video cascade do, and are read about as often."""
    return video["jolt"] < images["jolt"] and video["read_right"] > images["read_right"] - 0.1


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures as a table in Markdown."""
    lines = [
        "| cascade | read as the digit asked for | speed, pixels a frame | change of speed | "
        "change of shape |",
        "|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        lines.append(
            f"| {name} | {row['read_right']:.1%} | {row['speed']:.2f} | {row['jolt']:.2f} | "
            f"{row['reshaping']:.3f} |"
        )
    return "\n".join(lines)


def picture(clips: dict[str, np.ndarray], digits: np.ndarray) -> np.ndarray:
    """A column of clips for each digit shown: frame by frame, video, real.

    Args:
        clips: Of each cascade, and ``real`` ones.
        digits: Of the real ones.

    Returns:
        The picture.
    """
    rows = {"images": "images, frame by frame", "video": "video", "real": "real"}
    chosen, titles = [], []
    for title, name in rows.items():
        for digit in SHOWN:
            place = int(np.argmax(digits == digit)) if name == "real" else digit
            chosen.append(clips[name][place % len(clips[name])])
            titles.append(title)
    return contact_sheet(np.stack(chosen)[:, None], titles, columns=len(SHOWN), scale=2)


def timed(what: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """Do something on one thread, more of which gain nothing with networks so small.

    Args:
        what: Its name, to say how long it took.
        work: What to do.

    Returns:
        What came of it, and the seconds.
    """
    torch.set_num_threads(1)
    init_default_scope("mmsora")
    start = time.perf_counter()
    found = work()
    seconds = round(time.perf_counter() - start, 1)
    print(f"[cascade] {what}: {seconds:.0f} s", flush=True)
    return found, seconds


def at_once(
    jobs: Mapping[str, Callable[[], Any]], processes: int, seconds: dict[str, float]
) -> dict[str, Any]:
    """Do things that need nothing of one another.

    Args:
        jobs: They, by name.
        processes: To do them in.
        seconds: Takes how long each took.

    Returns:
        What came of them, by name.
    """
    if processes == 1:
        done = {name: timed(name, work) for name, work in jobs.items()}
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            futures = {name: pool.submit(timed, name, work) for name, work in jobs.items()}
            done = {name: future.result() for name, future in futures.items()}
    seconds.update({name: taken for name, (_, taken) in done.items()})
    return {name: found for name, (found, _) in done.items()}


def train_part(part: str, options: Any, codecs: Codecs) -> str:
    """Train a stage, and return its checkpoint."""
    return str(quickstart.train(config_of(part, options, codecs)))


def train(options: Any, seconds: dict[str, float]) -> Codecs:
    """Train codecs and stages; ``options.trained`` are the stages' checkpoints.

    Args:
        options: The command line.
        seconds: Takes how long each took.

    Returns:
        The codecs.
    """
    folder, steps = Path(options.work_dir) / "codecs", max(options.iters // 4, 1)
    codecs, seconds["codecs"] = timed("codecs", partial(train_codecs, folder, steps, data_of(1)))
    options.trained = {}
    for kind in ("image", "video"):
        jobs = {
            part: partial(train_part, part, options, codecs) for part in SHARES if kind in part
        }
        options.trained |= at_once(jobs, options.processes, seconds)
    return codecs


def real_clips(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Held-out clips, (N, T, H, W) uint8, and their digits."""
    digits = MovingDigits(**data_of(FRAMES, "test", count))
    clips, labels = zip(*(digits.clip(i) for i in range(count)), strict=True)
    return np.stack(clips), np.array(labels)


def benchmark_cascade(options: Any) -> int:
    """Train the stages, sample the cascades, judge them and print a table.

    Args:
        options: The command line.

    Returns:
        The exit status: 1 where the digits of the video cascade do not move more smoothly.
    """
    start, seconds = time.perf_counter(), dict[str, float]()
    codecs = train(options, seconds)
    jobs = {name: partial(sample, on, options) for name, on in ROWS.items()}
    clips = at_once(jobs, options.processes, seconds)
    judge = DigitJudge(MovingDigits(**data_of(FRAMES, length=4000)))
    asked = np.arange(options.clips) % 10
    figures = {name: measure(made, asked, judge) for name, made in clips.items()}
    clips["real"], digits = real_clips(max(options.clips, 50))
    figures["real"] = measure(clips["real"], digits, judge)
    if options.plot:
        write_image(Path(options.plot), picture(clips, digits))
    about = {"iters": options.iters, "clips": options.clips, "precision": options.precision}
    about |= {"torch": torch.__version__, "processes": options.processes}
    about |= {"codec_errors": codecs.errors, "seconds": seconds}
    write_json(Path(options.out), about | {"figures": figures})
    print(table(figures))
    print(f"[cascade] {(time.perf_counter() - start) / 60:.1f} minutes in all")
    return int(not moves_more_smoothly(figures["video"], figures["images, frame by frame"]))

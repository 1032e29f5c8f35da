"""What trains fastest: methods side by side on the quickstart's digits, read by its judge.

A method is a change of the quickstart's config: ``model.diffusion``, and ``out_channels`` where
the variance is learned or ``alignment`` for REPA. Data, network, optimizer and seed are the same
for all.
"""

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import quickstart
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from benchmarks.digit_encoder import WIDTH, train_encoder
from mmsora.apis import Inferencer
from mmsora.datasets.moving_digits import MovingDigits
from mmsora.evaluation.digits import DigitJudge
from mmsora.utils.atomic import write_json
from mmsora.utils.config_check import apply_overrides, check_config
from mmsora.utils.config_names import load_config
from mmsora.utils.user_error import UserError

__all__ = ["METHODS", "Method", "benchmark_methods"]

EVALUATIONS = 8  # in a budget
BATCH = 50  # clips sampled at a time
TARGET = 0.8


class Method(NamedTuple):
    """A way to train and sample.

    Attributes:
        changes: Of the quickstart's config, by dotted key.
        bar: Accuracy to reach; None where there is none.
        budgets: How many times the budget it trains for.
    """

    changes: dict[str, Any]
    bar: float | None = None
    budgets: int = 1


def diffusion(**parts: Any) -> dict[str, Any]:
    """A ``model.diffusion``: the quickstart's rectified flow but for the parts named here.

    Args:
        **parts: Each the name of a class, or a config.

    Returns:
        The config.
    """
    usual = {
        "path": "LinearPath",
        "prediction": "VelocityPrediction",
        "train_times": "UniformTimes",
        "solver": "Euler",
        "grid": spaced(25),
        "guidance": {"type": "ClassifierFree", "scale": 2.0},
        "loss": "MSE",
    }
    chosen = usual | parts
    return {"type": "Diffusion"} | {
        name: {"type": part} if isinstance(part, str) else part for name, part in chosen.items()
    }


def spaced(num_steps: int) -> dict[str, Any]:
    """A grid of even steps."""
    return {"type": "SpacedGrid", "num_steps": num_steps}


V = {
    "path": {"type": "DiscretePath", "zero_terminal_snr": True},
    "prediction": "VPrediction",
    "grid": spaced(50),
}
STRATIFIED = {"type": "StratifiedTimes", "times": {"type": "UniformTimes"}}
MIN_SNR = {"type": "MSE", "weighting": {"type": "MinSNR", "gamma": 5.0}}
EDM = {
    "path": "VEPath",
    "prediction": {"type": "EDMPrediction", "sigma_data": 0.5},
    "train_times": "LogNormalTimes",
    "solver": "Heun",
    "grid": {"type": "KarrasGrid", "num_steps": 18},
}
IDDPM = {
    "path": "DiscretePath",
    "prediction": {"type": "LearnedRange", "mean": {"type": "NoisePrediction"}},
    "solver": "Ancestral",
    "grid": spaced(50),
    "loss": "Hybrid",
}
REPA = {
    "type": "RepresentationAlignment",
    "encoder": {"type": "DINOv2", "folder": "data/digit_encoder", "width": WIDTH},
    "block": 2,
    "projector_width": 256,
}

METHODS = {
    "rf-logit-normal": Method({}, bar=0.9),  # the quickstart itself
    "rf-uniform": Method({"model.diffusion": diffusion()}, bar=0.9),
    "rf-stratified": Method({"model.diffusion": diffusion(train_times=STRATIFIED)}, bar=0.9),
    "rf-repa": Method({"model.alignment": REPA}, bar=0.9),
    "v-uniform": Method({"model.diffusion": diffusion(**V)}),
    "v-logit-normal": Method(
        {"model.diffusion": diffusion(**V, train_times="LogitNormalTimes")}, bar=0.8
    ),
    "v-min-snr": Method({"model.diffusion": diffusion(**V, loss=MIN_SNR)}),
    "edm": Method({"model.diffusion": diffusion(**EDM)}, bar=0.6),
    "iddpm": Method(
        {"model.diffusion": diffusion(**IDDPM), "model.denoiser.out_channels": 2},
        bar=0.7,
        budgets=3,
    ),
}


class Reading(NamedTuple):
    """What the judge made of a checkpoint.

    Attributes:
        right: Whether each clip is read as the digit asked for.
        seconds: To sample them.
        calls: Of the network for a clip.
        sampler: Solver and steps.
    """

    right: np.ndarray
    seconds: float
    calls: int
    sampler: str


def read_checkpoint(checkpoint: Path, judge: DigitJudge, clips: int, dtype: str) -> Reading:
    """Sample clips of every digit as the quickstart does, with the averaged weights; read them.

    Args:
        checkpoint: The trained weights.
        judge: Who reads.
        clips: How many.
        dtype: Precision of the network.

    Returns:
        The reading.
    """
    inferencer = Inferencer(checkpoint, dtype=dtype)
    model = inferencer.model
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.denoiser.register_forward_pre_hook(count)
    start = time.perf_counter()
    videos = inferencer(num_samples=clips, seed=1, batch_size=BATCH)
    seconds = time.perf_counter() - start
    asked = np.arange(clips) % getattr(model.conditioner, "num_classes", 1)
    parts = model.diffusion
    return Reading(
        right=judge.read(videos[:, 0].numpy()) == asked,
        seconds=seconds,
        calls=calls // math.ceil(clips / BATCH),
        sampler=f"{type(parts.solver).__name__}, {parts.grid.num_steps} steps",
    )


def config_of_method(name: str, options: Any) -> Config:
    """The quickstart's config with the method's changes, and its length fitted to the budget."""
    method = METHODS[name]
    cfg = load_config(options.config)
    apply_overrides(cfg, method.changes | dict(options.cfg_options))
    check_config(cfg)
    if "model.alignment" in method.changes:
        cfg.model.alignment.encoder.folder = str(Path(options.work_dir) / "digit_encoder")
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if "labels" not in hook]  # no pictures
    quickstart.set_length(cfg, options.budget * method.budgets)
    cfg.default_hooks.checkpoint.interval = max(options.budget // EVALUATIONS, 1)
    cfg.default_hooks.checkpoint.max_keep_ckpts = -1
    cfg.optim_wrapper.precision = options.precision
    cfg.randomness.seed = options.seed
    cfg.work_dir = str(Path(options.work_dir) / name)
    cfg.experiment_name = f"methods_{name}"  # MMEngine's log and message hub go by it
    return cfg


def prepare_encoder(cfg: Config) -> None:
    """Train the encoder that REPA aligns to, unless that was done before."""
    folder = Path(cfg.model.alignment.encoder.folder)
    if not folder.is_dir():
        right = train_encoder(folder, frame_size=cfg.train_dataloader.dataset.frame_size)
        print(f"[methods] the encoder for REPA reads {right:.1%} of held-out frames", flush=True)


def measure(name: str, options: Any, judge: DigitJudge) -> dict[str, Any]:
    """Train a method and read its checkpoints, of which the last one is kept.

    Args:
        name: Of the method.
        options: The command line.
        judge: Who reads.

    Returns:
        The method's record, ready for JSON.
    """
    cfg = config_of_method(name, options)
    if "model.alignment" in METHODS[name].changes:
        prepare_encoder(cfg)
    start = time.perf_counter()
    last = quickstart.train(cfg)
    training = time.perf_counter() - start
    dtype = "bf16" if options.precision == "bf16" else "fp32"
    curve = []
    numbered = {int(p.stem.removeprefix("iter_")): p for p in last.parent.glob("iter_*")}
    for step, checkpoint in sorted(numbered.items()):
        clips = options.final_clips if checkpoint == last else options.clips
        reading = read_checkpoint(checkpoint, judge, clips, dtype)
        curve.append((step, float(reading.right[: options.clips].mean())))
        print(f"[methods] {name}: {curve[-1][1]:.2f} after {step} iterations", flush=True)
        if checkpoint != last:
            shutil.rmtree(checkpoint)
    reached = next((step for step, accuracy in curve if accuracy >= TARGET), None)
    iterations = cfg.train_cfg.max_iters
    return {
        "settings": settings_of(name, options),
        "iterations": iterations,
        "curve": curve,
        "steps_to_target": reached,
        "seconds_to_target": round(training * reached / iterations, 1) if reached else None,
        "accuracy": float(reading.right.mean()),
        "bar": METHODS[name].bar,
        "training_seconds": round(training, 1),
        "sampler": reading.sampler,
        "network_calls": reading.calls,
        "sampling_seconds_a_clip": round(reading.seconds / len(reading.right), 4),
    }


def settings_of(name: str, options: Any) -> dict[str, Any]:
    """All that a method's figures depend on; a record with the same is not measured again."""
    own = ("budget", "clips", "final_clips", "precision", "seed", "config")
    changes = METHODS[name].changes | dict(options.cfg_options)
    settings = {key: getattr(options, key) for key in own} | {"changes": changes}
    settings["budgets"] = METHODS[name].budgets
    return json.loads(json.dumps(settings))  # tuples are lists, as in the file


def table(records: dict[str, dict[str, Any]]) -> str:
    """The records as a table in Markdown, the fastest to the target first."""

    def order(item: tuple[str, dict[str, Any]]) -> tuple[float, float]:
        return item[1]["steps_to_target"] or math.inf, -item[1]["accuracy"]

    lines = [
        f"| method | steps to {TARGET} | seconds to {TARGET} | accuracy | bar | iterations | "
        "training | sampler | network calls | seconds a clip |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, record in sorted(records.items(), key=order):
        bar = record["bar"]
        verdict = "" if bar is None else f"{bar} {'ok' if record['accuracy'] >= bar else 'MISSED'}"
        cells = [
            name,
            record["steps_to_target"] or "not reached",
            record["seconds_to_target"] or "",
            f"{record['accuracy']:.3f}",
            verdict,
            record["iterations"],
            f"{record['training_seconds']:.0f} s",
            record["sampler"],
            record["network_calls"],
            f"{record['sampling_seconds_a_clip']:.3f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def faster_precision(options: Any) -> str:
    """Float32 or bfloat16, whichever takes a training step of the quickstart in less time."""
    cfg = load_config(options.config)
    apply_overrides(cfg, dict(options.cfg_options))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = "off", "bf16"
    return min(names, key=lambda name: quickstart.seconds_per_step(cfg, name, device))


def build_judge(options: Any) -> DigitJudge:
    """The quickstart's judge."""
    cfg = load_config(options.config)
    apply_overrides(cfg, dict(options.cfg_options))
    data = cfg.train_dataloader.dataset
    known = ("length", "num_frames", "frame_size", "digit_size")
    return DigitJudge(MovingDigits("train", **{key: data[key] for key in known if key in data}))


def checked(names: Sequence[str]) -> list[str]:
    """The methods' names, if there are such methods."""
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise UserError(f"--methods: no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    return list(names or METHODS)


def benchmark_methods(options: Any) -> int:
    """Measure the methods that the file does not hold, write it after each, and print a table.

    Args:
        options: The command line.

    Returns:
        The exit status.
    """
    names = checked(options.methods)
    init_default_scope("mmsora")
    options.final_clips = options.final_clips or options.clips
    options.precision = options.precision or faster_precision(options)
    out = Path(options.out)
    records: dict[str, Any] = json.loads(out.read_text())["methods"] if out.exists() else {}
    known = {name: record["settings"] for name, record in records.items()}
    left = [name for name in names if known.get(name) != settings_of(name, options)]
    for name in sorted(set(names).difference(left)):
        print(f"[methods] {name}: {out} has it")
    judge = build_judge(options)
    for name in left:
        records[name] = measure(name, options, judge)
        about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        about["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        write_json(out, about | {"target": TARGET, "methods": records})
    print(table(records))
    return 0

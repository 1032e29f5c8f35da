"""The quickstart: train, sample and judge within a time budget.

Run by ``bash tools/quickstart.sh``, which installs what is needed first.
"""

import argparse
import copy
import os
import resource
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsora.utils.cli_options import key_values
from mmsora.utils.user_error import UserError, user_errors_as_one_line

if TYPE_CHECKING:
    import torch
    from mmengine.config import Config

CONFIG = "configs/quickstart/latte_moving_digits.py"
NUM_CLIPS = 200
SHARE_OF_TRAINING = 0.87  # of the budget; the rest is for sampling, judging and a slow moment
CALIBRATION_STEPS = 8
SHOWN = 20  # clips in the pictures


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train, sample and judge moving digits.")
    parser.add_argument(
        "--minutes", type=float, default=12.5, help="at most, for all but installing; default 12.5"
    )
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--work-dir", default="work_dirs/quickstart")
    parser.add_argument("--max-iters", type=int, help="instead of what fits the time")
    parser.add_argument("--num-clips", type=int, default=NUM_CLIPS, help="to sample and judge")
    parser.add_argument(
        "--cfg-options", nargs="+", type=key_values, default=[], metavar="KEY=VALUE"
    )
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> "Config":
    """The config with the command line applied."""
    from mmsora.utils.config_check import apply_overrides, check_config
    from mmsora.utils.config_names import load_config

    if args.minutes <= 0:
        raise UserError(f"--minutes must be positive, got {args.minutes}")
    cfg = load_config(args.config)
    apply_overrides(cfg, dict(args.cfg_options))
    check_config(cfg)
    cfg.work_dir = args.work_dir
    return cfg


def seconds_per_step(cfg: "Config", precision: str, device: "torch.device") -> float:
    """Time a training step of the config's model in one precision.

    Args:
        cfg: The config.
        precision: As the optimizer wrapper names it.
        device: Where.

    Returns:
        The median of a few steps.
    """
    from mmengine.optim import build_optim_wrapper

    from mmsora.registry import DATASETS, MODELS
    from mmsora.utils.draws import Draws

    model = MODELS.build(copy.deepcopy(cfg.model)).to(device)
    options = {**copy.deepcopy(cfg.optim_wrapper), "precision": precision}
    optim_wrapper = build_optim_wrapper(model, options)
    dataset = DATASETS.build(copy.deepcopy(cfg.train_dataloader.dataset))
    batch = [dataset[i] for i in range(cfg.train_dataloader.batch_size)]
    times = []
    for step in range(CALIBRATION_STEPS):
        start = time.perf_counter()
        data = model.data_preprocessor(
            {
                "inputs": [sample["inputs"] for sample in batch],
                "data_samples": [sample["data_samples"] for sample in batch],
            }
        )
        draws = Draws(0, range(len(batch)), step)
        with optim_wrapper.optim_context(model):
            losses = model.loss(data["inputs"], data["data_samples"], draws)
        loss, _ = model.parse_losses(losses)
        optim_wrapper.update_params(loss)
        loss.item()  # waits for the device
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def fit_to_budget(cfg: "Config", args: argparse.Namespace) -> None:
    """Choose the faster precision and the config's iterations, or as many as fit the time."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speeds = {p: seconds_per_step(cfg, p, device) for p in ("off", "bf16")}
    precision = min(speeds, key=lambda name: speeds[name])
    fits = int(args.minutes * 60 * SHARE_OF_TRAINING / speeds[precision])
    iters = args.max_iters or max(min(fits, cfg.train_cfg.max_iters), 1)
    print(
        f"[quickstart] {device.type}: {speeds['off'] * 1e3:.0f} ms a step in float32, "
        f"{speeds['bf16'] * 1e3:.0f} ms in bfloat16; {iters} iterations in {precision} precision"
    )
    cfg.optim_wrapper.precision = precision
    set_length(cfg, iters)


def set_length(cfg: "Config", iters: int) -> None:
    """Let training, the learning rate and the sampling end at another iteration."""
    cfg.train_cfg.max_iters = iters
    warmup, decay = cfg.param_scheduler
    warmup.end = decay.begin = min(warmup.end, max(iters // 5, 1))
    decay.end = max(iters, decay.begin + 1)
    for hook in cfg.custom_hooks:
        if "interval" in hook:
            hook.interval = max(iters // 4, 1)


def train(cfg: "Config") -> Path:
    """Train, and return the last checkpoint."""
    from mmsora.registry import RUNNERS
    from mmsora.utils.checkpoint import latest_checkpoint

    for old in Path(cfg.work_dir).glob("iter_*"):
        shutil.rmtree(old)
    runner = RUNNERS.build(cfg)
    runner.train()
    checkpoint = latest_checkpoint(cfg.work_dir)
    if checkpoint is None:
        raise RuntimeError(f"training left no checkpoint in {cfg.work_dir}")
    return checkpoint


def sample_and_judge(cfg: "Config", checkpoint: Path, count: int) -> dict[str, Any]:
    """Sample clips of every digit, write pictures and the clips themselves, and judge them.

    Args:
        cfg: The config.
        checkpoint: The trained weights.
        count: How many clips.

    Returns:
        The judge's report.
    """
    import numpy as np
    import torch

    from mmsora.apis import Inferencer
    from mmsora.datasets.moving_digits import MovingDigits
    from mmsora.evaluation.digits import report
    from mmsora.utils.atomic import atomic_path
    from mmsora.utils.video_io import viewing_scale, write_image, write_video
    from mmsora.visualization.contact_sheet import contact_sheet, video_grid

    start = time.perf_counter()

    def progress(done: int) -> None:
        left = (time.perf_counter() - start) * (count - done) / done
        print(f"[quickstart] sampled {done} of {count} clips, {left:.0f} s left", flush=True)

    enabled = cfg.optim_wrapper.precision == "bf16"
    inferencer = Inferencer(checkpoint)
    with torch.autocast(inferencer.model.device.type, torch.bfloat16, enabled=enabled):
        videos = inferencer(num_samples=count, seed=1, batch_size=50, progress=progress)
    labels = np.arange(count) % cfg.model.conditioner.num_classes
    clips = videos[:, 0].numpy()
    out, scale = Path(cfg.work_dir), viewing_scale(*videos.shape[-2:])
    with atomic_path(out / "samples.npz") as path:
        np.savez_compressed(path, clips=clips, labels=labels)
    titles = [str(label) for label in labels[:SHOWN]]
    write_image(out / "samples.png", contact_sheet(videos[:SHOWN], titles, scale=scale // 2))
    write_video(out / "samples.mp4", video_grid(videos[:SHOWN], titles, scale=scale // 2), fps=8)
    print("[quickstart] judging", flush=True)
    data = cfg.train_dataloader.dataset
    options = {k: data[k] for k in ("num_frames", "frame_size", "digit_size") if k in data}
    return report(
        clips,
        labels,
        MovingDigits("train", length=data.get("length", 10000), **options),
        MovingDigits("test", length=500, **options),
    )


def main(argv: list[str] | None = None) -> None:
    """The quickstart."""
    args = parse_args(argv)
    start = time.perf_counter()
    with user_errors_as_one_line():
        cfg = prepare(args)
        from mmengine.registry import init_default_scope

        from mmsora.engine.hooks.telemetry_hook import peak_memory
        from mmsora.utils.atomic import write_json
        from mmsora.utils.config_check import user_errors

        init_default_scope("mmsora")
        with user_errors():
            fit_to_budget(cfg, args)
        checkpoint = train(cfg)
        trained = time.perf_counter() - start
        result = sample_and_judge(cfg, checkpoint, args.num_clips)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result.update(
        iterations=cfg.train_cfg.max_iters,
        precision=cfg.optim_wrapper.precision,
        training_seconds=round(trained, 3),
        seconds=round(time.perf_counter() - start, 3),
        cpu_seconds=round(usage.ru_utime + usage.ru_stime, 1),
        cpu_count=os.cpu_count(),
        peak_memory_mib=round(peak_memory()),
        checkpoint=str(checkpoint),
    )
    write_json(Path(cfg.work_dir) / "report.json", result)
    print_report(result, Path(cfg.work_dir))


def print_report(result: dict[str, Any], out: Path) -> None:
    """Say what came out, and where it lies."""
    print("[quickstart] report")
    for key, value in result.items():
        print(f"  {key:32} {value}")
    print(f"[quickstart] look at {out}/samples.png, {out}/samples.mp4 and {out}/report.html")
    print(f"[quickstart] more: mmsora infer --checkpoint {result['checkpoint']} --labels 3 7")


if __name__ == "__main__":
    main()

"""Sample videos from a checkpoint.

python tools/infer.py --checkpoint work_dirs/latte_moving_digits/iter_4000 --labels 3 7
"""

import argparse
import hashlib
import shlex
import sys
import time
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from mmsora.utils.cli_options import key_values
from mmsora.utils.user_error import UserError, user_errors_as_one_line

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch import Tensor


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Sample videos from a checkpoint.")
    parser.add_argument(
        "config", nargs="?", help="path or name of a config; default the checkpoint's own"
    )
    parser.add_argument("--checkpoint", required=True, help="the weights")
    parser.add_argument(
        "--prior",
        metavar="CHECKPOINT",
        help="of a cascade, the weights of the stage before, whose latents this one decodes",
    )
    parser.add_argument(
        "--prior-config",
        help="its config; default its checkpoint's own, else the one that CONFIG's `prior` names",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--labels", nargs="+", help="a video for each of these classes, by number or name"
    )
    what.add_argument(
        "--prompt", action="append", help="a video of this text; may be given several times"
    )
    what.add_argument("--prompts-file", help="a text file, a video for each of its lines")
    what.add_argument("--num-samples", type=int, help="how many; classes are gone through in turn")
    parser.add_argument("--image", help="a picture that the videos are to be like")
    parser.add_argument("--sampler", help="one that the config offers under samplers, e.g. paper")
    parser.add_argument("--steps", type=int, help="of the solver; default as the config says")
    parser.add_argument(
        "--guidance", type=float, help="its scale, 1 is none; default as the config says"
    )
    parser.add_argument("--solver", help="its name, e.g. Euler, Heun, Ancestral")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="changes speed, not videos")
    parser.add_argument(
        "--out", default="samples", help="directory to write to; default %(default)s"
    )
    parser.add_argument("--format", choices=("mp4", "gif", "png"), default="mp4")
    parser.add_argument("--fps", type=float, default=8, help="of the files; default %(default)s")
    parser.add_argument(
        "--num-frames", type=int, help="default: what the prior, or else the model, is made for"
    )
    parser.add_argument(
        "--size", type=size, metavar="HxW", help="in pixels; default: what the model is made for"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--no-ema", action="store_true", help="the raw weights, not the average")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        type=key_values,
        default=[],
        metavar="KEY=VALUE",
        help="changes of CONFIG, not of the prior's",
    )
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with the usage where options make no sense."""
    if args.fps <= 0:
        parser.error(f"--fps must be positive, got {args.fps:g}")
    if args.prior_config is not None and args.prior is None:
        parser.error("--prior-config needs --prior CHECKPOINT")
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    if Path(args.out).is_file():
        parser.error(f"--out {args.out} is a file, not a directory")


def size(text: str) -> tuple[int, int]:
    """Height and width from ``HxW``."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"expected HxW, as 256x256, got {text!r}")
    return int(height), int(width)


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, or of the lines of its file.

    Args:
        args: The command line.

    Returns:
        The prompts.

    Raises:
        UserError: The file cannot be read, or holds none.
    """
    if args.prompts_file is None:
        return args.prompt or []
    try:
        lines = Path(args.prompts_file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts-file {args.prompts_file} cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {args.prompts_file} holds no prompt")
    return prompts


def prepare(args: argparse.Namespace) -> "Config":
    """The config of the model, with the command line applied.

    Args:
        args: The command line.

    Returns:
        The config.
    """
    from mmsora.apis.build import config_of
    from mmsora.utils.checkpoint import load_checkpoint
    from mmsora.utils.config_check import apply_choice, apply_overrides
    from mmsora.utils.config_names import load_config

    if args.config is None:
        cfg = config_of(load_checkpoint(args.checkpoint, parts=()), args.checkpoint)
    else:
        cfg = load_config(args.config)
    if args.sampler is not None:
        apply_choice(cfg, "samplers", args.sampler)
    overrides: dict[str, Any] = dict(args.cfg_options)
    if args.steps is not None:
        overrides["model.diffusion.grid.num_steps"] = args.steps
    if args.guidance is not None:
        overrides["model.diffusion.guidance.scale"] = args.guidance
    if args.solver is not None:
        overrides["model.diffusion.solver._delete_"] = True
        overrides["model.diffusion.solver.type"] = args.solver
    apply_overrides(cfg, overrides)
    return cfg


def config_of_prior(args: argparse.Namespace, cfg: "Config") -> str | None:
    """The config of the stage before.

    Args:
        args: The command line, with a prior.
        cfg: The config of the model.

    Returns:
        Its path or name; None for the one in its checkpoint.

    Raises:
        UserError: There is none.
    """
    from mmsora.utils.checkpoint import load_checkpoint

    if args.prior_config is not None:
        return args.prior_config
    if "cfg" in (load_checkpoint(args.prior, parts=()).get("meta") or {}):
        return None
    if cfg.get("prior") is None:
        raise UserError(
            f"checkpoint {args.prior} holds no config and CONFIG names no `prior`; name one: "
            "--prior-config CONFIG"
        )
    return cfg.prior


def write(
    videos: "Tensor",
    labels: list[int] | list[str],
    args: argparse.Namespace,
    cfg: "Config",
    seconds: float,
) -> None:
    """One file for each video with what is needed to make it again, and a contact sheet.

    Args:
        videos: uint8, (B, C, T, H, W).
        labels: The classes asked for, by number, or the prompts.
        args: The command line.
        cfg: The config.
        seconds: What the sampling took.
    """
    import torch

    import mmsora
    from mmsora.utils.atomic import write_json
    from mmsora.utils.config_check import config_dict
    from mmsora.utils.video_io import viewing_scale, write_image, write_video
    from mmsora.visualization.contact_sheet import contact_sheet

    out, scale = Path(args.out), viewing_scale(*videos.shape[-2:])
    classes = cfg.model.get("conditioner") and cfg.model.conditioner.get("num_classes")
    told: list[int | str | None] = [*labels] or [*range(classes or 0)] or [None]
    shown = [told[i % len(told)] for i in range(len(videos))]
    common = {
        "seed": args.seed,
        "steps": cfg.model.diffusion.grid.get("num_steps"),
        "guidance": cfg.model.diffusion.guidance.get("scale"),
        "fps": args.fps,
        "dtype": args.dtype,
        "checkpoint": str(args.checkpoint),
        "checkpoint_sha256": digest(Path(args.checkpoint)),
        "image": args.image,
        "prior": args.prior and str(args.prior),
        "prior_config": args.prior_config,
        "ema": not args.no_ema,
        "command": args.command,
        "versions": {"mmsora": mmsora.__version__, "torch": torch.__version__},
        "seconds_of_all": round(seconds, 2),
        "model": config_dict(cfg)["model"],
    }
    for i, (video, label) in enumerate(zip(videos, shown, strict=True)):
        kind = "prompt" if isinstance(label, str) else "label"
        name = f"{i:04d}" + (f"_label{label}" if isinstance(label, int) else "")
        name += f"_seed{args.seed}"
        frames = video.permute(1, 2, 3, 0)  # T H W C
        write_video(out / f"{name}.{args.format}", frames, args.fps, scale)
        write_json(out / f"{name}.json", {"index": i, kind: label, **common})
    titles = [shorten(str(label), 40, placeholder="...") for label in shown]
    sheet = contact_sheet(videos, titles if told[0] is not None else None, scale=scale)
    write_image(out / "contact_sheet.png", sheet)
    print(
        f"{len(videos)} videos in {seconds:.1f} s: {out}/, contact sheet {out}/contact_sheet.png"
    )


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder, by name."""
    digest = hashlib.sha256()
    for part in sorted(path.iterdir()) if path.is_dir() else [path]:
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def main(argv: list[str] | None = None) -> None:
    """Sample."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    args.command = shlex.join(["python", "tools/infer.py", *argv])
    with user_errors_as_one_line():
        cfg = prepare(args)
        from mmsora.apis import Inferencer
        from mmsora.utils.config_check import user_errors

        common = {"device": args.device, "use_ema": not args.no_ema, "dtype": args.dtype}
        prior = None
        if args.prior is not None:
            args.prior_config = config_of_prior(args, cfg)
            prior = Inferencer(args.prior, args.prior_config, **common)
        inferencer = Inferencer(args.checkpoint, cfg, prior=prior, **common)
        labels = [inferencer.number(label) for label in args.labels or ()]
        prompts = prompts_of(args)
        start = time.perf_counter()
        total = inferencer.count(prompts or labels, args.num_samples)

        def progress(done: int) -> None:
            spent = time.perf_counter() - start
            print(f"{done} of {total} videos, {done / spent:.2f} videos/s", flush=True)

        with user_errors():
            videos = inferencer(
                labels,
                args.num_samples,
                args.seed,
                args.batch_size,
                progress,
                args.num_frames,
                args.size,
                prompts,
                args.image,
            )
        write(videos, prompts or labels, args, cfg, time.perf_counter() - start)


if __name__ == "__main__":
    main()

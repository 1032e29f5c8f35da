"""Train a model from a config.

python tools/train.py configs/quickstart/latte_moving_digits.py
python tools/train.py latte_moving_digits --amp bf16 --cfg-options train_cfg.max_iters=100
"""

import argparse
import atexit
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsora.utils.cli_options import key_values
from mmsora.utils.user_error import UserError, user_errors_as_one_line

MODES = ("none", "ddp", "zero1", "zero2", "zero3")
# Options that set one key of the config.
FLAGS = {
    "amp": "optim_wrapper.precision",
    "parallel": "parallel.mode",
    "sequence": "parallel.sequence",
    "seed": "randomness.seed",
}

if TYPE_CHECKING:
    from mmengine.config import Config


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a model from a config.",
        epilog="`mmsora list-cfg` lists the configs that come with MMSora.",
    )
    parser.add_argument("config", help="path of a config, or the name of one that is shipped")
    parser.add_argument("--work-dir", help="where to write; default work_dirs/<config name>")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="go on from a checkpoint; without PATH from the newest one in the work dir",
    )
    parser.add_argument(
        "--amp",
        choices=("bf16", "fp16", "off"),
        help="precision of the forward pass; default as the config says",
    )
    parser.add_argument(
        "--layout",
        help="settings for some cards, of those that the config offers, e.g. 8xa100 or 1x4090; "
        "the global batch stays",
    )
    add_parallel_options(parser)
    parser.add_argument("--seed", type=seed, help="of weights, noise and order; default 0")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        type=key_values,
        default=[],
        metavar="KEY=VALUE",
        help="change the config, e.g. model.denoiser.depth=8 train_dataloader.batch_size=16",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by the real over the config's base batch size",
    )
    parser.add_argument(
        "--skip-fit-check",
        action="store_true",
        help="train even what tools/estimate.py says cannot fit on the GPU",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check and build everything, train nothing"
    )
    return parser.parse_args(argv)


def add_parallel_options(parser: argparse.ArgumentParser) -> None:
    """What is about several processes."""
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        default="none",
        help="what started the processes; tools/dist_train.sh sets it",
    )
    parser.add_argument(
        "--parallel",
        choices=MODES,
        help="what is spread over the processes: the data (ddp), the optimizer's state too "
        "(zero1), the gradients too (zero2), the weights too (zero3); default as the config says, "
        "else ddp",
    )
    parser.add_argument(
        "--sequence",
        type=int,
        metavar="K",
        help="so many neighbouring processes share the tokens of each sample",
    )
    parser.add_argument("--deepspeed", nargs="?", action=NoDeepSpeed, help=argparse.SUPPRESS)


class NoDeepSpeed(argparse.Action):
    """Tells what to type instead."""

    def __call__(self, parser: argparse.ArgumentParser, *call: Any) -> None:
        """End the program."""
        asked = str(call[1])
        stage = re.search(r"zero_?stage_?([123])|zero_?([123])", asked, re.IGNORECASE)
        mode = f"zero{stage[1] or stage[2]}" if stage else "zero2"
        more = " --cfg-options parallel.offload=True" if "offload" in asked else ""
        parser.exit(2, f"error: ZeRO needs no DeepSpeed here: type --parallel {mode}{more}\n")


def seed(text: str) -> int:
    """A seed: a whole number from 0 on."""
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"a seed is a whole number from 0 to 2^32 - 1, got {text}"
        )
    return int(text)


def prepare(args: argparse.Namespace) -> "Config":
    """Load the config and apply the command line to it.

    Args:
        args: The command line.

    Returns:
        The config, checked.
    """
    from mmsora.utils.checkpoint import latest_checkpoint
    from mmsora.utils.config_check import apply_choice, apply_overrides, check_config
    from mmsora.utils.config_names import load_config

    cfg = load_config(args.config)
    check_config(cfg)
    if args.layout is not None:
        apply_choice(cfg, "layouts", args.layout)
    apply_overrides(cfg, overrides_of(args))
    if args.auto_scale_lr:
        if "auto_scale_lr" not in cfg:
            raise UserError(
                f"{args.config} sets no auto_scale_lr=dict(base_batch_size=...), so there is "
                "nothing to scale the learning rate by"
            )
        cfg.auto_scale_lr.enable = True
    check_config(cfg)
    cfg.default_scope = cfg.get("default_scope") or "mmsora"
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    if not args.dry_run:
        check_work_dir(Path(cfg.work_dir), args.resume is not None or cfg.get("resume", False))
    if args.resume is not None:
        found = latest_checkpoint(cfg.work_dir) if args.resume == "auto" else Path(args.resume)
        if found is None:
            text = f"warning: no checkpoint in {cfg.work_dir}: starting from the beginning"
            print(text, file=sys.stderr, flush=True)
        elif not found.exists():
            raise UserError(f"checkpoint {found} does not exist")
        else:
            cfg.resume, cfg.load_from = True, str(found)
    return cfg


def check_paths(cfg: "Config") -> None:
    """Refuse at once what would be missed one by one, after the model was built."""
    from mmsora.utils.config_check import config_dict

    values, missing = config_dict(cfg), []
    weights = values.get("load_from")
    if weights and not cfg.get("resume") and _is_missing(weights):
        missing.append(f"{weights}: no such file; set load_from")

    def look(part: Any, keys: str) -> None:
        if isinstance(part, dict) and _is_missing(part.get("data_root")):
            make = "tools/extract_features.py makes it; " if "Cached" in part["type"] else ""
            missing.append(f"{part['data_root']}: no such folder; {make}set {keys}.data_root")
        inner = part.items() if isinstance(part, dict) else enumerate(part)
        for key, value in inner:
            if isinstance(value, dict | list):
                look(value, f"{keys}.{key}")

    look(values.get("train_dataloader", {}).get("dataset", {}), "train_dataloader.dataset")
    if missing:
        raise UserError(". ".join(missing))


def _is_missing(path: Any) -> bool:
    return isinstance(path, str) and "://" not in path and not Path(path).exists()


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    """What options of the command line set in the config, by dotted keys."""
    overrides: dict[str, Any] = dict(args.cfg_options)
    for name, key in FLAGS.items():
        value = getattr(args, name)
        if value is not None and key in overrides:
            raise UserError(
                f"--{name} {value} and --cfg-options {key}={overrides[key]} set the same; give one"
            )
        if value is not None:
            overrides[key] = value
    return overrides


def check_work_dir(work_dir: Path, goes_on: bool) -> None:
    """Refuse a file, and what an earlier run left unless this one may find it there."""
    from mmsora.utils.checkpoint import numbered_checkpoints

    there = next((path for path in (work_dir, *work_dir.parents) if path.exists()), work_dir)
    if there.exists() and not there.is_dir():
        raise UserError(f"--work-dir {work_dir}: {there} is a file, no folder")
    left = numbered_checkpoints(work_dir)
    if left and not goes_on:
        raise UserError(
            f"{work_dir} holds {left[-1].name} of an earlier run; go on with --resume, or take "
            "another --work-dir"
        )


def world_of(args: argparse.Namespace) -> int | None:
    """The number of processes; None in a dry run without a launcher, which stands for any."""
    from mmsora.engine.parallel.launch import environment_of

    if args.launcher == "none":
        return None if args.dry_run else 1
    return int(environment_of(args.launcher, os.environ)["WORLD_SIZE"])


def check_layout(layout: str | None, world: int | None) -> None:
    """Refuse the settings for another number of cards: the global batch would be another."""
    count = re.match(r"(\d+)x", layout or "")
    if count and world is not None and int(count[1]) != world:
        raise UserError(
            f"--layout {layout} is for {count[1]} processes, one for each card; the number of "
            f"processes is {world}"
        )


def dry_run(cfg: "Config") -> None:
    """Build the model without memory and the data as it is, and say what would be trained."""
    import torch

    from mmsora.registry import DATASETS, MODELS
    from mmsora.utils.config_check import user_errors

    with user_errors(), torch.device("meta"):
        denoiser = MODELS.build(cfg.model).denoiser
    with user_errors():
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    count = sum(p.numel() for p in denoiser.parameters())
    name, batch = type(denoiser).__name__, cfg.train_dataloader.batch_size
    tokens = getattr(denoiser, "num_tokens", None)
    of_tokens = f", {tokens} tokens a sample" if tokens else ""
    print(f"denoiser    {name}, {count / 1e6:.2f} M parameters{of_tokens}")
    print(f"data        {type(dataset).__name__}, {len(dataset)} samples")
    print(f"training    {cfg.train_cfg.max_iters} iterations of {batch} samples on each process")
    print(f"work dir    {cfg.work_dir}")


def check_fit(cfg: "Config", world: int) -> None:
    """Refuse what cannot fit on the GPUs, where there are any."""
    import torch

    if not torch.cuda.is_available():
        return
    from mmsora.apis.estimate import refuse_what_cannot_fit

    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    refuse_what_cannot_fit(cfg, min(gpu.total_memory for gpu in gpus), world)


def train(args: argparse.Namespace) -> None:
    """Train, or check that it can be done."""
    from mmsora.engine.config_values import check_values

    cfg, world = prepare(args), world_of(args)
    check_layout(args.layout, world)
    check_values(cfg, world)
    if args.dry_run or world is None:
        check_paths(cfg)
        dry_run(cfg)
        return
    if not args.skip_fit_check:
        check_fit(cfg, world)
    check_paths(cfg)
    from mmsora.registry import RUNNERS
    from mmsora.utils.config_check import user_errors

    with user_errors():
        RUNNERS.build(cfg).train()


@contextmanager
def leaving() -> Iterator[None]:
    """Ends one of several processes: where all did well, when all are done.

    Not by the interpreter's own end: there the threads of gloo abort the process now and then.
    """
    code: Any = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    from torch import distributed

    if code == 0 and distributed.is_initialized():
        distributed.barrier()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    args = parse_args(argv)
    if os.environ.get("MMSORA_TRACEBACK") != "1":
        logging.raiseExceptions = False  # a disk that is full is told once
    with ExitStack() as stack:
        if args.launcher != "none":
            stack.enter_context(leaving())
        stack.enter_context(user_errors_as_one_line())
        train(args)


if __name__ == "__main__":
    main()

"""Will it fit? Memory, work and time of a config on GPUs, without one and without any file.

python tools/estimate.py configs/latte_ucf.py --layout 4xa6000
python tools/estimate.py latte_ucf --gpu rtx4090
python tools/estimate.py --all
"""

import argparse
import json
from typing import TYPE_CHECKING

from mmsora.utils.cli_options import key_values
from mmsora.utils.user_error import user_errors_as_one_line

if TYPE_CHECKING:
    from mmengine.config import Config

    from mmsora.apis.estimate import Estimate

GPU_NAMES = ("rtx4090", "a6000", "a100-40", "a100-80", "h100", "h200")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Will it fit? Memory, work and time of a config on GPUs. All of it is "
        "arithmetic: nothing is measured, no file is read, and no GPU is needed.",
    )
    parser.add_argument("config", nargs="?", help="path of a config, or the name of a shipped one")
    parser.add_argument("--all", action="store_true", help="a table of every shipped config")
    parser.add_argument(
        "--gpu", choices=GPU_NAMES, help="say more of this one; default all, or the layout's"
    )
    parser.add_argument("--gpus", type=int, help="how many; default 1, or as many as the layout's")
    parser.add_argument(
        "--parallel",
        choices=("none", "ddp", "zero1", "zero2", "zero3"),
        help="what is spread over them; default as the config says, else ddp",
    )
    parser.add_argument("--sequence", type=int, help="GPUs that share the tokens of each sample")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the vendor's peak; default 0.4"
    )
    parser.add_argument("--layout", help="settings for some cards that the config offers")
    parser.add_argument("--json", action="store_true", help="numbers for scripts")
    parser.add_argument(
        "--cfg-options", nargs="+", type=key_values, default=[], metavar="KEY=VALUE"
    )
    args = parser.parse_args(argv)
    if (args.config is None) != args.all:
        parser.error("name one CONFIG, or say --all")
    if not 0 < args.mfu <= 1:
        parser.error("--mfu is a share: above 0 and at most 1")
    if args.gpus is not None and args.gpus < 1:
        parser.error("--gpus must be at least 1")
    return args


def prepare(args: argparse.Namespace) -> "Config":
    """Load the config and apply the command line to it, as tools/train.py does.

    Args:
        args: The command line.

    Returns:
        The config, checked.
    """
    from mmsora.utils.config_check import apply_choice, apply_overrides, check_config
    from mmsora.utils.config_names import load_config

    cfg = load_config(args.config)
    check_config(cfg)
    if args.layout is not None:
        apply_choice(cfg, "layouts", args.layout)
    overrides = dict(args.cfg_options)
    for name in ("parallel", "sequence"):
        value = getattr(args, name)
        if value is not None:
            overrides["parallel.mode" if name == "parallel" else "parallel.sequence"] = value
    apply_overrides(cfg, overrides)
    check_config(cfg)
    return cfg


def print_more(cfg: "Config", found: "Estimate", name: str) -> None:
    """The largest batch on a GPU, or what to type so that the config fits.

    Args:
        cfg: The config.
        found: Its estimate.
        name: Of the GPU.
    """
    from mmsora.apis.estimate import advise
    from mmsora.apis.estimate.report import most_samples
    from mmsora.utils.gpus import GPUS

    gpu, count = GPUS[name], found.processes
    print(f"\nlargest batch on each {gpu.title}: {most_samples(cfg, gpu.memory, count)}")
    if found.total <= gpu.memory:
        return
    advice = list(advise(cfg, gpu.memory, count))
    print("it does not fit; these do:" if advice else "it does not fit, and nothing known helps")
    for one in advice:
        more = f" on {one.processes} GPUs" if one.processes != count else ""
        print(f"  {one.estimate.total / 1e9:.2f} GB{more} with {one.text}")


def main(argv: list[str] | None = None) -> None:
    """Estimate."""
    args = parse_args(argv)
    with user_errors_as_one_line():
        from mmsora.apis.estimate import estimate
        from mmsora.apis.estimate.report import as_dict, gpus_of, lines, machine_of, table
        from mmsora.utils.gpus import GPUS

        if args.all:
            for line in table([], args.mfu):
                print(line, flush=True)
            return
        cfg, machine = prepare(args), machine_of(args.layout)
        name = args.gpu or (machine.gpu if machine else None)
        found = estimate(cfg, gpus_of(args.layout, args.gpus))
        chosen = {key: gpu for key, gpu in GPUS.items() if name in (None, key)}
        if args.json:
            print(json.dumps(as_dict(found, chosen, args.mfu), indent=2))
            return
        print(f"{args.config}, {args.layout}" if args.layout else args.config)
        print("\n".join(lines(found, list(chosen.values()), args.mfu)))
        if name is not None:
            print_more(cfg, found, name)


if __name__ == "__main__":
    main()

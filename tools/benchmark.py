"""Measure what MMSora costs.

    python tools/benchmark.py runner
    python tools/benchmark.py network
    python tools/benchmark.py network --device cuda --models DiT-XL/2 Latte-XL/2 --depth 0 \\
        --what inference train-bf16 memory step --peak-tflops 989
    python tools/benchmark.py data --clips FOLDER
    python tools/benchmark.py cache
    python tools/benchmark.py methods --budget 2000 --clips 50
    python tools/benchmark.py samplers --plot docs/assets/samplers.png
    python tools/benchmark.py cascade --plot docs/assets/cascade_digits.png
"""

import argparse
import os
import sys

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch: its profiler is silent

WHAT = ["inference", "train-fp32", "train-bf16", "memory", "optimizer", "ema"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what MMSora costs.")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("runner", help="CPU time of the Runner over a bare loop")
    runner.add_argument("--iters", type=int, default=200, help="iterations in a round")
    runner.add_argument("--rounds", type=int, default=5, help="rounds, the two in turn")
    network = commands.add_parser("network", help="our denoisers beside a textbook's")
    add_network(network)
    add_methods(commands.add_parser("methods", help="what trains fastest on the quickstart"))
    add_samplers(commands.add_parser("samplers", help="few steps beside the published 250"))
    add_data(commands.add_parser("data", help="what it takes to read training clips"))
    add_cache(commands.add_parser("cache", help="what it takes to read cached latents"))
    add_cascade(commands.add_parser("cascade", help="a small cascade on moving digits"))
    return parser.parse_args(argv)


def add_network(parser: argparse.ArgumentParser) -> None:
    """Options of ``network``."""
    add = parser.add_argument
    add("--models", nargs="+", default=["DiT-S/2", "Latte-S/2"], help="as in the papers")
    add("--what", nargs="+", default=WHAT, choices=[*WHAT, "step"], help="step: a training step")
    add("--depth", type=int, default=4, help="blocks; 0 is the whole model")
    add("--batch", type=int, default=0, help="samples; 0 goes by model and device")
    add("--frames", type=int, default=16, help="of a video")
    add("--side", type=int, default=32, help="height and width of the latents")
    add("--rounds", type=int, default=15, help="rounds, the networks in turn")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--peak-tflops", type=float, help="of the GPU as its vendor gives it, for MFU")
    add("--out", help="JSON file to write")


def add_methods(parser: argparse.ArgumentParser) -> None:
    """Options of ``methods``."""
    from mmsora.utils.cli_options import key_values

    add = parser.add_argument
    add("--methods", nargs="+", default=[], help="as METHODS names them; default all")
    add("--budget", type=int, default=2000, help="iterations; some methods take several budgets")
    add("--clips", type=int, default=50, help="to read at each evaluation")
    add("--final-clips", type=int, help="to read at the last; default as many as at the others")
    add("--precision", choices=["off", "bf16"], help="default: the faster one here")
    add("--seed", type=int, default=0, help="of the training")
    add("--config", default="configs/quickstart/latte_moving_digits.py")
    add("--cfg-options", nargs="+", type=key_values, default=[], metavar="KEY=VALUE")
    add("--work-dir", default="work_dirs/methods")
    add("--out", default="work_dirs/methods/methods.json", help="methods in it are not run again")


def add_samplers(parser: argparse.ArgumentParser) -> None:
    """Options of ``samplers``."""
    add = parser.add_argument
    add("--samples", type=int, default=4096, help="of the toy")
    add("--rounds", type=int, default=15, help="of the bookkeeping, the loops in turn")
    add("--quick", action="store_true", help="few samples: to see that it runs")
    add("--plot", help="PNG file to write")
    add("--out", help="JSON file to write")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Options of ``data``."""
    add = parser.add_argument
    add("--what", nargs="+", default=["decoding"], choices=["decoding"])
    add("--clips", default="data/clips", help="folder of films, some ten seconds or longer")
    add("--starts", type=int, default=4, help="clips of each film")
    add("--frames", type=int, default=16, help="of a clip, every third one")
    add("--side", type=int, default=256, help="height and width that frames are resized to")
    add("--rounds", type=int, default=10, help="rounds, the ways in turn")
    add("--out", help="JSON file to write")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Options of ``cache``."""
    add = parser.add_argument
    add("--samples", type=int, default=10_000, help="latents of 4 x 32 x 32 float32 numbers")
    add("--workers", type=int, default=2, help="processes that read")
    add("--batch", type=int, default=64, help="samples of a batch")
    add("--rounds", type=int, default=5, help="rounds, the layouts in turn")
    add("--clips", help="folder of class folders of videos, for decoding; default none")
    add("--folder", help="where to write, on the disk to measure; default a temporary one")
    add("--out", help="JSON file to write")


def add_cascade(parser: argparse.ArgumentParser) -> None:
    """Options of ``cascade``."""
    add = parser.add_argument
    add("--iters", type=int, default=2000, help="of stage C on images; others go by it")
    add("--clips", type=int, default=100, help="to sample of each cascade")
    add("--processes", type=int, default=2, help="with a thread each, for what can go at once")
    add("--precision", default="off", choices=["off", "bf16"], help="of the networks")
    add("--work-dir", default="work_dirs/cascade")
    add("--plot", help="PNG file to write")
    add("--out", default="work_dirs/cascade/cascade.json", help="JSON file to write")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark asked for."""
    from importlib import import_module

    from mmsora.utils.user_error import user_errors_as_one_line

    args = parse_args(argv)
    with user_errors_as_one_line():
        module = import_module(f"benchmarks.{args.command}")
        return getattr(module, f"benchmark_{args.command}")(args)


if __name__ == "__main__":
    sys.exit(main())

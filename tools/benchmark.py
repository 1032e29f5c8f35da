"""Measure what MMSora costs.

    python tools/benchmark.py runner
    python tools/benchmark.py network
    python tools/benchmark.py network --device cuda --models DiT-XL/2 Latte-XL/2 --depth 0 \\
        --what inference train-bf16 memory step --peak-tflops 989
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


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark asked for."""
    args = parse_args(argv)
    if args.command == "network":
        from benchmarks.network import benchmark_network

        return benchmark_network(args)
    from benchmarks.runner import benchmark_runner

    benchmark_runner(args.iters, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

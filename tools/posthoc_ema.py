"""Make an average of the weights of any profile, after training, from a run's snapshots.

python tools/posthoc_ema.py work_dirs/my_run --sigma-rel 0.1 --out ema.pth
python tools/infer.py --checkpoint ema.pth --labels 3 7
"""

import argparse
import json
import sys
from pathlib import Path

from mmsora.utils.user_error import user_errors_as_one_line

POOR = 0.05  # relative error of a profile from which on a warning is due


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Make an average of the weights of any profile, after training.",
        epilog="The run's DenoiserEMAHook needs profiles=[...] and snapshot_interval=N.",
    )
    parser.add_argument("run_dir", help="the run's directory, which holds ema_snapshots/")
    profile = parser.add_mutually_exclusive_group(required=True)
    profile.add_argument(
        "--sigma-rel", type=float, help="width of a power-function profile, at most 0.2886"
    )
    profile.add_argument("--gamma", type=float, help="exponent of a power-function profile")
    profile.add_argument("--decay", type=float, help="of a constant profile, e.g. 0.9999")
    parser.add_argument(
        "--step", type=int, help="optimizer steps to cover; default as the last snapshot"
    )
    parser.add_argument("--out", help="file to write; default ema.pth in the run's directory")
    args = parser.parse_args(argv)
    args.out = Path(args.out or Path(args.run_dir) / "ema.pth")
    if args.out.is_dir():
        parser.error(f"--out {args.out} is a directory, not a file")
    return args


def main(argv: list[str] | None = None) -> None:
    """Reconstruct and write."""
    args = parse_args(argv)
    with user_errors_as_one_line():
        from mmsora.engine.ema import ConstantEMA, PowerEMA
        from mmsora.engine.ema_snapshots import posthoc_ema
        from mmsora.utils.checkpoint import save_checkpoint
        from mmsora.utils.config_check import user_errors

        with user_errors():
            power = args.decay is None
            profile = PowerEMA(args.sigma_rel, args.gamma) if power else ConstantEMA(args.decay)
            made = posthoc_ema(args.run_dir, profile, args.step)
        meta = {
            "cfg": json.dumps(made.cfg),
            "ema": {"profile": str(profile), "steps": made.steps, "error": made.error},
        }
        save_checkpoint({"meta": meta, "ema": made.weights}, args.out)
    print(
        f"{profile} at step {made.steps} from {made.parts} averages, its profile met to "
        f"{made.error:.2g} relative: {args.out}"
    )
    if made.error > POOR:
        cures = "a wider one, the step of a snapshot, or more snapshots"
        print(f"warning: the snapshots hardly make up this profile; try {cures}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Look at checkpoints, compare them, and take weights to other formats and back.

python tools/checkpoint.py show work_dirs/latte_moving_digits
python tools/checkpoint.py export work_dirs/latte_moving_digits/iter_4000 digits.safetensors
python tools/checkpoint.py import DiT-XL-2-256x256.pt dit_xl2 --config dit_xl2_imagenet_256
python tools/checkpoint.py diff work_dirs/a/iter_4000 work_dirs/b/iter_4000
"""

import argparse
import json
import re
import sys

from mmsora.utils.user_error import user_errors_as_one_line

WHERE = "checkpoint folder, work dir (its newest), file, or folder of diffusers' kind"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = verbs.add_parser("show", help="what a checkpoint holds, without reading its tensors")
    verb.add_argument("path", metavar="PATH", help=WHERE)
    verb.add_argument(
        "--keys", type=expression, metavar="REGEX", help="list the tensors whose names have this"
    )
    verb.add_argument("--json", action="store_true", help="for scripts")
    verb.set_defaults(run=show)

    verb = verbs.add_parser("export", help="the denoiser's weights alone")
    verb.add_argument("path", metavar="PATH", help=f"{WHERE}; of ours")
    verb.add_argument("out", metavar="OUT", help="file or, for diffusers, folder to write")
    which = verb.add_mutually_exclusive_group()
    for name, text in (("ema", "the averaged weights; the default"), ("raw", "the raw weights")):
        which.add_argument(f"--{name}", dest="which", action="store_const", const=name, help=text)
    verb.add_argument(
        "--format",
        choices=("safetensors", "diffusers", "public"),
        default="safetensors",
        help="one file with the config in it, a folder, or the authors' names",
    )
    verb.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default as they are")
    verb.add_argument("--force", action="store_true", help="replace OUT")
    verb.set_defaults(run=export)

    verb = verbs.add_parser("import", help="a checkpoint folder of weights, ours or public ones")
    verb.add_argument("source", metavar="SOURCE", help=WHERE)
    verb.add_argument("out", metavar="OUT", help="folder to write")
    verb.add_argument("--config", help="path or name of a config; default the source's own")
    verb.add_argument("--force", action="store_true", help="replace the checkpoint OUT")
    verb.set_defaults(run=import_)

    verb = verbs.add_parser("diff", help="how two differ; exit code 1 when they do")
    verb.add_argument("first", metavar="A", help=WHERE)
    verb.add_argument("second", metavar="B", help="likewise, or exported weights of A")
    verb.add_argument(
        "--tolerance", type=float, default=0.0, help="largest absolute difference that is none"
    )
    verb.set_defaults(run=diff)
    args = parser.parse_args(argv)
    if getattr(args, "tolerance", 0) < 0:
        parser.error("--tolerance must not be negative")
    return args


def expression(text: str) -> str:
    """A regular expression that compiles."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def show(args: argparse.Namespace) -> int:
    """Print what a checkpoint holds."""
    from mmsora.apis.exchange import Stored, listing, overview, overview_lines

    stored = Stored(args.path)
    found = overview(stored)
    if args.keys is not None:
        found["tensors"] = listing(stored, args.keys)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print("\n".join(overview_lines(found)))
    for each in found.get("tensors", ()):
        print(f"{each['name']}  {each['shape']}  {each['dtype']}  {each['bytes']:,}")
    return 0


def export(args: argparse.Namespace) -> int:
    """Write weights alone."""
    from mmsora.apis.exchange import Stored, export_weights

    written = export_weights(
        Stored(args.path), args.out, args.format, args.which, args.dtype, args.force
    )
    print(f"{args.out}: {written}")
    return 0


def import_(args: argparse.Namespace) -> int:
    """Make a checkpoint folder, and say what did not fit."""
    from mmsora.apis.exchange import import_weights
    from mmsora.utils.config_names import load_config

    config = load_config(args.config) if args.config is not None else None
    report = import_weights(args.source, args.out, config, args.force)
    for what, text in (
        ("changed", "changed to fit"),
        ("kept", "not in the source, left out"),
        ("unused", "in the source alone"),
    ):
        for key in getattr(report, what):
            print(f"{text}: {key}")
    print(f"{args.out}: a checkpoint of weights, for sampling and load_from")
    return 0


def diff(args: argparse.Namespace) -> int:
    """Print how two checkpoints differ."""
    from mmsora.apis.exchange import Stored, compare

    found = compare(Stored(args.first), Stored(args.second))
    print("\n".join(found.lines()))
    differs = found.differs(args.tolerance)
    print("they differ" if differs else "they are equal")
    return int(differs)


def main(argv: list[str] | None = None) -> int:
    """Run a verb."""
    args = parse_args(argv)
    with user_errors_as_one_line():
        return args.run(args)


if __name__ == "__main__":
    sys.exit(main())

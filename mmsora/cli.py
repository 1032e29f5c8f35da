"""The ``mmsora`` command: train, sample and handle configs by name."""

import argparse
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from mmsora.utils.config_names import bases_of, config_names, load_config, resolve_config, shipped
from mmsora.utils.user_error import UserError, user_errors_as_one_line
from mmsora.version import __version__

TOOLS = {
    "train": "train a config: `mmsora train --help`",
    "infer": "sample from a checkpoint: `mmsora infer --help`",
    "checkpoint": "look at, compare, export and import checkpoints: `mmsora checkpoint --help`",
    "dataset": "look at a dataset before training: `mmsora dataset --help`",
    "likelihood": "bits per dimension of data: `mmsora likelihood --help`",
    "posthoc_ema": "average a run's weights anew: `mmsora posthoc_ema --help`",
    "estimate": "what a config takes, and whether it fits a card: `mmsora estimate --help`",
    "report": "write the page of a run anew: `mmsora report --help`",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: What follows ``mmsora``; the process's own arguments by default.

    Returns:
        The exit code. A mistake of the user leaves by ``SystemExit`` with code 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with user_errors_as_one_line():
        if arguments and arguments[0] in TOOLS:
            run_tool(arguments[0], arguments[1:])
        else:
            options = _parser().parse_args(arguments)
            options.run(options)
    return 0


def run_tool(name: str, arguments: list[str]) -> None:
    """Runs ``tools/<name>.py`` as if it had been called with these arguments."""
    script = str(shipped("tools") / f"{name}.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def list_cfg(options: argparse.Namespace) -> None:
    """Prints the names of the shipped configs."""
    for name in sorted(config_names()):
        if options.pattern.lower() in name.lower():
            print(name)


def copy_cfg(options: argparse.Namespace) -> None:
    """Copies a config to where it can be edited."""
    source, target = resolve_config(options.name), Path(options.dest).expanduser()
    if target.suffix != ".py":
        target = target / f"{source.stem}.py"
    if target.exists():
        raise UserError(f"{target} exists; remove it or choose another place")
    text = _flat(source) if options.flat else _with_its_bases(source, target.parent)
    _write(target, text)


def _flat(source: Path) -> str:
    """A config with all bases resolved, in MMEngine's text dialect."""
    title = f"{source.stem}, all of it in one file, as `mmsora copy-cfg --flat` wrote it."
    return f'"""{title}"""\n\n{load_config(source).dump()}'


def _with_its_bases(source: Path, folder: Path) -> str:
    """Copies the bases to ``folder/_base_`` and returns the config that reads them there."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    for base in bases_of(source):
        parts = base.path.with_suffix("").parts
        if base.text or "_base_" not in parts or bases_of(base.path):
            raise UserError(f"{source}:{base.line}: cannot move base {base.path}; use --flat")
        parts = parts[parts.index("_base_") :]
        copy = folder.joinpath(*parts).with_suffix(".py")
        if not copy.exists():  # shared with a config copied earlier, and perhaps edited since
            _write(copy, base.path.read_text(encoding="utf-8"))
        line = lines[base.line - 1]
        lines[base.line - 1] = re.sub(r"from\s+\S+", f"from .{'.'.join(parts)}", line, count=1)
    return "".join(lines)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmsora", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in TOOLS.items():  # for the list in --help; main() runs them
        commands.add_parser(name, help=text)

    command = commands.add_parser("list-cfg", help="print the names of the configs")
    command.add_argument("-p", "--pattern", default="", help="only names that contain this")
    command.set_defaults(run=list_cfg)

    command = commands.add_parser(
        "copy-cfg",
        help="copy a config to where it can be edited",
        description="Copies a config, and beside it the files that it inherits (DEST/_base_), so "
        "that the copy trains from where it lies. With --flat, one file with everything in it, "
        "in MMEngine's text dialect: a config may inherit it by `_base_ = 'FILE'`, which "
        "MMEngine does not allow for the pure-Python original. Nothing is overwritten.",
    )
    command.add_argument("name", metavar="NAME", help="a name that list-cfg prints, or a path")
    command.add_argument("dest", metavar="DEST", help="a folder, or a file that ends in .py")
    command.add_argument("--flat", action="store_true", help="one self-contained file")
    command.set_defaults(run=copy_cfg)
    return parser


if __name__ == "__main__":
    sys.exit(main())

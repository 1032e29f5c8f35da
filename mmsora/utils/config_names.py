"""Configs by name, and their mistakes in one line each."""

from __future__ import annotations

import ast
import difflib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmsora.utils.user_error import UserError

if TYPE_CHECKING:
    from mmengine.config import Config

SUFFIXES = (".py", ".json", ".yaml", ".yml")


class Base(NamedTuple):
    """A file that a config inherits, and the line that says so."""

    path: Path
    line: int
    text: bool  # by `_base_ = ...`; else by `with read_base()`


def shipped(folder: str) -> Path:
    """The ``configs`` or ``tools`` of this installation: of its checkout, or of its wheel."""
    package = Path(__file__).resolve().parents[1]
    installed = package / ".mim" / folder
    return installed.resolve() if installed.is_dir() else package.parent / folder


def config_names() -> dict[str, Path]:
    """Every shipped config by its bare name; bases have none."""
    root = shipped("configs")
    paths = sorted(path for path in root.rglob("*.py") if "_base_" not in path.parts)
    return {path.stem: path for path in paths}


def resolve_config(name: str | os.PathLike[str]) -> Path:
    """Finds a config.

    Args:
        name: A path, or the bare name of a shipped config such as ``latte_moving_digits``.

    Returns:
        The file.

    Raises:
        UserError: There is no such config, or MMEngine reads no such file.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        names = config_names()
        if str(name) in names:
            return names[str(name)]
        near = difflib.get_close_matches(path.stem, names, n=1)
        hint = f"did you mean {near[0]}?" if near else "`mmsora list-cfg` prints the names"
        raise UserError(f"config {name} not found, as a path or as a shipped name; {hint}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a config ends in one of {', '.join(SUFFIXES)}")
    return path


def load_config(name: str | os.PathLike[str]) -> Config:
    """Reads a config and everything that it names.

    Args:
        name: A path or a shipped name, as in :func:`resolve_config`.

    Returns:
        The config. Every class that a pure-Python config imports is known to exist.

    Raises:
        UserError: With the file, the line and the cure, where the config cannot be read.
    """
    from mmengine.config import Config

    path = resolve_config(name)
    files = list(_walk(path))
    try:
        config = Config.fromfile(path)
    except Exception as error:  # a config is code and may raise anything
        raise UserError(f"{_where(error, path, files)}: {_one_line(error)}") from error
    _import_all(config._cfg_dict, path)
    return config


def bases_of(path: Path) -> list[Base]:
    """The files that a Python config inherits directly.

    Args:
        path: The config.

    Returns:
        The bases in the order of the file; none for JSON and YAML, which MMEngine resolves.

    Raises:
        UserError: The file is not Python, or mixes MMEngine's two dialects.
    """
    if path.suffix != ".py":
        return []
    tree = _parse(path)
    bases = list(_bases(tree, path))
    texts = [base for base in bases if base.text]
    if texts and _is_pure_python(tree):
        raise UserError(
            f"{path}:{texts[0].line}: a config with `_base_` cannot import classes or use "
            "`read_base`: name classes by strings, type='Latte'"
        )
    return bases


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None


def _bases(tree: ast.Module, path: Path) -> Iterator[Base]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_base_":
            for item in getattr(node.value, "elts", [node.value]):
                if not (isinstance(item, ast.Constant) and isinstance(item.value, str)):
                    raise UserError(f"{path}:{item.lineno}: `_base_` takes strings")
                if "::" not in item.value:  # of another OpenMMLab package: MMEngine finds it
                    yield Base(path.parent / item.value, item.lineno, text=True)
        if isinstance(node, ast.With):
            for item in node.body:
                if isinstance(item, ast.ImportFrom) and item.level and item.module:
                    folder = path.resolve().parents[item.level - 1]
                    file = folder / f"{item.module.replace('.', '/')}.py"
                    yield Base(file, item.lineno, text=False)


def _is_pure_python(tree: ast.Module) -> bool:
    """Whether MMEngine reads a file as pure Python: it has bases by import, or imports classes."""
    modules = [
        *(node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)),
        *(name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names),
    ]
    return any(isinstance(node, ast.With) for node in tree.body) or any(
        module.split(".")[0] not in sys.stdlib_module_names
        for module in modules
        if module != "mmengine.config"
    )


def _walk(path: Path) -> Iterator[Path]:
    """A config and all that it inherits, once it is known that MMEngine can follow the chain."""
    yield path
    for base in bases_of(path):
        place = f"{path}:{base.line}"
        if not base.path.is_file():
            raise UserError(f"{place}: base {base.path} not found")
        if base.path.suffix == ".py":
            if base.text and _is_pure_python(_parse(base.path)):
                raise UserError(
                    f"{place}: `_base_` cannot inherit {base.path.name}, which is pure Python "
                    f"(it imports); run `mmsora copy-cfg {base.path} FILE --flat` and inherit FILE"
                )
            if not base.text and any(below.text for below in bases_of(base.path)):
                raise UserError(
                    f"{place}: `read_base` cannot inherit {base.path.name}, which has a `_base_`; "
                    f"run `mmsora copy-cfg {base.path} FILE --flat` and inherit FILE"
                )
        yield from _walk(base.path)


def _where(error: Exception, path: Path, files: list[Path]) -> str:
    """The line of the config file that raised, or the config when MMEngine itself did."""
    known = {file.resolve() for file in files}
    for frame, line in traceback.walk_tb(error.__traceback__):
        if Path(frame.f_code.co_filename).resolve() in known:
            return f"{frame.f_code.co_filename}:{line}"
    return str(path)


def _one_line(error: Exception) -> str:
    if isinstance(error, ImportError) and error.__cause__:  # custom_imports; MMEngine adds a page
        return f"{error.__cause__}; is the folder that holds it on PYTHONPATH?"
    message = " ".join(str(error).split())
    if "is reserved for config file" in message:
        name = message.strip("'\"").split()[0]
        return f"MMEngine keeps the name {name} for itself; call the variable otherwise"
    return message or "what a pure-Python config imports can be named in it, but not called"


def _import_all(value: Any, path: Path) -> None:
    """Imports what a pure-Python config names; MMEngine would do so at the first use."""
    from mmengine.config.lazy import LazyAttr, LazyObject

    if isinstance(value, LazyAttr | LazyObject):
        try:
            value.build()
        except (ImportError, AttributeError) as error:
            place = (value.location or str(path)).replace(", line ", ":")
            near = difflib.get_close_matches(str(value), dir(sys.modules.get(value.module)), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{place}: {_one_line(error)}{hint}") from error
    elif isinstance(value, dict):
        for item in dict.values(value):  # ConfigDict's own values() would build
            _import_all(item, path)
    elif isinstance(value, list | tuple):
        for item in value:
            _import_all(item, path)

"""Component packages find their modules by looking, so that a new paper edits no list."""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


def exports(package: str, path: Iterable[str]) -> dict[str, Any]:
    """Import every public module of a package and collect what their ``__all__`` names.

    A package's ``__init__`` calls ``globals().update(exports(__name__, __path__))``.

    Args:
        package: Dotted name of the package.
        path: The package's ``__path__``.

    Returns:
        The collected objects by name.

    Raises:
        ImportError: Two modules export the same name.
    """
    found: dict[str, Any] = {}
    for info in sorted(pkgutil.iter_modules(path), key=lambda info: info.name):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        for name in getattr(module, "__all__", ()):
            if name in found and found[name] is not getattr(module, name):
                raise ImportError(f"{package}: two modules export {name!r}; rename one of them")
            found[name] = getattr(module, name)
    return found

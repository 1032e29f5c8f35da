"""Mistakes in a config's content: found before anything is built, told in one line each.

MMEngine takes any key. Here every dict that becomes a call is held against the signature of what
it calls, whether its ``type`` is a class, a name or a dotted string, or whether it has none
because its place implies one (``train_dataloader``).
"""

import difflib
import importlib
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.utils import import_modules_from_strings

from mmsora.utils.config_calls import (
    PLACES,
    Keys,
    Place,
    Takes,
    call_of,
    is_ours,
    label_of,
    name_of,
    place_of,
    resolve,
    shorten,
    shown,
    suggestion,
    top_level_keys,
)
from mmsora.utils.user_error import UserError

__all__ = [
    "apply_choice",
    "apply_overrides",
    "check_config",
    "config_dict",
    "config_diff",
    "config_from_dict",
    "user_errors",
]


def check_config(cfg: Config) -> None:
    """Refuses keys that nothing would read, types that do not exist and missing arguments.

    Top-level names of your own are welcome unless they resemble a known key. What a class from
    outside this toolbox does with its arguments is its own business: they are not looked into.
    Makes the ``custom_imports`` first, as MMEngine does for text configs alone.

    Args:
        cfg: The config, overrides applied.

    Raises:
        UserError: With the place of the mistake and its cure.
    """
    known, values = top_level_keys(), cfg._to_lazy_dict()
    _import_custom(values)
    if "train_cfg" in values:
        for needed in ("model", "train_dataloader", "optim_wrapper"):
            if needed not in values:
                raise UserError(
                    f"the config has train_cfg and needs {needed} too, which is missing"
                )
    for key, value in values.items():
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if key == "runner_type":
            resolve(value, Place("RUNNERS"), (key,))
        elif key in known:
            _check(value, (key,))
        elif near and not key.startswith("_"):
            raise UserError(f"{shown((key,), value)}: unknown key; did you mean '{near[0]}'?")


def apply_overrides(cfg: Config, options: Mapping[str, Any]) -> None:
    """Sets values by dotted keys, as ``--cfg-options`` gives them; list indices are keys too.

    A key that is new must be one that its place takes. ``KEY._delete_=True`` empties a dict
    first. A class is named by a string, as a class object would keep the config from being
    printed.

    Args:
        cfg: Changed in place.
        options: Values by dotted keys.

    Raises:
        UserError: A key is unknown, or a new type does not take what the config gave the old.
    """
    order = {"_delete_": 0, "type": 1}
    flat = [(tuple(key.split(".")), value) for key, value in options.items()]
    flat.sort(key=lambda option: order.get(option[0][-1], 2))
    for keys, value in flat:
        _override(cfg._cfg_dict, keys, value)
    for keys, _ in flat:
        if keys[-1] == "type":
            _check_siblings(cfg._cfg_dict, keys[:-1])


def apply_choice(cfg: Config, offers: str, name: str) -> None:
    """Sets what a config offers under a name, as ``layouts`` and ``samplers`` do.

    Args:
        cfg: Changed in place.
        offers: The top-level key of the offers: values by dotted keys, by name.
        name: The one to take.

    Raises:
        UserError: The config does not offer it.
    """
    offered = cfg.get(offers, {})
    if name not in offered:
        known = f"it offers {', '.join(offered)}" if offered else "it offers none"
        raise UserError(f"the config has no {offers.removesuffix('s')} {name!r}; {known}")
    apply_overrides(cfg, offered[name])


def config_dict(cfg: Config) -> dict[str, Any]:
    """The config in plain values that JSON can hold.

    Args:
        cfg: Of either dialect.

    Returns:
        Nested dicts and lists. Classes are dotted strings, tuples are lists, dtypes strings.
    """
    return _plain(cfg._to_lazy_dict())


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The config that :func:`config_dict` was given, with its ``custom_imports`` made.

    Args:
        values: What :func:`config_dict` returned, through JSON or not.

    Returns:
        A config that builds what the first one did.

    Raises:
        UserError: A module of ``custom_imports`` cannot be imported.
    """
    _import_custom(values)
    return Config(dict(values))


def config_diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two configs.

    Args:
        old: From :func:`config_dict`.
        new: From :func:`config_dict`.

    Returns:
        A line for each value: ``key: old -> new``, ``+ key: value`` or ``- key: value``.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            lines.append(f"- {key}: {before[key]!r}")
        elif key not in before:
            lines.append(f"+ {key}: {after[key]!r}")
        elif before[key] != after[key]:
            lines.append(f"{key}: {before[key]!r} -> {after[key]!r}")
    return lines


@contextmanager
def user_errors() -> Iterator[None]:
    """Tells what a constructor, or a check of ours, has against its input in one line.

    For use around building from a config and running what was built. Errors that other code
    raises while running pass through, and ``MMSORA_TRACEBACK=1`` in the environment leaves all
    of them as they are.

    Raises:
        UserError: With the class that was being built and its message.
    """
    try:
        yield
    except ImportError as error:  # MMEngine's, of a tracker that is not installed
        if "pip install" not in str(error):
            raise
        raise UserError(" ".join(str(error).split())) from error
    except (AssertionError, FileNotFoundError, KeyError, TypeError, ValueError) as error:
        built = _being_built(error)
        if os.environ.get("MMSORA_TRACEBACK") == "1" or not (built or _raised_by_us(error)):
            raise
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        message = " ".join(message.split()) or "no message"
        if not isinstance(error, ValueError | FileNotFoundError):
            message = f"{type(error).__name__}: {message} (MMSORA_TRACEBACK=1 shows where)"
        raise UserError(f"{built}{message}") from error


def _raised_by_us(error: Exception) -> bool:
    """Whether the error was raised in this package itself, not in something that it called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("mmsora.")


def _being_built(error: Exception) -> str:
    """The class that MMEngine was calling when an error arose, with a colon."""
    name = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "build_from_cfg" and frame.f_locals.get("obj_cls"):
            name = f"{name_of(frame.f_locals['obj_cls'])}: "
    return name


# Checking


def _import_custom(values: Mapping[str, Any]) -> None:
    custom = values.get("custom_imports")
    if custom:
        _check(custom, ("custom_imports",))
        try:
            import_modules_from_strings(**custom)
        except TypeError as error:
            raise UserError(f"custom_imports: {error}") from error
        except ImportError as error:
            raise UserError(
                f"custom_imports: {error.__context__ or error}; is the folder that holds it on "
                "PYTHONPATH?"
            ) from error


def _check(value: Any, keys: Keys) -> None:
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check(item, (*keys, str(i)))
    elif isinstance(value, dict):
        target, takes = call_of(value, keys)
        _check_keys(value, keys, target, takes)
        if target is None or is_ours(target):
            for key, item in value.items():
                _check(item, (*keys, str(key)))


def _check_keys(value: dict, keys: Keys, target: Callable | None, takes: Takes) -> None:
    label = label_of(target, value, keys)
    for key, item in value.items():
        if not takes.any and key not in takes.names and not str(key).startswith("_"):
            hint = suggestion(str(key), takes.names)
            raise UserError(f"{shown((*keys, key), item)}: {label} takes no '{key}'{hint}")
    missing = sorted(takes.needs.difference(value))
    if missing:
        where = ".".join(keys) + (f" ({label})" if label != keys[-1] else "")
        raise UserError(f"{where}: missing {', '.join(map(repr, missing))}")


# Overrides


def _override(root: ConfigDict, keys: Keys, value: Any) -> None:
    if keys[0] in root and keys[0] not in top_level_keys():
        used = [path for path in _paths(root) if "." in path and path.endswith(f".{keys[-1]}")]
        hint = f"; set {' and '.join(used)} instead" if used else ""
        raise UserError(
            f"{shown(keys, value)}: '{keys[0]}' is a name of the config file's own, which was "
            f"read already{hint}"
        )
    node: Any = root
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, dict) and (key not in node or dict.__getitem__(node, key) is None):
            _check_new(root, node, keys, depth, value)
            place = place_of({}, keys[: depth + 1])
            if place.nested or (place.registry and not place.default):
                near = difflib.get_close_matches(key, [k for k in node if k != key], n=1)
                meant = ".".join((*keys[:depth], *near, *keys[depth + 1 :]))
                hint = (
                    f"did you mean '{meant}'?" if near else "say in the config of which type it is"
                )
                raise UserError(
                    f"{shown(keys, value)}: {'.'.join(keys[: depth + 1])} is not set; {hint}"
                )
            node[key] = ConfigDict()
        node = _item(node, keys, depth, value)
    key = keys[-1]
    if isinstance(node, dict) and key == "_delete_":
        node.clear()
    elif isinstance(node, dict):
        if key not in node:
            _check_new(root, node, keys, len(keys) - 1, value)
        node[key] = value
    elif isinstance(node, tuple):
        raise UserError(f"{shown(keys, value)}: {'.'.join(keys[:-1])} is a tuple; set all of it")
    else:
        _item(node, keys, len(keys) - 1, value)
        node[int(key)] = ConfigDict._hook(value)


def _item(node: Any, keys: Keys, depth: int, value: Any) -> Any:
    """The item ``keys[depth]`` of a container that stands at ``keys[:depth]``."""
    key = keys[depth]
    if isinstance(node, dict):
        return dict.__getitem__(node, key)
    where, parent = shown(keys, value), ".".join(keys[:depth])
    if not isinstance(node, list | tuple):
        raise UserError(f"{where}: {parent} is {shorten(node)}, which has no keys")
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(f"{where}: {parent} is a list; '{key}' is none of 0 to {len(node) - 1}")
    return node[int(key)]


def _check_new(root: ConfigDict, node: dict, keys: Keys, depth: int, value: Any) -> None:
    """Refuses a key that its dict does not have and its place does not take."""
    key, parent = keys[depth], keys[:depth]
    target: Callable | None = None
    names, free = top_level_keys(), False
    if parent:
        target, takes = call_of(node, parent)
        names = takes.names
        free = takes.any and (target is not None or parent[-1] in PLACES)
    if free or key in names:
        return
    known = {*names, *node} if parent else names
    near = difflib.get_close_matches(key, known, n=1)
    paths = [path for path in _paths(root) if path.split(".")[-1] == keys[-1]]
    if near:
        hint = f"; did you mean '{'.'.join((*parent, near[0], *keys[depth + 1 :]))}'?"
    elif paths:
        hint = f"; did you mean '{_nearest('.'.join(keys), paths)}'?"
    else:
        hint = suggestion(key, known)
    taker = label_of(target, node, parent) if parent else "a config"
    raise UserError(f"{shown(keys, value)}: {taker} takes no '{key}'{hint}")


def _check_siblings(root: ConfigDict, parent: Keys) -> None:
    """Refuses a new type that does not take what is left of the old one."""
    node: Any = root
    for depth in range(len(parent)):
        node = _item(node, parent, depth, None)
    target, takes = call_of(node, parent)
    left = [key for key in node if key not in takes.names and not takes.any]
    if left and target:
        raise UserError(
            f"{'.'.join(parent)}.type={name_of(target)}: {name_of(target)} takes no "
            f"{', '.join(map(repr, left))}; add {'.'.join(parent)}._delete_=True to drop what the "
            "config sets there"
        )


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted key of everything inside a container."""
    pairs = dict.items(node) if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        yield f"{prefix}{key}"
        if isinstance(value, dict | list | tuple):
            yield from _paths(value, f"{prefix}{key}.")


# Values


def _plain(value: Any) -> Any:
    if isinstance(value, LazyAttr | LazyObject):
        value = value.build()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    return _dotted(value) if callable(value) and value.__module__ else str(value)


def _dotted(value: Any) -> str:
    """The shortest dotted string that imports an object, which outlives a move of its file."""
    parts, name = value.__module__.split("."), value.__name__
    for i in range(1, len(parts)):
        package = ".".join(parts[:i])
        if getattr(importlib.import_module(package), name, None) is value:
            return f"{package}.{name}"
    return f"{value.__module__}.{name}"


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a list without dicts is a value."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        pairs = enumerate(value)
    if not pairs or not value:
        yield prefix, value
        return
    for key, item in pairs:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))


# Words


def _nearest(word: str, words: Iterable[str]) -> str:
    return max(words, key=lambda other: difflib.SequenceMatcher(None, word, other).ratio())

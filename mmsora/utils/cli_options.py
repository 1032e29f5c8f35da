"""``--cfg-options key=value``: MMEngine's syntax, read without importing MMEngine."""

import argparse
import ast
from collections.abc import Iterator
from typing import Any

OPENERS = {"(": ")", "[": "]", "{": "}"}
QUOTES = "'\""


def key_values(text: str) -> tuple[str, Any]:
    """Reads one option.

    Values are numbers, ``True``, ``False``, ``None``, strings (quote them to keep ``"1"`` one),
    lists ``[1,2]`` or ``1,2`` and tuples ``(1,2)``, nested as you like, and dicts as Python writes
    them, ``{'a': 1}``.

    Args:
        text: ``dotted.key=value``.

    Returns:
        The key and the value.

    Raises:
        argparse.ArgumentTypeError: There is no ``=``, no key, or brackets or quotes do not close.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    if not all(key.split(".")):
        raise argparse.ArgumentTypeError(
            f"{text!r}: {key!r} is not a dotted key such as model.vae"
        )
    try:
        return key, _value(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _value(text: str) -> Any:
    text = text.strip()
    items = list(_split(text))
    if len(items) > 1:
        return _sequence(items)
    ends = text[:1] + text[-1:]
    if ends == "{}":
        return _dict(text)
    if ends in ("()", "[]"):
        values = _sequence(list(_split(text[1:-1])))
        return tuple(values) if ends == "()" else values
    if ends in ("''", '""'):
        return text[1:-1]
    return _scalar(text)


def _dict(text: str) -> dict[str, Any]:
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text} is no dict as Python writes it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{text} is a {type(value).__name__}, not a dict")
    return value


def _sequence(items: list[str]) -> list[Any]:
    if not items[-1].strip():  # a trailing comma, or nothing between the brackets
        items = items[:-1]
    return [_value(item) for item in items]


def _scalar(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return None if text == "None" else text


def _split(text: str) -> Iterator[str]:
    """The pieces between the commas that are in no brackets and no quotes."""
    closers: list[str] = []
    quote, start = "", 0
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES and text[:i].rstrip()[-1:] in ("", "(", "[", ","):
            quote = letter
        elif letter in OPENERS:
            closers.append(OPENERS[letter])
        elif letter in OPENERS.values():
            if not closers or closers.pop() != letter:
                raise ValueError(f"{letter!r} closes nothing")
        elif letter == "," and not closers:
            yield text[start:i]
            start = i + 1
    if quote or closers:
        raise ValueError(f"{quote or closers[-1]!r} is missing at the end")
    yield text[start:]

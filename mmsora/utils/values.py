"""Values of a user's config, refused in one line that names their key."""

from typing import Any

__all__ = ["check_number", "check_switch", "check_whole"]


def check_whole(key: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number from ``least`` on, with a ValueError that names the key."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} must be a whole number from {least} on, got {value!r}")


def check_number(key: str, value: Any, above: float = 0) -> None:
    """Refuse what is no number above ``above``, with a ValueError that names the key."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > above:
        raise ValueError(f"{key} must be a number above {above}, got {value!r}")


def check_switch(key: str, value: Any) -> None:
    """Refuse what is neither True nor False, with a ValueError that names the key."""
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be True or False, got {value!r}")

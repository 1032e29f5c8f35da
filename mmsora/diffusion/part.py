"""Parts of a process are given as objects or as their configs."""

from typing import Any

from mmengine.registry import Registry

__all__ = ["build_part"]


def build_part(registry: Registry, name: str, part: Any, kind: type) -> Any:
    """The part that a constructor was given.

    Args:
        registry: Where the ``type`` of a config is looked up.
        name: Of the argument, for messages.
        part: The part, its config, or any callable that does as one.
        kind: What it has to be.

    Returns:
        The part.

    Raises:
        ValueError: It is none, or of another kind.
    """
    if callable(part):  # an object that is one, or does as one
        return part
    built = registry.build(part) if isinstance(part, dict) else part
    if not isinstance(built, kind):
        told = type(built).__name__ if isinstance(part, dict) else repr(part)
        raise ValueError(
            f"{name} must be a {kind.__name__}, {name}=dict(type='...') in a config; got {told}"
        )
    return built

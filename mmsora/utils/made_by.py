"""Whether a frozen encoder is the one that made what is in a cache."""

from collections.abc import Callable
from typing import Any

from mmsora.utils.user_error import UserError

__all__ = ["check_maker"]

SOURCES = ("source", "pretrained")  # names of weights, which may be the same under another


def check_maker(
    made_by: dict[str, Any], ours: dict[str, Any], build: Callable[[], Any], message: str
) -> None:
    """Compare an encoder with the one that made a cache; its weights are read only if in doubt.

    Args:
        made_by: That one's ``identity`` and, as ``weights``, its ``fingerprint``.
        ours: The ``identity`` of this one.
        build: Makes this one, without its weights.
        message: What is wrong if they differ.

    Raises:
        UserError: They do.
    """
    keys = dict.fromkeys([*ours, *made_by])
    other = [key for key in keys if key != "weights" and made_by.get(key) != ours.get(key)]
    for key in other:
        if key not in SOURCES:
            raise UserError(f"{message}: {key}={made_by.get(key)!r} there, {ours.get(key)!r} here")
    if not other:
        return
    encoder = build()
    encoder.init_weights()
    if encoder.fingerprint() != made_by.get("weights"):
        names = ", ".join(str(ours[key]) for key in SOURCES if key in ours)
        raise UserError(f"{message}: the weights in {names} are others")

"""How two checkpoints differ."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmsora.apis.exchange.stored import Stored
from mmsora.engine.resumable_runner import RUN_KEYS
from mmsora.utils.config_check import config_diff
from mmsora.utils.user_error import UserError

__all__ = ["Comparison", "PartDifference", "compare"]

NAMES = {"state_dict": "weights", "model": "weights"}  # the raw weights, in all kinds of files


class PartDifference(NamedTuple):
    """How a part differs.

    Attributes:
        part: Its name; ``weights`` are the raw ones.
        tensors: How many were compared.
        missing: Names that only the first has.
        added: Names that only the second has.
        shapes: A line for each tensor of another shape.
        largest: Largest absolute difference, and in which tensor.
        relative: Largest absolute difference within a tensor by the tensor's largest magnitude,
            and in which.
    """

    part: str
    tensors: int
    missing: list[str]
    added: list[str]
    shapes: list[str]
    largest: tuple[float, str]
    relative: tuple[float, str]

    def exceeds(self, tolerance: float) -> bool:
        """Whether it is more than an absolute difference up to ``tolerance``."""
        return bool(self.missing or self.added or self.shapes or self.largest[0] > tolerance)


class Comparison(NamedTuple):
    """How two checkpoints differ.

    Attributes:
        parts: Of the parts that both have, and those that only one has.
        left_out: Parts that were not compared: the other one holds weights alone.
        config: Lines of ``config_diff``; empty too where one has no config.
    """

    parts: list[PartDifference]
    left_out: list[str]
    config: list[str]

    def differs(self, tolerance: float) -> bool:
        """Whether anything does."""
        return bool(self.config) or any(part.exceeds(tolerance) for part in self.parts)

    def lines(self) -> Iterator[str]:
        """All of it, to be read by a person."""
        for part in self.parts:
            yield (
                f"{part.part}: {part.tensors} tensors compared, largest difference "
                f"{part.largest[0]:.3g}{_in(part.largest)}, relative {part.relative[0]:.3g}"
                f"{_in(part.relative)}"
            )
            yield from (f"  - {name}" for name in part.missing)
            yield from (f"  + {name}" for name in part.added)
            yield from (f"  {line}" for line in part.shapes)
        if self.left_out:
            yield f"not compared: {', '.join(self.left_out)}, as the other one has one part alone"
        yield from (f"config: {line}" for line in self.config)


def compare(first: Stored, second: Stored) -> Comparison:
    """Compare tensor by tensor, two of which are in memory at a time.

    Args:
        first: A checkpoint.
        second: Another one, or weights of the first that were exported: a checkpoint of a single
            part is compared with that part of the other.

    Returns:
        What differs.

    Raises:
        UserError: They have no part in common.
    """
    ours, theirs = _by_part(first), _by_part(second)
    names = list(dict.fromkeys([*ours, *theirs]))
    alone = len(ours) == 1 or len(theirs) == 1
    compared = [name for name in names if not alone or (name in ours and name in theirs)]
    if not compared:
        raise UserError(
            f"{first.path} has {', '.join(ours) or 'no tensors'}, {second.path} has "
            f"{', '.join(theirs) or 'no tensors'}: nothing to compare"
        )
    parts = [
        _part(name, (first, ours.get(name, {})), (second, theirs.get(name, {})))
        for name in compared
    ]
    configs = [
        {key: value for key, value in (stored.config or {}).items() if key not in RUN_KEYS}
        for stored in (first, second)
    ]
    config = config_diff(*configs) if all(configs) else []
    return Comparison(parts, [name for name in names if name not in compared], config)


Names = dict[str, str]  # flat ones, by those within the part


def _by_part(stored: Stored) -> dict[str, Names]:
    """A raw denoiser has its own names, whether it lies in a model's state dict or alone."""
    found: dict[str, Names] = {}
    for part in stored.parts:
        names = {key.removeprefix("denoiser."): name for key, name in stored.named(part).items()}
        found[NAMES.get(part, part)] = names
    return found


def _part(name: str, first: tuple[Stored, Names], second: tuple[Stored, Names]) -> PartDifference:
    (one, ours), (other, theirs) = first, second
    common = [key for key in ours if key in theirs]
    found = PartDifference(
        name,
        len(common),
        [key for key in ours if key not in theirs],
        [key for key in theirs if key not in ours],
        [],
        (0.0, ""),
        (0.0, ""),
    )
    for key in common:
        a, b = one.entries[ours[key]], other.entries[theirs[key]]
        if a.shape != b.shape:
            found.shapes.append(f"{key} {a.shape} -> {b.shape}")
            continue
        largest, size = _difference(one.read(ours[key]), other.read(theirs[key]))
        relative = largest / size if size else largest and float("inf")
        found = found._replace(
            largest=max(found.largest, (largest, key), key=_number),
            relative=max(found.relative, (relative, key), key=_number),
        )
    return found


def _difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest difference, and largest magnitude of the first; NaN is equal to NaN alone."""
    if not a.numel():
        return 0.0, 0.0
    a, b = a.double(), b.double()
    is_same = (a == b) | (a.isnan() & b.isnan())
    difference = (a - b).abs().masked_fill(is_same, 0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return difference.max().item(), a.abs().nan_to_num(nan=0).max().item()


def _number(found: tuple[float, str]) -> float:
    return found[0]


def _in(found: tuple[float, str]) -> str:
    return f" in {found[1]}" if found[1] else ""

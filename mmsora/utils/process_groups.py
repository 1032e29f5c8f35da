"""Which processes share what: every process its own samples, or several the tokens of one."""

from typing import NamedTuple

from mmengine.dist import get_dist_info
from torch.distributed import ProcessGroup

__all__ = ["data_info", "sequence_group", "set_sequence_group"]


class _Sequence(NamedTuple):
    group: ProcessGroup
    size: int


_sequence: _Sequence | None = None


def set_sequence_group(group: ProcessGroup | None, size: int = 1) -> None:
    """Say which processes share the tokens of a sample with this one.

    Args:
        group: Them and this one: neighbours by rank. None when there are none.
        size: How many they are; every process is in a group of so many.
    """
    global _sequence
    _sequence = None if group is None or size == 1 else _Sequence(group, size)


def sequence_group() -> ProcessGroup | None:
    """The processes that share the tokens of a sample with this one, or None."""
    return None if _sequence is None else _sequence.group


def data_info() -> tuple[int, int]:
    """This process' place among those that have samples of their own, and how many these are.

    Processes that share a sample have the same place.

    Returns:
        What ``get_dist_info`` gives where no tokens are shared.
    """
    rank, world = get_dist_info()
    size = 1 if _sequence is None else _sequence.size
    return rank // size, world // size

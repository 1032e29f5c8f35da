"""Tensors of which each process has a share, beside those that it has whole."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

__all__ = ["local_part", "part_of", "sharded_as", "whole"]


def local_part(tensor: Tensor) -> Tensor:
    """What of a tensor is on this process; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_as(like: Tensor, local: Tensor) -> Tensor:
    """What is on this process as a part of the whole.

    Args:
        like: A tensor of the whole's shape, sharded or not.
        local: Shaped like this process' part of it.

    Returns:
        ``local`` itself where ``like`` is not sharded.
    """
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, as another one is sharded.

    Args:
        tensor: The whole.
        like: A tensor of its shape, sharded or not.

    Returns:
        With the type and on the device of ``like`` where that is sharded, else ``tensor``.
    """
    if not isinstance(like, DTensor):
        return tensor
    for dim, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            parts = tensor.chunk(like.device_mesh.size(dim), placement.dim)
            rank = like.device_mesh.get_local_rank(dim)
            none = tensor.narrow(placement.dim, 0, 0)
            tensor = parts[rank] if rank < len(parts) else none
    return sharded_as(like, tensor.to(like.to_local()))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

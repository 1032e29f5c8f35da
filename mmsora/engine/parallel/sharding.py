"""Weights of which each process holds a share, and those of which all hold the same."""

from collections.abc import Iterable

import torch
from mmengine.device import get_device
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from mmsora.engine.blocks import blocks_of
from mmsora.engine.parallel.plan import Parallel
from mmsora.utils.process_groups import set_sequence_group

__all__ = ["is_sharded", "make_mesh", "same_on_all", "shard"]


def make_mesh(plan: Parallel, world: int) -> DeviceMesh | None:
    """The processes by what they share, of which the layers learn who shares their tokens.

    Args:
        plan: Its ``sequence`` divides the world.
        world: Number of processes.

    Returns:
        A mesh (data,), or (data, sequence) where tokens are shared; None for a process that knows
        no others.
    """
    set_sequence_group(None)
    if not distributed.is_initialized():
        return None
    if plan.sequence == 1:
        return init_device_mesh(get_device(), (world,), mesh_dim_names=("data",))
    shape = (world // plan.sequence, plan.sequence)
    mesh = init_device_mesh(get_device(), shape, mesh_dim_names=("data", "sequence"))
    set_sequence_group(mesh.get_group("sequence"), plan.sequence)
    return mesh


def same_on_all(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values, where each has its own.

    Args:
        tensors: Weights and buffers; the shares of sharded ones are left as they are.
    """
    for tensor in tensors:
        if distributed.is_initialized() and not isinstance(tensor, DTensor):
            distributed.broadcast(tensor.detach(), src=0)


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds a share of a module's weights, so that all must call it."""
    return isinstance(module, FSDPModule)


def shard(network: nn.Module, plan: Parallel, dtype: torch.dtype | None) -> None:
    """Deal a network's weights out (ZeRO, arXiv:1910.02054), block by block, by torch's FSDP2.

    Under ``zero3`` a block's weights are gathered when it is used; under ``zero2`` they stay from
    the first use to the backward pass, as do those outside of all blocks under both.

    Args:
        network: Changed in place: its parameters become DTensors over all processes.
        plan: Of a sharded mode.
        dtype: Of what is gathered; None is that of the weights. Gradients are averaged in
            float32.
    """
    mesh = init_device_mesh(get_device(), (distributed.get_world_size(),), mesh_dim_names=("all",))
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    offload: OffloadPolicy = OffloadPolicy()
    if plan.offload:
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    blocks = [block for _, block in blocks_of(network)]
    for module in (*blocks, network):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=plan.mode == "zero3" and (module is not network or not blocks),
            mp_policy=precision,
            offload_policy=offload,
        )
    network.register_forward_hook(_put_back)


def _put_back(network: nn.Module, *call: object) -> None:
    """Drop gathered weights that no backward pass will: they would be old at the next call."""
    if not torch.is_grad_enabled():
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

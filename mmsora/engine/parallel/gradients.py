"""Gradients, whole on every process or in shares: averaged, measured and clipped alike."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["AgreedScaler", "average_gradients", "clip_to_norm", "clip_to_value", "gradient_norm"]


def _local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gradients(weights: Iterable[nn.Parameter]) -> list[Tensor]:
    return [weight.grad for weight in weights if weight.grad is not None]


def _by_device(gradients: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    """What of the gradients is on this process; torch changes those of a device in one call."""
    found: dict[torch.device, list[Tensor]] = {}
    for gradient in map(_local, gradients):
        found.setdefault(gradient.device, []).append(gradient)
    return found


def _reduce(
    value: Tensor, sharded: Sequence[Tensor], how: distributed.ReduceOp.RedOpType
) -> Tensor:
    """A number of each process as one of all those that share the gradients."""
    mesh = next(gradient.device_mesh for gradient in sharded if isinstance(gradient, DTensor))
    value = value.to(mesh.device_type)  # shares may be in the memory of the host
    distributed.all_reduce(value, how, mesh.get_group())
    return value


@torch.no_grad()
def average_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Average whole gradients over all processes, in one collective.

    Args:
        weights: Those that every process has; each has gradients of the same ones.
    """
    gradients = _gradients(weights)
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def gradient_norm(weights: Iterable[nn.Parameter], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients as one vector, the same on every process.

    Args:
        weights: Of which some may be sharded.
        norm_type: The p of the norm, or infinity.

    Returns:
        A scalar.
    """
    gradients = _gradients(weights)
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norm = _norm(whole, norm_type)
    if not sharded:
        return norm
    share, total = _norm([_local(gradient) for gradient in sharded], norm_type), norm
    if norm_type == float("inf"):
        share = _reduce(share, sharded, distributed.ReduceOp.MAX)
        return torch.maximum(share, total.to(share))
    power = _reduce(share**norm_type, sharded, distributed.ReduceOp.SUM)
    return (power + total.to(power) ** norm_type) ** (1 / norm_type)


def _norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    filled = [tensor for tensor in tensors if tensor.numel()]  # a share may be empty
    if not filled:
        return torch.zeros(())
    norms = torch._foreach_norm(filled, norm_type)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


@torch.no_grad()
def clip_to_norm(weights: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their norm is at most ``max_norm``.

    Args:
        weights: Of which some may be sharded.
        norm: What ``gradient_norm`` gave.
        max_norm: The limit.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for device, gradients in _by_device(_gradients(weights)).items():
        torch._foreach_mul_(gradients, factor.to(device))


@torch.no_grad()
def clip_to_value(weights: Iterable[nn.Parameter], clip_value: float) -> None:
    """Cut every number of every gradient to ``[-clip_value, clip_value]``."""
    for gradients in _by_device(_gradients(weights)).values():
        torch._foreach_clamp_min_(gradients, -clip_value)
        torch._foreach_clamp_max_(gradients, clip_value)


class AgreedScaler(torch.amp.GradScaler):
    """Torch's scaler, for gradients too of which each process has a share: when those of one
    process overflow, all of them lower the scale."""

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients, found = _gradients(weights), {}
        for device, local in _by_device(gradients).items():
            flag, scale = found_inf.to(device, copy=True), inv_scale.to(device)
            torch._amp_foreach_non_finite_check_and_unscale_(local, flag, scale)
            if any(isinstance(gradient, DTensor) for gradient in gradients):
                flag = _reduce(flag, gradients, distributed.ReduceOp.MAX).to(device)
            found[device] = flag
        return found

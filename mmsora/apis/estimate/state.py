"""Bytes that stay from step to step: weights, gradients, the optimizer's state and averages."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn

from mmsora.engine.hooks.ema_hook import DenoiserEMAHook
from mmsora.engine.parallel.plan import Parallel
from mmsora.models.conditioners.looking import lookers
from mmsora.models.latent_diffusion import LatentDiffusion
from mmsora.registry import HOOKS
from mmsora.utils.memory import LiveBytes, num_bytes
from mmsora.utils.user_error import UserError

__all__ = ["averages_in", "optimizer_bytes", "share_of", "split_weights", "updated_here"]

# Of bitsandbytes' 8-bit optimizers: states, numbers that share a scale, and the size from which
# on a weight has 8-bit state.
STATES_8BIT = {"Adam8bit": 2, "AdamW8bit": 2, "Lion8bit": 1}
BLOCK_8BIT, SMALLEST_8BIT = 256, 4096


def share_of(weight: Tensor, plan: Parallel, processes: int) -> Tensor:
    """What of a weight the first process holds, which has as much as any.

    Args:
        weight: On the meta device.
        plan: For these processes.
        processes: Their number.

    Returns:
        The weight, or its first rows where FSDP2 deals it out.
    """
    if not plan.is_sharded:
        return weight
    return torch.empty_like(weight[: -(-weight.shape[0] // processes)])


def split_weights(model: LatentDiffusion) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and buffers besides the denoiser's parameters: trained or saved, and frozen.

    Args:
        model: On the meta device.

    Returns:
        Both.
    """
    saved = model.state_dict().keys()
    aside = {id(weight) for weight in model.denoiser.parameters()}
    rest: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    rest = {name: tensor for name, tensor in rest.items() if id(tensor) not in aside}
    ours = [t for n, t in rest.items() if n in saved or n.startswith("denoiser.")]
    frozen = [t for n, t in rest.items() if n not in saved and not n.startswith("denoiser.")]
    if model.trains_on_latents:
        unread = [model.vae, *(part.encoder for part in lookers(model.conditioner))]
        theirs = {id(t) for part in unread for t in (*part.parameters(), *part.buffers())}
        frozen = [tensor for tensor in frozen if id(tensor) not in theirs]
    return ours, frozen


def updated_here(weights: Sequence[Tensor], plan: Parallel, processes: int) -> list[Tensor]:
    """The weights whose state is on the process that has most of it.

    Args:
        weights: What is trained, as this process holds it.
        plan: For these processes.
        processes: Their number.

    Returns:
        All of them, or the share that ZeroRedundancyOptimizer gives a process.
    """
    if plan.mode != "zero1":
        return list(weights)
    shares: list[list[Tensor]] = [[] for _ in range(processes)]
    sizes = [0] * processes
    for weight in sorted(weights, key=lambda w: w.numel(), reverse=True):
        place = sizes.index(min(sizes))
        shares[place].append(weight)
        sizes[place] += weight.numel()
    return shares[sizes.index(max(sizes))]


def optimizer_bytes(config: dict[str, Any], weights: Iterable[Tensor]) -> tuple[int, int]:
    """The state of an optimizer, found by making it.

    Args:
        config: Of the optimizer; ``type`` is a name.
        weights: What it updates on this process, on the meta device.

    Returns:
        Bytes of the state, and the most that an update needs besides.

    Raises:
        UserError: It cannot be run without numbers.
    """
    options = dict(config)
    kind = OPTIMIZERS.get(options.pop("type"))
    fused = options.pop("fused", False)
    weights = [nn.Parameter(torch.empty_like(weight, device="meta")) for weight in weights]
    if kind is None or kind.__name__ in STATES_8BIT:
        name = str(config["type"]).rpartition(".")[2]
        return sum(_bytes_8bit(weight, STATES_8BIT.get(name, 2)) for weight in weights), 0
    if not weights:
        return 0, 0
    gradients = [torch.empty_like(weight) for weight in weights]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    try:
        optimizer = kind(weights, **options)
        optimizer.step()
        state = [x for of in optimizer.state.values() for x in of.values() if torch.is_tensor(x)]
        with LiveBytes([*weights, *state, *gradients]) as memory:
            optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"optim_wrapper.optimizer: the state of {kind.__name__} cannot be estimated: {error}"
        ) from error
    return num_bytes(state), 0 if fused else memory.peak


def _bytes_8bit(weight: Tensor, states: int) -> int:
    """A byte a number and a scale in float32 a block; small weights have float32 state."""
    if weight.numel() < SMALLEST_8BIT:
        return 4 * states * weight.numel()
    return states * (weight.numel() + 4 * -(-weight.numel() // BLOCK_8BIT))


def averages_in(values: dict[str, Any]) -> int:
    """How many averages of the denoiser's weights a config keeps.

    Args:
        values: The config in plain values.

    Returns:
        Their number.
    """
    hooks = [*(values.get("custom_hooks") or ()), *(values.get("default_hooks") or {}).values()]
    return sum(
        1 + len(hook.get("profiles") or ())
        for hook in hooks
        if isinstance(hook, dict) and HOOKS.get(hook["type"]) is DenoiserEMAHook
    )

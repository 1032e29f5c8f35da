"""Activations that are computed anew for the backward pass instead of being kept."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import flop_registry

from mmsora.engine.blocks import blocks_of
from mmsora.utils.values import check_whole

__all__ = ["ActivationCheckpointing"]

MODES = ("none", "full", "every", "selective")
# What is dear to compute, and kept: matrix products and attention ...
PRODUCTS = {*flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu}
# ... and what waits for other processes.
COMMUNICATION = ("_c10d_functional", "_c10d_functional_autograd")


class ActivationCheckpointing:
    """``activation_checkpointing=dict(mode="full")`` in a config (arXiv:1604.06174).

    Gradients are the same bit for bit, with dropout too. It shows in training alone.

    Args:
        mode: ``none`` keeps all activations. ``full`` keeps the inputs of each block and computes
            the rest a second time: about a third more work. ``every`` does so for every
            ``every``-th block. ``selective`` keeps the results of matrix products, attention and
            communication besides, and computes what is cheap.
        every: For mode ``every``, at least 2.
    """

    def __init__(self, mode: str = "full", every: int | None = None) -> None:
        if mode not in MODES:
            raise ValueError(
                f"activation_checkpointing.mode must be one of {', '.join(MODES)}; got {mode!r}"
            )
        if (mode == "every") != (every is not None):
            raise ValueError(
                "activation_checkpointing: mode='every' goes with every=2, or another number; "
                f"got mode={mode!r}, every={every}"
            )
        if every is not None:
            check_whole("activation_checkpointing.every", every)
        if every == 1:
            raise ValueError(
                "activation_checkpointing.every must be at least 2, got 1; for all blocks there "
                "is mode='full'"
            )
        self.mode, self.every = mode, every

    @classmethod
    def of(cls, value: Any) -> "ActivationCheckpointing":
        """What the key of a config says.

        Args:
            value: Arguments.

        Returns:
            The plan.

        Raises:
            ValueError: It is the list of modules that MMEngine takes, or something else.
        """
        if not isinstance(value, Mapping):
            raise ValueError(
                "activation_checkpointing is dict(mode='full'), which finds the blocks itself; "
                f"got {value!r:.60}"
            )
        return cls(**value)

    def apply(self, denoiser: nn.Module) -> int:
        """Have blocks of a denoiser do so from now on.

        Names of modules and weights stay as they are. It may be sharded or wrapped already.

        Args:
            denoiser: The network.

        Returns:
            The number of blocks.

        Raises:
            ValueError: It has no list of blocks.
        """
        if self.mode == "none":
            return 0
        blocks = [block for _, block in blocks_of(denoiser)]
        if not blocks:
            raise ValueError(
                f"activation_checkpointing needs an nn.ModuleList of blocks, which "
                f"{type(denoiser).__name__} has not; take mode='none'"
            )
        options: dict[str, Any] = {"use_reentrant": False}
        if self.mode == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        chosen = blocks[:: self.every or 1]
        for block in chosen:  # partial and bound method: a copy of the block calls itself
            block.forward = partial(_recomputed, block.forward, options)
        return len(chosen)


def _recomputed(forward: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **options, **kwargs)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = getattr(op, "overloadpacket", op) in PRODUCTS or op.namespace in COMMUNICATION
    if keep and not _drops(op, args, kwargs):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _drops(op: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether attention has dropout: left out the second time, it would shift later draws."""
    schema = getattr(op, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    return {**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0) > 0

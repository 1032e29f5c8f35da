"""Optimizers for weights that are spread over processes."""

from typing import Any

from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["leave_out_frozen", "separate_sharded", "share_state"]


def leave_out_frozen(optimizer: Optimizer) -> None:
    """Let go of weights that are not trained, so that those that nobody else needs are freed.

    Args:
        optimizer: Without state as yet.
    """
    for group in optimizer.param_groups:
        group["params"] = [weight for weight in group["params"] if weight.requires_grad]


def share_state(optimizer: Optimizer) -> ZeroRedundancyOptimizer:
    """ZeRO-1: each process updates its share of the weights and tells the others.

    Args:
        optimizer: Without state as yet; its groups are cut to this process' share.

    Returns:
        An optimizer of all groups, whose ``optim`` is the one given. Its ``state_dict`` would
        need all processes at once; the state of this one's share is that of its ``optim``.
    """

    def cut(groups: list[dict[str, Any]], **_: Any) -> Optimizer:
        optimizer.param_groups = groups
        return optimizer

    trained: Any = [group for group in optimizer.param_groups if group["params"]]
    kind: Any = cut  # called in place of a class
    return ZeroRedundancyOptimizer(
        trained, kind, parameters_as_bucket_view=True, **optimizer.defaults
    )


def separate_sharded(optimizer: Optimizer) -> None:
    """Split groups of which some weights are sharded and some are not.

    Torch updates a group in one call, which takes tensors of one kind.

    Args:
        optimizer: Without state as yet.
    """
    parts = []
    for group in optimizer.param_groups:
        for kind in (True, False):
            weights = [w for w in group["params"] if isinstance(w, DTensor) is kind]
            if weights:
                parts.append({**group, "params": weights})
    optimizer.param_groups[:] = parts

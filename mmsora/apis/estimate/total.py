"""What a config needs on each GPU, and how long it trains: arithmetic, nothing is measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config

from mmsora.apis.estimate.state import (
    averages_in,
    optimizer_bytes,
    share_of,
    split_weights,
    updated_here,
)
from mmsora.apis.estimate.step import Cost, build_on_meta, cost_of, setup_of
from mmsora.engine.blocks import blocks_of
from mmsora.engine.optim_wrapper import DTYPES
from mmsora.engine.parallel.plan import Parallel
from mmsora.models.latent_diffusion import LatentDiffusion
from mmsora.utils.config_check import (
    apply_overrides,
    config_dict,
    config_from_dict,
    user_errors,
)
from mmsora.utils.gpus import GPU
from mmsora.utils.memory import num_bytes

__all__ = ["MOST_SAMPLES", "Estimate", "changed", "estimate", "largest_batch"]

MOST_SAMPLES = 4096  # of a micro-batch that are asked for

# Assumed: CUDA's context and the workspaces of its libraries, and what the allocator cannot use.
CONTEXT, SPLINTERS = 800 * 2**20, 0.05


@dataclass(frozen=True)
class Estimate:
    """Of one config on so many processes, a GPU each.

    Attributes:
        parts: Bytes on each GPU by what they are for.
        not_at_once: So many of them are not needed at a time: gradients come as activations go.
        host: Bytes in the host's memory for each process, where ``parallel.offload`` puts them.
        cost: Of a micro-batch, with all its tokens on one process.
        batch: Samples of a micro-batch.
        accumulate: Micro-batches of an update.
        processes: Their number.
        parallel: What is spread over them.
        precision: Of ``optim_wrapper``.
        iterations: Of the recipe, in micro-batches.
    """

    parts: dict[str, int]
    not_at_once: int
    host: int
    cost: Cost
    batch: int
    accumulate: int
    processes: int
    parallel: Parallel
    precision: str
    iterations: int

    @property
    def total(self) -> int:
        """Bytes needed on each GPU."""
        return sum(self.parts.values()) - self.not_at_once

    @property
    def flops(self) -> float:
        """Of an iteration on each GPU; sequence parallelism shares them evenly."""
        return self.cost.flops / self.parallel.sequence

    @property
    def global_batch(self) -> int:
        """Samples of an update."""
        return self.batch * self.accumulate * self.processes // self.parallel.sequence

    def seconds(self, gpu: GPU, mfu: float) -> float:
        """Of an iteration, at a share of the GPU's peak."""
        return self.flops / (gpu.peak(self.precision) * mfu)

    def hours(self, gpu: GPU, mfu: float) -> float:
        """Of the whole recipe, by the clock."""
        return self.iterations * self.seconds(gpu, mfu) / 3600


def estimate(cfg: Config, processes: int = 1) -> Estimate:
    """Estimate what a config needs. Nothing is read, and no memory taken.

    Args:
        cfg: The config.
        processes: GPUs, with a process each.

    Returns:
        The estimate.

    Raises:
        UserError: The config cannot be trained, or not on so many GPUs.
    """
    values = config_dict(cfg)
    with user_errors():
        plan = Parallel.of(values.get("parallel")).for_world(processes)
        setup = setup_of(cfg, gathered=plan.is_sharded)
        model, cost = build_on_meta(setup), cost_of(setup)
    if setup.cached:
        model.train_on_latents({})
    wrapper: dict[str, Any] = values["optim_wrapper"]
    accumulate = wrapper.get("accumulative_counts", 1)
    held = _held(model, values, plan, processes)
    transient = held.pop("update")
    shared = _shared(model, plan, setup.precision)
    activations = cost.activations // plan.sequence
    gradients = held["gradients"]
    together = activations + gradients
    if accumulate == 1 and not plan.is_sharded:
        together = min(together, cost.peak // plan.sequence)
    not_at_once = activations + gradients - max(together, gradients + transient)
    moved = ("weights", "gradients", "optimizer", "averages") if plan.offload else ()
    host = sum(held.pop(name) for name in moved)
    parts = {**held, "shared with others": shared, "activations": activations}
    slack = CONTEXT + int(SPLINTERS * (sum(parts.values()) - not_at_once))
    return Estimate(
        parts={**parts, "slack": slack},
        not_at_once=not_at_once,
        host=host,
        cost=cost,
        batch=setup.batch,
        accumulate=accumulate,
        processes=processes,
        parallel=plan,
        precision=setup.precision,
        iterations=values.get("train_cfg", {}).get("max_iters", 0),
    )


def _held(
    model: LatentDiffusion, values: dict[str, Any], plan: Parallel, processes: int
) -> dict[str, int]:
    """What a process holds from step to step, and what an update needs besides."""
    rest, frozen = split_weights(model)
    of_denoiser = [
        (weight.requires_grad, share_of(weight, plan, processes))
        for weight in model.denoiser.parameters()
    ]
    denoiser = [share for trains, share in of_denoiser if trains]
    trained = [*denoiser, *(weight for weight in rest if weight.requires_grad)]
    state, transient = optimizer_bytes(
        values["optim_wrapper"]["optimizer"], updated_here(trained, plan, processes)
    )
    return {
        "weights": num_bytes([*rest, *(share for _, share in of_denoiser)]),
        "gradients": num_bytes(trained),
        "optimizer": state,
        "averages": averages_in(values) * 4 * sum(share.numel() for share in denoiser),
        "frozen parts": num_bytes(frozen),
        "update": transient,
    }


def _shared(model: LatentDiffusion, plan: Parallel, precision: str) -> int:
    """What is on its way between processes: DDP's buckets, or what FSDP2 gathers and reduces."""
    weights = list(model.denoiser.parameters())
    if plan.mode in ("ddp", "zero1"):
        return num_bytes(weight for weight in model.parameters() if weight.requires_grad)
    if not plan.is_sharded:
        return 0
    size = getattr(DTYPES[precision], "itemsize", 4)
    blocks = [sum(w.numel() for w in block.parameters()) for _, block in blocks_of(model.denoiser)]
    total, largest = sum(weight.numel() for weight in weights), max(blocks, default=0)
    gathered = total if plan.mode == "zero2" else total - sum(blocks) + 2 * largest
    # A block's gradients in both precisions, while those of the one before are being summed up.
    return size * gathered + 2 * (size + 4) * (largest or total)


def largest_batch(cfg: Config, memory: int, processes: int = 1, most: int = MOST_SAMPLES) -> int:
    """The most samples of a micro-batch that fit on a GPU.

    Args:
        cfg: The config.
        memory: Bytes of the GPU.
        processes: GPUs.
        most: More is not asked for.

    Returns:
        Their number; 0 if not even one fits.
    """

    def size(batch: int) -> int:
        return estimate(changed(cfg, {"train_dataloader.batch_size": batch}), processes).total

    return _largest(size, memory, most)


def _largest(size: Callable[[int], int], limit: int, most: int) -> int:
    """The largest number from 0 on whose size is within the limit; sizes grow about linearly."""
    fits, too_many = (0, 0), (most + 1, 0)  # number and size
    slope, number = 0.0, 1
    while number < too_many[0]:
        found = (number, size(number))
        if found[1] > limit:
            too_many = found
        else:
            slope = (found[1] - fits[1]) / (number - fits[0]) if fits[0] else 0.0
            fits = found
        if fits[0] and too_many[1]:
            slope = (too_many[1] - fits[1]) / (too_many[0] - fits[0])
        guess = fits[0] + int((limit - fits[1]) / slope) if slope > 0 else fits[0] + 1
        ahead = min(guess, 4 * fits[0])  # small batches may tell little
        number = max(min(ahead, too_many[0] - 1), fits[0] + 1)
    return fits[0]


def changed(cfg: Config, options: Mapping[str, Any]) -> Config:
    """A config in plain values with some of them changed.

    Args:
        cfg: Stays as it is.
        options: As of ``--cfg-options``.

    Returns:
        Another config.
    """
    other = config_from_dict(config_dict(cfg))
    apply_overrides(other, options)
    return other

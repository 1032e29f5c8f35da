"""What one training step computes and keeps, by running it on the meta device."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, wraps
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from torch import Tensor

from mmsora.apis.estimate.frozen import outline_encoders
from mmsora.datasets.cached import CachedLatents, NpyLatents
from mmsora.datasets.mixture import JointImages
from mmsora.engine.blocks import blocks_of
from mmsora.engine.optim_wrapper import DTYPES
from mmsora.engine.recompute import ActivationCheckpointing
from mmsora.models.conditioners.looking import lookers
from mmsora.models.latent_diffusion import Denoiser, LatentDiffusion
from mmsora.models.vaes.vae import VAE
from mmsora.registry import DATASETS, MODELS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.config_check import config_dict
from mmsora.utils.draws import Draws
from mmsora.utils.flops import FlopCounter
from mmsora.utils.memory import AsOnGPU, LiveBytes
from mmsora.utils.user_error import UserError

__all__ = ["Cost", "Setup", "build_on_meta", "cost_of", "setup_of"]


class Setup(NamedTuple):
    """All that the cost of a step depends on.

    Attributes:
        model: Its config, as JSON.
        batch: Samples on a process.
        images: Independent images beside each clip.
        cached: Whether latents, and what the denoiser is told, come from a cache.
        precision: Of ``optim_wrapper``.
        recompute: ``activation_checkpointing``, as JSON.
        gathered: Whether weights arrive in the precision of autocast, as under zero2 and zero3.
    """

    model: str
    batch: int
    images: int
    cached: bool
    precision: str
    recompute: str
    gathered: bool


class Cost(NamedTuple):
    """Of a micro-batch on one process.

    Attributes:
        forward: FLOPs of the forward pass of what is trained.
        backward: FLOPs of the backward pass, with what is computed again.
        frozen: FLOPs of VAE and encoders.
        activations: The most bytes at a time besides gradients.
        peak: The most bytes at a time with gradients that come as activations go.
    """

    forward: int
    backward: int
    frozen: int
    activations: int
    peak: int

    @property
    def flops(self) -> int:
        """All of them."""
        return self.forward + self.backward + self.frozen


def setup_of(cfg: Config, gathered: bool = False) -> Setup:
    """What of a config decides the cost of a step.

    Args:
        cfg: The config.
        gathered: Whether weights are dealt out over processes.

    Returns:
        The setup.

    Raises:
        UserError: The config trains nothing, or has no size of a batch.
    """
    values = config_dict(cfg)
    loader = values.get("train_dataloader")
    if not loader or "model" not in values or "optim_wrapper" not in values:
        raise UserError("the config has no model, train_dataloader and optim_wrapper to estimate")
    if "batch_size" not in loader:
        raise UserError(
            "train_dataloader.batch_size is not set (a batch_sampler has sizes of its own); set "
            "the one to estimate: --cfg-options train_dataloader.batch_size=8"
        )
    datasets = list(_datasets(loader["dataset"]))
    return Setup(
        model=json.dumps(values["model"], sort_keys=True),
        batch=loader["batch_size"],
        images=sum(part.get("num_images", 8) for part, kind in datasets if kind is JointImages),
        cached=any(kind in (CachedLatents, NpyLatents) for _, kind in datasets),
        precision=values["optim_wrapper"].get("precision", "off"),
        recompute=json.dumps(values.get("activation_checkpointing") or {"mode": "none"}),
        gathered=gathered,
    )


def _datasets(config: Any) -> Iterator[tuple[dict, Any]]:
    """The configs of datasets within one another, and their classes."""
    if isinstance(config, dict):
        if "type" in config:
            yield config, DATASETS.get(config["type"])
        config = list(config.values())
    if isinstance(config, list):
        for part in config:
            if isinstance(part, dict | list):
                yield from _datasets(part)


def build_on_meta(setup: Setup) -> LatentDiffusion:
    """The model without memory, with frozen encoders of the right sizes.

    Args:
        setup: What of it is asked.

    Returns:
        The model, in training mode.
    """
    init_default_scope("mmsora")
    with torch.device("meta"):
        model = MODELS.build(ConfigDict(json.loads(setup.model)))
        outline_encoders(model, without_text=setup.cached)
    return model.to("meta").train()


@cache
def cost_of(setup: Setup) -> Cost:
    """Run a step on the meta device.

    Args:
        setup: What decides it.

    Returns:
        What it costs.
    """
    model, dtype = build_on_meta(setup), DTYPES[setup.precision]
    if setup.gathered and dtype is not None:
        for weight in model.denoiser.parameters():
            weight.data = weight.data.to(dtype)
    data = {"inputs": _inputs(model, setup), "data_samples": _samples(model, setup)}
    gpu, frozen, counter = AsOnGPU(dtype), FlopCounter(), FlopCounter()
    for _, block in blocks_of(model.denoiser):
        gpu.cover(block)
    ActivationCheckpointing(**json.loads(setup.recompute)).apply(model.denoiser)
    if model.conditioner is not None:
        model.conditioner.null(1)  # what is made once is not a part of every step
    for module in model.modules():
        if isinstance(module, VAE):
            module.encode = _counted(frozen, module.encode)  # type: ignore[method-assign]
        elif hasattr(module, "outline"):
            module.forward = _counted(frozen, module.forward)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    memory = LiveBytes(chain(model.parameters(), model.buffers()))
    with counter, memory, memory.watch(trained):
        loss = _loss(model, data, gpu)
        forward = counter.total
        loss.backward()
    return Cost(
        forward - frozen.total,
        counter.total - forward,
        frozen.total,
        memory.peak,
        memory.peak_total,
    )


def _loss(model: LatentDiffusion, data: dict[str, Any], gpu: AsOnGPU) -> Tensor:
    """As ``BaseModel.train_step`` makes it; ``data`` keeps what the GPU got."""
    with gpu.forward_pass():
        data |= model.data_preprocessor(data, True)
        losses = model.loss(**data, draws=Draws(0, range(len(data["data_samples"]))))
    return torch.stack([value.mean() for value in losses.values()]).sum()


def _counted(counter: FlopCounter, function: Callable) -> Callable:
    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(counter)
            return function(*args, **kwargs)

    return counted


def _inputs(model: LatentDiffusion, setup: Setup) -> Tensor:
    """A batch as the dataset gives it, on the meta device."""
    denoiser: Any = model.denoiser
    frames, height, width = denoiser.size
    if setup.cached:
        model.train_on_latents({})
        latent = (denoiser.in_channels, frames + setup.images, height, width)
        return torch.empty(setup.batch, 2, *latent, device="meta")
    frames, height, width = _video_size(model.vae, denoiser.size)
    channels = 3 if any(True for _ in model.vae.parameters()) else denoiser.in_channels
    clip = (channels, frames + setup.images, height, width)
    return torch.empty(setup.batch, *clip, dtype=torch.uint8, device="meta")


def _video_size(vae: VAE, latent: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, height and width of the videos that a VAE makes latents of this size of."""
    frames, height, width = latent
    for in_time in (1, 2, 4, 8):
        for in_space in (1, 2, 4, 8, 16, 32):
            for length in (frames * in_time, (frames - 1) * in_time + 1):
                size = (length, height * in_space, width * in_space)
                try:
                    if tuple(vae.latent_size(size)) == tuple(latent):
                        return size
                except ValueError:
                    continue
    raise UserError(
        f"{type(vae).__name__}.latent_size gives {latent} for no size of videos; the denoiser's "
        "size and the VAE do not fit each other"
    )


def _samples(model: LatentDiffusion, setup: Setup) -> list[VideoSample]:
    """Annotations with one of everything."""
    known: dict[str, Any] = {"label": 0, "text": ""}
    if setup.images:
        known |= {"num_images": setup.images, "image_labels": [0] * setup.images}
        known["image_texts"] = [""] * setup.images
    if setup.cached:
        frames, *sides = _video_size(model.vae, cast(Denoiser, model.denoiser).size)
        clip = torch.empty(1, 3, frames + setup.images, *sides, device="meta")
        for part in lookers(model.conditioner):
            seen = part.see_all(clip, [VideoSample(num_images=setup.images)])
            known |= {field: values[0] for field, values in seen.items()}
    return [VideoSample(index=index, **known) for index in range(setup.batch)]

"""The model that is trained: the one place where VAE, conditioner, denoiser and process meet."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmsora.diffusion.process import Diffusion
from mmsora.models.alignments.representation import RepresentationAlignment
from mmsora.models.conditioners.conditioner import Conditioner, images_beside
from mmsora.models.conditioners.looking import lookers
from mmsora.models.layers.patch import grid_of
from mmsora.models.layers.transformer import VideoTransformer
from mmsora.models.vaes.vae import VAE, drawn
from mmsora.registry import CONDITIONERS, DENOISERS, MODELS, SCHEDULERS, VAES
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.checkpoint import load_denoiser
from mmsora.utils.draws import Draws
from mmsora.utils.made_by import check_maker
from mmsora.utils.process_groups import data_info, sequence_group
from mmsora.utils.user_error import UserError

__all__ = ["Denoiser", "LatentDiffusion", "TrainedBatch"]


FROZEN = re.compile(r"(vae|weak|alignment\.encoder|conditioner\.(parts\.\w+\.)?encoder)\.")
CACHED_BY_ANOTHER = "the latents in the cache were made by another VAE than model.vae"


class Denoiser(Protocol):
    """What a denoiser must have besides being a module ``denoiser(x, clock, **cond)``."""

    in_channels: int
    size: tuple[int, int, int]  # frames, height and width of the latents it is made for


class TrainedBatch(NamedTuple):
    """What a training step was made of.

    Attributes:
        samples: The annotations.
        losses: What ``LatentDiffusion.loss`` gave, detached: tensors (B,) by name.
    """

    samples: Sequence[VideoSample]
    losses: dict[str, Tensor]


@MODELS.register_module()
class LatentDiffusion(BaseModel):
    """Diffusion in the latent space of a VAE, for any denoiser and any process.

    Args:
        denoiser: Config of the network.
        diffusion: Config of the process.
        vae: Config of the VAE.
        conditioner: Config of what the denoiser is told; None for an unconditional model.
        data_preprocessor: Config of what makes a batch of clips.
        freeze: Regular expression; parameters of the denoiser whose names it is found in are not
            trained.
        weak: A weaker network for guidance that asks for one: ``denoiser``, its config, and
            ``checkpoint``, a file of its weights.
        alignment: Config of what pulls the states of a transformer towards an encoder's features
            while it trains.
    """

    denoiser: nn.Module
    vae: VAE
    conditioner: Conditioner | None
    weak: nn.Module | None
    alignment: RepresentationAlignment | None

    def __init__(
        self,
        denoiser: dict,
        diffusion: dict,
        vae: dict,
        conditioner: dict | None = None,
        data_preprocessor: dict | None = None,
        freeze: str | None = None,
        weak: dict | None = None,
        alignment: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor or {"type": "mmsora.VideoPreprocessor"})
        self.denoiser = DENOISERS.build(denoiser)
        self._check_sequence()
        self._vae_config = deepcopy(vae)
        self.vae = self._build_vae()
        self._latents_of: dict | None = None  # what made the latents that training gets
        self.last_batch: TrainedBatch | None = None  # of training, for what looks into losses
        self.conditioner = CONDITIONERS.build(conditioner) if conditioner else None
        self.diffusion: Diffusion = SCHEDULERS.build(diffusion)
        self.diffusion_state = _modules_of(self.diffusion)
        self._check_classes()
        if freeze is not None:
            self._freeze(freeze)
        self.weak = self._build_weak(weak) if weak else None
        if self.diffusion.guidance.second == "weak" and self.weak is None:
            raise ValueError(
                f"{type(self.diffusion.guidance).__name__} needs a weaker network: "
                "model.weak=dict(denoiser=dict(type=...), checkpoint=FILE)"
            )
        self.alignment = self._build_alignment(alignment) if alignment else None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Without what is frozen, whose weights are read anew from their own files."""
        state = super().state_dict(*args, **kwargs)
        start = len(kwargs.get("prefix", ""))
        for key in [key for key in state if FROZEN.match(key, start)]:
            del state[key]
        return state

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """The weaker network stays in eval mode."""
        super().train(mode)
        if self.weak is not None:
            self.weak.train(False)
        return self

    def _build_vae(self) -> VAE:
        return VAES.build(deepcopy(self._vae_config)).requires_grad_(False)

    def _freeze(self, pattern: str) -> None:
        frozen = [(k, v) for k, v in self.denoiser.named_parameters() if re.search(pattern, k)]
        if not frozen:
            some = ", ".join(list(dict(self.denoiser.named_parameters()))[:3])
            raise ValueError(f"freeze={pattern!r} matches no parameter; there are {some}, ...")
        for _, parameter in frozen:
            parameter.requires_grad_(False)

    def _check_sequence(self) -> None:
        # Of the class: a network within another one cannot speak for it.
        if sequence_group() is not None and not getattr(
            type(self.denoiser), "shares_tokens", False
        ):
            raise ValueError(
                f"parallel.sequence: {type(self.denoiser).__name__} cannot share the tokens of a "
                "sample between processes; take DiT or Latte, or sequence=1"
            )

    def _check_classes(self) -> None:
        told = getattr(self.conditioner, "num_classes", 0)
        known = getattr(self.denoiser, "num_classes", told)
        if told != known:
            raise ValueError(
                f"the conditioner has num_classes={told} and the denoiser num_classes={known}; "
                "they must be equal"
            )

    def _build_weak(self, config: dict) -> nn.Module:
        if set(config) != {"denoiser", "checkpoint"}:
            raise ValueError(
                f"weak is dict(denoiser=dict(type=...), checkpoint=FILE); got {', '.join(config)}"
            )
        weak = DENOISERS.build(config["denoiser"]).requires_grad_(False).eval()
        for name in ("in_channels", "out_channels", "num_classes"):
            theirs, ours = getattr(weak, name, None), getattr(self.denoiser, name, None)
            if theirs != ours:
                raise ValueError(
                    f"the weak denoiser has {name}={theirs} and the denoiser {name}={ours}; they "
                    "must be equal"
                )
        self._weak_checkpoint: str = config["checkpoint"]
        return weak

    def _build_alignment(self, config: dict) -> RepresentationAlignment:
        if not isinstance(self.denoiser, VideoTransformer):
            raise ValueError(
                f"alignment needs a transformer as denoiser, such as DiT or Latte; "
                f"{type(self.denoiser).__name__} has no blocks to take tokens from"
            )
        alignment = MODELS.build(config, default_args={"width": self.denoiser.width})
        with self.denoiser.tap(alignment.block):  # or there is no such block
            return alignment

    def init_weights(self, to_train: bool = True) -> None:
        """Load what parts read from files. The denoiser was initialised when it was made.

        Args:
            to_train: Load also what only training needs.
        """
        if not (to_train and self.trains_on_latents):
            self.vae.init_weights()
        if self.conditioner is not None:
            self.conditioner.init_weights()
        if self.weak is not None:
            kept = load_denoiser(self.weak, self._weak_checkpoint).kept
            if "embed_label.weight" in kept:
                raise UserError(
                    f"weak.checkpoint {self._weak_checkpoint} has no labels for "
                    f"num_classes={self.weak.num_classes}; take one of the same classes"
                )
        if self.alignment is not None and to_train:
            self.alignment.init_weights()

    @property
    def trains_on_latents(self) -> bool:
        """Whether training gets cached latents, so that the VAE has no weights meanwhile."""
        return self._latents_of is not None

    def train_on_latents(self, made_by: dict[str, Any]) -> None:
        """Put the weights of the VAE aside: training gets latents that are cached.

        Args:
            made_by: The VAE that made them, by its ``identity`` and, as ``weights``, its
                ``fingerprint``; empty if that is not known.

        Raises:
            UserError: This model's VAE is another, or the model needs pixels.
        """
        if self.alignment is not None:
            raise UserError(
                "alignment needs pixels, of which a cache of latents has none; train on the files "
                "themselves, or with model.alignment=None"
            )
        if made_by:
            check_maker(made_by, self.vae.identity(), self._build_vae, CACHED_BY_ANOTHER)
        self._latents_of = made_by
        self.vae.to("meta")

    @contextmanager
    def vae_in_place(self) -> Iterator[None]:
        """Within the block the VAE has its weights, though training does without.

        Raises:
            UserError: Its weights are not those that made the cached latents.
        """
        if self._latents_of is None:
            yield
            return
        self.vae = self._build_vae()
        try:
            self.vae.init_weights()
            weights = self._latents_of.get("weights")
            if weights not in (None, self.vae.fingerprint()):
                source = getattr(self.vae, "pretrained", "the VAE")
                raise UserError(f"{CACHED_BY_ANOTHER}: the weights in {source} are others")
            self.vae.to(self.device)
            yield
        finally:
            self.vae.to("meta")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        weight = next(self.denoiser.parameters())
        mesh = getattr(weight, "device_mesh", None)  # a share may be in the memory of the host
        return weight.device if mesh is None else torch.device(mesh.device_type)

    def forward(
        self, inputs: Tensor, data_samples: Sequence[VideoSample], mode: str = "tensor"
    ) -> Any:
        """MMEngine's entry.

        Args:
            inputs: Videos (B, C, T, H, W) in [-1, 1], or cached latents as ``loss`` takes them.
            data_samples: Their annotations; ``index`` is needed for training.
            mode: ``loss`` gives the losses of a training step, ``predict`` samples of the
                annotations' conditions, ``tensor`` the latents.

        Returns:
            A dict of losses (B,), uint8 videos (B, C, T, H, W) or latents.

        Raises:
            ValueError: Another mode.
        """
        if mode == "loss":
            losses = self.loss(inputs, data_samples, self._training_draws(data_samples))
            detached = {name: loss.detach() for name, loss in losses.items()}
            self.last_batch = TrainedBatch(data_samples, detached)
            weight = torch.tensor([sample.get("weight", 1.0) for sample in data_samples])
            return {name: loss * weight.to(loss) for name, loss in losses.items()}
        if mode == "predict":
            return self.predict(data_samples)
        if mode == "tensor":
            return self._latents(inputs)
        raise ValueError(f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")

    @staticmethod
    def _training_draws(samples: Sequence[VideoSample]) -> Draws:
        hub = MessageHub.get_current_instance()
        seed, step = hub.get_info("seed"), hub.get_info("iter")
        if seed is None or step is None:
            raise RuntimeError(
                "no seed or iteration in MMEngine's MessageHub: outside of a Runner call "
                "loss(inputs, data_samples, Draws(seed, indices, step))"
            )
        rank, world = data_info()  # samplers deal samples out in turn
        total = len(samples) * world
        places = range(rank, total, world)
        return Draws(seed, [sample.index for sample in samples], step, places, total)

    def loss(
        self, inputs: Tensor, data_samples: Sequence[VideoSample], draws: Draws
    ) -> dict[str, Tensor]:
        """The losses of a training step.

        Args:
            inputs: Videos (B, C, T, H, W) in [-1, 1], or the mean and standard deviation of
                their latents (B, 2, c, t, h, w), or latents (B, 1, c, t, h, w).
            data_samples: Their annotations.
            draws: Their random numbers at this step.

        Returns:
            ``loss_diffusion``, and ``loss_alignment`` where there is one, of each sample, (B,).
        """
        with torch.no_grad():
            x0 = self._latents(inputs, draws).float()  # autocast makes it less
        self._show(inputs, data_samples, draws)
        cond = self._condition(data_samples, draws)
        network = self._network(data_samples)
        if self.alignment is None:
            return {"loss_diffusion": self.diffusion.loss(network, x0, cond, draws)}
        denoiser = cast(VideoTransformer, self.denoiser)
        with denoiser.tap(self.alignment.block) as tokens:
            loss = self.diffusion.loss(network, x0, cond, draws)
        grid = grid_of(x0.shape[2:], denoiser.patch)
        return {
            "loss_diffusion": loss,
            "loss_alignment": self.alignment(tokens[-1], inputs, grid),
        }

    @torch.no_grad()
    def losses_at(
        self, inputs: Tensor, sample: VideoSample, places: Tensor, seed: int, at_once: int
    ) -> Tensor:
        """The diffusion loss of one clip at places of the path, with no condition dropped.

        Args:
            inputs: The clip, (1, ...), as ``loss`` takes a batch.
            sample: Its annotation.
            places: Fractions of the way from data to noise, float64 of shape (N,).
            seed: Of the noise, which depends on nothing else but the sample's index and the place.
            at_once: So many places pass the network in a batch.

        Returns:
            The losses, (N,).
        """
        x0 = self._latents(inputs, Draws(seed, [sample.index])).float()
        self._show(inputs, [sample])
        cond, network = self._condition([sample]), self._network([sample])
        numbers = sample.index * len(places) + torch.arange(len(places))
        losses = []
        for some, own in zip(places.split(at_once), numbers.split(at_once), strict=True):
            x = x0.expand(len(some), *x0.shape[1:])
            told = {key: value.expand(len(some), *value.shape[1:]) for key, value in cond.items()}
            draws = Draws(seed, own.tolist())
            losses.append(self.diffusion.losses_at(network, x, told, draws, some))
        return torch.cat(losses)

    def _latents(self, inputs: Tensor, draws: Draws | None = None) -> Tensor:
        if inputs.ndim == 6:
            if self._latents_of is None:
                raise UserError(
                    "the dataset gives cached latents, and nobody has compared their VAE with "
                    "the model's; default_hooks.latent_cache=dict(type=LatentCacheHook) does"
                )
            mean, *std = inputs.unbind(1)
            return drawn(mean, std[0] if std else None, draws)
        return self.vae.encode(inputs, draws)

    def _network(self, samples: Sequence[VideoSample]) -> Callable[..., Tensor]:
        """The denoiser, which knows of images beside the clips where there are some."""
        images = images_beside(samples)
        if not images:
            return self.denoiser
        if not getattr(self.denoiser, "takes_images", False):
            raise UserError(
                f"the dataset has {images} images beside each clip, for which "
                f"{type(self.denoiser).__name__} has no place; take Latte, or clips alone"
            )
        return partial(self.denoiser, num_images=images)

    def _show(
        self, inputs: Tensor, samples: Sequence[VideoSample], draws: Draws | None = None
    ) -> None:
        """Let conditioners look at the videos, where there are any and they ask for them."""
        for part in lookers(self.conditioner) if inputs.ndim == 5 else ():
            part.look(inputs, samples, draws)

    def _condition(
        self, samples: Sequence[VideoSample], draws: Draws | None = None
    ) -> dict[str, Tensor]:
        if self.conditioner is None:
            return {}
        return self._here(self.conditioner(samples, draws))

    def _null(self, cond: dict[str, Tensor], batch: int) -> dict[str, Tensor] | None:
        if self.conditioner is None or self.diffusion.guidance.second != "null":
            return None
        if not getattr(self.denoiser, "knows_null", True):
            if getattr(self.diffusion.guidance, "scale", 1) != 1:
                raise ValueError(
                    "the checkpoint was trained without label dropout and knows no 'no label': "
                    "it cannot be guided; sample with guidance 1"
                )
            return None
        null = self._here(self.conditioner.null(batch))
        return {key: value.expand_as(cond[key]) for key, value in null.items()}

    def _here(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.device, non_blocking=True) for k, v in cond.items()}

    @torch.no_grad()
    def predict(
        self,
        data_samples: Sequence[VideoSample],
        seed: int = 0,
        size: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """Sample videos. Each depends on its annotation and (seed, its index) alone.

        Args:
            data_samples: What to sample; ``index`` tells samples of one condition apart.
            seed: Of the noise.
            size: Frames, height and width of the videos; None is what the denoiser is made for.

        Returns:
            uint8 videos, (B, C, T, H, W).
        """
        latent = self.sample_latents(data_samples, seed, size)
        with self.vae_in_place():
            video = self.vae.decode(latent)
        if video.device.type != "meta" and not video.isfinite().all():
            print_log(
                "some samples are not finite and will be black: the network diverged, or the "
                "solver asks for it where its output means nothing (on clean data)",
                logger="current",
                level=logging.WARNING,
            )
        return (video * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # rounds half up

    @torch.no_grad()
    def sample_latents(
        self,
        data_samples: Sequence[VideoSample],
        seed: int = 0,
        size: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """Sample, and leave the decoding to another.

        Args:
            data_samples: As for :meth:`predict`, like the rest.
            seed: Of the noise.
            size: Frames, height and width of the videos.

        Returns:
            Latents, (B, c, t, h, w).
        """
        batch = len(data_samples)
        of_samples = Draws(seed, [sample.index for sample in data_samples])
        draws = self.diffusion.train_noise.numbers(of_samples)
        made_for = cast(Denoiser, self.denoiser)
        latent_size = made_for.size if size is None else self.vae.latent_size(size)
        shape = (batch, made_for.in_channels, *latent_size)
        noise = draws.normal("start", torch.empty(shape, device=self.device))
        cond = self._condition(data_samples)
        null = self._null(cond, batch)
        return self.diffusion.sample(self.denoiser, noise, cond, null, draws, self.weak)


def _modules_of(diffusion: Diffusion) -> nn.ModuleDict:
    """The parts of a process that learn or remember, to be trained, moved and saved."""
    parts = {
        "weighting": getattr(diffusion.loss_function, "weighting", None),
        "train_times": diffusion.train_times,
    }
    return nn.ModuleDict({k: part for k, part in parts.items() if isinstance(part, nn.Module)})

"""The model that is trained: the one place where VAE, conditioner, denoiser and process meet."""

import re
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmsora.diffusion.process import Diffusion
from mmsora.models.conditioners.conditioner import Conditioner
from mmsora.models.vaes.vae import VAE
from mmsora.registry import CONDITIONERS, DENOISERS, MODELS, SCHEDULERS, VAES
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws

__all__ = ["Denoiser", "LatentDiffusion"]


class Denoiser(Protocol):
    """What a denoiser must have besides being a module ``denoiser(x, clock, **cond)``."""

    in_channels: int
    size: tuple[int, int, int]  # frames, height and width of the latents it is made for


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
    """

    denoiser: nn.Module
    vae: VAE
    conditioner: Conditioner | None

    def __init__(
        self,
        denoiser: dict,
        diffusion: dict,
        vae: dict,
        conditioner: dict | None = None,
        data_preprocessor: dict | None = None,
        freeze: str | None = None,
    ) -> None:
        super().__init__(data_preprocessor or {"type": "mmsora.VideoPreprocessor"})
        self.denoiser = DENOISERS.build(denoiser)
        self.vae = VAES.build(vae)
        self.vae.requires_grad_(False)
        self.conditioner = CONDITIONERS.build(conditioner) if conditioner else None
        self.diffusion: Diffusion = SCHEDULERS.build(diffusion)
        self._check_classes()
        if freeze is not None:
            self._freeze(freeze)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Without the frozen VAE, whose weights are read anew from its own files."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "") + "vae."
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]
        return state

    def _freeze(self, pattern: str) -> None:
        frozen = [(k, v) for k, v in self.denoiser.named_parameters() if re.search(pattern, k)]
        if not frozen:
            some = ", ".join(list(dict(self.denoiser.named_parameters()))[:3])
            raise ValueError(f"freeze={pattern!r} matches no parameter; there are {some}, ...")
        for _, parameter in frozen:
            parameter.requires_grad_(False)

    def _check_classes(self) -> None:
        told = getattr(self.conditioner, "num_classes", 0)
        known = getattr(self.denoiser, "num_classes", told)
        if told != known:
            raise ValueError(
                f"the conditioner has num_classes={told} and the denoiser num_classes={known}; "
                "they must be equal"
            )

    def init_weights(self) -> None:
        """Load what parts read from files. The denoiser was initialised when it was made."""
        self.vae.init_weights()
        if self.conditioner is not None:
            self.conditioner.init_weights()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.denoiser.parameters()).device

    def forward(
        self, inputs: Tensor, data_samples: Sequence[VideoSample], mode: str = "tensor"
    ) -> Any:
        """MMEngine's entry.

        Args:
            inputs: Videos (B, C, T, H, W) in [-1, 1].
            data_samples: Their annotations; ``index`` is needed for training.
            mode: ``loss`` gives the losses of a training step, ``predict`` samples of the
                annotations' conditions, ``tensor`` the latents.

        Returns:
            A dict of losses (B,), uint8 videos (B, C, T, H, W) or latents.

        Raises:
            ValueError: Another mode.
        """
        if mode == "loss":
            return self.loss(inputs, data_samples, self._training_draws(data_samples))
        if mode == "predict":
            return self.predict(data_samples)
        if mode == "tensor":
            return self.vae.encode(inputs)
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
        return Draws(seed, [sample.index for sample in samples], step)

    def loss(
        self, inputs: Tensor, data_samples: Sequence[VideoSample], draws: Draws
    ) -> dict[str, Tensor]:
        """The losses of a training step.

        Args:
            inputs: Videos (B, C, T, H, W) in [-1, 1].
            data_samples: Their annotations.
            draws: Their random numbers at this step.

        Returns:
            ``loss_diffusion`` of each sample, (B,).
        """
        with torch.no_grad():
            x0 = self.vae.encode(inputs, draws).float()  # autocast makes it less
        cond = self._condition(data_samples, draws)
        return {"loss_diffusion": self.diffusion.loss(self.denoiser, x0, cond, draws)}

    def _condition(
        self, samples: Sequence[VideoSample], draws: Draws | None = None
    ) -> dict[str, Tensor]:
        if self.conditioner is None:
            return {}
        return self._here(self.conditioner(samples, draws))

    def _null(self, batch: int) -> dict[str, Tensor] | None:
        if self.conditioner is None:
            return None
        if not getattr(self.denoiser, "knows_null", True):
            if getattr(self.diffusion.guidance, "scale", 1) != 1:
                raise ValueError(
                    "the checkpoint was trained without label dropout and knows no 'no label': "
                    "it cannot be guided; sample with guidance 1"
                )
            return None
        return self._here(self.conditioner.null(batch))

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
        batch = len(data_samples)
        draws = Draws(seed, [sample.index for sample in data_samples])
        made_for = cast(Denoiser, self.denoiser)
        latent_size = made_for.size if size is None else self.vae.latent_size(size)
        shape = (batch, made_for.in_channels, *latent_size)
        noise = draws.normal("start", torch.empty(shape, device=self.device))
        latent = self.diffusion.sample(
            self.denoiser, noise, self._condition(data_samples), self._null(batch), draws
        )
        video = self.vae.decode(latent)
        return (video * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # rounds half up

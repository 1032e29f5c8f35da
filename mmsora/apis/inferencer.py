"""Sampling, the same for the command line, notebooks and other programs."""

import difflib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from mmengine.config import Config
from torch import Tensor

from mmsora.apis.build import build_model, config_of, fill
from mmsora.models.conditioners.conditioner import Conditioner
from mmsora.models.conditioners.image import ImageConditioner
from mmsora.models.conditioners.latent import LatentConditioner
from mmsora.models.latent_diffusion import Denoiser, LatentDiffusion
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.checkpoint import WEIGHTS, load_checkpoint
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import read_image

__all__ = ["Inferencer"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Inferencer:
    """Samples videos from a checkpoint.

    Args:
        checkpoint: The file.
        config: A config, its path or its name; None takes the one in the checkpoint.
        device: Where to compute; None takes a GPU where there is one.
        use_ema: Take the averaged weights where the checkpoint has them.
        dtype: Precision of the networks: ``fp32``, ``bf16`` or ``fp16``.
        prior: Of a cascade, the stage before: its latents are the condition ``latent`` of this
            one. The two take turns on the device.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        config: str | Path | Config | None = None,
        device: str | None = None,
        use_ema: bool = True,
        dtype: str = "fp32",
        prior: "Inferencer | None" = None,
    ) -> None:
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device {device!r}: PyTorch finds no GPU here")
        if dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        content = load_checkpoint(checkpoint, WEIGHTS)
        self.model = build_model(config_of(content, checkpoint) if config is None else config)
        fill(self.model, content, checkpoint, use_ema)
        self.dtype = DTYPES[dtype]
        known = (content.get("meta") or {}).get("dataset_meta") or {}
        self.classes: list[str] = [str(name) for name in known.get("classes", ())]
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.prior = prior
        if prior is None:
            self.model.to(self.device)
        elif not _has(self.model.conditioner, LatentConditioner):
            raise UserError(
                f"prior: the model of {checkpoint} has no LatentConditioner, so it decodes no "
                "latents of another stage"
            )

    def __call__(
        self,
        labels: Sequence[int | str] | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        batch_size: int = 50,
        progress: Callable[[int], None] | None = None,
        num_frames: int | None = None,
        size: tuple[int, int] | None = None,
        prompts: Sequence[str] | None = None,
        image: str | Path | None = None,
    ) -> Tensor:
        """Sample.

        The i-th video is a function of (seed, i, its label or prompt), whatever the batch size.

        Args:
            labels: A video for each of these classes, by number or, where the checkpoint knows
                their names, by name.
            num_samples: How many videos; labels or prompts are repeated or cut to it.
                A class-conditional model without labels goes through its classes.
            seed: Of the noise.
            batch_size: How many at a time.
            progress: Called with the number of finished videos after each batch.
            num_frames: Of each video; None is what the prior is made for, or the model
                where there is none.
            size: Height and width; None is what the model is made for.
            prompts: A video for each of these texts, which a model of texts needs; the empty text
                where there is an image.
            image: File of a picture that all videos are to be like, for a model that is told one.

        Returns:
            uint8 videos, (B, C, T, H, W), on the CPU.

        Raises:
            UserError: A label is out of range, labels or prompts are given to a model that takes
                none, nothing is asked for, a model needs a prior and has none, or no video is of
                such a size.
        """
        if num_samples is not None and num_samples < 1:
            raise UserError(f"num_samples must be at least 1, got {num_samples}")
        first = self.prior or self
        if image is not None and not prompts and not labels:
            prompts = [""] if getattr(first.model.conditioner, "takes_text", False) else None
        samples = first._asked_for(labels, num_samples, prompts)
        if image is not None:
            first._show(image, samples)
        full = self._full_size(num_frames, size)
        batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
        if self.prior is not None and full is not None:
            self._ask_prior(self.prior, batches, seed, self._prior_size(self.prior, full))
        videos, done = [], 0
        for batch in batches:
            with self._autocast():
                videos.append(self.model.predict(batch, seed, full).cpu())
            done += len(batch)
            if progress is not None:
                progress(done)
        return torch.cat(videos)

    def _asked_for(
        self,
        labels: Sequence[int | str] | None,
        num_samples: int | None,
        prompts: Sequence[str] | None,
    ) -> list[VideoSample]:
        self._check(labels, prompts)
        if prompts:
            count = self.count(prompts, num_samples)
            return [VideoSample(index=i, text=prompts[i % len(prompts)]) for i in range(count)]
        return self._samples([self.number(label) for label in labels or ()], num_samples)

    def _show(self, image: str | Path, samples: Sequence[VideoSample]) -> None:
        """Tell every sample of a picture."""
        conditioner = self.model.conditioner
        if not _has(conditioner, ImageConditioner):
            raise UserError("the model is told no picture: it has no ImageConditioner")
        picture = torch.from_numpy(read_image(image)).permute(2, 0, 1) / 127.5 - 1
        for sample in samples:
            sample.image = picture

    def _ask_prior(
        self,
        prior: "Inferencer",
        batches: Sequence[Sequence[VideoSample]],
        seed: int,
        size: tuple[int, int, int],
    ) -> None:
        """Give every sample the latent of the stage before."""
        self.model.to("cpu")
        prior.model.to(prior.device)
        for batch in batches:
            with prior._autocast():
                latents = prior.model.sample_latents(batch, seed, size)
            for sample, latent in zip(batch, latents.float().cpu(), strict=True):
                sample.latent = latent
        prior.model.to("cpu")
        self.model.to(self.device)

    def _autocast(self) -> torch.autocast:
        device = torch.device(self.device).type
        return torch.autocast(device, self.dtype, self.dtype != torch.float32)

    def number(self, label: int | str) -> int:
        """The number of a class.

        Args:
            label: Its number or its name.

        Returns:
            Its number.

        Raises:
            UserError: No class has the name, or the checkpoint holds no names.
        """
        if self.prior is not None:
            return self.prior.number(label)
        text = str(label)
        if text in self.classes:
            return self.classes.index(text)
        if text.lstrip("-").isdigit():
            return int(text)
        if not self.classes:
            raise UserError(f"the checkpoint holds no names of classes: give {text!r} by number")
        near = difflib.get_close_matches(text, self.classes, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(self.classes[:20])}"
        raise UserError(f"no class is called {text!r}; {hint}")

    def count(self, labels: Sequence[int | str] | None, num_samples: int | None) -> int:
        """How many videos a call with these labels, or prompts, makes."""
        if self.prior is not None:
            return self.prior.count(labels, num_samples)
        classes = getattr(self.model.conditioner, "num_classes", 0)
        return num_samples or len(labels or range(classes)) or 1

    def _check(self, labels: Sequence[int | str] | None, prompts: Sequence[str] | None) -> None:
        if self.prior is None and _has(self.model.conditioner, LatentConditioner):
            raise UserError(
                "the model decodes latents of another: give the stage before by --prior "
                "CHECKPOINT, or prior=Inferencer(CHECKPOINT)"
            )
        takes_text = getattr(self.model.conditioner, "takes_text", False)
        if prompts and not takes_text:
            raise UserError("the model takes no text: remove the prompts")
        if takes_text and labels:
            raise UserError("the model is told texts: it takes no labels, give prompts")
        if takes_text and not prompts:
            raise UserError("the model is told texts: give prompts")

    def _full_size(
        self, num_frames: int | None, size: tuple[int, int] | None
    ) -> tuple[int, int, int] | None:
        """Frames, height and width in pixels, or None for what the only model is made for."""
        if num_frames is not None and num_frames < 1:
            raise UserError(f"num_frames must be at least 1, got {num_frames}")
        if size is not None and min(size) < 1:
            raise UserError(f"size must be at least 1x1, got {size[0]}x{size[1]}")
        if num_frames is None and size is None and self.prior is None:
            return None
        last = self.prior or self
        frames, _, _ = cast(Denoiser, last.model.denoiser).size
        full = (num_frames or frames, *(size or _made_for(self.model)))
        _check_size(self.model, full)
        return full

    def _prior_size(self, prior: "Inferencer", full: tuple[int, int, int]) -> tuple[int, int, int]:
        """Of the stage before: in proportion to what the two are made for, as its latents are of a
        coarser grain where it is made for smaller pictures."""
        ours, theirs = _made_for(self.model), _made_for(prior.model)
        scale = math.sqrt(math.prod(theirs) / math.prod(ours))
        grain = _pixels(prior.model)
        sides = [max(round(s * scale / g), 1) * g for s, g in zip(full[1:], grain, strict=True)]
        size = (full[0], sides[0], sides[1])
        _check_size(prior.model, size)
        return size

    def _samples(self, labels: Sequence[int] | None, num_samples: int | None) -> list[VideoSample]:
        classes = getattr(self.model.conditioner, "num_classes", 0)
        if labels and not classes:
            raise UserError("the model is unconditional: it takes no labels, use num_samples")
        for label in labels or ():
            if not 0 <= label < classes:
                raise UserError(
                    f"label {label} is out of range: the model knows {classes} classes, "
                    f"0 to {classes - 1}"
                )
        count = self.count(labels, num_samples)
        if not classes:
            return [VideoSample(index=i) for i in range(count)]
        told = list(labels or range(classes))
        return [VideoSample(index=i, label=told[i % len(told)]) for i in range(count)]


def _has(conditioner: Conditioner | None, kind: type[Conditioner]) -> bool:
    """Whether a conditioner is, or has among its parts, one of a kind."""
    modules = conditioner.modules() if conditioner is not None else ()
    return any(isinstance(module, kind) for module in modules)


def _pixels(model: LatentDiffusion) -> tuple[int, int]:
    """Rows and columns of pixels to one of the latent."""
    _, height, width = model.vae.latent_size((1, 1024, 1024))
    return 1024 // height, 1024 // width


def _made_for(model: LatentDiffusion) -> tuple[int, int]:
    """Height and width in pixels."""
    _, height, width = cast(Denoiser, model.denoiser).size
    down, across = _pixels(model)
    return height * down, width * across


def _check_size(model: LatentDiffusion, size: tuple[int, int, int]) -> None:
    """Refuse frames, height and width that the model can make no video of, before it tries."""
    try:
        latent = model.vae.latent_size(size)
        getattr(model.denoiser, "check_size", lambda _: None)(latent)
    except ValueError as error:
        side = _pixels(model)[0]
        raise UserError(f"{error}; one of the latent is {side} x {side} pixels") from error

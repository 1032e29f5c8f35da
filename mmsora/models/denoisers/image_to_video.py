"""From images to videos: temporal layers in any denoiser of images."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from einops import EinopsError, rearrange
from mmengine.logging import print_log
from torch import Tensor, nn

from mmsora.models.layers.temporal import TemporalLayer
from mmsora.registry import DENOISERS

__all__ = ["ImageToVideo"]

OF_IMAGE = "image_"  # before the name of what is said of the images beside a clip


@DENOISERS.register_module()
class ImageToVideo(nn.Module):
    """A denoiser of images that sees every frame, with temporal layers behind chosen modules.

    Frames are folded into the batch, so the image denoiser runs as it is and its weights keep
    their names, under ``image.``. At initialisation each frame comes out as the image denoiser
    makes it. A clip of one frame, and images beside a clip, pass by the temporal layers, so the
    model of images stays within the model of videos whatever is trained.

    Args:
        image: Config of the image denoiser.
        after: Where temporal layers go, and their width: names of modules of the image denoiser
            as a regular expression that matches them whole, and the channels of their output.
        layout: Axes of these outputs, in einops' notation, as ``"(b t) 1 n c"`` of DiT's tokens or
            ``"(b t) c h w"`` of maps.
        frames: The clips it is made for.
        layer: Arguments of :class:`TemporalLayer` but its width.
        train_image: Train the image denoiser's weights too; otherwise they are frozen, and it
            stays in eval mode. For a lower rate there is ``optim_wrapper.paramwise_cfg``.
    """

    takes_images = True

    def __init__(
        self,
        image: dict,
        after: Mapping[str, int],
        layout: str,
        frames: int,
        layer: dict | None = None,
        train_image: bool = False,
    ) -> None:
        super().__init__()
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        self.image = DENOISERS.build(image)
        self.size = (frames, *self.image.size[1:])
        self.layout, self.train_image = layout, train_image
        self._tokens = _tokens_of(layout)
        self.places = {
            name: width
            for pattern, width in after.items()
            for name in _matching(self.image, pattern)
        }
        self.temporal = nn.ModuleList(
            TemporalLayer(width, **(layer or {})) for width in self.places.values()
        )
        self.image.requires_grad_(train_image)
        self._warned = False
        self.train()

    def __getattr__(self, name: str) -> Any:
        """What else is asked of a denoiser, the image denoiser answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name in ("image", "num_tokens"):
                raise
            return getattr(self.image, name)

    @property
    def num_tokens(self) -> int:
        """Tokens of a clip."""
        return self.size[0] * self.image.num_tokens

    def train(self, mode: bool = True) -> "ImageToVideo":
        """A frozen image denoiser stays in eval mode: its dropout would be noise."""
        super().train(mode)
        if not self.train_image:
            self.image.eval()
        return self

    def forward(self, x: Tensor, clock: Tensor, num_images: int = 0, **cond: Tensor) -> Tensor:
        """Predict.

        Args:
            x: Noisy latents, (B, in_channels, T, H, W).
            clock: What the diffusion process tells of its time, (B,).
            num_images: So many of the last frames are independent images.
            **cond: What the image denoiser is told of a clip, (B, ...), or of each of its frames
                where it is a video itself, (B, C, T, H, W); and, with ``image_`` before the name,
                of each of the images, (B, num_images, ...).

        Returns:
            (B, out_channels, T, H, W).
        """
        batch, _, frames, _, _ = x.shape
        told = {
            name: _per_frame(value, frames - num_images, cond.get(OF_IMAGE + name))
            for name, value in cond.items()
            if not (num_images and name.startswith(OF_IMAGE))
        }
        with self._inserted(frames, num_images):
            out = self.image(
                rearrange(x, "b c t h w -> (b t) c 1 h w"),
                clock.repeat_interleave(frames, 0),
                **told,
            )
        if frames - num_images == 1 and self.training:  # or a batch of images had no gradients
            out = out + 0 * sum(p.sum() for p in self.temporal.parameters())
            self._warn_of_single_frames()
        return rearrange(out, "(b t) c 1 h w -> b c t h w", b=batch)

    def _warn_of_single_frames(self) -> None:
        if self._warned or not torch.is_grad_enabled():
            return
        self._warned = True
        if not any(weight.requires_grad for weight in self.image.parameters()):
            print_log(
                "clips of one frame pass by the temporal layers, and a frozen image denoiser "
                "learns nothing from single frames; give longer clips, or set train_image=True",
                "current",
                logging.WARNING,
            )

    @contextmanager
    def _inserted(self, frames: int, num_images: int) -> Iterator[None]:
        if frames - num_images == 1:
            yield
            return
        handles = []
        for name, layer in zip(self.places, self.temporal, strict=True):
            parts = frames - num_images, num_images
            hook = partial(self._through, name, cast(TemporalLayer, layer), parts)
            handles.append(self.image.get_submodule(name).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _through(
        self,
        name: str,
        layer: TemporalLayer,
        frames_and_images: tuple[int, int],
        module: nn.Module,
        args: Any,
        out: Tensor,
    ) -> Tensor:
        """A forward hook: what a module gave goes through a temporal layer."""
        try:
            sizes = _sizes_of(out, self.layout) | {"t": sum(frames_and_images)}
            x = rearrange(out, f"{self.layout} -> {self._tokens}", **sizes)
        except (AttributeError, EinopsError) as error:  # the first where it is no tensor
            gives = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ValueError(
                f"layout={self.layout!r} of {len(_axes(self.layout))} axes does not fit {name}, "
                f"which gives {gives}; choose other modules in `after`, or their layout"
            ) from error
        if x.shape[-1] != self.places[name]:
            raise ValueError(
                f"after={{...}} makes layers of the wrong width: {name} gives {x.shape[-1]} "
                f"channels, not {self.places[name]}"
            )
        clip, images = x.split(frames_and_images, dim=1)
        x = torch.cat([layer(clip), images], dim=1) if frames_and_images[1] else layer(clip)
        return rearrange(x, f"{self._tokens} -> {self.layout}", **sizes)


def _tokens_of(layout: str) -> str:
    """The pattern of tokens (B, T, N, width) for a layout."""
    axes = re.findall(r"[a-z]\w*", layout)
    if not {"b", "t", "c"} <= set(axes) or len(set(axes)) != len(axes):
        raise ValueError(
            f"layout must name b, t, c and the axes of space, as '(b t) c h w'; got {layout!r}"
        )
    return f"b t ({' '.join(axis for axis in axes if axis not in 'btc')}) c"


def _axes(layout: str) -> list[str]:
    """What stands for each axis of an output; ``_`` where several are folded into one."""
    return re.sub(r"\([^)]*\)", "_", layout).split()


def _sizes_of(out: Tensor, layout: str) -> dict[str, int]:
    """Sizes of the axes of space, which the pattern of tokens folds into one."""
    return {
        axis: size
        for axis, size in zip(_axes(layout), out.shape, strict=False)  # einops counts them
        if axis.isidentifier() and axis not in ("b", "t", "c", "_")
    }


def _matching(image: nn.Module, pattern: str) -> list[str]:
    names = [name for name, _ in image.named_modules() if name]
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ValueError(f"after={pattern!r} is no regular expression: {error}") from error
    if not found:
        raise ValueError(
            f"after={pattern!r} matches no module of {type(image).__name__}; there are "
            f"{', '.join(names[:3])}, ..., {names[-1]}"
        )
    return found


def _per_frame(value: Tensor, frames: int, of_images: Tensor | None) -> Tensor:
    """A condition for every frame of the folded batch, that of the images behind the clip's."""
    if value.ndim == 5:  # a video, or one frame that stands for all
        value = value.expand(-1, -1, frames, -1, -1)
        if of_images is not None:  # (B, num_images, C, 1, h, w)
            value = torch.cat([value, of_images.squeeze(3).transpose(1, 2)], 2)
        return rearrange(value, "b c t h w -> (b t) c 1 h w")
    clip = value[:, None].expand(-1, frames, *value.shape[1:])
    return (clip if of_images is None else torch.cat([clip, of_images], 1)).flatten(0, 1)

"""StableCascade's stages C and B: UNets of Wuerstchen's kind (arXiv:2306.00637)."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmsora.registry import DENOISERS

__all__ = ["CascadeConditions", "CascadeLevel", "StableCascade"]

CLOCK_WIDTH = 64  # waves of each number
BLACK = (8, 8)  # the size of the zeros that stand for no picture
NUMBERS = ("sca", "crp")
NEEDED = ("label", "text_pooled", "text", "effnet")  # what may not be left unsaid


class CascadeLevel(NamedTuple):
    """One resolution of the network, on the way down and again on the way up.

    Attributes:
        width: Channels.
        depth: Groups of blocks each way. A group is a convolution, what the clock says, and
            attention where there are heads.
        heads: Heads of the attention to the frame itself and to what is said of it.
        repeat: How often the way up goes through its blocks.
        dropout: Within the blocks.
    """

    width: int
    depth: int
    heads: int = 0
    repeat: int = 1
    dropout: float = 0.0


class CascadeConditions(NamedTuple):
    """What the network is told, by channels; 0 is not told.

    Attributes:
        width: Channels of the tokens that the attention sees.
        pooled: Of the one embedding of a text, or of a label's in its place.
        text: Of the states of a text's tokens.
        image: Of CLIP's embeddings of images.
        effnet: Of the compressor's latents of the same frames.
        pixels: Of small pictures of the same frames.
        numbers: Names of numbers that come with the clock, of ``sca`` and ``crp``.
        tokens: That a pooled text, or an image, becomes.
    """

    width: int
    pooled: int
    text: int = 0
    image: int = 0
    effnet: int = 0
    pixels: int = 0
    numbers: tuple[str, ...] = ("sca",)
    tokens: int = 4


@DENOISERS.register_module()
class StableCascade(nn.Module):
    """The parts of diffusers' ``StableCascadeUNet``, under its names, with a forward of our own.

    Unlike there, ``sca`` and ``crp`` are for each sample, a pooled text need not have an axis of
    tokens, labels may stand for texts, and weights start as the authors' do: zero at
    initialisation. The frames of a video are independent images.

    Args:
        in_channels: Channels of the latent.
        out_channels: Channels of the output.
        size: Frames, height and width of the latent it is made for.
        levels: Arguments of each :class:`CascadeLevel`, the finest first.
        conditions: Arguments of :class:`CascadeConditions`.
        patch: Side of a patch.
        strided: Each level has half the height and width of the one above it, as in stage B; all
            have the same in stage C.
        num_classes: Class labels, embedded in place of a pooled text; label ``num_classes`` means
            none. 0 takes texts.
    """

    embedding: nn.Sequential
    clip_txt_pooled_mapper: nn.Linear
    clip_txt_mapper: nn.Linear
    clip_img_mapper: nn.Linear
    clip_norm: nn.LayerNorm
    effnet_mapper: nn.Sequential
    pixels_mapper: nn.Sequential
    down_blocks: nn.ModuleList
    down_downscalers: nn.ModuleList
    up_blocks: nn.ModuleList
    up_upscalers: nn.ModuleList
    up_repeat_mappers: nn.ModuleList
    clf: nn.Sequential

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int, int],
        levels: Sequence[dict],
        conditions: dict,
        patch: int = 1,
        strided: bool = False,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        frames, height, width = size
        self.in_channels, self.out_channels = in_channels, out_channels
        self.size, self.num_classes = (frames, height, width), num_classes
        self.levels = [CascadeLevel(**level) for level in levels]
        self.conditions = CascadeConditions(**conditions)
        for name in self.conditions.numbers:
            if name not in NUMBERS:
                raise ValueError(f"numbers are of {' and '.join(NUMBERS)}, got {name!r}")
        for level in self.levels:
            if level.heads and level.width % level.heads:
                raise ValueError(f"width {level.width} is not divisible by heads {level.heads}")
        self._patch, self._least = patch, patch * 2 ** (len(levels) - 1) if strided else patch
        self._adopt_parts(patch, strided)
        self.embed_label = (
            nn.Embedding(num_classes + 1, self.conditions.pooled) if num_classes else None
        )
        self._initialise()

    def _adopt_parts(self, patch: int, strided: bool) -> None:
        """Take over the children of diffusers' network, and so its names."""
        from diffusers.models import StableCascadeUNet

        told, levels = self.conditions, self.levels
        kinds = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
        network = StableCascadeUNet(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            timestep_ratio_embedding_dim=CLOCK_WIDTH,
            patch_size=patch,
            conditioning_dim=told.width,
            block_out_channels=[level.width for level in levels],
            num_attention_heads=[level.heads for level in levels],
            down_num_layers_per_block=[level.depth for level in levels],
            up_num_layers_per_block=[level.depth for level in reversed(levels)],
            down_blocks_repeat_mappers=[1] * len(levels),
            up_blocks_repeat_mappers=[level.repeat for level in reversed(levels)],
            block_types_per_layer=[kinds if level.heads else kinds[:2] for level in levels],
            clip_text_in_channels=told.text or None,
            clip_text_pooled_in_channels=told.pooled,
            clip_image_in_channels=told.image or None,
            clip_seq=told.tokens,
            effnet_in_channels=told.effnet or None,
            pixel_mapper_in_channels=told.pixels or None,
            dropout=[level.dropout for level in levels],
            timestep_conditioning_type=told.numbers,
            switch_level=None if strided else [False] * (len(levels) - 1),
        )
        for name, part in network.named_children():
            self.add_module(name, part)
        self._library_config: dict[str, Any] = json.loads(network.to_json_string())

    @property
    def diffusers_config(self) -> dict[str, Any] | None:
        """The config file of diffusers' network of these weights; it has none with labels."""
        return None if self.num_classes else self._library_config

    def _initialise(self) -> None:
        """As the authors do. What they leave to PyTorch, as transposed convolutions, is left."""
        gains = {
            r"embedding\.1": 0.02,
            r".*\.to_[qkv]": 0.5**0.5,  # one matrix of theirs
            r".*\.channelwise\.4": sum(level.depth for level in self.levels) ** -0.5,
        }
        for name, layer in self.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            if re.fullmatch(r"clf\.1|.*\.mapper(_\w+)?", name):  # the output and the clock
                nn.init.zeros_(layer.weight)
            elif re.fullmatch(r"clip_\w+_mapper|(effnet|pixels)_mapper\.\d", name):
                nn.init.normal_(layer.weight, std=0.02)
            else:
                gain = [gain for pattern, gain in gains.items() if re.fullmatch(pattern, name)]
                nn.init.xavier_uniform_(layer.weight, *gain)

    @staticmethod
    def from_public(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the authors' files, or of diffusers', under our names.

        Args:
            weights: Of either stage.

        Returns:
            The same by the names of diffusers: queries, keys and values are three matrices.
        """
        ours: dict[str, Tensor] = {}
        for key, value in weights.items():
            if match := re.fullmatch(r"(.*)\.attn\.in_proj_(\w+)", key):
                parts = zip("qkv", value.chunk(3), strict=True)
                ours |= {f"{match[1]}.to_{name}.{match[2]}": part for name, part in parts}
            else:
                key = re.sub(r"^clip_mapper\.", "clip_txt_pooled_mapper.", key)
                ours[key.replace(".attn.out_proj.", ".to_out.0.")] = value
        return ours

    @staticmethod
    def to_public(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What :meth:`from_public` undoes.

        Args:
            weights: Of either stage, by our names.

        Returns:
            The same by the names of the authors.
        """
        theirs, is_stage_c = {}, "clip_txt_mapper.weight" in weights
        for key, value in weights.items():
            if match := re.fullmatch(r"(.*)\.to_([qkv])\.(\w+)", key):
                whole = [weights[f"{match[1]}.to_{name}.{match[3]}"] for name in "qkv"]
                theirs[f"{match[1]}.attn.in_proj_{match[3]}"] = torch.cat(whole)
            else:
                if not is_stage_c:
                    key = re.sub(r"^clip_txt_pooled_mapper\.", "clip_mapper.", key)
                theirs[key.replace(".to_out.0.", ".attn.out_proj.")] = value
        return theirs

    def forward(
        self,
        x: Tensor,
        clock: Tensor,
        label: Tensor | None = None,
        text_pooled: Tensor | None = None,
        text: Tensor | None = None,
        image: Tensor | None = None,
        effnet: Tensor | None = None,
        pixels: Tensor | None = None,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x: Noisy latents, (B, in_channels, T, H, W).
            clock: Time of the diffusion process in [0, 1], (B,).
            label: Class labels, (B,), where there are classes.
            text_pooled: Embeddings of texts, (B, channels) or (B, n, channels), where there are
                no classes.
            text: States of the texts' tokens, (B, tokens, channels).
            image: Embeddings of images, (B, channels) or (B, n, channels); None is zeros.
            effnet: The compressor's latents of the same frames, (B, channels, T, h, w).
            pixels: Small pictures of the same frames, (B, channels, T, h, w); None is zeros.
            sca: A number in [0, 1] that comes with the clock, (B,); None is 0.
            crp: Another one.

        Returns:
            (B, out_channels, T, H, W).
        """
        numbers = {"sca": sca, "crp": crp}
        said = {"label": label, "text_pooled": text_pooled, "text": text, "image": image}
        self._check_told({**said, **numbers, "effnet": effnet, "pixels": pixels})
        self.check_size(x.shape[2:])
        frames = x.shape[2]
        at = self._times(clock, numbers).repeat_interleave(frames, 0)
        tokens = self._tokens(said).repeat_interleave(frames, 0)
        h = self.embedding(_folded(x))
        if effnet is not None:
            h = h + self.effnet_mapper(_resized(_folded(effnet).to(h), h))
        if self.conditions.pixels:
            black = h.new_zeros(len(h), self.conditions.pixels, *BLACK)
            shown = self.pixels_mapper(black if pixels is None else _folded(pixels).to(h))
            h = h + _resized(shown, h)
        out = self.clf(self._through_levels(h, at, tokens))
        return rearrange(out, "(b t) c h w -> b c t h w", t=frames)

    def check_size(self, size: Sequence[int]) -> None:
        """Refuse latents that patches or levels do not divide.

        Args:
            size: Their frames, height and width.

        Raises:
            ValueError: These cannot be.
        """
        _, height, width = size
        if height % self._patch or width % self._patch or min(height, width) < self._least:
            raise ValueError(
                f"latents of {height}x{width}: this StableCascade takes heights and widths that "
                f"are multiples of {self._patch}, from {self._least} on"
            )

    def _check_told(self, told: Mapping[str, Tensor | None]) -> None:
        takes = self.conditions
        known = {
            "label": self.num_classes,
            "text_pooled": not self.num_classes,
            "text": takes.text,
            "image": takes.image,
            "effnet": takes.effnet,
            "pixels": takes.pixels,
        } | dict.fromkeys(takes.numbers, True)
        for name, value in told.items():
            if value is None and name in NEEDED and known[name]:
                raise ValueError(f"this StableCascade needs {name}=")
            if value is not None and not known.get(name):
                raise ValueError(f"this StableCascade takes no {name}=; see its conditions")

    def _times(self, clock: Tensor, numbers: Mapping[str, Tensor | None]) -> Tensor:
        """What modulates the blocks: waves of the clock and of the numbers beside it."""
        beside = [numbers[name] for name in self.conditions.numbers]
        all_numbers = [clock, *(torch.zeros_like(clock) if n is None else n for n in beside)]
        return torch.cat([_waves(number) for number in all_numbers], 1).to(self._dtype)

    def _tokens(self, said: Mapping[str, Any]) -> Tensor:
        """What the attention sees beside the frame, (B, tokens, width)."""
        made = []
        if said["text"] is not None:
            made.append(self.clip_txt_mapper(said["text"].to(self._dtype)))
        pooled = said["text_pooled"]
        if self.embed_label is not None:
            pooled = self.embed_label(said["label"])
        made.append(self._several(self.clip_txt_pooled_mapper, pooled))
        if self.conditions.image:
            none = pooled.new_zeros(len(pooled), self.conditions.image)
            image = none if said["image"] is None else said["image"]
            made.append(self._several(self.clip_img_mapper, image))
        return self.clip_norm(torch.cat(made, dim=1))

    def _several(self, mapper: nn.Linear, embeddings: Tensor) -> Tensor:
        """A few tokens for each embedding of (B, channels) or (B, n, channels)."""
        each = embeddings.to(self._dtype).reshape(len(embeddings), -1, mapper.in_features)
        return mapper(each).reshape(len(each), -1, self.conditions.width)

    @property
    def _dtype(self) -> torch.dtype:
        return self.clip_txt_pooled_mapper.weight.dtype

    def _through_levels(self, x: Tensor, at: Tensor, tokens: Tensor) -> Tensor:
        passed: list[Tensor | None] = []
        for level, resample, blocks in zip(
            self.levels, self.down_downscalers, self.down_blocks, strict=True
        ):
            x = _through(level, blocks, resample(x), at, tokens)
            passed.append(x)
        passed[-1] = None  # the coarsest goes straight up
        for level, blocks, between, resample in zip(
            reversed(self.levels),
            self.up_blocks,
            self.up_repeat_mappers,
            self.up_upscalers,
            strict=True,
        ):
            skip = passed.pop()
            for again in (nn.Identity(), *cast(nn.ModuleList, between)):
                x = again(x) if skip is None else _resized(again(x), skip)
                x = _through(level, blocks, x, at, tokens, skip)
            x = resample(x)
        return x


def _through(
    level: CascadeLevel,
    blocks: Any,
    x: Tensor,
    at: Tensor,
    tokens: Tensor,
    skip: Tensor | None = None,
) -> Tensor:
    """The blocks of a level one way, whose first convolution sees what was skipped."""
    size = 3 if level.heads else 2
    for i, block in enumerate(blocks):
        if i % size == 0:
            x = block(x, skip) if i == 0 else block(x)
        else:
            x = block(x, at if i % size == 1 else tokens)
    return x


def _folded(video: Tensor) -> Tensor:
    return rearrange(video, "b c t h w -> (b t) c h w")


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """In float32, as half precision has no places for large grids."""
    size = like.shape[-2:]
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x.float(), size, mode="bilinear", align_corners=True).to(x.dtype)


def _waves(number: Tensor) -> Tensor:
    """Sines and cosines of numbers in [0, 1], (B,) to float32 (B, CLOCK_WIDTH)."""
    half = CLOCK_WIDTH // 2
    steps = torch.arange(half, device=number.device).float()
    angles = (number.float() * 10000)[:, None] * (steps * (-math.log(10000) / (half - 1))).exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)

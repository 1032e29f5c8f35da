"""Latte: latent diffusion transformer for video generation (Ma et al. 2024, arXiv:2401.03048)."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmsora.models.layers.attention import Attention
from mmsora.models.layers.block import SPACE, TIME, AdaLNBlock, on_clip
from mmsora.models.layers.linear import linear
from mmsora.models.layers.modulation import gated, modulate
from mmsora.models.layers.position import sincos_1d
from mmsora.models.layers.sequence import WHOLE, Shards
from mmsora.models.layers.transformer import VideoTransformer, time_table
from mmsora.registry import DENOISERS

__all__ = ["Latte"]


class SpaceTimeBlock(AdaLNBlock):
    """The paper's variant 3: attention in space, then along time, then the perceptron.

    The attention along time has a plain norm and no gate; with a scale and shift in that norm and
    no bias on queries, keys and values there are as many weights as were published.

    Args:
        width: Width of the tokens.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, SPACE)
        self.norm_time = nn.LayerNorm(width, eps=1e-6)
        self.attn_time = Attention(width, heads, qkv_bias=False)

    def forward(
        self, x: Tensor, condition: Tensor, num_images: int = 0, shards: Shards = WHOLE
    ) -> Tensor:
        """As in :class:`AdaLNBlock`; along time there is attention for the clip alone."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(condition)
        x = gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), SPACE, shards))
        across = shards.before(TIME)
        x = shards.move(x, across)
        x = on_clip(lambda clip: clip + self.attn_time(self.norm_time(clip), TIME), x, num_images)
        x = across.move(x, shards)
        return gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


@DENOISERS.register_module()
class Latte(VideoTransformer):
    """Attention within each frame and attention along time.

    Takes independent images behind the last frame of a clip, which know neither it nor one another
    (the paper's joint training), and a text in place of a label.

    Args:
        in_channels: Channels of the latent.
        out_channels: Channels of the output; twice ``in_channels`` when variance is learned.
        size: Frames, height and width of the latent it is made for.
        patch: Side of a patch in space, or its frames, rows and columns.
        width: Width of the tokens.
        depth: Number of blocks, spatial and temporal together; even, but for ``joint``.
        heads: Attention heads.
        num_classes: Class labels; label ``num_classes`` means none. 0 is unconditional.
        layout: Order of the blocks: ``interleaved`` alternates them (variant 1, the default),
            ``late`` has all spatial blocks before all temporal ones (variant 2), ``joint`` has
            both attentions in each block (variant 3).
        text: Tokens and channels of a text's embedding, as (77, 768) of CLIP; None knows none.
    """

    temp_embed: Tensor
    takes_images = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int, int],
        patch: int | tuple[int, int, int],
        width: int,
        depth: int,
        heads: int,
        num_classes: int = 0,
        layout: str | None = None,
        text: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, size, patch, width, num_classes)
        if text and num_classes:
            raise ValueError(f"a Latte is told a text or a label: text={text}, so num_classes=0")
        self.text = text
        self.embed_text = linear(text[0] * text[1], width) if text else None
        self.blocks = nn.ModuleList(_blocks(layout or "interleaved", width, depth, heads))
        is_temporal = [getattr(block, "axis", None) == TIME for block in self.blocks]
        self._first_temporal = is_temporal.index(True) if any(is_temporal) else 0
        table = sincos_1d(torch.arange(self.grid[0]), width).float()
        self.register_buffer("temp_embed", table)

    def forward(
        self,
        x: Tensor,
        clock: Tensor,
        label: Tensor | None = None,
        text: Tensor | None = None,
        num_images: int = 0,
        image_label: Tensor | None = None,
        image_text: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x: Noisy latents, (B, in_channels, T, H, W).
            clock: What the diffusion process tells of its time, (B,).
            label: Class labels, (B,); ``num_classes`` is none. Not for an unconditional model.
            text: Embeddings of texts, (B, tokens, channels), where the model knows them.
            num_images: So many of the last frames are independent images.
            image_label: Their labels, (B, num_images).
            image_text: Their texts, (B, num_images, tokens, channels).

        Returns:
            (B, out_channels, T, H, W).
        """
        self._check_images(x, num_images)
        at = self.embed_clock(clock)
        condition = self._told(at, label, text)
        if num_images:
            clip = condition[:, None].expand(-1, x.shape[2] - num_images, -1)
            images = at[:, None].expand(-1, num_images, -1)
            images = self._told(images, image_label, image_text, "image_")
            condition = torch.cat([clip, images], dim=1)
        tokens, shards = self.tokens(x)
        for i, block in enumerate(cast(Sequence[AdaLNBlock], self.blocks)):
            needed = shards.before(block.axis)
            tokens, shards = shards.move(tokens, needed), needed
            if i == self._first_temporal:  # frames are told apart where time first matters
                tokens = tokens + shards.share(self._places(x, num_images), TIME, 0)
            tokens = block(tokens, shards.told(condition), num_images, shards=shards)
        # A text speaks to the blocks alone.
        return self.output(tokens, at if self.text else condition, x.shape[2:], shards)

    def _places(self, x: Tensor, num_images: int) -> Tensor:
        """What tells the frames apart, (t, 1, width): nothing for images beside the clip."""
        table = time_table(self.temp_embed, x.shape[2] // self.patch[0] - num_images)
        return F.pad(table, (0, 0, 0, 0, 0, num_images))

    def _check_images(self, x: Tensor, num_images: int) -> None:
        if not 0 <= num_images < x.shape[2]:
            raise ValueError(
                f"num_images={num_images} of {x.shape[2]} frames: at least one is the clip's"
            )
        if num_images and self.patch[0] > 1:
            raise ValueError(
                f"patches of {self.patch[0]} frames would mix images; num_images needs patch="
                f"(1, {self.patch[1]}, {self.patch[2]})"
            )

    def _told(
        self, condition: Tensor, label: Tensor | None, text: Tensor | None, of: str = ""
    ) -> Tensor:
        """A condition (..., width) and what is said of the clips or images."""
        shape = condition.shape[:-1]
        if self.embed_text is None or self.text is None:
            if text is not None:
                raise ValueError(f"{of}text= is for a Latte that has text=(tokens, channels)")
            _check_shape(label, shape, f"{of}label")
            told = self.label_embedding(label, f"{of}label")
            return condition if told is None else condition + told
        if text is None:
            raise ValueError(f"a Latte with text={self.text} needs {of}text=")
        _check_shape(text, (*shape, *self.text), f"{of}text")
        text = text.flatten(-2).to(self.embed_text.weight.dtype)
        return condition + self.embed_text(F.silu(text))


def _check_shape(told: Tensor | None, shape: Sequence[int], name: str) -> None:
    if told is not None and told.shape != shape:
        raise ValueError(f"{name} must be of shape {tuple(shape)}, got {tuple(told.shape)}")


def _blocks(layout: str, width: int, depth: int, heads: int) -> list[nn.Module]:
    if layout == "joint":
        return [SpaceTimeBlock(width, heads) for _ in range(depth)]
    if layout not in ("interleaved", "late"):
        raise ValueError(f"layout must be 'interleaved', 'late' or 'joint', got {layout!r}")
    if depth % 2:
        raise ValueError(f"depth counts spatial and temporal blocks: even, not {depth}")
    pair, half = [SPACE, TIME], depth // 2
    axes = pair * half if layout == "interleaved" else [SPACE] * half + [TIME] * half
    return [AdaLNBlock(width, heads, axis) for axis in axes]

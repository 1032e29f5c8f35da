"""What the transformers of the DiT family share: everything but the order of their blocks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmsora.models.layers.embedding import ClockEmbedding
from mmsora.models.layers.linear import linear
from mmsora.models.layers.modulation import AdaLN, modulate
from mmsora.models.layers.patch import Patch, PatchEmbed, grid_of, unpatchify
from mmsora.models.layers.position import sincos_1d, sincos_2d
from mmsora.models.layers.sequence import SPACE, WHOLE, Shards

__all__ = ["PUBLIC_KEYS", "VideoTransformer"]

# Names in the public checkpoints of DiT, SiT and Latte, and ours.
PUBLIC_KEYS = (
    (r"x_embedder\.proj\.", "embed.proj."),
    (r"t_embedder\.mlp\.0\.", "embed_clock.fc1."),
    (r"t_embedder\.mlp\.2\.", "embed_clock.fc2."),
    (r"y_embedder\.embedding_table\.", "embed_label."),
    (r"text_embedding_projection\.1\.", "embed_text."),
    (r"(blocks\.\d+)\.adaLN_modulation\.1\.", r"\1.ada.linear."),
    (r"final_layer\.adaLN_modulation\.1\.", "ada.linear."),
    (r"final_layer\.linear\.", "head."),
)


class VideoTransformer(nn.Module):
    """Patches, positions, clock and label before the blocks; the linear head after them.

    Zero at initialisation. Takes any number of frames, height and width that the patch divides,
    whatever ``size`` it was built for. Subclasses add ``blocks`` and ``forward``.

    Args:
        in_channels: Channels of the latent.
        out_channels: Channels of the output; twice ``in_channels`` when variance is learned.
        size: Frames, height and width of the latent it is made for.
        patch: Side of a patch in space, or its frames, rows and columns.
        width: Width of the tokens.
        num_classes: Class labels; label ``num_classes`` means none. 0 is unconditional.
    """

    blocks: nn.ModuleList
    pos_embed: Tensor
    public_keys = PUBLIC_KEYS
    knows_null = True  # whether the label table has a row for "none"
    shares_tokens = True  # with other processes that train on the same samples

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int, int],
        patch: int | tuple[int, int, int],
        width: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        frames, height, columns = size
        self.width = width
        self.in_channels, self.out_channels = in_channels, out_channels
        self.size, self.num_classes = (frames, height, columns), num_classes
        span, down, across = (1, patch, patch) if isinstance(patch, int) else patch
        self.patch: Patch = (span, down, across)
        self.grid = grid_of(self.size, self.patch)
        self.embed = PatchEmbed(in_channels, width, self.patch)
        self.embed_clock = ClockEmbedding(width)
        self.embed_label = nn.Embedding(num_classes + 1, width) if num_classes else None
        if self.embed_label is not None:
            nn.init.normal_(self.embed_label.weight, std=0.02)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ada = AdaLN(width, 2)
        self.head = linear(width, span * down * across * out_channels, std=0)
        self.register_buffer("pos_embed", sincos_2d(*self.grid[1:], width).float())

    @property
    def num_tokens(self) -> int:
        """Tokens of one sample of ``size``."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def condition(self, clock: Tensor, label: Tensor | None) -> Tensor:
        """What modulates the blocks.

        Args:
            clock: What the diffusion process tells of its time, (B,).
            label: Class labels, (B,); ``num_classes`` is none. Not for an unconditional model.

        Returns:
            (B, width).
        """
        condition, told = self.embed_clock(clock), self.label_embedding(label)
        return condition if told is None else condition + told

    def label_embedding(self, label: Tensor | None, name: str = "label") -> Tensor | None:
        """Labels of any shape (...) as (..., width).

        Args:
            label: Class labels; ``num_classes`` is none. Not for an unconditional model.
            name: Of the argument, for the message.

        Returns:
            None where the model is unconditional.

        Raises:
            ValueError: A class-conditional model got no labels.
        """
        if self.embed_label is None:
            return None
        if label is None:
            raise ValueError(
                f"a class-conditional {type(self).__name__} needs {name}=; num_classes is none"
            )
        return self.embed_label(label)

    def tokens(self, x: Tensor) -> tuple[Tensor, Shards]:
        """Latents to tokens that know where in the frame they are.

        The table of positions is the stored one at the size it was made for, else one made on the
        spot.

        Args:
            x: Latents, (B, C, T, H, W).

        Returns:
            Tokens (B, t, h w, width), and what of them is here.
        """
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} has in_channels={self.in_channels}, the latent has "
                f"{x.shape[1]} channels"
            )
        frames, rows, columns = grid_of(x.shape[2:], self.patch)
        table = self.pos_embed
        if (rows, columns) != self.grid[1:]:
            table = sincos_2d(rows, columns, table.shape[-1]).to(table)
        shards = Shards.of(frames, rows * columns, self.training)
        return self.embed(x, shards) + shards.share(table, SPACE, 0), shards

    @contextmanager
    def tap(self, block: int) -> Iterator[list[Tensor]]:
        """Collects the tokens (B, t, h w, width) after so many blocks, of every call within.

        Args:
            block: How many blocks, at least 1.

        Yields:
            The list that they are put into.

        Raises:
            ValueError: There is no such block.
        """
        if not 1 <= block <= len(self.blocks):
            raise ValueError(
                f"block must be 1 to {len(self.blocks)}, the blocks of the {type(self).__name__}; "
                f"got {block}"
            )
        found: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, named: dict[str, Any], out: Tensor) -> None:
            found.append(named.get("shards", WHOLE).gather(out))

        hook = self.blocks[block - 1].register_forward_hook(keep, with_kwargs=True)
        try:
            yield found
        finally:
            hook.remove()

    def output(
        self, tokens: Tensor, condition: Tensor, size: Sequence[int], shards: Shards = WHOLE
    ) -> Tensor:
        """Tokens to latents.

        Args:
            tokens: (B, t, h w, width).
            condition: (B, width), or of each frame (B, t, width).
            size: The latents' T, H and W.
            shards: What of the tokens is here.

        Returns:
            (B, out_channels, T, H, W), whole.
        """
        shift, scale = self.ada(shards.told(condition))
        out = self.head(modulate(self.norm(tokens), shift, scale))
        return unpatchify(shards.gather(out), size[1] // self.patch[1], self.patch)


def time_table(stored: Tensor, frames: int) -> Tensor:
    """The table of frame positions: the stored one at its own length, else one made on the spot.

    Args:
        stored: (T, width).
        frames: The length wanted.

    Returns:
        (frames, 1, width), to be added to tokens (B, T, N, width).
    """
    if frames != len(stored):
        stored = sincos_1d(torch.arange(frames), stored.shape[-1]).to(stored)
    return stored[:, None]

"""Patches of a video as tokens, and back."""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn

from mmsora.models.layers.linear import linear
from mmsora.models.layers.sequence import WHOLE, Shards

__all__ = ["Patch", "PatchEmbed", "grid_of", "unpatchify"]

Patch = tuple[int, int, int]  # frames, rows and columns


def grid_of(size: Sequence[int], patch: Patch) -> tuple[int, int, int]:
    """How many patches tile a size.

    Args:
        size: Frames, height and width of the latent.
        patch: Frames, rows and columns of a patch.

    Returns:
        Patches along each of the three.

    Raises:
        ValueError: A side is not divisible by the patch.
    """
    if any(side % step for side, step in zip(size, patch, strict=True)):
        near = [max(round(side / p), 1) * p for side, p in zip(size, patch, strict=True)]
        raise ValueError(
            f"size {_times(size)} (frames, height, width) is not divisible by patch "
            f"{_times(patch)}; the nearest that is: {_times(near)}"
        )
    frames, rows, columns = (side // p for side, p in zip(size, patch, strict=True))
    return frames, rows, columns


def _times(sides: Sequence[int]) -> str:
    return "x".join(str(side) for side in sides)


class PatchEmbed(nn.Module):
    """Non-overlapping patches of a video, each through one linear layer.

    Args:
        channels: Channels of the video.
        width: Width of the tokens.
        patch: Frames, rows and columns of a patch.
    """

    def __init__(self, channels: int, width: int, patch: Patch) -> None:
        super().__init__()
        self.patch = patch
        s, p, q = patch
        self.proj = linear(channels * s * p * q, width)

    def forward(self, x: Tensor, shards: Shards = WHOLE) -> Tensor:
        """Shape (B, C, T, H, W) to (B, t, h w, width), row-major.

        Args:
            x: The video.
            shards: Of which tokens to make.

        Returns:
            The tokens.
        """
        s, p, q = self.patch
        x = rearrange(x, "b c (t s) (h p) (w q) -> b t (h w) (c s p q)", s=s, p=p, q=q)
        return self.proj(shards.share(x, shards.axis, shards.axis))


def unpatchify(x: Tensor, rows: int, patch: Patch) -> Tensor:
    """Tokens back to a video.

    Args:
        x: (B, t, N, volume of the patch * C), each token ordered (frame, row, column, channel).
        rows: Rows of the grid of patches.
        patch: Frames, rows and columns of a patch.

    Returns:
        (B, C, T, H, W).
    """
    s, p, q = patch
    return rearrange(x, "b t (h w) (s p q c) -> b c (t s) (h p) (w q)", h=rows, s=s, p=p, q=q)

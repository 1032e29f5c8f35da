"""Patches of a video as tokens, and back."""

from einops import rearrange
from torch import Tensor, nn

from mmsora.models.layers.linear import linear

__all__ = ["PatchEmbed", "check_divisible", "unpatchify"]


def check_divisible(height: int, width: int, patch: int) -> None:
    """Refuse a size that patches do not tile.

    Args:
        height: Of the latent.
        width: Of the latent.
        patch: Side of a patch.

    Raises:
        ValueError: A side is not divisible by the patch.
    """
    if height % patch or width % patch:
        raise ValueError(
            f"size {height}x{width} is not divisible by patch {patch}; the nearest that is: "
            f"{max(round(height / patch), 1) * patch}x{max(round(width / patch), 1) * patch}"
        )


class PatchEmbed(nn.Module):
    """Square patches of each frame, each through one linear layer.

    Args:
        channels: Channels of the video.
        width: Width of the tokens.
        patch: Side of a patch.
    """

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = linear(channels * patch * patch, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, T, H, W) to (B, T, H W / patch^2, width), row-major.

        Args:
            x: The video.

        Returns:
            The tokens.

        Raises:
            ValueError: The patch does not divide the size.
        """
        check_divisible(x.shape[-2], x.shape[-1], self.patch)
        x = rearrange(x, "b c t (h p) (w q) -> b t (h w) (c p q)", p=self.patch, q=self.patch)
        return self.proj(x)


def unpatchify(x: Tensor, rows: int, patch: int) -> Tensor:
    """Tokens back to a video.

    Args:
        x: (B, T, N, patch * patch * C), each token ordered (row, column, channel).
        rows: Rows of the grid of patches.
        patch: Side of a patch.

    Returns:
        (B, C, T, H, W).
    """
    return rearrange(x, "b t (h w) (p q c) -> b c t (h p) (w q)", h=rows, p=patch, q=patch)

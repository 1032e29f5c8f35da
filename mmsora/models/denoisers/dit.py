"""DiT and SiT: diffusion transformers for images (arXiv:2212.09748, arXiv:2401.08740)."""

from torch import Tensor, nn

from mmsora.models.layers.block import SPACE, AdaLNBlock
from mmsora.models.layers.transformer import VideoTransformer
from mmsora.registry import DENOISERS

__all__ = ["DiT"]


@DENOISERS.register_module()
class DiT(VideoTransformer):
    """Attention within each frame; the frames of a video are independent images.

    The network of SiT too: only the diffusion process differs.

    Args:
        in_channels: Channels of the latent.
        out_channels: Channels of the output; twice ``in_channels`` when variance is learned.
        size: Frames, height and width of the latent it is made for; an image is one frame.
        patch: Side of a patch in space, or its frames, rows and columns.
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
        num_classes: Class labels; label ``num_classes`` means none. 0 is unconditional.
    """

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
    ) -> None:
        super().__init__(in_channels, out_channels, size, patch, width, num_classes)
        self.blocks = nn.ModuleList(AdaLNBlock(width, heads, SPACE) for _ in range(depth))

    def forward(self, x: Tensor, clock: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            x: Noisy latents, (B, in_channels, T, H, W).
            clock: What the diffusion process tells of its time, (B,).
            label: Class labels, (B,); ``num_classes`` is none. Not for an unconditional model.

        Returns:
            (B, out_channels, T, H, W).
        """
        condition = self.condition(clock, label)
        tokens, shards = self.tokens(x)
        for block in self.blocks:
            tokens = block(tokens, condition, shards=shards)
        return self.output(tokens, condition, x.shape[2:], shards)

"""StableCascade's codecs as VAEs: stage A, and the compressor of stage C (arXiv:2306.00637)."""

from typing import Any

import torch
from torch import Tensor, nn

from mmsora.models.vaes.cascade_networks import EfficientNetEncoder, Previewer, StageA
from mmsora.models.vaes.vae import VAEOfFrames
from mmsora.registry import VAES
from mmsora.utils.checkpoint import load_checkpoint, load_weights
from mmsora.utils.draws import Draws
from mmsora.utils.feature_store import checksum
from mmsora.utils.user_error import UserError

__all__ = ["CascadeCompressor", "CascadeStageA"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Codec(VAEOfFrames):
    """Frozen networks that see a few frames at once.

    Args:
        pretrained: The file that ``encode`` has its weights from.
        config: The architecture.
        chunk: Frames that are encoded or decoded at once.
    """

    def __init__(self, pretrained: str, config: dict[str, Any], chunk: int) -> None:
        super().__init__()
        self.pretrained, self.config, self.chunk = pretrained, config, chunk

    def identity(self) -> dict[str, Any]:
        """Where the weights come from, and the architecture."""
        return {**super().identity(), "pretrained": self.pretrained, "config": self.config}


@VAES.register_module()
class CascadeStageA(_Codec):
    """Stage A: each frame at a quarter of its height and width, for stage B.

    Args:
        pretrained: File of the weights, the authors' ``stage_a.safetensors`` or diffusers'. Read
            in ``init_weights``.
        config: Arguments of :class:`StageA`; None is the published one.
        scale: Latents are divided by it.
        chunk: Frames that are encoded or decoded at once.
    """

    def __init__(
        self,
        pretrained: str,
        config: dict[str, Any] | None = None,
        scale: float = 0.43,
        chunk: int = 16,
    ) -> None:
        super().__init__(pretrained, dict(config or {}), chunk)
        self.scale = scale
        self.model = StageA(**self.config)
        self.train(False).requires_grad_(False)

    def init_weights(self) -> None:
        """Read the weights.

        Raises:
            UserError: There is no such file, or it is of something else.
        """
        _read(self.model, self.pretrained)

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Frames, height and width of the latent.

        Args:
            size: Frames, height and width of the video.

        Returns:
            Of the latent.

        Raises:
            ValueError: Height or width is not divisible by 4.
        """
        frames, height, width = size
        if height % 4 or width % 4:
            raise ValueError(f"size {height}x{width} is not divisible by 4, as stage A needs")
        return frames, height // 4, width // 4

    def identity(self) -> dict[str, Any]:
        """Where the weights come from, the architecture and the scale."""
        return {**super().identity(), "scale": self.scale}

    def encode(self, video: Tensor, draws: Draws | None = None) -> Tensor:
        """To the latent, frame by frame; nothing is drawn.

        Args:
            video: (B, 3, T, H, W) in [-1, 1].
            draws: Not used.

        Returns:
            (B, channels, T, H / 4, W / 4), scaled.
        """
        return self._by_frames(self.model.encode, (video + 1) / 2) / self.scale

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, channels, T, h, w) to videos (B, 3, T, 4 h, 4 w), frame by frame."""
        return self._by_frames(self.model.decode, latent * self.scale) * 2 - 1


@VAES.register_module()
class CascadeCompressor(_Codec):
    """The compressor of stage C: each frame at a 32nd of its height and width, rounded up.

    What is lost is stage B's affair; here latents decode to previews of a quarter of the height
    and width.

    Args:
        pretrained: File of the encoder's weights, ``effnet_encoder.safetensors``. Read in
            ``init_weights``.
        previewer: File of the previewer's, ``previewer.safetensors``; None decodes nothing.
        config: Arguments of :class:`EfficientNetEncoder`; None is the published one.
        preview_width: Channels of the previewer.
        chunk: Frames that are encoded or decoded at once.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        pretrained: str,
        previewer: str | None = None,
        config: dict[str, Any] | None = None,
        preview_width: int = 512,
        chunk: int = 16,
    ) -> None:
        super().__init__(pretrained, dict(config or {}), chunk)
        self.encoder = EfficientNetEncoder(**self.config)
        self.preview_file = previewer
        self.previewer = Previewer(self.encoder.channels, preview_width) if previewer else None
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1), False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).reshape(3, 1, 1), False)
        self.train(False).requires_grad_(False)

    def init_weights(self) -> None:
        """Read the weights.

        Raises:
            UserError: There is no such file, or it is of something else.
        """
        _read(self.encoder, self.pretrained)
        if self.previewer is not None and self.preview_file is not None:
            _read(self.previewer, self.preview_file)

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Frames, height and width of the latent of a video of ``size``."""
        frames, *sides = size
        height, width = (-(-side // 2**self.encoder.halvings) for side in sides)
        return frames, height, width

    def fingerprint(self) -> str:
        """A hash of the encoder's weights."""
        return checksum(self.encoder.state_dict())

    def encode(self, video: Tensor, draws: Draws | None = None) -> Tensor:
        """To the latent, frame by frame; nothing is drawn.

        Args:
            video: (B, 3, T, H, W) in [-1, 1].
            draws: Not used.

        Returns:
            (B, channels, T, H / 32, W / 32), rounded up, of unit variance.
        """

        def latents(frames: Tensor) -> Tensor:
            return self.encoder(((frames + 1) / 2 - self.mean) / self.std)

        return self._by_frames(latents, video)

    def decode(self, latent: Tensor) -> Tensor:
        """A preview.

        Args:
            latent: (B, channels, T, h, w).

        Returns:
            Videos (B, 3, T, 8 h, 8 w), about in [-1, 1].

        Raises:
            UserError: There is no previewer.
        """
        if self.previewer is None:
            raise UserError(
                "latents of the compressor are seen by a previewer: set model.vae.previewer to "
                "the file previewer.safetensors, or decode them by stages B and A"
            )
        return self._by_frames(self.previewer, latent) * 2 - 1


def _read(network: nn.Module, file: str) -> None:
    content = load_checkpoint(file)
    weights = content.get("state_dict", content)
    if isinstance(network, StageA):
        weights = network.from_public(weights)
    load_weights(network, weights, file)

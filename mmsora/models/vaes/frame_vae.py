"""An image VAE on the frames of a video: Stable Diffusion's, by default."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsora.models.vaes.vae import VAEOfFrames, drawn
from mmsora.registry import VAES
from mmsora.utils.draws import Draws
from mmsora.utils.feature_store import checksum

__all__ = ["FrameVAE"]

# The architecture of Stable Diffusion 1 and 2 (arXiv:2112.10752), f = 8.
STABLE_DIFFUSION = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}


@VAES.register_module()
class FrameVAE(VAEOfFrames):
    """Diffusers' ``AutoencoderKL``, frozen, a few frames at a time.

    Built from numbers; weights are read in ``init_weights``.

    Args:
        pretrained: Folder, or hub id, of the weights in diffusers' layout.
        config: The architecture, as arguments of ``AutoencoderKL``; None is Stable Diffusion's.
        scale: Latents are multiplied by it, to unit variance.
        chunk: Frames that are encoded or decoded at once.
        consistency_decoder: Folder, or hub id, of a ``ConsistencyDecoderVAE`` to decode with
            instead; None decodes with the VAE itself.
    """

    def __init__(
        self,
        pretrained: str,
        config: dict[str, Any] | None = None,
        scale: float = 0.18215,
        chunk: int = 16,
        consistency_decoder: str | None = None,
    ) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        self.pretrained, self.scale, self.chunk = pretrained, scale, chunk
        self.config = dict(config or STABLE_DIFFUSION)
        self.consistency_decoder = consistency_decoder
        self.model: Any = AutoencoderKL(**self.config)
        self._decoder: Any = None
        self.train(False).requires_grad_(False)

    def init_weights(self) -> None:
        """Read the weights.

        Raises:
            FileNotFoundError: They are neither a folder nor to be had from the hub.
            ValueError: They are of another architecture; the first difference is named.
        """
        from diffusers import AutoencoderKL, ConsistencyDecoderVAE

        loaded = self._read(AutoencoderKL, self.pretrained)
        for key, ours in self.model.config.items():
            theirs = loaded.config.get(key)
            if _is_architecture(key) and _listed(theirs) != _listed(ours):
                raise ValueError(
                    f"the VAE in {self.pretrained} has {key}={_listed(theirs)}, the config of "
                    f"FrameVAE says {_listed(ours)}; set model.vae.config"
                )
        self.model.load_state_dict(loaded.state_dict())
        if self.consistency_decoder is not None:
            decoder = self._read(ConsistencyDecoderVAE, self.consistency_decoder)
            self._decoder = decoder.to(self.model.device).eval().requires_grad_(False)

    @staticmethod
    def _read(kind: Any, source: str) -> Any:
        try:
            return kind.from_pretrained(source, low_cpu_mem_usage=False)
        except (OSError, ValueError) as error:
            where = "" if Path(source).is_dir() else ", which is no folder here,"
            reason = " ".join(str(error).split())
            raise FileNotFoundError(
                f"no {kind.__name__} can be read from {source!r}{where} nor from the hub: {reason}"
            ) from error

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Frames, height and width of the latent.

        Args:
            size: Frames, height and width of the video.

        Returns:
            Of the latent.

        Raises:
            ValueError: The VAE's steps do not divide the height or width.
        """
        frames, height, width = size
        step = 2 ** (len(self.model.config.block_out_channels) - 1)
        if height % step or width % step:
            raise ValueError(f"size {height}x{width} is not divisible by {step}, as the VAE needs")
        return frames, height // step, width // step

    def identity(self) -> dict[str, Any]:
        """Where the weights come from, the architecture and the scale."""
        names = {key: _listed(value) for key, value in self.model.config.items()}
        return {
            **super().identity(),
            "pretrained": self.pretrained,
            "scale": self.scale,
            "config": {key: names[key] for key in sorted(names) if _is_architecture(key)},
        }

    def fingerprint(self) -> str:
        """A hash of the weights, without those of a consistency decoder."""
        return checksum(self.model.state_dict())

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent, frame by frame.

        Args:
            video: (B, 3, T, H, W) in [-1, 1].

        Returns:
            Each (B, c, T, h, w), float32 and scaled.
        """

        def parameters(frames: Tensor) -> Tensor:
            return self.model.encode(frames).latent_dist.parameters.float()

        mean, log_var = self._by_frames(parameters, video).chunk(2, dim=1)
        return mean * self.scale, (0.5 * log_var.clamp(-30, 20)).exp() * self.scale

    def encode(self, video: Tensor, draws: Draws | None = None) -> Tensor:
        """To the latent, frame by frame.

        Args:
            video: (B, 3, T, H, W) in [-1, 1].
            draws: The batch's random numbers; None takes the posterior's mean.

        Returns:
            (B, c, T, h, w), scaled.
        """
        return drawn(*self.moments(video), draws)

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, c, T, h, w) to videos (B, 3, T, H, W), frame by frame."""

        def pixels(z: Tensor) -> Tensor:
            if self._decoder is None:
                return self.model.decode(z).sample
            noise = [torch.Generator().manual_seed(0) for _ in z]  # the same for every frame
            return self._decoder.decode(z, generator=noise).sample

        return self._by_frames(pixels, latent / self.scale)


def _is_architecture(key: str) -> bool:
    return not key.startswith(("_", "sample_size", "scaling", "shift", "latents_", "force_upcast"))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

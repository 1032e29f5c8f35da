"""Small codecs of a cascade, trained on frames of moving digits."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmsora.datasets.moving_digits import MovingDigits
from mmsora.models.vaes.cascade_codec import IMAGENET_MEAN, IMAGENET_STD
from mmsora.models.vaes.cascade_networks import EfficientNetEncoder, Previewer, StageA

__all__ = ["COMPRESSOR", "PREVIEW_WIDTH", "STAGE_A", "Codecs", "train_codecs"]

STAGE_A = {"width": 32, "depth": 2, "channels": 4, "codes": 1}  # a quarter of the side
COMPRESSOR = {  # an eighth of it
    "parts": [[True, 1, 1, 16, 1], [True, 4, 2, 32, 1], [False, 4, 2, 64, 2]],
    "width": 128,
    "channels": 8,
}
PREVIEW_WIDTH = 64
BATCH = 64
FRAMES = 20_000  # of different clips


class Codecs(NamedTuple):
    """Files of the weights, and how well they do.

    Attributes:
        stage_a: File of stage A.
        scale: Standard deviation of its latents.
        encoder: File of the compressor's encoder.
        previewer: File of what decodes it.
        errors: Root mean square errors of stage A and of the previewer, pixels being from 0 to 1.
    """

    stage_a: str
    scale: float
    encoder: str
    previewer: str
    errors: tuple[float, float]


def train_codecs(folder: Path, steps: int, data: dict) -> Codecs:
    """Train stage A and the compressor, each as an autoencoder by its mean square error.

    Args:
        folder: Where their files go.
        steps: Of each training.
        data: Arguments of ``MovingDigits`` with one frame a clip.

    Returns:
        The codecs.
    """
    torch.manual_seed(0)
    frames = _frames(data)
    stage_a = StageA(**STAGE_A)
    compressor = nn.Sequential(
        EfficientNetEncoder(**COMPRESSOR),  # type: ignore[arg-type]
        Previewer(COMPRESSOR["channels"], PREVIEW_WIDTH),  # type: ignore[arg-type]
    )
    errors = (
        _train(stage_a, lambda x: stage_a.decode(stage_a.encode(x)), frames, steps),
        _train(compressor, lambda x: compressor(_normalised(x)), frames, steps),
    )
    with torch.no_grad():
        scale = stage_a.encode(next(_batches(frames, 1))).std().item()
    files = [str(folder / f"{name}.safetensors") for name in ("stage_a", "encoder", "previewer")]
    folder.mkdir(parents=True, exist_ok=True)
    for module, file in zip((stage_a, *compressor), files, strict=True):
        save_file(module.state_dict(), file)
    return Codecs(files[0], scale, files[1], files[2], errors)


def _frames(data: dict) -> Tensor:
    """One frame of each clip, (N, H, W) uint8."""
    clips = MovingDigits(**data | {"length": FRAMES})
    return torch.stack([torch.from_numpy(clips.clip(i)[0][0]) for i in range(FRAMES)])


def _batches(frames: Tensor, count: int) -> Iterator[Tensor]:
    """Random frames, (BATCH, 3, H, W) in [0, 1]."""
    for _ in range(count):
        chosen = frames[torch.randint(len(frames), (BATCH,))].float() / 255
        yield chosen[:, None].expand(-1, 3, -1, -1)


def _normalised(frames: Tensor) -> Tensor:
    """As ``CascadeCompressor`` does it."""
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (frames - mean) / std


def _train(
    module: nn.Module, rebuilt: Callable[[Tensor], Tensor], frames: Tensor, steps: int
) -> float:
    """Train, leave it in eval mode, and measure its root mean square error."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    for batch in _batches(frames, steps):
        loss = F.mse_loss(rebuilt(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    module.eval()
    with torch.no_grad():
        squares = [F.mse_loss(rebuilt(batch), batch) for batch in _batches(frames, 4)]
    return torch.stack(squares).mean().sqrt().item()

"""A small DINOv2 that knows the digits: what REPA aligns to where the real one is too large."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from mmsora.datasets.moving_digits import MovingDigits
from mmsora.models.alignments.dinov2 import DINOv2

__all__ = ["WIDTH", "train_encoder"]

WIDTH = 96
BATCH = 128


def train_encoder(folder: str | Path, steps: int = 1500, frame_size: int = 16) -> float:
    """Train a classifier of frames and write its encoder, in transformers' layout.

    Args:
        folder: To write.
        steps: Of training.
        frame_size: Height and width of a frame.

    Returns:
        How many of 1,000 held-out frames it reads right.
    """
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=4,
        image_size=frame_size, patch_size=4,
    )  # fmt: skip
    encoder = DINOv2(str(folder), width=WIDTH)
    encoder.model, head = Dinov2Model(config), nn.Linear(WIDTH, 10)
    grid = (frame_size // 4, frame_size // 4)

    def logits(images: torch.Tensor) -> torch.Tensor:
        return head(encoder(images, grid).mean(dim=(2, 3)))

    images, labels = _frames("train", 10_000, frame_size)
    weights = [*encoder.model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(logits(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encoder.model.eval().save_pretrained(folder)
    images, labels = _frames("test", 1000, frame_size)
    with torch.no_grad():
        return (logits(images).argmax(dim=1) == labels).double().mean().item()


def _frames(split: str, count: int, frame_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A frame of each clip, (N, 1, H, W) in [-1, 1], and its digit."""
    clips = MovingDigits(split, length=count, frame_size=frame_size)
    pairs = [clips.clip(i) for i in range(count)]
    frames = [torch.from_numpy(clip[i % len(clip)].copy()) for i, (clip, _) in enumerate(pairs)]
    labels = torch.tensor([label for _, label in pairs])
    return torch.stack(frames)[:, None].float() / 127.5 - 1, labels

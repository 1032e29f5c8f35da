"""The networks that are compared: ours, the textbook's and diffusers', of one size."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import textbook
from mmsora.registry import DENOISERS
from mmsora.utils.checkpoint import load_denoiser

__all__ = ["Case", "Side", "Sizes", "build_case"]

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
CLASSES = {"DiT": 1000, "Latte": 101}
BATCH = {("DiT", "cpu"): 2, ("Latte", "cpu"): 1, ("DiT", "cuda"): 64, ("Latte", "cuda"): 5}


class Sizes(NamedTuple):
    """What a network is made of and runs on."""

    depth: int  # 0 is the whole model
    batch: int  # 0 goes by network and device
    frames: int
    side: int
    device: str


class Side(NamedTuple):
    """A network and how it is run on the inputs."""

    model: nn.Module
    forward: Callable[[], Tensor]


class Case(NamedTuple):
    """Networks of one size: ``ours``, ``textbook`` and, of DiT, ``diffusers``."""

    name: str
    batch: int
    sides: dict[str, Side]
    difference: float  # greatest, between the outputs of ours and the textbook's


def build_case(name: str, sizes: Sizes) -> Case:
    """Build the networks, with the same weights.

    Args:
        name: As in the papers: ``DiT-S/2`` or ``Latte-XL/2``.
        sizes: Of what they run on.

    Returns:
        The networks.

    Raises:
        ValueError: There is no such network.
    """
    match = re.fullmatch(r"(DiT|Latte)-(S|B|L|XL)/([248])", name)
    if not match:
        raise ValueError(f"no network {name!r}; there are DiT and Latte, as DiT-S/2 or Latte-XL/4")
    family, size, patch = match[1], match[2], int(match[3])
    depth, width, heads = SIZES[size]
    shape: dict[str, Any] = {
        "patch": patch,
        "width": width,
        "depth": sizes.depth or depth,
        "heads": heads,
    }
    batch = sizes.batch or BATCH[family, sizes.device]
    torch.manual_seed(0)
    sides = _pair(family, shape, batch, sizes)
    with torch.no_grad():
        out, expected = sides["ours"].forward(), sides["textbook"].forward()
    expected = expected[:, :, None] if family == "DiT" else expected.transpose(1, 2)
    return Case(name, batch, sides, (out - expected).abs().max().item())


def _pair(family: str, shape: dict[str, Any], batch: int, sizes: Sizes) -> dict[str, Side]:
    """Each network takes inputs in its own order of axes."""
    frames, side, device, classes = sizes.frames, sizes.side, sizes.device, CLASSES[family]
    if family == "DiT":
        frames = 1
        theirs: nn.Module = textbook.DiT(side=side, classes=classes, **shape)
    else:
        theirs = textbook.Latte(frames=frames, side=side, classes=classes, **shape)
    size = (frames, side, side)
    config = {"type": family, "in_channels": 4, "out_channels": 8, "num_classes": classes}
    ours = DENOISERS.build(config | shape | {"size": size})
    load_denoiser(ours, theirs.state_dict())
    ours, theirs = ours.to(device), theirs.to(device)

    x = torch.randn(batch, 4, *size, device=device)
    plain = x[:, :, 0] if family == "DiT" else x.transpose(1, 2).contiguous()
    t = torch.linspace(1, 999, batch, device=device)
    y = torch.arange(batch, device=device)
    sides = {
        "ours": Side(ours, lambda: ours(x, t, y)),
        "textbook": Side(theirs, lambda: theirs(plain, t, y)),
    }
    if family == "DiT":
        third: Any = _diffusers(side, shape).to(device)
        forward = lambda: third(plain, timestep=t.long(), class_labels=y).sample  # noqa: E731
        sides["diffusers"] = Side(third, forward)
    return sides


def _diffusers(side: int, shape: dict[str, Any]) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    model: Any = DiTTransformer2DModel(
        num_attention_heads=shape["heads"],
        attention_head_dim=shape["width"] // shape["heads"],
        in_channels=4,
        out_channels=8,
        num_layers=shape["depth"],
        sample_size=side,
        patch_size=shape["patch"],
    )
    return model

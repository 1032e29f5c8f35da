"""The blocks that are found in a denoiser."""

from torch import nn

from mmsora.engine.blocks import blocks_of
from mmsora.models import DiT, ImageToVideo, Latte

SMALL = dict(in_channels=3, out_channels=5, size=(4, 6, 8), patch=2, width=24, depth=4, heads=3)


def names_of(module):
    found = blocks_of(module)
    assert all(module.get_submodule(name) is block for name, block in found)
    return [name for name, _ in found]


class Residual(nn.Module):
    """A block with a list of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.SiLU())])


class UNet(nn.Module):
    """Levels of lists, as in Stable Cascade, and a list of single layers."""

    def __init__(self):
        super().__init__()
        level = [nn.ModuleList([Residual(), nn.Conv2d(3, 3, 1), Residual()]) for _ in range(2)]
        self.down = nn.ModuleList(level)
        self.middle = Residual()
        self.up = nn.ModuleDict({"list": nn.ModuleList([Residual()])})
        self.clocks = nn.ModuleList([nn.Linear(3, 3)])


def test_those_of_a_transformer_are_its_blocks():
    assert names_of(DiT(**SMALL)) == [f"blocks.{i}" for i in range(4)]
    assert names_of(Latte(**SMALL, layout="joint")) == [f"blocks.{i}" for i in range(4)]


def test_temporal_layers_are_blocks_beside_those_of_the_images():
    image = dict(type="DiT", **SMALL | {"size": (1, 6, 8)})
    layout = "(b t) 1 n c"
    denoiser = ImageToVideo(image, {r"blocks\.[13]": 24}, layout, 4, layer=dict(heads=2))
    expected = [*(f"image.blocks.{i}" for i in range(4)), "temporal.0", "temporal.1"]
    assert names_of(denoiser) == expected


def test_lists_of_lists_are_gone_through_and_blocks_are_not():
    expected = ["down.0.0", "down.0.2", "down.1.0", "down.1.2", "middle.layers.0", "up.list.0"]
    assert names_of(UNet()) == expected


def test_a_network_without_lists_has_none():
    assert names_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []

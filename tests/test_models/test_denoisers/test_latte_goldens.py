"""Latte against numbers made with the authors' own code.

The small model has public names, weights that are functions of their names, and videos (B, F, C,
H, W); the figures were written down when the original was run.
"""

import re
import zlib

import numpy as np
import pytest
import torch

from mmsora.models.denoisers import Latte

INDICES = [0, 1, 3510, 8192, 12288, 16384, 24574, 24575]
UNCONDITIONAL = dict(
    mean=0.08575615317281897, std=1.061908670800869, norm=167.0145557028641,
    values=[-2.268086, 0.3632447, -0.6856552, -0.5323491, -1.630309, -2.709052, -0.1882104,
            1.282777],
)  # fmt: skip
CLASSES = dict(
    mean=0.09688057116582813, std=1.053340138934142, norm=165.8263065193048,
    values=[-2.219411, 0.1559993, -0.729251, -0.4356697, -1.470174, -2.56329, -0.0691615,
            1.186971],
)  # fmt: skip
# The original's `flash` mode forgot to transpose heads. Nobody should agree with it.
WRONG = [
    -2.267948,
    0.7032849,
    -0.6392904,
    -0.04497976,
    -1.885775,
    -2.439303,
    -0.1848107,
    0.8917177,
]

RENAMED = [
    (r"^embed\.", "x_embedder."),
    (r"^embed_clock\.fc1", "t_embedder.mlp.0"),
    (r"^embed_clock\.fc2", "t_embedder.mlp.2"),
    (r"^embed_label", "y_embedder.embedding_table"),
    (r"^head", "final_layer.linear"),
    (r"^ada\.linear", "final_layer.adaLN_modulation.1"),
    (r"ada\.linear", "adaLN_modulation.1"),
]


def public_name(name):
    for ours, theirs in RENAMED:
        name = re.sub(ours, theirs, name)
    return name


def splitmix64(z):
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def filled(name, shape, scale):
    """Numbers in (-scale, scale) that are a function of a name."""
    start = np.uint64(zlib.crc32(name.encode()) << 32)
    bits = splitmix64(start + np.arange(np.prod(shape), dtype=np.uint64))
    unit = (bits >> np.uint64(11)) / 2**53 * 2 - 1
    return torch.from_numpy(unit * scale).float().reshape(shape)


def public_weights(model):
    """Each parameter is filled in its public shape: the patch embedding was a convolution."""
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        fan_in = np.prod(shape[1:])
        scale = (3 / fan_in) ** 0.5 if len(shape) > 1 else 0.1
        parameter.data = filled(public_name(name), shape, scale)


def test_the_fill_is_the_published_one():
    first = [0.7645895420974334, 0.17385800957042408, 0.7017752206560286, 0.4005131513570628]
    assert filled("x", (4,), 1.0).tolist() == pytest.approx(first, abs=1e-7)


def test_names_are_the_public_ones():
    names = {public_name(name) for name in latte(10).state_dict()}
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    modules = [f"blocks.{i}.{layer}" for i in range(4) for layer in layers]
    modules += ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    modules += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    expected = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert names == expected | {"pos_embed", "temp_embed", "y_embedder.embedding_table.weight"}


def latte(num_classes):
    model = Latte(
        in_channels=4, out_channels=8, size=(6, 16, 16), patch=2, width=96, depth=4, heads=4,
        num_classes=num_classes,
    )  # fmt: skip
    public_weights(model)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("num_classes", "golden"), [(0, UNCONDITIONAL), (10, CLASSES)], ids=["none", "classes"]
)
def test_latte_gives_the_published_numbers(num_classes, golden):
    x = filled("xv", (2, 6, 4, 16, 16), 3**0.5).transpose(1, 2)
    label = {"label": torch.tensor([3, 10])} if num_classes else {}
    out = latte(num_classes)(x, torch.tensor([7.0, 543.0]), **label).transpose(1, 2)

    assert out.shape == (2, 6, 8, 16, 16)
    assert out.flatten()[INDICES].tolist() == pytest.approx(golden["values"], abs=2e-5)
    assert out.norm().item() == pytest.approx(golden["norm"], rel=1e-6)
    assert out.mean().item() == pytest.approx(golden["mean"], abs=1e-6)
    assert out.std(correction=0).item() == pytest.approx(golden["std"], rel=1e-5)
    assert abs(out.flatten()[INDICES] - torch.tensor(WRONG)).max() > 0.1

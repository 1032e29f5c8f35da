"""DINOv2 from a local folder: what it sees, what it says, and what is refused."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import Dinov2Model

from mmsora.models import DINOv2

PATCH, SIDE = 6, 5  # the table of positions is for 5 x 5 patches of 6 pixels


def encoder(dinov2_folder, size=None):
    made = DINOv2(str(dinov2_folder), width=24, size=size)
    assert not list(made.parameters())  # building read nothing
    made.init_weights()
    return made


def images(channels=3):
    return torch.rand(2, channels, 20, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def prepared(x, height, width):
    """As torchvision normalises for ImageNet, then resized."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return F.interpolate((x / 2 + 0.5 - mean) / std, (height, width), mode="bicubic")


@torch.no_grad()
def test_features_are_the_patch_tokens_of_transformers(dinov2_folder):
    """At the size of its own table, where nobody resizes anything."""
    ours, theirs = encoder(dinov2_folder), Dinov2Model.from_pretrained(dinov2_folder).eval()
    features = ours(images(), (SIDE, SIDE))
    expected = theirs(prepared(images(), 30, 30)).last_hidden_state[:, 1:].reshape(2, 5, 5, 24)
    torch.testing.assert_close(features.permute(0, 2, 3, 1), expected)
    torch.testing.assert_close(encoder(dinov2_folder, size=30)(images(), (3, 4)), features)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(3, 3), (4, 7), (8, 8), (5, 4)])
def test_positions_of_another_grid_are_resized_without_aliasing(dinov2_folder, grid):
    """As REPA does; transformers alone aliases where a table shrinks."""
    ours, theirs = encoder(dinov2_folder), Dinov2Model.from_pretrained(dinov2_folder).eval()
    rows, columns = grid
    table = theirs.embeddings.position_embeddings
    places = table[:, 1:].reshape(1, SIDE, SIDE, 24).permute(0, 3, 1, 2)
    places = F.interpolate(places, grid, mode="bicubic", antialias=True)
    places = torch.cat([table[:, :1], places.permute(0, 2, 3, 1).reshape(1, -1, 24)], dim=1)
    theirs.embeddings.interpolate_pos_encoding = lambda *args: places
    x = prepared(images(), rows * PATCH, columns * PATCH)
    expected = theirs(x).last_hidden_state[:, 1:].reshape(2, rows, columns, 24)
    torch.testing.assert_close(ours(images(), grid).permute(0, 2, 3, 1), expected)


@torch.no_grad()
def test_a_grey_image_is_an_image(dinov2_folder):
    grey = images(1)
    one = encoder(dinov2_folder)(grey, (3, 4))
    torch.testing.assert_close(one, encoder(dinov2_folder)(grey.expand(-1, 3, -1, -1), (3, 4)))


def test_it_is_frozen_and_stays_in_eval_mode(dinov2_folder):
    made = encoder(dinov2_folder).train()
    assert not made.training
    assert not any(module.training for module in made.modules())
    assert not any(weight.requires_grad for weight in made.parameters())
    assert all(weight.dtype == torch.float32 for weight in made.parameters())


def test_what_is_no_dinov2_is_refused(dinov2_folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no folder nowhere; .* set model.alignment.encoder.folder"
    ):
        DINOv2("nowhere").init_weights()
    with pytest.raises(FileNotFoundError, match="no DINOv2 can be read from .*model.safetensors"):
        DINOv2(str(tmp_path)).init_weights()
    with pytest.raises(ValueError, match="has width 24, the config says 768; set .*encoder.width"):
        DINOv2(str(dinov2_folder)).init_weights()


@pytest.mark.parametrize(("change", "message"), [
    ("lacks", "missing encoder.layer.1.mlp.fc1.bias"), ("more", "unknown embeddings.register"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_never_made_up(dinov2_folder, tmp_path, change, message):
    weights = load_file(dinov2_folder / "model.safetensors")
    if change == "lacks":
        del weights["encoder.layer.1.mlp.fc1.bias"]
    else:
        weights["embeddings.register_tokens"] = torch.zeros(1, 4, 24)
    weights["classifier.weight"] = torch.zeros(10, 24)  # of no use, and often there
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((dinov2_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=f"holds no DINOv2: {message}"):
        DINOv2(str(tmp_path), width=24).init_weights()


def test_without_transformers_it_says_so(dinov2_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="DINOv2 needs transformers: pip install transformers"):
        DINOv2(str(dinov2_folder), width=24).init_weights()

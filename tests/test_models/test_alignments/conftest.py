"""A tiny DINOv2 on the disk."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory):
    """A folder of random weights, 24 wide, for 5 x 5 patches of 6 pixels."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=30, patch_size=6,
        layerscale_value=0.5,
    )  # fmt: skip
    model = Dinov2Model(config)
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    path = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(path)
    return path

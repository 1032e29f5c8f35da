"""Pictures as a condition: CLIP's embedding from a local folder, dropped more often than told."""

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from mmsora.models import CLIPImage
from mmsora.registry import CONDITIONERS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError

WIDTH, SIDE = 10, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights, for images of 12 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip_image")
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIDE, patch_size=4, projection_dim=WIDTH,
    ))  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(folder):
    made = CLIPImage(str(folder), WIDTH)
    assert not list(made.parameters())  # building read nothing
    made.init_weights()
    return made


def videos(count=2, size=(24, 36)):
    return torch.rand(count, 3, 2, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_the_embedding_is_that_of_transformers_for_the_middle(clip, folder):
    theirs = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])

    def embedded(image):  # (12, 12, 3)
        pixels = ((image + 1) / 2 - mean) / std
        return theirs(pixel_values=pixels.permute(2, 0, 1)[None]).image_embeds[0]

    image = videos(size=(SIDE, 20))[0, :, 0]  # no need to resize
    torch.testing.assert_close(clip(image), embedded(image[:, :, 4:16].permute(1, 2, 0)))
    tall = image.transpose(1, 2).contiguous()
    torch.testing.assert_close(clip(tall), embedded(tall[:, 4:16].permute(1, 2, 0)))
    large = torch.rand(3, 47, 81, generator=torch.Generator().manual_seed(1)) * 2 - 1
    small = F.interpolate(large[None], (SIDE, 21), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(clip(large), embedded(small[:, :, 4:16].permute(1, 2, 0)))


def test_it_is_frozen_and_stays_in_eval_mode(clip):
    clip.train()
    assert not any(module.training for module in clip.modules())
    assert not any(weight.requires_grad for weight in clip.parameters())


def test_what_is_no_clip_of_images_is_refused(folder, tmp_path):
    for match, where, width in (
        ("there is no folder nowhere", "nowhere", WIDTH),
        ("projects images to 10 channels, the config says 768", folder, 768),
        ("no CLIPVisionModelWithProjection can be read from", tmp_path, WIDTH),
    ):
        with pytest.raises(UserError, match=match):
            CLIPImage(str(where), width).init_weights()


@pytest.fixture
def conditioner(folder):
    encoder = dict(type="CLIPImage", folder=str(folder), width=WIDTH)
    made = CONDITIONERS.build(dict(type="ImageConditioner", encoder=encoder))
    made.init_weights()
    return made


def test_a_picture_is_the_sample_s_own_or_the_first_frame_or_none(conditioner, clip):
    own = [VideoSample(index=i) for i in range(4)]
    own[0].image_embedding = torch.arange(float(WIDTH))
    own[1].image = videos(3)[2, :, 1]
    told = conditioner(own)["image"]
    assert not told.requires_grad
    assert torch.equal(told[0], own[0].image_embedding)
    torch.testing.assert_close(told[1], clip(videos(3)[2, :, 1]))
    assert torch.equal(told[2:], conditioner.null(2)["image"])
    assert conditioner.null(2)["image"].abs().max() == 0
    conditioner.look(videos(4), own)  # in training
    told = conditioner(own)["image"]
    assert torch.equal(told[0], own[0].image_embedding)
    torch.testing.assert_close(told[1], clip(videos(3)[2, :, 1]))
    torch.testing.assert_close(told[3], clip(videos(4)[3, :, 0]))


def test_most_pictures_are_dropped(conditioner):
    own = [VideoSample(index=i, image_embedding=torch.ones(WIDTH)) for i in range(2000)]
    kept = conditioner(own, Draws(0, range(2000)))["image"].mean(1)
    assert set(kept.tolist()) == {0.0, 1.0}
    assert kept.mean().item() == pytest.approx(0.1, abs=0.02)

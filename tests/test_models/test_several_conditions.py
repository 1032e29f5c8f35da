"""Several conditions at once, and latents as a condition."""

import pytest
import torch
from torch.nn import functional as F

from mmsora.models.conditioners.looking import lookers
from mmsora.models.vaes.vae import VAE
from mmsora.registry import CONDITIONERS, VAES
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError


class Pooled(VAE):
    """The mean of 4 x 4 pixels, and of the channels twice that."""

    def latent_size(self, size):
        return size[0], size[1] // 4, size[2] // 4

    def encode(self, video, draws=None):
        maps = F.avg_pool3d(video, (1, 4, 4))
        return torch.cat([maps, 2 * maps], 1)

    def decode(self, latent):
        return latent


@pytest.fixture(autouse=True)
def _pooled():
    VAES.register_module(module=Pooled, force=True)
    yield
    VAES.module_dict.pop("Pooled")


LABEL = dict(type="LabelConditioner", num_classes=5, drop_prob=0.3)
LATENT = dict(type="LatentConditioner", encoder=dict(type="Pooled"), channels=6, drop_prob=0.2)


def samples(count, **fields):
    return [VideoSample(index=i, label=i % 5, **fields) for i in range(count)]


def clips(count=2):
    return torch.randn(count, 3, 2, 8, 16, generator=torch.Generator().manual_seed(0))


def build(**changes):
    return CONDITIONERS.build(
        dict(type="SeveralConditioner", parts=dict(label=LABEL, latent=LATENT)) | changes
    )


def test_all_is_said_at_once():
    conditioner, told = build(), samples(2)
    (looker,) = lookers(conditioner)
    assert looker is conditioner.parts["latent"]
    looker.look(clips(), told)
    cond = conditioner(told)
    assert cond["label"].tolist() == [0, 1]
    assert torch.equal(cond["latent"], Pooled().encode(clips()))
    null = conditioner.null(3)
    assert null["label"].tolist() == [5, 5, 5]
    assert null["latent"].shape == (3, 6, 1, 1, 1)
    assert not null["latent"].any()
    assert (conditioner.num_classes, conditioner.takes_text) == (5, False)


@pytest.mark.parametrize("together", [0.0, 0.1])
def test_each_part_drops_its_own_and_all_go_together_now_and_then(together):
    conditioner, count = build(drop_prob=together), 4000
    told = samples(count, latent=torch.ones(6, 1, 2, 2))
    cond = conditioner(told, Draws(0, range(count)))
    no_label = cond["label"] == 5
    no_latent = ~cond["latent"].flatten(1).any(1)
    keep = 1 - together
    for found, expected in [
        (no_label, 1 - keep * 0.7),
        (no_latent, 1 - keep * 0.8),
        (no_label & no_latent, together + keep * 0.06),
    ]:
        assert found.float().mean().item() == pytest.approx(expected, abs=0.025)
    again = conditioner(told[7:9], Draws(0, [7, 8]))
    assert torch.equal(again["label"], cond["label"][7:9])


def test_two_that_say_the_same_are_refused():
    with pytest.raises(ValueError, match="two of the parts one, other say label"):
        build(parts=dict(one=LABEL, other=LABEL))(samples(2))


def test_building_reads_no_file_and_texts_are_those_of_the_part():
    encoder = dict(type="CLIPText", folder="nowhere")
    made = build(parts=dict(label=LABEL, text=dict(type="TextConditioner", encoder=encoder)))
    assert made.encoder is made.parts["text"].encoder
    made_by = made.encoder.identity()
    made.train_on_embeddings(made_by, {"": torch.zeros(77, 768), "a": torch.ones(77, 768)})
    cond = made(samples(2, text="a"))
    assert torch.equal(cond["text"], torch.ones(2, 77, 768))
    assert made.null(2)["text"].abs().max() == 0


def test_a_latent_that_is_known_is_not_made_again():
    conditioner = CONDITIONERS.build(LATENT)
    told = samples(2)
    told[1].latent = torch.full((6, 2, 2, 4), 7.0)
    conditioner.look(clips(), told)
    latent = conditioner(told)["latent"]
    assert torch.equal(latent[0], Pooled().encode(clips())[0])
    assert (latent[1] == 7).all()


def test_an_encoder_is_not_asked_where_all_is_known(monkeypatch):
    conditioner, told = CONDITIONERS.build(LATENT), samples(2, latent=torch.ones(6, 2, 2, 4))
    monkeypatch.setattr(conditioner.encoder, "encode", lambda video: pytest.fail("it was asked"))
    conditioner.look(clips(), told)
    assert (conditioner(told)["latent"] == 1).all()


def test_images_beside_a_clip_are_seen_and_dropped_one_by_one():
    conditioner = CONDITIONERS.build(LATENT | dict(drop_prob=0.5, smallest=0.5))
    videos = torch.randn(3, 3, 5, 8, 16, generator=torch.Generator().manual_seed(0))
    told, draws = samples(3, num_images=2), Draws(0, [7, 3, 5])
    conditioner.look(videos, told, draws)
    alone = samples(3)
    conditioner.look(videos[:, :, 3:4], alone, draws)
    assert [sample.latent.shape for sample in told] == [(6, 3, 2, 4)] * 3
    assert [sample.image_latents.shape for sample in told] == [(2, 6, 1, 2, 4)] * 3
    assert all(torch.equal(s.image_latents[0], a.latent) for s, a in zip(told, alone, strict=True))
    cond = conditioner(told)
    assert torch.equal(cond["latent"], torch.stack([sample.latent for sample in told]))
    assert torch.equal(
        cond["image_latent"], torch.stack([sample.image_latents for sample in told])
    )
    many = [told[0].clone() for _ in range(400)]
    kept = conditioner(many, Draws(1, range(400)))
    clip, images = (
        kept[k].flatten(first).any(-1) for k, first in (("latent", 1), ("image_latent", 2))
    )
    for dropped in (
        clip,
        images[:, 0],
        images[:, 1],
        images[:, 0] == clip,
        images[:, 0] == images[:, 1],
    ):
        assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_a_video_is_shrunk_in_training_alone():
    conditioner = CONDITIONERS.build(LATENT | dict(smallest=0.5))
    plain, small = samples(2), samples(2)
    conditioner.look(clips(), plain)
    assert torch.equal(plain[0].latent, Pooled().encode(clips())[0])
    draws = Draws(0, [0, 1])
    conditioner.look(clips(), small, draws)
    assert small[0].latent.shape == plain[0].latent.shape == (6, 2, 2, 4)
    assert not torch.allclose(small[0].latent, plain[0].latent)
    scale = 0.5 + 0.5 * draws.uniform("shrink")[1].item()
    height, width = round(8 * scale), round(16 * scale)
    frames = F.interpolate(
        clips()[1].transpose(0, 1), (height, width), mode="bilinear", antialias=True
    )
    maps = F.avg_pool2d(frames, 4)
    maps = F.interpolate(maps, (2, 4), mode="bilinear", align_corners=True).transpose(0, 1)
    torch.testing.assert_close(small[1].latent, torch.cat([maps, 2 * maps]))


def test_the_denoiser_may_call_it_something_else():
    conditioner = CONDITIONERS.build(LATENT | dict(name="effnet"))
    assert set(conditioner(samples(2, latent=torch.ones(6, 1, 2, 2)))) == {"effnet"}
    assert set(conditioner.null(2)) == {"effnet"}


def test_neither_pixels_nor_latents():
    with pytest.raises(UserError, match="neither pixels nor latents of the stage before"):
        CONDITIONERS.build(LATENT)(samples(2))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="smallest must be above 0 and at most 1"):
        CONDITIONERS.build(LATENT | dict(smallest=0))

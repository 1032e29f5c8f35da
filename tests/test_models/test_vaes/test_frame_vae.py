"""Diffusers' image VAE on the frames of a video. A tiny one is saved on the spot."""

import json
import time

import pytest
import torch
from diffusers import AutoencoderKL, ConsistencyDecoderVAE
from mmengine.registry import init_default_scope
from safetensors.torch import load_file

from mmsora.apis import build_model
from mmsora.models import FrameVAE, IdentityVAE, drawn
from mmsora.registry import MODELS, VAES
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.config_check import config_from_dict
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError

TINY = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    block_out_channels=[8, 16],
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
)
SCALE = 0.18215


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny VAE's folder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "tiny"
    AutoencoderKL(**TINY).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    return AutoencoderKL.from_pretrained(folder).eval()


def frame_vae(folder, **changes):
    vae = FrameVAE(str(folder), TINY, **changes)
    vae.init_weights()
    return vae


def clips():
    return torch.rand(2, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def latents():
    return torch.randn(2, 4, 5, 8, 12, generator=torch.Generator().manual_seed(0))


def by_hand(function, x):
    """One frame at a time."""
    each = [torch.cat([function(frame[None]) for frame in clip.unbind(1)]) for clip in x]
    return torch.stack(each).transpose(1, 2)


@torch.no_grad()
def test_it_is_diffusers_own_frame_by_frame(folder, reference):
    vae = frame_vae(folder)
    latent = vae.encode(clips())
    expected = by_hand(lambda frame: reference.encode(frame).latent_dist.mode(), clips())
    assert latent.shape == (2, 4, 5, 8, 12)
    torch.testing.assert_close(latent, SCALE * expected)
    video = vae.decode(latents())
    assert video.shape == (2, 3, 5, 16, 24)
    torch.testing.assert_close(
        video, by_hand(lambda frame: reference.decode(frame / SCALE).sample, latents())
    )


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_do_not_show(folder, chunk):
    vae, whole = frame_vae(folder, chunk=chunk), frame_vae(folder, chunk=10)
    sizes = []
    vae.model.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    vae.model.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    torch.testing.assert_close(vae.encode(clips()), whole.encode(clips()))
    assert sum(sizes) == 10
    assert max(sizes) == min(chunk, 10)
    torch.testing.assert_close(vae.decode(latents()), whole.decode(latents()))
    assert sum(sizes) == 20
    draws = Draws(0, [4, 9])
    torch.testing.assert_close(vae.encode(clips(), draws), whole.encode(clips(), draws))


@torch.no_grad()
def test_the_scale(folder):
    plain, scaled = frame_vae(folder, scale=1.0), frame_vae(folder, scale=4.0)
    for draws in (None, Draws(0, [1, 2])):
        one, other = (vae.encode(clips(), draws) for vae in (plain, scaled))
        torch.testing.assert_close(other, 4 * one)
    torch.testing.assert_close(scaled.decode(4 * latents()), plain.decode(latents()))


# The posterior


@torch.no_grad()
def test_the_posterior_is_that_of_diffusers(folder, reference):
    vae = frame_vae(folder, scale=1.0)
    draws = Draws(3, [4, 9], step=7)
    noise = draws.normal("posterior", latents())

    def drawn(frame):
        dist = reference.encode(frame).latent_dist
        return torch.cat([dist.mean, dist.std], dim=1)

    mean, std = by_hand(drawn, clips()).chunk(2, dim=1)
    assert std.min() > 0.01
    torch.testing.assert_close(vae.encode(clips(), draws), mean + std * noise)


@torch.no_grad()
def test_what_is_drawn_from_the_moments_is_what_encode_draws(folder):
    vae, draws = frame_vae(folder), Draws(3, [4, 9], step=7)
    mean, std = vae.moments(clips())
    assert torch.equal(drawn(mean, std, draws), vae.encode(clips(), draws))
    assert torch.equal(drawn(mean, std, None), vae.encode(clips()))
    assert torch.equal(drawn(mean, None, draws), mean)
    plain, none = IdentityVAE().moments(clips())
    assert none is None
    assert torch.equal(plain, clips())


def test_who_it_is(folder):
    vae, other = frame_vae(folder), frame_vae(folder, scale=0.5, chunk=3)
    assert vae.fingerprint() == other.fingerprint() != FrameVAE(str(folder), TINY).fingerprint()
    mine, theirs = vae.identity(), other.identity()
    assert {key for key in mine if mine[key] != theirs[key]} == {"scale"}
    assert json.loads(json.dumps(mine)) == mine
    assert mine["config"]["latent_channels"] == 4
    assert mine["pretrained"] == str(folder)


@torch.no_grad()
def test_the_posterior_is_drawn_by_seed_index_and_step_alone(folder):
    vae = frame_vae(folder)
    both = vae.encode(clips(), Draws(0, [4, 9], step=1))
    torch.manual_seed(99)  # torch's own generator plays no part
    assert torch.equal(vae.encode(clips(), Draws(0, [4, 9], step=1)), both)
    alone = vae.encode(clips()[1:], Draws(0, [9], step=1))
    torch.testing.assert_close(alone, both[1:])
    for other in Draws(1, [4, 9], 1), Draws(0, [5, 10], 1), Draws(0, [4, 9], 2):
        difference = (vae.encode(clips(), other) - both).abs()
        assert (difference.amax((1, 2, 3, 4)) > 0.01).all()
    frames = (both - vae.encode(clips())).unbind(2)
    assert all((one - frames[0]).abs().max() > 0.01 for one in frames[1:])  # each has its own


@torch.no_grad()
def test_under_autocast_the_latent_is_float32(folder):
    """Where noise is added, and variances are differences of nearly equal numbers."""
    vae = frame_vae(folder)
    exact = vae.encode(clips(), Draws(0, [4, 9]))
    with torch.autocast("cpu", torch.bfloat16):
        latent = vae.encode(clips(), Draws(0, [4, 9]))
    assert latent.dtype == torch.float32
    assert 0 < (latent - exact).abs().max() < 0.05 * exact.abs().max()


# In a model


def model_config(vae):
    sizes = dict(in_channels=4, out_channels=8, size=(5, 8, 12), patch=2, width=16, depth=2)
    return dict(
        type="LatentDiffusion",
        denoiser=dict(type="Latte", **sizes, heads=2),
        vae=vae,
        diffusion=dict(
            type="Diffusion",
            path=dict(type="DiscretePath"),
            prediction=dict(type="LearnedRange", mean=dict(type="NoisePrediction")),
            train_times=dict(type="UniformTimes"),
            solver=dict(type="Ancestral"),
            grid=dict(type="SpacedGrid", num_steps=2),
            guidance=dict(type="ClassifierFree", scale=1.0),
            loss=dict(type="Hybrid"),
        ),
    )


@pytest.fixture
def model(folder):
    init_default_scope("mmsora")
    return MODELS.build(model_config(dict(type="FrameVAE", pretrained=str(folder), config=TINY)))


def test_it_is_frozen_stays_in_eval_and_out_of_the_checkpoint(model, folder):
    model.init_weights()
    model.train()
    assert model.denoiser.training
    assert not any(module.training for module in model.vae.modules())
    samples = [VideoSample(index=4), VideoSample(index=9)]
    before = {key: value.clone() for key, value in model.vae.state_dict().items()}
    loss = model.loss(clips(), samples, Draws(0, [4, 9]))["loss_diffusion"]
    loss.sum().backward()
    assert not any(weight.requires_grad for weight in model.vae.parameters())
    assert all(weight.grad is None for weight in model.vae.parameters())
    assert model.denoiser.head.weight.grad.any()
    assert all(torch.equal(value, before[key]) for key, value in model.vae.state_dict().items())
    assert not [key for key in model.state_dict() if "vae" in key]
    assert not [key for key in model.state_dict(prefix="module.") if "vae" in key]
    assert {key.split(".")[0] for key in model.state_dict()} >= {"denoiser"}
    assert not any(weight.requires_grad for weight in frame_vae(folder).parameters())


@torch.no_grad()
def test_the_model_draws_the_posterior_and_decodes_what_it_samples(model):
    model.init_weights()
    samples = [VideoSample(index=4), VideoSample(index=9)]
    seen = []
    model.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for draws in Draws(0, [4, 9]), Draws(0, [4, 9]), Draws(0, [4, 9], 1):
        model.loss(clips(), samples, draws)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert model.predict(samples).shape == (2, 3, 5, 16, 24)


def test_loss_in_bfloat16_is_that_of_float32(model):
    model.init_weights()
    samples = [VideoSample(index=4), VideoSample(index=9)]
    exact = model.loss(clips(), samples, Draws(0, [4, 9]))["loss_diffusion"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(clips(), samples, Draws(0, [4, 9]))["loss_diffusion"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


# Building and reading


def test_building_reads_nothing_and_weights_arrive_in_init_weights(folder, reference):
    vae = VAES.build(dict(type="FrameVAE", pretrained="no/such-vae", config=TINY))
    weight = next(vae.parameters()).clone()
    vae.pretrained = str(folder)
    vae.init_weights()
    assert not torch.equal(next(vae.parameters()), weight)
    assert all(
        torch.equal(value, reference.state_dict()[key])
        for key, value in vae.model.state_dict().items()
    )


def test_by_default_it_is_that_of_stable_diffusion_on_meta():
    with torch.device("meta"):
        vae = FrameVAE("no/such-vae")
        video = torch.empty(2, 3, 3, 64, 96)
    assert sum(weight.numel() for weight in vae.parameters()) == 83_653_863
    latent = vae.encode(video, Draws(0, [4, 9]))
    assert (latent.device.type, latent.shape) == ("meta", (2, 4, 3, 8, 12))
    assert vae.decode(latent).shape == video.shape
    assert vae.latent_size((3, 64, 96)) == (3, 8, 12)


def test_latent_size(folder):
    vae = frame_vae(folder)
    assert vae.latent_size((5, 16, 24)) == vae.encode(clips()).shape[2:]
    with pytest.raises(ValueError, match="size 15x24 is not divisible by 2"):
        vae.latent_size((5, 15, 24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block_out_channels=[8, 8]), r"block_out_channels=\[8, 16\], .* says \[8, 8\]"),
        (dict(layers_per_block=2), "layers_per_block=1, the config of FrameVAE says 2"),
        (dict(norm_num_groups=2), "norm_num_groups=4, the config of FrameVAE says 2"),
        (dict(act_fn="relu"), "act_fn=silu, the config of FrameVAE says relu"),
    ],
)
def test_another_architecture_is_refused_by_name(folder, change, message):
    vae = FrameVAE(str(folder), TINY | change)
    with pytest.raises(ValueError, match=f"the VAE in {folder} has {message}"):
        vae.init_weights()


def test_what_the_config_does_not_say_is_refused_too(folder, tmp_path):
    """The folder departs from a default that nobody wrote down."""
    AutoencoderKL(**TINY, mid_block_add_attention=False).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has mid_block_add_attention=False, .* says True"):
        frame_vae(tmp_path / "other")


def test_size_and_scale_of_training_are_no_architecture(tmp_path):
    options = dict(sample_size=99, scaling_factor=0.5, force_upcast=False)
    AutoencoderKL(**TINY, **options).save_pretrained(tmp_path / "other")
    frame_vae(tmp_path / "other")


@pytest.mark.parametrize("source", ["no/such-vae", "no-such-vae", "./no/such/vae"])
def test_missing_weights_are_one_clear_error_at_once(source):
    start = time.perf_counter()
    vae = FrameVAE(source, TINY)
    message = f"no AutoencoderKL can be read from '{source}', which is no folder here, nor"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        vae.init_weights()
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5


def test_a_folder_of_something_else_is_one_clear_error(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"read from '.*empty' nor from the hub: "):
        frame_vae(tmp_path / "empty")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(FileNotFoundError, match=r"read from '.*broken' nor from the hub: "):
        frame_vae(broken)


def test_missing_weights_are_an_error_of_the_user():
    vae = dict(type="FrameVAE", pretrained="no/such-vae", config=TINY)
    init_default_scope("mmsora")
    cfg = config_from_dict(dict(default_scope="mmsora", model=model_config(vae)))
    with pytest.raises(UserError, match="no AutoencoderKL can be read from 'no/such-vae'"):
        build_model(cfg)


# The consistency decoder


@pytest.fixture(scope="module")
def consistency_folder(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("vae") / "consistency"
    ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8),
        encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_layers_per_block=1,
        encoder_norm_num_groups=4,
        decoder_block_out_channels=(8, 8),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
        decoder_layers_per_block=1,
        decoder_norm_num_groups=4,
    ).save_pretrained(path)
    return path


@torch.no_grad()
def test_a_consistency_decoder_decodes_instead(folder, consistency_folder):
    vae = frame_vae(folder, consistency_decoder=str(consistency_folder), chunk=3)
    vae.train()
    torch.testing.assert_close(vae.encode(clips()), frame_vae(folder).encode(clips()))
    video = vae.decode(latents())
    decoder = ConsistencyDecoderVAE.from_pretrained(consistency_folder).eval()

    def decoded(frame):
        return decoder.decode(frame / SCALE, generator=torch.Generator().manual_seed(0)).sample

    expected = by_hand(decoded, latents())
    assert video.shape == (2, 3, 5, 16, 24)
    torch.testing.assert_close(video, expected, rtol=1e-4, atol=1e-4)
    assert (video - frame_vae(folder).decode(latents())).abs().max() > 0.1
    torch.manual_seed(99)  # torch's own generator plays no part
    assert torch.equal(vae.decode(latents()), video)
    assert not any(module.training for module in vae.modules())
    assert not any(weight.requires_grad for weight in vae.parameters())


def test_a_missing_consistency_decoder_is_named(folder):
    with pytest.raises(FileNotFoundError, match="no ConsistencyDecoderVAE can be read from 'no"):
        frame_vae(folder, consistency_decoder="no/such-decoder")


def test_the_folder_is_as_diffusers_writes_it(folder):
    """What the tests above read is what users have."""
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == FrameVAE(str(folder), TINY).model.state_dict().keys()

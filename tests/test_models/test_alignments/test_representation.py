"""REPA's loss against a plain reference, for images and videos, inside any transformer."""

import pytest
import torch
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn import functional as F

from mmsora.engine import ActivationCheckpointing
from mmsora.models import DINOv2, ImageEncoder, RepresentationAlignment
from mmsora.models.layers.transformer import time_table
from mmsora.registry import MODELS, RUNNERS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.checkpoint import load_checkpoint, load_denoiser
from mmsora.utils.config_check import check_config
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError


class Corners(ImageEncoder):
    """Means of the parts of an image, and their squares: features of any grid, or of its own."""

    def __init__(self, width=6, own=None, folder=None):
        super().__init__(width)
        self.own, self.folder, self.calls = own, folder, 0
        self.mix = nn.Linear(6, width)

    def init_weights(self):
        with torch.no_grad():
            self.mix.weight.copy_(torch.linspace(-1, 1, self.mix.weight.numel()).view(-1, 6).cos())

    def forward(self, images, grid):
        self.calls += 1
        parts = F.adaptive_avg_pool2d(images.expand(-1, 3, -1, -1), self.own or grid)
        mixed = self.mix(torch.cat([parts, parts**2], dim=1).movedim(1, -1))
        return mixed.movedim(-1, 1)


def alignment(own=None, **changes):
    torch.manual_seed(0)
    encoder = dict(type=Corners, own=own)
    made = RepresentationAlignment(**dict(encoder=encoder, width=24, projector_width=10) | changes)
    made.init_weights()
    return made


def video(channels=3, frames=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, channels, frames, 8, 20, generator=generator) * 2 - 1


def tokens(frames=3, count=10):
    return torch.randn(2, frames, count, 24, generator=torch.Generator().manual_seed(2))


def test_the_loss_is_the_mean_cosine():
    """Sample by sample, frame by frame, token by token."""
    made, clip, states = alignment(weight=0.7), video(), tokens()
    loss = made(states, clip, (3, 2, 5))
    assert loss.shape == (2,)
    for b in range(2):
        total = 0.0
        for t in range(3):
            features = made.encoder(clip[b : b + 1, :, t], (2, 5))[0]
            for n in range(10):
                hidden = states[b, t, n]
                for layer in made.projector:
                    hidden = layer(hidden)
                wanted = features[:, n // 5, n % 5]
                total += (hidden @ wanted / hidden.norm() / wanted.norm()).item()
        assert loss[b].item() == pytest.approx(-0.7 * total / 30, rel=1e-5)


@pytest.mark.parametrize("frames", [3, 6])
def test_features_of_another_grid_are_resized_linearly(frames):
    """A linear function of place stays one; of six frames each token of three has two."""

    class Places(Corners):
        def forward(self, images, grid):
            down, across = torch.meshgrid(
                (torch.arange(4) + 0.5) / 4, (torch.arange(20) + 0.5) / 20, indexing="ij"
            )
            along = images.mean((1, 2, 3))
            made = [field.expand(len(images), 4, 20) for field in (down, across)]
            return torch.stack([*made, along[:, None, None].expand(-1, 4, 20)], dim=1)

    made = alignment(encoder=dict(type=Places, width=3))
    times = (torch.arange(frames) + 0.5) / frames
    clip = times.reshape(1, 1, frames, 1, 1).expand(2, 3, frames, 8, 20)
    features = made.features(clip, (3, 2, 5)).reshape(2, 3, 2, 5, 3)
    down, across, along = features[0].unbind(-1)
    torch.testing.assert_close(down[0, :, 0], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(across[0, 0], (torch.arange(5) + 0.5) / 5)
    torch.testing.assert_close(along[:, 0, 0], (torch.arange(3) + 0.5) / 3)


def test_the_projector_is_the_papers():
    made = RepresentationAlignment(dict(type=DINOv2, folder="nowhere"), 1152)
    kinds = [type(layer).__name__ for layer in made.projector]
    assert kinds == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    assert [layer.weight.shape for layer in made.projector[::2]] == [
        (2048, 1152), (2048, 2048), (768, 2048),
    ]  # fmt: skip
    assert not any(layer.bias.any() for layer in made.projector[::2])
    bound = (6 / (1152 + 2048)) ** 0.5  # Xavier's
    assert made.projector[0].weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert (made.block, made.weight) == (8, 0.5)


def test_the_encoder_does_not_learn_and_the_cosine_is_exact():
    made, states = alignment(), tokens().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = made(states, video(), (3, 2, 5))
    assert loss.dtype == torch.float32
    loss.mean().backward()
    assert states.grad.abs().max() > 0
    assert all(weight.grad.abs().max() > 0 for weight in made.projector.parameters())
    assert not any(weight.requires_grad for weight in made.encoder.parameters())


def test_latents_of_a_cache_are_no_pixels():
    with pytest.raises(ValueError, match="needs the clean video's pixels, .* got 4: latents from"):
        alignment()(tokens(), video(4), (3, 2, 5))


# Inside a model


def model(kind="DiT", block=2, **changes):
    init_default_scope("mmsora")
    torch.manual_seed(0)
    frames = 3 if kind == "Latte" else 1
    config = dict(
        type="LatentDiffusion",
        denoiser=dict(
            type=kind, in_channels=3, out_channels=3, size=(frames, 8, 20), patch=(1, 4, 4),
            width=24, depth=4, heads=3,
        ),
        diffusion=dict(
            type="Diffusion", path=dict(type="LinearPath"),
            prediction=dict(type="VelocityPrediction"), train_times=dict(type="UniformTimes"),
            solver=dict(type="Euler"), grid=dict(type="SpacedGrid", num_steps=2),
            guidance=dict(type="ClassifierFree", scale=1.0), loss=dict(type="MSE"),
        ),
        vae=dict(type="IdentityVAE"),
        alignment=dict(
            type=RepresentationAlignment, encoder=dict(type=Corners), block=block,
            projector_width=10,
        ),
    )  # fmt: skip
    made = MODELS.build(config | changes)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weight in made.denoiser.parameters():
            scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1
            weight.normal_(0, scale, generator=generator)
    if made.alignment is not None:
        made.init_weights()
    return made


def losses(made, clip):
    samples = [VideoSample(index=i) for i in range(len(clip))]
    return made.loss(clip, samples, Draws(0, range(len(clip)), 3))


def hidden_states(made, clip, block):
    """What goes into the next block, or into the last norm."""
    denoiser, kept = made.denoiser, []
    following = [*denoiser.blocks, denoiser.norm][block]
    hook = following.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    losses(made, clip)
    hook.remove()
    states = kept[0]
    if block == getattr(denoiser, "_first_temporal", 0):  # Latte has told frames apart by then
        states = states - time_table(denoiser.temp_embed, states.shape[1])
    return states


@pytest.mark.parametrize("kind", ["DiT", "Latte"])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_tokens_come_from_after_the_block(kind, block):
    """Of Latte after spatial and temporal blocks alike, in the order of the encoder's frames."""
    made, clip = model(kind, block), video(frames=3 if kind == "Latte" else 1)
    found = losses(made, clip)
    assert {key: value.shape for key, value in found.items()} == {
        "loss_diffusion": (2,), "loss_alignment": (2,),
    }  # fmt: skip
    states = hidden_states(made, clip, block)
    grid = (clip.shape[2], 2, 5)
    torch.testing.assert_close(found["loss_alignment"], made.alignment(states, clip, grid))
    without = model(kind, block, alignment=None)
    assert set(losses(without, clip)) == {"loss_diffusion"}
    torch.testing.assert_close(losses(without, clip)["loss_diffusion"], found["loss_diffusion"])


@pytest.mark.parametrize("kind", ["DiT", "Latte"])
def test_a_loss_does_not_depend_on_the_batch(kind):
    made, clip = model(kind), video(frames=3 if kind == "Latte" else 1)
    both = losses(made, clip)["loss_alignment"]
    torch.testing.assert_close(losses(made, clip[:1])["loss_alignment"], both[:1])


def gradients(made, clip):
    made.zero_grad()
    sum(loss.mean() for loss in losses(made, clip).values()).backward()
    return {key: weight.grad for key, weight in made.named_parameters() if weight.requires_grad}


def test_blocks_up_to_it_learn_from_it():
    made, clip = model(block=2), video(frames=1)
    losses(made, clip)["loss_alignment"].mean().backward()
    moved = {key for key, weight in made.denoiser.named_parameters() if weight.grad is not None}
    assert {key.split(".")[1] for key in moved if key.startswith("blocks.")} == {"0", "1"}
    assert "head.weight" not in moved
    assert all(weight.grad is not None for weight in made.alignment.projector.parameters())


@pytest.mark.parametrize("kind", ["DiT", "Latte"])
def test_recomputed_activations_give_the_same_gradients(kind):
    clip = video(frames=3 if kind == "Latte" else 1)
    expected = gradients(model(kind), clip)
    made = model(kind)
    ActivationCheckpointing("full").apply(made.denoiser)
    found = gradients(made, clip)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=key)
    assert made.alignment.encoder.calls == 1


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_denoiser_is_listened_to(whole):
    made, clip = model(), video(frames=1)
    expected = losses(made, clip)
    parts = [made.denoiser] if whole else made.denoiser.blocks
    for part in parts:
        part.compile(backend="eager")
    for _ in range(2):
        made.predict([VideoSample(index=0), VideoSample(index=1)])
        found = losses(made, clip)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@torch.no_grad()
def test_sampling_knows_nothing_of_it():
    made = model()
    samples = [VideoSample(index=i) for i in range(2)]
    sample = made.predict(samples)
    assert made.alignment.encoder.calls == 0
    assert torch.equal(model(alignment=None).predict(samples), sample)
    assert not made.denoiser.blocks[1]._forward_hooks


def test_the_encoder_is_neither_trained_nor_saved():
    made = model().train()
    assert not made.alignment.encoder.training
    keys = made.state_dict()
    assert not [key for key in keys if "encoder" in key]
    assert "alignment.projector.4.weight" in keys
    learned = [key for key, weight in made.named_parameters() if weight.requires_grad]
    assert not [key for key in learned if "encoder" in key]
    assert "alignment.projector.0.weight" in learned


def test_only_training_reads_the_encoder():
    encoder = dict(type=DINOv2, folder="nowhere")
    made = model(block=2, alignment=None)
    made.alignment = RepresentationAlignment(encoder, 24, 2)
    made.init_weights(to_train=False)
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        made.init_weights()


def test_a_run_logs_it_saves_its_projector_and_starts_another(tiny_config, scalars, dinov2_folder):
    """Of Latte with grey videos."""
    encoder = dict(type="DINOv2", folder=str(dinov2_folder), width=24)
    config = dict(encoder=encoder, block=1, projector_width=5)
    cfg = tiny_config({"model.alignment": dict(type="RepresentationAlignment", **config)})
    check_config(cfg)
    runner = RUNNERS.build(cfg)
    start = runner.model.alignment.projector[0].weight.detach().clone()
    runner.train()
    rows = [row for row in scalars(cfg.work_dir) if "loss_alignment" in row]
    assert len(rows) == 6
    for row in rows:
        total = row["loss_diffusion"] + row["loss_alignment"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)
    trained = runner.model.alignment.projector
    assert (trained[0].weight - start).abs().max() > 1e-3
    content = load_checkpoint(f"{cfg.work_dir}/iter_6")
    assert not [key for key in content["ema"] if "projector" in key]
    other = MODELS.build(cfg.model)
    report = load_denoiser(other.denoiser, content, projector=other.alignment.projector)
    assert report == ([], [], [])
    state = trained.state_dict()
    assert all(torch.equal(value, state[key])
               for key, value in other.alignment.projector.state_dict().items())  # fmt: skip


@pytest.mark.parametrize(("key", "message"), [
    ("blok", "RepresentationAlignment.*blok.*did you mean 'block'"),
    ("width", "RepresentationAlignment.*width"),  # the denoiser's, which gives it
    ("encoder.widht", "Corners.*widht.*did you mean 'width'"),
])  # fmt: skip
def test_typos_are_named(tiny_config, key, message):
    config = dict(type=RepresentationAlignment, encoder=dict(type=Corners))
    place = config["encoder"] if "." in key else config
    place[key.split(".")[-1]] = 5
    with pytest.raises(UserError, match=message):
        check_config(tiny_config({"model.alignment": config}))


def test_what_cannot_be_aligned_is_refused():
    with pytest.raises(ValueError, match="block must be 1 to 4, the blocks of the DiT; got 5"):
        model(block=5)
    with pytest.raises(ValueError, match="block must be 1 to 4, the blocks of the DiT; got 0"):
        model(block=0)

    class NoTransformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    with pytest.raises(ValueError, match="needs a transformer as denoiser, .* NoTransformer has"):
        model(denoiser=dict(type=NoTransformer))

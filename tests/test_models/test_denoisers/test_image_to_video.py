"""Temporal layers in a denoiser of images."""

import copy
import logging
import re

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch.nn import functional as F

from mmsora.models.denoisers import image_to_video
from mmsora.models.layers.temporal import TemporalLayer
from mmsora.registry import DENOISERS
from mmsora.utils.checkpoint import load_denoiser
from mmsora.utils.config_names import load_config
from mmsora.utils.user_error import UserError

DIT = dict(
    type="DiT", in_channels=3, out_channels=6, size=(1, 4, 6), patch=2, width=16, depth=4, heads=2,
    num_classes=7,
)  # fmt: skip
LAYERS = {
    "zero": dict(heads=2, kernel=3),
    "blend": dict(heads=2, kernel=3, blend=True),
    "attention": dict(heads=4, kernel=0),
    "convolution": dict(heads=0, kernel=5),
}
CLOCK, LABEL = torch.tensor([3.0, 700.5]), torch.tensor([6, 2])
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


class Maps(torch.nn.Module):
    """A denoiser of images on maps (B, C, H, W), with dropout and a condition of each frame."""

    in_channels, num_tokens, size = 3, 12, (1, 4, 6)

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GELU(), torch.nn.Dropout(0.5)
        )
        self.out = torch.nn.Conv2d(8, 3, 1)

    def forward(self, x, clock, effnet, text):
        told = (
            clock[:, None, None, None].sin()
            + effnet[:, :, 0]
            + text.sum((1, 2))[..., None, None, None]
        )
        return self.out(self.inner(x[:, :, 0] + told)).unsqueeze(2)


def filled(model):
    """Zero nowhere in the image denoiser; the temporal layers as they were initialised."""
    torch.manual_seed(0)
    for parameter in model.image.parameters():
        fan_in = parameter.shape[1] if parameter.ndim > 1 else 4
        torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    return model


def trained(model):
    """Temporal layers as training could leave them."""
    torch.manual_seed(1)
    for parameter in model.temporal.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def video_dit(layer=LAYERS["zero"], **changes):
    torch.manual_seed(2)
    options = dict(image=DIT, after={r"blocks\.\d*[13]": 16}, layout="(b t) 1 n c", frames=5)
    return filled(DENOISERS.build(dict(type="ImageToVideo", layer=layer, **options | changes)))


def clips(frames=5, height=4, width=6):
    return torch.randn(2, 3, frames, height, width, generator=torch.Generator().manual_seed(3))


def folded(model, x, **cond):
    """The image denoiser on all frames as one batch."""
    frames = x.shape[2]
    told = {name: value.repeat_interleave(frames, 0) for name, value in cond.items()}
    images = x.transpose(1, 2).reshape(-1, 3, 1, *x.shape[3:])
    out = model.image(images, CLOCK.repeat_interleave(frames, 0), **told)
    return out.reshape(2, frames, -1, *x.shape[3:]).transpose(1, 2)


@torch.no_grad()
@each_layer
def test_at_initialisation_each_frame_is_the_image_models(layer):
    model, x = video_dit(layer), clips()
    out = model(x, CLOCK, label=LABEL)
    assert out.std() > 0.1
    assert torch.equal(out, folded(model, x, label=LABEL))
    one_by_one = [model.image(x[:, :, i : i + 1], CLOCK, LABEL) for i in range(5)]
    torch.testing.assert_close(
        out, torch.cat(one_by_one, 2), rtol=0, atol=1e-5 * out.abs().max().item()
    )
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(model(x[:, :, order], CLOCK, label=LABEL), out[:, :, order])


@torch.no_grad()
@each_layer
def test_trained_layers_mix_the_frames_of_a_clip_and_nothing_else(layer):
    model, x = trained(video_dit(layer)), clips()
    out = model(x, CLOCK, label=LABEL)
    assert (out - folded(model, x, label=LABEL)).abs().max() > 0.1
    changed = x.clone()
    changed[0, :, 2] += 1
    moved = (model(changed, CLOCK, label=LABEL) - out).abs().amax((1, 3, 4))
    assert (moved[0] > 0).sum() >= 3  # a kernel reaches two frames or all
    assert not moved[1].any()
    order = torch.tensor([3, 0, 4, 1, 2])  # frames have codes
    assert not torch.allclose(model(x[:, :, order], CLOCK, label=LABEL), out[:, :, order])


@torch.no_grad()
@each_layer
def test_one_frame_is_the_image_models_after_training_too(layer):
    model, x = trained(video_dit(layer)), clips(frames=1)
    assert torch.equal(model(x, CLOCK, label=LABEL), model.image(x, CLOCK, LABEL))


@torch.no_grad()
def test_images_beside_a_clip_pass_by_the_temporal_layers():
    model, x = trained(video_dit()), clips(frames=5)
    of_images = torch.tensor([[0, 5], [1, 3]])
    out = model(x, CLOCK, label=LABEL, num_images=2, image_label=of_images)
    clip = model(x[:, :, :3], CLOCK, label=LABEL)
    torch.testing.assert_close(out[:, :, :3], clip, rtol=0, atol=1e-5)
    for i in range(2):
        image = model.image(x[:, :, 3 + i : 4 + i], CLOCK, of_images[:, i])
        torch.testing.assert_close(out[:, :, 3 + i : 4 + i], image, rtol=0, atol=1e-5)


@torch.no_grad()
def test_any_size_and_number_of_frames():
    model, x = trained(video_dit()), clips(frames=9, height=8, width=10)
    assert model(x, CLOCK, label=LABEL).shape == (2, 6, 9, 8, 10)


@each_layer
def test_at_first_only_what_starts_at_zero_has_a_gradient(layer):
    model = video_dit(layer)
    assert not any(p.requires_grad for p in model.image.parameters())
    model(clips(), CLOCK, label=LABEL).square().mean().backward()
    zeros = ("alpha",) if layer.get("blend") else ("proj.weight", "proj.bias")
    for name, parameter in model.temporal.named_parameters():
        assert parameter.grad.any() == name.endswith(zeros), name


def test_frozen_image_weights_stay_and_stay_in_eval():
    model = video_dit()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        assert not model.train().image.training
        assert model.temporal.training
        optimizer.zero_grad()
        (model(clips(), CLOCK, label=LABEL) - 1).square().mean().backward()
        optimizer.step()
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) == name.startswith("image."), name
    with torch.no_grad():
        x = clips(frames=1)
        assert torch.equal(model(x, CLOCK, label=LABEL), model.image(x, CLOCK, LABEL))


def test_image_weights_are_trained_where_that_is_asked_for():
    model = video_dit(train_image=True).train()
    assert model.image.training
    model(clips(), CLOCK, label=LABEL).square().mean().backward()
    assert all(p.grad is not None for p in model.image.parameters())


def test_image_weights_are_trained_at_the_config_s_lower_rate():
    cfg = load_config("dit_xl2_temporal_ucf101_256")
    assert cfg.model.denoiser.train_image
    init_default_scope("mmsora")
    model = torch.nn.ModuleDict({"denoiser": video_dit(train_image=True)})
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups:
        found |= {names[parameter]: group["lr"] for parameter in group["params"]}
    assert found.keys() == set(names.values())
    for name, rate in found.items():
        is_image = name.startswith("denoiser.image.") and "embed_label" not in name
        assert rate == pytest.approx(1e-5 if is_image else 1e-4), name


@torch.no_grad()
def test_codes_alone_tell_the_frames_of_a_clip_apart():
    """Attention has no order of its own."""
    model, x = trained(video_dit(LAYERS["attention"])), clips()
    order = torch.tensor([3, 0, 4, 1, 2])
    out = model(x, CLOCK, label=LABEL)[:, :, order]
    moved = model(x[:, :, order], CLOCK, label=LABEL)
    assert (moved - out).abs().amax((1, 2, 3, 4)).min() > 1e-2 * out.abs().max()


def test_a_batch_of_images_gives_every_parameter_a_gradient():
    model = trained(video_dit()).train()
    model(clips(frames=1), CLOCK, label=LABEL).square().mean().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.temporal.parameters())


def test_single_frames_that_teach_nothing_are_told_once(monkeypatch):
    told = []
    monkeypatch.setattr(image_to_video, "print_log", lambda *line: told.append(line))
    model, image = video_dit(), clips(frames=1)
    model.eval()(image, CLOCK, label=LABEL)
    with torch.no_grad():
        model.train()(image, CLOCK, label=LABEL)
    model(clips(), CLOCK, label=LABEL)
    video_dit(train_image=True).train()(image, CLOCK, label=LABEL)
    assert not told
    for _ in range(2):
        model(image, CLOCK, label=LABEL)
    ((message, *rest),) = told
    assert "a frozen image denoiser learns nothing from single frames" in message
    assert rest == ["current", logging.WARNING]


def test_maps_conditions_of_frames_and_dropout():
    DENOISERS.register_module(module=Maps, force=True)
    try:
        model = filled(
            DENOISERS.build(
                dict(
                    type="ImageToVideo", image=dict(type="Maps"), after={r"inner\.1": 8},
                    layout="(b t) c h w", frames=5, layer=dict(heads=2),
                )
            )
        )  # fmt: skip
    finally:
        DENOISERS.module_dict.pop("Maps")
    generator = torch.Generator().manual_seed(4)
    x, effnet = clips(), torch.randn(2, 3, 5, 4, 6, generator=generator)
    text = torch.randn(2, 4, 3, generator=generator)
    model.train()  # the dropout is the image model's, which is frozen
    with torch.no_grad():
        out = model(x, CLOCK, effnet=effnet, text=text)
        for i in range(5):
            alone = model.image(x[:, :, i : i + 1], CLOCK, effnet[:, :, i : i + 1], text)
            torch.testing.assert_close(out[:, :, i : i + 1], alone, rtol=0, atol=1e-6)
        assert not torch.allclose(trained(model)(x, CLOCK, effnet=effnet, text=text), out)


def test_what_is_asked_of_a_denoiser_the_image_denoiser_answers():
    model = video_dit()
    assert (model.in_channels, model.out_channels, model.num_classes) == (3, 6, 7)
    assert model.size == (5, 4, 6)
    assert model.num_tokens == 5 * 6
    with pytest.raises(AttributeError):
        _ = model.nothing
    assert {name.split(".")[0] for name in model.state_dict()} == {"image", "temporal"}
    image = DENOISERS.build(DIT)
    assert set(model.image.state_dict()) == set(image.state_dict())


def test_weights_of_images_and_of_videos_are_loaded():
    image = filled(video_dit()).image
    model, report = trained(video_dit()), None
    for parameter in model.image.parameters():
        parameter.data.zero_()
    temporal = copy.deepcopy(model.temporal.state_dict())
    report = load_denoiser(model, {"model": image.state_dict()})
    assert {key.split(".")[0] for key in report.kept} == {"temporal"}
    assert len(report.kept) == len(temporal)
    for mine, theirs in ((model.image.state_dict(), image.state_dict()),
                         (model.temporal.state_dict(), temporal)):  # fmt: skip
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)

    other = video_dit(image=DIT | dict(num_classes=3))  # its label table is its own
    report = load_denoiser(other, {"ema": model.state_dict()})
    assert report.kept == ["embed_label.weight"]
    assert torch.equal(other.temporal[1].attn.qkv.weight, model.temporal[1].attn.qkv.weight)
    with pytest.raises(UserError, match="of another architecture than the config's ModuleList"):
        load_denoiser(video_dit(dict(heads=2, kernel=5)), model.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(after={"block": 16}), "after='block' matches no module of DiT; there are embed"),
        (dict(layout="(b t) n"), "layout must name b, t, c"),
        (dict(after={"block(s": 16}), "after='block(s' is no regular expression: missing ), "),
        (dict(frames=0), "frames must be at least 1, got 0"),
        (dict(layer=dict(heads=0, kernel=0)), "needs heads, a kernel or both"),
        (dict(layer=dict(kernel=2)), "kernel must be odd"),
        (dict(layer=dict(heads=3)), "width 16 is not divisible by heads 3"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        video_dit(**changes)


def test_a_width_that_is_not_the_modules():
    model = video_dit(after={r"blocks\.1": 24})
    with pytest.raises(ValueError, match=r"after=.*blocks.1.* gives 16 channels, not 24"):
        model(clips(), CLOCK, label=LABEL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(layout="b t c h w"),
            "'b t c h w' of 5 axes does not fit blocks.1, which gives (10, ",
        ),
        (dict(layout="b t c"), "'b t c' of 3 axes does not fit blocks.1, which gives (10, "),
        (
            dict(layout="(b t) n 1 c"),
            "of 4 axes does not fit blocks.1, which gives (10, 1, 6, 16)",
        ),
        (dict(after={"embed_clock": 16}), "fit embed_clock, which gives (10, 16); choose other m"),
    ],
)
def test_a_layout_that_is_not_the_modules(changes, message):
    model = video_dit(**changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(clips(), CLOCK, label=LABEL)


def test_a_module_that_gives_no_tensor():
    model = video_dit()
    model.image.blocks[1].register_forward_hook(lambda module, args, out: (out,))
    with pytest.raises(ValueError, match=r"fit blocks\.1, which gives a tuple; choose"):
        model(clips(), CLOCK, label=LABEL)


@torch.no_grad()
def test_the_temporal_layer_by_hand():
    torch.manual_seed(5)
    layer = TemporalLayer(8, heads=2, kernel=3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(2, 5, 3, 8)
    expected = x.clone()
    for b in range(2):
        for n in range(3):
            rows = x[b, :, n]
            h = (rows - rows.mean(1, keepdim=True)) / (
                rows.var(1, False, keepdim=True) + 1e-6
            ).sqrt()
            for t in range(5):
                for k in range(4):
                    h[t, k] += torch.sin(torch.tensor(t / 10000 ** (k / 4)))
                    h[t, 4 + k] += torch.cos(torch.tensor(t / 10000 ** (k / 4)))
            past, future = F.pad(h, (0, 0, 1, 0))[:-1], F.pad(h, (0, 0, 0, 1))[1:]
            kernel = layer.conv.weight[:, 0]
            h = (
                h
                + past * kernel[:, 0]
                + h * kernel[:, 1]
                + future * kernel[:, 2]
                + layer.conv.bias
            )
            q, k, v = F.linear(h, layer.attn.qkv.weight, layer.attn.qkv.bias).chunk(3, -1)
            heads = []
            for i in (slice(0, 4), slice(4, 8)):
                heads.append((q[:, i] @ k[:, i].T / 2).softmax(-1) @ v[:, i])
            proj = layer.attn.proj
            expected[b, :, n] += F.linear(torch.cat(heads, -1), proj.weight, proj.bias)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-5)


def test_parameters_of_a_layer():
    count = lambda **options: sum(p.numel() for p in TemporalLayer(64, **options).parameters())  # noqa: E731
    assert count(heads=4, kernel=0) == 4 * 64**2 + 4 * 64
    assert count(heads=4, kernel=3) == 4 * 64**2 + 4 * 64 + 3 * 64 + 64
    assert count(heads=0, kernel=3) == 64**2 + 64 + 3 * 64 + 64

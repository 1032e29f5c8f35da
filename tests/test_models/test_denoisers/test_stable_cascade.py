"""Stages C and B against diffusers' network, and against a plain forward of one frame."""

import math
import re

import pytest
import torch
from diffusers import StableCascadeUNet
from mmengine.config import Config
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from mmsora.models.denoisers import StableCascade
from mmsora.registry import DENOISERS
from mmsora.utils.checkpoint import load_denoiser
from mmsora.utils.config_check import check_config
from mmsora.utils.user_error import UserError

# Small; no two sizes alike.
# In B the coarsest level has 1 x 2 places, which do not double to 3 x 5.
C = dict(
    in_channels=5,
    out_channels=6,
    size=(1, 4, 7),
    levels=[dict(width=24, depth=2, heads=3), dict(width=32, depth=1, heads=2)],
    conditions=dict(width=20, pooled=12, text=10, image=14, numbers=("sca", "crp")),
)
B = dict(
    in_channels=4,
    out_channels=3,
    size=(1, 12, 20),
    levels=[
        dict(width=8, depth=1, repeat=2),
        dict(width=12, depth=2, heads=3, repeat=3),
        dict(width=16, depth=1, heads=2, repeat=2),
    ],
    conditions=dict(width=20, pooled=12, effnet=6, pixels=3, numbers=("sca",), tokens=3),
    patch=2,
    strided=True,
)
RES, CLOCK, ATTN = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"
LIBRARY_C = dict(
    in_channels=5, out_channels=6, conditioning_dim=20, block_out_channels=(24, 32),
    num_attention_heads=(3, 2), down_num_layers_per_block=(2, 1), up_num_layers_per_block=(1, 2),
    clip_text_in_channels=10, clip_text_pooled_in_channels=12, clip_image_in_channels=14,
    switch_level=(False,),
)  # fmt: skip
LIBRARY_B = dict(
    in_channels=4, out_channels=3, patch_size=2, conditioning_dim=20,
    block_out_channels=(8, 12, 16), num_attention_heads=(-1, 3, 2),
    down_num_layers_per_block=(1, 2, 1), up_num_layers_per_block=(1, 2, 1),
    down_blocks_repeat_mappers=(1, 1, 1), up_blocks_repeat_mappers=(2, 3, 2),
    block_types_per_layer=((RES, CLOCK), (RES, CLOCK, ATTN), (RES, CLOCK, ATTN)),
    clip_text_pooled_in_channels=12, clip_seq=3, effnet_in_channels=6, pixel_mapper_in_channels=3,
    dropout=(0.0, 0.0, 0.0), timestep_conditioning_type=("sca",),
)  # fmt: skip
both = pytest.mark.parametrize("kind", ["C", "B"])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(config, **changes):
    """In eval mode and zero nowhere."""
    torch.manual_seed(0)
    model = StableCascade(**config | changes)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.shape[0] > 1 and parameter.ndim > 1 else 4
        nn.init.normal_(parameter, std=fan_in**-0.5)
    return model.eval()


def case(kind, batch=3, frames=2):
    """A model, its noisy latents, clock and conditions; all of a sample are its own."""
    clock = torch.tensor([0.25, 0.7, 1.0])[:batch]
    sca, crp = torch.tensor([0.0, 0.5, 0.9])[:batch], torch.tensor([0.3, 0.1, 0.0])[:batch]
    pooled = drawn(3, 12, seed=1)[:batch]
    if kind == "C":
        told = dict(text_pooled=pooled, text=drawn(3, 7, 10, seed=2)[:batch], sca=sca, crp=crp)
        told["image"] = drawn(3, 2, 14, seed=3)[:batch]
        return filled(C), drawn(3, 5, 2, 4, 7)[:batch, :, :frames], clock, told
    told = dict(text_pooled=pooled, sca=sca)
    told["effnet"] = drawn(3, 6, 2, 4, 3, seed=2)[:batch, :, :frames]
    told["pixels"] = drawn(3, 3, 2, 5, 6, seed=3)[:batch, :, :frames]
    return filled(B), drawn(3, 4, 2, 12, 20)[:batch, :, :frames], clock, told


def folded(video):
    return video.transpose(1, 2).flatten(0, 1)


# Against the library


def library(kind, weights, x, clock, told):
    """Its answer, frame by frame folded into the batch."""
    network = StableCascadeUNet(**{"C": LIBRARY_C, "B": LIBRARY_B}[kind]).eval()
    network.load_state_dict(weights)
    frames = x.shape[2]
    per_frame = {k: v.repeat_interleave(frames, 0) for k, v in told.items() if v.ndim < 5}
    per_frame |= {k: folded(v) for k, v in told.items() if v.ndim == 5}
    names = {"text_pooled": "clip_text_pooled", "text": "clip_text", "image": "clip_img"}
    given = {names.get(k, k): v for k, v in per_frame.items()}
    given["clip_text_pooled"] = given["clip_text_pooled"][:, None]
    out = network(folded(x), clock.repeat_interleave(frames, 0), **given).sample
    return out.unflatten(0, (len(x), frames)).transpose(1, 2)


@both
@torch.no_grad()
def test_a_batch_is_what_the_library_makes_of_it(kind):
    model, x, clock, told = case(kind, frames=1)
    told = {k: v for k, v in told.items() if k not in ("sca", "crp")}  # of which it takes no batch
    out = model(x, clock, **told)
    assert out.shape == (3, model.out_channels, 1, *x.shape[3:])
    assert out.std() > 0.1
    assert torch.equal(out, library(kind, model.state_dict(), x, clock, told))


@both
@torch.no_grad()
def test_frames_of_a_video_are_images_to_it(kind):
    model, x, clock, told = case(kind)
    told = {k: v for k, v in told.items() if k not in ("sca", "crp")}
    expected = library(kind, model.state_dict(), x, clock, told)
    torch.testing.assert_close(model(x, clock, **told), expected, atol=2e-5, rtol=1e-5)


@both
@torch.no_grad()
def test_one_sample_with_numbers_is_what_the_library_makes_of_it(kind):
    model, x, clock, told = case(kind, batch=1, frames=1)
    told["sca"] = torch.tensor([0.6])
    out = model(x, clock, **told)
    assert torch.equal(out, library(kind, model.state_dict(), x, clock, told))
    assert not torch.equal(out, model(x, clock, **told | {"sca": None}))


@torch.no_grad()
def test_what_may_be_left_unsaid_is_zeros():
    model, x, clock, told = case("C")
    unsaid = {k: v for k, v in told.items() if k.startswith("text")}
    zeros = dict(image=torch.zeros(3, 14), sca=torch.zeros(3), crp=torch.zeros(3))
    assert torch.equal(model(x, clock, **unsaid), model(x, clock, **unsaid, **zeros))
    model, x, clock, told = case("B")
    del told["pixels"]
    out = model(x, clock, **told | {"pixels": torch.zeros(3, 3, 2, 8, 8)})
    assert torch.equal(model(x, clock, **told), out)


# Against a plain forward of one frame (C, H, W), by the weights' public names.


def channels_last(function, x):
    return function(x.permute(1, 2, 0)).permute(2, 0, 1)


def normed(x):
    """Over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-6).sqrt()


def linear(w, name, x):
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def pointwise(w, name, x):
    bias = w[f"{name}.bias"][:, None, None]
    return torch.einsum("ihw,oi->ohw", x, w[f"{name}.weight"][:, :, 0, 0]) + bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def resized(x, height, width):
    """Bilinear, corners on corners."""
    if x.shape[1:] == (height, width):
        return x
    rows, columns = x.shape[1:]
    out = x.new_zeros(len(x), height, width)
    for i in range(height):
        for j in range(width):
            y = i * (rows - 1) / (height - 1)
            z = j * (columns - 1) / (width - 1)
            top, left = int(y), int(z)
            below, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            upper = x[:, top, left] * (left + 1 - z) + x[:, top, right] * (z - left)
            lower = x[:, below, left] * (left + 1 - z) + x[:, below, right] * (z - left)
            out[:, i, j] = upper * (top + 1 - y) + lower * (y - top)
    return out


def waves(number):
    """64 of a float32 number, whose product with 10000 is rounded."""
    angles = [(number * 10000) * torch.tensor(-math.log(10000) / 31 * k).exp() for k in range(32)]
    return torch.stack([a.sin() for a in angles] + [a.cos() for a in angles]).double()


def convolution(w, name, x, skip):
    h = F.conv2d(
        x[None], w[f"{name}.depthwise.weight"], w[f"{name}.depthwise.bias"], padding=1,
        groups=len(x),
    )[0]  # fmt: skip
    h = normed(h.permute(1, 2, 0))
    if skip is not None:
        h = torch.cat([h, skip.permute(1, 2, 0)], -1)
    h = gelu(linear(w, f"{name}.channelwise.0", h))
    length = (h**2).sum((0, 1)).sqrt()
    gamma, beta = (w[f"{name}.channelwise.2.{part}"][0, 0, 0] for part in ("gamma", "beta"))
    h = gamma * (h * length / (length.mean() + 1e-6)) + beta + h
    return x + linear(w, f"{name}.channelwise.4", h).permute(2, 0, 1)


def clocked(w, name, x, numbers):
    made = sum(linear(w, f"{name}.mapper{of}", waves(number)) for of, number in numbers.items())
    scale, shift = made[:, None, None].chunk(2)
    return x * (1 + scale) + shift


def attention(w, name, x, tokens, heads):
    said = linear(w, f"{name}.kv_mapper.1", tokens * torch.sigmoid(tokens))
    places = normed(x.permute(1, 2, 0)).flatten(0, 1)
    seen, width = torch.cat([places, said]), x.shape[0]
    name = f"{name}.attention.attn"
    weight, bias = w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"]
    q = places @ weight[:width].T + bias[:width]
    k = seen @ weight[width : 2 * width].T + bias[width : 2 * width]
    v = seen @ weight[2 * width :].T + bias[2 * width :]
    parts = []
    for head in torch.arange(width).chunk(heads):
        scores = (q[:, head] @ k[:, head].T / len(head) ** 0.5).softmax(-1)
        parts.append(scores @ v[:, head])
    out = linear(w, f"{name[:-5]}.attn.out_proj", torch.cat(parts, -1))
    return x + out.T.reshape(x.shape)


def blocks(w, name, x, level, numbers, tokens, skip=None):
    place = 0
    for _ in range(level["depth"]):
        x = convolution(w, f"{name}.{place}", x, skip if place == 0 else None)
        x = clocked(w, f"{name}.{place + 1}", x, numbers)
        place += 2
        if level.get("heads"):
            x = attention(w, f"{name}.{place}", x, tokens, level["heads"])
            place += 1
    return x


def down(w, name, x, strided):
    x = channels_last(normed, x)
    if strided:
        return F.conv2d(x[None], w[f"{name}.1.weight"], w[f"{name}.1.bias"], stride=2)[0]
    return pointwise(w, f"{name}.1.blocks.0", x)


def up(w, name, x, strided):
    x = channels_last(normed, x)
    if strided:
        weight, bias = w[f"{name}.1.weight"], w[f"{name}.1.bias"]
        return F.conv_transpose2d(x[None], weight, bias, stride=2)[0]
    return pointwise(w, f"{name}.1.blocks.1", x)


def reference_tokens(w, config, told):
    width = config["conditions"]["width"]
    name = "clip_txt_pooled_mapper" if "text" in told else "clip_mapper"
    tokens = [linear(w, name, told["text_pooled"]).reshape(-1, width)]
    if "text" in told:
        tokens.insert(0, linear(w, "clip_txt_mapper", told["text"]))
        tokens.append(linear(w, "clip_img_mapper", told["image"]).reshape(-1, width))
    return normed(torch.cat(tokens))


def mapped(w, name, x):
    return channels_last(normed, pointwise(w, f"{name}.2", gelu(pointwise(w, f"{name}.0", x))))


def reference(config, w, x, clock, told):
    """One frame of one sample; ``told`` is what is said of it."""
    numbers = {"": clock} | {f"_{n}": told[n] for n in config["conditions"]["numbers"]}
    tokens = reference_tokens(w, config, told)
    side, strided, levels = config.get("patch", 1), config.get("strided"), config["levels"]
    x = x.unflatten(1, (-1, side)).unflatten(3, (-1, side)).permute(0, 2, 4, 1, 3).flatten(0, 2)
    x = channels_last(normed, pointwise(w, "embedding.1", x))
    if "effnet" in told:
        x = x + mapped(w, "effnet_mapper", resized(told["effnet"], *x.shape[1:]))
        x = x + resized(mapped(w, "pixels_mapper", told["pixels"]), *x.shape[1:])
    passed = []
    for i, level in enumerate(levels):
        x = down(w, f"down_downscalers.{i}", x, strided) if i else x
        x = blocks(w, f"down_blocks.{i}", x, level, numbers, tokens)
        passed.append(x)
    for i, level in enumerate(reversed(levels)):
        skip = passed[len(levels) - 1 - i] if i else None
        for again in range(level.get("repeat", 1)):
            if again:
                x = pointwise(w, f"up_repeat_mappers.{i}.{again - 1}", x)
            x = x if skip is None else resized(x, *skip.shape[1:])
            x = blocks(w, f"up_blocks.{i}", x, level, numbers, tokens, skip)
        x = up(w, f"up_upscalers.{i}", x, strided) if i < len(levels) - 1 else x
    x = pointwise(w, "clf.1", channels_last(normed, x))
    x = x.unflatten(0, (-1, side, side)).permute(0, 3, 1, 4, 2)
    return x.flatten(3).flatten(1, 2)


@both
@torch.no_grad()
def test_each_frame_is_what_the_paper_makes_of_it(kind):
    model, x, clock, told = case(kind)
    out = model(x, clock, **told)
    weights = {k: v.double() for k, v in model.to_public(model.state_dict()).items()}
    config = {"C": C, "B": B}[kind]
    for sample in range(3):
        for frame in range(2):
            mine = {k: v[sample] for k, v in told.items()}
            mine = {k: v[:, frame] if v.ndim == 4 else v for k, v in mine.items()}
            mine = {k: v if k in ("sca", "crp") else v.double() for k, v in mine.items()}
            args = x[sample, :, frame].double(), clock[sample], mine
            expected = reference(config, weights, *args).float()
            torch.testing.assert_close(out[sample, :, frame], expected, atol=2e-4, rtol=1e-4)


# By itself


@both
@torch.no_grad()
def test_samples_of_a_batch_do_not_know_one_another(kind):
    model, x, clock, told = case(kind)
    out = model(x, clock, **told)
    for i in range(3):
        alone = model(x[i : i + 1], clock[i : i + 1], **{k: v[i : i + 1] for k, v in told.items()})
        torch.testing.assert_close(out[i], alone[0], atol=2e-5, rtol=1e-5)
    for name in told:  # and each is heard
        other = model(x, clock, **told | {name: told[name].flip(0)})
        assert [(other[i] - out[i]).abs().max() > 1e-4 for i in (0, 2)] == [True, True], name


@both
@torch.no_grad()
def test_other_sizes_and_one_embedding_with_an_axis_of_its_own(kind):
    model, x, clock, told = case(kind)
    wide = x.transpose(3, 4).contiguous()
    assert model(wide, clock, **told).shape == (3, model.out_channels, 2, *wide.shape[3:])
    with_axis = told | {"text_pooled": told["text_pooled"][:, None]}
    assert torch.equal(model(x, clock, **told), model(x, clock, **with_axis))
    if kind == "C":
        one = told | {"image": told["image"][:, 0]}
        assert torch.equal(
            model(x, clock, **one), model(x, clock, **told | {"image": told["image"][:, :1]})
        )


def test_labels_stand_for_texts():
    model = filled(C, num_classes=4, conditions=dict(width=20, pooled=12, numbers=()))
    x, clock = drawn(2, 5, 1, 4, 7), torch.tensor([0.2, 0.9])
    out = model(x, clock, label=torch.tensor([3, 4]))  # 4 is none
    texts = filled(C, conditions=dict(width=20, pooled=12, numbers=()))
    weights = model.state_dict()
    rows = weights.pop("embed_label.weight")
    assert rows.shape == (5, 12)
    texts.load_state_dict(weights)
    assert torch.equal(out, texts(x, clock, text_pooled=rows[[3, 4]]))


def test_wrong_conditions_are_told():
    model, x, clock, told = case("B")
    with pytest.raises(ValueError, match="needs effnet="):
        model(x, clock, **{k: v for k, v in told.items() if k != "effnet"})
    with pytest.raises(ValueError, match="needs text_pooled="):
        model(x, clock, effnet=told["effnet"])
    with pytest.raises(ValueError, match="takes no text="):
        model(x, clock, **told, text=drawn(3, 7, 10))
    with pytest.raises(ValueError, match="takes no label="):
        model(x, clock, **told, label=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="takes no crp="):
        model(x, clock, **told, crp=told["sca"])
    with pytest.raises(ValueError, match="needs label="):
        filled(B, num_classes=4)(x, clock, effnet=told["effnet"])
    with pytest.raises(ValueError, match="numbers are of sca and crp, got 'scale'"):
        filled(B, conditions=B["conditions"] | {"numbers": ["scale"]})
    with pytest.raises(ValueError, match="width 9 is not divisible by heads 2"):
        StableCascade(**C | {"levels": [dict(width=9, depth=1, heads=2)]})


class Wrapped(nn.Module):
    """As those that shard, recompute or add something do it."""

    def __init__(self, block):
        super().__init__()
        self.block, self.calls = block, 0

    def forward(self, *args):
        self.calls += 1
        return self.block(*args)


@torch.no_grad()
def test_blocks_can_be_wrapped_and_go_upwards_as_often_as_said():
    model, x, clock, told = case("B")
    out = model(x, clock, **told)
    for levels in (model.down_blocks, model.up_blocks):
        for level in levels:
            for i, block in enumerate(level):
                level[i] = Wrapped(block)
    assert torch.equal(model(x, clock, **told), out)
    assert [{block.calls for block in level} for level in model.up_blocks] == [{2}, {3}, {2}]
    assert [{block.calls for block in level} for level in model.down_blocks] == [{1}] * 3


@both
def test_every_weight_gets_a_gradient(kind):
    model, x, clock, told = case(kind)
    needed = {k: v for k, v in told.items() if k in ("text", "text_pooled", "effnet")}
    model(x, clock, **needed).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# Initialisation


@both
def test_the_output_is_zero_at_first(kind):
    _, x, clock, told = case(kind)
    model = StableCascade(**{"C": C, "B": B}[kind])
    assert model(x, clock, **told).abs().max() == 0
    for name, weight in model.named_parameters():
        is_left = name.startswith("up_upscalers") and kind == "B"  # to PyTorch
        is_zero = re.search(r"bias$|gamma$|beta$|\.mapper|^clf", name) and not is_left
        assert (weight.abs().max() == 0) == bool(is_zero), name


def test_weights_start_as_the_authors_do():
    torch.manual_seed(0)
    levels = [dict(width=64, depth=3, heads=2), dict(width=64, depth=13, heads=2)]
    conditions = dict(width=64, pooled=64, text=64, image=64, effnet=64, pixels=64)
    weights = StableCascade(32, 32, (1, 8, 8), levels, conditions).state_dict()

    def bound(name):  # uniform weights fill a range of it
        return weights[name].abs().max().item()

    def xavier(fan_in, fan_out):
        return (6 / (fan_in + fan_out)) ** 0.5

    for name, expected in {
        "embedding.1": 0.02 * xavier(32, 64),
        "down_blocks.0.0.channelwise.0": xavier(64, 256),
        "down_blocks.0.0.channelwise.4": xavier(64, 256) / 16**0.5,
        "up_blocks.1.0.channelwise.0": xavier(128, 256),
        "up_blocks.0.3.channelwise.4": xavier(64, 256) / 16**0.5,
        "down_blocks.0.0.depthwise": xavier(9, 9 * 64),
        "down_blocks.0.2.kv_mapper.1": xavier(64, 64),
        "down_blocks.0.2.attention.to_q": xavier(64, 3 * 64),
        "down_blocks.0.2.attention.to_k": xavier(64, 3 * 64),
        "down_blocks.0.2.attention.to_v": xavier(64, 3 * 64),
        "down_blocks.0.2.attention.to_out.0": xavier(64, 64),
        "down_downscalers.1.1.blocks.0": xavier(64, 64),
        "up_upscalers.0.1.blocks.1": xavier(64, 64),
    }.items():
        assert 0.9 * expected < bound(f"{name}.weight") <= expected * 1.0001, name
    for name in ("clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper"):
        assert weights[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    for name in ("effnet_mapper.0", "effnet_mapper.2", "pixels_mapper.0", "pixels_mapper.2"):
        assert weights[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.1)


@torch.no_grad()
def test_dropout_is_of_training_alone():
    _, x, clock, told = case("C")
    model = filled(C, levels=[level | {"dropout": 0.1} for level in C["levels"]])
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert torch.equal(model(x, clock, **told), case("C")[0](x, clock, **told))
    model.train()
    assert not torch.equal(model(x, clock, **told), model(x, clock, **told))


# The published networks


def level(width, depth, heads=0, repeat=1, dropout=0.0):
    return dict(width=width, depth=depth, heads=heads, repeat=repeat, dropout=dropout)


def stage_c(width, heads, depths):
    return dict(
        type="StableCascade",
        in_channels=16,
        out_channels=16,
        size=(1, 24, 24),
        levels=[level(width, depth, heads, dropout=0.1) for depth in depths],
        conditions=dict(width=width, pooled=1280, text=1280, image=768, numbers=["sca", "crp"]),
    )


def stage_b(*levels):
    return dict(
        type="StableCascade",
        in_channels=4,
        out_channels=4,
        size=(1, 256, 256),
        levels=levels,
        conditions=dict(width=1280, pooled=1280, effnet=16, pixels=3, numbers=["sca"]),
        patch=2,
        strided=True,
    )


PUBLISHED = {
    "C 3.6B": (stage_c(2048, 32, (8, 24)), 3589.10, 1294),
    "C 1B": (stage_c(1536, 24, (4, 12)), 1030.79, 654),
    "B 1.5B": (
        stage_b(
            level(320, 2, 0, 2), level(640, 6, 0, 2),
            level(1280, 28, 20, 3, 0.1), level(1280, 6, 20, 3, 0.1),
        ),
        1562.94,
        1454,
    ),
    "B 700M": (
        stage_b(
            level(320, 2, 0, 2), level(576, 4, 0, 2),
            level(1152, 14, 18, 2, 0.1), level(1152, 4, 18, 2, 0.1),
        ),
        699.47,
        826,
    ),
}  # fmt: skip
each_published = pytest.mark.parametrize("name", PUBLISHED)


def public_shapes(config):
    """Keys and shapes of the authors' files, by what is written of the architecture."""
    shapes = {}

    def weight(name, outside, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outside, *shape), (outside,)

    told, levels = config["conditions"], config["levels"]
    width, first, side = told["width"], levels[0]["width"], config.get("patch", 1)
    is_c = "text" in told
    weight("clip_txt_pooled_mapper" if is_c else "clip_mapper", 4 * width, 1280)
    if is_c:
        weight("clip_txt_mapper", width, 1280)
        weight("clip_img_mapper", 4 * width, 768)
    else:
        for name, inside in (("effnet_mapper", 16), ("pixels_mapper", 3)):
            weight(f"{name}.0", 4 * first, inside, 1, 1)
            weight(f"{name}.2", first, 4 * first, 1, 1)
    weight("embedding.1", first, config["in_channels"] * side**2, 1, 1)
    weight("clf.1", config["in_channels"] * side**2, first, 1, 1)

    def group(name, place, level, skipped):
        c = level["width"]
        weight(f"{name}.{place}.depthwise", c, 1, 3, 3)
        weight(f"{name}.{place}.channelwise.0", 4 * c, c + skipped)
        shapes[f"{name}.{place}.channelwise.2.gamma"] = (1, 1, 1, 4 * c)
        shapes[f"{name}.{place}.channelwise.2.beta"] = (1, 1, 1, 4 * c)
        weight(f"{name}.{place}.channelwise.4", c, 4 * c)
        for of in ("", *(f"_{number}" for number in told["numbers"])):
            weight(f"{name}.{place + 1}.mapper{of}", 2 * c, 64)
        if level["heads"]:
            attn = f"{name}.{place + 2}.attention.attn"
            shapes[f"{attn}.in_proj_weight"] = (3 * c, c)
            shapes[f"{attn}.in_proj_bias"] = (3 * c,)
            weight(f"{attn}.out_proj", c, c)
            weight(f"{name}.{place + 2}.kv_mapper.1", c, width)
        return place + (3 if level["heads"] else 2)

    for i, here in enumerate(levels):
        j = len(levels) - 1 - i  # going up, the coarsest is the first
        place = place_up = 0
        for n in range(here["depth"]):
            place = group(f"down_blocks.{i}", place, here, 0)
            skipped = here["width"] if i < len(levels) - 1 and n == 0 else 0
            place_up = group(f"up_blocks.{j}", place_up, here, skipped)
        for n in range(here["repeat"] - 1):
            weight(f"up_repeat_mappers.{j}.{n}", here["width"], here["width"], 1, 1)
        if i:
            above = levels[i - 1]["width"]
            down, up = f"down_downscalers.{i}.1", f"up_upscalers.{j}.1"
            if is_c:
                weight(f"{down}.blocks.0", here["width"], above, 1, 1)
                weight(f"{up}.blocks.1", above, here["width"], 1, 1)
            else:
                weight(down, here["width"], above, 2, 2)
                shapes[f"{up}.weight"] = (here["width"], above, 2, 2)
                shapes[f"{up}.bias"] = (above,)
    return shapes


@each_published
def test_published_networks_have_as_many_weights_by_the_same_names(name):
    config, millions, keys = PUBLISHED[name]
    with torch.device("meta"):
        model = DENOISERS.build(config)
        theirs = {k: torch.empty(v) for k, v in public_shapes(config).items()}
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert len(theirs) == keys
    ours = {k: v.shape for k, v in model.from_public(theirs).items()}
    assert ours == {k: v.shape for k, v in model.state_dict().items()}


@both
def test_public_weights_come_back_bit_for_bit(kind):
    model = filled({"C": C, "B": B}[kind])
    theirs = model.to_public(model.state_dict())
    assert not set(theirs) <= set(model.state_dict())
    ours = model.from_public(theirs)
    assert all(torch.equal(value, ours[key]) for key, value in model.state_dict().items())
    again = model.to_public(ours)
    assert set(again) == set(theirs)
    assert all(torch.equal(value, again[key]) for key, value in theirs.items())
    assert set(model.from_public(ours)) == set(ours)  # as diffusers' are


@both
def test_public_files_are_loaded(kind, tmp_path):
    model, other = filled({"C": C, "B": B}[kind]), StableCascade(**{"C": C, "B": B}[kind])
    save_file(model.to_public(model.state_dict()), tmp_path / "stage.safetensors")
    assert load_denoiser(other, tmp_path / "stage.safetensors") == ([], [], [])
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    wrong = StableCascade(**{"C": B, "B": C}[kind])
    with pytest.raises(UserError, match="is of another architecture than the config's StableCas"):
        load_denoiser(wrong, tmp_path / "stage.safetensors")


def test_a_config_s_levels_and_conditions_are_checked():
    def refused(match, **changes):
        denoiser = dict(type="mmsora.StableCascade", **C | changes)
        model = dict(type="mmsora.LatentDiffusion", denoiser=denoiser, diffusion=None, vae=None)
        cfg = Config(dict(model=model))
        with pytest.raises(UserError, match=match):
            check_config(cfg)

    refused(
        "levels.0.head = 2: .*takes no 'head'; did you mean 'heads'",
        levels=[dict(width=8, depth=1, head=2)],
    )
    refused("levels.2: missing 'depth'", levels=[*C["levels"], dict(width=8)])
    refused(
        "conditions.effnets = 3: .*did you mean 'effnet'",
        conditions=C["conditions"] | {"effnets": 3},
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("C 3.6B", dict(text=(77, 1280), text_pooled=(1280,), image=(768,))),
        ("B 700M", dict(text_pooled=(1280,), effnet=(16, 2, 15, 26))),
    ],
)
def test_videos_of_480_by_832_pass_through_the_published_networks(name, told):
    size = (2, 15, 26) if name.startswith("C") else (2, 120, 208)
    with torch.device("meta"), torch.no_grad():
        model = DENOISERS.build(PUBLISHED[name][0])
        told = {k: torch.empty(3, *shape) for k, shape in told.items()}
        out = model(torch.empty(3, model.in_channels, *size), torch.empty(3), **told)
    assert out.shape == (3, model.out_channels, *size)


# As a video model


def as_video(kind):
    """The network of ``case`` with temporal layers behind its attentions, as they are made."""
    config, widths = {"C": (C, (24, 32)), "B": (B, (12, 16))}[kind]
    levels = [0, 1] if kind == "C" else [1, 2]
    after = {}
    for level, width in zip(levels, widths, strict=True):
        ways = f"down_blocks[.]{level}|up_blocks[.]{len(config['levels']) - 1 - level}"
        after[f"({ways})[.](2|5)"] = width
    options = dict(image=dict(type="StableCascade", **config), after=after, frames=5)
    model = DENOISERS.build(
        dict(type="ImageToVideo", layout="(b t) c h w", layer=dict(heads=2), **options)
    )
    model.image.load_state_dict(filled(config).state_dict())
    return model.train()


@both
def test_with_temporal_layers_it_is_at_first_the_image_model(kind):
    model, (image, x, clock, cond) = as_video(kind), case(kind, batch=2)
    x, *shown = (
        drawn(2, v.shape[1], 5, *v.shape[3:], seed=i)
        for i, v in enumerate([x, *(v for v in cond.values() if v.ndim == 5)])
    )
    cond |= zip((k for k, v in cond.items() if v.ndim == 5), shown, strict=True)
    assert len(model.temporal) == 6  # three groups each way

    with torch.no_grad():
        out = model(x, clock, **cond)
        told = {
            k: folded(v)[:, :, None] if v.ndim == 5 else v.repeat_interleave(5, 0)
            for k, v in cond.items()
        }
        frames = image(folded(x)[:, :, None], clock.repeat_interleave(5, 0), **told)
        assert torch.equal(folded(out), frames[:, :, 0])
        for i in range(5):
            told = {k: v[:, :, i : i + 1] if v.ndim == 5 else v for k, v in cond.items()}
            alone = image(x[:, :, i : i + 1], clock, **told)
            scale = out.abs().max().item()
            torch.testing.assert_close(out[:, :, i : i + 1], alone, rtol=0, atol=2e-6 * scale)
        order = [3, 0, 4, 1, 2]
        told = {k: v[:, :, order] if v.ndim == 5 else v for k, v in cond.items()}
        moved = model(x[:, :, order], clock, **told)  # kernels round by the place in the batch
        torch.testing.assert_close(moved, out[:, :, order], rtol=0, atol=2e-6 * scale)

    before = {k: v.clone() for k, v in model.image.state_dict().items()}
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for step in range(10):
        optimizer.zero_grad()
        (model(x, clock, **cond) - 1).square().mean().backward()
        if step == 0:
            for name, weight in model.temporal.named_parameters():
                assert weight.grad.any() == name.endswith(("proj.weight", "proj.bias")), name
        optimizer.step()
    assert not model.image.training
    for name, value in model.image.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        assert not torch.allclose(model(x, clock, **cond), out, rtol=0, atol=1e-3)
        told = {k: v[:, :, :1] if v.ndim == 5 else v for k, v in cond.items()}
        one = model(x[:, :, :1], clock, **told)
        assert torch.equal(one, image(x[:, :, :1], clock, **told))


def trained_video(kind):
    """Temporal layers as training could leave them."""
    model = as_video(kind)
    torch.manual_seed(6)
    for weight in model.temporal.parameters():
        nn.init.normal_(weight, std=0.2)
    return model


@both
@torch.no_grad()
def test_clips_of_a_batch_with_times_of_their_own_are_those_alone(kind):
    model, (_, x, clock, told) = trained_video(kind), case(kind)
    out = model(x, clock, **told)
    frames = model.image(x, clock, **told)
    assert (out - frames).abs().amax((1, 2, 3, 4)).min() > 5e-3  # they see one another
    scale = out.abs().max().item()
    for i in range(3):
        own = {k: v[i : i + 1] for k, v in told.items()}
        alone = model(x[i : i + 1], clock[i : i + 1], **own)
        torch.testing.assert_close(out[i : i + 1], alone, rtol=0, atol=1e-5 * scale)


@both
@torch.no_grad()
def test_images_beside_a_clip_are_the_image_model_s_own(kind):
    model, (image, x, clock, told) = trained_video(kind), case(kind, batch=2)
    x = drawn(2, x.shape[1], 5, *x.shape[3:], seed=7)
    videos = {k: v for k, v in told.items() if v.ndim == 5}  # of the three frames of the clip
    told |= {k: torch.cat([v, v[:, :, :1] + 1], 2) for k, v in videos.items()}
    shapes = {
        k: (v.shape[1], 1, *v.shape[3:]) if k in videos else v.shape[1:] for k, v in told.items()
    }
    beside = {k: drawn(2, 2, *v, seed=8 + i) for i, (k, v) in enumerate(shapes.items())}
    beside |= {k: beside[k].sigmoid() for k in ("sca", "crp") if k in beside}
    of_images = {f"image_{k}": v for k, v in beside.items()}
    out = model(x, clock, num_images=2, **told, **of_images)
    scale = out.abs().max().item()
    clip = model(x[:, :, :3], clock, **told)
    torch.testing.assert_close(out[:, :, :3], clip, rtol=0, atol=1e-5 * scale)
    for i in range(2):
        alone = image(x[:, :, 3 + i : 4 + i], clock, **{k: v[:, i] for k, v in beside.items()})
        torch.testing.assert_close(out[:, :, 3 + i : 4 + i], alone, rtol=0, atol=1e-5 * scale)


@both
def test_public_files_are_loaded_into_video_models(kind, tmp_path):
    image, model = filled({"C": C, "B": B}[kind]), trained_video(kind)
    for weight in model.image.parameters():
        weight.data.zero_()
    save_file(image.to_public(image.state_dict()), tmp_path / "stage.safetensors")
    report = load_denoiser(model, tmp_path / "stage.safetensors")
    assert report.kept == [f"temporal.{key}" for key in model.temporal.state_dict()]
    assert not report.unused
    assert all(torch.equal(v, model.image.state_dict()[k]) for k, v in image.state_dict().items())

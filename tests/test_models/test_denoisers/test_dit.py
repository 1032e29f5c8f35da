"""DiT against a plain reference of einsums, and its published sizes."""

import pytest
import torch
from torch.nn import functional as F

from mmsora.models.denoisers import DiT
from mmsora.registry import DENOISERS

SMALL = dict(
    in_channels=3, out_channels=5, size=(1, 12, 20), patch=2, width=24, depth=2, heads=3,
    num_classes=10,
)  # fmt: skip
PATCHES = [2, (1, 2, 2), (2, 2, 2), (1, 3, 5), (2, 4, 2)]


def dit(**changes):
    """Small, and zero nowhere."""
    torch.manual_seed(0)
    model = DiT(**SMALL | changes)
    for parameter in model.parameters():
        fan_in = parameter.shape[1] if parameter.ndim > 1 else 4
        torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    return model


def batch(frames=1, height=12, width=20):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, frames, height, width, generator=generator)
    return x, torch.tensor([3.0, 543.5, 999.0]), torch.tensor([7, 10, 0])  # 10: no label


# The reference, in float64. Tokens are (B, t, h, w, D).


def affine(w, name, x):
    return torch.einsum("...d,ed->...e", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def normed(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def codes(count, width):
    frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.einsum("n,k->nk", torch.arange(count, dtype=torch.float64), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def attention(w, name, x, heads):
    """Within each frame."""
    b, t, h, width, d = x.shape
    q, k, v = affine(w, f"{name}.qkv", x).reshape(b, t, h * width, 3, heads, d // heads).unbind(3)
    scores = torch.einsum("btnhc,btmhc->bthnm", q, k) / (d // heads) ** 0.5
    out = torch.einsum("bthnm,btmhc->btnhc", scores.softmax(-1), v)
    return affine(w, f"{name}.proj", out.reshape(x.shape))


def patch_of(patch):
    return (1, patch, patch) if isinstance(patch, int) else patch


def reference(model, x, clock, label=None, patch=2, heads=3, depth=2):
    w = {name: value.detach().double() for name, value in model.named_parameters()}
    (s, p, q), (b, c, frames, height, width) = patch_of(patch), x.shape
    t, rows, columns = frames // s, height // p, width // q
    x = x.double().reshape(b, c, t, s, rows, p, columns, q)
    weight = w["embed.proj.weight"].reshape(-1, c, s, p, q)
    tokens = torch.einsum("bctshpwq,dcspq->bthwd", x, weight) + w["embed.proj.bias"]
    half = tokens.shape[-1] // 2
    tokens[..., :half] += codes(columns, half)  # x first
    tokens[..., half:] += codes(rows, half)[:, None]

    frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = torch.einsum("b,k->bk", clock.double(), frequencies)
    condition = affine(w, "embed_clock.fc1", torch.cat([angles.cos(), angles.sin()], dim=-1))
    condition = affine(w, "embed_clock.fc2", F.silu(condition))
    if label is not None:
        condition = condition + w["embed_label.weight"][label]

    def vectors(name, count):
        made = affine(w, f"{name}ada.linear", F.silu(condition))
        return made[:, None, None, None].chunk(count, dim=-1)

    for name in (f"blocks.{i}." for i in range(depth)):
        shift, scale, gate, shift2, scale2, gate2 = vectors(name, 6)
        inner = normed(tokens) * (1 + scale) + shift
        tokens = tokens + gate * attention(w, f"{name}attn", inner, heads)
        inner = affine(w, f"{name}mlp.fc1", normed(tokens) * (1 + scale2) + shift2)
        tokens = tokens + gate2 * affine(w, f"{name}mlp.fc2", F.gelu(inner, approximate="tanh"))
    shift, scale = vectors("", 2)
    out = affine(w, "head", normed(tokens) * (1 + scale) + shift)
    out = torch.einsum("bthwspqo->botshpwq", out.reshape(b, t, rows, columns, s, p, q, -1))
    return out.reshape(b, -1, frames, height, width)


def assert_equal(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_dit_is_the_reference():
    """6 x 10 tokens."""
    model, inputs = dit(), batch()
    assert model.grid == (1, 6, 10)
    assert_equal(model(*inputs), reference(model, *inputs))


@torch.no_grad()
def test_unconditional_dit_is_the_reference():
    model, (x, clock, _) = dit(num_classes=0), batch()
    assert_equal(model(x, clock), reference(model, x, clock))


@torch.no_grad()
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_any_patch(patch):
    model, inputs = dit(size=(4, 12, 20), patch=patch), batch(4)
    assert model.num_tokens == 4 * 12 * 20 // torch.tensor(patch_of(patch)).prod()
    assert_equal(model(*inputs), reference(model, *inputs, patch=patch))


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 20, 12), (2, 8, 14), (1, 2, 2), (1, 26, 40)])
def test_other_sizes_than_it_was_built_for(size):
    model, inputs = dit(), batch(*size)
    assert_equal(model(*inputs), reference(model, *inputs))


@torch.no_grad()
def test_frames_are_independent_images():
    model, (x, *rest) = dit(size=(5, 12, 20)), batch(5)
    out = model(x, *rest)
    for frame in range(5):
        assert_equal(out[:, :, frame : frame + 1], model(x[:, :, frame : frame + 1], *rest))
    changed = x.clone()
    changed[:, :, 2] += 1
    moved = (model(changed, *rest) - out).abs().amax((0, 1, 3, 4))
    assert (moved > 0.01).tolist() == [False, False, True, False, False]
    assert moved[[0, 1, 3, 4]].max() < 1e-5


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_one_another():
    model, inputs = dit(), batch()
    together = model(*inputs)
    for i in range(3):
        assert_equal(together[i : i + 1], model(*(value[i : i + 1] for value in inputs)))


@torch.no_grad()
def test_the_table_of_positions_is_used_as_it_was_loaded():
    model, inputs = dit(), batch()
    before = model(*inputs)
    model.load_state_dict(model.state_dict() | {"pos_embed": model.pos_embed * 1.1})
    assert (model(*inputs) - before).abs().max() > 0.01


def test_an_untrained_dit_is_zero_and_learns():
    torch.manual_seed(0)
    sizes = dict(in_channels=4, out_channels=8, size=(1, 16, 16), patch=2, width=96, depth=4)
    model = DENOISERS.build(dict(type="DiT", **sizes, heads=4, num_classes=10))
    x, clock, label = torch.randn(2, 4, 1, 16, 16), torch.tensor([7.0, 543.0]), torch.ones(2).int()
    assert not model(x, clock, label=label).any()
    for _ in range(3):
        loss = (model(x, clock, label=label) - 1).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    assert all(gradient.any() for gradient in gradients)
    assert loss < 0.999


def test_impossible_models_and_inputs_are_refused():
    for patch, message in (5, "1x12x20 .* patch 1x5x5"), ((2, 2, 2), "1x12x20 .* patch 2x2x2"):
        with pytest.raises(ValueError, match=message):
            dit(patch=patch)
    with pytest.raises(ValueError, match="3x12x20 .* patch 2x2x2; the nearest that is: 4x12x20"):
        dit(size=(2, 12, 20), patch=(2, 2, 2))(*batch(3))
    with pytest.raises(ValueError, match="class-conditional DiT needs label="):
        dit()(*batch()[:2])


SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

# At 256 x 256 pixels with 1000 classes: with the table of positions, and without.
PUBLISHED = {
    "S/2": (32_963_360, 32_865_056), "S/4": (32_945_024, 32_920_448),
    "S/8": (33_148_160, 33_142_016), "B/2": (130_512_416, 130_315_808),
    "B/4": (130_475_648, 130_426_496), "B/8": (130_881_536, 130_869_248),
    "L/2": (458_102_816, 457_840_672), "L/4": (458_053_760, 457_988_224),
    "L/8": (458_594_816, 458_578_432), "XL/2": (675_129_632, 674_834_720),
    "XL/4": (675_074_432, 675_000_704), "XL/8": (675_683_072, 675_664_640),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    size, patch = name.split("/")
    with torch.device("meta"):
        model = DiT(4, 8, (1, 32, 32), int(patch), *SIZES[size], 1000)
    trainable = sum(parameter.numel() for parameter in model.parameters())
    (table,) = model.buffers()
    assert (trainable + table.numel(), trainable) == PUBLISHED[name]
    out = model(torch.empty(2, 4, 1, 32, 32, device="meta"), table[:2, 0], label=torch.ones(
        2, dtype=torch.long, device="meta"
    ))  # fmt: skip
    assert (out.device.type, out.shape) == ("meta", (2, 8, 1, 32, 32))

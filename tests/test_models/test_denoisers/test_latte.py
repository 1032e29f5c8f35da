"""Latte against a plain reference: one frame, one token and one head at a time."""

import pytest
import torch
from torch.nn import functional as F

from mmsora.engine import ActivationCheckpointing
from mmsora.models.denoisers import DiT, Latte
from mmsora.registry import DENOISERS

SMALL = dict(
    in_channels=3, out_channels=5, size=(5, 12, 20), patch=2, width=24, depth=4, heads=3,
    num_classes=10,
)  # fmt: skip


def latte(**changes):
    """Small, and zero nowhere."""
    torch.manual_seed(0)
    model = Latte(**SMALL | changes)
    for parameter in model.parameters():
        fan_in = parameter.shape[1] if parameter.ndim > 1 else 4
        torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    return model


def batch(frames=5, height=12, width=20):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, frames, height, width, generator=generator)
    return x, torch.tensor([3.0, 543.5, 999.0]), torch.tensor([7, 10, 0])  # 10: no label


# The reference. Videos are (B, F, C, H, W), and conditions are repeated for every frame and token.


def sines(position, width):
    angles = [position / 10000 ** (k / (width // 2)) for k in range(width // 2)]
    angles = torch.tensor(angles, dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()])


def place(row, column, width):
    return torch.cat([sines(column, width // 2), sines(row, width // 2)])


def normed(x, shift, scale):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift


def attention(w, name, x, heads):
    """One sequence (N, D)."""
    made = torch.einsum("nd,ed->ne", x, w[f"{name}.qkv.weight"]) + w.get(f"{name}.qkv.bias", 0)
    q, k, v = made.chunk(3, dim=-1)
    out, size = [], x.shape[-1] // heads
    for head in range(heads):
        mine = slice(head * size, (head + 1) * size)
        scores = torch.einsum("nd,md->nm", q[:, mine], k[:, mine]) / size**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out.append(torch.einsum("nm,md->nd", weights, v[:, mine]))
    return torch.cat(out, -1) @ w[f"{name}.proj.weight"].T + w[f"{name}.proj.bias"]


def modulation(w, name, condition):
    return w[f"{name}.ada.linear.weight"] @ F.silu(condition) + w[f"{name}.ada.linear.bias"]


def reference_attention(w, name, x, condition, heads):
    """The first half of a block on one sequence (N, D), its condition repeated for each token."""
    shift, scale, gate, *_ = modulation(w, name, condition).repeat(len(x), 1).chunk(6, dim=-1)
    return x + gate * attention(w, f"{name}.attn", normed(x, shift, scale), heads)


def reference_perceptron(w, name, x, condition):
    """The second half."""
    *_, shift, scale, gate = modulation(w, name, condition).repeat(len(x), 1).chunk(6, dim=-1)
    hidden = normed(x, shift, scale) @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
    cubic = hidden + 0.044715 * hidden**3
    hidden = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * cubic))
    return x + gate * (hidden @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"])


def reference_block(w, name, x, condition, heads):
    x = reference_attention(w, name, x, condition, heads)
    return reference_perceptron(w, name, x, condition)


def in_space(function, tokens, w, name, conditions, *rest):
    """Each frame under what is said of it."""
    each = zip(tokens, conditions, strict=True)
    return torch.stack([function(w, name, frame, told, *rest) for frame, told in each])


def in_time(function, tokens, w, name, *rest):
    return torch.stack([function(w, name, part, *rest) for part in tokens.unbind(1)], dim=1)


def plain_attention(w, name, x, heads):
    weight, bias = (w[f"{name}.norm_time.{kind}"] for kind in ("weight", "bias"))
    return x + attention(w, f"{name}.attn_time", normed(x, bias, weight - 1), heads)


def reference_blocks(w, tokens, conditions, depth, heads, layout, length):
    """``length`` frames are the clip's."""
    table = torch.stack([sines(f, tokens.shape[-1]) for f in range(length)])[:, None]
    first = {"interleaved": 1, "late": depth // 2, "joint": 0}[layout]
    for i in range(depth):
        name = f"blocks.{i}"
        if i == first:
            tokens = torch.cat([tokens[:length] + table, tokens[length:]])
        is_spatial = i < depth // 2 if layout == "late" else i % 2 == 0
        if layout == "joint":
            tokens = in_space(reference_attention, tokens, w, name, conditions, heads)
            clip = in_time(plain_attention, tokens[:length], w, name, heads)
            tokens = torch.cat([clip, tokens[length:]])
            tokens = in_space(reference_perceptron, tokens, w, name, conditions)
        elif is_spatial:
            tokens = in_space(reference_block, tokens, w, name, conditions, heads)
        else:
            clip = in_time(reference_block, tokens[:length], w, name, conditions[0], heads)
            tokens = torch.cat([clip, tokens[length:]])
    return tokens


def reference_clock(w, clock):
    frequencies = torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=torch.float64)
    angles = clock.double() * frequencies
    c = torch.cat([angles.cos(), angles.sin()])
    c = F.silu(w["embed_clock.fc1.weight"] @ c + w["embed_clock.fc1.bias"])
    return w["embed_clock.fc2.weight"] @ c + w["embed_clock.fc2.bias"]


def reference_told(w, told):
    """What a label, a text (tokens, channels) or nothing adds to the clock."""
    if told is None:
        return 0
    if told.ndim == 0:
        return w["embed_label.weight"][told]
    hidden = torch.cat([token / (1 + (-token).exp()) for token in told.double()])
    return w["embed_text.weight"] @ hidden + w["embed_text.bias"]


def reference_of_one(w, x, clock, told, patch, depth, heads, layout):
    """One video (F, C, H, W), the first of ``told`` for its clip and one more for each image."""
    frames, channels, height, width = x.shape
    rows, columns = height // patch, width // patch
    at, length = reference_clock(w, clock), frames - len(told) + 1
    conditions = [at + reference_told(w, told[max(f - length + 1, 0)]) for f in range(frames)]
    size = len(at)
    weight = w["embed.proj.weight"].reshape(size, channels, patch, patch)

    tokens = torch.empty(frames, rows * columns, size, dtype=torch.float64)
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                square = x[f, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
                token = torch.einsum("cpq,dcpq->d", square, weight) + w["embed.proj.bias"]
                tokens[f, r * columns + c] = token + place(r, c, size)
    tokens = reference_blocks(w, tokens, conditions, depth, heads, layout, length)

    if "embed_text.weight" in w:
        conditions = [at] * frames
    out = torch.empty(frames, len(w["head.bias"]) // patch**2, height, width, dtype=torch.float64)
    for f in range(frames):
        made = w["ada.linear.weight"] @ F.silu(conditions[f]) + w["ada.linear.bias"]
        frame = normed(tokens[f], *made.chunk(2)) @ w["head.weight"].T + w["head.bias"]
        for r in range(rows):
            for c in range(columns):
                token = frame[r * columns + c].reshape(patch, patch, -1)
                for p in range(patch):
                    for q in range(patch):
                        out[f, :, r * patch + p, c * patch + q] = token[p, q]
    return out


def reference(model, x, clock, told=None, layout="interleaved", images=0, of_images=None):
    """What is said of clips (B, ...) and images (B, n, ...) are labels, texts or nothing."""
    w = {name: value.detach().double() for name, value in model.named_parameters()}
    shape = SMALL["patch"], SMALL["depth"], SMALL["heads"], layout
    each = []
    for i, video in enumerate(x.double().transpose(1, 2)):
        of_one = [None if told is None else told[i]]
        of_one += [None if of_images is None else of_images[i][j] for j in range(images)]
        each.append(reference_of_one(w, video, clock[i], of_one, *shape))
    return torch.stack(each).transpose(1, 2)


def assert_equal(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_latte_is_the_reference():
    model, inputs = latte(), batch()
    assert_equal(model(*inputs), reference(model, *inputs))


@torch.no_grad()
def test_unconditional_latte_is_the_reference():
    model, (x, clock, _) = latte(num_classes=0), batch()
    assert_equal(model(x, clock), reference(model, x, clock))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["late", "joint"])
def test_other_layouts_are_the_reference(layout):
    model, inputs = latte(layout=layout), batch()
    assert_equal(model(*inputs), reference(model, *inputs, layout=layout))


@torch.no_grad()
@pytest.mark.parametrize("size", [(7, 8, 14), (1, 12, 20), (5, 20, 12)])
def test_other_sizes_than_it_was_built_for(size):
    model, inputs = latte(), batch(*size)
    assert_equal(model(*inputs), reference(model, *inputs))


# Images beside a clip


@torch.no_grad()
@pytest.mark.parametrize("layout", ["interleaved", "late", "joint"])
def test_images_beside_a_clip_are_the_reference(layout):
    """Clips of five frames, and two images that have labels of their own."""
    model, (x, clock, label) = latte(layout=layout), batch(7)
    of_images = torch.tensor([[1, 10], [3, 3], [0, 9]])
    out = model(x, clock, label, num_images=2, image_label=of_images)
    assert_equal(out, reference(model, x, clock, label, layout, 2, of_images))


@torch.no_grad()
def test_images_of_an_unconditional_model_are_the_reference():
    model, (x, clock, _) = latte(num_classes=0), batch(4)
    out = model(x, clock, num_images=3)
    assert_equal(out, reference(model, x, clock, images=3))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["interleaved", "late", "joint"])
def test_clip_and_images_know_nothing_of_one_another(layout):
    model, (x, clock, label) = latte(layout=layout), batch(7)
    of_images = torch.tensor([[1, 10], [3, 3], [0, 9]])
    told = dict(label=label, num_images=2, image_label=of_images)
    out = model(x, clock, **told)
    assert_equal(out[:, :, :5], model(x[:, :, :5], clock, label))
    order = [0, 1, 2, 3, 4, 6, 5]
    swapped = model(x[:, :, order], clock, **told | dict(image_label=of_images.flip(1)))
    assert_equal(swapped, out[:, :, order])
    for frame in range(7):  # a change of one shows in the clip's frames, or in itself alone
        other = x.clone()
        other[:, :, frame] += 1
        moved = (model(other, clock, **told) - out).abs().amax((0, 1, 3, 4)) > 1e-5
        expected = [f < 5 for f in range(7)] if frame < 5 else [f == frame for f in range(7)]
        assert moved.tolist() == expected


def test_a_label_is_learned_from_its_images_alone():
    """The rows of the label table that get a gradient, and from which frames."""
    model, (x, clock, label) = latte(), batch(7)
    of_images = torch.tensor([[1, 2], [3, 3], [4, 5]])

    def learned(frames):
        model.zero_grad()
        out = model(x, clock, label, num_images=2, image_label=of_images)
        out[:, :, frames].square().sum().backward()
        rows = model.embed_label.weight.grad.abs().amax(1) > 0
        return {i for i, row in enumerate(rows.tolist()) if row}

    assert learned(slice(0, 5)) == {7, 10, 0}
    assert learned(slice(5, 6)) == {1, 3, 4}
    assert learned(slice(6, 7)) == {2, 3, 5}


@pytest.mark.parametrize("layout", ["interleaved", "late", "joint"])
def test_recomputed_activations_give_the_same_gradients_with_images(layout):
    (x, clock, label), of_images = batch(7), torch.tensor([[1, 2], [3, 3], [4, 5]])

    def gradients(model):
        loss = model(x, clock, label, num_images=2, image_label=of_images).square().mean()
        loss.backward()
        return {name: value.grad for name, value in model.named_parameters()}

    expected, model = gradients(latte(layout=layout)), latte(layout=layout)
    ActivationCheckpointing("full").apply(model)
    found = gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("layout", ["interleaved", "late", "joint"])
@pytest.mark.parametrize("block", [1, 2, 3, 4])
@torch.no_grad()
def test_tokens_tapped_after_any_block_are_those_of_all_frames(layout, block):
    model, (x, clock, label) = latte(layout=layout), batch(7)
    told = dict(label=label, num_images=2, image_label=torch.tensor([[1, 2], [3, 3], [4, 5]]))
    with model.tap(block) as found:
        model(x, clock, **told)
        model(x[:, :, :5], clock, label)
    assert found[0].shape == (3, 7, 60, 24)
    torch.testing.assert_close(found[0][:, :5], found[1])


@torch.no_grad()
def test_a_clip_of_one_frame_beside_images():
    model, (x, clock, label) = latte(), batch(3)
    of_images = torch.tensor([[1, 10], [3, 3], [0, 9]])
    out = model(x, clock, label, num_images=2, image_label=of_images)
    assert_equal(out, reference(model, x, clock, label, "interleaved", 2, of_images))


def test_images_that_cannot_be_are_refused():
    model, (x, clock, label) = latte(), batch()
    of_images = torch.tensor([[1], [3], [0]])
    for count in (5, 6, -1):
        with pytest.raises(ValueError, match=f"num_images={count} of 5 frames: at least one is"):
            model(x, clock, label, num_images=count, image_label=of_images)
    with pytest.raises(ValueError, match="needs image_label="):
        model(x, clock, label, num_images=1)
    with pytest.raises(ValueError, match=r"image_label must be of shape \(3, 2\), got \(3, 1\)"):
        model(x, clock, label, num_images=2, image_label=of_images)
    with pytest.raises(ValueError, match=r"label must be of shape \(3,\), got \(3, 1\)"):
        model(x, clock, of_images)
    tubes = latte(patch=(2, 2, 2), size=(4, 12, 20))
    with pytest.raises(ValueError, match=r"would mix images; num_images needs patch=\(1, 2, 2\)"):
        tubes(x[:, :, :4], clock, label, num_images=2, image_label=of_images)


# Texts


TEXT = dict(num_classes=0, text=(7, 6))


def texts(*shape):
    return torch.randn(*shape, 7, 6, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_a_text_is_the_reference():
    model, (x, clock, _) = latte(**TEXT), batch()
    out = model(x, clock, text=texts(3))
    assert_equal(out, reference(model, x, clock, texts(3)))


@torch.no_grad()
def test_texts_of_images_are_the_reference():
    model, (x, clock, _) = latte(**TEXT), batch(7)
    out = model(x, clock, text=texts(3), num_images=2, image_text=texts(3, 2))
    assert_equal(out, reference(model, x, clock, texts(3), "interleaved", 2, texts(3, 2)))


@torch.no_grad()
def test_texts_in_float_for_weights_in_bfloat16():
    model, (x, clock, _) = latte(**TEXT), batch()
    exact = model(x, clock, text=texts(3))
    out = model.bfloat16()(x.bfloat16(), clock, text=texts(3))
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() < 0.05 * exact.norm()


def test_a_text_is_learned():
    torch.manual_seed(0)
    layer = Latte(**SMALL | TEXT | dict(width=192, text=(77, 768))).embed_text
    assert layer.weight.shape == (192, 77 * 768)
    bound = (6 / sum(layer.weight.shape)) ** 0.5  # Xavier's
    assert layer.weight.abs().max().item() == pytest.approx(bound, rel=1e-2)
    assert not layer.bias.any()


def test_texts_that_cannot_be_are_refused():
    x, clock, label = batch()
    with pytest.raises(ValueError, match="a text or a label: .* so num_classes=0"):
        latte(text=(7, 6))
    with pytest.raises(ValueError, match="text= is for a Latte that has text=.tokens, channels."):
        latte()(x, clock, label, text=texts(3))
    model = latte(**TEXT)
    with pytest.raises(ValueError, match=r"a Latte with text=\(7, 6\) needs text="):
        model(x, clock)
    with pytest.raises(ValueError, match="needs image_text="):
        model(x, clock, text=texts(3), num_images=1)
    with pytest.raises(ValueError, match=r"text must be of shape \(3, 7, 6\), got \(3, 6, 7\)"):
        model(x, clock, text=texts(3).mT)


def test_the_registered_name_and_signature():
    sizes = dict(in_channels=4, out_channels=8, size=(6, 16, 16), patch=2, width=96, depth=4)
    model = DENOISERS.build(dict(type="Latte", **sizes, heads=4, num_classes=10))
    x = torch.randn(2, 4, 6, 16, 16)
    out = model(x, torch.tensor([7.0, 543.0]), label=torch.tensor([3, 10]))
    assert out.shape == (2, 8, 6, 16, 16)
    assert (out == 0).all()  # untrained


def test_an_untrained_latte_learns():
    """Zero at first, yet not stuck there."""
    torch.manual_seed(0)
    model, inputs = Latte(**SMALL), batch()
    assert (model(*inputs) == 0).all()
    for _ in range(3):
        loss = (model(*inputs) - 1).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    assert loss < 0.999
    assert all(gradient.any() for gradient in gradients)


def test_initial_weights():
    model = Latte(**SMALL | dict(width=192))
    zero = {name for name, value in model.named_parameters() if not value.any()}
    assert {name for name in zero if name.endswith("weight")} == {
        "head.weight", "ada.linear.weight", *(f"blocks.{i}.ada.linear.weight" for i in range(4)),
    }  # fmt: skip
    assert zero >= {name for name, _ in model.named_parameters() if name.endswith("bias")}
    for name in "embed_clock.fc1", "embed_clock.fc2", "embed_label":
        assert model.get_submodule(name).weight.std().item() == pytest.approx(0.02, rel=0.1)
    for name in "embed.proj", "blocks.0.attn.qkv", "blocks.3.mlp.fc2":
        weight = model.get_submodule(name).weight
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound
    assert model.embed_label.weight.shape == (11, 192)


def test_tables_of_positions_are_in_the_state_dict():
    state = Latte(**SMALL).state_dict()
    space = torch.stack([place(r, c, 24) for r in range(6) for c in range(10)])
    time = torch.stack([sines(f, 24) for f in range(5)])
    torch.testing.assert_close(state["pos_embed"], space.float())
    torch.testing.assert_close(state["temp_embed"], time.float())


@torch.no_grad()
def test_tables_are_used_as_they_were_loaded():
    """Those of a long-trained EMA are not exactly sines any more."""
    model, inputs = latte(), batch()
    before = model(*inputs)
    for name in "pos_embed", "temp_embed":
        model.load_state_dict(latte().state_dict() | {name: model.state_dict()[name] * 1.1})
        assert (model(*inputs) - before).abs().max() > 0.01


@torch.no_grad()
def test_frames_are_exchangeable_but_for_their_positions():
    model, (x, *rest) = latte(), batch()
    order = [3, 0, 4, 1, 2]

    def difference():
        return (model(x[:, :, order], *rest) - model(x, *rest)[:, :, order]).abs().max()

    assert difference() > 0.1
    model.temp_embed.zero_()
    assert difference() < 1e-4


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_one_another():
    model, inputs = latte(), batch()
    together = model(*inputs)
    for i in range(3):
        assert_equal(together[i : i + 1], model(*(value[i : i + 1] for value in inputs)))


@torch.no_grad()
def test_clock_and_label_matter():
    model, (x, clock, label) = latte(), batch()
    out = model(x, clock, label)
    for other in (clock + 1, label), (clock, (label + 1) % 11):
        assert ((model(x, *other) - out).abs().amax((1, 2, 3, 4)) > 0.01).all()


@torch.no_grad()
def test_bfloat16_weights():
    model, (x, clock, label) = latte(), batch()
    exact = model(x, clock, label)
    out = model.bfloat16()(x.bfloat16(), clock, label)
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(depth=3), "even, not 3"),
        (dict(size=(5, 12, 21)), "5x12x21 .* is not divisible by patch 1x2x2.*5x12x20"),
        (dict(layout="early"), "layout must be 'interleaved', 'late' or 'joint', got 'early'"),
        (dict(heads=5), "width 24 is not divisible by heads 5"),
        (dict(width=30), "divisible by 4, got 30"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Latte(**SMALL | changes)


def test_impossible_inputs_are_refused():
    model, (x, clock, label) = latte(), batch()
    with pytest.raises(ValueError, match="11x20 .* is not divisible by patch 1x2x2"):
        model(x[:, :, :, :11], clock, label)
    with pytest.raises(ValueError, match="needs label="):
        model(x, clock)


# Layouts


def axes(model):
    return [block.axis for block in model.blocks]


def test_layouts_order_the_blocks():
    assert axes(latte()) == [2, 1, 2, 1]
    assert axes(latte(layout="late")) == [2, 2, 1, 1]
    weights = {layout: set(latte(layout=layout).state_dict()) for layout in ("late", "joint")}
    assert weights["late"] == set(latte().state_dict())
    more = {key.split(".", 2)[2] for key in weights["joint"] - weights["late"]}
    layers = "norm_time.weight", "norm_time.bias", "attn_time.qkv.weight"
    assert more == {*layers, "attn_time.proj.weight", "attn_time.proj.bias"}


@torch.no_grad()
def test_a_joint_block_without_its_temporal_projection_is_a_spatial_one():
    model, (x, *rest) = latte(layout="joint", depth=3), batch()
    spatial = DiT(**SMALL | dict(depth=3))
    spatial.load_state_dict(model.state_dict(), strict=False)
    model.temp_embed.zero_()
    assert (model(x, *rest) - spatial(x, *rest)).abs().max() > 0.1
    for block in model.blocks:
        block.attn_time.proj.weight.zero_()
        block.attn_time.proj.bias.zero_()
    assert torch.equal(model(x, *rest), spatial(x, *rest))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["interleaved", "late", "joint"])
def test_frames_are_told_apart_once_and_before_time_first_matters(layout):
    """Seen at the input of each block: the difference that the table makes."""
    model, (x, *rest) = latte(layout=layout), batch()
    first = {"interleaved": 1, "late": 2, "joint": 0}[layout]
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x, *rest)
    model.temp_embed.zero_()
    model(x, *rest)
    differ = [with_table - without for with_table, without in zip(seen[:4], seen[4:], strict=True)]
    assert [bool(difference.any()) for difference in differ] == [i >= first for i in range(4)]
    table = latte().temp_embed[:, None].expand_as(differ[first])
    torch.testing.assert_close(differ[first], table, atol=1e-5, rtol=0)


SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

# At 16 frames of 256 x 256 pixels, unconditional. The published totals count the tables.
TOTALS = {
    "S/2": 32_585_120, "S/4": 32_566_784, "S/8": 32_769_920,
    "B/2": 129_755_936, "B/4": 129_719_168, "B/8": 130_125_056,
    "L/2": 457_094_176, "L/4": 457_045_120, "L/8": 457_586_176,
    "XL/2": 673_994_912, "XL/4": 673_939_712, "XL/8": 674_548_352,
}  # fmt: skip


def on_meta(name, num_classes=0, **changes):
    size, patch = name.split("/")
    width, depth, heads = SIZES[size]
    options = dict(width=width, depth=depth, heads=heads, num_classes=num_classes) | changes
    with torch.device("meta"):
        return Latte(4, 8, (16, 32, 32), int(patch), **options)


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", TOTALS)
def test_published_sizes(name):
    model = on_meta(name)
    tables = [buffer.numel() for buffer in model.buffers()]
    assert len(tables) == 2
    assert trainable(model) + sum(tables) == TOTALS[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("S/2", 32_519_840), ("B/2", 129_625_376), ("L/2", 456_920_096), ("XL/2", 673_799_072)],
)
def test_published_sizes_for_the_classes_of_ucf101(name, expected):
    assert trainable(on_meta(name, 101)) == expected


def test_published_sizes_of_other_layouts():
    assert trainable(on_meta("XL/2", layout="late")) == 673_681_568
    joint = trainable(on_meta("XL/2", layout="joint", depth=23))
    assert round(joint / 1e6, 2) == 676.33


def test_forward_on_meta():
    model = on_meta("S/2", 101, depth=2)
    x, clock, label = torch.empty(2, 4, 16, 32, 32), torch.empty(2), torch.zeros(2).long()
    out = model(x.to("meta"), clock.to("meta"), label.to("meta"))
    assert (out.device.type, out.shape) == ("meta", (2, 8, 16, 32, 32))

"""DiT and Latte against numbers written down when the authors' code was run.

Weights carry the public names and shapes and are functions of their names. Images are (B, C, H,
W) and videos (B, F, C, H, W) there.
"""

import pytest
import torch

from mmsora.diffusion import (
    ClassifierFree,
    DiscretePath,
    LearnedRange,
    NoisePrediction,
    Opinions,
)
from mmsora.models.layers.embedding import sinusoid
from mmsora.registry import DENOISERS
from mmsora.utils.checkpoint import load_denoiser

DIT = dict(
    mean=0.07376158834870239, std=1.0239926074435213, norm=65.70533223972173,
    values=[-1.675066, -1.537299, 0.4967065, 0.3724996, -1.120723, 2.198881, -1.21813, -0.7173571],
)  # fmt: skip
DIT_GUIDED = dict(
    mean=-0.0536090930802402, std=1.1411786820127807, norm=103.40161021572949,
    values=[-3.12129, -1.776887, 1.059206, 1.242046, -3.12129, 0.347302, -1.21813, -0.7173569],
)  # fmt: skip
LATTE = dict(
    mean=0.08575615317281897, std=1.061908670800869, norm=167.0145557028641,
    values=[-2.268086, 0.3632447, -0.6856552, -0.5323491, -1.630309, -2.709052, -0.1882104,
            1.282777],
)  # fmt: skip
LATTE_CLASSES = dict(
    mean=0.09688056869582813, std=1.053340138934142, norm=165.8263065193048,
    values=[-2.219411, 0.1559993, -0.729251, -0.4356697, -1.470174, -2.56329, -0.0691615,
            1.186971],
)  # fmt: skip
LATTE_TEXT = dict(
    mean=0.18262485747290688, std=1.0902935709570873, norm=173.30357978510688,
    values=[-1.409118, 0.2084452, -1.075821, -0.6080509, -1.078079, -1.752379, 0.1264507,
            0.531103],
)  # fmt: skip
LATTE_IMAGES = dict(
    mean=0.08478138346997513, std=1.0605518003293064, norm=204.2755488685129,
    values=[0.4642742, 1.748581, 1.14701, -0.7334355, -1.482727, -2.235956, 0.3809772,
            -0.9311832],
)  # fmt: skip
# The original's `flash` mode forgot to transpose heads. Nobody should agree with it.
WRONG = [
    -2.267948, 0.7032849, -0.6392904, -0.04497976, -1.885775, -2.439303, -0.1848107, 0.8917177,
]  # fmt: skip
POSITIONS = dict(
    mean=0.4834084673610353, std=0.5160583810799434, norm=55.42562578673401,
    values=[0.0, 0.0, 0.006812868, 0.9731902, 0.0, 0.01077196, 0.9999989, 0.9999995],
)  # fmt: skip
FRAMES = dict(
    mean=0.5000137923042556, std=0.4999862080125097, norm=16.970562760309207,
    values=[0.0, 0.0, 1.0, 0.9092974, 0.14112, -0.7568025, 0.9999997, 0.9999998],
)  # fmt: skip
CLOCK = dict(
    mean=0.4420702992243939, std=0.5518820989240703, norm=22.62741701084866,
    values=[1.0, 1.0, 0.0, 0.9999976, 0.9996498, -0.9989132, 5.773908e-05, 5.373038e-05],
)  # fmt: skip


def build(kind, frames=1, num_classes=0, **more):
    sizes = dict(in_channels=4, out_channels=8, size=(frames, 16, 16), patch=2, width=96, depth=4)
    config = dict(type=kind, **sizes, heads=4, num_classes=num_classes, **more)
    return DENOISERS.build(config).eval()


@pytest.fixture
def dit(public_weights):
    model = build("DiT", num_classes=10)
    assert load_denoiser(model, public_weights("dit_small")) == ([], [], [])
    return model


def probes(x):
    count = x.numel()
    places = [0, 1, count // 7, count // 3, count // 2, 2 * count // 3, count - 2, count - 1]
    return x.flatten()[places]


def assert_golden(x, golden):
    assert probes(x).tolist() == pytest.approx(golden["values"], abs=2e-5)
    assert x.norm().item() == pytest.approx(golden["norm"], rel=1e-6)
    assert x.mean().item() == pytest.approx(golden["mean"], abs=1e-6)
    assert x.std(correction=0).item() == pytest.approx(golden["std"], rel=1e-5)


def test_the_fill_is_the_published_one(filled):
    first = [0.7645895420974334, 0.17385800957042408, 0.7017752206560286, 0.4005131513570628]
    assert filled("x", (4,), 1.0).tolist() == pytest.approx(first, abs=1e-7)


@torch.no_grad()
def test_dit(dit, filled):
    x = filled("x", (2, 4, 16, 16)).unsqueeze(2)
    out = dit(x, torch.tensor([7.0, 543.0]), label=torch.tensor([3, 10])).squeeze(2)
    assert out.shape == (2, 8, 16, 16)
    assert_golden(out, DIT)
    assert sum(weight.numel() for weight in dit.parameters()) + dit.pos_embed.numel() == 733_856


@torch.no_grad()
def test_dit_guided_on_three_channels(dit, filled):
    """There [x, x] goes in; the guided channels of both halves are equal, the others their own."""
    x = filled("x", (2, 4, 16, 16)).unsqueeze(2)
    path, prediction = DiscretePath(), LearnedRange(NoisePrediction())
    level = path.at(torch.tensor(543.0), x)

    def opinion(label):
        return lambda x, level: dit(x, level.t.float().expand(2), label=torch.tensor(label))

    def read(x, output, level):
        return prediction.estimate(path, x, output, level)

    first, second = opinion([3, 7]), opinion([10, 10])
    opinions = Opinions(first, lambda x, level: (first(x, level), second(x, level)), read)
    guided = ClassifierFree(scale=4.0, channels=3)(opinions)(x, level)
    cond = torch.cat([guided.noise, 2 * guided.log_var_mix - 1], dim=1)
    null = torch.cat([cond[:, :3], second(x, level)[:, 3:]], dim=1)
    assert_golden(torch.cat([cond, null]).squeeze(2), DIT_GUIDED)
    torch.testing.assert_close(guided.x0, (x - level.sigma * guided.noise) / level.alpha)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "num_classes", "golden"),
    [("latte_small_uncond", 0, LATTE), ("latte_small_class", 10, LATTE_CLASSES)],
    ids=["none", "classes"],
)
def test_latte(public_weights, filled, case, num_classes, golden):
    model = build("Latte", 6, num_classes)
    assert load_denoiser(model, public_weights(case)) == ([], [], [])
    x = filled("xv", (2, 6, 4, 16, 16)).transpose(1, 2)
    label = {"label": torch.tensor([3, 10])} if num_classes else {}
    out = model(x, torch.tensor([7.0, 543.0]), **label).transpose(1, 2)
    assert out.shape == (2, 6, 8, 16, 16)
    assert_golden(out, golden)
    assert abs(probes(out) - torch.tensor(WRONG)).max() > 0.1


@torch.no_grad()
def test_latte_told_a_text(public_weights, filled):
    model = build("Latte", 6, text=(77, 768))
    assert load_denoiser(model, public_weights("latte_small_text78")) == ([], [], [])
    x, text = filled("xv", (2, 6, 4, 16, 16)).transpose(1, 2), filled("txt", (2, 77, 768))
    out = model(x, torch.tensor([7.0, 543.0]), text=text).transpose(1, 2)
    assert out.shape == (2, 6, 8, 16, 16)
    assert_golden(out, LATTE_TEXT)


def test_texts_begin_anew_where_a_checkpoint_knows_none(public_weights):
    """And are left out where the model knows none; those of another encoder do not fit."""
    ours = ["embed_text.weight", "embed_text.bias"]
    model = build("Latte", 6, text=(77, 768))
    report = load_denoiser(model, public_weights("latte_small_class"))
    assert (report.kept, report.unused) == (ours, ["embed_label.weight"])
    report = load_denoiser(build("Latte", 6), public_weights("latte_small_text78"))
    assert (report.kept, report.unused) == ([], ours)
    model = build("Latte", 6, text=(77, 512))
    report = load_denoiser(model, public_weights("latte_small_text78"))
    assert (report.kept, report.unused) == (ours[:1], ours[:1])


@torch.no_grad()
def test_latte_with_three_images_beside_the_clip(public_weights, filled):
    model, clock = build("Latte", 6), torch.tensor([7.0, 543.0])
    assert load_denoiser(model, public_weights("latte_small_uncond")) == ([], [], [])
    x = filled("xi", (2, 9, 4, 16, 16)).transpose(1, 2)
    out = model(x, clock, num_images=3)
    assert out.transpose(1, 2).shape == (2, 9, 8, 16, 16)
    assert_golden(out.transpose(1, 2), LATTE_IMAGES)
    torch.testing.assert_close(out[:, :, :6], model(x[:, :, :6], clock), atol=1e-5, rtol=0)


@torch.no_grad()
def test_latte_with_labelled_images_trained_without_dropout(public_weights, filled):
    """A label table of ten rows; each image as if it were a clip of one frame in a DiT's eyes."""
    model, clock = build("Latte", 6, 10), torch.tensor([7.0, 543.0])
    load_denoiser(model, public_weights("latte_small_class", rows=10))
    assert not model.knows_null
    x = filled("xi", (2, 9, 4, 16, 16)).transpose(1, 2)
    label, of_images = torch.tensor([3, 9]), torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = model.train()(x, clock, label, num_images=3, image_label=of_images)
    clip = model(x[:, :, :6], clock, label)
    torch.testing.assert_close(out[:, :, :6], clip, atol=1e-5, rtol=0)
    spatial = build("DiT", 1, 10)
    spatial.blocks = spatial.blocks[:2]
    kept = {k.replace("blocks.2.", "blocks.1."): v for k, v in model.state_dict().items()
            if "blocks.1." not in k and "blocks.3." not in k}  # fmt: skip
    spatial.load_state_dict({k: v for k, v in kept.items() if k != "temp_embed"})
    for i in range(3):
        image = spatial(x[:, :, 6 + i : 7 + i], clock, of_images[:, i])
        torch.testing.assert_close(out[:, :, 6 + i : 7 + i], image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["DiT", "Latte"])
def test_positions(kind):
    """Computed, not loaded."""
    model = build(kind, 6)
    assert_golden(model.pos_embed, POSITIONS)
    if kind == "Latte":
        assert_golden(model.temp_embed, FRAMES)


def test_clock():
    embedded = sinusoid(torch.tensor([0.0, 1.0, 999.0, 0.5]), 256)
    assert_golden(embedded, CLOCK)


@pytest.mark.parametrize(("case", "kind", "frames"), [
    ("dit_s8", "DiT", 1), ("latte_s8_uncond", "Latte", 16),
])  # fmt: skip
def test_a_published_size_takes_every_public_weight(public_weights, case, kind, frames):
    sizes = dict(in_channels=4, out_channels=8, size=(frames, 32, 32), patch=8, width=384)
    classes = 1000 if kind == "DiT" else 0
    model = DENOISERS.build(dict(type=kind, **sizes, depth=12, heads=6, num_classes=classes))
    weights = public_weights(case)
    assert load_denoiser(model, weights) == ([], [], [])
    total = sum(weight.double().sum() for weight in model.state_dict().values())
    assert total.item() == pytest.approx(sum(v.double().sum().item() for v in weights.values()))

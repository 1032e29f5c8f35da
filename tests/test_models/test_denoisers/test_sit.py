"""SiT is DiT's network under another process: public weights, sizes, and every combination."""

import itertools

import pytest
import torch
from mmengine.registry import init_default_scope

from mmsora.models import DINOv2, DiT, RepresentationAlignment
from mmsora.registry import DENOISERS, MODELS, SCHEDULERS
from mmsora.utils.checkpoint import load_denoiser
from mmsora.utils.config_check import apply_overrides, check_config
from mmsora.utils.config_names import load_config
from mmsora.utils.draws import Draws

# Outputs of the authors' code, (2, 4, 16, 16), for weights and inputs that go by their names.
LEARNED_SIGMA = dict(
    mean=-0.04569753123155351, std=1.0031732417968096, norm=45.44551667735343,
    values=[-1.409107, -1.558969, -0.9753631, 0.3692161, -1.154335, 0.7753045, 0.5259366,
            -0.2352955],
)  # fmt: skip
NO_SIGMA = dict(
    mean=0.06444906572073705, std=0.9958493918876326, norm=45.1612791235308,
    values=[-1.409107, 0.8868333, -0.9753631, 0.3692161, -1.154335, -0.9614485, 0.4682876,
            -0.237165],
)  # fmt: skip
PROJECTOR = {"0": (64, 96), "2": (64, 64), "4": (48, 64)}
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
PATHS = ("LinearPath", "TrigPath", "VPPath")
PREDICTIONS = ("VelocityPrediction", "NoisePrediction", "ScorePrediction")


def build(out_channels=4):
    sizes = dict(in_channels=4, size=(1, 16, 16), patch=2, width=96, depth=4, heads=4)
    return DENOISERS.build(
        dict(type="DiT", out_channels=out_channels, num_classes=10, **sizes)
    ).eval()


@pytest.fixture
def no_sigma(public_weights, filled):
    weights = public_weights("dit_small")
    weights["final_layer.linear.weight"] = filled(
        "final_layer.linear.weight", (16, 96), (3 / 96) ** 0.5
    )
    weights["final_layer.linear.bias"] = filled("final_layer.linear.bias", (16,), 0.1)
    return weights


@pytest.fixture
def repa(no_sigma, filled):
    for place, shape in PROJECTOR.items():
        name = f"projectors.0.{place}"
        no_sigma[f"{name}.weight"] = filled(f"{name}.weight", shape, (3 / shape[1]) ** 0.5)
        no_sigma[f"{name}.bias"] = filled(f"{name}.bias", shape[:1], 0.1)
    return no_sigma


def told(filled):
    x = filled("x", (2, 4, 16, 16)).unsqueeze(2)
    return x, torch.tensor([0.25, 0.9]), torch.tensor([3, 10])


def assert_golden(out, golden):
    out = out.squeeze(2)
    assert out.shape == (2, 4, 16, 16)
    values = out.flatten()[[0, 1, 292, 682, 1024, 1365, 2046, 2047]].tolist()
    assert values == pytest.approx(golden["values"], abs=2e-5)
    assert out.norm().item() == pytest.approx(golden["norm"], rel=1e-6)
    assert out.mean().item() == pytest.approx(golden["mean"], abs=1e-6)
    assert out.std(correction=0).item() == pytest.approx(golden["std"], rel=1e-5)


@torch.no_grad()
def test_public_weights_with_a_learned_sigma(public_weights, filled):
    model = build()
    report = load_denoiser(model, public_weights("dit_small"))
    assert report.changed == [
        "head.weight (32, 96) -> (16, 96) (the variance is left out)",
        "head.bias (32,) -> (16,) (the variance is left out)",
    ]
    assert (report.kept, report.unused) == ([], [])
    assert_golden(model(*told(filled)), LEARNED_SIGMA)


@torch.no_grad()
def test_public_weights_without_one(no_sigma, filled):
    model = build()
    assert load_denoiser(model, no_sigma) == ([], [], [])
    assert_golden(model(*told(filled)), NO_SIGMA)


@torch.no_grad()
@pytest.mark.parametrize("legacy", [False, True])
def test_public_weights_of_repa(repa, filled, legacy):
    if legacy:  # its first files count the blocks after the projector anew
        renamed = {}
        for key, value in repa.items():
            for i in (2, 3):
                key = key.replace(f"blocks.{i}.", f"decoder_blocks.{i - 2}.")
            renamed[key] = value
        assert not any(key.startswith("blocks.2.") for key in renamed)
        repa = renamed
    model, encoder = build(), dict(type=DINOv2, folder="nowhere", width=48)
    projector = RepresentationAlignment(encoder, 96, 2, 64).projector
    report = load_denoiser(model, {"ema": repa}, projector=projector)
    assert report == ([], [], [])
    assert_golden(model(*told(filled)), NO_SIGMA)
    for place in PROJECTOR:
        for kind in "weight", "bias":
            loaded = projector.state_dict()[f"{place}.{kind}"]
            assert torch.equal(loaded, repa[f"projectors.0.{place}.{kind}"])


def test_a_projector_that_does_not_fit_stays_ours(repa):
    projector = RepresentationAlignment(
        dict(type=DINOv2, folder="nowhere", width=32), 96, 2, 64
    ).projector
    before = {key: value.clone() for key, value in projector.state_dict().items()}
    report = load_denoiser(build(), repa, projector=projector)
    assert report.kept == ["alignment.projector"]
    names = [f"projectors.0.{i}.{kind}" for i in PROJECTOR for kind in ("weight", "bias")]
    assert report.unused == names
    assert all(torch.equal(value, before[key]) for key, value in projector.state_dict().items())
    assert load_denoiser(build(), repa).unused == names


def process(config, **parts):
    cfg = load_config(config)
    apply_overrides(cfg, {f"model.diffusion.{key}": value for key, value in parts.items()})
    init_default_scope("mmsora")
    return SCHEDULERS.build(cfg.model.diffusion)


@torch.no_grad()
def test_sit_counts_time_from_noise_to_data(filled):
    """``x = s data + (1 - s) noise`` and ``v = data - noise`` at the ``s`` that it is told."""
    x0, noise = filled("x0", (2, 4, 1, 6, 10)), filled("noise", (2, 4, 1, 6, 10))
    diffusion, seen = process("sit_xl2_imagenet_256"), []
    t = torch.tensor([0.75, 0.1], dtype=torch.float64)
    s = (1 - t).float().reshape(2, 1, 1, 1, 1)

    def network(x, clock):
        torch.testing.assert_close(x, s * x0 + (1 - s) * noise)
        seen.append(clock)
        return x0 - noise

    level = diffusion.path.at(t, x0)
    x = level.alpha * x0 + level.sigma * noise
    output = diffusion.output(network, x, level, {})
    assert seen[0].tolist() == pytest.approx([0.25, 0.9])
    estimate = diffusion.prediction.estimate(diffusion.path, x, output, level)
    torch.testing.assert_close(estimate.x0, x0)
    torch.testing.assert_close(estimate.noise, noise)
    target = diffusion.prediction.target(diffusion.path, x0, noise, level)
    torch.testing.assert_close(target, x0 - noise)


def test_repa_is_sit_with_time_and_velocity_reversed(filled):
    """``v_SiT(x, s) = -v_REPA(x, 1 - s)``: the same losses and the same samples."""
    x0 = filled("x0", (3, 4, 1, 6, 10))

    def repa_network(x, clock):
        return (x * (1 + clock.reshape(-1, 1, 1, 1, 1))).cos()

    def sit_network(x, clock):
        return -repa_network(x, 1 - clock)

    parts = {"guidance.scale": 1.0, "grid.num_steps": 4}
    sit, repa = (process(f"sit_xl2_{name}imagenet_256", **parts) for name in ("", "repa_"))
    draws = Draws(0, [4, 1, 9], 2)
    loss = sit.loss(sit_network, x0, {}, draws)
    torch.testing.assert_close(repa.loss(repa_network, x0, {}, draws), loss)
    sample = sit.sample(sit_network, x0, {}, None, draws)
    torch.testing.assert_close(repa.sample(repa_network, x0, {}, None, draws), sample)
    assert (repa.loss(sit_network, x0, {}, draws) - loss).abs().min() > 0.01


def test_published_parameters():
    """DiT's without the rows of the last layer that say the variance."""
    dit = {"S": 32_865_056, "B": 130_315_808, "L": 457_840_672, "XL": 674_834_720}
    for size, (width, depth, heads) in SIZES.items():
        with torch.device("meta"):
            model = DiT(4, 4, (1, 32, 32), 2, width, depth, heads, 1000)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == dit[size] - 16 * (width + 1)


def options(path, prediction):
    """What the config's docstring says."""
    chosen = {"path.type": path}
    if prediction != "VelocityPrediction":
        chosen |= {"prediction._delete_": True, "prediction.type": prediction}
        if path != "VPPath":
            chosen["path.span"] = (0.001, 0.999)
    return {f"model.diffusion.{key}": value for key, value in chosen.items()}


@pytest.mark.parametrize(("path", "prediction"), [*itertools.product(PATHS, PREDICTIONS)])
def test_every_combination_builds_trains_and_samples(path, prediction):
    init_default_scope("mmsora")
    for size, (width, depth, heads) in SIZES.items():
        cfg = load_config(f"sit_{'xl2' if size == 'XL' else 's2'}_imagenet_256")
        sizes = dict(width=width, depth=depth, heads=heads)
        apply_overrides(cfg, {f"model.denoiser.{k}": v for k, v in sizes.items()})
        apply_overrides(cfg, options(path, prediction))
        check_config(cfg)
        cfg.model.vae = dict(type="IdentityVAE")
        with torch.device("meta"):
            model = MODELS.build(cfg.model)
            out = model.denoiser(torch.empty(2, 4, 1, 32, 32), torch.empty(2), torch.ones(2).int())
        assert out.shape == (2, 4, 1, 32, 32)

    tiny = dict(width=24, depth=1, heads=3, size=(1, 6, 10))
    apply_overrides(cfg, {f"model.denoiser.{k}": v for k, v in tiny.items()})
    apply_overrides(cfg, {"model.diffusion.grid.num_steps": 3})
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    torch.nn.init.normal_(model.denoiser.head.weight, std=0.1)
    torch.nn.init.normal_(model.denoiser.ada.linear.weight, std=0.1)
    x0, draws = torch.randn(3, 4, 1, 6, 10), Draws(0, [4, 1, 9], 2)
    cond = {"label": torch.tensor([3, 1000, 7])}
    loss = model.diffusion.loss(model.denoiser, x0, cond, draws)
    assert loss.shape == (3,)
    assert loss.isfinite().all()
    assert loss.min() > 0.1
    null = {"label": torch.full((3,), 1000)}
    sample = model.diffusion.sample(model.denoiser, x0, cond, null, draws)
    assert sample.isfinite().all()

"""Low-rank additions to a denoiser."""

import copy
import sys

import pytest
import torch

from mmsora.apis import Inferencer
from mmsora.registry import DENOISERS, RUNNERS
from mmsora.utils.checkpoint import load_checkpoint, load_denoiser
from mmsora.utils.config_check import config_dict
from mmsora.utils.user_error import UserError

pytest.importorskip("peft")

DIT = dict(
    type="DiT", in_channels=3, out_channels=6, size=(2, 4, 6), patch=2, width=16, depth=3, heads=2,
    num_classes=7,
)  # fmt: skip
CASCADE = dict(
    type="StableCascade", in_channels=3, out_channels=5, size=(1, 4, 6),
    levels=[dict(width=8, depth=1, heads=2), dict(width=12, depth=2, heads=3)],
    conditions=dict(width=10, pooled=6), num_classes=7,
)  # fmt: skip
VIDEO = dict(
    type="ImageToVideo", image=CASCADE, after={r"up_blocks\.0\.[25]": 12}, layout="(b t) c h w",
    frames=2, layer=dict(heads=3),
)  # fmt: skip
CASES = {
    "dit": (DIT, r"blocks\.\d\.attn\.(qkv|proj)"),
    "cascade": (CASCADE, r".*\.attention\.to_(q|k|v|out\.0)"),
    "convolutions": (CASCADE, r"embedding\.1|clf\.1|down_blocks\.\d\.0\.channelwise\.0"),
    "video": (VIDEO, r".*\.attention\.to_[qv]"),
}
each_case = pytest.mark.parametrize(("denoiser", "modules"), CASES.values(), ids=CASES)


def inputs():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 2, 4, 6, generator=draw)
    return x, torch.tensor([0.1, 0.55, 0.9]), torch.tensor([6, 2, 0])


def outputs(model):
    x, clock, label = inputs()
    with torch.no_grad():
        return model(x, clock, label=label)


def plain(denoiser, fill_weights):
    return fill_weights(DENOISERS.build(copy.deepcopy(denoiser))).eval()


def adapted(denoiser, modules, weights, **options):
    torch.manual_seed(3)
    model = DENOISERS.build(
        dict(type="LoRA", denoiser=copy.deepcopy(denoiser), modules=modules, **options)
    )
    load_denoiser(model, weights)
    return model.eval()


def moved(model):
    """Additions as training could leave them."""
    torch.manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@each_case
def test_it_is_the_denoiser_until_it_is_trained_and_merges_afterwards(
    denoiser, modules, fill_weights
):
    base = plain(denoiser, fill_weights)
    model = adapted(denoiser, modules, base.state_dict(), rank=3, alpha=2.0)
    before = outputs(base)
    assert torch.equal(outputs(model), before)
    changed = outputs(moved(model))
    assert (changed - before).abs().max() > 0.1
    merged = model.merged()
    assert set(merged) == set(base.state_dict())
    alone = plain(denoiser, fill_weights)
    alone.load_state_dict(merged)
    torch.testing.assert_close(outputs(alone), changed, rtol=0, atol=2e-5)
    assert torch.equal(outputs(model), changed), "merging changes nothing here"


def test_an_addition_is_alpha_over_rank_times_the_product(fill_weights):
    base = plain(DIT, fill_weights)
    model = moved(adapted(DIT, r"blocks\.1\.attn\.qkv", base.state_dict(), rank=2, alpha=3.0))
    state = model.state_dict()
    place = "base.blocks.1.attn.qkv"
    down, up = (state[f"{place}.lora_{name}.default.weight"] for name in "AB")
    assert down.shape == (2, 16)
    assert up.shape == (48, 2)
    expected = base.state_dict()["blocks.1.attn.qkv.weight"] + 3 / 2 * up @ down
    torch.testing.assert_close(model.merged()["blocks.1.attn.qkv.weight"], expected)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{place}.lora_{name}.default.weight" for name in "AB"]


@each_case
def test_training_moves_the_additions_alone(denoiser, modules, fill_weights):
    base = plain(denoiser, fill_weights)
    model = adapted(denoiser, modules, base.state_dict()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, clock, label = inputs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x, clock, label=label).square().mean().backward()
        optimizer.step()
    after = model.state_dict()
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed == {k for k in after if "lora_" in k}
    with model.bare() as inner:
        weights = inner.state_dict()
        assert all(torch.equal(weights[k], v) for k, v in base.state_dict().items())


@pytest.mark.parametrize("nested", ["ema", "state_dict"])
def test_its_own_checkpoint_comes_back(nested, fill_weights):
    base = plain(CASCADE, fill_weights)
    modules = CASES["cascade"][1]
    model = moved(adapted(CASCADE, modules, base.state_dict()))
    state, prefix = model.state_dict(), "denoiser." if nested == "state_dict" else ""
    content = {nested: {f"{prefix}{key}": value for key, value in state.items()}}
    again = adapted(CASCADE, modules, content)
    assert torch.equal(outputs(again), outputs(model))


def test_what_is_asked_of_a_denoiser_the_one_within_answers():
    model = DENOISERS.build(dict(type="LoRA", denoiser=VIDEO, modules=r".*\.to_q"))
    assert (model.in_channels, model.size, model.num_classes) == (3, (2, 4, 6), 7)
    assert model.takes_images
    with pytest.raises(AttributeError, match="no_such"):
        _ = model.no_such


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(modules="blocks.9"), "matches no module of DiT; there are .*embed"),
        (dict(modules=r"blocks\.0"), "matches blocks.0, a .*linear layers and convolutions"),
        (dict(modules=r"blocks\.0\.attn\.qkv", rank=0), "rank must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DENOISERS.build(dict(type="LoRA", denoiser=copy.deepcopy(DIT), **options))


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="LoRA needs peft: pip install peft"):
        DENOISERS.build(dict(type="LoRA", denoiser=copy.deepcopy(DIT), modules=".*qkv"))


def test_a_run_trains_them_from_a_file_and_its_checkpoint_samples(tiny_config, tiny_run):
    latte = config_dict(tiny_config())["model"]["denoiser"]
    lora = dict(type="LoRA", denoiser=latte, modules=".*attn[.](qkv|proj)", rank=2)
    cfg = tiny_config(
        {"model.denoiser": lora, "train_cfg.max_iters": 3, "param_scheduler.1.end": 3}
    )
    cfg.load_from = str(tiny_run / "iter_6")
    RUNNERS.build(cfg).train()
    videos = Inferencer(f"{cfg.work_dir}/iter_3")(labels=[3, 7])
    before = Inferencer(tiny_run / "iter_6")(labels=[3, 7])
    assert videos.shape == before.shape
    state = load_checkpoint(f"{cfg.work_dir}/iter_3")["ema"]
    start = load_checkpoint(tiny_run / "iter_6")["ema"]
    assert torch.equal(state["base.head.weight"], start["head.weight"])
    added = [key for key in state if "lora_B" in key]
    assert len(added) == 4
    assert all(state[key].any() for key in added)

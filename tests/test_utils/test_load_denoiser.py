"""Public weights, and ours, into a denoiser: what is cut, resized, kept, and what is refused."""

import argparse
import json

import pytest
import torch
from mmengine.registry import init_default_scope
from safetensors.torch import save_file

from mmsora.apis import Inferencer
from mmsora.registry import DENOISERS, MODELS, RUNNERS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.checkpoint import LoadReport, load_checkpoint, load_denoiser, save_checkpoint
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import probe_video

DIFFUSION = dict(
    type="Diffusion",
    path=dict(type="DiscretePath"),
    prediction=dict(type="LearnedRange", mean=dict(type="NoisePrediction")),
    train_times=dict(type="UniformTimes"),
    solver=dict(type="Ancestral"),
    grid=dict(type="SpacedGrid", num_steps=2),
    guidance=dict(type="ClassifierFree", scale=1.0),
    loss=dict(type="Hybrid"),
)


def build(kind="DiT", **changes):
    frames = 6 if kind == "Latte" else 1
    options = dict(
        in_channels=4, out_channels=8, size=(frames, 16, 16), patch=2, width=96, depth=4, heads=4,
        num_classes=10,
    )  # fmt: skip
    torch.manual_seed(0)
    return DENOISERS.build(dict(type=kind, **options | changes)).eval()


def diffusion_model(scale=1.0, drop_prob=0.0, **changes):
    init_default_scope("mmsora")
    sizes = dict(in_channels=4, out_channels=8, size=(1, 16, 16), patch=2, width=96, depth=4)
    diffusion = dict(DIFFUSION, guidance=dict(type="ClassifierFree", scale=scale))
    return MODELS.build(
        dict(
            type="LatentDiffusion",
            denoiser=dict(type="DiT", **sizes, heads=4, num_classes=10),
            diffusion=diffusion,
            vae=dict(type="IdentityVAE"),
            conditioner=dict(type="LabelConditioner", num_classes=10, drop_prob=drop_prob),
            **changes,
        )
    )


def inputs(filled, frames=1):
    x = filled("x", (2, 4, 16, 16)).unsqueeze(2).expand(-1, -1, frames, -1, -1)
    return x, torch.tensor([7.0, 543.0]), torch.tensor([3, 9])


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


# Containers


def other(weights):
    return {key: value + 1 for key, value in weights.items()}


CONTAINERS = {
    "raw": lambda w: w,
    "ema": lambda w: {"ema": w},
    "model": lambda w: {"model": w},
    "all": lambda w: {
        "model": other(w), "ema": w, "opt": {"state": {0: {"step": torch.tensor(3.0)}}},
        "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4, image_size=256),
    },
    "wrapped": lambda w: {f"module.{key}": value for key, value in w.items()},
    "ema of wrapped": lambda w: {"ema": {f"module.{key}": value for key, value in w.items()}},
}  # fmt: skip


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("from_file", [True, False])
def test_containers(public_weights, tmp_path, container, from_file):
    weights = public_weights("dit_small")
    expected, model = build(), build()
    load_denoiser(expected, weights)
    assert torch.equal(expected.embed_label.weight, weights["y_embedder.embedding_table.weight"])
    content = container(weights)
    if from_file:
        torch.save(content, tmp_path / "public.pt")
    report = load_denoiser(model, tmp_path / "public.pt" if from_file else content)
    assert report == ([], [], [])
    assert_same(model.state_dict(), expected.state_dict())
    assert model.knows_null


def test_a_safetensors_file(public_weights, tmp_path):
    weights = public_weights("latte_small_class")
    save_file(weights, tmp_path / "public.safetensors")
    model, expected = build("Latte"), build("Latte")
    assert load_denoiser(model, str(tmp_path / "public.safetensors")) == ([], [], [])
    load_denoiser(expected, weights)
    assert_same(model.state_dict(), expected.state_dict())


def test_our_own_checkpoint(fill_weights, tmp_path):
    """The average, where there is one; only the denoiser of a whole model."""
    model, average = diffusion_model(), build()
    fill_weights(model)
    state = {**model.state_dict(), "vae.weight": torch.ones(1)}
    loaded = build()
    save_checkpoint({"meta": {}, "state_dict": state}, tmp_path / "iter_1.pth")
    assert load_denoiser(loaded, tmp_path / "iter_1.pth") == ([], [], [])
    assert_same(loaded.state_dict(), model.denoiser.state_dict())
    content = {"meta": {}, "state_dict": state, "ema": average.state_dict()}
    assert load_denoiser(loaded, content) == ([], [], [])
    assert_same(loaded.state_dict(), average.state_dict())


def test_our_own_table_of_a_grid_that_is_not_square(fill_weights):
    trained = fill_weights(build(size=(1, 8, 32)))  # 4 x 16 tokens: as many as 8 x 8
    trained.pos_embed.mul_(1.01)
    loaded = build(size=(1, 8, 32))
    assert load_denoiser(loaded, trained.state_dict()) == ([], [], [])
    assert torch.equal(loaded.pos_embed, trained.pos_embed)


# What may differ


@torch.no_grad()
@pytest.mark.parametrize("patch", [2, 4])
def test_outputs_of_a_learned_variance_are_dropped(public_weights, filled, patch):
    weights = public_weights("dit_small")
    if patch == 4:
        for name in "x_embedder.proj.weight", "final_layer.linear.weight":
            shape = list(weights[name].shape)
            weights[name] = filled(
                name, [4 * shape[0], 96] if "final" in name else [96, 4, 4, 4], shape[1] ** -0.5
            )
        weights["final_layer.linear.bias"] = filled("bias", [128], 0.1)
        del weights["pos_embed"]
    learned, plain = build(patch=patch), build(patch=patch, out_channels=4)
    load_denoiser(learned, weights)
    report = load_denoiser(plain, weights)
    rows = 8 * patch**2
    cut = [f"head.weight ({rows}, 96) -> ({rows // 2}, 96)", f"head.bias ({rows},) -> "]
    assert [line[: len(start)] for line, start in zip(report.changed, cut, strict=False)] == cut
    assert (report.kept, report.unused) == ([] if patch == 2 else ["pos_embed"], [])
    out = plain(*inputs(filled))
    torch.testing.assert_close(out, learned(*inputs(filled))[:, :4], rtol=0, atol=1e-6)
    if patch == 2:  # the golden's: label 3 is the first sample's in both
        published = [-1.675066, -1.537299]
        assert out.flatten()[:2].tolist() == pytest.approx(published, abs=2e-5)


@torch.no_grad()
def test_a_label_table_without_a_row_for_none(public_weights, filled):
    weights = public_weights("dit_small", rows=10)
    with_null = public_weights("dit_small")
    key = "y_embedder.embedding_table.weight"
    assert torch.equal(with_null[key][:10], weights[key])  # the fill goes by place
    model, expected = build(), build()
    null = model.embed_label.weight[-1].clone()
    parameter = model.embed_label.weight
    report = load_denoiser(model, weights)
    assert report == (["embed_label.weight (10, 96) -> (11, 96)"], [], [])
    assert model.embed_label.weight is parameter  # an optimizer knows it
    assert torch.equal(parameter[-1], null)
    assert not model.knows_null
    load_denoiser(expected, with_null)
    assert torch.equal(model(*inputs(filled)), expected(*inputs(filled)))
    load_denoiser(model, with_null)
    assert model.knows_null


def test_without_a_row_for_none_there_is_no_guidance(public_weights):
    samples = [VideoSample(index=0, label=3), VideoSample(index=1, label=9)]
    weights, with_null = (public_weights("dit_small", rows=rows) for rows in (10, 11))
    guided, plain, expected = diffusion_model(4.0), diffusion_model(1.0), diffusion_model(1.0)
    for model, content in (guided, weights), (plain, weights), (expected, with_null):
        load_denoiser(model.denoiser, content)
    with pytest.raises(ValueError, match="without label dropout .* cannot be guided; .* 1$"):
        guided.predict(samples)
    assert torch.equal(plain.predict(samples), expected.predict(samples))


@pytest.mark.parametrize(("classes", "kept"), [
    (0, ["temp_embed"]),
    (101, ["embed_label.weight", "temp_embed"]),
    (10, ["temp_embed"]),
])  # fmt: skip
def test_latte_starts_from_dit(public_weights, classes, kept):
    model, weights = build("Latte", num_classes=classes), public_weights("dit_small")
    own = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_denoiser(model, weights)
    assert sorted(report.kept) == kept
    assert report.changed == []
    assert report.unused == ([] if classes == 10 else ["embed_label.weight"])
    for key, value in model.state_dict().items():
        untouched = torch.equal(value, own[key]) and key != "pos_embed"
        assert untouched == (key in kept), key
    assert torch.equal(model.blocks[1].attn.qkv.weight, weights["blocks.1.attn.qkv.weight"])


@torch.no_grad()
def test_dit_takes_no_frames_of_latte(public_weights):
    report = load_denoiser(build(), public_weights("latte_small_class"))
    assert report == ([], [], ["temp_embed"])


def test_another_number_of_classes_keeps_ours_and_says_so(public_weights):
    model = build(num_classes=3)
    own = model.embed_label.weight.detach().clone()
    report = load_denoiser(model, public_weights("dit_small"))
    assert report == ([], ["embed_label.weight"], ["embed_label.weight"])
    assert torch.equal(model.embed_label.weight, own)
    assert model.knows_null
    assert not torch.equal(model.head.weight, build(num_classes=3).head.weight)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 16, 24), (1, 8, 32), (1, 32, 32)])
def test_positions_are_resized_for_another_size(public_weights, size):
    weights = public_weights("dit_small")
    model = build(size=size)
    rows, columns = model.grid[1:]
    report = load_denoiser(model, weights)
    assert report.changed == [f"pos_embed (1, 64, 96) -> ({rows * columns}, 96)"]
    table = model.pos_embed.reshape(rows, columns, 96)
    source = weights["pos_embed"].reshape(8, 8, 96)
    # Our tokens lie at these places of their grid. The slowest sines are all but linear in the
    # place: of the columns in channel 23, of the rows in channel 71.
    for channel, count, ours, theirs in (
        (71, rows, table[:, 1], source[:, 1]), (23, columns, table[1], source[1]),
    ):  # fmt: skip
        places = (torch.arange(count) + 0.5) * 8 / count - 0.5
        inner = (places >= 1) & (places <= 6)
        assert inner.sum() >= 2
        slope = theirs[1, channel] - theirs[0, channel]
        error = ours[inner, channel] - slope * places[inner]
        assert error.abs().max() < 0.05 * slope  # a twentieth of a place


def test_frames_are_resized_for_another_length(public_weights):
    weights = public_weights("latte_small_class")
    model = build("Latte", size=(11, 16, 16))
    report = load_denoiser(model, weights)
    assert report.changed == ["temp_embed (1, 6, 96) -> (11, 96)"]
    table = weights["temp_embed"][0]
    torch.testing.assert_close(model.temp_embed[::2], table)
    torch.testing.assert_close(model.temp_embed[1], (table[0] + table[1]) / 2)


@torch.no_grad()
def test_a_checkpoints_own_tables_are_taken_at_their_own_size(public_weights):
    """Those of a long-trained average are not exactly sines any more."""
    weights = public_weights("latte_small_class")
    for name in "pos_embed", "temp_embed":
        weights[name] = weights[name] * 1.1 + 0.01
    model = build("Latte")
    assert load_denoiser(model, weights) == ([], [], [])
    for name in "pos_embed", "temp_embed":
        assert torch.equal(model.get_buffer(name), weights[name][0])


def test_tables_and_labels_that_are_not_there_stay_ours(public_weights):
    weights = public_weights("latte_small_class")
    for name in "pos_embed", "temp_embed", "y_embedder.embedding_table.weight":
        del weights[name]
    model = build("Latte")
    own = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_denoiser(model, weights)
    assert sorted(report.kept) == ["embed_label.weight", "pos_embed", "temp_embed"]
    assert all(torch.equal(model.state_dict()[key], own[key]) for key in report.kept)


def test_repas_projectors_are_left_out(public_weights):
    weights = {**public_weights("dit_small"), "projectors.0.0.weight": torch.ones(2, 2)}
    report = load_denoiser(build(), weights)
    assert (report.changed, report.kept) == ([], [])
    assert report.unused == ["projectors.0.0.weight"]


# What is said


def test_a_log_says_what_was_not_loaded_straight():
    report = LoadReport(
        ["head.bias (64,) -> (32,)"],
        [*(f"temporal.{i}.weight" for i in range(36)), "embed_label.weight"],
        ["embed_label.weight", "projectors.0.0.weight"],
    )
    assert report.lines("dit.pt") == [
        "dit.pt: changed to fit: head.bias (64,) -> (32,)",
        "of another shape in dit.pt, as initialised: embed_label.weight",
        "not in dit.pt, as initialised: 36 tensors, temporal.0.weight, temporal.1.weight, "
        "temporal.2.weight and 33 more",
        "in dit.pt alone, left out: projectors.0.0.weight",
    ]
    assert LoadReport([], [], []).lines("dit.pt") == []


# What is refused


def test_every_key_that_does_not_fit_is_named_and_nothing_is_loaded(public_weights):
    weights = public_weights("dit_small")
    weights["blocks.7.attn.qkv.weight"] = torch.ones(288, 96)
    weights["x_embedder.norm.weight"] = torch.ones(96)
    weights["t_embedder.mlp.0.weight"] = torch.ones(96, 128)
    weights["final_layer.linear.bias"] = torch.ones(24)
    del weights["blocks.3.mlp.fc2.bias"], weights["blocks.2.adaLN_modulation.1.weight"]
    model = build()
    own = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_denoiser(model, weights)
    message = str(caught.value)
    assert message.startswith("the state dict is of another architecture than the config's DiT: ")
    assert set(message.split(": ", 1)[1].split("; ")) == {
        "unknown blocks.7.attn.qkv.weight",
        "unknown x_embedder.norm.weight",
        "embed_clock.fc1.weight (96, 128) there, (96, 256) here",
        "head.bias (24,) there, (32,) here",
        "missing blocks.3.mlp.fc2.bias",
        "missing blocks.2.ada.linear.weight",
    }
    assert_same(model.state_dict(), own)


def test_what_is_no_checkpoint_is_one_clear_error(tmp_path):
    model = build()
    with pytest.raises(UserError, match=r"no\.pt does not exist"):
        load_denoiser(model, tmp_path / "no.pt")
    for name, content in (("text.pt", b"hello"), ("empty.pt", b""), ("bad.safetensors", b"x" * 9)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            load_denoiser(model, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="list.pt holds a list, not a dict"):
        load_denoiser(model, tmp_path / "list.pt")
    with pytest.raises(UserError, match="the state dict holds no weights of a denoiser"):
        load_denoiser(model, {"meta": {"iter": 1}})
    with pytest.raises(UserError, match="unknown conv.weight"):
        load_denoiser(model, {"conv.weight": torch.ones(1)})


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"args": Evil(), "ema": {}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt cannot be read"):
        load_denoiser(build(), tmp_path / "evil.pt")


@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
def test_training_teaches_a_missing_row_for_none(tiny_config, fill_weights, tmp_path, drop_prob):
    """Or it does not, and then there is no guidance afterwards either."""
    changes = {"model.conditioner.drop_prob": drop_prob, "train_cfg.max_iters": 2}
    cfg = tiny_config(changes)
    weights = fill_weights(DENOISERS.build(cfg.model.denoiser)).state_dict()
    weights["embed_label.weight"] = weights["embed_label.weight"][:-1]
    save_checkpoint({"ema": weights}, tmp_path / "public.pth")
    cfg.load_from = str(tmp_path / "public.pth")
    runner = RUNNERS.build(cfg)
    runner.train()
    model = runner.model
    assert model.denoiser.knows_null == (drop_prob > 0)
    trained = load_checkpoint(tmp_path / "run/iter_2")["state_dict"]
    assert torch.equal(trained["denoiser.embed_label.weight"], model.denoiser.embed_label.weight)
    assert not torch.equal(model.denoiser.embed_label.weight[:-1], weights["embed_label.weight"])


# Freezing


def train(model, steps=3):
    optimizer = torch.optim.AdamW(
        (weight for weight in model.parameters() if weight.requires_grad), lr=1e-2
    )
    x0 = torch.randn(2, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    samples = [VideoSample(index=0, label=3), VideoSample(index=1, label=9)]
    for step in range(steps):
        loss = model.loss(x0, samples, Draws(0, [0, 1], step))["loss_diffusion"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("pattern", "frozen"), [
    (r"^blocks\.[01]\.", lambda key: key.startswith(("blocks.0.", "blocks.1."))),
    ("attn", lambda key: ".attn." in key),
    (r"^(?!head)", lambda key: not key.startswith("head")),
])  # fmt: skip
def test_frozen_parts_stay_bit_equal_and_the_others_learn(fill_weights, pattern, frozen):
    model = fill_weights(diffusion_model(drop_prob=0.5, freeze=pattern))
    before = {key: value.clone() for key, value in model.denoiser.state_dict().items()}
    train(model)
    for key, value in model.denoiser.named_parameters():
        assert torch.equal(value, before[key]) == frozen(key), key
        assert value.requires_grad != frozen(key)


def test_a_pattern_that_is_found_nowhere_is_refused():
    message = r"freeze='block\[s' matches no parameter; there are embed.proj.weight, "
    with pytest.raises(ValueError, match=message.replace(r"\[s", "_s")):
        diffusion_model(freeze="block_s")


# From the command line


@pytest.fixture
def public_files(public_weights, tmp_path):
    """A public checkpoint and a small config of ours."""
    content = {
        "ema": public_weights("latte_small_class"), "model": public_weights("latte_small_class"),
        "args": argparse.Namespace(num_classes=10), "opt": {},
    }  # fmt: skip
    content["model"]["final_layer.linear.bias"] += 1
    torch.save(content, tmp_path / "public.pt")
    sizes = dict(in_channels=4, out_channels=8, size=(6, 16, 16), patch=2, width=96, depth=4)
    model = dict(
        type="LatentDiffusion",
        denoiser=dict(type="Latte", **sizes, heads=4, num_classes=10),
        diffusion=DIFFUSION,
        vae=dict(type="IdentityVAE"),
        conditioner=dict(type="LabelConditioner", num_classes=10),
    )
    (tmp_path / "small.py").write_text(f"default_scope = 'mmsora'\nmodel = {model!r}\n")
    return tmp_path


def test_our_model_samples_a_public_checkpoint(public_files):
    config, checkpoint = str(public_files / "small.py"), public_files / "public.pt"
    averaged = Inferencer(checkpoint, config, "cpu")
    assert averaged([3, 9]).shape == (2, 4, 6, 16, 16)
    raw = Inferencer(checkpoint, config, "cpu", use_ema=False).model.denoiser
    torch.testing.assert_close(raw.head.bias - averaged.model.denoiser.head.bias, torch.ones(32))


def test_infer_samples_a_public_checkpoint(public_files, tool, capsys):
    """Its latents have four channels, which no video has: a VAE of three would decode them."""
    out = public_files / "out"
    config = (public_files / "small.py").read_text()
    weights = load_checkpoint(public_files / "public.pt")["ema"]
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"][:, :3]
    for kind in "weight", "bias":
        name = f"final_layer.linear.{kind}"
        weights[name] = weights[name].unflatten(0, (4, 8))[:, [0, 1, 2, 4, 5, 6]].flatten(0, 1)
    torch.save({"ema": weights}, public_files / "rgb.pt")
    config = config.replace(
        "'in_channels': 4, 'out_channels': 8", "'in_channels': 3, 'out_channels': 6"
    )
    (public_files / "rgb.py").write_text(config)
    arguments = [str(public_files / "rgb.py"), "--checkpoint", str(public_files / "rgb.pt")]
    arguments += ["--out", str(out), "--device", "cpu"]
    tool("infer").main([*arguments, "--labels", "3", "9", "--fps", "6"])
    info = probe_video(out / "0001_label9_seed0.mp4")
    assert info.fps == pytest.approx(6)
    note = json.loads((out / "0001_label9_seed0.json").read_text())
    assert (note["label"], note["ema"]) == (9, True)
    for change, message in (
        ("'num_classes': 10", "has no labels for num_classes=101; set model.denoiser.num_classes"),
        ("'depth': 4", "is of another architecture than the config's Latte: missing blocks.4."),
    ):
        grown = change.replace("10", "101").replace("4", "6")
        (public_files / "rgb.py").write_text(config.replace(change, grown))
        capsys.readouterr()
        with pytest.raises(SystemExit):
            tool("infer").main([*arguments, "--labels", "3"])
        assert message in capsys.readouterr().err

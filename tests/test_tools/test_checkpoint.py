"""``tools/checkpoint.py``: what it shows, round trips bit for bit, what is said of mistakes."""

import hashlib
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmsora.apis import Inferencer
from mmsora.apis.exchange import Stored, compare, export_weights, import_weights, public_weights
from mmsora.registry import DENOISERS, RUNNERS
from mmsora.utils.checkpoint import load_checkpoint, load_denoiser, save_checkpoint
from mmsora.utils.checkpoint_folder import save_folder
from mmsora.utils.config_check import config_dict
from mmsora.utils.user_error import UserError

# Made as small as tests/data/public_keys.json has them.
SMALL = dict(in_channels=4, out_channels=8, patch=2, width=96, depth=4, heads=4)
DENOISER = {
    "dit_small": dict(type="DiT", size=(1, 16, 16), num_classes=10, **SMALL),
    "latte_small_class": dict(type="Latte", size=(6, 16, 16), num_classes=10, **SMALL),
}
CASCADE = dict(
    type="StableCascade",
    in_channels=5,
    out_channels=6,
    size=(1, 4, 7),
    levels=[dict(width=24, depth=2, heads=3), dict(width=32, depth=1, heads=2)],
    conditions=dict(width=20, pooled=12, text=10, image=14, numbers=("sca", "crp")),
)


def config_of(denoiser):
    """A whole config, of two steps."""
    diffusion = dict(
        type="Diffusion",
        path=dict(type="DiscretePath"),
        prediction=dict(type="LearnedRange", mean=dict(type="NoisePrediction")),
        train_times=dict(type="UniformTimes"),
        solver=dict(type="Ancestral"),
        grid=dict(type="SpacedGrid", num_steps=2),
        guidance=dict(type="ClassifierFree", scale=1.0),
        loss=dict(type="Hybrid"),
    )
    classes = denoiser.get("num_classes")
    model = dict(
        type="LatentDiffusion",
        denoiser=denoiser,
        diffusion=diffusion,
        vae=dict(type="IdentityVAE"),
        conditioner=dict(type="LabelConditioner", num_classes=classes) if classes else None,
    )
    return dict(model=model)


@pytest.fixture(scope="module")
def call(tool):
    """The exit code of the tool."""
    main = tool("checkpoint").main
    return lambda *words: main([str(word) for word in words])


@pytest.fixture
def fails(call, capsys):
    """The one line on stderr."""

    def run(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            call(*words)
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        return error

    return run


@pytest.fixture(scope="module")
def checkpoint(tiny_run):
    return tiny_run / "iter_6"


@pytest.fixture
def folder_of(tmp_path, fill_weights):
    """A checkpoint folder of a denoiser whose raw weights and average differ, and the average."""

    def make(denoiser):
        init_default_scope("mmsora")
        raw = fill_weights(DENOISERS.build(denoiser)).state_dict()
        average = {k: v if "_embed" in k else v * 0.5 + 0.01 for k, v in raw.items()}
        content = {
            "meta": {"cfg": json.dumps(config_dict(Config(config_of(denoiser)))), "iter": 3},
            "state_dict": {f"denoiser.{key}": value for key, value in raw.items()},
            "ema": average,
        }
        save_folder(content, tmp_path / "iter_3")
        return tmp_path / "iter_3", average

    return make


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}


# Show


def test_show_tells_what_is_there(call, checkpoint, capsys):
    assert call("show", checkpoint.parent, "--json", "--keys", "head") == 0  # the newest of a run
    found = json.loads(capsys.readouterr().out)
    content = load_checkpoint(checkpoint)
    assert found["path"] == str(checkpoint)
    assert (found["iter"], found["seed"], found["world_size"]) == (6, content["meta"]["seed"], 1)
    assert found["parallel_mode"] == "none"
    assert found["model"]["denoiser"] == "mmsora.models.Latte"
    assert found["bytes"] == sum(path.stat().st_size for path in checkpoint.iterdir())
    ema = content["ema"]
    assert found["parts"]["ema"] == {
        "tensors": len(ema),
        "values": sum(value.numel() for value in ema.values()),
        "bytes": sum(value.nbytes for value in ema.values()),
        "dtypes": {"float32": len(ema)},
    }
    assert found["parts"]["rng"]["of"] == ["0"]
    assert set(found["parts"]) == {"state_dict", "ema", "optimizer", "rng"}
    assert found["denoiser_values"] == found["parts"]["ema"]["values"]
    head = next(each for each in found["tensors"] if each["name"] == "ema/head.weight")
    assert head["shape"] == list(ema["head.weight"].shape)
    assert all("head" in each["name"] for each in found["tensors"])

    call("show", checkpoint, "--keys", "^ema/head")
    text = capsys.readouterr().out
    assert "iteration 6, seed" in text
    assert "saved by 1 processes, parallel mode none" in text
    assert f"{found['denoiser_values']:,} values" in text
    assert f"ema/head.weight  {head['shape']}  float32  {head['bytes']:,}\n" in text


def test_show_reads_no_tensor(checkpoint, call, monkeypatch, capsys):
    monkeypatch.delattr("mmsora.utils.checkpoint_folder.CheckpointFolder.read_into")
    assert call("show", checkpoint) == 0


def test_show_and_diff_of_profiles_and_of_several_processes(call, tmp_path, capsys):
    content = {
        "meta": {
            "iter": 3,
            "world_size": 2,
            "cfg": '{"model": {}, "parallel": {"mode": "zero2"}}',
        },
        "state_dict": {"denoiser.a": torch.ones(3), "alignment.projector.b": torch.ones(5)},
        "ema_profiles": {"sigma_rel=0.1": {"a": torch.ones(3)}, "sigma_rel=0.2": {}},
        "rng": {0: {"torch": torch.ones(2)}, 1: {"torch": torch.ones(2)}},
    }
    content["ema_profiles"]["sigma_rel=0.2"]["a"] = torch.ones(3, dtype=torch.bfloat16)
    save_folder(content, tmp_path / "one")
    content["ema_profiles"]["sigma_rel=0.2"]["a"][1] = 3
    save_folder(content, tmp_path / "two")
    call("show", tmp_path / "one")
    text = capsys.readouterr().out
    assert "saved by 2 processes, parallel mode zero2\n" in text
    assert "the denoiser: 3 values" in text
    profiles = next(line for line in text.splitlines() if line.startswith("ema_profiles"))
    assert profiles.split()[1:4] == ["2", "6", "18"]
    assert profiles.endswith("1 float32, 1 bfloat16 (sigma_rel=0.1, sigma_rel=0.2)")
    assert text.splitlines()[-1].endswith("2 float32 (0, 1)")
    assert call("diff", tmp_path / "one", tmp_path / "two") == 1
    text = capsys.readouterr().out
    assert "largest difference 2 in sigma_rel=0.2/a, relative 2 in sigma_rel=0.2/a\n" in text
    assert call("diff", tmp_path / "one", tmp_path / "two", "--tolerance", 2) == 0


def test_show_of_other_files(call, public_weights, tmp_path, capsys):
    weights = public_weights("dit_small")
    torch.save({"ema": weights, "args": {"lr": 1.0}}, tmp_path / "public.pt")
    save_file(weights, tmp_path / "public.safetensors")
    for name, part in (("public.pt", "ema"), ("public.safetensors", "weights")):
        call("show", tmp_path / name, "--json")
        found = json.loads(capsys.readouterr().out)
        assert found["parts"][part]["tensors"] == len(weights)
        assert found["denoiser_values"] == sum(value.numel() for value in weights.values())
        assert "iter" not in found


# Out and back


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_an_exported_file_samples_the_same_videos(call, checkpoint, tmp_path, which, capsys):
    file = tmp_path / "tiny.safetensors"
    assert call("export", checkpoint, file, f"--{which}") == 0
    averaged = {"ema": "averaged", "raw": "raw"}[which]
    assert f"{file}: {averaged} weights of Latte, " in capsys.readouterr().out
    content = load_checkpoint(checkpoint)
    ema, state = content["ema"], content["state_dict"]
    raw = {k.removeprefix("denoiser."): v for k, v in state.items() if k.startswith("denoiser.")}
    assert_same(load_file(file), {"ema": ema, "raw": raw}[which])
    assert any(not torch.equal(ema[key], raw[key]) for key in ema)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["format"] == "pt"

    expected = Inferencer(checkpoint, use_ema=which == "ema")([3, 7], seed=2)
    exported = Inferencer(file)
    assert torch.equal(exported([3, 7], seed=2), expected)
    assert exported.classes == Inferencer(checkpoint).classes
    if which == "ema":
        with pytest.raises(UserError, match="holds averaged weights alone, no raw ones"):
            Inferencer(file, use_ema=False)
    else:
        assert torch.equal(Inferencer(file, use_ema=False)([3, 7], seed=2), expected)


def test_a_run_starts_from_an_exported_file(checkpoint, tmp_path, tiny_config):
    export_weights(Stored(checkpoint), tmp_path / "tiny.safetensors")
    starts = []
    for source in (checkpoint, tmp_path / "tiny.safetensors"):
        cfg = tiny_config({"load_from": str(source)}, tmp_path / source.stem)
        runner = RUNNERS.build(cfg)
        runner.load_or_resume()
        starts.append(runner.model.denoiser.state_dict())
    assert_same(*starts)
    assert_same(starts[0], load_checkpoint(checkpoint)["ema"])


@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_ours_come_back_bit_for_bit(folder_of, tmp_path, form):
    folder, average = folder_of(DENOISER["latte_small_class"])
    out = tmp_path / "out.safetensors"
    assert "of Latte, " in export_weights(Stored(folder), out, form)
    assert import_weights(out, tmp_path / "back") == ([], [], [])  # by the config in it
    assert_same(load_checkpoint(tmp_path / "back")["ema"], average)
    assert compare(Stored(folder), Stored(tmp_path / "back")).differs(0) is False
    if form == "diffusers":
        assert {path.name for path in out.iterdir()} == {
            "config.json",
            "diffusion_pytorch_model.safetensors",
        }
        assert json.loads((out / "config.json").read_text())["_class_name"] == "Latte"


@pytest.mark.parametrize("case", DENOISER)
@pytest.mark.parametrize("end", ["pt", "safetensors"])
def test_public_names_and_shapes(case, end, folder_of, public_weights, tmp_path):
    folder, average = folder_of(DENOISER[case])
    out = tmp_path / f"public.{end}"
    export_weights(Stored(folder), out, "public")
    theirs, expected = load_checkpoint(out), public_weights(case)
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in expected.items()}
    assert_same(theirs, public_weights_of(average))
    with pytest.raises(UserError, match="import it first, with its config"):
        export_weights(Stored(out), tmp_path / "again.safetensors")
    with pytest.raises(UserError, match="holds no config; name one"):
        import_weights(out, tmp_path / "back")
    config = Config(config_of(DENOISER[case]))
    assert import_weights(out, tmp_path / "back", config) == ([], [], [])
    assert_same(load_checkpoint(tmp_path / "back")["ema"], average)


def public_weights_of(weights):
    """The authors' names and shapes, by another way."""
    names = {
        "x_embedder.proj.": "embed.proj.",
        "t_embedder.mlp.0.": "embed_clock.fc1.",
        "t_embedder.mlp.2.": "embed_clock.fc2.",
        "y_embedder.embedding_table.": "embed_label.",
        ".adaLN_modulation.1.": ".ada.linear.",
        "final_layer.linear.": "head.",
    }
    found = {}
    for key, value in weights.items():
        for theirs, ours in names.items():
            key = key.replace(ours, theirs) if ours in key else key
        key = "final_layer.adaLN_modulation.1." + key[11:] if key[:11] == "ada.linear." else key
        if key.endswith("_embed"):
            value = value[None]
        found[key] = value.reshape(-1, 4, 2, 2) if key == "x_embedder.proj.weight" else value
    return found


def test_public_files_are_imported_and_exported(public_weights, tmp_path, call, capsys):
    """Theirs, ours, theirs. What does not fit is told, and is still missing afterwards."""
    theirs = public_weights("dit_small", rows=10)  # trained without label dropout
    torch.save({"ema": theirs, "model": {}}, tmp_path / "public.pt")
    (tmp_path / "small.py").write_text(f"model = {config_of(DENOISER['dit_small'])['model']!r}\n")
    out = tmp_path / "dit"
    words = ("import", tmp_path / "public.pt", out, "--config", tmp_path / "small.py")
    assert call(*words) == 0
    assert capsys.readouterr().out == (
        "changed to fit: embed_label.weight (10, 96) -> (11, 96)\n"
        f"{out}: a checkpoint of weights, for sampling and load_from\n"
    )
    assert Inferencer(out)([3, 9], seed=1).shape[0] == 2
    init_default_scope("mmsora")
    model = DENOISERS.build(DENOISER["dit_small"])
    load_denoiser(model, out)
    assert model.knows_null is False
    export_weights(Stored(out), tmp_path / "back.pt", "public")
    assert_same(load_checkpoint(tmp_path / "back.pt"), theirs)

    del theirs["y_embedder.embedding_table.weight"]
    save_checkpoint(theirs, tmp_path / "public.pt")
    before = digests(out)
    with pytest.raises(SystemExit):
        call(*words)
    assert f"{out} exists; choose another place, or --force" in capsys.readouterr().err
    assert digests(out) == before
    assert call(*words, "--force") == 0
    assert "not in the source, left out: embed_label.weight\n" in capsys.readouterr().out
    assert "embed_label.weight" not in load_checkpoint(out)["ema"]
    with pytest.raises(UserError, match="no labels for num_classes=10"):
        Inferencer(out)


def test_an_image_file_into_a_model_of_videos(public_weights, tmp_path):
    """What it has nothing for stays missing: the temporal layers, and labels."""
    denoiser = dict(
        type="ImageToVideo",
        image=DENOISER["dit_small"],
        after={r"blocks\.\d": 96},
        layout="(b t) 1 n c",
        frames=3,
    )
    config, theirs = Config(config_of(denoiser)), public_weights("dit_small", rows=10)
    torch.save(theirs, tmp_path / "public.pt")
    report = import_weights(tmp_path / "public.pt", tmp_path / "out", config)
    assert report.kept
    assert all(key.startswith("temporal.") for key in report.kept)
    found = load_checkpoint(tmp_path / "out")["ema"]
    labels = theirs.pop("y_embedder.embedding_table.weight")
    assert torch.equal(found["image.embed_label.weight"], labels)
    assert {key.partition(".")[0] for key in found} == {"image"}
    model = DENOISERS.build(denoiser)
    assert load_denoiser(model, tmp_path / "out").kept == report.kept
    assert model.knows_null is False
    with pytest.raises(UserError, match="ImageToVideo has no public format"):
        export_weights(Stored(tmp_path / "out"), tmp_path / "x.pt", "public")

    torch.save(theirs, tmp_path / "public.pt")
    report = import_weights(tmp_path / "public.pt", tmp_path / "unlabelled", config)
    assert "embed_label.weight" in report.kept
    assert "image.embed_label.weight" not in load_checkpoint(tmp_path / "unlabelled")["ema"]


def test_what_is_not_square_is_left_out_of_public_weights(fill_weights):
    init_default_scope("mmsora")
    options = DENOISER["latte_small_class"] | dict(size=(6, 4, 16), patch=(2, 2, 2))
    model, other = (fill_weights(DENOISERS.build(options)) for _ in range(2))
    theirs = public_weights(model, model.state_dict())
    assert theirs["x_embedder.proj.weight"].shape == (96, 4, 2, 2, 2)
    assert "pos_embed" not in theirs
    assert theirs["temp_embed"].shape == (1, 3, 96)
    other.embed.proj.weight.data.zero_()
    assert load_denoiser(other, theirs).kept == ["pos_embed"]
    assert_same(other.state_dict(), model.state_dict())


@torch.no_grad()
def test_a_cascade_for_diffusers_and_for_its_authors(folder_of, tmp_path):
    from diffusers import StableCascadeUNet

    folder, average = folder_of(CASCADE)
    written = export_weights(Stored(folder), tmp_path / "unet", "diffusers")
    assert written.endswith("for StableCascadeUNet, diffusers' class")
    theirs = StableCascadeUNet.from_pretrained(tmp_path / "unet").eval()
    assert_same(theirs.state_dict(), average)
    ours = DENOISERS.build(CASCADE).eval()
    assert load_denoiser(ours, folder) == ([], [], [])
    clock, told = torch.tensor([0.2, 0.9]), (torch.randn(2, 12), torch.randn(2, 7, 10))
    x, image = torch.randn(2, 5, 1, 4, 7), torch.randn(2, 3, 14)
    expected = ours(x, clock, text_pooled=told[0], text=told[1], image=image)
    given = dict(clip_text_pooled=told[0][:, None], clip_text=told[1], clip_img=image)
    assert expected.std() > 0.01
    assert torch.equal(theirs(x[:, :, 0], clock, **given).sample, expected[:, :, 0])

    import_weights(tmp_path / "unet", tmp_path / "back")
    assert_same(load_checkpoint(tmp_path / "back")["ema"], average)
    export_weights(Stored(folder), tmp_path / "stage.safetensors", "public")
    public = load_file(tmp_path / "stage.safetensors")
    assert "down_blocks.0.2.attention.attn.in_proj_weight" in public
    assert_same(ours.from_public(public), average)

    told_labels = CASCADE | dict(num_classes=3)  # which diffusers' class does not know
    folder, _ = folder_of(told_labels)
    written = export_weights(Stored(folder), tmp_path / "labels", "diffusers")
    assert written.endswith("for StableCascade, a class of ours, which diffusers does not have")


@torch.no_grad()
def test_low_rank_additions_go_into_the_weights(folder_of, tmp_path):
    pytest.importorskip("peft")
    lora = dict(type="LoRA", denoiser=CASCADE, modules=".*to_(q|k|v)", rank=3, alpha=2.0)
    folder, average = folder_of(lora)
    ours, alone = DENOISERS.build(lora).eval(), DENOISERS.build(CASCADE).eval()
    ours.load_state_dict(average)
    told = dict(text_pooled=torch.randn(2, 12), text=torch.randn(2, 7, 10))
    x, clock = torch.randn(2, 5, 1, 4, 7), torch.tensor([0.2, 0.9])
    expected = ours(x, clock, **told)
    folders = {"public": "", "diffusers": "diffusion_pytorch_model.safetensors"}
    for form, inside in folders.items():
        out = tmp_path / f"{form}.safetensors"
        export_weights(Stored(folder), out, form)
        for weight in alone.parameters():
            weight.zero_()
        assert load_denoiser(alone, out / inside) == ([], [], [])
        torch.testing.assert_close(alone(x, clock, **told), expected)
    with ours.bare() as base:
        assert not torch.allclose(base(x, clock, **told), expected)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision(checkpoint, tmp_path, name, dtype):
    file = tmp_path / "half.safetensors"
    export_weights(Stored(checkpoint), file, dtype=name)
    found, full = load_file(file), load_checkpoint(checkpoint)["ema"]
    assert_same(found, {key: value.to(dtype) for key, value in full.items()})
    Inferencer(file)
    more = load_checkpoint(checkpoint)
    more["ema"]["count"] = torch.tensor(300)
    save_folder(more, tmp_path / "more")
    export_weights(Stored(tmp_path / "more"), tmp_path / "count.safetensors", dtype=name)
    assert load_file(tmp_path / "count.safetensors")["count"].dtype == torch.int64
    error = max((found[k].float() - full[k]).abs().max().item() for k in full)
    compared = compare(Stored(checkpoint), Stored(file))
    assert compared.parts[0].largest[0] == pytest.approx(error, abs=1e-12)
    assert compared.differs(error * 0.99)
    assert not compared.differs(error)


# Diff


def test_diff(call, checkpoint, tmp_path, capsys):
    assert call("diff", checkpoint, checkpoint) == 0
    text = capsys.readouterr().out
    assert text.endswith("they are equal\n")
    assert {line.partition(":")[0] for line in text.splitlines()[:-1]} == {
        "weights",
        "ema",
        "optimizer",
        "rng",
    }
    other = load_checkpoint(checkpoint)
    other["ema"]["head.weight"][1, 2] += 0.25
    other["optimizer"]["denoiser.head.bias"]["exp_avg"][0] = torch.nan
    del other["ema"]["head.bias"]
    other["ema"]["more"] = torch.ones(2)
    other["state_dict"]["denoiser.embed.proj.bias"] = torch.ones(3)
    cfg = json.loads(other["meta"]["cfg"])
    cfg["work_dir"] = "elsewhere"
    cfg["model"]["denoiser"]["heads"] = 1
    other["meta"]["cfg"] = json.dumps(cfg)
    save_folder(other, tmp_path / "other")
    assert call("diff", checkpoint, tmp_path / "other", "--tolerance", "9") == 1
    text = capsys.readouterr().out
    assert "\n  - head.bias\n  + more\n" in text
    assert "largest difference 0.25 in head.weight" in text
    assert "largest difference inf in denoiser.head.bias/exp_avg" not in text
    assert "largest difference inf in head.bias/exp_avg" in text
    assert "embed.proj.bias (16,) -> (3,)" in text
    assert "config: model.denoiser.heads: 2 -> 1\n" in text
    assert "work_dir" not in text
    assert text.endswith("they differ\n")


@pytest.mark.parametrize("what", ["added", "missing", "shape", "value", "config", "run", "none"])
def test_each_difference_counts(tmp_path, what):
    ema = {"x": torch.ones(2), "y": torch.zeros(3)}
    other, cfg = dict(ema), {"model": {"heads": 2}, "work_dir": "a"}
    changes = {
        "added": {"z": ema["x"]},
        "shape": {"x": torch.ones(1)},
        "value": {"y": ema["y"] + 1},
    }
    save_checkpoint({"meta": {"cfg": json.dumps(cfg)}, "ema": ema}, tmp_path / "a.pth")
    other |= changes.get(what, {})
    if what == "missing":
        del other["x"]
    cfg |= {"config": {"model": {"heads": 4}}, "run": {"work_dir": "b"}}.get(what, {})
    save_checkpoint({"meta": {"cfg": json.dumps(cfg)}, "ema": other}, tmp_path / "b.pth")
    found = compare(Stored(tmp_path / "a.pth"), Stored(tmp_path / "b.pth"))
    assert found.differs(0.5) is (what not in ("run", "none"))


def test_diff_of_an_average_and_of_a_magnitude(call, tmp_path, capsys):
    a = {"x": torch.tensor([1.0, -4.0]), "y": torch.tensor([0.0, torch.nan])}
    b = {"x": torch.tensor([1.5, -4.0]), "y": torch.tensor([0.1, torch.nan])}
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    part = compare(Stored(tmp_path / "a.safetensors"), Stored(tmp_path / "b.safetensors")).parts[0]
    assert part.largest == (0.5, "x")
    assert part.relative == (float("inf"), "y")
    torch.save({"ema": a}, tmp_path / "ema.pt")
    with pytest.raises(UserError, match="nothing to compare"):
        compare(Stored(tmp_path / "a.safetensors"), Stored(tmp_path / "ema.pt"))


# Mistakes


def test_mistakes_are_one_line(fails, checkpoint, tmp_path, tiny_run):
    assert "does not exist" in fails("show", tmp_path / "none")
    assert "must end in .safetensors" in fails("export", checkpoint, tmp_path / "x.pth")
    assert "must end in .pt" in fails("export", checkpoint, tmp_path / "x", "--format", "public")
    assert "folder of other things" in fails(
        "export", checkpoint, tiny_run, "--format", "diffusers", "--force"
    )
    assert "folder of other things" in fails("import", checkpoint, tiny_run, "--force")
    (tmp_path / "x.safetensors").write_bytes(b"kept")
    assert "exists" in fails("export", checkpoint, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == b"kept"
    assert "cannot be read" in fails("show", tmp_path / "x.safetensors")
    save_checkpoint({"meta": {}, "ema": {}}, tmp_path / "empty.pth")
    assert "holds no raw weights" in fails(
        "export", tmp_path / "empty.pth", tmp_path / "y.safetensors", "--raw"
    )
    assert "holds no weights of a checkpoint" in fails(
        "export", tmp_path / "empty.pth", tmp_path / "y.safetensors"
    )
    (tmp_path / "half.py").write_text("work_dir = 'x'\n")
    words = ("import", checkpoint, tmp_path / "out", "--config", tmp_path / "half.py")
    assert "the config has no model" in fails(*words)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_weights_beside_the_denoiser_are_not_lost_in_silence(folder_of, tmp_path):
    folder, _ = folder_of(DENOISER["dit_small"])
    content = load_checkpoint(folder)
    content["state_dict"]["conditioner.scale"] = torch.ones(1)
    save_folder(content, tmp_path / "more")
    for which in (None, "raw"):
        with pytest.raises(UserError, match=r"beside the denoiser's, as conditioner\.scale"):
            export_weights(Stored(tmp_path / "more"), tmp_path / "out.safetensors", which=which)


def test_a_kill_leaves_the_old_folder(folder_of, tmp_path, monkeypatch):
    folder, average = folder_of(DENOISER["dit_small"])
    out = tmp_path / "model"
    export_weights(Stored(folder), out, "diffusers")
    before = digests(out)

    def full(*args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr("mmsora.apis.exchange.formats.write_json", full)
    with pytest.raises(OSError, match="no space"):
        export_weights(Stored(folder), out, "diffusers", which="raw", force=True)
    assert digests(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"iter_3", "model"}
    monkeypatch.undo()
    export_weights(Stored(folder), out, "diffusers", which="raw", force=True)
    assert digests(out) != before
    assert {path.name for path in tmp_path.iterdir()} == {"iter_3", "model"}


def test_wrong_options(tool, capsys):
    main = tool("checkpoint").main
    for words in (["show", "x", "--keys", "("], ["diff", "a", "b", "--tolerance", "-1"], []):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
    assert "is no regular expression" in capsys.readouterr().err

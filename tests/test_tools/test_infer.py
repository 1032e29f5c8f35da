"""``tools/infer.py``: files that can be made again, and what is said of mistakes."""

import hashlib
import json
import shlex

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmsora.apis import Inferencer, build_model
from mmsora.utils.checkpoint import load_checkpoint, save_checkpoint
from mmsora.utils.video_io import probe_video, read_video


@pytest.fixture(scope="module")
def infer(tool):
    return tool("infer")


@pytest.fixture(scope="module")
def checkpoint(tiny_run):
    return tiny_run / "iter_6"


@pytest.fixture
def run(infer, checkpoint, tmp_path):
    def call(*arguments, out=tmp_path / "out"):
        infer.main(["--checkpoint", str(checkpoint), "--out", str(out), *map(str, arguments)])
        return out

    return call


@pytest.fixture
def fails(infer, capsys, tmp_path):
    """The one line on stderr."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            infer.main([*map(str, arguments), "--out", str(tmp_path / "out")])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert error.startswith("error: ")
        assert not (tmp_path / "out").exists()
        return error

    return call


def names(out):
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("kind", ["mp4", "gif", "png"])
def test_a_file_for_each_sample_a_json_and_a_contact_sheet(run, kind, checkpoint):
    out = run("--labels", 3, 7, "--format", kind, "--fps", 5, "--seed", 2)
    stems = ["0000_label3_seed2", "0001_label7_seed2"]
    files = [f"{stem}.{end}" for stem in stems for end in ("json", kind)]
    assert names(out) == sorted([*files, "contact_sheet.png"])
    videos = Inferencer(checkpoint)([3, 7], seed=2)
    for stem, video in zip(stems, videos, strict=True):
        frames = read_video(out / f"{stem}.{kind}")
        assert frames.shape == (2, 128, 128, 3)
        assert probe_video(out / f"{stem}.{kind}").fps == pytest.approx(5)
        expected = np.kron(video[0].numpy(), np.ones((1, 16, 16)))[..., None]
        assert np.abs(frames - expected).mean() < (5 if kind == "mp4" else 0.01)


def test_samples_without_labels(run):
    assert len(names(run("--num-samples", 12))) == 25
    assert (run() / "0009_label9_seed0.mp4").is_file()


def test_the_command_in_the_json_makes_the_same_pixels(run, infer, tmp_path):
    options = ["--labels", 3, 7, "--steps", 5, "--guidance", 1.5, "--solver", "Heun", "--seed", 4]
    first = run(
        *options, "--format", "png", "--no-ema", "--cfg-options", "model.conditioner.drop_prob=0.5"
    )
    note = json.loads((first / "0001_label7_seed4.json").read_text())
    assert note["ema"] is False
    command = shlex.split(note["command"])
    assert command[:2] == ["python", "tools/infer.py"]
    again = tmp_path / "again"
    infer.main([str(again) if word == str(first) else word for word in command[2:]])
    assert names(again) == names(first)
    for path in first.glob("*.png"):
        assert np.array_equal(read_video(path), read_video(again / path.name))
    other = run("--labels", 3, 7, "--seed", 4, "--format", "png", out=tmp_path / "other")
    name = "0001_label7_seed4.png"
    assert not np.array_equal(read_video(other / name), read_video(first / name))


def test_the_json_says_what_the_video_was_made_of(run, checkpoint):
    note = json.loads((run("--labels", 3, 7, "--steps", 2) / "0001_label7_seed0.json").read_text())
    expected = {"index": 1, "label": 7, "seed": 0, "steps": 2, "guidance": 2.0, "ema": True}
    assert {key: note[key] for key in expected} == expected
    assert note["checkpoint"] == str(checkpoint)
    content = b"".join(file.read_bytes() for file in sorted(checkpoint.iterdir()))
    assert note["checkpoint_sha256"] == hashlib.sha256(content).hexdigest()
    assert note["model"]["denoiser"]["width"] == 16
    assert note["model"]["diffusion"]["solver"]["type"] == "mmsora.diffusion.Euler"
    assert note["versions"]["torch"] == torch.__version__


def test_the_batch_size_changes_no_video(run, tmp_path):
    outs = [
        run("--labels", 3, 7, 1, "--format", "png", "--batch-size", size, out=tmp_path / str(size))
        for size in (1, 3)
    ]
    for path in outs[0].glob("*_seed0.png"):
        one, other = (read_video(out / path.name).astype(int) for out in outs)
        assert np.abs(one - other).max() <= 1  # rounding


def test_a_config_may_be_named(run, infer, fails, checkpoint, tiny_config, tmp_path):
    error = fails("latte_moving_digits", "--checkpoint", checkpoint)
    assert "another architecture" in error
    assert "denoiser." in error
    tiny_config().dump(tmp_path / "named.py")
    out = tmp_path / "named"
    infer.main(
        [
            str(tmp_path / "named.py"),
            *("--checkpoint", str(checkpoint), "--labels", "3", "--format", "png"),
            *("--out", str(out)),
        ]
    )
    own = run("--labels", 3, "--format", "png")
    name = "0000_label3_seed0.png"
    assert np.array_equal(read_video(out / name), read_video(own / name))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labels", 3, 10], "label 10 is out of range: the model knows 10 classes, 0 to 9"),
        (["--labels", -1], "label -1 is out of range"),
        (["--solver", "Eulre"], "did you mean 'Euler'?"),
        (["--sampler", "paper"], "the config has no sampler 'paper'; it offers none"),
        (["--steps", 0], "num_steps must be at least 1, got 0"),
        (["--num-frames", 0], "num_frames must be at least 1, got 0"),
        (["--num-samples", 0], "num_samples must be at least 1, got 0"),
        (["--cfg-options", "model.diffusion.gird.num_steps=3"], "model.diffusion.grid.num_steps"),
        (["--cfg-options", "model.denoiser.depth=4"], "missing denoiser.blocks.2"),
    ],
)
def test_a_mistake_is_one_line(fails, checkpoint, arguments, words):
    assert words in fails("--checkpoint", checkpoint, *arguments)


def test_a_config_that_is_not_there(fails, checkpoint):
    error = fails("latte_moving_digit", "--checkpoint", checkpoint)
    assert "did you mean latte_moving_digits?" in error


def test_a_checkpoint_that_is_none(fails, checkpoint, tmp_path):
    assert "no.pth does not exist" in fails("--checkpoint", tmp_path / "no.pth")
    assert "iter_6" in fails("--checkpoint", checkpoint.with_name("iter_7"))
    half = tmp_path / "half.pth"
    torch.save(load_checkpoint(checkpoint)["state_dict"], half)
    half.write_bytes(half.read_bytes()[:20_000])
    assert "half.pth cannot be read, it is truncated or no checkpoint" in fails(
        "--checkpoint", half
    )
    for name, content in (("text.pth", "hello"), ("empty.pth", "")):
        (tmp_path / name).write_text(content)
        assert f"{name} cannot be read" in fails("--checkpoint", tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    assert "list.pth holds a list, not a dict" in fails("--checkpoint", tmp_path / "list.pth")
    torch.save({"weight": torch.ones(1)}, tmp_path / "alien.pth")
    assert "alien.pth holds no config" in fails("--checkpoint", tmp_path / "alien.pth")


@pytest.mark.parametrize(
    "arguments", [["--labels", "3", "--num-samples", "2"], ["--format", "avi"]]
)
def test_what_argparse_refuses(infer, checkpoint, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        infer.main(["--checkpoint", str(checkpoint), *arguments])
    assert "usage: " in capsys.readouterr().err


def test_the_help_says_the_defaults(infer, capsys):
    with pytest.raises(SystemExit):
        infer.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "directory to write to; default samples",
        "of the files; default 8",
        "of the noise; default 0",
        "1 is none; default as the config says",
        "changes of CONFIG, not of the prior's",
        "default its checkpoint's own, else the one that CONFIG's `prior` names",
    ):
        assert words in said


def test_prompts_for_a_model_of_labels(fails, checkpoint, tmp_path):
    assert "takes no text" in fails("--checkpoint", checkpoint, "--prompt", "a fox")
    lines = tmp_path / "prompts.txt"
    error = fails("--checkpoint", checkpoint, "--prompts-file", lines)
    assert "prompts.txt cannot be read" in error
    lines.write_text("\n \n")
    assert "holds no prompt" in fails("--checkpoint", checkpoint, "--prompts-file", lines)


def test_a_video_for_each_prompt(infer, tiny_config, fill_weights, tmp_path):
    states = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    content = {"states": states, "mask": torch.ones(3, 5, dtype=torch.bool)}
    texts = {"texts": json.dumps(["", "a fox", "a cat"])}
    save_file(content, tmp_path / "texts.safetensors", texts)
    cfg = tiny_config({"model.denoiser.num_classes": 0})
    cfg.model.denoiser.text = (5, 6)
    encoder = dict(type="mmsora.models.CachedText", length=5, width=6)
    encoder["file"] = str(tmp_path / "texts.safetensors")
    cfg.model.conditioner = dict(type="TextConditioner", encoder=encoder)
    cfg.dump(tmp_path / "text.py")
    model = fill_weights(build_model(cfg).denoiser).state_dict()
    state = {f"denoiser.{key}": value for key, value in model.items()}
    save_checkpoint({"meta": {}, "state_dict": state}, tmp_path / "text.pth")
    lines = tmp_path / "prompts.txt"
    lines.write_text("a fox\n\n a cat \n")
    common = [str(tmp_path / "text.py"), "--checkpoint", str(tmp_path / "text.pth")]
    asked = (["--prompt", "a fox", "--prompt", "a cat"], ["--prompts-file", str(lines)])
    outs = [tmp_path / "one", tmp_path / "two"]
    for words, out in zip(asked, outs, strict=True):
        infer.main([*common, *words, "--out", str(out), "--format", "png"])
        assert names(out) == sorted(
            [
                "contact_sheet.png",
                *(f"000{i}_seed0.{kind}" for i in (0, 1) for kind in ("json", "png")),
            ]
        )
        notes = [json.loads((out / f"000{i}_seed0.json").read_text()) for i in (0, 1)]
        assert [note["prompt"] for note in notes] == ["a fox", "a cat"]
    one, two = (read_video(out / "0001_seed0.png") for out in outs)
    assert np.array_equal(one, two)

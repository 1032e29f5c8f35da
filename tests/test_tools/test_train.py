"""``tools/train.py``: what trains, and what is said of what does not."""

import errno
import logging
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmsora import cli
from mmsora.apis import Inferencer
from mmsora.apis.build import config_of
from mmsora.utils.checkpoint import load_checkpoint
from mmsora.utils.user_error import UserError

ROOT = Path(__file__).parents[2]
NAME = "latte_moving_digits"

STRINGS = """
runner_type = 'SoraRunner'
model = dict(
    type='LatentDiffusion',
    vae=dict(type='IdentityVAE'),
    conditioner=dict(type='LabelConditioner', num_classes=10),
    denoiser=dict(
        type='Latte', in_channels=1, out_channels=1, size=(2, 8, 8), patch=4, width=16, depth=2,
        heads=2, num_classes=10),
    diffusion=dict(
        type='Diffusion',
        path=dict(type='LinearPath'),
        prediction=dict(type='VelocityPrediction'),
        train_times=dict(type='UniformTimes'),
        solver=dict(type='Heun'),
        grid=dict(type='SpacedGrid', num_steps=2),
        guidance=dict(type='ClassifierFree', scale=2.0),
        loss=dict(type='MSE')))
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(type='MovingDigits', num_frames=2, frame_size=8),
    sampler=dict(type='InfiniteSampler', shuffle=True),
    collate_fn=dict(type='pseudo_collate'))
train_cfg = dict(by_epoch=False, max_iters=2)
optim_wrapper = dict(type='AutocastOptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=2)]
default_hooks = dict(
    telemetry=dict(type='TelemetryHook', interval=1),
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='SafeCheckpointHook'))
custom_hooks = [dict(type='DenoiserEMAHook'), dict(type='SampleHook', labels=[3, 7])]
log_processor = dict(type='LogProcessor', by_epoch=False)
randomness = dict(seed=0)
"""


@pytest.fixture(scope="module")
def train(tool):
    return tool("train")


@pytest.fixture
def run(train, tmp_path, tiny_options, request):
    """Trains the tiny quickstart with more arguments; gives the directory."""

    def call(*arguments, config=NAME, **changes):
        options = {**tiny_options, "experiment_name": request.node.name, **changes}
        pairs = [f"{key}={value}" for key, value in options.items()]
        work_dir = tmp_path / "run"
        train.main([config, "--work-dir", str(work_dir), *arguments, "--cfg-options", *pairs])
        return work_dir

    return call


# What trains


def test_a_config_of_strings_that_imports_nothing(train, tmp_path):
    config = tmp_path / "strings.py"
    config.write_text(STRINGS)
    train.main([str(config), "--work-dir", str(tmp_path / "run")])
    assert Inferencer(tmp_path / "run/iter_2")([3, 7]).shape == (2, 1, 2, 8, 8)
    assert (tmp_path / "run/samples/iter_000002.mp4").is_file()


def test_names_are_found_by_a_process_that_imported_none(tmp_path):
    """In a fresh process: here other tests imported everything."""
    config = tmp_path / "strings.py"
    config.write_text(STRINGS)
    command = [sys.executable, "tools/train.py", config, "--dry-run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Latte, 0.0" in result.stdout
    assert result.stderr == ""


def test_options_of_the_command_line(run):
    work_dir = run(
        "--amp", "bf16", "--seed", "5", **{"train_cfg.max_iters": 2, "model.denoiser.depth": 4}
    )
    content = load_checkpoint(work_dir / "iter_2")
    assert "denoiser.blocks.3.ada.linear.weight" in content["state_dict"]
    assert content["meta"]["seed"] == 5
    assert config_of(content, work_dir).optim_wrapper.precision == "bf16"


def test_a_config_that_inherits_a_flat_copy(run, tmp_path):
    cli.main(["copy-cfg", NAME, str(tmp_path / "flat.py"), "--flat"])
    top = tmp_path / "top.py"
    top.write_text("_base_ = 'flat.py'\nmodel = dict(conditioner=dict(drop_prob=0.7))\n")
    work_dir = run(config=str(top), **{"train_cfg.max_iters": 1})
    content = load_checkpoint(work_dir / "iter_1")
    cfg = config_of(content, work_dir)
    assert cfg.model.conditioner.drop_prob == 0.7
    assert cfg.model.denoiser.width == 16


def test_another_process_by_the_diffusion_block_alone(run):
    work_dir = run(
        **{
            "model.diffusion.path.type": "DiscretePath",
            "model.diffusion.prediction.type": "VPrediction",
            "custom_hooks.1.labels": "[3,7]",
        }
    )
    inferencer = Inferencer(work_dir / "iter_6")
    assert type(inferencer.model.diffusion.prediction).__name__ == "VPrediction"
    assert inferencer.model.diffusion.path.num_levels == 1000
    assert inferencer([3, 7]).float().std() > 1
    assert (work_dir / "samples/iter_000006.png").is_file()


def test_resume_takes_the_newest_checkpoint_or_the_named_one(run, tmp_path, capsys, scalars):
    changes = {"train_cfg.max_iters": 2, "default_hooks.checkpoint.interval": 1}
    work_dir = run("--resume", **changes)
    assert "no checkpoint in" in capsys.readouterr().err
    changes["train_cfg.max_iters"] = 3
    run("--resume", experiment_name="newest", **changes)
    run("--resume", str(work_dir / "iter_1"), experiment_name="named", **changes)
    assert [line["step"] for line in scalars(work_dir)] == [1, 2, 3, 2, 3]


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(train, tmp_path, capsys):
    work_dir = tmp_path / "run"
    train.main([NAME, "--dry-run", "--work-dir", str(work_dir)])
    out = capsys.readouterr().out
    for words in ("Latte, 1.87 M", "128 tokens", "MovingDigits, 10000", "4000 iterations of 32"):
        assert words in out
    assert not work_dir.exists()


# What does not


def fails(train, capsys, *arguments):
    """The one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        train.main(list(map(str, arguments)))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("error: ")
    return error


def test_an_unknown_config(train, capsys):
    error = fails(train, capsys, "latte_moving_digit")
    assert "latte_moving_digit not found" in error
    assert f"did you mean {NAME}?" in error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train_cgf = dict(max_iters=2)", "did you mean 'train_cfg'?"),
        ("model['denoiser']['widht'] = 16", "Latte takes no 'widht'; did you mean 'width'?"),
        ("model['denoiser']['type'] = 'Late'", "unknown DENOISERS name 'Late'"),
        ("optim_wrapper['optimizer']['rl'] = 1", "takes no 'rl'"),
        ("del model['denoiser']['patch']", "missing 'patch'"),
        ("import torch", "cannot import"),
    ],
)
def test_a_mistake_in_the_config(train, capsys, tmp_path, line, words):
    config = tmp_path / "mistaken.py"
    config.write_text(f"{STRINGS}\n{line}\n")
    if "import" in line:
        config.write_text(f"_base_ = 'strings.py'\nimport torch\n{STRINGS}")
        (tmp_path / "strings.py").write_text(STRINGS)
    assert words in fails(train, capsys, config, "--dry-run")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("model.denoiser.detph=3", "did you mean 'model.denoiser.depth'?"),
        ("modle.denoiser.depth=3", "did you mean 'model.denoiser.depth'?"),
        ("model.denoiser.size=(2,9,9)", "is not divisible by patch"),
        ("model.denoiser.depth=3", "even, not 3"),
        ("model.denoiser.num_classes=5", "num_classes=5"),
        ("model.diffusion.path.type=LinearPaht", "did you mean 'LinearPath'?"),
        ("train_dataloader.dataset.split=val", "split must be 'train' or 'test', got 'val'"),
    ],
)
def test_a_mistake_in_an_option(train, capsys, tmp_path, option, words):
    work_dir = tmp_path / "run"
    error = fails(
        train, capsys, NAME, "--dry-run", "--work-dir", work_dir, "--cfg-options", option
    )
    assert words in error
    assert not work_dir.exists()


@pytest.mark.parametrize("more", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("parallel=zero2", "parallel is a dict such as dict(mode='zero2'), got 'zero2'"),
        ("parallel.sequence=two", "parallel.sequence must be a whole number from 1 on, got 'two'"),
        ("activation_checkpointing.mode=half", "activation_checkpointing.mode must be one of"),
        ("optim_wrapper.precision=fp8", "optim_wrapper.precision must be one of"),
        ("optim_wrapper.accumulative_counts=0", "optim_wrapper.accumulative_counts must be a who"),
        (
            "optim_wrapper.clip_grad.max_norm=big",
            "optim_wrapper.clip_grad.max_norm must be a numb",
        ),
        (
            "optim_wrapper.guard.spike_factor=ten",
            "optim_wrapper.guard.spike_factor must be a numb",
        ),
        (
            "default_hooks.watchdog.dead_after=no",
            "default_hooks.watchdog.dead_after must be a num",
        ),
        (
            "default_hooks.checkpoint.interval=0",
            "default_hooks.checkpoint.interval must be a whol",
        ),
        ("custom_hooks.0.decay=2", "custom_hooks.0.decay must be in [0, 1), got 2"),
    ],
)
def test_a_mistake_in_a_value_is_found_at_once(train, capsys, tmp_path, more, option, words):
    work_dir = tmp_path / "run"
    error = fails(train, capsys, NAME, "--work-dir", work_dir, *more, "--cfg-options", option)
    assert error.startswith(f"error: {words}")
    assert not work_dir.exists()


def test_what_needs_a_launcher_is_only_planned_without(train, capsys, tmp_path):
    words = [NAME, "--work-dir", tmp_path / "run", "--parallel", "zero2", "--sequence", "2"]
    assert "parallel.sequence=2 does not divide" in fails(train, capsys, *words)
    error = fails(train, capsys, *words[:-2])
    assert "parallel.mode='zero2' is for processes that a launcher starts" in error
    assert not (tmp_path / "run").exists()
    train.main([*map(str, words), "--dry-run"])


def test_a_setting_that_is_given_twice(train, capsys):
    for flag, value, key in (
        ("--parallel", "zero2", "parallel.mode"),
        ("--sequence", "2", "parallel.sequence"),
        ("--amp", "bf16", "optim_wrapper.precision"),
        ("--seed", "3", "randomness.seed"),
    ):
        option = f"{key}={value}"
        error = fails(train, capsys, NAME, "--dry-run", flag, value, "--cfg-options", option)
        assert f"{flag} {value} and --cfg-options {option} set the same; give one" in error


@pytest.mark.parametrize(("layout", "world"), [("8xa100", 2), ("8xa100", 1), ("1x4090", 8)])
def test_a_layout_for_another_number_of_cards(train, tmp_path, monkeypatch, layout, world):
    work_dir = tmp_path / "run"
    words = ["latte_ucf", "--work-dir", str(work_dir), "--layout", layout]
    if world > 1:
        words += ["--launcher", "pytorch"]
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", world)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    train.check_layout(layout, None)
    train.check_layout(layout, int(layout[0]))
    text = f"--layout {layout} is for {layout[0]} process.*; the number of processes is {world}$"
    with pytest.raises(UserError, match=text):
        train.train(train.parse_args(words))
    assert not work_dir.exists()


def test_a_work_dir_that_holds_another_run(train, run, capsys, tmp_path):
    changes = {"train_cfg.max_iters": 2, "default_hooks.checkpoint.interval": 1}
    work_dir = run(**changes)
    before = sorted(work_dir.rglob("*"))
    error = fails(train, capsys, NAME, "--work-dir", work_dir)
    assert error == (
        f"error: {work_dir} holds iter_2 of an earlier run; go on with --resume, or take another "
        "--work-dir\n"
    )
    train.main([NAME, "--work-dir", str(work_dir), "--dry-run"])
    assert sorted(work_dir.rglob("*")) == before


def test_a_work_dir_that_is_a_file(train, capsys, tmp_path):
    (tmp_path / "notes").write_text("mine")
    for work_dir in (tmp_path / "notes", tmp_path / "notes" / "run"):
        error = fails(train, capsys, NAME, "--work-dir", work_dir)
        assert (
            error == f"error: --work-dir {work_dir}: {tmp_path / 'notes'} is a file, no folder\n"
        )


def test_a_log_on_a_full_disk_gives_no_traceback(train, capsys, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(logging, "raiseExceptions", True)
    train.main([NAME, "--dry-run"])
    capsys.readouterr()
    logging.StreamHandler(Full()).handle(logging.makeLogRecord({"msg": "a line"}))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_dataloader.dataset.frame_size": 9}, "is not divisible by patch"),
        ({"model.denoiser.out_channels": 2}, "set the denoiser's out_channels to 1"),
    ],
)
def test_a_mistake_that_shows_when_training(run, capsys, changes, words):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run(**changes)
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_checkpoint_that_does_not_exist(train, capsys, tmp_path):
    error = fails(train, capsys, NAME, "--work-dir", tmp_path, "--resume", tmp_path / "no.pth")
    assert "no.pth does not exist" in error


def test_a_checkpoint_that_cannot_be_read(run, capsys, tiny_run, tmp_path):
    torch.save(load_checkpoint(tiny_run / "iter_3"), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for name, content in (("half.pth", whole[: len(whole) // 2]), ("text.pth", b"not weights")):
        (tmp_path / name).write_bytes(content)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            run("--resume", str(tmp_path / name), experiment_name=name)
        error = capsys.readouterr().err
        assert f"{name} cannot be read, it is truncated or no checkpoint" in error
        assert error.count("\n") == 1


def test_a_checkpoint_of_another_architecture(run, capsys, tiny_run):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run("--resume", str(tiny_run / "iter_3"), **{"model.denoiser.depth": 4})
    error = capsys.readouterr().err
    assert "another architecture" in error
    assert "missing denoiser.blocks.2" in error
    assert error.count("\n") == 1


# Being light


@pytest.mark.parametrize("name", ["train", "infer", "likelihood", "posthoc_ema"])
def test_help_costs_half_a_second_at_most(name):
    code = f"""
import runpy, sys
sys.argv = ["tools/{name}.py", "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not {{"torch", "mmengine"}} & set(sys.modules)
"""

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert result.returncode == 0, result.stderr.decode()
        assert b"usage: " in result.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) <= 0.5


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_all_that_is_not_there_is_told_before_anything_is_built(tool, capsys, more):
    command = ["stage_c_1b_video", "--layout", "1x4090", *more]
    with pytest.raises(SystemExit):
        tool("train").main(command)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "data/stable_cascade/stage_c_lite.safetensors: no such file; set load_from" in line
    assert (
        "data/own_latents: no such folder; tools/extract_features.py makes it; set train" in line
    )

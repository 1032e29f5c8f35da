"""Training as a whole: what is saved, resumed, interrupted, and split over processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmsora.apis.build import build_model, config_of
from mmsora.engine import SoraRunner
from mmsora.registry import MODELS, RUNNERS
from mmsora.utils.checkpoint import latest_checkpoint, load_checkpoint
from mmsora.utils.config_check import config_dict
from mmsora.utils.user_error import UserError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "VIRTUAL_ENV": sys.prefix,
    "PYTHONUNBUFFERED": "1",
}


def train(cfg):
    runner = RUNNERS.build(cfg)
    assert type(runner) is SoraRunner
    runner.train()
    return runner


def log_of(work_dir):
    return "".join(path.read_text() for path in Path(work_dir).glob("*/*.log"))


def steps_of(work_dir):
    return sorted(int(path.name.split("_")[1]) for path in Path(work_dir).glob("iter_*"))


def equal(one, other):
    """Bit for bit, tensors in containers and all."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


# What a run leaves


def test_the_log_has_a_line_for_each_iteration_and_no_warning_of_a_registry(tiny_run, scalars):
    log = log_of(tiny_run)
    assert "Iter(train) [6/6]" in log
    assert "Failed to search registry" not in log
    assert "not set in your model" not in log
    lines = scalars(tiny_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {
        "lr",
        "loss",
        "grad_norm",
        "samples/s",
        "tokens/s",
        "data_wait",
        "memory",
        "time",
    } <= set(lines[0])
    assert all("eta: " in line for line in log.splitlines() if "Iter(train)" in line)


def test_the_learning_rate_warms_up_and_decays(tiny_run, scalars):
    rates = [line["lr"] for line in scalars(tiny_run)]
    assert rates[0] == pytest.approx(1e-4)  # 0.01 of 1e-2
    assert rates[1:3] == pytest.approx([1e-2, 1e-2])
    assert rates[5] < rates[4] < rates[3] < rates[2]


def test_a_checkpoint_runs_no_code_and_builds_the_same_model(tiny_run):
    path = tiny_run / "iter_6"
    content = load_checkpoint(path)
    assert content["meta"]["iter"] == 6
    assert content["meta"]["dataset_meta"]["classes"] == tuple("0123456789")
    cfg = config_of(content, path)
    assert cfg.model.denoiser.width == 16
    assert cfg.train_cfg.max_iters == 6
    init_default_scope("mmsora")
    model = MODELS.build(cfg.model)
    model.load_state_dict(content["state_dict"])
    assert equal(dict(build_model(cfg, path).denoiser.state_dict()), content["ema"])
    assert config_dict(config_of(content, path)) == config_dict(cfg)


def test_mmengine_runs_the_same_config(tiny_config, tiny_run, scalars):
    cfg = tiny_config(samples=True)
    cfg.train_cfg.max_iters = 3  # the schedule stays that of six
    runner = Runner.from_cfg(cfg)
    assert type(runner) is Runner
    runner.train()
    ours = load_checkpoint(tiny_run / "iter_3")
    assert equal(dict(runner.model.state_dict()), ours["state_dict"])
    assert len(scalars(runner.work_dir)) == 3
    assert Path(runner.work_dir, "iter_3").is_file()
    assert Path(runner.work_dir, "samples/iter_000003.mp4").is_file()


# Resuming


def test_resumed_training_goes_on_as_if_nothing_had_happened(tiny_config, tiny_run, scalars):
    cfg = tiny_config({"default_hooks.checkpoint.interval": 3})
    cfg.resume, cfg.load_from = True, str(tiny_run / "iter_3")
    runner = train(cfg)
    work_dirs = tiny_run, Path(cfg.work_dir)
    straight, resumed = (load_checkpoint(folder / "iter_6") for folder in work_dirs)
    for part in ("state_dict", "ema", "ema_steps", "optimizer", "param_schedulers"):
        assert equal(resumed[part], straight[part]), part
    kept = [line["loss"] for line in scalars(runner.work_dir)]
    assert kept == [line["loss"] for line in scalars(tiny_run)[3:]]
    log = log_of(runner.work_dir)
    assert "the config changed" not in log
    assert "metainfo" not in log  # MMEngine's warning when the dataset is another one


def test_a_resume_tells_what_changed_in_the_config(tiny_config, tiny_run):
    cfg = tiny_config({"optim_wrapper.optimizer.lr": 2e-2, "train_cfg.max_iters": 4})
    cfg.resume, cfg.load_from = True, str(tiny_run / "iter_3")
    train(cfg)
    log = log_of(cfg.work_dir)
    assert "WARNING - the config changed since" in log
    assert "\n  optim_wrapper.optimizer.lr: 0.01 -> 0.02\n" in log
    assert "\n  train_cfg.max_iters: 6 -> 4\n" in log
    assert "load_from: " not in log.partition("the config changed")[2]


def test_weights_alone_cannot_be_resumed(tiny_config, tiny_run, tmp_path):
    weights = {"state_dict": load_checkpoint(tiny_run / "iter_3")["state_dict"]}
    torch.save(weights, tmp_path / "weights.pth")
    cfg = tiny_config()
    cfg.resume, cfg.load_from = True, str(tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights.pth holds weights, not a run"):
        train(cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.denoiser.width": 32},
            r"denoiser.pos_embed is \(4, 16\) there and \(4, 32\) here",
        ),
        ({"model.denoiser.depth": 4}, "missing denoiser.blocks.2"),
        (
            {"model.denoiser.num_classes": 0, "model.conditioner": None},
            "unknown denoiser.embed_la",
        ),
    ],
)
def test_resuming_another_architecture_is_refused_by_name(tiny_config, tiny_run, change, message):
    cfg = tiny_config(change)
    cfg.resume, cfg.load_from = True, str(tiny_run / "iter_3")
    with pytest.raises(UserError, match=f"another architecture than .*: {message}"):
        train(cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.denoiser.width": 32}, r"embed.proj.weight \(16, 16\) there, \(32, 16\) here"),
        ({"model.denoiser.depth": 4}, "missing blocks.2"),
    ],
)
def test_starting_from_another_architecture_is_refused_by_name(
    tiny_config, tiny_run, change, message
):
    cfg = tiny_config(change)
    cfg.load_from = str(tiny_run / "iter_3")
    with pytest.raises(UserError, match=f"iter_3 is of another architecture.*: .*{message}"):
        train(cfg)


def test_loading_takes_the_weights_and_starts_anew(tiny_config, tiny_run, scalars):
    cfg = tiny_config({"train_cfg.max_iters": 1})
    cfg.load_from = str(tiny_run / "iter_3")
    train(cfg)
    assert scalars(cfg.work_dir)[0]["lr"] == pytest.approx(1e-4)
    content = load_checkpoint(Path(cfg.work_dir) / "iter_1")
    assert content["ema_steps"] == 1
    then = load_checkpoint(tiny_run / "iter_3")["ema"]  # the better start
    moved = (content["state_dict"]["denoiser.head.weight"] - then["head.weight"]).abs()
    assert 0 < moved.max() < 2e-4  # one step of Adam at 1e-4


# Checkpoints are safe


class Watch(Hook):
    """Notes which checkpoints lie there at each iteration, and at each rename."""

    priority = "LOWEST"

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, *args, **kwargs):
        self.seen.append(steps_of(runner.work_dir))


def test_old_checkpoints_go_when_the_new_one_is_there(tiny_config, monkeypatch):
    changes = {"interval": 1, "max_keep_ckpts": 2}
    cfg = tiny_config({f"default_hooks.checkpoint.{k}": v for k, v in changes.items()})
    runner = RUNNERS.build(cfg)
    watch, before = Watch(), []
    runner.register_hook(watch)
    replace = os.replace

    def noted(source, target):
        if "iter_" in str(target):
            before.append(steps_of(runner.work_dir))
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    runner.train()
    assert before == [[], [1], [1, 2], [2, 3], [3, 4], [4, 5]]
    assert watch.seen == [[1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6]]


def test_a_resumed_run_goes_on_removing(tiny_config):
    keep = {"default_hooks.checkpoint.interval": 1, "default_hooks.checkpoint.max_keep_ckpts": 2}
    train(tiny_config({**keep, "train_cfg.max_iters": 3}))
    cfg = tiny_config({**keep, "train_cfg.max_iters": 5})
    cfg.resume, cfg.load_from = True, str(latest_checkpoint(cfg.work_dir))
    train(cfg)
    assert steps_of(cfg.work_dir) == [4, 5]


KILLED = """
import os, signal, sys
from mmengine.config import Config
from mmsora.registry import RUNNERS
from mmsora.utils import checkpoint_folder

flush, calls = checkpoint_folder._sync, []

def killed_inside(folder):
    calls.append(folder)
    if len(calls) == 3:  # the second checkpoint's, before it gets its name
        os.kill(os.getpid(), signal.SIGKILL)
    flush(folder)

checkpoint_folder._sync = killed_inside
RUNNERS.build(Config.fromfile(sys.argv[1])).train()
"""


def test_kill_9_inside_a_write_leaves_the_last_checkpoint(tiny_config, tmp_path):
    """With a single one kept, where removing before writing would lose it."""
    cfg = tiny_config(
        {"default_hooks.checkpoint.interval": 2, "default_hooks.checkpoint.max_keep_ckpts": 1}
    )
    config = tmp_path / "config.py"
    cfg.dump(config)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, config], cwd=ROOT, env=ENVIRONMENT, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    work_dir = Path(cfg.work_dir)
    assert (work_dir / ".iter_4.tmp").is_dir()  # what was written, under its own name
    assert latest_checkpoint(work_dir) == work_dir / "iter_2"
    assert (work_dir / "last_checkpoint").read_text() == str(work_dir / "iter_2")

    cfg.resume, cfg.load_from = True, str(latest_checkpoint(work_dir))
    train(cfg)
    assert steps_of(work_dir) == [6]


# Interruptions


def test_signals_save_and_exit_and_resume_goes_on(tiny_config, tmp_path, tool, scalars):
    config = tmp_path / "endless.py"
    tiny_config({"train_cfg.max_iters": 10**6}).dump(config)
    running = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        command = [sys.executable, "tools/train.py", config, "--work-dir", tmp_path / number.name]
        running[number] = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
        )
    try:
        for number, process in running.items():
            while "Iter(train) [" not in process.stdout.readline():
                assert process.poll() is None
            process.send_signal(number)
            rest = process.communicate(timeout=60)[0]
            work_dir = tmp_path / number.name
            saved = latest_checkpoint(work_dir)
            assert process.returncode == 128 + number
            assert f"{number.name}: saving after iteration" in rest
            assert f"saved {saved}; go on with --resume" in rest
    finally:
        for process in running.values():
            process.kill()
            process.stdout.close()

    done = steps_of(work_dir)[-1]
    options = [f"train_cfg.max_iters={done + 2}", "experiment_name=resumed"]
    arguments = [str(config), "--work-dir", str(work_dir), "--resume", "--cfg-options", *options]
    tool("train").main(arguments)
    steps = [line["step"] for line in scalars(work_dir) if "loss" in line]  # some have more lines
    assert steps[-2:] == [done + 1, done + 2]
    assert steps_of(work_dir)[-1] == done + 2


def test_a_signal_at_a_checkpoint_does_not_save_twice(tiny_config, monkeypatch):
    class Terminate(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter + 1 == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    runner = RUNNERS.build(tiny_config({"default_hooks.checkpoint.interval": 2}))
    runner.register_hook(Terminate())
    saves = []
    save = runner.save_checkpoint
    monkeypatch.setattr(
        runner, "save_checkpoint", lambda *a, **k: (saves.append(a), save(*a, **k))
    )
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit, match="143"):
        runner.train()
    assert len(saves) == 1
    assert steps_of(runner.work_dir) == [2]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# Two processes


def test_two_ranks_equal_one_process_with_twice_the_batch(
    tiny_config, tmp_path, scalars, fill_weights
):
    """In the warm-up of the quickstart.

    At its full rate weights part: adding the bias of the keys changes no attention, its gradient
    is rounding errors alone, and Adam makes steps of full size of them.
    """
    common = {
        "train_cfg.max_iters": 5,
        "model.conditioner.drop_prob": 0.5,
        "optim_wrapper.optimizer.lr": 1e-3,
        "param_scheduler.0.end": 200,
        "param_scheduler.1.begin": 200,
        "param_scheduler.1.end": 400,
    }
    one = tiny_config(common, work_dir=tmp_path / "one")
    start = fill_weights(build_model(one)).state_dict()
    weights = tmp_path / "filled.pth"
    torch.save({"state_dict": start}, weights)
    one.load_from = str(weights)
    train(one)

    config = tmp_path / "two.py"
    tiny_config().dump(config)
    options = [f"{key}={value}" for key, value in common.items()]
    options += ["experiment_name=two", "train_dataloader.batch_size=2", f"load_from={weights}"]
    command = ["bash", "tools/dist_train.sh", config, "2", "--work-dir", tmp_path / "two"]
    result = subprocess.run(
        [*command, "--cfg-options", *options],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr

    logs = [scalars(tmp_path / name) for name in ("one", "two")]
    for key in ("loss", "loss_diffusion", "grad_norm"):
        values = [torch.tensor([line[key] for line in log]) for log in logs]
        assert len(values[0]) == 5
        torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-5)
    assert logs[0][0]["loss"] > 0.5  # there is something to learn
    one, two = (load_checkpoint(tmp_path / name / "iter_5") for name in ("one", "two"))
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=0, atol=1e-5)
    torch.testing.assert_close(two["ema"], one["ema"], rtol=0, atol=1e-5)
    moved = max((one["state_dict"][key] - start[key]).abs().max() for key in start)
    assert moved > 5e-5


def test_nothing_listens_for_signals_after_an_error(tiny_config, monkeypatch):
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(number) for number in numbers]
    runner = RUNNERS.build(tiny_config())

    def fail(*args, **kwargs):
        assert [signal.getsignal(number) for number in numbers] != handlers
        raise RuntimeError("in an iteration")

    monkeypatch.setattr(runner.model, "train_step", fail)
    with pytest.raises(RuntimeError, match="in an iteration"):
        runner.train()
    assert [signal.getsignal(number) for number in numbers] == handlers

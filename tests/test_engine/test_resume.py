"""A run that was cut goes on as if nothing had happened, on as many processes or others."""

import json
import os
import random
import shutil
import signal
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import scipy.stats  # noqa: F401  # what data need, which workers cannot import under pytest
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook

from mmsora.datasets.moving_digits import MovingDigits
from mmsora.engine import SafeCheckpointHook
from mmsora.registry import DATASETS, RUNNERS
from mmsora.utils import checkpoint_folder
from mmsora.utils.checkpoint import is_whole, load_checkpoint
from mmsora.utils.user_error import UserError
from tests.ranks import start_ranks

WORKER = Path(__file__).with_name("resume_worker.py")
MODES = ("ddp", "zero1", "zero2", "zero3")
STATEFUL = {
    "model.diffusion.path": dict(type="DiscretePath", num_levels=20),
    "model.diffusion.train_times": dict(type="LossSecondMomentTimes", num_levels=20, history=1),
    "model.diffusion.loss.weighting": dict(type="LearnedUncertainty", features=3),
}


def flat(tree, prefix=""):
    """Tensors by their joined names, and all else that decides how a run goes on."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}/")
        elif key not in ("cfg", "time", "experiment_name", "last_ckpt", "keep_ckpt_ids"):
            yield f"{prefix}{key}", value


def differences(one, other):
    """Names of what is not the same bit for bit in two checkpoints."""
    one, other = (dict(flat(load_checkpoint(path))) for path in (one, other))
    assert one.keys() == other.keys()
    assert sum(isinstance(value, torch.Tensor) for value in one.values()) > 100
    return [k for k in one if not equal(one[k], other[k])]


def equal(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


class Draw(Hook):
    """Uses every global random generator, before a checkpoint is written."""

    def __init__(self):
        self.drawn = []

    def after_train_iter(self, runner, *args, **kwargs):
        numbers = torch.randn(1).item(), np.random.randn(), random.gauss(0, 1)
        self.drawn.append((runner.iter + 1, *numbers))


def train(cfg, *hooks, resume=None):
    if resume is not None:
        cfg.resume, cfg.load_from = True, str(resume)
    cfg.train_dataloader.persistent_workers = cfg.train_dataloader.num_workers > 0
    runner = RUNNERS.build(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    if cfg.train_dataloader.persistent_workers:  # each costs five seconds if it is left to gc
        runner.train_dataloader._iterator._shutdown_workers()
    return Path(cfg.work_dir)


# Exactly


@pytest.mark.parametrize(
    ("interval", "accumulate", "workers", "changes"),
    [(3, 1, 0, STATEFUL), (2, 3, 2, {"optim_wrapper.precision": "bf16"})],
    ids=["on a boundary", "off a boundary, with workers"],
)
def test_it_goes_on_bit_for_bit(tiny_config, tmp_path, interval, accumulate, workers, changes):
    changes = changes | {
        "default_hooks.checkpoint.interval": interval,
        "optim_wrapper.accumulative_counts": accumulate,
        "train_dataloader.num_workers": workers,
        "model.conditioner.drop_prob": 0.5,
        "custom_hooks.0.profiles": [dict(type="PowerEMA", sigma_rel=0.1)],
    }
    straight, resumed = Draw(), Draw()
    one = train(tiny_config(changes, tmp_path / "one"), straight)
    assert sorted(path.name for path in one.glob("iter_*")) == ["iter_3", "iter_6"]
    two = train(tiny_config(changes, tmp_path / "two"), resumed, resume=one / "iter_3")
    assert differences(one / "iter_6", two / "iter_6") == []
    assert resumed.drawn == straight.drawn[3:]
    names = load_checkpoint(one / "iter_6")["state_dict"]
    assert ("diffusion_state.weighting.weight" in names) == (changes.keys() >= STATEFUL.keys())
    moved = differences(one / "iter_3", one / "iter_6")
    assert {name.partition("/")[0] for name in moved} >= {
        *("state_dict", "ema", "ema_profiles", "optimizer", "rng", "data", "param_schedulers"),
        *("optim_wrapper", "meta", "ema_steps"),
    }


@DATASETS.register_module()
class Noted(MovingDigits):
    """Writes down which clips are made, in any process."""

    file: Path

    def __getitem__(self, index):
        with open(self.file, "a") as file:
            file.write(f"{index}\n")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_reads_what_it_needs_and_nothing_before(tiny_config, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(Noted, "file", tmp_path / "read.txt", raising=False)
    order = list(islice(InfiniteSampler(range(10000), seed=0), 24))
    for name, resume, needed in (("one", None, order), ("two", "one/iter_3", order[12:])):
        Noted.file.write_text("")
        cfg = tiny_config({"default_hooks.checkpoint.interval": 3}, tmp_path / name)
        cfg.train_dataloader.num_workers = workers
        cfg.train_dataloader.dataset["type"] = "Noted"
        train(cfg, resume=resume and tmp_path / resume)
        made = [int(line) for line in Noted.file.read_text().split()]
        if workers == 0:
            assert made == needed
        else:  # they read ahead
            assert set(made) >= set(needed)
            assert len(made) == len(set(made))
            assert not set(made) & set(order[: 24 - len(needed)])


def test_the_log_says_what_was_passed_over_and_not_that_data_are_skipped(tiny_config, tiny_run):
    cfg = tiny_config()
    damaged = Path(cfg.work_dir) / "iter_5"
    shutil.copytree(tiny_run / "iter_3", damaged.with_name("iter_3"))
    shutil.copytree(tiny_run / "iter_6", damaged)
    (damaged / ".metadata").unlink()
    cfg.resume = True
    log = log_of(train(cfg))
    assert f"WARNING - {damaged} is damaged; passed over" in log
    assert log.count("passed over") == 1
    assert "iter_3, iteration 3" in log
    assert "Advance dataloader" not in log


def test_the_seed_is_the_runs_own(tiny_config, tmp_path, scalars):
    every = {"default_hooks.checkpoint.interval": 3}
    cfg = tiny_config(every, tmp_path / "one")
    cfg.pop("randomness")
    one = train(cfg)
    cfg = tiny_config({**every, "randomness.seed": 5}, tmp_path / "two")
    two = train(cfg, resume=one / "iter_3")
    assert "the run goes on with its own seed" in log_of(two)
    assert [line["loss"] for line in scalars(two)] == [line["loss"] for line in scalars(one)[3:]]


def log_of(work_dir):
    return "".join(path.read_text() for path in Path(work_dir).glob("*/*.log"))


# When to save


def test_a_signal_waits_for_the_update(tiny_config, tmp_path):
    class Terminate(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter + 1 == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    cfg = tiny_config({"optim_wrapper.accumulative_counts": 3, "train_cfg.max_iters": 9})
    with pytest.raises(SystemExit, match="143"):
        train(cfg, Terminate())
    assert [path.name for path in Path(cfg.work_dir).glob("iter_*")] == ["iter_6"]


def test_what_best_did_is_kept_and_known_after_a_resume(tiny_config):
    scores = {1: 3.0, 2: 1.5, 3: 2.0, 4: 1.0, 5: 1.2}

    class Validate(Hook):
        priority = "LOWEST"  # MMEngine's loop validates when all hooks are done

        def after_train_iter(self, runner, *args, **kwargs):
            loop = runner.train_loop
            loop._iter += 1  # and it has counted
            (hook,) = (hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook))
            hook.after_val_epoch(runner, {"val/loss": scores[loop._iter]})
            loop._iter -= 1

    changes = {
        "default_hooks.checkpoint.save_best": "val/loss",
        "default_hooks.checkpoint.interval": 1,
    }
    best = []
    for last, resume in ((2, None), (5, 2)):
        cfg = tiny_config({**changes, "train_cfg.max_iters": last})
        folder = Path(cfg.work_dir)
        train(cfg, Validate(), resume=resume and folder / f"iter_{resume}")
        best.append([path.name for path in folder.glob("best_*")])
    assert best == [["best_val_loss_iter_2"], ["best_val_loss_iter_4"]]
    content = load_checkpoint(folder / best[1][0])
    assert content["meta"]["iter"] == 4
    assert "optimizer" not in content
    for part in ("state_dict", "ema"):
        assert (
            dict(flat(content[part])).keys()
            == dict(flat(load_checkpoint(folder / "iter_4")[part])).keys()
        )
    with pytest.raises(UserError, match=r"best_val_loss_iter_4 holds weights, not a run"):
        train(tiny_config(changes), resume=folder / best[1][0])
    changes["default_hooks.checkpoint.save_best"] = "val/loss_ema"
    with pytest.raises(UserError, match=r"save_best='val/loss_ema': .* gives val/loss$"):
        train(tiny_config(changes), Validate())


# Behind the training


def test_what_is_saved_behind_equals_what_is_saved_at_once(tiny_config, tmp_path, monkeypatch):
    goes_on, write, ended = threading.Event(), checkpoint_folder._write, []

    def slowly(*args):
        assert goes_on.wait(30), "training stood still"
        write(*args)
        ended.append(args[2].name)

    class Watch(Hook):
        priority = "LOWEST"

        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter + 1 == 3:  # one more than was saved
                assert [path.name for path in Path(runner.work_dir).glob("iter_*")] == []
                goes_on.set()

    common = {"default_hooks.checkpoint.interval": 2, "train_cfg.max_iters": 5}
    one = train(tiny_config(common, tmp_path / "one"))
    common |= {"default_hooks.checkpoint.max_keep_ckpts": 1}
    cfg = tiny_config({**common, "default_hooks.checkpoint.async_save": True}, tmp_path / "two")
    monkeypatch.setattr(checkpoint_folder, "_write", slowly)
    two = train(cfg, Watch())
    assert ended == ["iter_2", "iter_4", "iter_5"]
    assert [path.name for path in two.glob("*iter_*")] == ["iter_5"]
    assert (two / "last_checkpoint").read_text() == str(two / "iter_5")
    assert differences(one / "iter_5", two / "iter_5") == []


@pytest.mark.parametrize("behind", [False, True])
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tiny_config, monkeypatch, behind):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    changes = {"default_hooks.checkpoint.async_save": behind}
    folder = train(tiny_config({**changes, "train_cfg.max_iters": 1}))
    monkeypatch.setattr(os, "fsync", full)
    cfg = tiny_config({**changes, "train_cfg.max_iters": 2})
    with pytest.raises(UserError, match=r"iter_2 cannot be written by rank 0: No space left"):
        train(cfg, resume=folder / "iter_1")
    assert [path.name for path in folder.glob("*iter_*")] == ["iter_1"]
    assert is_whole(folder / "iter_1")


# Several processes


def plan(folder, mode, accumulate, resume=None, batch=2, workers=0, iters=6):
    """A run of ``resume_worker.py``. An eps as in ``test_parallel.py``."""
    changes = {
        "train_cfg.max_iters": iters,
        "train_dataloader.batch_size": batch,
        "train_dataloader.num_workers": workers,
        "model.conditioner.drop_prob": 0.5,
        "model.diffusion.loss.weighting": {"type": "LearnedUncertainty", "features": 3},
        "optim_wrapper.optimizer.eps": 1e-3,
        "optim_wrapper.accumulative_counts": accumulate,
        "default_hooks.checkpoint.interval": iters // 2 if accumulate == 1 else iters // 2 - 1,
        "custom_hooks.0.profiles": [{"type": "PowerEMA", "sigma_rel": 0.1}],
        "custom_hooks.0.snapshot_interval": 1,
    }
    parallel = {"mode": mode.removesuffix("s"), "sequence": 2 if mode.endswith("s") else 1}
    resume = resume and str(resume)
    return {"work_dir": str(folder), "changes": changes, "parallel": parallel, "resume": resume}


def launch(runs, world, folder):
    """Train on ``world`` processes."""
    (folder / "runs.json").write_text(json.dumps(runs))
    processes = start_ranks([sys.executable, WORKER, folder / "runs.json"], world, folder)
    try:
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world, (folder / "rank_0.txt").read_text()[-3000:]


def losses(scalars, folder):
    return {line["step"]: line["loss"] for line in scalars(folder)}


ACCUMULATE = {"ddp": 1, "zero1": 3, "zero2": 1, "zero3": 3}
INTO = {"ddp": "zero2", "zero1": "zero3", "zero2": "ddp", "zero3": "zero1"}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Runs in every mode, and what goes on from their middle in the same mode and in another."""
    folder, runs = tmp_path_factory.mktemp("modes"), []
    for mode, accumulate in ACCUMULATE.items():
        middle = folder / mode / "iter_3"
        runs.append(plan(folder / mode, mode, accumulate))
        runs.append(plan(folder / f"{mode}_same", mode, accumulate, middle))
        runs.append(plan(folder / f"{mode}_other", INTO[mode], accumulate, middle))
    for mode in ("ddp", "zero3"):
        run = plan(folder / f"{mode}_loaded", mode, 1, iters=2)
        runs.append({**run, "load_from": str(folder / "ddp/iter_3")})
    launch(runs, 2, folder)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_goes_on_bit_for_bit(two_ranks, mode, scalars):
    straight, resumed = two_ranks / mode, two_ranks / f"{mode}_same"
    assert differences(straight / "iter_6", resumed / "iter_6") == []
    then = losses(scalars, straight)
    assert losses(scalars, resumed) == {step: then[step] for step in (4, 5, 6)}
    files = [sorted(folder.glob("ema_snapshots/*")) for folder in (straight, resumed)]
    assert len(files[1]) == (3 if ACCUMULATE[mode] == 1 else 1)
    for one, other in zip(files[0][-len(files[1]) :], files[1], strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes() or differ_in_config_only(one, other)


def differ_in_config_only(one, other):
    one, other = load_checkpoint(one), load_checkpoint(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def assert_close(one, other, parts):
    one, other = (dict(flat(load_checkpoint(path, parts))) for path in (one, other))
    names = [name for name in other if name.partition("/")[0] in parts]
    assert len(names) > 80
    for name in names:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_goes_on_in_another(two_ranks, mode, scalars):
    straight, resumed = two_ranks / mode, two_ranks / f"{mode}_other"
    assert_close(resumed / "iter_6", straight / "iter_6", ("state_dict", "ema", "optimizer"))
    then, now = losses(scalars, straight), losses(scalars, resumed)
    assert set(now) == {4, 5, 6}
    assert all(now[step] == pytest.approx(then[step], rel=1e-6) for step in now)
    assert f"parallel {INTO[mode]}: 2 processes" in log_of(resumed)


def test_weights_are_loaded_into_shards(two_ranks, scalars):
    one, other = (losses(scalars, two_ranks / f"{mode}_loaded") for mode in ("ddp", "zero3"))
    assert one == pytest.approx(other, rel=1e-6)
    log = log_of(two_ranks / "zero3_loaded")
    assert f"the denoiser starts from {two_ranks / 'ddp/iter_3'}" in log
    assert one[1] != losses(scalars, two_ranks / "ddp")[1]


@pytest.mark.parametrize("mode", ["zero1", "zero3"])
def test_a_single_process_goes_on(two_ranks, tiny_config, tmp_path, scalars, mode):
    run = plan(tmp_path / "one", "none", ACCUMULATE[mode], batch=4)
    cfg = tiny_config(run["changes"], run["work_dir"])
    folder = train(cfg, resume=two_ranks / mode / "iter_3")
    then, now = losses(scalars, two_ranks / mode), losses(scalars, folder)
    assert now[4] == pytest.approx(then[4], rel=1e-6)
    assert_close(
        folder / "iter_6", two_ranks / mode / "iter_6", ("state_dict", "ema", "optimizer")
    )
    assert "saved by 2 processes, resumed by 1: new random states" in log_of(folder)


# The whole matrix


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", [*MODES, "zero3s"])
def test_twenty_steps_are_ten_and_ten(tmp_path, mode, workers):
    runs = []
    for accumulate in (1, 3):  # which postpones the checkpoint of the ninth to the next update
        middle = tmp_path / f"{accumulate}" / ("iter_10" if accumulate == 1 else "iter_9")
        runs.append(plan(middle.parent, mode, accumulate, workers=workers, iters=20))
        resumed = tmp_path / f"{accumulate}_on"
        runs.append(plan(resumed, mode, accumulate, middle, workers=workers, iters=20))
    launch(runs, 2, tmp_path)
    for accumulate in (1, 3):
        folders = tmp_path / f"{accumulate}", tmp_path / f"{accumulate}_on"
        assert differences(*(folder / "iter_20" for folder in folders)) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_four_processes_then_two_then_one(tmp_path, tiny_config, scalars, mode):
    launch([plan(tmp_path / "four", mode, 1, batch=1)], 4, tmp_path)
    middle = tmp_path / "four/iter_3"
    launch([plan(tmp_path / "two", INTO[mode], 1, middle, batch=2)], 2, tmp_path)
    run = plan(tmp_path / "one", "none", 1, batch=4)
    train(tiny_config(run["changes"], run["work_dir"]), resume=middle)
    then = losses(scalars, tmp_path / "four")
    for folder in (tmp_path / "two", tmp_path / "one"):
        assert losses(scalars, folder)[4] == pytest.approx(then[4], rel=1e-6)
        parts = ("state_dict", "ema", "optimizer")
        assert_close(folder / "iter_6", tmp_path / "four/iter_6", parts)

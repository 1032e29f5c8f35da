"""Killed, out of disk or interrupted at any moment, a run goes on from a whole checkpoint."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from mmsora.registry import RUNNERS
from mmsora.utils.checkpoint import latest_checkpoint, load_checkpoint
from mmsora.utils.user_error import UserError, user_errors_as_one_line
from tests.ranks import ROOT
from tests.test_engine.kills_worker import INTERVAL


@pytest.mark.parametrize(
    ("kills", "seed"), [(4, 3), pytest.param(20, 1, marks=pytest.mark.slow)], ids=str
)
def test_kill_9_at_any_moment_loses_one_interval_at_most(kills, seed, tmp_path):
    worker = Path(__file__).with_name("kills_worker.py")
    done = subprocess.run(
        [sys.executable, worker, tmp_path, str(kills), str(seed)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *report, end = json.loads((tmp_path / "kills.json").read_text())
    assert len(report) == kills
    before = 0
    for kill in report:
        assert kill["code"] == -signal.SIGKILL
        assert kill["reached"] - kill["saved"] <= INTERVAL
        assert kill["saved"] >= before
        before = kill["saved"]
    assert before > 0
    assert end["code"] == 0
    name = f"iter_{end['saved']}"
    whole, killed = (load_checkpoint(tmp_path / run / name) for run in ("whole", "killed"))
    for part in ("state_dict", "ema", "optimizer"):
        torch.testing.assert_close(killed[part], whole[part], rtol=0, atol=0)
    left = {path.name for path in (tmp_path / "killed").glob("*iter_*")}
    assert name in left
    assert len(left) <= 2
    assert not list((tmp_path / "killed").glob(".*"))  # halves are cleared away


class AtSave(Hook):
    """Does something when the checkpoint of iteration 4 is about to be written."""

    def __init__(self, action):
        self.action = action

    def before_save_checkpoint(self, runner, checkpoint):
        if runner.iter + 1 == 4:
            self.action()


def run_until_save(cfg, action):
    runner = RUNNERS.build(cfg)
    runner.register_hook(AtSave(action))
    runner.train()


def whole_so_far(cfg):
    """The newest checkpoint, which is whole and alone."""
    assert not list(Path(cfg.work_dir).glob(".*"))
    found = latest_checkpoint(cfg.work_dir)
    assert load_checkpoint(found)["meta"]["iter"] == 2
    return found.name


@pytest.fixture
def every_second(tiny_config):
    """A config of runs that fail, and so leave their handlers of signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    yield tiny_config({"default_hooks.checkpoint.interval": 2})
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_disk_that_is_full_before_a_save_leaves_the_last_checkpoint(every_second, monkeypatch):
    usage = shutil.disk_usage

    def fill():
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=10**5))

    full = os.strerror(errno.ENOSPC)
    text = rf"iter_4 cannot be written by rank 0: {full} \([\d,]+ bytes needed, 100,000 free\)"
    with pytest.raises(UserError, match=text):
        run_until_save(every_second, fill)
    assert whole_so_far(every_second) == "iter_2"


def test_a_disk_that_fills_up_during_a_save_leaves_the_last_checkpoint(every_second):
    """A limit on the size of files, which the file of the tensors exceeds in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))

    text = f"iter_4 cannot be written by rank 0: {os.strerror(errno.EFBIG)}"
    try:
        with pytest.raises(UserError, match=text):
            run_until_save(every_second, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert whole_so_far(every_second) == "iter_2"
    assert (Path(every_second.work_dir) / "last_checkpoint").read_text().endswith("iter_2")


def test_any_write_to_a_full_disk_ends_in_one_line(capsys, monkeypatch):
    def write(number):
        with user_errors_as_one_line():
            raise OSError(number, os.strerror(number))

    with pytest.raises(SystemExit, match="2"):
        write(errno.ENOSPC)
    assert capsys.readouterr().err == "error: No space left on device; make room on the disk\n"
    with pytest.raises(OSError, match="Permission denied"):
        write(errno.EACCES)
    monkeypatch.setenv("MMSORA_TRACEBACK", "1")
    with pytest.raises(OSError, match="No space left"):
        write(errno.ENOSPC)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_in_a_save_leaves_the_last_checkpoint(every_second, monkeypatch, capfd):
    replace = os.replace

    def interrupted(source, target):
        if Path(target).name == "iter_4":
            interrupt()
            time.sleep(5)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(SystemExit, match="130"), user_errors_as_one_line():
        run_until_save(every_second, interrupt)
    assert capfd.readouterr().err.endswith("error: interrupted\n")
    assert whole_so_far(every_second) == "iter_2"

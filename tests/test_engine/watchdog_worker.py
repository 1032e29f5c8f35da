"""Pairs of processes of which one fails, each pair in another way, all at the same time.

``python watchdog_worker.py FOLDER`` writes ``FOLDER/codes.json``, the exit code of each process
and how many seconds after the fault it ended, and what each said to ``FOLDER/KIND_RANK.txt``.
Processes are forked, so that PyTorch is loaded once.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from mmengine.hooks import Hook

from mmsora.engine import WatchdogHook
from mmsora.registry import RUNNERS
from tests.conftest import tiny
from tests.ranks import free_port, preload

AT = 4  # iteration of the fault
FAULTS = {  # and the rank that they happen to
    "first killed": 0,
    "second killed in a save": 1,
    "second stopped": 1,
    "second sleeps": 1,
    "second raises": 1,
}


class Fault(Hook):
    """What goes wrong on one rank."""

    priority = "LOWEST"  # after the watchdog

    def __init__(self, kind, folder):
        self.kind, self.rank, self.folder = kind, FAULTS[kind], folder

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == AT and "save" not in self.kind:
            self.happen(runner)

    def before_save_checkpoint(self, runner, checkpoint):
        if runner.iter + 1 == AT and "save" in self.kind:
            self.happen(runner)

    def happen(self, runner):
        time.sleep(1.5)  # beats tell where it is
        if "sleeps" in self.kind:  # not before: the first iterations may be slow
            watchdog = next(hook for hook in runner.hooks if isinstance(hook, WatchdogHook))
            watchdog.watchdog._peers.hung_after = 6
        if runner.rank != self.rank:
            return
        (self.folder / f"{self.kind}.time").write_text(str(time.time()))
        if "killed" in self.kind:
            os.kill(os.getpid(), signal.SIGKILL)
        if "stopped" in self.kind:
            os.kill(os.getpid(), signal.SIGSTOP)
        if "sleeps" in self.kind:
            self.sleep_for_ever()
        if "raises" in self.kind:
            raise RuntimeError("the disk is gone\nfor good")

    def sleep_for_ever(self):
        time.sleep(600)


def train(kind, folder):
    changes = {"default_hooks.watchdog.dead_after": 5, "default_hooks.checkpoint.interval": 2}
    cfg = tiny(folder / kind, changes)
    cfg.launcher = "pytorch"
    runner = RUNNERS.build(cfg)
    runner.register_hook(Fault(kind, folder))
    runner.train()


def child(kind, rank, port, folder):
    """A process of a pair; it never returns."""
    with open(folder / f"{kind}_{rank}.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    code = 0
    try:
        train(kind, folder)
    except BaseException:
        traceback.print_exc()
        code = 3
    sys.stdout.flush()
    os._exit(code)


def main():
    folder, running, ended = Path(sys.argv[1]), {}, {}
    preload()
    for kind in FAULTS:
        port = free_port()
        for rank in (0, 1):
            running[os.fork() or child(kind, rank, port, folder)] = (kind, rank)
    end = time.time() + 100
    while running and time.time() < end:
        for pid in list(running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                kind, rank = running.pop(pid)
                begun = folder / f"{kind}.time"
                since = time.time() - float(begun.read_text()) if begun.is_file() else None
                ended[f"{kind}_{rank}"] = [os.waitstatus_to_exitcode(status), since]
        time.sleep(0.1)
        if all(kind == "second stopped" and rank == 1 for kind, rank in running.values()):
            break
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    (folder / "codes.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()

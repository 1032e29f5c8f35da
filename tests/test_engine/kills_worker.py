"""A run that is killed again and again, at random moments, and goes on each time.

``python kills_worker.py FOLDER KILLS SEED`` trains ``FOLDER/whole`` without a kill, and
``FOLDER/killed`` to the same iteration, with a kill -9 before each odd line of the report
``FOLDER/kills.json`` inside a save, before each even one at any time. Processes are forked, so
that PyTorch is loaded once.
"""

import json
import os
import random
import signal
import sys
import threading
import traceback
from pathlib import Path

from mmengine.hooks import Hook

from mmsora.engine import SafeCheckpointHook
from mmsora.registry import RUNNERS
from mmsora.utils.checkpoint import latest_checkpoint
from tests.conftest import tiny
from tests.ranks import preload

INTERVAL = 3
# Moments inside a save are the lines of these that it runs, tens of thousands.
TRACED = ("/mmsora/", "/checkpoint/filesystem.py", "/torch/serialization.py", "/shutil.py")


class Progress(Hook):
    """Notes each iteration that began, and kills the process some seconds after the first."""

    priority = "HIGHEST"

    def __init__(self, folder, seconds):
        self.file, self.seconds = folder / "progress", seconds

    def before_train_iter(self, runner, *args, **kwargs):
        self.file.write_text(str(runner.iter + 1))
        if self.seconds is not None:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            self.seconds = None


def count_lines_of_saves(kill_at, report):
    """Kill the process at a line of all saves together, or report how many the first one has."""
    count, save = [0], SafeCheckpointHook.save_now

    def trace(frame, event, argument):
        if not any(part in frame.f_code.co_filename for part in TRACED):
            return None
        if event == "line":
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced(self, runner):
        sys.settrace(trace)
        save(self, runner)
        sys.settrace(None)
        if kill_at is None and not report.exists():
            report.write_text(str(count[0]))

    SafeCheckpointHook.save_now = traced


def train(work_dir, last, seconds=None, line=None):
    """In a fork: go on from the newest checkpoint to iteration ``last``; the exit code."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        changes = {"default_hooks.checkpoint.interval": INTERVAL, "train_cfg.max_iters": last}
        changes["default_hooks.checkpoint.max_keep_ckpts"] = 2
        cfg = tiny(work_dir, changes)
        if found := latest_checkpoint(work_dir):
            cfg.resume, cfg.load_from = True, str(found)
        count_lines_of_saves(line, work_dir.parent / "lines")
        runner = RUNNERS.build(cfg)
        runner.register_hook(Progress(work_dir, seconds))
        runner.train()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main():
    folder, kills, generator = Path(sys.argv[1]), int(sys.argv[2]), random.Random(sys.argv[3])
    preload()
    assert train(folder / "first", INTERVAL) == 0
    lines = int((folder / "lines").read_text())
    report, work_dir = [], folder / "killed"
    for number in range(kills):
        if number % 2:
            place = {"line": generator.randrange(1, 2 * lines)}
        else:
            place = {"seconds": generator.uniform(0, 0.3)}
        code = train(work_dir, 10**6, **place)
        found = latest_checkpoint(work_dir)
        reached = int((work_dir / "progress").read_text())
        saved = int(found.name.split("_")[1]) if found else 0
        report.append({**place, "code": code, "reached": reached, "saved": saved})
    last = report[-1]["saved"] + 2 * INTERVAL
    report.append({"code": train(work_dir, last), "saved": last})
    assert train(folder / "whole", last) == 0
    (folder / "kills.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()

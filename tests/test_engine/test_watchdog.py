"""A rank that dies or hangs: the others notice, say which it was, and stop."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmsora.engine import WatchdogHook
from mmsora.engine.watchdog import Beat, Peers, Watchdog
from mmsora.registry import RUNNERS
from mmsora.utils.checkpoint import latest_checkpoint
from tests.ranks import ROOT

# What a rank knows of the others


def beat(rank, number, iteration=7, phase="in the training step", end=None):
    return Beat(number, f"host{rank}", 100 + rank, iteration, phase, end)


def peers(rank=1, world=3):
    return Peers(rank, world, dead_after=20, hung_after=100, interval=2, now=0.0)


def listen(known, seconds, quiet=(), start=0, is_sure=False, **beats):
    """Hear of all ranks every two seconds, but of quiet ones always the same; the first fault."""
    for now in range(start + 2, start + seconds + 1, 2):
        heard = [
            beats.get(f"rank{rank}", beat)(rank, start if rank in quiet else now)
            for rank in range(3)
        ]
        known.hear(heard, now)
        if fault := known.fault(now, is_sure):
            return now, fault
    return None


def test_a_rank_that_is_silent_for_long_is_dead():
    known = peers()
    assert listen(known, 20) is None
    now, fault = listen(known, 40, quiet=[2], start=20)
    assert (now, fault.rank, fault.is_hung) == (42, 2, False)
    assert fault.text == (
        "rank 2 (host2, pid 102) has not been heard of for 22 s; it was last at iteration 7, "
        "in the training step"
    )


def test_less_silence_is_enough_when_a_collective_has_failed():
    now, fault = listen(peers(), 40, quiet=[0], is_sure=True)
    assert (now, fault.rank) == (10, 0)
    assert listen(peers(), 40, is_sure=True) is None


def test_of_itself_a_rank_says_nothing():
    assert listen(peers(rank=2), 80, quiet=[2]) is None


def test_of_several_the_longest_silence_counts():
    known = peers()
    assert listen(known, 12, quiet=[2], rank0=lambda rank, n: beat(rank, min(n, 4))) is None
    assert known.fault(12.5, is_sure=True).rank == 2  # 0 has been silent for more than 6 s too


def test_a_rank_that_ended_well_is_not_missed_and_one_that_failed_is():
    def ended(end):
        return lambda rank, number: beat(rank, 0, end=end)

    assert listen(peers(), 90, rank0=ended("")) is None
    now, fault = listen(peers(), 40, rank0=ended("ValueError: no"))
    assert (now, fault.rank) == (10, 0)
    assert fault.text == (
        "rank 0 (host0, pid 100) stopped at iteration 7, in the training step: ValueError: no"
    )


def test_without_an_answer_of_the_store_the_first_rank_is_gone():
    known = peers()
    listen(known, 10)
    assert [known.fault(now, False) for now in range(11, 31)] == [None] * 20
    assert known.fault(31.0, False).rank == 0
    known = peers(rank=0)  # which has the store beside it
    listen(known, 10)
    assert [known.fault(now, False) for now in range(11, 99)] == [None] * 88


def test_time_in_which_a_rank_stood_still_itself_does_not_count():
    known = peers()
    listen(known, 10)
    assert known.fault(500.0, False) is None
    assert known.fault(502.0, False) is None
    _, fault = listen(known, 60, quiet=[2], start=502)
    assert fault.rank == 2


def test_of_ranks_that_do_not_move_the_one_least_far_hangs():
    def at(iteration, phase):
        return lambda rank, number: beat(rank, number, iteration, phase)

    def fault(one, other):
        return listen(peers(), 200, rank0=at(*one), rank2=at(*other))

    step, loading = "in the training step", "loading data"
    now, found = fault((7, step), (7, loading))
    assert (now, found.rank, found.is_hung) == (104, 2, True)
    assert found.text == (
        "rank 2 (host2, pid 102) has not moved for 102 s; it is at iteration 7, loading data"
    )
    assert fault((6, "validating batch 2"), (7, loading))[1].rank == 0
    assert fault((7, "saving a checkpoint"), (8, loading))[1].rank == 1  # itself, in the step
    moving = [listen(peers(), 200, **{f"rank{i}": lambda r, n: beat(r, n, n) for i in range(3)})]
    assert moving == [None]


class Store(dict):
    """What ranks talk over, in one process."""

    def set(self, key, value):
        self[key] = value.encode()

    def multi_get(self, keys):
        return [self[key] for key in keys]


@pytest.mark.parametrize(("rank", "is_hung"), [(0, True), (0, False), (3, True)])
def test_what_another_rank_has_decided_is_followed(rank, is_hung, monkeypatch):
    codes, lines = [], []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    watchdog = Watchdog(store := Store(), 20, 100, lines.append)
    store.set("verdict", "nothing")
    watchdog._talk()
    assert codes == []
    store.set("verdict", json.dumps([rank, "rank 0 has not moved", is_hung, 2]))
    watchdog._talk()
    assert codes == [1]
    if rank == 0 and is_hung:
        (line,) = lines
        assert line.startswith("rank 0 is here:\nthread MainThread\n")
    else:
        assert lines == []


def test_arguments_are_checked():
    for dead_after, hung_after in ((0, 10), ("no", 10), (10, 10), (20, 5)):
        with pytest.raises(ValueError, match=r"(dead|hung)_after must be a number above \d"):
            WatchdogHook(dead_after, hung_after)


def test_a_single_process_watches_nobody(tiny_config):
    runner = RUNNERS.build(tiny_config({"train_cfg.max_iters": 1}))
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, WatchdogHook))
    runner.train()
    assert hook.watchdog is None
    assert not [t for t in threading.enumerate() if t.name.startswith("watchdog")]
    hook.failed(RuntimeError("nothing"))


# Two processes


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    worker = Path(__file__).with_name("watchdog_worker.py")
    subprocess.run(
        [sys.executable, worker, folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=200,
    )
    return folder


PLACE = r"at iteration 5, loading data"
SILENT = r"\(.+, pid \d+\) has not been heard of for \d s; it was last"


@pytest.mark.parametrize(
    ("kind", "rank", "text"),
    [
        ("first killed", 0, f"rank 0 {SILENT} {PLACE}; stopping"),
        ("second killed in a save", 1, f"rank 1 {SILENT} at iteration 4, saving a checkpoint"),
        ("second stopped", 1, f"rank 1 {SILENT} {PLACE}; stopping"),
        ("second sleeps", 1, rf"rank 1 .* has not moved for \d+ s; it is {PLACE}; stopping"),
        ("second raises", 1, f"rank 1 .* stopped {PLACE}: RuntimeError: the disk is gone; stop"),
    ],
)
def test_when_a_rank_fails_the_other_names_it_and_stops(pairs, kind, rank, text):
    code, seconds = json.loads((pairs / "codes.json").read_text())[f"{kind}_{1 - rank}"]
    assert code == 1
    assert seconds < 30
    said = [(pairs / f"{kind}_{number}.txt").read_text() for number in (0, 1)]
    both = "".join(said)
    assert len(re.findall(text, both)) == 1
    assert len(re.findall("; stopping. Go on with --resume", both)) == 1
    assert "Traceback" not in said[1 - rank]
    if "save" in kind:
        assert latest_checkpoint(pairs / kind).name == "iter_2"
    if kind == "second sleeps":
        assert re.search(r"rank 1 is here:\nthread MainThread\n(?s:.*)sleep_for_ever", said[1])
        assert "sleep_for_ever" not in said[0]


def test_of_processes_that_torchrun_started_one_is_killed(tiny_config, tmp_path):
    config = tmp_path / "endless.py"
    cfg = tiny_config({"train_cfg.max_iters": 10**6, "default_hooks.watchdog.dead_after": 5})
    cfg.dump(config)
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        launcher = subprocess.Popen(
            ["bash", "tools/dist_train.sh", config, "2", "--work-dir", tmp_path / "two"],
            cwd=ROOT,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        while "Iter(train) [" not in output.read_text():
            assert launcher.poll() is None, output.read_text()
            time.sleep(0.2)
        time.sleep(1)
        listed = subprocess.run(
            ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True
        )
        second = max(map(int, listed.stdout.split()))
        os.kill(second, signal.SIGKILL)
        assert launcher.wait(timeout=60) != 0
    finally:
        launcher.kill()
    assert re.search(f"rank 1 {SILENT} at iteration .*; stopping", output.read_text())

"""The page of a run as it trains, ends, is told to stop and goes on."""

import json
import os
import signal
from html import escape
from pathlib import Path

import pytest
from mmengine.hooks import Hook

from mmsora.engine.hooks import report_hook
from mmsora.registry import RUNNERS
from mmsora.utils.checkpoint import latest_checkpoint
from mmsora.utils.user_error import UserError


def state_of(work_dir):
    """What the last start of a run says of itself, and its page."""
    path = sorted(Path(work_dir).glob("*/vis_data/run.json"))[-1]
    return json.loads(path.read_text()), (Path(work_dir) / "report.html").read_text()


class Look(Hook):
    """Notes what the page says after each iteration."""

    priority = "LOWEST"

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, *args, **kwargs):
        state, page = state_of(runner.work_dir)
        self.seen.append((state["status"], state["iteration"], page.count("<video")))


@pytest.mark.parametrize(("pause", "seen"), [(-1.0, [0, 2, 2, 4, 4, 6]), (1e9, [0] * 6)])
def test_the_page_follows_the_run(tiny_config, monkeypatch, pause, seen):
    monkeypatch.setattr(report_hook, "PAUSE", pause)
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", "tiny", "--seed", "a b"])
    changes = {"default_hooks.report.interval": 2, "custom_hooks.1.interval": 3}
    cfg = tiny_config(changes, samples=True)
    runner, look = RUNNERS.build(cfg), Look()
    runner.register_hook(look)
    runner.train()
    assert [iteration for _, iteration, _ in look.seen] == seen
    assert {status for status, _, _ in look.seen} == {"training"}
    state, page = state_of(cfg.work_dir)
    assert (state["status"], state["iteration"], state["max_iters"]) == ("finished", 6, 6)
    assert state["command"] == "train.py tiny --seed 'a b'"
    assert state["environment"]["torch"].startswith("torch ")
    assert ">finished<" in page
    assert "<video" in page
    assert '"title":"Loss"' in page
    assert "max_iters=6" in page  # the config
    assert not list(Path(cfg.work_dir).glob(".report*"))


def test_an_interrupted_run_says_so_and_a_resumed_one_goes_on(tiny_config, tmp_path):
    class Terminate(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter + 1 == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    runner = RUNNERS.build(tiny_config())
    runner.register_hook(Terminate())
    with pytest.raises(SystemExit, match="143"):
        runner.train()
    state, page = state_of(tmp_path / "run")
    assert (state["status"], state["iteration"]) == ("interrupted", 4)
    assert "go on with --resume" in page

    cfg = tiny_config()
    cfg.resume, cfg.load_from = True, str(latest_checkpoint(tmp_path / "run"))
    folder = next((tmp_path / "run").glob("*/vis_data")).parent
    folder.rename(folder.with_name("20200101_000000"))  # a second has not passed
    RUNNERS.build(cfg).train()
    state, page = state_of(tmp_path / "run")
    assert (state["status"], state["iteration"]) == ("finished", 6)
    assert "Commands" in page
    steps = json.loads(page.split('"lines":{"loss":[')[1].split("]")[0] + "]")
    assert steps == [1, 2, 3, 4, 5, 6]


class Fail(Hook):
    """Ends the run in its fourth iteration."""

    def __init__(self, error):
        self.error = error

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter == 3:
            raise self.error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("20 updates were\nskipped: <nan>"), "failed", "20 updates were skipped: <nan>"),
        (MemoryError(), "failed", "MemoryError"),
        (KeyboardInterrupt(), "training", None),
    ],
)
def test_a_run_that_ends_with_an_error_says_which(tiny_config, scalars, error, status, words):
    cfg = tiny_config({"default_hooks.logger.interval": 1})
    runner = RUNNERS.build(cfg)
    runner.register_hook(Fail(error), priority="VERY_LOW")  # after the log's line
    with pytest.raises(type(error)):
        runner.train()
    state, page = state_of(cfg.work_dir)
    assert (state["status"], state.get("error")) == (status, words)
    assert f">{status}<" in page
    if words:
        assert f"the run ended with an error: {escape(words)}" in page
        assert state["iteration"] == 3
        steps = json.loads(page.split('"lines":{"loss":[')[1].split("]")[0] + "]")
        assert steps == [line["step"] for line in scalars(cfg.work_dir)] == [1, 2, 3, 4]


def test_an_error_before_training_has_no_page(tiny_config):
    cfg = tiny_config()
    cfg.resume, cfg.load_from = True, "nowhere"
    with pytest.raises(UserError, match="nowhere does not exist"):
        RUNNERS.build(cfg).train()
    assert not list(Path(cfg.work_dir).glob("report.html"))


def test_a_page_that_cannot_be_written_stops_nothing(tiny_config, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmsora.visualization.run_report.write_text", full)
    cfg = tiny_config({"train_cfg.max_iters": 1})
    RUNNERS.build(cfg).train()
    log = next(Path(cfg.work_dir).glob("*/*.log")).read_text()
    assert "report.html could not be written: [Errno 28] No space left on device" in log


def test_a_run_that_keeps_no_figures_is_told(tiny_config):
    cfg = tiny_config({"train_cfg.max_iters": 1})
    cfg.visualizer = dict(type="mmengine.Visualizer", vis_backends=[])
    RUNNERS.build(cfg).train()
    log = next(Path(cfg.work_dir).glob("*/*.log")).read_text()
    assert "report.html will have no curves: add dict(type=LocalVisBackend)" in log
    assert ">finished<" in state_of(cfg.work_dir)[1]

"""Of several processes one tells what is wrong."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mmsora.utils.user_error import RANKS, UserError, user_errors_as_one_line

LINE = "error: the config is wrong\n"
FAILING = """
from mmsora.utils.user_error import UserError, user_errors_as_one_line
import signal
signal.signal(signal.SIGTERM, lambda *args: None)  # as in training, where it is only noted
with user_errors_as_one_line():
    print("fails", flush=True)
    raise UserError("the config is wrong")
"""


@pytest.mark.parametrize("name", [None, *RANKS])
def test_the_first_process_tells_at_once_and_the_others_late(name, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    for other in RANKS:
        monkeypatch.delenv(other, raising=False)
    for rank in "01":
        if name is not None:
            monkeypatch.setenv(name, rank)
        with pytest.raises(SystemExit, match="2"), user_errors_as_one_line():
            raise UserError("the config is wrong")
        assert capsys.readouterr().err == LINE
        assert len(waited) == (rank == "1" and name is not None)


def test_a_process_that_waits_can_be_ended_and_says_nothing():
    process = subprocess.Popen(
        [sys.executable, "-c", FAILING],
        env={**os.environ, "RANK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "fails\n"
    time.sleep(0.5)
    process.terminate()
    assert process.communicate(timeout=5)[1] == ""
    assert process.returncode == -signal.SIGTERM

"""``tools/benchmark.py data``: what it takes to read training clips."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmsora.utils.video_io import write_video

ROOT = Path(__file__).parents[2]


@pytest.fixture
def measure(tool, monkeypatch, tmp_path):
    """Runs the command on a film: its exit code and rows."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "tools")

    def run(frames, *arguments):
        t, y, x = np.ogrid[:frames, :48, :64]
        film = np.stack([(5 * t + y + x).astype(np.uint8)] * 3, axis=-1)
        write_video(tmp_path / "clips/film.mp4", film, 24)
        out = tmp_path / "figures.json"
        few = ["--frames", "4", "--starts", "2", "--side", "16", "--rounds", "2"]
        options = ["data", "--clips", str(tmp_path / "clips"), *few, "--out", str(out)]
        code = tool("benchmark").main([*options, *arguments])
        return code, json.loads(out.read_text())["rows"]

    return run


def test_rows_of_decoding(measure, capsys):
    code, rows = measure(60)
    assert [row["what"] for row in rows] == ["long films"] * 4 + ["two-second AVI"] * 4
    assert len({row["pair"] for row in rows}) == 4
    for row in rows:
        low, median, high = (row["ratio"][key] for key in ("low", "median", "high"))
        assert 0 < low <= median <= high
        assert row["verdict"] == ("" if row["bar"] is None else row["verdict"])
        assert row["verdict"] != "ok" or median >= row["bar"]
    assert [row["bar"] for row in rows] == [6, None, None, None, 1, None, 1, None]
    assert code == any(row["verdict"] == "MISSED" for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_different_frames_are_an_error(measure, monkeypatch, tool):
    from benchmarks import data

    real = data.whole_file
    monkeypatch.setattr(data, "whole_file", lambda clip: real(clip)[::-1])
    with pytest.raises(RuntimeError, match="the ways read different frames"):
        measure(60)


def test_films_that_are_too_short_are_named(measure, capsys):
    with pytest.raises(SystemExit):
        measure(9)
    assert "film.mp4: too short for 4 frames, 3 apart" in capsys.readouterr().err

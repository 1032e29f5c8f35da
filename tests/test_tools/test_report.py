"""``tools/report.py`` on a run, and where there is none."""

import json
import re

import pytest


def test_it_writes_the_page_of_a_run_anew(tiny_run, tool, capsys):
    page = tiny_run / "report.html"
    before = page.read_text()
    page.unlink()
    tool("report").main([str(tiny_run)])
    assert capsys.readouterr().out == f"{page}\n"
    data = re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1]
    assert json.loads(data)["charts"][0]["lines"]["loss"][0] == [1, 2, 3, 4, 5, 6]
    assert page.read_text() == before


def test_a_directory_without_a_run_is_one_line(tmp_path, tool, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool("report").main([str(tmp_path)])
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no run: ")

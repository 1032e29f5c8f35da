"""The page's own code trains, by the page's own commands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = "add_a_denoiser.md"
SHORT = "--cfg-options train_cfg.max_iters=2 train_dataloader.batch_size=2"


def blocks(language, kind):
    text = (ROOT / "docs" / language / PAGE).read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("kind", ["python", "bash", "text"])
def test_both_languages_show_the_same(kind):
    assert blocks("en", kind)
    assert blocks("en", kind) == blocks("zh_cn", kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the page, and the configs that it copies."""
    folder = tmp_path_factory.mktemp("page")
    for block in blocks("en", "python"):
        name = block.splitlines()[0].removeprefix("# ")
        (folder / name).write_text(block, encoding="utf-8")
    return folder


def run(command, folder):
    """One line of the page, with this checkout's tools."""
    words = shlex.split(command.removeprefix("PYTHONPATH=. "))
    assert words.pop(0) == "mmsora"
    tools = {"train": [str(ROOT / "tools" / "train.py")], "infer": [str(ROOT / "tools/infer.py")]}
    script = tools.get(words[0], ["-m", "mmsora.cli", words[0]])
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    return subprocess.run(
        [sys.executable, *script, *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_code_trains_and_samples(folder):
    copy, train, infer = blocks("en", "bash")[0].splitlines()
    for command in (copy, f"{train} {SHORT}", infer.replace("iter_4000", "iter_2")):
        result = run(command, folder)
        assert result.returncode == 0, result.stderr
    work_dir = folder / "work_dirs" / "tiny_conv_moving_digits"
    assert (work_dir / "iter_2").is_dir()
    assert "TinyConv" in next(work_dir.glob("*/vis_data/config.py")).read_text(encoding="utf-8")


def test_a_misspelt_argument_is_told_as_the_page_says(folder):
    config = folder / "tiny_conv_moving_digits.py"
    wrong = folder / "misspelt.py"
    wrong.write_text(config.read_text(encoding="utf-8").replace("width=", "widht="))
    run(blocks("en", "bash")[0].splitlines()[0], folder)
    result = run(f"mmsora train {wrong} --dry-run", folder)
    assert (result.returncode, result.stderr) == (2, blocks("en", "text")[1])

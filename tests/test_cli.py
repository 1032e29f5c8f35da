"""The ``mmsora`` command and the scripts around it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmsora import cli
from mmsora.utils.config_names import config_names, load_config

ROOT = Path(__file__).parents[1]
NAME = "latte_moving_digits"


def run(*command, **environment):
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def comparable(path):
    return load_config(path).to_dict()


@pytest.mark.parametrize("command", ["--help", "list-cfg", "copy-cfg --help"])
def test_light_commands_load_neither_torch_nor_mmengine(command):
    code = f"""
import sys
from mmsora.cli import main
try:
    main({command.split()})
finally:
    assert not {{"torch", "mmengine"}} & set(sys.modules)
"""
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr


def test_list_cfg(capsys):
    cli.main(["list-cfg"])
    assert capsys.readouterr().out.split() == sorted(config_names())
    cli.main(["list-cfg", "-p", "MOVING_digits"])
    assert NAME in capsys.readouterr().out.split()
    cli.main(["list-cfg", "-p", "no such name"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", config_names())
def test_a_copy_and_its_bases_load_from_where_they_lie(tmp_path, name):
    cli.main(["copy-cfg", name, str(tmp_path / "mine")])
    assert comparable(tmp_path / "mine" / f"{name}.py") == comparable(name)


@pytest.mark.parametrize("name", config_names())
def test_a_flat_copy_holds_the_same_and_can_be_inherited(tmp_path, name):
    cli.main(["copy-cfg", name, str(tmp_path / "flat.py"), "--flat"])
    assert [path.name for path in tmp_path.iterdir()] == ["flat.py"]
    assert comparable(tmp_path / "flat.py") == comparable(name)
    top = tmp_path / "top.py"
    top.write_text("_base_ = 'flat.py'\nmodel = dict(denoiser=dict(depth=2))\n")
    assert load_config(top).model.denoiser.depth == 2
    assert (
        load_config(top).model.denoiser.type
        == load_config(name).to_dict()["model"]["denoiser"]["type"]
    )


def test_copies_overwrite_nothing(tmp_path, capsys):
    cli.main(["copy-cfg", NAME, str(tmp_path)])
    edited = next((tmp_path / "_base_").rglob("*.py"))
    edited.write_text("mine = 1\n")
    cli.main(["copy-cfg", NAME, str(tmp_path / "second.py")])
    assert edited.read_text() == "mine = 1\n"
    with pytest.raises(SystemExit, match="2"):
        cli.main(["copy-cfg", NAME, str(tmp_path / "second.py")])
    assert "second.py exists" in capsys.readouterr().err


def test_a_mistake_is_one_line_and_code_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["copy-cfg", "latte_moving_digit", "here"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"did you mean {NAME}?" in error


@pytest.mark.parametrize("tool", cli.TOOLS)
def test_tools_get_their_arguments_untouched(tool):
    result = run(sys.executable, "-m", "mmsora.cli", tool, "--help")
    assert result.returncode == 0, result.stderr
    assert f"usage: {tool}.py" in result.stdout


@pytest.mark.parametrize("arguments", [[], ["two"], ["config.py"], ["config.py", "0"], ["0"]])
def test_dist_train_explains_itself(arguments):
    result = run("bash", "tools/dist_train.sh", *arguments)
    assert result.returncode == 2
    assert "usage: bash tools/dist_train.sh [CONFIG] GPUS" in result.stderr


def test_dist_train_on_several_machines_needs_a_master():
    result = run("bash", "tools/dist_train.sh", "2", NNODES="2", MASTER_ADDR="", NODE_RANK="")
    assert result.returncode == 2
    assert "needs MASTER_ADDR and NODE_RANK" in result.stderr


def test_collect_env_tells_what_a_bug_report_needs():
    result = run(sys.executable, "-m", "mmsora.collect_env")
    assert result.returncode == 0, result.stderr
    subjects = {line.split()[0] for line in result.stdout.splitlines()}
    assert {"mmsora", "python", "torch", "cuda", "mmengine", "mmcv-lite", "memory"} <= subjects

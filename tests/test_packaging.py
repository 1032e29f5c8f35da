"""A wheel holds everything that `mim` and the `mmsora` command need."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("mmsora", "configs", "tools", "requirements")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout stays as it is."""
    source = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", ".mim")
    for name in NEEDED:
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--wheel-dir", str(out)]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, *offline], check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("mmsora-*.whl")))


def test_the_wheel_ships_configs_and_tools(wheel):
    for folder in ("configs", "tools"):
        paths = {
            f"mmsora/.mim/{path.relative_to(ROOT).as_posix()}"
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert paths
        assert paths <= set(wheel.namelist())


def test_the_wheel_ships_the_package_and_its_types(wheel):
    names = set(wheel.namelist())
    assert "mmsora/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "configs/", "tools/"))]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mmsora").rglob("*.py")}
    assert {name for name in modules if "/.mim/" not in name} <= names


def test_the_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Name"] == "mmsora"
    assert set(metadata.get_all("Provides-Extra")) == {"optional", "tests", "docs", "all"}
    required = [line for line in metadata.get_all("Requires-Dist") if "extra" not in line]
    assert any(line.startswith("mmcv-lite") for line in required)


def test_the_wheel_runs_from_anywhere(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site'); from mmsora.cli import main; main(['list-cfg'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "latte_moving_digits" in result.stdout.split()

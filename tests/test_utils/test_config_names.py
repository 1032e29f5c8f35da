"""Configs are found by name, and their mistakes are told in one line."""

import re

import pytest
from mmengine.config import Config

from mmsora.utils.config_names import bases_of, config_names, load_config, resolve_config, shipped
from mmsora.utils.user_error import UserError

PURE_BASE = "from torch.optim import AdamW\n\noptimizer = dict(type=AdamW, lr=1e-4)\n"
PURE = """from mmengine.config import read_base

with read_base():
    from .base import *

optimizer.update(lr=2e-4)
"""


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder / f"{next(iter(files))}.py"


def message(path, fails=load_config):
    with pytest.raises(UserError) as caught:
        fails(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_path_wins_over_a_name(tmp_path):
    path = write(tmp_path, mine="a = 1\n")
    assert resolve_config(path) == path
    assert resolve_config(str(path)) == path


@pytest.mark.parametrize("name", config_names())
def test_shipped_configs_are_found_by_name(name):
    assert resolve_config(name).is_relative_to(shipped("configs"))
    assert "_base_" not in resolve_config(name).parts


def test_an_unknown_name_suggests_a_near_one():
    text = message("latte_moving_digit", resolve_config)
    assert re.search("latte_moving_digit not found.*did you mean latte_moving_digits", text)
    assert "list-cfg" in message("zzz", resolve_config)


def test_not_a_config(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    assert "ends in one of .py" in message(path)


def test_pure_python_and_text_configs_load(tmp_path):
    pure = write(tmp_path, pure=PURE, base=PURE_BASE)
    assert load_config(pure).optimizer.lr == 2e-4
    assert load_config(pure).optimizer.type.__name__ == "AdamW"
    text = write(tmp_path, text="_base_ = ['plain.py']\na = dict(c=2)\n", plain="a = dict(b=1)\n")
    assert load_config(text).a == dict(b=1, c=2)


def test_bases(tmp_path):
    (base,) = bases_of(write(tmp_path, pure=PURE))
    assert (base.path, base.line, base.text) == (tmp_path / "base.py", 4, False)
    (base,) = bases_of(write(tmp_path, text="\n_base_ = './plain.py'\n"))
    assert (base.path.resolve(), base.line, base.text) == (tmp_path / "plain.py", 2, True)


def test_a_flat_dump_can_be_inherited_in_either_dialect(tmp_path):
    pure = write(tmp_path, pure=PURE, base=PURE_BASE)
    load_config(pure).dump(tmp_path / "flat.py")
    text = write(tmp_path, text="_base_ = 'flat.py'\noptimizer = dict(lr=1.0)\n")
    assert load_config(text).optimizer == dict(type="torch.optim.AdamW", lr=1.0)
    again = write(tmp_path, again=PURE.replace(".base", ".flat"))
    assert load_config(again).optimizer == dict(type="torch.optim.AdamW", lr=2e-4)


MISTAKES = {
    "syntax": (dict(top="a = 1\nb = = 2\n"), r"top\.py:2: invalid syntax"),
    "syntax in a base": (dict(top=PURE, base="x = (\n"), r"base\.py:1: "),
    "unset name": (dict(top="a = 1\nb = c\n"), r"top\.py:2: name 'c' is not defined"),
    "unset name in a base": (dict(top=PURE, base="\nb = c\n"), r"base\.py:2: name 'c'"),
    "missing read_base": (dict(top=PURE), r"top\.py:4: base .*base\.py not found"),
    "missing _base_": (dict(top="_base_ = 'no.py'\n"), r"top\.py:1: base .*no\.py not found"),
    "_base_ not a string": (dict(top="_base_ = 3\n"), r"top\.py:1: `_base_` takes strings"),
    "text on pure": (
        dict(top="_base_ = 'base.py'\n", base=PURE_BASE),
        r"top\.py:1: .*mmsora copy-cfg .*base\.py FILE --flat` and inherit FILE",
    ),
    "pure on text": (
        dict(top=PURE, base="_base_ = 'low.py'\n", low="a = 1\n"),
        r"top\.py:4: .*mmsora copy-cfg .*base\.py FILE --flat` and inherit FILE",
    ),
    "both at once": (
        dict(top="from torch.optim import SGD\n_base_ = 'low.py'\n", low="a = 1\n"),
        r"top\.py:2: .*name classes by strings",
    ),
    "no such class": (
        dict(top="from torch.optim import AdamWW\n\noptimizer = dict(type=AdamWW)\n"),
        r"top\.py:1: .*AdamWW.*did you mean AdamW\?",
    ),
    "no such class in a list": (
        dict(top="from torch import optim\n\nhooks = [dict(type=optim.Nothing)]\n"),
        r"top\.py.*Nothing",
    ),
    "no such module": (
        dict(top="\nfrom nowhere.at_all import Thing\n\na = dict(type=Thing)\n"),
        r"top\.py:2: .*No module named 'nowhere'",
    ),
    "call of an import": (
        dict(top="from torch import tensor\n\na = tensor(1)\n"),
        r"top\.py:3: .*not called",
    ),
    "custom_imports": (
        dict(top="custom_imports = dict(imports=['nowhere'])\n"),
        r"top\.py: .*nowhere.*PYTHONPATH",
    ),
}


@pytest.mark.parametrize(("files", "pattern"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_name_the_place_and_the_cure(tmp_path, files, pattern):
    assert re.search(pattern, message(write(tmp_path, **files)))


def test_nothing_lazy_is_left_behind_by_a_mistake(tmp_path):
    message(write(tmp_path, top="b = c\n"))
    assert Config(dict(a=1)).a == 1


def test_a_name_that_mmengine_keeps_for_itself(tmp_path):
    path = write(tmp_path, own="size = 3\ntext = dict(drop_prob=0.1)\n")
    assert message(path).endswith(
        "own.py: MMEngine keeps the name text for itself; call the variable otherwise"
    )

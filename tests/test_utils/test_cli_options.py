"""``--cfg-options`` reads what MMEngine's own action reads, and says what is wrong otherwise."""

import argparse
import subprocess
import sys

import pytest
from mmengine.config import DictAction

from mmsora.utils.cli_options import key_values

SAME_AS_MMENGINE = [
    "1",
    "-2",
    "1e-3",
    "true",
    "False",
    "None",
    "bf16",
    "mmsora.diffusion.Heun",
    "[1,2]",
    "1,2",
    "(1,2)",
    "(1,)",
    "(1)",
    "[]",
    "()",
    "",
    "[(1,2),[a,b],c]",
    "[[1],[]]",
    "a=b",
]


@pytest.mark.parametrize("text", SAME_AS_MMENGINE)
def test_values_are_those_of_mmengine(text):
    parser = argparse.ArgumentParser()
    parser.add_argument("--theirs", nargs="+", action=DictAction)
    parser.add_argument("--ours", nargs="+", type=key_values)
    found = parser.parse_args(["--theirs", f"a.b={text}", "--ours", f"a.b={text}"])
    assert dict(found.ours) == found.theirs
    assert repr(dict(found.ours)) == repr(found.theirs)  # 1 is not True, nor a tuple a list


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'1'", "1"),
        ('"a, b"', "a, b"),
        ("[a,'b,c']", ["a", "b,c"]),
        ("it's", "it's"),
        ("[x y, 2]", ["x y", 2]),
        ("(1)x", "(1)x"),
        ("none", "none"),
    ],
)
def test_quotes_and_spaces(text, value):
    assert key_values(f"key = {text}") == ("key", value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth", "'depth' is not of the form key=value"),
        ("=3", "'=3': '' is not a dotted key such as model.vae"),
        ("model..vae=3", "'model..vae=3': 'model..vae' is not a dotted key such as model.vae"),
        ("a=[1,(2]", "'a=[1,(2]': ']' closes nothing"),
        ("a=[1", "'a=[1': ']' is missing at the end"),
        ("a=1)", "'a=1)': ')' closes nothing"),
        ("a='b", '"a=\'b": "\'" is missing at the end'),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        key_values(text)
    assert str(caught.value) == message


def test_it_costs_nothing_to_import():
    code = "import sys, mmsora.utils.cli_options; print(*{'torch', 'mmengine'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "")

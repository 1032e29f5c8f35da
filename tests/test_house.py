"""The rules of the house that no linter knows, read from the source."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for path in (ROOT / "mmsora").rglob("*.py") if ".mim" not in path.parts)
TOOLS = sorted((ROOT / "tools").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
MAX_PARAMETERS = 8
MAX_LINES = 60

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
each_source = pytest.mark.parametrize(
    "path", MODULES + TOOLS, ids=lambda p: str(p.relative_to(ROOT))
)
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))


def nodes(path, *kinds):
    return [
        n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, kinds)
    ]


def imported_from(path, package):
    """Names that a module imports from a package."""
    return {
        alias.asname or alias.name
        for node in nodes(path, ast.ImportFrom)
        if (node.module or "").split(".")[0] == package
        for alias in node.names
    }


def mmengine_classes():
    """Classes of ours that inherit one of MMEngine's, directly or not."""
    found = set()
    while True:
        more = {
            node.name
            for path in MODULES
            for node in nodes(path, ast.ClassDef)
            if {ast.unparse(base) for base in node.bases}
            & (imported_from(path, "mmengine") | found)
        }
        if more <= found:
            return found
        found |= more


MMENGINE_CLASSES = mmengine_classes()


def constructors(path):
    """Classes with a constructor of our own making, and that constructor."""
    for node in nodes(path, ast.ClassDef):
        for item in node.body:
            is_constructor = isinstance(item, ast.FunctionDef) and item.name == "__init__"
            if is_constructor and node.name not in MMENGINE_CLASSES:
                yield node, item.args


def parameters(arguments):
    """Parameters but self; those that default to None are optional parts and do not count."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [ast.Constant(...)] * (len(positional) - len(arguments.defaults))
    defaults += [*arguments.defaults, *arguments.kw_defaults]
    names = [argument.arg for argument in [*positional, *arguments.kwonlyargs]]
    return [
        name
        for name, default in zip(names, defaults, strict=True)
        if name != "self" and not (isinstance(default, ast.Constant) and default.value is None)
    ]


def test_mmengine_subclasses_are_recognised():
    assert "LatentDiffusion" in MMENGINE_CLASSES
    assert "Latte" not in MMENGINE_CLASSES


@each_module
def test_constructors_are_small(path):
    large = {
        node.name: parameters(arguments)
        for node, arguments in constructors(path)
        if len(parameters(arguments)) > MAX_PARAMETERS
    }
    assert not large, "group what changes together into a part"


@each_module
def test_registered_classes_take_no_kwargs(path):
    greedy = [
        node.name
        for node, arguments in constructors(path)
        if arguments.kwarg
        and any("register_module" in ast.unparse(d) for d in node.decorator_list)
    ]
    assert not greedy, "a misspelt argument must be an error"


@each_source
def test_functions_are_short(path):
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in nodes(path, ast.FunctionDef, ast.AsyncFunctionDef)
        if node.end_lineno - node.lineno + 1 > MAX_LINES
    }
    assert not long


@each_source
def test_modules_say_what_they_are_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@each_config
def test_configs_name_no_place_of_one_machine(path):
    strings = [n.value for n in nodes(path, ast.Constant) if isinstance(n.value, str)]
    assert not [text for text in strings if text.startswith(("/", "~"))]


def test_config_names_are_unique():
    names = Counter(path.stem for path in CONFIGS if "_base_" not in path.parts)
    assert not [name for name, count in names.items() if count > 1]


def test_readmes_give_the_same_commands():
    english, chinese = (
        re.findall(r"^```.*?^```", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S)
        for name in ("README.md", "README_zh-CN.md")
    )
    assert english
    assert english == chinese


def test_importing_the_package_is_free():
    code = "import sys, mmsora; print(*{'torch', 'mmengine'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout.strip()) == (0, "")


def test_setup_needs_setuptools_alone():
    imports = nodes(ROOT / "setup.py", ast.Import)
    modules = {alias.name for node in imports for alias in node.names}
    modules |= {node.module for node in nodes(ROOT / "setup.py", ast.ImportFrom)}
    roots = {module.split(".")[0] for module in modules}
    assert roots - sys.stdlib_module_names == {"setuptools"}


def test_setup_and_constraints_agree():
    """Whatever the package requires has a tested version, within what it allows."""
    from packaging.requirements import Requirement

    def read(name):
        lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        found = [Requirement(line) for line in lines if line and not line.startswith("#")]
        return {requirement.name: requirement for requirement in found}

    tested = read("constraints")
    for requirement in (
        read("runtime") | read("tests") | read("optional") | read("docs")
    ).values():
        (pin,) = tested[requirement.name].specifier
        assert requirement.specifier.contains(pin.version), requirement

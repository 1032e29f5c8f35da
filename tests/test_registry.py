"""Names in configs become classes: everywhere, without imports, and without doubt."""

import re
import subprocess
import sys

import mmengine.registry
import pytest
from mmengine.registry import Registry

import mmsora.registry
from mmsora.registry import all_registries

ROOTS = {
    name: value for name, value in vars(mmengine.registry).items() if isinstance(value, Registry)
}
OWN = {"VAES", "DENOISERS", "TEXT_ENCODERS", "CONDITIONERS", "SCHEDULERS", "LOSSES"}
PACKAGE = re.compile(r"mmsora\.\w+")  # mmsora.models gathers its packages' names, and so on


def registered():
    """All (registry, name, class) of this package, whatever other tests have added."""
    for registry_name, registry in all_registries().items():
        registry.import_from_location()
        for name, value in registry.module_dict.items():
            if value.__module__.split(".")[0] == "mmsora":
                yield registry_name, name, value


def in_a_fresh_process(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_mmengine_has_registries():
    assert {"MODELS", "RUNNERS", "HOOKS", "FUNCTIONS"} <= set(ROOTS)


@pytest.mark.parametrize("name", sorted(ROOTS))
def test_every_registry_of_mmengine_has_a_child(name):
    child = getattr(mmsora.registry, name)
    assert child.parent is ROOTS[name]
    assert child.scope == "mmsora"
    with ROOTS[name].switch_scope_and_registry("mmsora") as found:
        assert found is child


def test_what_users_swap_has_registries_of_its_own():
    registries = all_registries()
    assert set(registries) == set(ROOTS) | OWN == set(mmsora.registry.__all__) - {"all_registries"}
    for name in OWN:
        assert registries[name].parent is None
        assert registries[name].scope == "mmsora"


def test_a_class_is_in_one_registry_under_its_own_name():
    homes = {}
    for registry, name, value in registered():
        assert name == value.__name__
        homes.setdefault(value, set()).add(registry)
    assert {value.__name__: home for value, home in homes.items() if len(home) > 1} == {}
    names = [value.__name__ for value in homes]
    assert len(names) == len(set(names))
    assert {"Latte", "Diffusion", "MovingDigits", "MSE"} <= set(names)


def test_every_registered_class_is_exported_and_documented():
    for _, name, value in registered():
        module = value.__module__
        package = sys.modules[PACKAGE.match(module)[0]]
        assert name in sys.modules[module].__all__
        assert name in package.__all__
        assert getattr(package, name) is value
        doc = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
        assert (doc or "").strip(), f"{name} has no docstring of its own"


def test_registries_load_no_component():
    code = """
import sys, mmsora.registry
print(*(name for name in sys.modules if name.split(".")[0] == "mmsora"))
"""
    assert set(in_a_fresh_process(code)) == {"mmsora", "mmsora.registry", "mmsora.version"}


BUILDS = {
    "a denoiser": """
from mmsora.registry import DENOISERS
print(type(DENOISERS.build(dict(
    type="Latte", in_channels=4, out_channels=8, size=(6, 16, 16), patch=2, width=96, depth=4,
    heads=4, num_classes=10,
))).__module__)
""",
    "a process of nested parts": """
from mmsora.registry import SCHEDULERS
process = SCHEDULERS.build(dict(
    type="Diffusion",
    path=dict(type="LinearPath"),
    prediction=dict(type="VelocityPrediction"),
    train_times=dict(type="UniformTimes"),
    solver=dict(type="Euler"),
    grid=dict(type="SpacedGrid", num_steps=4),
    guidance=dict(type="ClassifierFree", scale=2.0),
    loss=dict(type="MSE"),
))
print(type(process.loss_function).__module__)
""",
    "a loss": """
from mmsora.registry import LOSSES
print(type(LOSSES.build(dict(type="MSE"))).__module__)
""",
    "a data set, by MMEngine": """
from mmengine.registry import DATASETS, DefaultScope
import mmsora.registry
DefaultScope.get_instance("a run", scope_name="mmsora")
print(type(DATASETS.build(dict(type="MovingDigits"))).__module__)
""",
}
MODULES = "models.denoisers.latte", "diffusion.loss", "diffusion.loss", "datasets.moving_digits"


@pytest.mark.parametrize(
    ("code", "module"), list(zip(BUILDS.values(), MODULES, strict=True)), ids=BUILDS
)
def test_strings_build_with_no_import(code, module):
    assert in_a_fresh_process(code) == [f"mmsora.{module}"]

"""A typo in any argument of any part of a process: the message names part, argument and cure."""

import copy
import inspect
from itertools import pairwise

import pytest
from mmengine.config import Config

from mmsora.registry import LOSSES, SCHEDULERS
from mmsora.utils.config_check import apply_overrides, check_config, config_dict
from mmsora.utils.config_names import load_config
from mmsora.utils.user_error import UserError

# Arguments that a part cannot do without.
NEEDED = {
    "LearnedRange": dict(mean=dict(type="NoisePrediction")),
    "ShiftedPath": dict(path=dict(type="LinearPath")),
    "StratifiedTimes": dict(times=dict(type="UniformTimes")),
    "Clipped": dict(guidance=dict(type="ClassifierFree", scale=1.0)),
    "ClassifierFree": dict(scale=1.0),
    "Autoguidance": dict(scale=1.0),
    "ClassifierGuidance": dict(function="torch.sum"),
    "DiffusersSolver": dict(scheduler="DDIMScheduler"),
    "SpacedGrid": dict(num_steps=5),
    "TrailingGrid": dict(num_steps=5),
    "KarrasGrid": dict(num_steps=5),
    "LogSNRGrid": dict(num_steps=5),
    "ShiftedGrid": dict(num_steps=5),
    "LinearQuadraticGrid": dict(num_steps=5),
    "ShiftedSNRGrid": dict(num_steps=5),
}
# Where the parts stand that derive from what; a part inside another, by the other's config.
PLACES = {
    "Path": ["path", "path.path"],
    "Prediction": ["prediction", "prediction.mean"],
    "Times": ["train_times", "train_times.times"],
    "Solver": ["solver"],
    "Grid": ["grid"],
    "Guidance": ["guidance", "guidance.guidance"],
    "Loss": ["loss"],
    "Weighting": ["loss.weighting", "loss.weighting.weighting"],
    "TrainNoise": ["train_noise"],
    "Diffusion": [""],
}
AROUND = {
    "path.path": dict(type="ShiftedPath"),
    "prediction.mean": dict(type="LearnedRange"),
    "train_times.times": dict(type="StratifiedTimes"),
    "guidance.guidance": dict(type="Clipped"),
    "loss.weighting": dict(type="Hybrid"),
    "loss.weighting.weighting": dict(type="MSE", weighting=dict(type="LearnedUncertainty")),
}


def parts():
    """Name, arguments and places of all that is registered."""
    for registry in (SCHEDULERS, LOSSES):
        registry.import_from_location()
        for name, part in sorted(registry.module_dict.items()):
            if not part.__module__.startswith("mmsora."):  # a test's own
                continue
            bases = [base.__name__ for base in part.__mro__ if base.__name__ in PLACES]
            yield name, [*inspect.signature(part).parameters], bases


PARTS = list(parts())
SPOTS = [(name, place) for name, _, bases in PARTS for place in PLACES[bases[0]]]
TYPOS = [
    (name, argument, place)
    for name, arguments, bases in PARTS
    for argument in arguments
    for place in PLACES[bases[0]]
]


@pytest.fixture(scope="module")
def quickstart():
    return config_dict(load_config("latte_moving_digits"))


@pytest.fixture
def config_with(quickstart):
    """Call it with a place and a part for the quickstart's config with the part there."""

    def make(place, part):
        values = copy.deepcopy(quickstart)
        diffusion = values["model"]["diffusion"]
        if not place:
            diffusion.update(part)
            return Config(values)
        first, *others = place.split(".")
        diffusion[first] = copy.deepcopy(AROUND[place]) if others else part
        holder = diffusion
        for key, inner in pairwise([first, *others]):
            holder = holder[key]
            holder.setdefault(inner, part)
        return Config(values)

    return make


def misspelt(word):
    """With its last letter twice."""
    return word + word[-1]


def refusal(cfg):
    with pytest.raises(UserError) as caught:
        check_config(cfg)
    return str(caught.value)


def full(*keys):
    return ".".join(["model.diffusion", *filter(None, keys)])


def test_every_part_has_a_place():
    assert len(PARTS) > 50
    assert all(len(bases) > 0 for _, _, bases in PARTS)


@pytest.mark.parametrize(("name", "place"), SPOTS)
def test_without_a_typo_it_is_right(config_with, name, place):
    check_config(config_with(place, {"type": name, **NEEDED.get(name, {})}))


@pytest.mark.parametrize(("name", "argument", "place"), TYPOS)
def test_a_typo_is_told_with_its_cure(config_with, name, argument, place):
    typo = misspelt(argument)
    assert refusal(config_with(place, {"type": name, typo: 1})) == (
        f"{full(place, typo)} = 1: {name} takes no '{typo}'; did you mean '{argument}'?"
    )


@pytest.mark.parametrize(("name", "arguments"), [part[:2] for part in PARTS])
def test_where_nothing_is_near_all_are_listed(config_with, name, arguments):
    place = next(place for part, place in SPOTS if part == name)
    cure = f"; there is {', '.join(sorted(arguments))}" if arguments else ""
    assert refusal(config_with(place, {"type": name, "zzz": 1})) == (
        f"{full(place, 'zzz')} = 1: {name} takes no 'zzz'{cure}"
    )


@pytest.mark.parametrize(("name", "place"), SPOTS)
def test_a_typo_of_the_name(config_with, name, place):
    typo = misspelt(name)
    found = refusal(config_with(place, {"type": typo}))
    assert found.startswith(f"{full(place)}: unknown ")
    assert found.endswith(f"name '{typo}'; did you mean '{name}'?")


@pytest.mark.parametrize(("name", "argument", "place"), TYPOS)
def test_a_typo_on_the_command_line(config_with, name, argument, place):
    cfg = config_with(place, {"type": name, **NEEDED.get(name, {})})
    typo = misspelt(argument)
    with pytest.raises(UserError) as caught:
        apply_overrides(cfg, {full(place, typo): 1})
    wrong, right = full(place, typo), full(place, argument)
    assert str(caught.value) == (f"{wrong} = 1: {name} takes no '{typo}'; did you mean '{right}'?")

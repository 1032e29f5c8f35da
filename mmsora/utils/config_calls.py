"""What the dicts of a config become: the class or function that each will be the arguments of."""

import difflib
import importlib
import inspect
import textwrap
from ast import Call, Name, parse, unparse, walk
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import Registry

from mmsora.registry import all_registries
from mmsora.utils.user_error import UserError

__all__ = [
    "PLACES",
    "Keys",
    "Place",
    "Takes",
    "call_of",
    "is_ours",
    "label_of",
    "name_of",
    "place_of",
    "resolve",
    "shorten",
    "shown",
    "suggestion",
    "top_level_keys",
]

Keys = tuple[str, ...]


class Place(NamedTuple):
    """What is known of a dict from the key that it stands under.

    Attributes:
        registry: Where its ``type`` is looked up; empty when any will do.
        default: What it is for when it has no ``type``, as a dotted string.
        extra: Keys that it may hold beside the arguments that are left to it.
        needs: Keys that whoever builds it cannot do without when there is no ``type``.
        given: Arguments that whoever builds it adds; ``*`` for all.
        nested: It may hold further configs by name instead of being one.
    """

    registry: str = ""
    default: str = ""
    extra: Keys = ()
    needs: Keys = ()
    given: Keys = ()
    nested: bool = False


_LOADER = Place(
    default="torch.utils.data.DataLoader",
    extra=("num_batch_per_epoch", "disable_subprocess_warning"),
    needs=("dataset", "sampler"),
)
_EVALUATOR = Place("EVALUATOR", "mmengine.evaluator.Evaluator")
_FUNCTION = Place("FUNCTIONS", given=("*",))
_LOOP = ("runner", "dataloader", "evaluator")
_PART = Place("SCHEDULERS")

# Keys whose dicts MMEngine's Runner or one of our classes builds.
PLACES = {
    "model": Place("MODELS"),
    "data_preprocessor": Place("MODELS"),
    "init_cfg": Place("WEIGHT_INITIALIZERS", extra=("override",)),
    "override": Place("WEIGHT_INITIALIZERS", extra=("name",), nested=True),
    "vae": Place("VAES"),
    **dict.fromkeys(("denoiser", "image"), Place("DENOISERS")),
    "layer": Place(default="mmsora.models.layers.temporal.TemporalLayer", given=("width",)),
    "levels": Place(default="mmsora.models.denoisers.CascadeLevel"),
    "conditions": Place(default="mmsora.models.denoisers.CascadeConditions"),
    "text_encoder": Place("TEXT_ENCODERS"),
    "conditioner": Place("CONDITIONERS"),
    "weak": Place(extra=("denoiser", "checkpoint")),
    "alignment": Place("MODELS", given=("width",)),
    "encoder": Place(),  # of images one of MODELS, of text one of TEXT_ENCODERS
    **dict.fromkeys(("diffusion", "path", "prediction", "train_times"), _PART),
    **dict.fromkeys(("solver", "grid", "guidance"), _PART),
    "loss": Place("LOSSES"),
    "weighting": Place("LOSSES"),
    **dict.fromkeys(("train_noise", "noise", "times"), _PART),
    **dict.fromkeys(("train_dataloader", "val_dataloader", "test_dataloader"), _LOADER),
    "dataset": Place("DATASETS"),
    "sampler": Place("DATA_SAMPLERS", given=("dataset",)),
    "batch_sampler": Place(
        "DATA_SAMPLERS", extra=("batch_size",), given=("sampler", "batch_size")
    ),
    "collate_fn": _FUNCTION,
    "worker_init_fn": _FUNCTION,
    "transforms": Place("TRANSFORMS"),
    "pipeline": Place("TRANSFORMS"),
    "train_cfg": Place("LOOPS", extra=("by_epoch",), needs=("by_epoch",), given=_LOOP),
    "val_cfg": Place("LOOPS", "mmengine.runner.ValLoop", given=_LOOP),
    "test_cfg": Place("LOOPS", "mmengine.runner.TestLoop", given=_LOOP),
    "optim_wrapper": Place(
        "OPTIM_WRAPPERS", "mmengine.optim.OptimWrapper", extra=("constructor", "paramwise_cfg")
    ),
    "optimizer": Place("OPTIMIZERS", given=("params",)),
    "paramwise_cfg": Place(nested=True),
    "clip_grad": Place(extra=("type",), given=("parameters",)),
    "guard": Place(default="mmsora.engine.guard.UpdateGuard"),
    "param_scheduler": Place(
        "PARAM_SCHEDULERS", extra=("convert_to_iter_based",), given=("optimizer",), nested=True
    ),
    "default_hooks": Place(nested=True),
    "custom_hooks": Place("HOOKS", extra=("priority",)),
    "profiles": Place("TASK_UTILS"),
    "val_evaluator": _EVALUATOR,
    "test_evaluator": _EVALUATOR,
    "metrics": Place("METRICS"),
    "model_wrapper_cfg": Place(
        "MODEL_WRAPPERS", "mmengine.model.MMDistributedDataParallel", given=("module",)
    ),
    "visualizer": Place("VISUALIZERS", "mmengine.visualization.Visualizer"),
    "vis_backends": Place("VISBACKENDS", extra=("save_dir",), given=("save_dir",)),
    "log_processor": Place("LOG_PROCESSORS", "mmengine.runner.LogProcessor"),
    "randomness": Place(default="mmengine.runner.Runner.set_randomness", given=("self",)),
    "env_cfg": Place(extra=("cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit")),
    "mp_cfg": Place(
        default="mmengine.utils.dl_utils.set_multi_processing", given=("distributed",)
    ),
    "dist_cfg": Place(default="mmengine.dist.init_dist", given=("launcher",)),
    "auto_scale_lr": Place(extra=("enable", "base_batch_size")),
    "custom_imports": Place(extra=("imports", "allow_failed_imports")),
    "compile": Place(default="torch.compile", given=("model",)),
    "parallel": Place(default="mmsora.engine.parallel.Parallel"),
    "activation_checkpointing": Place(default="mmsora.engine.ActivationCheckpointing"),
}
# Dicts of configs by names that users choose, and the key that each is looked up as.
MEMBERS = {"default_hooks": "custom_hooks", "parts": "conditioner"}
# Top-level keys that MMEngine or our Runner reads off the config, beside its Runner's arguments.
RUNNER_KEYS = (
    "activation_checkpointing",
    "compile",
    "custom_imports",
    "detect_anomalous_params",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "gpu_ids",
    "model_wrapper_cfg",
    "parallel",
    "prior",
    "runner_type",
    "sync_bn",
)


class Takes(NamedTuple):
    """The keyword arguments of a callable: which it takes, which it needs, whether any will do."""

    names: frozenset[str]
    needs: frozenset[str]
    any: bool


@cache
def top_level_keys() -> frozenset[str]:
    """The keys that MMEngine reads at the top of a config."""
    from mmengine.runner import Runner  # imports torch; registers all that MMEngine has

    names = set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"}
    return frozenset(names.union(RUNNER_KEYS))


def place_of(value: Mapping, keys: Keys) -> Place:
    """What is known of the dict ``value`` that stands at ``keys``."""
    names = [key for key in keys if not key.isdigit()]
    key = names[-1]
    key = MEMBERS.get(names[-2] if len(names) > 1 else "", key)
    if PLACES.get(key) is _EVALUATOR and "metrics" not in value:
        key = "metrics"
    place = PLACES.get(key, Place(nested=True))
    if key == "train_cfg":
        loop = "EpochBasedTrainLoop" if value.get("by_epoch") else "IterBasedTrainLoop"
        return place._replace(default=f"mmengine.runner.{loop}")
    if key == "clip_grad":
        kind = "value" if value.get("type") == "value" else "norm"
        return place._replace(default=f"torch.nn.utils.clip_grad_{kind}_")
    if key == "optim_wrapper" and "constructor" in value:  # several wrappers, by name
        return place._replace(default="", nested=True)
    return place


def call_of(value: Mapping, keys: Keys) -> tuple[Callable | None, Takes]:
    """What a dict will be the arguments of.

    Args:
        value: The dict.
        keys: Where it stands in the config.

    Returns:
        The class or function, None for a dict that is none's, and the keys that it may hold.

    Raises:
        UserError: Its ``type`` does not exist.
    """
    place = place_of(value, keys)
    target: Callable | None = None
    needs: set[str] = set()
    if "type" in value and "type" not in place.extra:
        target = resolve(value["type"], place, keys)
        extra = {*place.extra, "type"}
    elif place.default:
        target = _import(place.default)
        extra = {*place.extra, *(["type"] if place.registry else [])}
        needs.update(place.needs)
    elif place.nested:
        return None, Takes(frozenset(), frozenset(), any=True)
    elif place.registry:
        return None, Takes(frozenset(["type"]), frozenset(["type"]), any=True)
    else:
        return None, Takes(frozenset(place.extra), frozenset(), any=False)
    takes = _takes(target)
    if "*" not in place.given:
        needs.update(takes.needs.difference(place.given))
    names = takes.names.difference(place.given) | extra
    return target, Takes(names, frozenset(needs), takes.any)


def is_ours(target: Callable) -> bool:
    """Whether a class hands the dicts among its arguments to the registries known here."""
    classes = inspect.getmro(target) if inspect.isclass(target) else ()
    roots = [cls.__module__.split(".")[0] for cls in classes]
    own = getattr(target, "__module__", "").split(".")[0]
    return "mmsora" in roots or own in ("mmsora", "mmengine", "torch")


def resolve(kind: Any, place: Place, keys: Keys) -> Callable:
    """Finds what a ``type`` means.

    Args:
        kind: A class, or its registered name or dotted string.
        place: Of the dict that has it.
        keys: Where that dict stands, for the message.

    Returns:
        The class or function.

    Raises:
        UserError: There is none.
    """
    if isinstance(kind, LazyAttr | LazyObject):
        kind = kind.build()
    if isinstance(kind, str):
        kind = _look_up(kind, place.registry, ".".join(keys))
    if not callable(kind):
        raise UserError(f"{shown((*keys, 'type'), kind)}: neither a class nor the name of one")
    return kind


def _look_up(name: str, registry: str, where: str) -> Any:
    registries = all_registries()
    top_level_keys()  # MMEngine registers its own at import
    for key in [registry] if registry else registries:
        try:
            found = registries[key].get(name)
        except RuntimeError:
            continue
        if found is not None:
            return found
    module, _, attribute = name.rpartition(".")
    if module and module not in ("mmsora", "mmengine"):  # else a name with its scope
        try:
            names = dir(importlib.import_module(module))
        except ImportError as error:
            raise UserError(f"{where}: cannot import '{name}': {error}") from error
        raise UserError(f"{where}: {module} has no '{attribute}'{suggestion(attribute, names)}")
    members = {key: _registered(found) for key, found in registries.items()}
    known = members[registry] if registry else set().union(*members.values())
    elsewhere = [key for key, found in members.items() if attribute in found]
    hint = f"; it is one of {elsewhere[0]}" if elsewhere else suggestion(attribute, known)
    of = f"{registry} name" if registry else "name"
    raise UserError(f"{where}: unknown {of} '{name}'{hint}")


def _registered(registry: Registry) -> set[str]:
    """The names that a registry and its parents know."""
    registry.import_from_location()
    names: set[str] = set()
    node: Registry | None = registry
    while node is not None:
        names.update(node.module_dict)
        node = node.parent
    return names


def _import(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:  # a method
        return getattr(_import(module), name)


@cache
def _takes(target: Callable) -> Takes:
    """Reads a signature; that of a class follows ``super().__init__(**kwargs)``."""
    names: set[str] = set()
    needs: set[str] = set()
    for i, function in enumerate(_initializers(target)):
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # written in C
            return Takes(frozenset(), frozenset(), any=True)
        if function is not target:
            parameters = parameters[1:]  # self
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names.update(p.name for p in by_name)
        if i == 0:
            needs.update(p.name for p in by_name if p.default is p.empty)
        rest = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        if not rest or not _passes_on(function, rest[0]):
            return Takes(frozenset(names), frozenset(needs), any=bool(rest))
    return Takes(frozenset(names), frozenset(needs), any=False)  # passed on to object


def _initializers(target: Callable) -> Iterable[Callable]:
    if inspect.isclass(target) and target.__init__ is not object.__init__:
        classes = inspect.getmro(target)[:-1]
        return [vars(cls)["__init__"] for cls in classes if "__init__" in vars(cls)]
    return [target]


def _passes_on(function: Callable, rest: str) -> bool:
    """Whether a constructor hands its ``**rest`` to the next one."""
    try:
        tree = parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return False
    calls = [node for node in walk(tree) if isinstance(node, Call)]
    return any(
        unparse(call.func).startswith("super(") and unparse(call.func).endswith(".__init__")
        for call in calls
        for keyword in call.keywords
        if keyword.arg is None and isinstance(keyword.value, Name) and keyword.value.id == rest
    )


def label_of(target: Callable | None, value: Mapping, keys: Keys) -> str:
    """What a message calls a dict: by the class that it names, else by its own key."""
    named = "type" in value and "type" not in place_of(value, keys).extra
    return name_of(target) if target and named else keys[-1]


def name_of(target: Any) -> str:
    """The name of a class or function."""
    return getattr(target, "__name__", str(target))


def shorten(value: Any) -> str:
    """A value in at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def shown(keys: Iterable[Any], value: Any) -> str:
    """A key and its value, as a user would write them."""
    return f"{'.'.join(map(str, keys))} = {shorten(value)}"


def suggestion(word: str, names: Iterable[str]) -> str:
    """What to write instead: a similar name, or all of them when they are few."""
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    public = sorted(name for name in names if name != "type" and not name.startswith("_"))
    return f"; there is {', '.join(public)}" if 0 < len(public) <= 12 else ""

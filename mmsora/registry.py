"""The registries: where a name in a config becomes a class.

Children of MMEngine's registries carry the scope ``mmsora``, one for each, because a registry
without a child in the running scope logs a warning at every build. What users of a diffusion
toolbox swap has registries of its own. ``locations`` are imported at the first look-up, so a
config of strings builds with no import, and importing this module loads no component.
"""

import mmengine.registry as _mmengine
from mmengine.registry import Registry

__all__ = [
    "CONDITIONERS",
    "DATASETS",
    "DATA_SAMPLERS",
    "DENOISERS",
    "EVALUATOR",
    "FUNCTIONS",
    "HOOKS",
    "INFERENCERS",
    "LOG_PROCESSORS",
    "LOOPS",
    "LOSSES",
    "METRICS",
    "MODELS",
    "MODEL_WRAPPERS",
    "OPTIMIZERS",
    "OPTIM_WRAPPERS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "PARAM_SCHEDULERS",
    "RUNNERS",
    "RUNNER_CONSTRUCTORS",
    "SCHEDULERS",
    "STRATEGIES",
    "TASK_UTILS",
    "TEXT_ENCODERS",
    "TRANSFORMS",
    "VAES",
    "VISBACKENDS",
    "VISUALIZERS",
    "WEIGHT_INITIALIZERS",
    "all_registries",
]

SCOPE = "mmsora"


def _child(name: str, *locations: str) -> Registry:
    parent = getattr(_mmengine, name)
    return Registry(parent.name, parent=parent, scope=SCOPE, locations=list(locations))


def _root(name: str, *locations: str) -> Registry:
    return Registry(name, scope=SCOPE, locations=list(locations))


# What users swap.
VAES = _root("vae", "mmsora.models.vaes")
DENOISERS = _root("denoiser", "mmsora.models.denoisers")
TEXT_ENCODERS = _root("text encoder", "mmsora.models.text_encoders")
CONDITIONERS = _root("conditioner", "mmsora.models.conditioners")
SCHEDULERS = _root("scheduler", "mmsora.diffusion")  # Diffusion and all parts of a process
LOSSES = _root("loss", "mmsora.diffusion")

# What MMEngine's Runner builds.
MODELS = _child("MODELS", "mmsora.models")
DATASETS = _child("DATASETS", "mmsora.datasets")
DATA_SAMPLERS = _child("DATA_SAMPLERS", "mmsora.datasets")
TRANSFORMS = _child("TRANSFORMS", "mmsora.datasets")
RUNNERS = _child("RUNNERS", "mmsora.engine")
HOOKS = _child("HOOKS", "mmsora.engine")
LOG_PROCESSORS = _child("LOG_PROCESSORS", "mmsora.engine")
OPTIM_WRAPPERS = _child("OPTIM_WRAPPERS", "mmsora.engine")
TASK_UTILS = _child("TASK_UTILS", "mmsora.engine")
FUNCTIONS = _child("FUNCTIONS", "mmsora.datasets")

# Some are empty; they keep MMEngine's look-up quiet.
RUNNER_CONSTRUCTORS = _child("RUNNER_CONSTRUCTORS")
LOOPS = _child("LOOPS", "mmsora.engine")
STRATEGIES = _child("STRATEGIES")
MODEL_WRAPPERS = _child("MODEL_WRAPPERS", "mmsora.engine")
WEIGHT_INITIALIZERS = _child("WEIGHT_INITIALIZERS")
OPTIMIZERS = _child("OPTIMIZERS", "mmsora.engine")
OPTIM_WRAPPER_CONSTRUCTORS = _child("OPTIM_WRAPPER_CONSTRUCTORS")
PARAM_SCHEDULERS = _child("PARAM_SCHEDULERS")
METRICS = _child("METRICS", "mmsora.evaluation")
EVALUATOR = _child("EVALUATOR")
VISUALIZERS = _child("VISUALIZERS")
VISBACKENDS = _child("VISBACKENDS", "mmsora.visualization")
INFERENCERS = _child("INFERENCERS")


def all_registries() -> dict[str, Registry]:
    """All registries of this scope by their variable's name."""
    return {name: value for name, value in globals().items() if isinstance(value, Registry)}

"""Mistakes in the values of a config, found before anything is written."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmsora.engine.parallel.plan import Parallel
from mmsora.engine.recompute import ActivationCheckpointing
from mmsora.registry import HOOKS, OPTIM_WRAPPERS
from mmsora.utils.config_check import user_errors
from mmsora.utils.user_error import UserError

__all__ = ["check_values"]

# What of ``optim_wrapper`` is not the wrapper's own, but says how to build its optimizer.
OPTIMIZER_KEYS = ("optimizer", "constructor", "paramwise_cfg")


def check_values(cfg: Config, world: int | None) -> None:
    """Build, and throw away, what costs nothing: the plan, the optimizer's wrapper, the hooks.

    Args:
        cfg: The config, checked for its keys.
        world: Number of processes; None where it is not known yet.

    Raises:
        UserError: With the key of the mistake.
    """
    init_default_scope(cfg.get("default_scope") or "mmsora")
    with user_errors():
        plan = Parallel.of(cfg.get("parallel"))
        if world is not None:
            plan.for_start(world, cfg.launcher != "none")
        if cfg.get("activation_checkpointing") is not None:
            ActivationCheckpointing.of(cfg.activation_checkpointing)
    wrapper = cfg.get("optim_wrapper")
    if isinstance(wrapper, Mapping) and "constructor" not in wrapper:
        own = {key: value for key, value in wrapper.items() if key not in OPTIMIZER_KEYS}
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        with _at("optim_wrapper", own):
            OPTIM_WRAPPERS.build({"type": "OptimWrapper", **own, "optimizer": optimizer})
    for key, hook in _hooks(cfg):
        with _at(key, hook):
            HOOKS.build({name: value for name, value in hook.items() if name != "priority"})


def _hooks(cfg: Config) -> Iterator[tuple[str, Mapping[str, Any]]]:
    named = (cfg.get("default_hooks") or {}).items()
    for part, pairs in (("default", named), ("custom", enumerate(cfg.get("custom_hooks") or ()))):
        for key, hook in pairs:
            if isinstance(hook, Mapping):
                yield f"{part}_hooks.{key}", hook


@contextmanager
def _at(key: str, values: Mapping[str, Any]) -> Iterator[None]:
    """Names the key in what is said against one of its values."""
    try:
        with user_errors():
            yield
    except UserError as error:
        text = re.sub(r"^\w+: ", "", str(error))  # the class
        first = re.match(r"\w*", text)
        joint = "." if first and first[0] in values else ": "
        raise UserError(f"{key}{joint}{text}") from error

"""The state of an optimizer by the names of its parameters, however these are spread.

So it can be read by other processes, another number of them, or none.
"""

from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from mmsora.utils.checkpoint import plain
from mmsora.utils.checkpoint_folder import CheckpointFolder
from mmsora.utils.user_error import UserError

__all__ = ["load_optimizer", "optimizer_settings", "optimizer_state"]

WRAPPER_PARTS = ("scaler", "guard")  # of our wrapper, which have states of their own
NUMBER = "number:"  # before the name of a state that is no tensor in the optimizer


def optimizer_state(wrapper: OptimWrapper, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What the optimizer of this process remembers of each parameter.

    Args:
        wrapper: Its wrapper.
        model: Whose parameters have the names.

    Returns:
        Tensors as they are, by their name in the state, by the name of the parameter. Under
        ZeRO-1 each process has other parameters.
    """
    names, found = _names(model), {}
    for parameter, state in _local(wrapper).state.items():
        found[names[parameter]] = {
            key if isinstance(value, Tensor) else NUMBER + key: torch.as_tensor(value)
            for key, value in state.items()
            if value is not None
        }
    return found


def optimizer_settings(wrapper: OptimWrapper, model: nn.Module) -> dict[str, Any]:
    """What else makes up the optimizer: its class, the settings of its groups, and what its
    wrapper remembers; plain types."""
    names = _names(model)
    parts = {name: getattr(wrapper, name) for name in WRAPPER_PARTS if hasattr(wrapper, name)}
    groups = [
        {**group, "params": [names[p] for p in group["params"] if p in names]}
        for group in wrapper.param_groups
    ]
    return plain(
        {
            "type": type(_local(wrapper)).__name__,
            "groups": groups,
            **{name: part.state_dict() for name, part in parts.items()},
        }
    )


def load_optimizer(wrapper: OptimWrapper, model: nn.Module, folder: CheckpointFolder) -> None:
    """Go on with the state in a checkpoint.

    Args:
        wrapper: Of an optimizer of the same class; its groups may be cut otherwise.
        model: Whose parameters have the names.
        folder: The checkpoint, with ``optimizer`` and ``optim_wrapper``.

    Raises:
        UserError: It is of another optimizer.
    """
    settings, optimizer, names = folder.rest["optim_wrapper"], _local(wrapper), _names(model)
    if settings["type"] != type(optimizer).__name__:
        raise UserError(
            f"{folder.path} was written with {settings['type']}, the config has "
            f"{type(optimizer).__name__}; start a new run from its weights by load_from"
        )
    for group in wrapper.param_groups:
        mine = {names[parameter] for parameter in group["params"] if parameter in names}
        # One without parameters is MMEngine's, of the settings before any group's own.
        then = (
            g for g in settings["groups"] if mine & {*g["params"]} or not (mine or g["params"])
        )
        group.update({k: v for k, v in next(then, {}).items() if k != "params"})
    for name in WRAPPER_PARTS:
        if settings.get(name) and hasattr(wrapper, name):
            getattr(wrapper, name).load_state_dict(settings[name])
    _load_state(optimizer, names, folder)


def _load_state(optimizer: Optimizer, names: dict[Tensor, str], folder: CheckpointFolder) -> None:
    stored = folder.named("optimizer")
    by_parameter: dict[str, list[str]] = {}
    for name in stored:
        parameter, _, key = name.rpartition("/")
        by_parameter.setdefault(parameter, []).append(key)
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for i, parameter in enumerate(ordered):
        name = names[parameter]
        if name in by_parameter:
            state[i] = {
                key: _empty(parameter, stored[f"{name}/{key}"]) for key in by_parameter[name]
            }
    folder.read_into({"optimizer": {names[ordered[i]]: each for i, each in state.items()}})
    for each in state.values():
        for key in [key for key in each if key.startswith(NUMBER)]:
            each[key.removeprefix(NUMBER)] = each.pop(key).item()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _empty(parameter: nn.Parameter, stored: Any) -> Tensor:
    """Where a state goes: spread as its parameter is where it has its shape."""
    dtype = stored.properties.dtype
    if stored.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(stored.size, dtype=dtype)


def _local(wrapper: OptimWrapper) -> Optimizer:
    """The optimizer that has the states of this process: under ZeRO-1 one within another."""
    return getattr(wrapper.optimizer, "optim", wrapper.optimizer)


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}

"""What an optimizer remembers goes by the names of parameters, whatever its groups are."""

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn

from mmsora.engine.optimizer_state import load_optimizer, optimizer_settings, optimizer_state
from mmsora.utils.checkpoint_folder import CheckpointFolder, save_folder
from mmsora.utils.user_error import UserError


class Counting(torch.optim.Optimizer):
    """Has states of every kind: shaped as the parameter, otherwise, a number, and nothing."""

    def __init__(self, params, lr=0.1, scale=1.0):
        super().__init__(params, {"lr": lr, "scale": scale})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["decay"] = 0.5 * state.get("decay", 1.0)
                state["unused"] = None
                state["mean"] = state.get("mean", 0) + parameter.grad
                state["rows"] = parameter.grad.reshape(len(parameter), -1).sum(1)[1:]
                parameter -= group["lr"] * state["mean"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Conv1d(3, 5, 1))


def wrapper(model, kind=Counting, cut=False, **settings):
    parameters = list(model.parameters())
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.3}]
    if cut:
        groups = [{**group, "params": [p]} for group in groups for p in reversed(group["params"])]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    return OptimWrapper(kind(groups, **settings))


@pytest.fixture
def saved(tmp_path):
    model = network()
    ours = wrapper(model)
    for scale, group in enumerate(ours.param_groups):  # the last is MMEngine's own
        group["scale"] = float(scale)
    ours.optimizer.step()
    ours.optimizer.step()
    content = {
        "optimizer": optimizer_state(ours, model),
        "optim_wrapper": optimizer_settings(ours, model),
    }
    save_folder(content, tmp_path / "iter_2")
    return ours, CheckpointFolder(tmp_path / "iter_2")


@pytest.mark.parametrize("cut", [False, True], ids=["the same groups", "others"])
def test_it_goes_on_with_every_kind_of_state(saved, cut):
    theirs, folder = saved
    model = network()
    ours = wrapper(model, cut=cut, lr=0.7, scale=9.0)
    load_optimizer(ours, model, folder)
    names = {parameter: name for name, parameter in model.named_parameters()}
    known = {group["scale"]: group["lr"] for group in theirs.param_groups}
    assert len(ours.optimizer.state) == 4
    order = [n for n, _ in network().named_parameters()]
    then = dict(zip(order[::2] + order[1::2], theirs.optimizer.state.values(), strict=True))
    for parameter, state in ours.optimizer.state.items():
        other = then[names[parameter]]
        assert set(state) == {"count", "decay", "mean", "rows"}
        assert (state["count"], state["decay"]) == (2, 0.25)
        assert type(state["count"]) is int
        assert torch.equal(state["mean"], other["mean"])
        assert torch.equal(state["rows"], other["rows"])
    for group in ours.optimizer.param_groups:
        assert group["scale"] == (0.0 if names[group["params"][0]].endswith("weight") else 1.0)
        assert group["lr"] == known[group["scale"]]
    assert ours.param_groups[-1]["scale"] == 2.0
    ours.optimizer.step()  # with what was taken over


def test_another_optimizer_is_refused(saved):
    model = network()
    with pytest.raises(UserError, match=r"iter_2 was written with Counting, the config has SGD"):
        load_optimizer(wrapper(model, torch.optim.SGD), model, saved[1])

"""Optimizers of optional packages."""

import sys
from types import ModuleType

import pytest
import torch
from mmengine.registry import init_default_scope

from mmsora.registry import OPTIMIZERS
from mmsora.utils.config_check import check_config
from mmsora.utils.user_error import UserError


@pytest.fixture
def build():
    """An AdamW8bit of a registry's making, for one weight."""
    init_default_scope("mmsora")
    weight = torch.nn.Parameter(torch.ones(3, 2))

    def make(**arguments):
        return OPTIMIZERS.build(dict(type="AdamW8bit", params=[weight], **arguments))

    return make


def test_without_a_gpu_it_says_so(build, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="AdamW8bit needs a GPU, and there is none; use AdamW"):
        build()


def test_without_the_package_it_says_what_to_install(build, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="needs bitsandbytes .*pip install bitsandbytes"):
        build()


def test_arguments_reach_the_optimizer(build, monkeypatch):
    package, module = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    module.AdamW8bit = lambda params, **arguments: (params, arguments)
    package.optim = module
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (weight,), arguments = build(lr=3e-4, betas=(0.8, 0.9), min_8bit_size=16)
    assert weight.shape == (3, 2)
    assert arguments == {
        "lr": 3e-4, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 1e-2, "min_8bit_size": 16,
    }  # fmt: skip


def test_the_real_one_keeps_a_byte_for_each_number(build):
    pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    weight = torch.nn.Parameter(torch.randn(128, 64, device="cuda"))
    optimizer = OPTIMIZERS.build(dict(type="AdamW8bit", params=[weight], lr=1e-2))
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    assert (weight - before).abs().median() == pytest.approx(1e-2, rel=0.05)  # Adam's first step


def test_a_config_may_name_it_with_its_own_arguments_alone(tiny_config):
    options = {"optim_wrapper.optimizer": dict(type="AdamW8bit", lr=1e-4)}
    check_config(tiny_config(options))
    cfg = tiny_config({"optim_wrapper.optimizer": dict(type="AdamW8bit", lr=1e-4, fused=True)})
    with pytest.raises(UserError, match="takes no 'fused'"):
        check_config(cfg)

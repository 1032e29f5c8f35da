"""Activation checkpointing: the same gradients, for less memory."""

import copy
import statistics
import time
import weakref

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmsora.engine import ActivationCheckpointing, recompute
from mmsora.models import DiT, ImageToVideo, Latte
from mmsora.registry import RUNNERS
from mmsora.utils.config_check import check_config
from mmsora.utils.user_error import UserError

PLANS = [dict(mode="full"), dict(mode="every", every=2), dict(mode="selective")]
SMALL = dict(in_channels=3, out_channels=5, size=(3, 8, 12), patch=2, width=24, depth=4, heads=3)


class Dropping(nn.Module):
    """A block with dropout between and after its products."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        hidden = nn.functional.dropout(self.first(x).relu(), 0.4)
        return x + nn.functional.dropout(self.second(hidden), 0.2)


class DroppingNet(nn.Module):
    """Four of them, called as a denoiser is."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Dropping(24) for _ in range(4))

    def forward(self, x, clock):
        x = x.flatten(1)[:, :24] * clock[:, None]
        for block in self.blocks:
            x = block(x)
        return x


def image_to_video(train_image=True):
    image = dict(type="DiT", **SMALL | {"size": (1, 8, 12)})
    layer = dict(heads=2, kernel=3)
    places = {r"blocks\.\d": 24}
    return ImageToVideo(image, places, "(b t) 1 n c", 3, layer, train_image=train_image)


NETS = {
    "DiT": lambda: DiT(**SMALL),
    "Latte": lambda: Latte(**SMALL),
    "ImageToVideo": image_to_video,
    "frozen images": lambda: image_to_video(train_image=False),
    "dropout": DroppingNet,
}


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 3, 8, 12, generator=generator), torch.tensor([0.3, 0.8])


def gradients(net, seed=5):
    net.zero_grad()
    torch.manual_seed(seed)
    net(*batch()).square().mean().backward()
    after = torch.rand(1)  # the state of the generator
    return [p.grad for p in net.parameters() if p.grad is not None] + [after]


def equal(one, other):
    assert len(one) == len(other) > 1
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_the_same_bit_for_bit(name, fill_weights):
    plain = fill_weights(NETS[name]())
    expected, keys = gradients(plain), list(plain.state_dict())
    assert any(gradient.abs().max() > 0 for gradient in expected[:-1])
    if name == "dropout":
        assert not equal(gradients(plain, seed=6), expected)
    for plan in PLANS:
        net = copy.deepcopy(plain)
        assert ActivationCheckpointing(**plan).apply(net) >= 2
        assert list(net.state_dict()) == keys
        assert equal(gradients(net), expected), plan


def test_a_copy_computes_with_its_own_weights(fill_weights):
    net = fill_weights(DiT(**SMALL))
    expected = gradients(net)
    ActivationCheckpointing("full").apply(net)
    twin = copy.deepcopy(net)
    nn.init.zeros_(net.blocks[0].mlp.fc1.weight)
    assert equal(gradients(twin), expected)
    assert not equal(gradients(net), expected)


def test_sampling_does_not_know_of_it(monkeypatch, fill_weights):
    net = fill_weights(DiT(**SMALL))
    with torch.no_grad():
        expected = net(*batch())
    ActivationCheckpointing("full").apply(net)
    monkeypatch.setattr(recompute, "checkpoint", None)
    with torch.no_grad():
        assert torch.equal(net(*batch()), expected)


def test_without_a_mode_nothing_changes():
    net = DiT(**SMALL)
    assert ActivationCheckpointing("none").apply(net) == 0
    assert "forward" not in vars(net.blocks[0])


# What it costs and saves


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are made and still alive, and the most there were."""

    def __init__(self, net):
        super().__init__()
        self.now = self.most = 0
        owned = [t for p in net.parameters() for t in (p, p.grad)]
        self.known = {tensor.untyped_storage()._cdata for tensor in owned}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, address, size):
        self.known.discard(address)
        self.now -= size


def cost(net):
    """Peak of the activations in bytes, and FLOPs, of a training step."""
    inputs = torch.randn(2, 4, *net.size), torch.rand(2)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Memory(net) as memory:
        net(*inputs).square().mean().backward()
    with FlopCounterMode(display=False) as flops:
        net(*inputs).square().mean().backward()
    return memory.most, flops.get_total_flops()


SHAPES = {"DiT": (DiT, (1, 32, 32)), "Latte": (Latte, (8, 16, 16))}


def of_shape(kind, width=96, heads=6):
    """DiT-S or Latte-S, narrower by default: bytes and FLOPs go by depth and ratios."""
    cls, size = SHAPES[kind]
    return cls(4, 8, size, 2, width, 12, heads)


@pytest.mark.parametrize("kind", SHAPES)
def test_memory_and_work_go_by_the_mode(kind, fill_weights):
    plain = fill_weights(of_shape(kind))
    most, work = cost(plain)
    ratios = {}
    for plan in PLANS:
        net = copy.deepcopy(plain)
        ActivationCheckpointing(**plan).apply(net)
        bytes_, flops = cost(net)
        ratios[plan["mode"]] = bytes_ / most, flops / work
    memory = {mode: ratio for mode, (ratio, _) in ratios.items()}
    assert memory["full"] < 0.30
    assert memory["full"] < memory["every"] < 0.62
    assert memory["full"] < memory["selective"] < 0.75
    assert 1.25 < ratios["full"][1] <= 4 / 3
    assert ratios["every"][1] == pytest.approx((1 + ratios["full"][1]) / 2, abs=0.01)
    assert ratios["selective"][1] == 1


def test_attention_with_dropout_is_computed_anew():
    """Were its result kept, the dropout after it would draw other numbers the second time."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention.default
    product = torch.ops.aten.mm.default
    tensors = [torch.ones(1, 1, 2, 8)] * 3
    keeps = recompute.CheckpointPolicy.MUST_SAVE
    assert recompute._policy(None, product, *tensors[:2]) == keeps
    assert recompute._policy(None, fused, *tensors) == keeps
    assert recompute._policy(None, fused, *tensors, 0.0) == keeps
    assert recompute._policy(None, fused, *tensors, 0.1) != keeps
    assert recompute._policy(None, fused, *tensors, dropout_p=0.1) != keeps


def test_what_waits_for_other_processes_is_kept():
    reduce = torch.ops._c10d_functional.all_reduce.default
    wait = torch.ops._c10d_functional.wait_tensor.default
    keeps = recompute.CheckpointPolicy.MUST_SAVE
    assert recompute._policy(None, reduce, torch.ones(2), "sum", "0") == keeps
    assert recompute._policy(None, wait, torch.ones(2)) == keeps
    assert recompute._policy(None, torch.ops.aten.gelu.default, torch.ones(2)) != keeps


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_full_takes_at_most_1_4_times_as_long(kind, fill_weights):
    plain = fill_weights(of_shape(kind, width=384))
    net = copy.deepcopy(plain)
    ActivationCheckpointing("full").apply(net)
    inputs = torch.randn(2, 4, *plain.size), torch.rand(2)

    def seconds(model):
        start = time.perf_counter()
        model(*inputs).square().mean().backward()
        return time.perf_counter() - start

    ratios = [seconds(net) / seconds(plain) for _ in range(15)]
    assert statistics.median(ratios) < 1.4


# Together with the rest


@pytest.fixture
def one_process():
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan["mode"])
def test_it_works_within_ddp_and_before_and_after_sharding(plan, one_process, fill_weights):
    plain = fill_weights(Latte(**SMALL))
    expected, checkpointing = gradients(plain), ActivationCheckpointing(**plan)
    wrapped = copy.deepcopy(plain)
    checkpointing.apply(wrapped)
    assert equal(gradients(DistributedDataParallel(wrapped)), expected)
    mesh = distributed.init_device_mesh("cpu", (1,))
    for first in (True, False):
        net = copy.deepcopy(plain)
        if first:
            checkpointing.apply(net)
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        if not first:
            checkpointing.apply(net)
        *found, after = gradients(net)
        assert equal([g.full_tensor() for g in found] + [after], expected), first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("whole", [True, False])
def test_it_compiles(mode, whole, fill_weights):
    plain = fill_weights(Latte(**SMALL))
    net = copy.deepcopy(plain)
    ActivationCheckpointing(mode).apply(net)
    for part in [net] if whole else net.blocks:
        part.compile(backend="aot_eager")
    expected = gradients(plain)
    for found, gradient in zip(gradients(net), expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_runs_are_the_same_with_it(tiny_config, monkeypatch):
    calls, weights = [], []
    real = recompute.checkpoint
    monkeypatch.setattr(recompute, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    for plan in [None, PLANS[0], PLANS[2]]:
        cfg = tiny_config({f"activation_checkpointing.{key}": plan[key] for key in plan or {}})
        check_config(cfg)
        runner = RUNNERS.build(cfg)
        weights.append(runner.train().state_dict())
        assert len(calls) == (6 * 2 if plan else 0)  # iterations, blocks
        assert runner.cfg.get("activation_checkpointing") == plan  # back in its place
        calls.clear()
    plain, *others = weights
    for other in others:
        assert other.keys() == plain.keys()
        assert all(torch.equal(other[key], value) for key, value in plain.items())


# Mistakes


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (dict(mode="half"), "mode must be one of none, full, every, selective; got 'half'"),
        (dict(mode="every"), "mode='every' goes with every=2"),
        (dict(mode="full", every=2), "mode='every' goes with every=2"),
        (dict(mode="every", every=1), "every must be at least 2, got 1; for all blocks"),
    ],
)
def test_a_plan_that_is_none_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        ActivationCheckpointing(**plan)


def test_the_list_of_modules_that_mmengine_takes_is_refused(tiny_config):
    cfg = tiny_config()
    cfg.activation_checkpointing = ["denoiser.blocks.0"]
    with pytest.raises(ValueError, match=r"is dict\(mode='full'\), which finds the blocks itself"):
        RUNNERS.build(cfg).train()


def test_a_key_that_it_does_not_take_is_refused(tiny_config):
    cfg = tiny_config({"activation_checkpointing.mode": "full"})
    cfg.activation_checkpointing.evry = 2
    with pytest.raises(UserError, match=r"takes no 'evry'; did you mean 'every'"):
        check_config(cfg)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"needs an nn.ModuleList of blocks, which Linear has"):
        ActivationCheckpointing("full").apply(nn.Linear(2, 2))

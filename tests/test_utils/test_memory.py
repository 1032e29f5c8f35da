"""Bytes counted on the meta device are those that a CPU takes."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from mmsora.engine.recompute import ActivationCheckpointing
from mmsora.models import DiT, Latte
from mmsora.models.layers import attention
from mmsora.utils.memory import AsOnGPU, LiveBytes, num_bytes

KIB = 1024
MODES = ("none", "full", "every", "selective")
NETWORKS = {
    "DiT-S": (DiT, (4, 8, (1, 32, 32), 2, 384, 12, 6, 1000), 4),
    "Latte-S": (Latte, (4, 8, (16, 32, 32), 2, 384, 12, 6, 101), 1),
    "small DiT": (DiT, (4, 8, (1, 16, 16), 2, 192, 4, 3, 10), 3),
    "small Latte": (Latte, (4, 8, (5, 16, 16), 2, 192, 4, 3, 10), 2),
}


# Counting


def test_storages_count_once_and_views_do_not():
    whole = torch.empty(3, 5, device="meta")
    assert num_bytes([whole, whole[1:], torch.empty(7, device="meta")]) == 4 * (15 + 7)


def test_what_lives_counts_in_whole_blocks_and_what_died_does_not():
    before = torch.empty(256, device="meta")
    with LiveBytes([before]) as memory:
        kept = before.exp()
        assert memory.live == KIB
        view = before[2:]
        assert memory.live == KIB
        other = torch.empty(3, device="meta")
        assert memory.live == KIB + 512
        del other
    assert (memory.live, memory.peak) == (KIB, KIB + 512)
    del kept, view
    assert memory.live == 0


def test_gradients_are_told_apart():
    weight = nn.Parameter(torch.empty(256, device="meta"))
    with LiveBytes([weight]) as memory, memory.watch([weight]):
        loss = weight.exp().sum()
        loss.backward()
        del loss
    assert (memory.gradients, memory.live) == (KIB, 0)
    assert memory.peak_total >= memory.peak
    (weight * 2).sum().backward()  # nobody watches any more
    assert memory.gradients == KIB


# As a GPU computes


def test_products_are_in_half_norms_in_float_and_sums_in_the_widest():
    gpu = AsOnGPU(torch.bfloat16)
    x = torch.empty(2, 8, device="meta")
    half = x.bfloat16()
    with gpu:
        assert F.linear(x, x).dtype == (x @ x.mT).dtype == torch.bfloat16
        assert F.layer_norm(half, (8,)).dtype == half.softmax(-1).dtype == torch.float32
        assert torch.addcmul(x, half, half).dtype == torch.float32
        assert torch.addcmul(half, half, half).dtype == F.silu(half).dtype == torch.bfloat16
    with AsOnGPU(None):
        assert F.linear(x, x).dtype == torch.float32


def test_weights_are_cast_once_in_the_forward_pass():
    gpu, weight = AsOnGPU(torch.bfloat16), nn.Parameter(torch.empty(512, 512, device="meta"))
    x = torch.empty(1, 512, device="meta", requires_grad=True)
    with LiveBytes([weight, x]) as memory, gpu.forward_pass():
        outs = [F.linear(x, weight) for _ in range(3)]
    assert memory.live == 512 * KIB + KIB + 3 * KIB  # two casts, and three results
    del outs


def test_attention_keeps_no_scores():
    q, k, v = (torch.empty(1, 1, 1024, 8, device="meta", requires_grad=True) for _ in range(3))
    with LiveBytes([q, k, v]) as memory, AsOnGPU(None):
        out = F.scaled_dot_product_attention(q, k, v)
    assert out.shape == q.shape
    assert memory.peak < 100 * KIB  # the scores are 4 MiB


def test_what_is_recomputed_is_computed_as_before():
    gpu, found = AsOnGPU(torch.bfloat16), []
    layer = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).to("meta")
    for part in layer:
        part.register_forward_hook(lambda module, args, out: found.append(out.dtype))
    gpu.cover(layer)
    x = torch.empty(2, 8, device="meta", requires_grad=True)
    with gpu.forward_pass():
        loss = checkpoint(layer.forward, x, use_reentrant=False).sum()
    loss.backward()
    forward = [torch.bfloat16, torch.float32, torch.bfloat16]
    assert found[:3] == forward
    assert found[3:] == forward[: len(found) - 3] != []  # it may stop before the last
    assert layer[0].weight.grad.dtype == torch.float32


# Against a CPU


def inputs(sizes, batch, device):
    latent = torch.zeros(batch, 4, *sizes[2], device=device)
    clock = 100.0 * torch.arange(batch, device=device)
    return latent, clock, torch.zeros(batch, dtype=torch.long, device=device)


def recompute(network, mode):
    ActivationCheckpointing(mode, 2 if mode == "every" else None).apply(network)


def predicted(kind, sizes, batch, mode, dtype):
    with torch.device("meta"):
        network = kind(*sizes)
    gpu, given = AsOnGPU(dtype), inputs(sizes, batch, "meta")
    for block in network.blocks:
        gpu.cover(block)
    recompute(network, mode)
    memory = LiveBytes([*network.parameters(), *network.buffers(), *given])
    with memory, memory.watch(list(network.parameters())):
        with gpu.forward_pass():
            loss = network(*given).float().square().mean()
        loss.backward()
    return memory.peak_total


def measured(kind, sizes, batch, mode, dtype):
    """The most that the CPU's allocator gave out, as torch's profiler saw it."""
    network, given = kind(*sizes), inputs(sizes, batch, "cpu")
    recompute(network, mode)
    gc.collect()  # what dies later would count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            loss = network(*given).float().square().mean()
        loss.backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.fixture
def fused(monkeypatch):
    """Attention of CPUs as of GPUs: one kernel, which keeps no scores."""

    def attend(q, k, v):
        return F.scaled_dot_product_attention(*(x.flatten(0, -4) for x in (q, k, v))).view(q.shape)

    monkeypatch.setattr(attention, "CPU_FUSED_LENGTH", 0)
    monkeypatch.setattr(attention, "_plain", attend)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["small DiT", "small Latte"])
def test_the_peak_is_that_of_a_cpu(name, mode, dtype):
    kind, sizes, batch = NETWORKS[name]
    found = measured(kind, sizes, batch, mode, dtype)
    assert predicted(kind, sizes, batch, mode, dtype) == pytest.approx(found, rel=0.15)


@pytest.mark.slow
@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["DiT-S", "Latte-S"])
def test_the_peak_is_that_of_a_cpu_at_full_size(name, mode, dtype):
    kind, sizes, batch = NETWORKS[name]
    found = measured(kind, sizes, batch, mode, dtype)
    assert predicted(kind, sizes, batch, mode, dtype) == pytest.approx(found, rel=0.15)

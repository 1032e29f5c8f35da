"""Whatever computes attention, and along whichever axis, it is the same function."""

import pytest
import torch

from mmsora.models.layers import attention
from mmsora.models.layers.attention import Attention, attend

SHAPE = 2, 5, 7, 24  # batch, time, space, width


def by_definition(q, k, v):
    """In float64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for i in range(q.shape[-2]):
        scores = (q[..., i : i + 1, :] * k).sum(-1) / q.shape[-1] ** 0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out[..., i, :] = (weights[..., None] * v).sum(-2)
    return out


@pytest.fixture(params=["plain", "fused"])
def backend(request, monkeypatch):
    """Makes every float32 attention on the CPU take one of the two implementations."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention, "CPU_FUSED_LENGTH", 0 if request.param == "fused" else 10**9)
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a: calls.append(1) or fused(*a),
    )
    yield request.param
    assert bool(calls) == (request.param == "fused")


def qkv(tokens, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 3, tokens, 8, generator=generator).to(dtype).unbind()


@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_back_ends_compute_attention(backend, tokens):
    q, k, v = (x.requires_grad_() for x in qkv(tokens))
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))

    gradients = torch.autograd.grad((attend(q, k, v) * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((by_definition(q, k, v) * weight).sum(), (q, k, v))

    assert (attend(q, k, v) - by_definition(q, k, v)).abs().max() < 1e-6
    for actual, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("tokens", [7, 100])
def test_bfloat16_is_as_good_as_its_digits(tokens):
    q, k, v = qkv(tokens, torch.bfloat16)
    out = attend(q, k, v)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    exact = by_definition(q, k, v)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 0.02
    assert (fused - exact).abs().max() < 0.02


@pytest.mark.parametrize(
    ("tokens", "grad", "calls"), [(63, True, 0), (64, True, 1), (2, False, 1)]
)
def test_which_sequences_are_plain_on_the_cpu(tokens, grad, calls, monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v: seen.append(q.shape) or q,
    )
    attend(*(x.requires_grad_(grad) for x in qkv(tokens)))
    attend(*qkv(tokens, torch.bfloat16))
    assert len(seen) == calls


def test_the_fused_kernel_gets_four_dimensions(monkeypatch):
    seen = []  # with five it falls back to plain matrix products
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v: seen.append(q.ndim) or q,
    )
    for axis in 1, 2:
        with torch.no_grad():
            module()[0](torch.randn(SHAPE), axis)
    assert seen == [4, 4]


def module():
    torch.manual_seed(0)
    layer = Attention(width=24, heads=4)
    torch.nn.init.normal_(layer.qkv.bias)
    torch.nn.init.normal_(layer.proj.bias)
    return layer, torch.randn(SHAPE)


def one_sequence(layer, x):
    """Attention of one sequence (tokens, width), one head at a time."""
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(24, dim=-1)
    heads = [
        by_definition(*each) for each in zip(*(y.split(6, dim=-1) for y in (q, k, v)), strict=True)
    ]
    return torch.cat(heads, -1).float() @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize("axis", [1, 2])
def test_attention_is_along_its_axis_alone(backend, axis):
    layer, x = module()
    out = layer(x, axis)

    expected = torch.empty_like(x)
    for b in range(2):
        if axis == 1:
            for n in range(7):
                expected[b, :, n] = one_sequence(layer, x[b, :, n])
        else:
            for t in range(5):
                expected[b, t] = one_sequence(layer, x[b, t])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("axis", [1, 2])
def test_back_ends_agree_on_gradients_of_weights(axis, monkeypatch):
    layer, x = module()
    gradients = []
    for length in 0, 10**9:
        monkeypatch.setattr(attention, "CPU_FUSED_LENGTH", length)
        loss = (layer(x, axis) ** 3).sum()
        gradients.append(torch.autograd.grad(loss, list(layer.parameters())))
    for fused, plain in zip(*gradients, strict=True):
        assert (fused - plain).abs().max() < 1e-5 * plain.abs().max()


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 24 is not divisible by heads 5"):
        Attention(24, 5)

"""Operations against published figures and against torch's own counter."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmsora.models import DiT, Latte
from mmsora.utils.flops import FlopCounter

# Width, depth and heads, and 10^9 multiply-adds of one image of 256 x 256 pixels
# (arXiv:2212.09748, table 1).
PUBLISHED = {
    "S/2": ((384, 12, 6), 6.06),
    "B/2": ((768, 12, 12), 23.01),
    "L/2": ((1024, 24, 16), 80.71),
    "XL/2": ((1152, 28, 16), 118.64),
}


def count(network, *inputs):
    with torch.no_grad(), FlopCounter() as counter:
        network(*inputs)
    return counter.total


@pytest.mark.parametrize(("sizes", "billions"), PUBLISHED.values(), ids=PUBLISHED)
def test_dit_does_as_much_as_was_published(sizes, billions):
    with torch.device("meta"):
        network = DiT(4, 8, (1, 32, 32), 2, *sizes, 1000)
        inputs = torch.empty(1, 4, 1, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
        found = count(network, *inputs)
    assert found / 2e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_counter_agrees_with_torch_forward_and_backward(device):
    with torch.device(device):
        network = Latte(3, 3, (4, 6, 8), 2, 16, 4, 2)
        inputs = torch.zeros(2, 3, 4, 6, 8), torch.zeros(2)
    with FlopCounterMode(display=False) as theirs, FlopCounter() as ours:
        network(*inputs).sum().backward()
    assert ours.total == theirs.get_total_flops() > 0


@pytest.mark.parametrize("tokens", [5, 70])
def test_attention_counts_alike_fused_or_not_and_twice_in_the_backward_pass(tokens):
    heads, width = 3, 8
    q, k, v = (torch.randn(2, heads, tokens, width, requires_grad=True) for _ in range(3))
    product = 2 * 2 * heads * tokens * tokens * width
    with FlopCounter() as fused:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    with FlopCounter() as plain:
        ((q @ k.mT).softmax(-1) @ v).sum().backward()
    assert fused.total == plain.total == 3 * 2 * product

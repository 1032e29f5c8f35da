"""Stage C's shift, as a grid on the path that it was trained on."""

import pytest
import torch

from mmsora import diffusion as D


@pytest.mark.parametrize("shift", [1.0, 2.0, 4.0])
def test_it_is_the_shifted_path_with_even_steps(shift):
    path, shifted = D.CosinePath(), D.CosinePath(shift=shift)
    times, even = D.ShiftedSNRGrid(9, shift)(path), D.SpacedGrid(9)(shifted)
    assert times.shape == (10,)
    assert (times[0], times[-1]) == (1, 0)
    for ours, theirs in zip(path.coefficients(times), shifted.coefficients(even), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    told, theirs = path.clock(times[:-1]), shifted.clock(even[:-1])
    torch.testing.assert_close(told, theirs, rtol=0, atol=1e-9)


def test_on_a_line_the_ratio_is_multiplied():
    times = D.ShiftedSNRGrid(4, 3.0)(D.LinearPath())
    even = torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64)
    ratio = times[1:-1] / (1 - times[1:-1])
    torch.testing.assert_close(ratio, 3 * even / (1 - even))
    assert (times[0], times[-1]) == (1, 0)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="shift must be at least 1, got 0.5"):
        D.ShiftedSNRGrid(5, 0.5)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        D.ShiftedSNRGrid(0)
    with pytest.raises(ValueError, match="DiscretePath is a table; take SpacedGrid"):
        D.ShiftedSNRGrid(5)(D.DiscretePath())

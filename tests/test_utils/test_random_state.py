"""Random generators go on from where they were, or from somewhere else."""

import random

import numpy as np
import pytest
import torch

from mmsora.utils.random_state import derive_random_state, random_state, set_random_state


def draw():
    return [
        *torch.randn(3).tolist(),
        *np.random.randn(3).tolist(),
        random.gauss(0, 1),
        random.random(),
        np.random.rand(),
    ]


@pytest.mark.parametrize("before", [0, 1, 2, 700])
def test_they_go_on(before):
    for _ in range(before):
        draw()
    state = random_state()
    assert set(state) >= {"cpu", "numpy", "python"}
    expected = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != expected
    set_random_state(state)
    assert [draw() for _ in range(3)] == expected


def test_derived_states_are_functions_of_all_numbers():
    drawn = []
    for numbers in [(0, 5, 0), (0, 5, 1), (1, 5, 0), (0, 6, 0), (0, 5, 0)]:
        derive_random_state(*numbers)
        drawn.append(draw())
    assert drawn[0] == drawn[-1]
    for one in range(4):
        for other in range(one):
            assert not set(drawn[one]) & set(drawn[other])

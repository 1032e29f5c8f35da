"""The state of all random generators of a process, as tensors."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["derive_random_state", "random_state", "set_random_state"]


def random_state() -> dict[str, Tensor]:
    """What torch (``cpu`` and ``cuda``), numpy and Python would go on with."""
    _, words, gauss = random.getstate()  # 32 bits each, and a float or None
    _, keys, *others = np.random.get_state()  # 32 bits each, two counts and a float
    state = {
        "cpu": torch.get_rng_state(),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), *others], dtype=torch.float64),
        "python": torch.tensor([*words, gauss is not None, gauss or 0], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Go on from a state.

    Args:
        state: What ``random_state`` gave. One that was saved without a GPU leaves a GPU's as it
            is.
    """
    torch.set_rng_state(state["cpu"])
    *keys, position, has_gauss, gauss = state["numpy"].tolist()
    array = np.array(keys, np.uint32)
    np.random.set_state(("MT19937", array, int(position), int(has_gauss), gauss))
    *words, has_gauss, gauss = state["python"].tolist()
    random.setstate((3, tuple(map(int, words)), gauss if has_gauss else None))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def derive_random_state(*numbers: int) -> None:
    """Go on from a state that is a function of some numbers, such as seed, iteration and rank."""
    ours, theirs, pythons = np.random.SeedSequence(numbers).generate_state(3).tolist()
    torch.manual_seed(ours)
    np.random.seed(theirs)
    random.seed(pythons)

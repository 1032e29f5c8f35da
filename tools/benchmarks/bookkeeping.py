"""What a step of sampling costs beside the network: our loop, and a table upload each step."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Ratio, interleaved, speed
from mmsora.diffusion.discrete_path import DiscretePath
from mmsora.diffusion.grid import SpacedGrid
from mmsora.diffusion.guidance import ClassifierFree
from mmsora.diffusion.loss import MSE
from mmsora.diffusion.prediction import LearnedRange, NoisePrediction
from mmsora.diffusion.process import Diffusion
from mmsora.diffusion.solver import Ancestral
from mmsora.diffusion.times import UniformTimes
from mmsora.utils.draws import Draws

__all__ = ["SHAPES", "Cost", "TableLoop", "iddpm", "measure_bookkeeping"]

SHAPES = {"image": (1, 4, 1, 32, 32), "8 images": (8, 4, 1, 32, 32), "video": (1, 4, 16, 32, 32)}
STEPS = 50


class Fixed(Draws):
    """The same noise at each step: what it costs to draw is none of the bookkeeping."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__(0, range(len(noise)))
        self.noise = noise

    def normal(self, name: str, like: Tensor) -> Tensor:
        """The noise, whatever the name."""
        return self.noise


def iddpm() -> Diffusion:
    """Ancestral sampling with learned variance."""
    return Diffusion(
        path=DiscretePath(),
        prediction=LearnedRange(NoisePrediction()),
        train_times=UniformTimes(),
        solver=Ancestral(),
        grid=SpacedGrid(STEPS),
        guidance=ClassifierFree(1.0),
        loss=MSE(),
    )


class TableLoop:
    """The same as the public code does it: each step takes eight tables from NumPy to the device,
    looks up each sample's number, and blows it up to the size of the batch.
    """

    def __init__(self) -> None:
        path = DiscretePath()
        levels = SpacedGrid(STEPS)(path)[:-1].flip(0)
        alpha, _ = path.coefficients(levels)
        bar = (alpha**2).numpy()
        before = np.append(1.0, bar[:-1])
        betas = 1 - bar / before
        posterior = betas * (1 - before) / (1 - bar)
        self.levels = levels.tolist()
        self.tables = {
            "data_of_x": np.sqrt(1 / bar),
            "data_of_noise": np.sqrt(1 / bar - 1),
            "mean_of_data": betas * np.sqrt(before) / (1 - bar),
            "mean_of_x": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
            "variance": posterior,
            "log_variance": np.log(np.append(posterior[1], posterior[1:])),
            "log_betas": np.log(betas),
        }

    def __call__(self, noise: Tensor, network: Callable[..., Tensor]) -> Tensor:
        """Samples of noise, which each step also adds; a network has twice the channels."""
        x = noise
        for i in reversed(range(len(self.levels))):
            x = self._step(x, torch.tensor([i] * len(x)), noise, network)
        return x

    def _step(self, x: Tensor, t: Tensor, noise: Tensor, network: Callable[..., Tensor]) -> Tensor:
        level = torch.tensor(self.levels)[t]
        output, share = network(x, level).chunk(2, dim=1)
        least, most = self._at("log_variance", t, x), self._at("log_betas", t, x)
        share = (share + 1) / 2
        log_variance = share * most + (1 - share) * least
        log_variance.exp()  # it is returned, and not used
        x0 = self._at("data_of_x", t, x) * x - self._at("data_of_noise", t, x) * output
        mean = self._at("mean_of_data", t, x) * x0 + self._at("mean_of_x", t, x) * x
        self._at("variance", t, x), self._at("log_variance", t, x)  # likewise
        again = (t != 0).float().view(-1, *[1] * (x.ndim - 1))
        return mean + again * torch.exp(0.5 * log_variance) * noise

    def _at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        values = torch.from_numpy(self.tables[name]).to(x.device)[t].float()
        return values.view(-1, *[1] * (x.ndim - 1)) + torch.zeros_like(x)


class Cost(NamedTuple):
    """What a step costs, the network aside.

    Attributes:
        speed: How many times as fast ours is.
        ours_ms: CPU milliseconds of a step of ours.
        tables_ms: Of the other.
        difference: Greatest difference of the samples, relative to the greatest value.
    """

    speed: Ratio
    ours_ms: float
    tables_ms: float
    difference: float

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return self._asdict() | {"speed": self.speed._asdict()}


def measure_bookkeeping(shape: tuple[int, ...], rounds: int) -> Cost:
    """Compare the two loops around a network that costs nothing.

    Args:
        shape: Of the latents.
        rounds: How often, the loops in turn.

    Returns:
        The cost.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    output = torch.randn(shape[0], 2 * shape[1], *shape[2:], generator=generator).clamp(-1, 1)

    def network(x: Tensor, clock: Tensor) -> Tensor:
        return output

    process, tables = iddpm(), TableLoop()
    draws = Fixed(noise)
    loops: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: process.sample(network, noise, {}, None, draws),
        "tables": lambda: tables(noise, network),
    }
    with torch.no_grad():
        ours, theirs = (loop() for loop in loops.values())
        spent = interleaved(loops, rounds, "cpu")
    ours_ms, tables_ms = (statistics.median(spent[name]) * 1e3 / STEPS for name in loops)
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return Cost(speed(spent["ours"], spent["tables"]), ours_ms, tables_ms, difference)

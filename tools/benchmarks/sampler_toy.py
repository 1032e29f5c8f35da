"""Samplers on data whose diffusion is known exactly: how far from the truth they end."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.mixture import CLASSES, Mixture
from mmsora.diffusion.discrete_path import DiscretePath
from mmsora.diffusion.grid import KarrasGrid
from mmsora.diffusion.level import Estimate, Level
from mmsora.diffusion.ode import RungeKutta
from mmsora.diffusion.path import Path
from mmsora.diffusion.solver import Denoise, Solver, forward_variance, posterior_variance
from mmsora.diffusion.unit_paths import LinearPath
from mmsora.diffusion.ve_path import VEPath
from mmsora.registry import SCHEDULERS
from mmsora.utils.draws import Draws

__all__ = ["GUIDANCE", "Figures", "Floor", "Sampler", "Toy"]

GUIDANCE = 4.0
STOCHASTIC = ("Ancestral", "EulerMaruyama")
SEEDS = 3  # of stochastic samplers
NOISE_SEED = 0
LEAST_RATIO = 1e-3  # sigma / alpha of its last step


class Sampler(NamedTuple):
    """A solver and its grid.

    Attributes:
        name: For the table.
        path: ``table``, DDPM's, or ``flow``, the straight one.
        solver: Config.
        grid: Config but for ``num_steps``.
        calls: Network calls of a step.
        spared: Network calls that the last step goes without.
        learned: Whether the network says the variance of a step, as iDDPM's does.
    """

    name: str
    path: str
    solver: dict[str, Any]
    grid: dict[str, Any]
    calls: int = 1
    spared: int = 0
    learned: bool = False

    def steps(self, budget: int) -> int:
        """As many as a budget of network calls allows."""
        return (budget + self.spared) // self.calls

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise on the way."""
        return self.solver["type"] in STOCHASTIC or bool(self.solver.get("eta"))


class Figures(NamedTuple):
    """What a sampler reaches; distances are None where it is stochastic.

    Attributes:
        sampler: Its name.
        path: ``table`` or ``flow``.
        steps: Of the grid.
        calls: Network calls that it made; guidance doubles them.
        nll: Mean negative log-likelihood less that of exact samples, nats for each dimension.
        tv: Total variation of the modes' weights.
        median: Of the distances to the exact end of the flow, each the root mean square over
            dimensions.
        rms: Their root mean square.
        guided_median: The same with guidance.
        guided_rms: Likewise.
    """

    sampler: str
    path: str
    steps: int
    calls: int
    nll: float
    tv: float
    median: float | None = None
    rms: float | None = None
    guided_median: float | None = None
    guided_rms: float | None = None


class Floor(NamedTuple):
    """What exact samples, as many as are drawn, show by chance.

    Attributes:
        nll: Standard deviation of the mean negative log-likelihood, nats for each dimension.
        tv: Mean total variation of the modes' weights.
        tv_std: Its standard deviation.
    """

    nll: float
    tv: float
    tv_std: float


class Normal(Draws):
    """Noise of one generator for all samples: quicker than a generator each."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, [0])
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal numbers, whatever the name."""
        return torch.randn(like.shape, dtype=like.dtype, generator=self.generator)


class Toy:
    """The mixture, the noise that all samplers start from, and the exact ends of the flows.

    Args:
        count: Samples.
        exact: Exact samples, of which the likelihood to be expected is estimated.
        fine: Steps of the exact flows.
    """

    def __init__(self, count: int, exact: int = 400_000, fine: int = 800) -> None:
        self.mixture, self.count, self.fine = Mixture(), count, fine
        self.noise = Normal(NOISE_SEED).normal("", torch.empty(count, self.mixture.dim).double())
        self.labels = torch.arange(count) % CLASSES
        self.paths: dict[str, Path] = {"table": DiscretePath(), "flow": LinearPath()}
        generator = torch.Generator().manual_seed(2)
        self.expected = torch.zeros(len(self.mixture.weights)).double()
        self.expected = self._nll_by_mode(self.mixture.sample(exact, generator))
        sets = [self.mixture.sample(count, generator) for _ in range(20)]
        gaps = torch.tensor([self._nll(x) for x in sets])
        variations = torch.tensor([self._variation(x) for x in sets])
        self.floor = Floor(gaps.std().item(), variations.mean().item(), variations.std().item())

    def measure(self, sampler: Sampler, steps: int) -> Figures:
        """Run a sampler; a stochastic one with three seeds.

        Args:
            sampler: The sampler.
            steps: Of its grid.

        Returns:
            Its figures.
        """
        seeds = range(SEEDS if sampler.stochastic else 1)
        runs = [self._solve(sampler, steps, seed) for seed in seeds]
        nlls = [self._nll(x) for x, _ in runs]
        variations = [self._variation(x) for x, _ in runs]
        (x, calls), *_ = runs
        figures = Figures(
            sampler.name,
            sampler.path,
            steps,
            calls,
            sum(nlls) / len(nlls),
            sum(variations) / len(variations),
        )
        if sampler.stochastic:
            return figures
        guided, _ = self._solve(sampler, steps, 0, guided=True)
        errors = (
            *self._distance(x, sampler.path, False),
            *self._distance(guided, sampler.path, True),
        )
        return Figures(*figures[:6], *errors)

    def exact(self) -> Iterator[Figures]:
        """The figures of the exact flows: what chance makes of them."""
        for path in self.paths:
            x, _ = self.ends[path, False]
            yield Figures("exact flow", path, 0, 0, self._nll(x), self._variation(x))

    @cached_property
    def ends(self) -> dict[tuple[str, bool], tuple[Tensor, float]]:
        """Exact ends by path and whether guided, and how far half the steps of a quarter of the
        samples end from them: root mean square.
        """
        found, some = {}, max(self.count // 4, 1)
        for name in self.paths:
            for guided in (False, True):
                fine = self._flow(name, guided, self.fine, self.count)
                change = _rms(self._flow(name, guided, self.fine // 2, some) - fine[:some])
                found[name, guided] = fine, change.square().mean().sqrt().item()
        return found

    def _flow(self, name: str, guided: bool, steps: int, count: int) -> Tensor:
        """The flow depends on ``sigma / alpha`` alone: a table's is that of x / alpha."""
        path, x = self.paths[name], self.noise[:count]
        if name == "table":
            first = torch.tensor(path.t_noise, dtype=torch.float64)
            alpha, sigma = path.coefficients(first)
            path, x = VEPath(LEAST_RATIO, (sigma / alpha).item()), x / alpha
        times = KarrasGrid(steps, ratio_min=LEAST_RATIO)(path)
        return RungeKutta("rk4")(self._denoiser(guided, count), x, path, times, Normal(0))

    def _denoiser(self, guided: bool, count: int) -> Denoise:
        return self.mixture.denoiser(self.labels[:count] if guided else None, GUIDANCE)

    def _solve(
        self, sampler: Sampler, steps: int, seed: int, guided: bool = False
    ) -> tuple[Tensor, int]:
        """Samples, and how many network calls they took."""
        path = self.paths[sampler.path]
        solver: Solver = SCHEDULERS.build(sampler.solver)
        times: Tensor = SCHEDULERS.build(sampler.grid | {"num_steps": steps})(path)
        denoise, calls = self._denoiser(guided, self.count), 0

        def counted(x: Tensor, level: Level) -> Estimate:
            nonlocal calls
            calls += 1
            estimate = denoise(x, level)
            if not sampler.learned:
                return estimate
            return self._with_variance(estimate, x, level, path.at(times[calls], x))

        return solver(counted, self.noise, path, times, Normal(3 + seed)), calls

    def _with_variance(self, estimate: Estimate, x: Tensor, now: Level, to: Level) -> Estimate:
        """The variance that a perfect network would learn: the posterior's and the data's."""
        least, most = posterior_variance(now, to), forward_variance(now, to)
        kept = (to.sigma**2 - least).sqrt()
        slope = to.alpha - kept * now.alpha / now.sigma
        variance = least + slope**2 * self.mixture.spread(x, now)
        return estimate._replace(log_var_mix=(variance / least).log() / (most / least).log())

    def _nll(self, x: Tensor) -> float:
        nll = -self.mixture.log_density(x) / self.mixture.dim
        return (nll - self.expected[self.mixture.mode_of(x)]).mean().item()

    def _nll_by_mode(self, x: Tensor) -> Tensor:
        modes, nll = self.mixture.mode_of(x), -self.mixture.log_density(x) / self.mixture.dim
        return torch.bincount(modes, nll) / torch.bincount(modes)

    def _variation(self, x: Tensor) -> float:
        weights = self.mixture.weights
        shares = torch.bincount(self.mixture.mode_of(x), minlength=len(weights)) / len(x)
        return (shares - weights).abs().sum().item() / 2

    def _distance(self, x: Tensor, path: str, guided: bool) -> tuple[float, float]:
        """Median and root mean square over samples."""
        distances = _rms(x - self.ends[path, guided][0])
        return distances.median().item(), distances.square().mean().sqrt().item()


def _rms(x: Tensor) -> Tensor:
    """Over dimensions, (N,)."""
    return x.square().mean(1).sqrt()

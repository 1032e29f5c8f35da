"""The stochastic samplers of SiT (Ma et al. 2024, arXiv:2401.08740).

Whatever noise a process draws anew, at any rate ``w(t)``, it has the flow's distributions if the
score takes the same amount away: ``dx = (velocity - w score) dt + sqrt(2 w |dt|) n`` for time
that runs from noise to data. The score is ``-noise / sigma``, so one network call says both.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from mmsora.diffusion.level import Estimate, RandomNumbers
from mmsora.diffusion.ode import check_continuous, velocity
from mmsora.diffusion.path import Path
from mmsora.diffusion.solver import Denoise, Solver
from mmsora.registry import SCHEDULERS
from mmsora.utils.config_calls import suggestion

__all__ = ["EulerMaruyama", "StochasticHeun", "diffusion_rate"]

LAST_STEPS = ("mean", "tweedie", "euler", "none")
MARGIN = 1e-3  # of the path, where ``sbdm`` has no start


def _constant(path: Path, t: Tensor, norm: float) -> Tensor:
    return torch.full_like(t, norm)


def _sbdm(path: Path, t: Tensor, norm: float) -> Tensor:
    """Of score-based diffusion models: the noise that the forward process itself adds."""
    (alpha, sigma), (d_alpha, d_sigma) = path.coefficients(t), path.rates(t)
    return norm * sigma * (d_sigma - d_alpha / alpha * sigma)


def _sigma(path: Path, t: Tensor, norm: float) -> Tensor:
    return norm * path.coefficients(t)[1]


def _linear(path: Path, t: Tensor, norm: float) -> Tensor:
    return norm * t


def _decreasing(path: Path, t: Tensor, norm: float) -> Tensor:
    return (1 - norm * torch.cos(math.pi * t)) ** 2 / 4


def _increasing_decreasing(path: Path, t: Tensor, norm: float) -> Tensor:
    return norm * torch.sin(math.pi * t) ** 2


FORMS: dict[str, Callable[[Path, Tensor, float], Tensor]] = {
    "constant": _constant,
    "sbdm": _sbdm,
    "sigma": _sigma,
    "linear": _linear,
    "decreasing": _decreasing,
    "increasing-decreasing": _increasing_decreasing,
}
OF_TIME = ("linear", "decreasing", "increasing-decreasing")


def diffusion_rate(form: str, path: Path, t: Tensor, norm: float = 1.0) -> Tensor:
    """Half the variance that a process draws anew in a unit of time.

    Args:
        form: One of the six that :class:`EulerMaruyama` lists.
        path: The path.
        t: Times of any shape, from 0 at clean data to 1 at noise for the forms that go by time.
        norm: Factor; of ``decreasing``, of the cosine in it.

    Returns:
        float64, shaped like ``t``.

    Raises:
        ValueError: The form goes by time, and the path's times are others.
    """
    if form in OF_TIME and not (0 <= path.t_clean < path.t_noise <= 1):
        raise ValueError(
            f"diffusion {form!r} is a function of times from 0 to 1, and {type(path).__name__} "
            f"has {path.t_clean:g} to {path.t_noise:g}; use 'sigma' or 'sbdm'"
        )
    return FORMS[form](path, t.double(), norm)


class _Drift:
    """``dx/dt`` of the process without its new noise, at a batch and a place of the grid."""

    def __init__(self, denoise: Denoise, path: Path, times: Tensor, rate: Tensor) -> None:
        self.denoise, self.path, self.times = denoise, path, times
        self.of_x0, d_sigma = path.rates(times)
        self.of_noise = d_sigma + rate / path.coefficients(times)[1]

    def estimate(self, x: Tensor, i: int) -> Estimate:
        return self.denoise(x, self.path.at(self.times[i], x))

    def is_finite(self, i: int) -> bool:
        """Whether it can be asked for: not on clean data."""
        return bool(self.of_noise[i].isfinite())

    def __call__(self, x: Tensor, i: int) -> Tensor:
        estimate = self.estimate(x, i)
        return self.of_x0[i] * estimate.x0 + self.of_noise[i] * estimate.noise


class _Stochastic(Solver):
    """Steps down the grid, and takes its last interval in another way."""

    def __init__(
        self, diffusion: str = "sigma", norm: float = 1.0, last_step: str = "mean"
    ) -> None:
        for name, value, known in (
            ("diffusion", diffusion, FORMS),
            ("last_step", last_step, LAST_STEPS),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}{suggestion(value.lower(), known)}")
        if norm < 0:
            raise ValueError(f"norm must not be negative, got {norm}")
        self.diffusion, self.norm, self.last_step = diffusion, norm, last_step

    def check(self, path: Path) -> None:
        check_continuous(path, self)
        diffusion_rate(self.diffusion, path, torch.tensor([path.t_noise]).double(), self.norm)

    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        check_continuous(path, self)
        times = self._started(path, times)
        rate = diffusion_rate(self.diffusion, path, times, self.norm)
        drift, steps = _Drift(denoise, path, times, rate), times.diff()
        std = (-2 * rate[:-1] * steps).sqrt()
        last = len(steps) - 1
        for i in range(last + (self.last_step == "none")):
            new = std[i] * draws.normal(f"solver/{i}", x)
            x = self._step(drift, x, i, steps[i], new)
        if self.last_step == "none":
            return x
        if self.last_step == "mean":
            return x + steps[last] * drift(x, last)
        estimate = drift.estimate(x, last)
        if self.last_step == "tweedie":
            return estimate.x0
        return x + steps[last] * velocity(path, estimate, times[last])

    @abstractmethod
    def _step(self, drift: _Drift, x: Tensor, i: int, step: Tensor, new: Tensor) -> Tensor:
        """A step of time ``step`` from place ``i`` on, ``new`` being the noise drawn anew."""

    def _started(self, path: Path, times: Tensor) -> Tensor:
        """The grid, from where the rate is finite on."""
        if self.diffusion != "sbdm" or path.coefficients(times[0])[0] > 1e-6:
            return times
        margin = (path.t_noise - path.t_clean) * MARGIN
        start = times[0] - ((times[0] - times[1]) / 2).clamp_max(margin)
        return torch.cat([start[None], times[1:]])


@SCHEDULERS.register_module()
class EulerMaruyama(_Stochastic):
    """First order; one network call a step, where SiT makes two.

    The last interval of the grid is the last step's: SiT's is 0.04 long.

    Args:
        diffusion: How much noise to draw anew, by sigma and by the time ``t``, which is 0 at
            clean data: ``constant`` (``norm``); ``sbdm``, as much as the forward process adds;
            ``sigma``; ``linear`` (``t``); ``decreasing`` (``(1 - norm cos(pi t))^2 / 4``);
            ``increasing-decreasing`` (``sin(pi t)^2``). ``sbdm`` is infinite where alpha is 0: a
            path that starts there is entered a thousandth of its length further on.
        norm: Factor of it.
        last_step: ``mean``, a step without new noise; ``euler``, along the flow; ``tweedie``, the
            data as estimated; ``none``, a step like the others.
    """

    def _step(self, drift: _Drift, x: Tensor, i: int, step: Tensor, new: Tensor) -> Tensor:
        return x + step * drift(x, i) + new


@SCHEDULERS.register_module()
class StochasticHeun(_Stochastic):
    """The trapezoid rule from where the new noise leads.

    Two network calls a step and one in the last, where SiT makes twice as many; one also in a
    step to clean data, where the score is infinite.

    Args:
        diffusion: As in :class:`EulerMaruyama`.
        norm: Factor of it.
        last_step: As in :class:`EulerMaruyama`.
    """

    def _step(self, drift: _Drift, x: Tensor, i: int, step: Tensor, new: Tensor) -> Tensor:
        x = x + new
        first = drift(x, i)
        if not drift.is_finite(i + 1):
            return x + step * first
        return x + step / 2 * (first + drift(x + step * first, i + 1))

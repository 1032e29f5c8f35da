"""Integration of the probability flow in the path's own time, as SiT does it.

``dx/dt = alpha' x0 + sigma' noise``. The solvers of :mod:`mmsora.diffusion.solver` go along alpha
and sigma instead, and so land on the path whatever its time is: prefer them unless a published
sample is to be met, a higher order is wanted or the error is to choose the steps.
"""

from abc import abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mmsora.diffusion.level import Estimate, RandomNumbers
from mmsora.diffusion.path import Path
from mmsora.diffusion.solver import Denoise, Solver
from mmsora.registry import SCHEDULERS
from mmsora.utils.config_calls import suggestion

__all__ = ["DormandPrince", "Field", "FlowSolver", "RungeKutta", "State", "velocity"]

State = tuple[Tensor, ...]
Field = Callable[[Tensor, State], State]


def velocity(path: Path, estimate: Estimate, t: Tensor) -> Tensor:
    """``dx/dt`` of the flow at time ``t`` (), shaped like the estimate's data."""
    d_alpha, d_sigma = path.rates(t)
    return d_alpha * estimate.x0 + d_sigma * estimate.noise


def check_continuous(path: Path, what: object) -> None:
    """Refuse a table of levels.

    Args:
        path: The path.
        what: The part that cannot do with it.

    Raises:
        ValueError: Time is discrete.
    """
    if path.num_levels is not None:
        raise ValueError(
            f"{type(what).__name__} integrates in continuous time, and {type(path).__name__} has "
            f"{path.num_levels} levels; use Euler, UniPC or Ancestral, or another path"
        )


class FlowSolver(Solver):
    """An integrator of any ``dy/dt = field(t, y)``, of the probability flow among them."""

    def check(self, path: Path) -> None:
        check_continuous(path, self)

    @abstractmethod
    def integrate(self, field: Field, state: State, times: Tensor) -> State:
        """Go along the field.

        Args:
            field: The rates of the state at a time () and a state.
            state: Tensors of any shape.
            times: The grid, (steps + 1,), rising or falling, on the CPU.

        Returns:
            The state at the last time.
        """

    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        check_continuous(path, self)

        def field(t: Tensor, state: State) -> State:
            (x,) = state
            return (velocity(path, denoise(x, path.at(t, x)), t),)

        return self.integrate(field, (x,), times)[0]


class Tableau(NamedTuple):
    """A Runge-Kutta rule: where each stage looks, by what slopes it gets there, and their sum."""

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


TABLEAUS = {
    "euler": Tableau((0,), ((),), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun2": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk4": Tableau(  # Kutta's 3/8 rule
        (0, 1 / 3, 2 / 3, 1),
        ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}


@SCHEDULERS.register_module()
class RungeKutta(FlowSolver):
    """Fixed steps, those of torchdiffeq's methods of the same names, which SiT samples with.

    Args:
        method: ``euler`` (one network call a step), ``midpoint``, ``heun2`` (two) or ``rk4``, the
            3/8 rule (four). The last two look at the grid's very end, where velocities must be
            finite.
    """

    def __init__(self, method: str = "heun2") -> None:
        if method not in TABLEAUS:
            raise ValueError(f"unknown method {method!r}{suggestion(method.lower(), TABLEAUS)}")
        self.method = method

    def integrate(self, field: Field, state: State, times: Tensor) -> State:
        nodes, stages, weights = TABLEAUS[self.method]
        for t, t_to in pairwise(times):
            slopes: list[State] = []
            for node, row in zip(nodes, stages, strict=True):
                at = _moved(state, slopes, row, t_to - t)
                slopes.append(field(torch.lerp(t, t_to, node), at))
            state = _moved(state, slopes, weights, t_to - t)
        return state


def _moved(state: State, slopes: list[State], weights: tuple[float, ...], step: Tensor) -> State:
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            state = tuple(y + step * weight * rate for y, rate in zip(state, slope, strict=True))
    return state


@SCHEDULERS.register_module()
class DormandPrince(FlowSolver):
    """Steps of the fifth order, as long as the error allows: SiT's ``dopri5``, by torchdiffeq.

    Of the grid it takes the ends alone. The error is that of a whole batch, so a sample depends
    on its companions, by about the tolerance.

    Args:
        rtol: Error allowed in a step, relative to the state.
        atol: The same, absolute.
        overshoot: Let the last step go beyond the end and interpolate, as SiT does, whose numbers
            it takes to meet: less exact, and the path must go on beyond. Else the last step lands
            on the end.
    """

    def __init__(self, rtol: float = 1e-3, atol: float = 1e-6, overshoot: bool = False) -> None:
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            raise ValueError(
                "DormandPrince needs torchdiffeq, which is not installed: pip install torchdiffeq"
            ) from error
        for name, value in {"rtol": rtol, "atol": atol}.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.rtol, self.atol, self.overshoot, self._odeint = rtol, atol, overshoot, odeint

    def integrate(self, field: Field, state: State, times: Tensor) -> State:
        low, high = times.aminmax()
        ends = times[[0, -1]].to(state[0].device)

        def at(t: Tensor, state: State) -> State:
            t = t.double().cpu()  # it comes in the state's dtype, rounded perhaps beyond the end
            return field(t if self.overshoot else t.clamp(low, high), state)

        options = {} if self.overshoot else {"step_t": ends[1:]}
        found = self._odeint(
            at, state, ends, rtol=self.rtol, atol=self.atol, method="dopri5", options=options
        )
        return tuple(values[-1] for values in found)

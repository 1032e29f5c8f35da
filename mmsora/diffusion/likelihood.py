"""The log-likelihood of data by the probability flow (Song et al. 2021, arXiv:2011.13456, D.2).

Along ``dx/dt = v(x, t)`` a density changes by ``d log p / dt = -div v``. So data are carried to
noise, whose density is known, and the divergence is added up on the way.
"""

import math
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from mmsora.diffusion.level import RandomNumbers
from mmsora.diffusion.ode import FlowSolver, RungeKutta, State, velocity
from mmsora.diffusion.process import Condition, Diffusion, Network
from mmsora.utils.config_calls import suggestion

__all__ = ["Likelihood", "bits_per_dimension", "log_likelihood"]

Divergence = Callable[[Tensor, Tensor], Tensor]
TRACES = ("fresh", "fixed", "exact")


class Likelihood(NamedTuple):
    """What the flow says of a batch of data.

    Attributes:
        log_p: Logarithm of their density, in nats, (B,).
        noise: What sampling would make them of, (B, ...).
    """

    log_p: Tensor
    noise: Tensor


def bits_per_dimension(log_p: Tensor, x0: Tensor) -> Tensor:
    """Negative log-likelihoods (B,) of data (B, ...), in bits for each of their numbers, (B,)."""
    return -log_p / (x0[0].numel() * math.log(2))


@torch.no_grad()
def log_likelihood(
    diffusion: Diffusion,
    network: Network,
    x0: Tensor,
    cond: Condition,
    draws: RandomNumbers,
    solver: FlowSolver | None = None,
    trace: str = "fresh",
) -> Likelihood:
    """The density of clean data, where time is continuous.

    Goes up the process's grid, from its cleanest time at which the network can be asked. No
    guidance: guided flows have no density in closed form. Parameters get no gradients.

    Args:
        diffusion: The process: its path, prediction and grid.
        network: ``network(x, clock, **cond)``, differentiable.
        x0: Clean data, (B, C, T, H, W).
        cond: Keyword arguments of the network.
        draws: Where the probes come from.
        solver: How to integrate; None is Heun's rule.
        trace: The divergence by Hutchinson's estimate with signs, a ``fresh`` draw of them at
            each call of the network (the least error with fixed steps) or one ``fixed`` draw
            (what adaptive steps need), or ``exact``, at the cost of a gradient for each dimension.

    Returns:
        Log-likelihoods and noise.
    """
    process = diffusion.for_size(x0.shape[2:])
    path, solver = process.path, solver or RungeKutta("heun2")
    if path.num_levels is not None:
        raise ValueError(
            f"the likelihood by the flow needs continuous time, and {type(path).__name__} has "
            f"{path.num_levels} levels; take the variational bound (tools/likelihood.py --method "
            "bound)"
        )
    divergence = _divergence(trace, draws)
    times = process.grid(path).flip(0)
    if not path.clock(times[0]).isfinite():
        times = times[1:]

    def field(t: Tensor, state: State) -> State:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            level = path.at(t, x)
            output = process.output(network, x, level, cond).to(x)
            v = velocity(path, process.prediction.estimate(path, x, output, level), t)
            return v.detach(), divergence(v, x)

    x, change = solver.integrate(field, (x0, x0.new_zeros(len(x0))), times)
    noise = x / path.prior_std
    constant = x0[0].numel() * math.log(2 * math.pi * path.prior_std**2)
    log_prior = -(noise.square().flatten(1).sum(1) + constant) / 2
    return Likelihood(log_prior + change, noise)


def _divergence(trace: str, draws: RandomNumbers) -> Divergence:
    if trace not in TRACES:
        raise ValueError(f"unknown trace {trace!r}{suggestion(trace.lower(), TRACES)}")
    if trace == "exact":
        return _exact
    calls = count()

    def hutchinson(v: Tensor, x: Tensor) -> Tensor:
        name = f"likelihood/{next(calls)}" if trace == "fresh" else "likelihood"
        probe = draws.normal(name, x).sign()
        (gradient,) = torch.autograd.grad((v * probe).sum(), x)
        return (gradient * probe).flatten(1).sum(1)

    return hutchinson


def _exact(v: Tensor, x: Tensor) -> Tensor:
    total = x.new_zeros(len(x))
    for i, values in enumerate(v.flatten(1).unbind(1)):
        (gradient,) = torch.autograd.grad(values.sum(), x, retain_graph=True)
        total = total + gradient.flatten(1)[:, i]
    return total

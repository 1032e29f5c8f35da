"""The variational bound of data, over the process's own grid."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmsora.diffusion.level import RandomNumbers
from mmsora.diffusion.path import Path
from mmsora.diffusion.process import Condition, Diffusion, Network
from mmsora.diffusion.variational import bound_of_step, gaussian_kl

__all__ = ["Bound", "prior_bound", "variational_bound"]


class Bound(NamedTuple):
    """An upper bound of the negative log-likelihood, in bits for each dimension.

    Attributes:
        total: The bound, (B,): the prior's and all terms.
        prior: Divergence of the noisiest level from the noise that sampling starts with, (B,).
        terms: Of each step from noise to data, (B, steps).
        x0_mse: Mean squared error of the estimated data at each step, (B, steps).
        noise_mse: The same of the noise, (B, steps).
    """

    total: Tensor
    prior: Tensor
    terms: Tensor
    x0_mse: Tensor
    noise_mse: Tensor


def prior_bound(path: Path, x0: Tensor, t: Tensor) -> Tensor:
    """What it costs that the noisiest level is not quite noise.

    Args:
        path: The path.
        x0: The data, (B, ...).
        t: The noisiest time, ().

    Returns:
        Bits for each dimension, (B,).
    """
    alpha, sigma = path.coefficients(t.double())
    spread = torch.tensor(path.prior_std, dtype=torch.float64)
    zero = torch.zeros_like(alpha)
    kl = gaussian_kl(alpha * x0, 2 * sigma.log(), zero, 2 * spread.log())
    return kl.flatten(1).mean(1) / math.log(2)


@torch.no_grad()
def variational_bound(
    diffusion: Diffusion,
    network: Network,
    x0: Tensor,
    cond: Condition,
    draws: RandomNumbers,
    variance: str = "posterior",
) -> Bound:
    """Estimate the bound with one sample of noise at each step of the process's grid.

    Each step costs a network call (iDDPM, arXiv:2102.09672, section 2; its grid is
    ``SpacedGrid``). The data count as rounded to 256 levels in [-1, 1], as pixels are, and the
    grid's last level as clean. No guidance: it has no likelihood.

    Args:
        diffusion: The process: its path, prediction and grid.
        network: ``network(x, clock, **cond)``.
        x0: The data, (B, C, T, H, W).
        cond: Keyword arguments of the network.
        draws: Where the noise comes from.
        variance: Where the network does not learn it: ``posterior`` or ``forward``.

    Returns:
        The bound.
    """
    diffusion = diffusion.for_size(x0.shape[2:])
    path, prediction = diffusion.path, diffusion.prediction
    times = diffusion.grid(path)
    ascending = times.flip(0)
    rows = []
    for i, t in enumerate(times[:-1]):
        noise, level = draws.normal(f"bound/{i}", x0), path.at(t, x0)
        x = level.alpha * x0 + level.sigma * noise
        output = diffusion.output(network, x, level, cond).to(x)
        estimate = prediction.estimate(path, x, output, level)
        pairs = (estimate.x0, x0), (estimate.noise, noise)
        squares = [(a - b).square().flatten(1).mean(1) for a, b in pairs]
        term = bound_of_step(path, x0, x, estimate, t, ascending, variance)
        rows.append(torch.stack([term, *squares]))
    terms, x0_mse, noise_mse = torch.stack(rows, dim=-1)
    prior = prior_bound(path, x0, times[0])
    return Bound(prior + terms.sum(1), prior, terms, x0_mse, noise_mse)

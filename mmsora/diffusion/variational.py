"""The variational bound of one step (iDDPM)."""

import math

import torch
from torch import Tensor

from mmsora.diffusion.level import Estimate, Level, expand
from mmsora.diffusion.path import Path
from mmsora.diffusion.solver import forward_variance, posterior_variance

__all__ = ["bound_of_step", "discretized_nll", "gaussian_kl", "log_variance_range", "step_down"]

BIN = 1 / 255  # half the distance of two grey levels in [-1, 1]


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL divergence in nats, element by element, of two normal distributions.

    Args:
        mean1: Mean of the first.
        log_var1: Logarithm of its variance.
        mean2: Mean of the second.
        log_var2: Logarithm of its variance.

    Returns:
        Broadcast of the arguments.
    """
    ratio = (log_var1 - log_var2).exp()
    return 0.5 * (log_var2 - log_var1 + ratio - 1 + (mean1 - mean2) ** 2 * (-log_var2).exp())


def discretized_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Negative log-likelihood, in nats, of data rounded to 256 grey levels in [-1, 1].

    With iDDPM's approximation of the normal distribution function by a hyperbolic tangent.

    Args:
        x: Data.
        mean: Of the normal distribution.
        log_std: Logarithm of its standard deviation.

    Returns:
        Shaped like ``x``.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centred, inverse = x - mean, (-log_std).exp()
    above, below = cdf((centred + BIN) * inverse), cdf((centred - BIN) * inverse)
    inside = (above - below).clamp_min(1e-12).log()
    first, last = above.clamp_min(1e-12).log(), (1 - below).clamp_min(1e-12).log()
    return -torch.where(x < -0.999, first, torch.where(x > 0.999, last, inside))


def log_variance_range(
    path: Path, t: Tensor, like: Tensor, grid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logarithms of the posterior's and the forward variance of a step down.

    The posterior's is 0 on arrival at clean data; there that of the step above stands in, as in
    iDDPM.

    Args:
        path: The path.
        t: Times, () or (B,).
        like: A batch (B, ...).
        grid: The times that steps go between, ascending and from clean data on, (steps + 1,);
            None is the path's own table.

    Returns:
        The two, broadcastable against the batch.
    """
    grid = _table(path, grid)
    above = torch.maximum(t, grid[2])
    least = posterior_variance(_exact(path, above), _exact(path, _below(above, grid)))
    most = forward_variance(_exact(path, t), _exact(path, _below(t, grid)))
    return expand(least.log(), like), expand(most.log(), like)


def _table(path: Path, grid: Tensor | None) -> Tensor:
    if grid is not None and len(grid) > 2:
        return grid
    if grid is not None:
        raise ValueError("the variational bound needs a grid of at least 2 steps")
    if path.num_levels is None:
        raise ValueError(
            f"the variational bound needs a DiscretePath, or a grid on {type(path).__name__}"
        )
    return torch.arange(-1, path.num_levels, dtype=torch.float64)


def _below(t: Tensor, grid: Tensor) -> Tensor:
    return grid[torch.searchsorted(grid, t.double().contiguous()) - 1]


def _exact(path: Path, t: Tensor) -> Level:
    """Levels in float64, shaped like ``t``: variances are differences of nearly equal numbers."""
    return Level(t, *path.coefficients(t.double()))


def step_down(
    path: Path,
    x: Tensor,
    estimate: Estimate,
    t: Tensor,
    grid: Tensor | None = None,
    variance: str = "posterior",
) -> tuple[Tensor, Tensor]:
    """The model's distribution of the level below: mean and logarithm of the variance.

    Args:
        path: The path.
        x: The batch at the times, (B, ...).
        estimate: What the network says of it.
        t: The times, () or (B,).
        grid: As of :func:`log_variance_range`.
        variance: Where the network does not learn it: ``posterior`` or ``forward``.

    Returns:
        The two, broadcastable to the shape of ``x``.

    Raises:
        ValueError: The variance is unknown.
    """
    if variance not in ("posterior", "forward"):
        raise ValueError(f"variance must be 'posterior' or 'forward', got {variance!r}")
    grid = _table(path, grid)
    least, most = log_variance_range(path, t, x, grid)
    mean = _mean(path, x, estimate.x0, t, grid)
    if estimate.log_var_mix is not None:
        return mean, least + (most - least) * estimate.log_var_mix
    if variance == "posterior":
        return mean, least
    return mean, torch.where(expand(_is_last(t, grid), x).bool(), least, most)


def _is_last(t: Tensor, grid: Tensor) -> Tensor:
    return (t <= grid[1]).double()


def _mean(path: Path, x: Tensor, x0: Tensor, t: Tensor, grid: Tensor) -> Tensor:
    """The posterior's (DDPM, arXiv:2006.11239, equation 7): both parts of ``x0`` itself, so that
    of two means that differ little the difference keeps its digits."""
    now, to = _exact(path, t), _exact(path, _below(t, grid))
    of_x0 = to.alpha * forward_variance(now, to) / now.sigma**2
    of_x = now.alpha / to.alpha * (to.sigma / now.sigma) ** 2
    return expand(of_x0, x) * x0 + expand(of_x, x) * x


def bound_of_step(
    path: Path,
    x0: Tensor,
    x: Tensor,
    estimate: Estimate,
    t: Tensor,
    grid: Tensor | None = None,
    variance: str = "posterior",
) -> Tensor:
    """A step's term of the variational bound, in bits for each dimension.

    KL divergence of the true posterior and the model's; on arrival at clean data the likelihood
    of the data (arXiv:2102.09672, equations 4 to 7).

    Args:
        path: The path.
        x0: The data, (B, ...).
        x: The data at the times, shaped like ``x0``.
        estimate: What the network says of it.
        t: The times, () or (B,).
        grid: As of :func:`log_variance_range`.
        variance: As of :func:`step_down`.

    Returns:
        Shape (B,).
    """
    grid = _table(path, grid)
    mean, log_var = step_down(path, x, estimate, t, grid, variance)
    least, _ = log_variance_range(path, t, x, grid)
    kl = gaussian_kl(_mean(path, x, x0, t, grid), least, mean, log_var)
    nll = discretized_nll(x0, mean, 0.5 * log_var)
    last = expand(_is_last(t, grid), x).bool()
    return torch.where(last, nll, kl).flatten(1).mean(1) / math.log(2)

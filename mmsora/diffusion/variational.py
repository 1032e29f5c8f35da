"""The variational bound of one step, for networks that learn their variance (iDDPM)."""

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


def log_variance_range(path: Path, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the posterior's and the forward variance of a step down the table.

    The posterior's is 0 at level 0; there that of level 1 stands in, as in iDDPM.

    Args:
        path: A table of levels.
        t: Levels, (B,).
        like: A batch (B, ...).

    Returns:
        The two, broadcastable against the batch.
    """
    above = t.clamp_min(1)
    least = posterior_variance(_exact(path, above), _exact(path, above - 1))
    most = forward_variance(_exact(path, t), _exact(path, t - 1))
    return expand(least.log(), like), expand(most.log(), like)


def _exact(path: Path, t: Tensor) -> Level:
    """Levels in float64, (B,): variances are differences of nearly equal numbers."""
    return Level(t, *path.coefficients(t.double()))


def step_down(path: Path, x: Tensor, estimate: Estimate, t: Tensor) -> tuple[Tensor, Tensor]:
    """The network's distribution of the level below: mean and logarithm of the variance.

    Args:
        path: A table of levels.
        x: The batch at the levels, (B, ...).
        estimate: What the network says of it, variance included.
        t: The levels, (B,).

    Returns:
        The two, shaped like ``x``.

    Raises:
        ValueError: Time is continuous, or the network does not learn its variance.
    """
    if path.num_levels is None or estimate.log_var_mix is None:
        raise ValueError("the variational bound needs DiscretePath and LearnedRange")
    least, most = log_variance_range(path, t, x)
    log_var = torch.lerp(least.expand_as(x), most.expand_as(x), estimate.log_var_mix)
    return _mean(path, x, estimate.x0, t), log_var


def _mean(path: Path, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """The posterior's (DDPM, arXiv:2006.11239, equation 7): both parts of ``x0`` itself, so that
    of two means that differ little the difference keeps its digits."""
    now, to = _exact(path, t), _exact(path, t - 1)
    of_x0 = to.alpha * forward_variance(now, to) / now.sigma**2
    of_x = now.alpha / to.alpha * (to.sigma / now.sigma) ** 2
    return expand(of_x0, x) * x0 + expand(of_x, x) * x


def bound_of_step(path: Path, x0: Tensor, x: Tensor, estimate: Estimate, t: Tensor) -> Tensor:
    """A step's term of the variational bound, in bits for each dimension.

    KL divergence of the true posterior and the network's; at level 0 the likelihood of the data
    (arXiv:2102.09672, equations 4 to 7).

    Args:
        path: A table of levels.
        x0: The data, (B, ...).
        x: The data at the levels, shaped like ``x0``.
        estimate: What the network says of it, variance included.
        t: The levels, (B,).

    Returns:
        Shape (B,).
    """
    mean, log_var = step_down(path, x, estimate, t)
    least, _ = log_variance_range(path, t, x)
    kl = gaussian_kl(_mean(path, x, x0, t), least, mean, log_var)
    nll = discretized_nll(x0, mean, 0.5 * log_var)
    first = expand((t == 0).double(), x).bool()
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)

"""A point of a path, and the one place where batch vectors meet tensors."""

from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = ["Estimate", "Level", "RandomNumbers", "expand"]


class Level(NamedTuple):
    """A point of a path: ``x = alpha * x0 + sigma * noise``, broadcastable against the batch."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor


class Estimate(NamedTuple):
    """What a network believes the data and the noise to be, each shaped like ``x``.

    A network that learns its variance also says where the logarithm of a step's variance lies
    between the posterior's (0) and the forward process's (1). Guidance by a classifier, which has
    moved data and noise already, adds the gradient of the log-probability by which it did.
    """

    x0: Tensor
    noise: Tensor
    log_var_mix: Tensor | None = None
    gradient: Tensor | None = None


class RandomNumbers(Protocol):
    """Where all randomness comes from; :class:`mmsora.utils.draws.Draws` is one."""

    def uniform(self, name: str) -> Tensor:
        """One number in [0, 1) for each sample, (B,)."""

    def stratified(self, name: str) -> Tensor:
        """The same, spread evenly over the batch of all processes."""

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal numbers shaped like ``like``, (B, ...)."""


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Make a number for each sample broadcastable against a batch.

    A scalar stays on the CPU: it multiplies tensors of any device without a copy.

    Args:
        value: Shape () or (B,).
        like: Shape (B, ...).

    Returns:
        ``value`` itself when it is a scalar, else of shape (B, 1, ..., 1), with the device and
        dtype of ``like``.

    Raises:
        ValueError: ``value`` has neither one element nor one for each sample.
    """
    if value.ndim == 0:
        return value
    if value.shape != like.shape[:1]:
        raise ValueError(f"expected shape () or ({len(like)},), got {tuple(value.shape)}")
    return value.reshape(-1, *[1] * (like.ndim - 1)).to(like, non_blocking=True)

"""Guidance by the gradient of a function."""

from collections.abc import Callable

import torch
from torch import Tensor

from mmsora.diffusion.guidance import ClassifierFree, Guidance, Opinions
from mmsora.diffusion.level import Estimate, Level
from mmsora.diffusion.solver import Denoise
from mmsora.registry import SCHEDULERS

__all__ = ["ClassifierGuidance"]

LogProb = Callable[[Tensor, Level], Tensor]


@SCHEDULERS.register_module()
class ClassifierGuidance(Guidance):
    """Up a function of the noisy data (Dhariwal and Nichol 2021, arXiv:2105.05233).

    The gradient ``g`` of ``scale log p`` moves the estimate by ``noise - sigma g`` with the data
    that belong to it (algorithm 2, and what it means for any solver of the flow). ``Ancestral``
    adds ``variance g`` to the mean instead (algorithm 1). Pure noise says nothing of the data,
    and is not guided.

    Args:
        function: ``function(x, level)`` with ``x`` (B, ...): the log-probability of each
            sample, (B,), of which autograd takes the gradient in ``x``.
        scale: Of the gradient.
        guidance: What makes the estimate that is moved: a guidance or its config; None is the
            condition alone.
    """

    def __init__(
        self, function: LogProb, scale: float = 1.0, guidance: Guidance | dict | None = None
    ) -> None:
        self.function, self.scale = function, scale
        self.guidance: Guidance = (
            SCHEDULERS.build(guidance)
            if isinstance(guidance, dict)
            else guidance or ClassifierFree(1.0)
        )
        self.second = self.guidance.second

    def __call__(self, opinions: Opinions) -> Denoise:
        denoise = self.guidance(opinions)

        def guided(x: Tensor, level: Level) -> Estimate:
            estimate = denoise(x, level)
            if level.alpha.ndim == 0 and level.alpha == 0:
                return estimate
            gradient = self.scale * self._gradient(x, level)
            return estimate._replace(
                x0=estimate.x0 + level.sigma**2 / level.alpha * gradient,
                noise=estimate.noise - level.sigma * gradient,
                gradient=gradient,
            )

        return guided

    def _gradient(self, x: Tensor, level: Level) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            values = self.function(x, level)
            if values.shape != x.shape[:1]:
                raise ValueError(
                    f"function must return a log-probability for each sample, of shape "
                    f"({len(x)},), got {tuple(values.shape)}; sum over the other axes"
                )
            return torch.autograd.grad(values.sum(), x)[0]

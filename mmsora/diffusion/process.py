"""A diffusion process: the parts, the training loss and sampling."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.registry import Registry
from torch import Tensor

from mmsora.diffusion.guidance import Guidance
from mmsora.diffusion.level import Estimate, Level, RandomNumbers
from mmsora.diffusion.loss import Loss, Noised
from mmsora.diffusion.path import Path
from mmsora.diffusion.prediction import Prediction
from mmsora.diffusion.solver import Solver
from mmsora.diffusion.times import Grid, Times
from mmsora.registry import LOSSES, SCHEDULERS

__all__ = ["Condition", "Diffusion", "Network"]

Network = Callable[..., Tensor]
Condition = Mapping[str, Tensor]


def _build(registry: Registry, part: Any) -> Any:
    return registry.build(part) if isinstance(part, dict) else part


@SCHEDULERS.register_module()
class Diffusion:
    """Puts the parts together. Knows no network: any callable ``network(x, clock, **cond)``.

    Parts are objects or their configs.

    Args:
        path: From data to noise.
        prediction: What the network's output means.
        train_times: Where on the path to train.
        solver: How to sample.
        grid: Where the solver stops.
        guidance: How a condition is strengthened while sampling.
        loss: What a wrong output costs.
    """

    def __init__(
        self,
        path: Path | dict,
        prediction: Prediction | dict,
        train_times: Times | dict,
        solver: Solver | dict,
        grid: Grid | dict,
        guidance: Guidance | dict,
        loss: Loss | dict,
    ) -> None:
        with torch.device("cpu"):  # tables stay there, wherever networks are built
            self.path: Path = _build(SCHEDULERS, path)
            self.prediction: Prediction = _build(SCHEDULERS, prediction)
            self.train_times: Times = _build(SCHEDULERS, train_times)
            self.solver: Solver = _build(SCHEDULERS, solver)
            self.grid: Grid = _build(SCHEDULERS, grid)
            self.guidance: Guidance = _build(SCHEDULERS, guidance)
            self.loss_function: Loss = _build(LOSSES, loss)
            self.prediction.check(self.path)

    def noised(self, x0: Tensor, t: Tensor, draws: RandomNumbers) -> Noised:
        """Put clean data on the path.

        Args:
            x0: Clean data, (B, C, T, H, W).
            t: Times, (B,).
            draws: Where the noise comes from.

        Returns:
            The noised batch.
        """
        noise = draws.normal("noise", x0)
        level = self.path.at(t, x0)
        return Noised(x0, noise, level.alpha * x0 + level.sigma * noise, level)

    def output(self, network: Network, x: Tensor, level: Level, cond: Condition) -> Tensor:
        """Call the network as its prediction and path want it called.

        Args:
            network: ``network(x, clock, **cond)``.
            x: The noisy batch, (B, ...).
            level: Where on the path ``x`` is.
            cond: Keyword arguments of the network.

        Returns:
            What the network says.
        """
        clock = self.path.clock(level.t).float().expand(len(x))
        return network(
            self.prediction.scale_input(x, level), clock.to(x.device, non_blocking=True), **cond
        )

    def loss(self, network: Network, x0: Tensor, cond: Condition, draws: RandomNumbers) -> Tensor:
        """The training loss.

        Args:
            network: ``network(x, clock, **cond)``.
            x0: Clean data, (B, C, T, H, W).
            cond: Keyword arguments of the network, dropped where they are to be.
            draws: Where times and noise come from.

        Returns:
            The loss of each sample, (B,).
        """
        batch = self.noised(x0, self.train_times(self.path, draws), draws)
        output = self.output(network, batch.x, batch.level, cond)
        return self.loss_function(self.path, self.prediction, batch, output)

    @torch.no_grad()
    def sample(
        self,
        network: Network,
        noise: Tensor,
        cond: Condition,
        null: Condition | None,
        draws: RandomNumbers,
    ) -> Tensor:
        """Make data of noise.

        Args:
            network: ``network(x, clock, **cond)``.
            noise: Standard normal numbers, (B, C, T, H, W).
            cond: Keyword arguments of the network.
            null: The same with the condition taken away, for guidance; None where there is
                nothing to take away.
            draws: Where the solver's own noise comes from.

        Returns:
            Samples, shaped like ``noise``.
        """

        def estimator(condition: Condition) -> Callable[[Tensor, Level], Estimate]:
            def denoise(x: Tensor, level: Level) -> Estimate:
                output = self.output(network, x, level, condition)
                return self.prediction.estimate(self.path, x, output.to(x), level)

            return denoise

        denoise = estimator(cond)
        if null is not None:
            denoise = self.guidance(denoise, estimator(null))
        x = noise * self.path.prior_std
        return self.solver(denoise, x, self.path, self.grid(self.path), draws)

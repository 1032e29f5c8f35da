"""A diffusion process: the parts, the training loss and sampling."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmsora.diffusion.grid import Grid
from mmsora.diffusion.guidance import Guidance, Opinions
from mmsora.diffusion.level import Estimate, Level, RandomNumbers
from mmsora.diffusion.loss import Loss, Noised
from mmsora.diffusion.part import build_part
from mmsora.diffusion.path import Path
from mmsora.diffusion.prediction import Prediction
from mmsora.diffusion.solver import Denoise, Solver
from mmsora.diffusion.times import Times
from mmsora.diffusion.train_noise import TrainNoise
from mmsora.registry import LOSSES, SCHEDULERS

__all__ = ["Condition", "Diffusion", "Network", "TrainedTimes"]

Network = Callable[..., Tensor]
Condition = Mapping[str, Tensor]
Both = Callable[[Tensor, Level], tuple[Tensor, Tensor]]


class TrainedTimes(NamedTuple):
    """Where on the path a training batch was, and what it cost there.

    Attributes:
        path: The path.
        t: Times, (B,), on the CPU.
        losses: Of each sample, (B,), detached, before rare times were made to count more.
    """

    path: Path
    t: Tensor
    losses: Tensor


def _prefers_one_batch(device: torch.device) -> bool:
    """Whether two samples in one batch are faster than one after the other: not on a CPU."""
    return device.type not in ("cpu", "meta")


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
        train_noise: What data are mixed with in training; None is plain noise.

    Attributes:
        last_times: Of the last training batch, for what looks into losses; None before there
            was one.
    """

    last_times: TrainedTimes | None = None

    def __init__(
        self,
        path: Path | dict,
        prediction: Prediction | dict,
        train_times: Times | dict,
        solver: Solver | dict,
        grid: Grid | dict,
        guidance: Guidance | dict,
        loss: Loss | dict,
        train_noise: TrainNoise | dict | None = None,
    ) -> None:
        with torch.device("cpu"):  # tables stay there, wherever networks are built
            self.path: Path = build_part(SCHEDULERS, "path", path, Path)
            self.prediction: Prediction = build_part(
                SCHEDULERS, "prediction", prediction, Prediction
            )
            self.train_times: Times = build_part(SCHEDULERS, "train_times", train_times, Times)
            self.solver: Solver = build_part(SCHEDULERS, "solver", solver, Solver)
            self.grid: Grid = build_part(SCHEDULERS, "grid", grid, Grid)
            self.guidance: Guidance = build_part(SCHEDULERS, "guidance", guidance, Guidance)
            self.loss_function: Loss = build_part(LOSSES, "loss", loss, Loss)
            noise = train_noise or TrainNoise()
            self.train_noise: TrainNoise = build_part(SCHEDULERS, "train_noise", noise, TrainNoise)
            self.prediction.check(self.path)
            if isinstance(self.solver, Solver):
                self.solver.check(self.path)
            self.grid(self.path)  # refuses a path that it does not fit

    def for_size(self, size: Sequence[int]) -> "Diffusion":
        """The process for latents of this size, where its path goes by the resolution.

        Args:
            size: Frames, height and width of the latents.

        Returns:
            A process that shares all other parts with this one; itself where nothing changes.
        """
        path = self.path.for_size(size)
        if path is self.path:
            return self
        process = copy.copy(self)
        process.path = path
        return process

    def noised(self, x0: Tensor, t: Tensor, draws: RandomNumbers) -> Noised:
        """Put clean data on the path.

        Args:
            x0: Clean data, (B, C, T, H, W).
            t: Times, (B,).
            draws: Where the noise comes from.

        Returns:
            The noised batch.
        """
        noise, seen = self.train_noise(x0, draws)
        level = self.path.at(t, x0)
        return Noised(x0, noise, level.alpha * x0 + level.sigma * seen, level)

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
        clock = self.path.clock(level.t).float().expand(x.shape[0])
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
        process = self.for_size(x0.shape[2:])
        t = self.train_times(process.path, draws)
        losses = process._losses(self.loss_function, network, x0, cond, draws, t)
        if torch.is_grad_enabled():
            self.last_times = TrainedTimes(process.path, t, losses.detach())
        return self.train_times.weigh(t, losses)

    @torch.no_grad()
    def losses_at(
        self, network: Network, x0: Tensor, cond: Condition, draws: RandomNumbers, places: Tensor
    ) -> Tensor:
        """The training loss where one wants to know it, comparable from step to step.

        Nothing learns of it. A weighting that learns or remembers is left out, as the same error
        would cost something else at the next step.

        Args:
            network: ``network(x, clock, **cond)``.
            x0: Clean data, (B, C, T, H, W).
            cond: Keyword arguments of the network.
            draws: Where the noise comes from.
            places: Fractions of the way from data to noise, as ``Path.time_at`` takes them, (B,).

        Returns:
            The loss of each sample, (B,).
        """
        process = self.for_size(x0.shape[2:])
        t, loss_function = process.path.time_at(places), _settled(self.loss_function)
        return process._losses(loss_function, network, x0, cond, draws, t)

    def _losses(
        self,
        loss_function: Loss,
        network: Network,
        x0: Tensor,
        cond: Condition,
        draws: RandomNumbers,
        t: Tensor,
    ) -> Tensor:
        batch = self.noised(x0, t, draws)
        output = self.output(network, batch.x, batch.level, cond)
        return loss_function(self.path, self.prediction, batch, output)

    def denoiser(
        self,
        network: Network,
        cond: Condition,
        null: Condition | None = None,
        weak: Network | None = None,
    ) -> Denoise:
        """The guided estimator of data and noise that solvers go by.

        Args:
            network: ``network(x, clock, **cond)``.
            cond: Keyword arguments of the network.
            null: The same with the condition taken away, for guidance; None where there is
                nothing to take away.
            weak: A weaker network for guidance that asks for one.

        Returns:
            ``denoise(x, level)``.

        Raises:
            ValueError: Guidance needs a weaker network, and there is none.
        """

        if self.guidance.second == "weak":
            if weak is None:
                raise ValueError(
                    f"{type(self.guidance).__name__} needs a weaker network; give the model one "
                    "(weak=dict(...)) or use ClassifierFree"
                )
            both = self._two_calls(network, cond, weak, cond)
        elif null is not None:
            both = self._two_conditions(network, cond, null)
        else:
            both = None
        return self.guidance(Opinions(self._told(network, cond), both, self._read))

    def _told(self, network: Network, cond: Condition) -> Callable[[Tensor, Level], Tensor]:
        return lambda x, level: self.output(network, x, level, cond).to(x)

    def _two_calls(
        self, network: Network, cond: Condition, other: Network, other_cond: Condition
    ) -> Both:
        first, second = self._told(network, cond), self._told(other, other_cond)
        return lambda x, level: (first(x, level), second(x, level))

    def _two_conditions(self, network: Network, cond: Condition, null: Condition) -> Both:
        two_calls = self._two_calls(network, cond, network, null)

        def both(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
            if not _prefers_one_batch(x.device):
                return two_calls(x, level)
            joint = {key: torch.cat([value, null[key]]) for key, value in cond.items()}
            first, second = self._told(network, joint)(torch.cat([x, x]), level).chunk(2)
            return first, second

        return both

    def _read(self, x: Tensor, output: Tensor, level: Level) -> Estimate:
        return self.prediction.estimate(self.path, x, output, level)

    @torch.no_grad()
    def sample(
        self,
        network: Network,
        noise: Tensor,
        cond: Condition,
        null: Condition | None,
        draws: RandomNumbers,
        weak: Network | None = None,
    ) -> Tensor:
        """Make data of noise.

        Args:
            network: ``network(x, clock, **cond)``.
            noise: Standard normal numbers, (B, C, T, H, W).
            cond: Keyword arguments of the network.
            null: The same with the condition taken away, for guidance; None where there is
                nothing to take away.
            draws: Where the solver's own noise comes from.
            weak: A weaker network for guidance that asks for one.

        Returns:
            Samples, shaped like ``noise``.
        """
        process = self.for_size(noise.shape[2:])
        path = process.path
        denoise = process.denoiser(network, cond, null, weak)
        return self.solver(denoise, noise * path.prior_std, path, self.grid(path), draws)

    @torch.no_grad()
    def invert(
        self,
        network: Network,
        x0: Tensor,
        cond: Condition,
        null: Condition | None,
        draws: RandomNumbers,
    ) -> Tensor:
        """The noise of which sampling would make these data (DDIM, arXiv:2010.02502, section 4.3).

        The solver goes the grid in the other direction, from its last stop before clean data. A
        solver that adds noise cannot be inverted.

        Args:
            network: ``network(x, clock, **cond)``.
            x0: Clean data, (B, C, T, H, W).
            cond: Keyword arguments of the network.
            null: The same with the condition taken away, for guidance, or None.
            draws: For solvers that ask for it.

        Returns:
            Noise as :meth:`sample` takes it, shaped like ``x0``.
        """
        process = self.for_size(x0.shape[2:])
        path = process.path
        times = self.grid(path)
        upwards = (times[:-1] if times[-1] == path.t_clean else times).flip(0)
        denoise = process.denoiser(network, cond, null)
        return self.solver(denoise, x0, path, upwards, draws) / path.prior_std


def _settled(loss: Loss) -> Loss:
    """A loss without what of its weighting changes as training goes on."""
    given = weighting = getattr(loss, "weighting", None)
    while isinstance(weighting, nn.Module):
        weighting = getattr(weighting, "weighting", None)
    if weighting is not given:
        loss = copy.copy(loss)
        loss.weighting = weighting  # type: ignore[attr-defined]
    return loss

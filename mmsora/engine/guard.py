"""Updates that would spoil the weights are skipped, on all ranks together."""

import logging
import math
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.logging import MessageHub, print_log

from mmsora.models.latent_diffusion import TrainedBatch
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.user_error import UserError
from mmsora.utils.values import check_number, check_whole

__all__ = ["UpdateGuard", "Verdict"]

NAMED = 3  # samples in a message


class Verdict(Enum):
    """What becomes of an update: made, skipped, or skipped to lower the scale of fp16."""

    STEP = "step"
    SKIP = "skip"
    OVERFLOW = "overflow"


class _Suspect(NamedTuple):
    """A sample of an update that is skipped."""

    loss: float
    index: Any
    name: str
    rank: int

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss)

    def __str__(self) -> str:
        return f"sample {self.index}{self.name}"


class UpdateGuard:
    """Skips updates whose gradients are not finite and, where asked, those that spike.

    It goes by the global norm of the gradients, which all ranks know: they agree without talking.
    Only when an update is skipped do they gather its samples, to name those at fault.

    Args:
        spike_factor: Skip also updates whose norm is more than so many times its running
            (geometric) average; None makes every update that is finite, as published recipes do.
        average_over: Updates that this average is over; nothing is a spike before so many.
        max_skips: End the run when so many updates in a row were skipped.
    """

    def __init__(
        self, spike_factor: float | None = None, average_over: int = 100, max_skips: int = 20
    ) -> None:
        if spike_factor is not None:
            check_number("guard.spike_factor", spike_factor, above=1)
        check_whole("guard.average_over", average_over)
        check_whole("guard.max_skips", max_skips)
        self.spike_factor, self.average_over, self.max_skips = (
            spike_factor,
            average_over,
            max_skips,
        )
        self.skipped = 0  # of the whole run, without overflows of fp16
        self._in_a_row = 0
        self._seen, self._log_norm = 0, 0.0
        self._batches: list[TrainedBatch] = []

    def note(self, batch: TrainedBatch | None) -> None:
        """Remember a micro-batch until the verdict on its update."""
        if batch is not None:
            self._batches.append(batch)

    def verdict(self, norm: float, may_overflow: bool = False) -> Verdict:
        """Decide on an update, and log why it is skipped.

        Args:
            norm: Global norm of its gradients, the same on all ranks.
            may_overflow: Whether the gradients were scaled for fp16, so that they may overflow
                though nothing is wrong.

        Returns:
            What to do.

        Raises:
            UserError: Too many in a row were skipped.
        """
        batches, self._batches = self._batches, []
        average = math.exp(self._log_norm)
        is_spike = (
            self.spike_factor is not None
            and self._seen >= self.average_over
            and norm > self.spike_factor * average
        )
        if math.isfinite(norm) and not is_spike:
            self._in_a_row = 0
            self._count(norm)
            return Verdict.STEP
        suspects = _gathered(batches)
        overflows = may_overflow and not math.isfinite(norm) and all(s.is_finite for s in suspects)
        cause = "gradients overflow fp16" if overflows else _cause(norm, average, suspects)
        self._in_a_row += 1
        self.skipped += not overflows
        hub = MessageHub.get_current_instance()
        iteration = hub.get_info("iter", 0) + 1
        if self._in_a_row >= self.max_skips:
            has_saved = hub.get_info("last_ckpt") is not None
            again = "the last checkpoint is from before, go on from it" if has_saved else "begin"
            raise UserError(
                f"{self._in_a_row} updates in a row were skipped, the last at iteration "
                f"{iteration}: {cause}; {again} with a lower learning rate or without these "
                "samples"
            )
        if overflows:
            return Verdict.OVERFLOW
        print_log(f"iteration {iteration}: update skipped: {cause}", "current", logging.WARNING)
        return Verdict.SKIP

    def _count(self, norm: float) -> None:
        self._seen += 1
        weight = 1 / min(self._seen, self.average_over)
        self._log_norm += weight * (math.log(max(norm, 1e-30)) - self._log_norm)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to decide the same."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "seen": self._seen,
            "log_norm": self._log_norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._seen, self._log_norm = state["seen"], state["log_norm"]


def _gathered(batches: Sequence[TrainedBatch]) -> list[_Suspect]:
    """The samples with the worst losses of all ranks, those that are not finite first."""
    suspects = []
    for samples, losses in batches:
        values = torch.stack([loss.float() for loss in losses.values()]).sum(0).tolist()
        suspects += [
            _Suspect(value, sample.get("index", "?"), _name(sample), get_rank())
            for sample, value in zip(samples, values, strict=True)
        ]
    worst = sorted(suspects, key=_badness)[: NAMED + 1]
    alone: dict[Any, _Suspect] = {}  # ranks may share samples
    for suspect in (suspect for part in all_gather_object(worst) for suspect in part):
        alone.setdefault(suspect.index, suspect)
    return sorted(alone.values(), key=_badness)


def _badness(suspect: _Suspect) -> tuple[bool, float]:
    return suspect.is_finite, -suspect.loss if suspect.is_finite else 0.0


def _name(sample: VideoSample) -> str:
    if path := sample.get("path"):
        return f" ({path})"
    if (text := sample.get("text")) is not None:
        return f" ({text[:60]!r})"
    label = sample.get("label")
    return "" if label is None else f" (label {int(label)})"


def _cause(norm: float, average: float, suspects: Sequence[_Suspect]) -> str:
    bad = [suspect for suspect in suspects if not suspect.is_finite]
    many = get_world_size() > 1
    if bad:
        what = [
            f"loss of {suspect} is {suspect.loss}" + (f" on rank {suspect.rank}" if many else "")
            for suspect in bad[:NAMED]
        ]
        return "; ".join(what) + ("; and more" if len(bad) > NAMED else "")
    cause = "gradients are not finite"
    if math.isfinite(norm):
        cause = f"gradient norm {norm:.4g} is {norm / average:.3g} times its average"
    largest = ", ".join(f"{suspect.loss:.4g} of {suspect}" for suspect in suspects[:NAMED])
    return cause + (f"; the largest losses are {largest}" if largest else "")

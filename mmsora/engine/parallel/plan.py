"""What is spread over the processes, as the config says it."""

from collections.abc import Mapping
from typing import Any

from mmsora.utils.user_error import UserError
from mmsora.utils.values import check_switch, check_whole

__all__ = ["MODES", "Parallel"]

MODES = ("none", "ddp", "zero1", "zero2", "zero3")


class Parallel:
    """``parallel=dict(mode="zero2", sequence=2)`` in a config.

    Args:
        mode: ``none`` for one process; ``ddp``, where each has everything; ``zero1``, where each
            has its share of the optimizer's state; ``zero2``, of the gradients as well; ``zero3``,
            of the weights as well. By default ``ddp`` for several processes.
        sequence: So many neighbouring processes share the tokens of each sample.
        offload: Keep the shares of ``zero2`` and ``zero3`` in the memory of the host.
    """

    def __init__(self, mode: str | None = None, sequence: int = 1, offload: bool = False) -> None:
        if mode is not None and mode not in MODES:
            raise ValueError(f"parallel.mode must be one of {', '.join(MODES)}; got {mode!r}")
        check_whole("parallel.sequence", sequence)
        check_switch("parallel.offload", offload)
        if offload and mode not in ("zero2", "zero3"):
            raise ValueError(f"parallel.offload needs mode zero2 or zero3, got {mode!r}")
        self.mode, self.sequence, self.offload = mode, sequence, offload

    @classmethod
    def of(cls, value: Any) -> "Parallel":
        """What the key of a config says.

        Args:
            value: Arguments, or None.

        Returns:
            The plan.

        Raises:
            ValueError: It is something else, or an argument is wrong.
        """
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"parallel is a dict such as dict(mode='zero2'), got {value!r:.60}")
        return cls(**value or {})

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are DTensors."""
        return self.mode in ("zero2", "zero3")

    def for_world(self, world: int) -> "Parallel":
        """The plan with its mode decided.

        Args:
            world: Number of processes.

        Returns:
            A plan whose ``mode`` is not None.

        Raises:
            ValueError: The processes cannot be dealt out so.
        """
        if world % self.sequence:
            raise ValueError(
                f"parallel.sequence={self.sequence} does not divide the number of processes, "
                f"{world}; start {-(-world // self.sequence) * self.sequence}, or take a divisor"
            )
        if self.mode == "none" and world > 1:
            raise ValueError(
                f"parallel.mode='none' is for one process, there are {world}; take ddp, zero1, "
                "zero2 or zero3"
            )
        mode = self.mode or ("ddp" if world > 1 else "none")
        return Parallel(mode, self.sequence, self.offload)

    def for_start(self, world: int, is_launched: bool) -> "Parallel":
        """The plan of the processes that there are, decided as by ``for_world``.

        Args:
            world: Number of processes.
            is_launched: Whether a launcher started them.

        Returns:
            A plan whose ``mode`` is not None.

        Raises:
            UserError: It needs a launcher.
            ValueError: The processes cannot be dealt out so.
        """
        plan = self.for_world(world)
        if plan.mode != "none" and not is_launched:
            raise UserError(
                f"parallel.mode={plan.mode!r} is for processes that a launcher starts, one "
                "as well as many: bash tools/dist_train.sh CONFIG GPUS"
            )
        return plan

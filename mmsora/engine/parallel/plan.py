"""What is spread over the processes, as the config says it."""

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
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        if sequence < 1:
            raise ValueError(f"sequence must be at least 1, got {sequence}")
        if offload and mode not in ("zero2", "zero3"):
            raise ValueError(f"offload needs mode zero2 or zero3, got {mode!r}")
        self.mode, self.sequence, self.offload = mode, sequence, offload

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
                f"sequence={self.sequence} does not divide the number of processes, {world}; "
                f"start {-(-world // self.sequence) * self.sequence}, or take a divisor"
            )
        if self.mode == "none" and world > 1:
            raise ValueError(
                f"mode='none' is for one process, there are {world}; take ddp, zero1, zero2 or "
                "zero3"
            )
        mode = self.mode or ("ddp" if world > 1 else "none")
        return Parallel(mode, self.sequence, self.offload)

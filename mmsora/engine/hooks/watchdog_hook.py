"""A rank that dies or hangs does not leave the others waiting for ever."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import distributed

from mmsora.engine.watchdog import Watchdog, open_store
from mmsora.registry import HOOKS
from mmsora.utils.values import check_number

__all__ = ["WatchdogHook", "naming_lost_ranks"]

# What errors of a collective say when a process at the other end is gone.
LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")


@HOOKS.register_module()
class WatchdogHook(Hook):
    """Ends all ranks with code 1 when one dies or hangs, and says which, where it was and why.

    Each rank tells every two seconds where it is, in a thread, over the store that they met by.
    A single process has nobody to watch. The stacks of a rank that hangs go to its log.

    Args:
        dead_after: Seconds of silence after which a rank is dead: killed, or its machine is gone.
            torchrun kills what is left of a run 30 s after a death.
        hung_after: Seconds without progress after which a rank hangs; longer than its longest
            save and sampling take.
    """

    priority = "LOWEST"

    def __init__(self, dead_after: float = 20, hung_after: float = 1800) -> None:
        check_number("dead_after", dead_after)
        check_number("hung_after", hung_after, above=dead_after)
        self.dead_after, self.hung_after = dead_after, hung_after
        self.watchdog: Watchdog | None = None

    def before_run(self, runner: Runner) -> None:
        """Start watching, before anything is loaded."""
        if get_world_size() == 1:
            return
        store = open_store(self.dead_after)
        report = runner.logger.error
        self.watchdog = Watchdog(store, self.dead_after, self.hung_after, report)
        self.watchdog.start()

    def before_train(self, runner: Runner) -> None:
        """The first data are waited for."""
        self._enter(runner.iter + 1, "loading data")

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """The data are there."""
        self._enter(runner.iter + 1, "in the training step")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """A save begins."""
        self._enter(runner.iter + 1, "saving a checkpoint")

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Validation moves."""
        self._enter(runner.iter, f"validating batch {batch_idx + 1}")

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """A test moves."""
        self._enter(runner.iter, f"testing batch {batch_idx + 1}")

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """The next data are waited for."""
        self._enter(runner.iter + 2, "loading data")

    def after_run(self, runner: Runner) -> None:
        """Stop watching."""
        self.stop()

    def _enter(self, iteration: int, phase: str) -> None:
        if self.watchdog is not None:
            self.watchdog.iteration, self.watchdog.phase = iteration, phase

    def stop(self, end: str = "") -> None:
        """Stop watching and being watched; ``end`` tells the others what went wrong here."""
        if self.watchdog is not None:
            self.watchdog.stop(end)
            self.watchdog = None

    def failed(self, error: BaseException) -> None:
        """Say why, when another rank is the reason, and leave; else tell the others."""
        if self.watchdog is None:
            return
        if _is_of_lost_peer(error):
            self.watchdog.wait()
        is_end = isinstance(error, SystemExit)
        self.stop("" if is_end else f"{type(error).__name__}: {error}".split("\n")[0])


def _is_of_lost_peer(error: BaseException | None) -> bool:
    while error is not None:
        text = str(error).lower()
        is_of_torch = isinstance(error, distributed.DistError)
        if is_of_torch or (isinstance(error, RuntimeError) and any(w in text for w in LOST)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def naming_lost_ranks(runner: Runner) -> Iterator[None]:
    """Within the block an error of a collective ends the process, and names the rank that died.

    Other errors pass, after the other ranks were told.

    Args:
        runner: Whose hooks watch.

    Yields:
        Nothing.
    """
    try:
        yield
    except BaseException as error:
        for hook in runner.hooks:
            if isinstance(hook, WatchdogHook):
                hook.failed(error)
        raise

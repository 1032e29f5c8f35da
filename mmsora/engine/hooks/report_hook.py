"""The page of a run, kept up to date while it trains."""

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.visualization import LocalVisBackend

from mmsora.registry import HOOKS
from mmsora.utils.atomic import write_json
from mmsora.utils.environment import collect_env
from mmsora.visualization.curves import RunCurves
from mmsora.visualization.run_report import RUN_FILE, write_run_report

__all__ = ["ReportHook", "reporting_failure"]

PAUSE = 15.0  # seconds at least between two pages of a fast run


@HOOKS.register_module()
class ReportHook(Hook):
    """Keeps ``report.html`` in the run's directory: one file for any browser, with the curves, the
    latest samples, the config, the environment and the command.

    Args:
        interval: Iterations between new pages. The end of training, an interrupt and an error
            give one too.
    """

    priority = "LOWEST"

    def __init__(self, interval: int = 100) -> None:
        self.interval = interval
        self._run: dict[str, Any] = {}

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Note what the run was started with."""
        self._curves = RunCurves(runner.work_dir)
        self._run = {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "started": _now(),
            "environment": collect_env(),
            "max_iters": runner.max_iters,
        }
        backends = runner.visualizer._vis_backends.values()
        if not any(isinstance(backend, LocalVisBackend) for backend in backends):
            runner.logger.warning(
                "report.html will have no curves: add dict(type=LocalVisBackend) to "
                "visualizer.vis_backends"
            )
        self._write(runner, "training", runner.iter)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """A new page at the interval."""
        if self.every_n_train_iters(runner, self.interval):
            self._refresh(runner)

    @master_only
    def _refresh(self, runner: Runner) -> None:
        if time.monotonic() - self._written > PAUSE:
            self._write(runner, "training", runner.iter + 1)

    def after_train(self, runner: Runner) -> None:
        """The last page."""
        self._write(runner, "finished", runner.iter)

    def after_interrupt(self, runner: Runner) -> None:
        """The page of a run that was told to stop, and saved."""
        self._write(runner, "interrupted", runner.iter + 1)

    def failed(self, runner: Runner, error: Exception) -> None:
        """The page of a run that an error ended, if it had begun."""
        if self._run:
            self._run["error"] = " ".join(str(error).split()) or type(error).__name__
            self._write(runner, "failed", runner.iter)

    @master_only
    def _write(self, runner: Runner, status: str, iteration: int) -> None:
        eta = runner.message_hub.runtime_info.get("eta")
        now = {"status": status, "iteration": iteration, "eta": eta, "updated": _now()}
        self._written = time.monotonic()
        try:
            write_json(Path(runner.log_dir) / "vis_data" / RUN_FILE, self._run | now)
            write_run_report(runner.work_dir, self._curves)
        except OSError as error:  # no reason to stop training
            runner.logger.warning(f"report.html could not be written: {error}")


@contextmanager
def reporting_failure(runner: Runner) -> Iterator[None]:
    """Within the block an error goes to the page of the run, and passes.

    Args:
        runner: Whose hooks report.

    Yields:
        Nothing.
    """
    try:
        yield
    except Exception as error:
        for hook in runner.hooks:
            if isinstance(hook, ReportHook):
                hook.failed(runner, error)
        raise


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")

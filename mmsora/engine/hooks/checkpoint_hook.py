"""Checkpoints that a kill cannot spoil."""

import shutil
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmsora.registry import HOOKS
from mmsora.utils.atomic import write_text
from mmsora.utils.checkpoint_folder import CheckpointFolder
from mmsora.utils.user_error import UserError
from mmsora.utils.values import check_switch, check_whole

__all__ = ["SafeCheckpointHook"]


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's hook, but an old checkpoint goes only after the new one is whole.

    A checkpoint that is due amid the micro-batches of an update is written after the update, for
    gradients are not saved.

    Args:
        interval: Iterations between checkpoints.
        max_keep_ckpts: How many to keep; -1 keeps all.
        async_save: Copy the state to the memory of the CPU, and write it while training goes on.
        save_best: A metric of the validation, as ``loss``: keep also the weights that did best.
        rule: Whether ``less`` of it is better, or ``greater``; by default known by its name.
    """

    def __init__(
        self,
        interval: int = 1000,
        max_keep_ckpts: int = 3,
        async_save: bool = False,
        save_best: str | None = None,
        rule: str | None = None,
    ) -> None:
        check_whole("interval", interval)
        check_whole("max_keep_ckpts", max_keep_ckpts, least=-1)
        check_switch("async_save", async_save)
        super().__init__(
            interval=interval,
            by_epoch=False,
            max_keep_ckpts=max_keep_ckpts,
            save_last=True,
            save_best=save_best,
            rule=rule,
            filename_tmpl="iter_{}",
        )
        self.metric, self.async_save = save_best, async_save
        self.keep_ckpt_ids: deque[int] = deque()
        self._is_due = False
        self._best: tuple[float, Path] | None = None
        self._saving: tuple[Future[None], list[int]] | None = None

    def before_train(self, runner: Runner) -> None:
        """Note what a resumed run has kept so far, and clear away what a kill left."""
        level = runner.logger.level
        runner.logger.setLevel("ERROR")  # MMEngine warns of its own names for local files
        super().before_train(runner)
        runner.logger.setLevel(level)
        self.keep_ckpt_ids = deque(self.keep_ckpt_ids)  # MMEngine's is bounded, and forgets
        self._find_best(runner.iter)
        if is_main_process():
            for half in Path(self.out_dir).glob(".*iter_*.tmp"):  # left by a kill
                shutil.rmtree(half)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Save when it is due and no gradients are held."""
        if self._saving is not None and self._saving[0].done():
            self.wait(runner)
        is_last = self.is_last_train_iter(runner)
        self._is_due |= is_last or self.every_n_train_iters(runner, self.interval)
        if self._is_due and runner.optim_wrapper.should_update():
            runner.logger.info(f"Saving checkpoint at {runner.iter + 1} iterations")
            self.save_now(runner)

    def after_train(self, runner: Runner) -> None:
        """Nothing is left under way."""
        self.wait(runner)

    def save_now(self, runner: Runner) -> None:
        """Save the state after the iteration that just ended, unless that was done already."""
        self._is_due = False
        if not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != runner.iter + 1:
            self._save_checkpoint_with_step(runner, runner.iter + 1, meta={})

    def wait(self, runner: Runner) -> None:
        """Until the checkpoint under way is whole; then those that it replaces are removed.

        Args:
            runner: The runner.

        Raises:
            UserError: It could not be written.
        """
        if self._saving is None:
            return
        (future, old), self._saving = self._saving, None
        future.result()
        self._finish(runner, old)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        self.wait(runner)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = str(Path(self.out_dir) / name)
        if step not in self.keep_ckpt_ids:
            self.keep_ckpt_ids.append(step)
        old = self._too_many()
        runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        if self.async_save:
            self._saving = runner.save_checkpoint(self.out_dir, name, meta=meta, behind=True), old
        else:
            runner.save_checkpoint(self.out_dir, name, meta=meta)
            self._finish(runner, old)

    def _finish(self, runner: Runner, old: Sequence[int]) -> None:
        if is_main_process():
            write_text(Path(runner.work_dir) / "last_checkpoint", str(self.last_ckpt))
            for step in old:
                shutil.rmtree(Path(self.out_dir, self.filename_tmpl.format(step)), True)

    def _too_many(self) -> list[int]:
        if self.max_keep_ckpts <= 0:
            return []
        surplus = len(self.keep_ckpt_ids) - self.max_keep_ckpts
        return [self.keep_ckpt_ids.popleft() for _ in range(max(surplus, 0))]

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        """Keep ``best_METRIC_iter_N``, weights alone, where N did better than all before."""
        if self.metric is None:
            return
        if self.metric not in metrics:
            raise UserError(
                f"save_best={self.metric!r}: the validation gives {', '.join(metrics)}"
            )
        score = float(metrics[self.metric])
        if self._best is not None and not self.is_better_than[self.metric](score, self._best[0]):
            return
        self.wait(runner)
        path = Path(self.out_dir, f"{self._best_name}{runner.iter}")
        runner.save_checkpoint(
            self.out_dir,
            path.name,
            save_optimizer=False,
            save_param_scheduler=False,
            meta={"iter": runner.iter, "score": score},
        )
        if is_main_process() and self._best is not None and self._best[1] != path:
            shutil.rmtree(self._best[1], ignore_errors=True)
        self._best = score, path
        runner.logger.info(f"{self.metric} {score:.4f} is the best so far: saved to {path}")

    @property
    def _best_name(self) -> str:
        return f"best_{str(self.metric).replace('/', '_')}_iter_"

    def _find_best(self, iteration: int) -> None:
        """What did best until an iteration that a run goes on from."""
        numbered = {
            int(path.name.removeprefix(self._best_name)): path
            for path in Path(self.out_dir).glob(f"{self._best_name}*")
        }
        known = [number for number in numbered if number <= iteration]
        if known:
            path = numbered[max(known)]
            self._best = CheckpointFolder(path).rest["meta"]["score"], path

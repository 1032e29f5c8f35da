"""Checkpoints that a kill cannot spoil."""

from collections import deque
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmsora.registry import HOOKS
from mmsora.utils.atomic import write_text

__all__ = ["SafeCheckpointHook"]


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's hook, but an old checkpoint goes only after the new one is whole.

    Args:
        interval: Iterations between checkpoints.
        max_keep_ckpts: How many to keep; -1 keeps all.
    """

    def __init__(self, interval: int = 1000, max_keep_ckpts: int = 3) -> None:
        super().__init__(
            interval=interval, by_epoch=False, max_keep_ckpts=max_keep_ckpts, save_last=True
        )
        self.keep_ckpt_ids: deque[int] = deque()

    def before_train(self, runner: Runner) -> None:
        """Note what a resumed run has kept so far, and clear away what a kill left."""
        level = runner.logger.level
        runner.logger.setLevel("ERROR")  # MMEngine warns of its own names for local files
        super().before_train(runner)
        runner.logger.setLevel(level)
        self.keep_ckpt_ids = deque(self.keep_ckpt_ids)  # MMEngine's is bounded, and forgets
        if is_main_process():
            for half in Path(self.out_dir).glob(".iter_*.tmp.pth"):  # left by a kill
                half.unlink()

    def save_now(self, runner: Runner) -> None:
        """Save the state after the iteration that just ended, unless that was done already."""
        if not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != runner.iter + 1:
            self._save_checkpoint_with_step(runner, runner.iter + 1, meta={})

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        name = self.filename_tmpl.format(step)
        self.last_ckpt = str(Path(self.out_dir) / name)
        if step not in self.keep_ckpt_ids:
            self.keep_ckpt_ids.append(step)
        old = self._too_many()
        runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(self.out_dir, name, meta=meta, by_epoch=False)
        if is_main_process():
            write_text(Path(runner.work_dir) / "last_checkpoint", self.last_ckpt)
            for step_gone in old:
                Path(self.out_dir, self.filename_tmpl.format(step_gone)).unlink(missing_ok=True)

    def _too_many(self) -> list[int]:
        if self.max_keep_ckpts <= 0:
            return []
        surplus = len(self.keep_ckpt_ids) - self.max_keep_ckpts
        return [self.keep_ckpt_ids.popleft() for _ in range(max(surplus, 0))]

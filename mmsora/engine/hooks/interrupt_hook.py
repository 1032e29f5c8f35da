"""Ctrl-C and SIGTERM save and exit."""

import signal
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmsora.engine.hooks.checkpoint_hook import SafeCheckpointHook
from mmsora.registry import HOOKS

__all__ = ["InterruptHook"]


@HOOKS.register_module()
class InterruptHook(Hook):
    """Finishes the update, saves, and ends the process with code 128 + signal.

    All ranks stop at the same iteration, whichever of them was told. A second signal ends the
    process at once.
    """

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self._signal = 0
        self._previous: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Listen."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(number, self._previous[number])

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Save and exit when any rank was told to; amid an update gradients would be lost."""
        if not runner.optim_wrapper.should_update():
            return
        number = self._signal
        if get_world_size() > 1:
            told = torch.tensor(number)
            all_reduce(told, "max")
            number = int(told)
        if not number:
            return
        name = signal.Signals(number).name
        runner.logger.warning(f"{name}: saving after iteration {runner.iter + 1}")
        for hook in runner.hooks:
            if isinstance(hook, SafeCheckpointHook):
                hook.save_now(runner)
                hook.wait(runner)
                runner.logger.warning(f"saved {hook.last_ckpt}; go on with --resume")
        runner.call_hook("after_interrupt")
        self.stop_listening()
        raise SystemExit(128 + number)

    def after_train(self, runner: Runner) -> None:
        """Stop listening."""
        self.stop_listening()

    def stop_listening(self) -> None:
        """Put back what listened before. Our Runner sees to it when training ends by an error."""
        while self._previous:
            signal.signal(*self._previous.popitem())

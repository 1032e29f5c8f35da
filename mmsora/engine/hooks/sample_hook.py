"""Samples while training, to be looked at."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmsora.engine.hooks.ema_hook import DenoiserEMAHook, denoiser_of, model_of
from mmsora.engine.parallel.sharding import is_sharded
from mmsora.registry import HOOKS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.video_io import viewing_scale, write_image, write_video
from mmsora.visualization.backends import show_samples
from mmsora.visualization.contact_sheet import contact_sheet, video_grid

__all__ = ["SampleHook"]

TITLE = 40  # letters of a prompt above its clip


@HOOKS.register_module()
class SampleHook(Hook):
    """Samples the same clips of the averaged weights again and again.

    Writes ``samples/iter_N.png``, a row of frames for each clip, and ``samples/iter_N.mp4``,
    all clips side by side, into the run's directory. Trackers of ``visualizer.vis_backends`` get
    the video too, or the picture where they take no videos.

    Args:
        interval: Iterations between samples; the end of training is always sampled.
        labels: A clip for each of these classes; None for an unconditional model.
        num_samples: How many clips when there are neither labels nor prompts.
        seed: Of the noise; the same every time, so that pictures can be compared.
        fps: Of the video.
        prompts: A clip for each of these texts, for a model of texts.
    """

    priority = "LOWEST"  # after the checkpoint is safe

    def __init__(
        self,
        interval: int = 1000,
        labels: Sequence[int] | None = None,
        num_samples: int = 8,
        seed: int = 0,
        fps: float = 8,
        prompts: Sequence[str] | None = None,
    ) -> None:
        if labels and prompts:
            raise ValueError("SampleHook: a model is told labels or prompts, not both")
        self.interval, self.labels, self.seed, self.fps = interval, labels, seed, fps
        self.prompts = prompts
        self.num_samples = len(labels or prompts or ()) or num_samples

    def before_train(self, runner: Runner) -> None:
        """Refuse labels and prompts that the model does not know, and a VAE that cannot decode
        what the model learns, before any time is spent.

        Args:
            runner: The runner.

        Raises:
            ValueError: A label is out of range, or given to an unconditional model; or there are
                prompts and the model takes no text, or none and it does.
        """
        model = model_of(runner)
        classes = getattr(model.conditioner, "num_classes", 0)
        for label in self.labels or ():
            if not 0 <= label < classes:
                known = f"0 to {classes - 1}" if classes else "none, it is unconditional"
                raise ValueError(f"SampleHook: label {label}; the labels of the model: {known}")
        takes_text = getattr(model.conditioner, "takes_text", False)
        if self.prompts and not takes_text:
            raise ValueError("SampleHook: the model takes no text; remove prompts")
        if takes_text and not self.prompts:
            raise ValueError("SampleHook: the model is told texts; give prompts=[...]")
        if self.prompts:
            with torch.no_grad():
                model.conditioner([VideoSample(text=prompt) for prompt in self.prompts])
        if self._takes_part(runner):
            with model.vae_in_place():
                pass

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Sample at the interval and at the end."""
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            self.write(runner)

    @staticmethod
    def _takes_part(runner: Runner) -> bool:
        """Whether this process samples: where each holds a share of the weights, all do."""
        return is_main_process() or is_sharded(denoiser_of(runner))

    def write(self, runner: Runner) -> None:
        """Sample and write.

        Args:
            runner: The runner.
        """
        if not self._takes_part(runner):
            return
        clips = self._sample(runner)
        if not is_main_process():
            return
        scale = viewing_scale(*clips.shape[-2:])
        titles = [str(label) for label in self.labels] if self.labels else None
        if self.prompts:
            titles = [shorten(prompt, TITLE, placeholder="...") for prompt in self.prompts]
        path = Path(runner.work_dir) / "samples" / f"iter_{runner.iter + 1:06d}"
        sheet = contact_sheet(clips, titles, scale=scale)
        write_image(path.with_suffix(".png"), sheet)
        grid = video_grid(clips, titles, scale=scale)
        write_video(path.with_suffix(".mp4"), grid, fps=self.fps)
        show_samples(runner.visualizer, sheet, path.with_suffix(".mp4"), runner.iter + 1)
        runner.logger.info(f"samples written to {path}.png and .mp4")

    def _sample(self, runner: Runner) -> Tensor:
        model = model_of(runner)
        samples = [VideoSample(index=i) for i in range(self.num_samples)]
        for sample, label in zip(samples, self.labels or (), strict=False):
            sample.label = label
        for sample, prompt in zip(samples, self.prompts or (), strict=False):
            sample.text = prompt
        with ExitStack() as stack:
            for hook in runner.hooks:
                if isinstance(hook, DenoiserEMAHook):
                    stack.enter_context(hook.applied())
            if hasattr(runner.optim_wrapper, "autocast"):
                stack.enter_context(runner.optim_wrapper.autocast())
            model.eval()
            clips = model.predict(samples, seed=self.seed)
            model.train()
        return clips.cpu()

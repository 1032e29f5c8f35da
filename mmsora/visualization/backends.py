"""Samples for the trackers of experiments that MMEngine's visualizer knows."""

from pathlib import Path

import numpy as np
from mmengine.visualization import LocalVisBackend, Visualizer, WandbVisBackend

__all__ = ["show_samples"]


def show_samples(visualizer: Visualizer, sheet: np.ndarray, video: Path, step: int) -> None:
    """Give samples to every backend: the video to those that take one, else the picture.

    The local backend gets none, as both are files already.

    Args:
        visualizer: It has the backends.
        sheet: The picture, uint8 (H, W, 3).
        video: An ``.mp4`` file.
        step: The iteration.
    """
    for backend in visualizer._vis_backends.values():
        if hasattr(backend, "add_video"):
            backend.add_video("samples", video, step)
        elif isinstance(backend, WandbVisBackend):
            wandb = backend.experiment
            wandb.log({"samples": wandb.Video(str(video)), "iter": step})
        elif not isinstance(backend, LocalVisBackend):
            backend.add_image("samples", sheet, step)

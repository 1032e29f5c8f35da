"""SwanLab, as a backend of MMEngine's visualizer."""

import importlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.visualization.vis_backend import BaseVisBackend, force_init_env

from mmsora.registry import VISBACKENDS
from mmsora.utils.config_check import config_dict
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import probe_video, read_video, write_video

__all__ = ["SwanLabVisBackend"]


@VISBACKENDS.register_module()
class SwanLabVisBackend(BaseVisBackend):
    """Sends figures, samples and the config to SwanLab.

    Args:
        save_dir: Where SwanLab keeps what it has not sent.
        init_kwargs: Arguments of ``swanlab.init``, e.g. ``dict(project="mmsora")``; with
            ``mode="local"`` nothing is sent.
    """

    def __init__(self, save_dir: str, init_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(save_dir)
        self._init_kwargs = init_kwargs or {}

    def _init_env(self) -> None:
        try:
            swanlab = importlib.import_module("swanlab")
        except ImportError as error:
            raise UserError("SwanLabVisBackend needs swanlab: pip install swanlab") from error
        swanlab.init(**{"log_dir": str(Path(self._save_dir) / "swanlab"), **self._init_kwargs})
        self._swanlab = swanlab

    @property
    @force_init_env
    def experiment(self) -> Any:
        """The module ``swanlab``, where a run has begun."""
        return self._swanlab

    @force_init_env
    def add_config(self, config: Config, **kwargs: Any) -> None:
        """Send the config."""
        self._swanlab.config.update(config_dict(config))

    @force_init_env
    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: Any) -> None:
        """Send an image, (H, W, 3) in RGB."""
        self._swanlab.log({name: self._swanlab.Image(image)}, step=step)

    @force_init_env
    def add_video(self, name: str, path: Path, step: int = 0) -> None:
        """Send a video file, as a GIF: SwanLab takes no other."""
        with TemporaryDirectory() as folder:
            gif = Path(folder) / f"{path.stem}.gif"
            write_video(gif, read_video(path), probe_video(path).fps)
            self._swanlab.log({name: self._swanlab.Video(str(gif))}, step=step)

    @force_init_env
    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        """Send a figure."""
        self._swanlab.log({name: float(value)}, step=step)

    @force_init_env
    def add_scalars(
        self, scalar_dict: dict[str, Any], step: int = 0, file_path: str | None = None, **kw: Any
    ) -> None:
        """Send figures."""
        self._swanlab.log({key: float(v) for key, v in scalar_dict.items()}, step=step)

    def close(self) -> None:
        """End the run."""
        if hasattr(self, "_swanlab"):
            self._swanlab.finish()

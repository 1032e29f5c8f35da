"""Trackers of experiments: TensorBoard itself, wandb and SwanLab by stand-ins."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from mmsora.registry import RUNNERS, VISBACKENDS
from mmsora.utils.config_check import check_config
from mmsora.utils.video_io import read_video

LOCAL = {"type": "LocalVisBackend"}


def tracked(tiny_config, backend):
    """A run of two iterations, with samples at the second."""
    cfg = tiny_config({"train_cfg.max_iters": 2, "custom_hooks.1.labels": [3, 7]}, samples=True)
    cfg.visualizer = dict(type="mmengine.Visualizer", vis_backends=[LOCAL, backend])
    check_config(cfg)
    RUNNERS.build(cfg).train()
    return Path(cfg.work_dir)


class Tracker(ModuleType):
    """What wandb and SwanLab have in common."""

    def __init__(self, name):
        super().__init__(name)
        self.calls, self.said = [], {}
        self.config = SimpleNamespace(update=lambda values, **kwargs: self.said.update(values))
        self.run = SimpleNamespace(log_code=lambda name: None)

    def init(self, **kwargs):
        self.calls.append(("init", kwargs))

    def log(self, values, step=None, commit=None):
        self.calls.append((values, step))

    def finish(self):
        self.calls.append(("finish",))

    join = finish

    def Video(self, path):  # noqa: N802
        return Path(path).suffix, read_video(path)

    def Image(self, image):  # noqa: N802
        return image

    def logged(self, name):
        return [(call[0][name], *call[1:]) for call in self.calls if name in call[0]]


def test_tensorboard_gets_figures_and_pictures(tiny_config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    work_dir = tracked(tiny_config, {"type": "TensorboardVisBackend"})
    events = EventAccumulator(str(next(work_dir.glob("*/vis_data"))))
    events.Reload()
    assert {"loss", "samples/s", "grad_norm", "TFLOP/s"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    (picture,) = events.Images("samples")
    assert picture.step == 2
    sheet = work_dir / "samples/iter_000002.png"
    assert picture.encoded_image_string[:8] == sheet.read_bytes()[:8]
    assert not list(work_dir.glob("*/vis_data/vis_image"))


def test_wandb_gets_the_video(tiny_config, monkeypatch):
    wandb = Tracker("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracked(tiny_config, {"type": "WandbVisBackend", "init_kwargs": {"project": "videos"}})
    assert wandb.calls[0][1]["project"] == "videos"
    ((extension, frames), *_), *_ = wandb.logged("samples")
    assert (extension, len(frames)) == (".mp4", 2)
    assert len(wandb.logged("loss")) == 2


def test_swanlab_gets_figures_the_config_and_the_video(tiny_config, monkeypatch):
    swanlab = Tracker("swanlab")
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    backend = {"type": "SwanLabVisBackend", "init_kwargs": {"project": "videos"}}
    work_dir = tracked(tiny_config, backend)
    assert swanlab.calls[0][1]["project"] == "videos"
    assert swanlab.calls[0][1]["log_dir"].startswith(str(work_dir))
    assert swanlab.said["train_cfg"]["max_iters"] == 2
    assert [step for _, step in swanlab.logged("loss")] == [1, 2]
    (((extension, frames), step),) = swanlab.logged("samples")
    assert (extension, step) == (".gif", 2)
    mp4 = read_video(work_dir / "samples/iter_000002.mp4")
    assert np.abs(frames.astype(int) - mp4).mean() < 8
    assert swanlab.calls[-1] == ("finish",)


def test_swanlab_takes_single_figures_and_images(tmp_path, monkeypatch):
    swanlab = Tracker("swanlab")
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    backend = VISBACKENDS.build({"type": "SwanLabVisBackend", "save_dir": str(tmp_path)})
    backend.close()  # nothing has begun
    assert backend.experiment is swanlab
    backend.add_scalar("x", np.float32(2), step=3)
    image = np.zeros((2, 4, 3), np.uint8)
    backend.add_image("picture", image, step=4)
    assert swanlab.calls[1:] == [({"x": 2.0}, 3), ({"picture": image}, 4)]


@pytest.mark.parametrize("name", ["Tensorboard", "Wandb", "SwanLab"])
def test_a_missing_package_is_told_before_anything_is_trained(
    tiny_config, monkeypatch, capsys, tool, tmp_path, name
):
    module = "torch.utils.tensorboard" if name == "Tensorboard" else name.lower()
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    cfg = tiny_config()
    cfg.visualizer = dict(
        type="mmengine.Visualizer", vis_backends=[dict(type=f"{name}VisBackend")]
    )
    config = tmp_path / "config.py"
    cfg.dump(config)
    with pytest.raises(SystemExit, match="2"):
        tool("train").main([str(config), "--work-dir", str(tmp_path / "run")])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "pip install" in last
    assert name.lower() in last

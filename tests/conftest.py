"""Tests run on one thread and without a network."""

import importlib.util
import itertools
import json
import os
import zlib
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts its threads
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
TINY = {
    "model.denoiser.width": 16,
    "model.denoiser.depth": 2,
    "model.denoiser.heads": 2,
    "model.denoiser.size": (2, 8, 8),
    "model.diffusion.grid.num_steps": 3,
    "train_dataloader.batch_size": 4,
    "train_dataloader.dataset.num_frames": 2,
    "train_dataloader.dataset.frame_size": 8,
    "train_cfg.max_iters": 6,
    "optim_wrapper.optimizer.lr": 1e-2,  # so that a few steps show
    "param_scheduler.0.end": 2,
    "param_scheduler.1.begin": 2,
    "param_scheduler.1.end": 6,
    "default_hooks.telemetry.interval": 1,
    "default_hooks.logger.interval": 1,
    "log_processor.window_size": 1,
}
_names = (f"test_{number}" for number in itertools.count())


def tiny(work_dir, changes=None, samples=False):
    """The quickstart's config, so small that an iteration takes milliseconds.

    MMEngine's log, message hub and visualizer are global and go by ``experiment_name``, so each
    config has its own.
    """
    from mmsora.utils.config_check import apply_overrides
    from mmsora.utils.config_names import load_config

    cfg = load_config("latte_moving_digits")
    apply_overrides(cfg, TINY | (changes or {}))
    if not samples:
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if "labels" not in hook]
    cfg.work_dir, cfg.experiment_name = str(work_dir), next(_names)
    return cfg


@pytest.fixture(scope="session")
def tiny_options():
    """The changes that make the quickstart's config tiny, by dotted key."""
    return dict(TINY)


@pytest.fixture
def tiny_config(tmp_path):
    """Call it with changes by dotted key, and ``samples=True`` to keep the SampleHook."""

    def make(changes=None, work_dir=tmp_path / "run", samples=False):
        return tiny(work_dir, changes, samples)

    return make


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The directory of a run of six iterations, with iter_3 and iter_6."""
    from mmsora.registry import RUNNERS

    work_dir = tmp_path_factory.mktemp("tiny") / "run"
    cfg = tiny(work_dir, {"default_hooks.checkpoint.interval": 3})
    RUNNERS.build(cfg).train()
    return work_dir


@pytest.fixture(scope="session")
def tool():
    """Call it with a name to get ``tools/NAME.py`` as a module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / f"tools/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def scalars():
    """Call it with a run's directory to get what was logged: a dict for each iteration."""

    def read(work_dir):
        files = sorted(Path(work_dir).glob("*/vis_data/scalars.json"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    return read


@pytest.fixture(scope="session")
def fill_weights():
    """Call it with a model to give it weights that go by their names and are nowhere zero."""

    def fill(model):
        for name, weight in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1
            weight.data.normal_(0, scale, generator=generator)
        return model

    return fill


def _splitmix64(z):
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _filled(name, shape, scale=3**0.5):
    start = np.uint64(zlib.crc32(name.encode()) << 32)
    bits = _splitmix64(start + np.arange(np.prod(shape), dtype=np.uint64))
    unit = (bits >> np.uint64(11)) / 2**53 * 2 - 1
    return torch.from_numpy(unit * scale).float().reshape(shape)


@pytest.fixture(scope="session")
def filled():
    """Call it with a name and a shape for numbers in (-scale, scale): a function of the name."""
    return _filled


@pytest.fixture(scope="session")
def public_weights():
    """Call it with a case of ``public_keys.json`` for its state dict, filled by the keys' names.

    Positions are sines, as in a public checkpoint. ``rows`` are those of the label table.
    """
    from mmsora.models.layers.position import sincos_1d, sincos_2d

    shapes = json.loads((ROOT / "tests/data/public_keys.json").read_text())

    def make(case, rows=None):
        weights = {}
        for key, shape in shapes[case].items():
            if key == "y_embedder.embedding_table.weight" and rows:
                shape = [rows, shape[1]]
            if key == "pos_embed":
                side = round(shape[1] ** 0.5)
                weights[key] = sincos_2d(side, side, shape[2]).float()[None]
            elif key == "temp_embed":
                weights[key] = sincos_1d(torch.arange(shape[1]), shape[2]).float()[None]
            else:
                fan_in = np.prod(shape[1:])
                scale = (3 / fan_in) ** 0.5 if len(shape) > 1 else 0.1
                weights[key] = _filled(key, shape, scale)
        return weights

    return make

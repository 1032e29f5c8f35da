"""Samples while training: what is written, and that training does not notice."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from PIL import Image

from mmsora.engine import DenoiserEMAHook, SampleHook
from mmsora.registry import RUNNERS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.checkpoint import load_checkpoint
from mmsora.utils.video_io import probe_video, read_video
from mmsora.visualization.contact_sheet import contact_sheet

CHANGES = {"custom_hooks.1.interval": 4, "custom_hooks.1.labels": [3, 7]}


def global_randomness():
    numpy = np.random.get_state()
    return random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()


def test_it_writes_at_the_interval_and_at_the_end_and_training_goes_on_alike(
    tiny_config, tiny_run, tmp_path
):
    modes = []

    class Mode(Hook):
        def before_train_iter(self, runner, *args, **kwargs):
            modes.append(runner.model.training and runner.model.denoiser.training)

    runner = RUNNERS.build(tiny_config(CHANGES, samples=True))
    runner.register_hook(Mode(), priority="LOWEST")
    runner.train()
    written = sorted(path.name for path in (tmp_path / "run/samples").iterdir())
    names = ["iter_000004", "iter_000006"]
    assert written == [f"{name}.{kind}" for name in names for kind in ("mp4", "png")]
    sheet = tmp_path / "run/samples/iter_000006.mp4"
    assert len(read_video(sheet)) == 2
    assert probe_video(sheet).fps == 8
    assert modes == [True] * 6
    without, sampled = (
        load_checkpoint(folder / "iter_6") for folder in (tiny_run, tmp_path / "run")
    )
    for part in ("state_dict", "ema"):
        for key, value in without[part].items():
            assert torch.equal(sampled[part][key], value), key


def test_it_shows_the_average_and_touches_nothing(tiny_config, tmp_path):
    runner = RUNNERS.build(tiny_config())
    runner.train()
    average = next(hook for hook in runner.hooks if isinstance(hook, DenoiserEMAHook))
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}
    state = global_randomness()
    SampleHook(labels=[3, 7], seed=5).write(runner)
    assert global_randomness() == state
    assert runner.model.training
    assert runner.model.denoiser.training
    assert all(torch.equal(v, before[k]) for k, v in runner.model.state_dict().items())

    pictures = []
    for context in (average.applied(), nullcontext()):
        with context:
            samples = [VideoSample(index=0, label=3), VideoSample(index=1, label=7)]
            clips = runner.model.predict(samples, seed=5)
        pictures.append(contact_sheet(clips, ["3", "7"], scale=16))
    written = np.asarray(Image.open(tmp_path / "run/samples/iter_000007.png"))
    assert np.array_equal(written, pictures[0])
    assert not np.array_equal(written, pictures[1])


def test_an_unconditional_model_is_sampled_by_number(tiny_config, tmp_path):
    cfg = tiny_config(
        {
            "model.conditioner": None,
            "model.denoiser.num_classes": 0,
            "train_cfg.max_iters": 1,
            "custom_hooks.1.labels": None,
            "custom_hooks.1.num_samples": 3,
        },
        samples=True,
    )
    RUNNERS.build(cfg).train()
    sheet = Image.open(tmp_path / "run/samples/iter_000001.png")
    clips = np.zeros((3, 1, 2, 8, 8), np.uint8)
    assert sheet.size == contact_sheet(clips, scale=16).shape[1::-1]


def test_prompts_that_do_not_fit_the_model(tiny_config):
    with pytest.raises(ValueError, match="labels or prompts, not both"):
        SampleHook(labels=[1], prompts=["a fox"])
    assert SampleHook(prompts=["a fox", "a cat"]).num_samples == 2
    cfg = tiny_config()
    cfg.custom_hooks.append(dict(type="SampleHook", prompts=["a fox"]))
    with pytest.raises(ValueError, match="the model takes no text; remove prompts"):
        RUNNERS.build(cfg).train()

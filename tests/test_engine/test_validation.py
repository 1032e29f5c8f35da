"""Validation while training: the right numbers, by any number of processes, and no traces."""

import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from mmsora.datasets import EpochSampler, MovingDigits
from mmsora.engine import DenoiserEMAHook, loops
from mmsora.registry import DATASETS, RUNNERS
from mmsora.utils.config_check import check_config
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError
from tests.ranks import ROOT, start_ranks

SAMPLES, TIMES = 7, 4
WORKER = Path(__file__).with_name("validation_worker.py")


def with_validation(cfg, batch_size=3, dataset="MovingDigits", sampler="OrderedSampler", **loop):
    """Adds validation to a config."""
    cfg.val_dataloader = dict(
        batch_size=batch_size,
        num_workers=0,
        dataset=dict(type=dataset, split="test", length=SAMPLES, num_frames=2, frame_size=8),
        sampler=dict(type=sampler),
        collate_fn=dict(type="mmengine.dataset.pseudo_collate"),
    )
    cfg.val_cfg = dict(type="DenoisingValLoop", num_times=TIMES) | loop
    cfg.val_evaluator = dict(type="DenoisingLoss")
    return cfg


def without_files(cfg):
    cfg.default_hooks.checkpoint = None
    cfg.default_hooks.pop("report", None)
    return cfg


def reference(model):
    """The metrics, a sample and a place at a time."""
    dataset = MovingDigits("test", SAMPLES, num_frames=2, frame_size=8)
    model.eval()
    rows = []
    for index in range(SAMPLES):
        data = dataset[index]
        x0 = data["inputs"][None].float() / 127.5 - 1
        label = torch.tensor([data["data_samples"].label])
        for k in range(TIMES):
            t = torch.tensor([(k + 0.5) / TIMES])
            noise = Draws(0, [index * TIMES + k]).normal("noise", x0)
            with torch.no_grad():
                out = model.denoiser((1 - t) * x0 + t * noise, 1000 * t, label)
            rows.append((out - (noise - x0)).square().mean().double())
    curve = torch.stack(rows).view(SAMPLES, TIMES).mean(0)
    places = [f"{(k + 0.5) / TIMES:.4g}" for k in range(TIMES)]
    return {"loss": float(curve.mean())} | {
        f"loss/t_{place}": float(mean) for place, mean in zip(places, curve, strict=True)
    }


def metrics_in(work_dir):
    """What was logged of each validation."""
    files = sorted(Path(work_dir).glob("*/vis_data/scalars.json"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if "val/loss" in line]


def test_they_are_the_losses_of_the_weights_and_of_their_average(tiny_config):
    changes = {"train_cfg.val_interval": 4, "model.conditioner.drop_prob": 0.9}
    cfg = without_files(with_validation(tiny_config(changes)))
    check_config(cfg)
    runner = RUNNERS.build(cfg)
    runner.train()
    validated = metrics_in(cfg.work_dir)
    assert [line["step"] for line in validated] == [4, 6]  # at the interval and at the end
    expected = reference(runner.bare_model)
    ema = next(hook for hook in runner.hooks if isinstance(hook, DenoiserEMAHook))
    with ema.applied():
        of_average = reference(runner.bare_model)
    expected |= {name.replace("loss", "loss_ema"): value for name, value in of_average.items()}
    assert {key for key in validated[-1] if key.startswith("val/")} == {
        f"val/{name}" for name in expected
    }
    for name, value in expected.items():
        assert validated[-1][f"val/{name}"] == pytest.approx(value, rel=1e-5), name
    assert abs(expected["loss"] - expected["loss_ema"]) > 1e-3
    assert validated[0]["val/loss"] > validated[1]["val/loss"]


def test_the_size_of_a_batch_is_a_matter_of_memory(tiny_config):
    found = []
    for batch_size in (1, 3, 8):
        cfg = with_validation(tiny_config({"train_cfg.max_iters": 1}), batch_size)
        RUNNERS.build(without_files(cfg)).train()
        found.append(metrics_in(cfg.work_dir)[-1])
    names = [name for name in found[0] if name.startswith("val/")]
    for other in found[1:]:
        for name in names:
            assert other[name] == pytest.approx(found[0][name], rel=1e-6)


def test_another_seed_is_other_noise(tiny_config):
    found = []
    for seed in (0, 1):
        cfg = with_validation(tiny_config({"train_cfg.max_iters": 1}), seed=seed)
        RUNNERS.build(without_files(cfg)).train()
        found.append(metrics_in(cfg.work_dir)[-1]["val/loss"])
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=0.1)


# The run goes on as if nothing had been


class Dice(Hook):
    """Notes what every generator would give."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, *args, **kwargs):
        numbers = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
        self.seen.append((numbers, runner.model.training, kwargs["outputs"]["loss"].item()))


STATEFUL = {
    "model.diffusion.path": dict(type="DiscretePath", num_levels=20),
    "model.diffusion.prediction": dict(type="VPrediction"),
    "model.diffusion.train_times": dict(
        type="LossSecondMomentTimes", num_levels=20, history=1, uniform=0.5
    ),
    "model.diffusion.loss": dict(type="MSE", weighting=dict(type="Adaptive", buckets=5)),
    "model.diffusion.solver": dict(type="Ancestral"),
}


@pytest.mark.parametrize("changes", [{}, STATEFUL], ids=["flow", "stateful"])
def test_a_run_that_is_validated_is_the_run_that_is_not(tiny_config, tmp_path, changes):
    ends = []
    for validated in (True, False):
        cfg = tiny_config({"train_cfg.val_interval": 2} | changes, tmp_path / f"{validated}")
        cfg = with_validation(cfg) if validated else cfg
        runner, dice = RUNNERS.build(without_files(cfg)), Dice()
        runner.register_hook(dice)
        runner.train()
        assert len(metrics_in(cfg.work_dir)) == 3 * validated
        ema = next(hook for hook in runner.hooks if isinstance(hook, DenoiserEMAHook))
        moments = [
            value
            for state in runner.optim_wrapper.optimizer.state.values()
            for value in state.values()
        ]
        tensors = [*runner.bare_model.state_dict().values(), *ema._averages[0], *moments]
        ends.append((dice.seen, tensors))
    (seen, tensors), (others_seen, others) = ends
    assert seen == others_seen
    assert len(tensors) == len(others) > 30
    assert all(map(torch.equal, tensors, others))


# Several processes


def test_any_number_of_processes_finds_the_same(tmp_path):
    """Bit for bit; 7 samples on 2 processes, so that one comes twice."""
    plans = {"ddp": {"mode": "ddp"}, "zero2": {"mode": "zero2"}, "zero3": {"mode": "zero3"}}
    plans["sequence"] = {"mode": "ddp", "sequence": 2}
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    (tmp_path / "one").mkdir()
    command = [sys.executable, str(WORKER), str(tmp_path)]
    ranks = start_ranks(command, 2, tmp_path)
    alone = start_ranks(command, 1, tmp_path / "one")
    assert [process.wait(240) for process in (*ranks, *alone)] == [0] * 3, "".join(
        path.read_text()[-3000:] for path in tmp_path.glob("**/rank_*.txt")
    )
    expected = json.loads((tmp_path / "one.json").read_text())
    assert expected["val/loss"] != expected["val/loss_ema"]
    for name in plans:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found == (expected if name != "sequence" else pytest.approx(expected, rel=1e-6))


# Data


@DATASETS.register_module()
class CachedDigits(MovingDigits):
    """Moving digits as a cache of latents would give them."""

    latents_of = {}
    data_root = "cached_digits"

    def __getitem__(self, index):
        data = super().__getitem__(index)
        return data | {"inputs": data["inputs"][None].float() / 127.5 - 1}


def test_cached_latents_are_validated_too(tiny_config):
    found = []
    for dataset in ("MovingDigits", "CachedDigits"):
        cfg = tiny_config(
            {"train_cfg.max_iters": 1, "train_dataloader.dataset.type": f"mmsora.{dataset}"}
        )
        RUNNERS.build(without_files(with_validation(cfg, dataset=dataset))).train()
        found.append({k: v for k, v in metrics_in(cfg.work_dir)[-1].items() if "val/" in k})
    assert found[0] == found[1]


def test_cached_latents_are_for_both_or_neither(tiny_config):
    cfg = with_validation(tiny_config(), dataset="CachedDigits")
    with pytest.raises(UserError, match="val_dataloader and train_dataloader .* both, or neither"):
        RUNNERS.build(without_files(cfg)).train()


def test_the_config_in_the_docs_is_one(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    pages = (ROOT / "docs/en/configs.md").read_text().split("```")
    (block,) = (page for page in pages if "DenoisingValLoop\n" in page and "read_base" in page)
    path = tmp_path / "configs/own_data/held_out.py"
    path.write_text(block.removeprefix("python\n"))
    cfg = Config.fromfile(path)
    check_config(cfg)
    assert cfg.train_dataloader.sampler.type is EpochSampler
    assert cfg.train_dataloader.dataset.data_root != cfg.val_dataloader.dataset.data_root
    assert cfg.val_dataloader.dataset.pipeline == cfg.train_dataloader.dataset.pipeline


# Mistakes


def test_there_is_at_least_one_time(tiny_config):
    with pytest.raises(ValueError, match="val_cfg.num_times must be at least 1, got 0"):
        RUNNERS.build(without_files(with_validation(tiny_config(), num_times=0))).train()


def test_processes_that_share_a_sample_need_a_sampler_that_knows(tiny_config, monkeypatch):
    monkeypatch.setattr(loops, "sequence_group", lambda: "a group")
    cfg = with_validation(tiny_config(), sampler="mmengine.DefaultSampler")
    with pytest.raises(UserError, match="different ones; take OrderedSampler"):
        RUNNERS.build(without_files(cfg)).train()


def test_without_training_there_is_no_average(tiny_config):
    """``runner.val()`` validates the weights that were loaded."""
    runner = RUNNERS.build(without_files(with_validation(tiny_config())))
    metrics = runner.val()
    expected = reference(runner.bare_model)
    assert metrics == pytest.approx({f"val/{k}": v for k, v in expected.items()}, rel=1e-5)

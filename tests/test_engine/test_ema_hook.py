"""The average of the weights: its values, and what it leaves alone."""

import pytest
import torch
from mmengine.hooks import Hook

from mmsora.engine import DenoiserEMAHook
from mmsora.registry import RUNNERS
from mmsora.utils.checkpoint import load_checkpoint


class Record(Hook):
    """The weights after each iteration, before anything else sees them."""

    priority = "HIGHEST"

    def before_train(self, runner):
        self.weights = [self.copy(runner)]

    def after_train_iter(self, runner, *args, **kwargs):
        self.weights.append(self.copy(runner))

    def copy(self, runner):
        return {k: v.detach().double() for k, v in runner.model.denoiser.named_parameters()}


def ema_hook(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, DenoiserEMAHook))


def by_hand(weights, decay):
    """The recurrence in float64, and the number of steps."""
    average = weights[0]
    for n, new in enumerate(weights[1:]):
        rate = min(decay, (1 + n) / (10 + n))
        average = {key: rate * average[key] + (1 - rate) * new[key] for key in new}
    return average, len(weights) - 1


@pytest.mark.parametrize(
    ("accumulate", "iters", "stepped"),
    [(1, 6, [1, 2, 3, 4, 5, 6]), (2, 5, [2, 4, 5])],
    ids=["every iteration", "every second, and the last"],
)
def test_it_is_the_recurrence_over_optimizer_steps(tiny_config, accumulate, iters, stepped):
    cfg = tiny_config({"train_cfg.max_iters": iters, "custom_hooks.0.decay": 0.25})
    cfg.optim_wrapper.accumulative_counts = accumulate
    runner = RUNNERS.build(cfg)
    record = Record()
    runner.register_hook(record)
    runner.train()
    changed = [
        i
        for i in range(1, iters + 1)
        if any((record.weights[i][k] != record.weights[i - 1][k]).any() for k in record.weights[i])
    ]
    assert changed == stepped
    expected, steps = by_hand([record.weights[i] for i in (0, *stepped)], decay=0.25)
    content = load_checkpoint(f"{cfg.work_dir}/iter_{iters}.pth")
    assert content["ema_steps"] == ema_hook(runner).steps == steps
    for key, value in expected.items():
        assert content["ema"][key].dtype == torch.float32
        torch.testing.assert_close(content["ema"][key].double(), value, rtol=1e-6, atol=1e-7)
    final = record.weights[-1]
    assert max((expected[key] - final[key]).abs().max() for key in final) > 1e-4


def test_it_holds_every_key_of_the_denoiser_and_buffers_as_they_are(tiny_run):
    content = load_checkpoint(tiny_run / "iter_6.pth")
    own = {k.removeprefix("denoiser."): v for k, v in content["state_dict"].items()}
    assert content["ema"].keys() == own.keys()
    assert torch.equal(content["ema"]["pos_embed"], own["pos_embed"])
    assert not torch.equal(content["ema"]["head.weight"], own["head.weight"])


def test_frozen_weights_stay_out(tiny_config):
    runner = RUNNERS.build(tiny_config({"train_cfg.max_iters": 2}))
    runner.model.denoiser.embed.requires_grad_(False)
    runner.train()
    names = set(ema_hook(runner)._names)
    assert "embed.proj.weight" not in names
    assert "head.weight" in names
    content = load_checkpoint(f"{runner.work_dir}/iter_2.pth")
    assert torch.equal(
        content["ema"]["embed.proj.weight"], runner.model.denoiser.embed.proj.weight
    )


def test_applied_lends_the_average_and_gives_the_weights_back(tiny_config):
    runner = RUNNERS.build(tiny_config())
    runner.train()
    denoiser, hook = runner.model.denoiser, ema_hook(runner)
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    average = load_checkpoint(f"{runner.work_dir}/iter_6.pth")["ema"]
    with hook.applied():
        inside = {key: value.clone() for key, value in denoiser.state_dict().items()}
    assert all(torch.equal(inside[key], average[key]) for key in average)
    assert not torch.equal(inside["head.weight"], before["head.weight"])

    def failing():
        with hook.applied():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert all(torch.equal(value, before[key]) for key, value in denoiser.state_dict().items())
    assert all(weight.requires_grad for weight in denoiser.parameters())


def test_a_resumed_average_goes_on_and_a_loaded_run_starts_its_own(tiny_config, tiny_run):
    then = load_checkpoint(tiny_run / "iter_3.pth")
    for resume in (True, False):
        cfg = tiny_config({"train_cfg.max_iters": 4 if resume else 1})
        cfg.resume, cfg.load_from = resume, str(tiny_run / "iter_3.pth")
        runner = RUNNERS.build(cfg)
        runner.train()
        steps = 3 if resume else 0
        start = {k: v.double() for k, v in then["ema"].items()}
        assert ema_hook(runner).steps == steps + 1
        rate = (1 + steps) / (10 + steps)
        for key, weight in runner.model.denoiser.named_parameters():
            average = ema_hook(runner)._average[ema_hook(runner)._names.index(key)]
            expected = rate * start[key] + (1 - rate) * weight.detach().double()
            torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be in"):
        DenoiserEMAHook(decay)

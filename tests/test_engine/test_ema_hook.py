"""The averages of the weights: their values, what they leave alone, and their snapshots."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from mmsora.engine import ConstantEMA, DenoiserEMAHook, PowerEMA, WarmupEMA
from mmsora.engine.ema_snapshots import posthoc_ema, snapshots_of
from mmsora.registry import RUNNERS
from mmsora.utils.checkpoint import load_checkpoint
from mmsora.utils.config_check import check_config
from mmsora.utils.user_error import UserError

SEVERAL = {
    "custom_hooks.0.profiles": [
        dict(type="PowerEMA", sigma_rel=0.05),
        dict(type="PowerEMA", gamma=2.5),
        dict(type="ConstantEMA", decay=0.5),
    ],
    "custom_hooks.0.snapshot_interval": 1,
    "default_hooks.checkpoint.interval": 3,
}
NAMES = ["sigma_rel=0.05", "sigma_rel=0.1773", "decay=0.5"]


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
    [(1, 6, [1, 2, 3, 4, 5, 6]), (2, 5, [2, 4, 5]), (3, 6, [3, 6])],
    ids=["every iteration", "every second, and the last", "every third"],
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
    content = load_checkpoint(f"{cfg.work_dir}/iter_{iters}")
    assert content["ema_steps"] == ema_hook(runner).steps == steps
    for key, value in expected.items():
        assert content["ema"][key].dtype == torch.float32
        torch.testing.assert_close(content["ema"][key].double(), value, rtol=1e-6, atol=1e-7)
    final = record.weights[-1]
    assert max((expected[key] - final[key]).abs().max() for key in final) > 1e-4


def test_it_holds_every_key_of_the_denoiser_and_buffers_as_they_are(tiny_run):
    content = load_checkpoint(tiny_run / "iter_6")
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
    content = load_checkpoint(f"{runner.work_dir}/iter_2")
    assert torch.equal(
        content["ema"]["embed.proj.weight"], runner.model.denoiser.embed.proj.weight
    )


def test_applied_lends_the_average_and_gives_the_weights_back(tiny_config):
    runner = RUNNERS.build(tiny_config())
    runner.train()
    denoiser, hook = runner.model.denoiser, ema_hook(runner)
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    average = load_checkpoint(f"{runner.work_dir}/iter_6")["ema"]
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
    then = load_checkpoint(tiny_run / "iter_3")
    for resume in (True, False):
        cfg = tiny_config({"train_cfg.max_iters": 4 if resume else 1})
        cfg.resume, cfg.load_from = resume, str(tiny_run / "iter_3")
        runner = RUNNERS.build(cfg)
        runner.train()
        steps = 3 if resume else 0
        start = {k: v.double() for k, v in then["ema"].items()}
        assert ema_hook(runner).steps == steps + 1
        rate = (1 + steps) / (10 + steps)
        for key, weight in runner.model.denoiser.named_parameters():
            average = ema_hook(runner)._averages[0][ema_hook(runner)._names.index(key)]
            expected = rate * start[key] + (1 - rate) * weight.detach().double()
            torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)


# Several at once


def trained(cfg, *hooks):
    runner = RUNNERS.build(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return runner


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def power_average(weights, gamma):
    """By the closed form: step k of n has the share (k^(g+1) - (k-1)^(g+1)) / n^(g+1)."""
    n = len(weights) - 1
    shares = [
        (k ** (gamma + 1) - (k - 1) ** (gamma + 1)) / n ** (gamma + 1) for k in range(1, n + 1)
    ]
    return {
        key: sum(share * new[key] for share, new in zip(shares, weights[1:], strict=True))
        for key in weights[0]
    }


@pytest.mark.parametrize(
    ("accumulate", "iters", "stepped"), [(1, 4, [1, 2, 3, 4]), (3, 8, [3, 6, 8])]
)
def test_several_averages_follow_optimizer_steps(tiny_config, accumulate, iters, stepped):
    cfg = tiny_config(SEVERAL | {"train_cfg.max_iters": iters})
    cfg.optim_wrapper.accumulative_counts = accumulate
    record = Record()
    trained(cfg, record)
    weights = [record.weights[i] for i in (0, *stepped)]
    content = load_checkpoint(f"{cfg.work_dir}/iter_{iters}")
    assert content["ema_steps"] == len(stepped)
    assert list(content["ema_profiles"]) == NAMES
    gammas = PowerEMA(0.05).gamma, 2.5
    for name, gamma in zip(NAMES[:2], gammas, strict=True):
        for key, value in power_average(weights, gamma).items():
            found = content["ema_profiles"][name][key]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-7)
    key, last = "head.weight", content["ema_profiles"]["decay=0.5"]
    expected = weights[0][key]
    for new in weights[1:]:
        expected = (expected + new[key]) / 2
    torch.testing.assert_close(last[key].double(), expected, rtol=1e-6, atol=1e-7)
    kinds = [content["ema"][key], *(state[key] for state in content["ema_profiles"].values())]
    assert len({tuple(kind.flatten().tolist()) for kind in kinds}) == 4
    assert [s.steps for s in snapshots_of(cfg.work_dir)] == list(range(1, len(stepped) + 1))


def test_one_average_is_saved_as_before(tiny_run):
    content = load_checkpoint(tiny_run / "iter_6")
    assert {key for key in content if key.startswith("ema")} == {"ema", "ema_steps"}
    assert not (tiny_run / "ema_snapshots").exists()


def test_all_averages_and_snapshots_are_resumed_bit_for_bit(tiny_config):
    cfg = tiny_config(SEVERAL)
    trained(cfg)
    straight = load_checkpoint(f"{cfg.work_dir}/iter_6")
    folder = Path(cfg.work_dir) / "ema_snapshots"
    names = [f"step_0000000{step}.safetensors" for step in range(1, 7)]
    assert sorted(path.name for path in folder.iterdir()) == names
    kept = folder.parent / "kept"
    shutil.copytree(folder, kept)
    half = folder / ".step_00000004.17.tmp.safetensors"
    half.write_bytes(b"a kill left this")

    cfg = tiny_config(SEVERAL)
    cfg.resume, cfg.load_from = True, f"{cfg.work_dir}/iter_3"
    trained(cfg)
    resumed = load_checkpoint(f"{cfg.work_dir}/iter_6")
    assert same(resumed["ema"], straight["ema"])
    assert list(resumed["ema_profiles"]) == NAMES
    for name in NAMES:
        assert same(resumed["ema_profiles"][name], straight["ema_profiles"][name]), name
    assert not half.exists()
    assert sorted(path.name for path in folder.glob("*.*")) == names
    assert sorted(path.name for path in (folder / "old").iterdir()) == names[3:]
    for name in names:
        assert same(load_checkpoint(folder / name), load_checkpoint(kept / name)), name


def test_a_new_run_in_the_same_place_makes_a_series_of_its_own(tiny_config):
    trained(tiny_config(SEVERAL | {"train_cfg.max_iters": 3}))
    runner = trained(tiny_config(SEVERAL | {"train_cfg.max_iters": 2}))
    assert [snapshot.steps for snapshot in snapshots_of(runner.work_dir)] == [1, 2]
    old = Path(runner.work_dir) / "ema_snapshots/old"
    assert len(list(old.iterdir())) == 3
    log = "".join(path.read_text() for path in Path(runner.work_dir).glob("*/*.log"))
    assert "3 EMA snapshots past step 0 are of an earlier attempt; moved to" in log
    names = "; ".join(["decay=0.999 after a warm-up", *NAMES])
    assert f"averages of the weights: {names}\n" in log


def test_what_is_no_profile_is_refused():
    """As ``--cfg-options`` makes it of a list of dicts."""
    with pytest.raises(ValueError, match=r"profiles: 'dict\(sigma_rel=0.1\)' is neither a prof"):
        DenoiserEMAHook(profiles=["dict(sigma_rel=0.1)"])


def test_an_average_cannot_begin_in_the_middle_but_may_end_there(tiny_config, tiny_run):
    cfg = tiny_config(SEVERAL)
    cfg.resume, cfg.load_from = True, str(tiny_run / "iter_3")
    with pytest.raises(UserError, match=r"no average with sigma_rel=0.05.* load_from"):
        trained(cfg)
    source = trained(tiny_config(SEVERAL | {"train_cfg.max_iters": 3}))
    cfg = tiny_config(work_dir=Path(source.work_dir) / "on")
    cfg.resume, cfg.load_from = True, f"{source.work_dir}/iter_3"
    trained(cfg)
    content = load_checkpoint(f"{cfg.work_dir}/iter_6")
    assert content["ema_steps"] == 6
    assert "ema_profiles" not in content


def test_a_run_that_only_loads_starts_all_averages_anew(tiny_config, tiny_run):
    cfg = tiny_config(SEVERAL | {"train_cfg.max_iters": 1})
    cfg.load_from = str(tiny_run / "iter_3")
    runner = trained(cfg)
    found = load_checkpoint(f"{runner.work_dir}/iter_1")["ema_profiles"]["sigma_rel=0.05"]
    now = dict(runner.model.denoiser.named_parameters())
    assert all(torch.equal(found[key], now[key]) for key in found)  # of step 1 alone


# Snapshots


@pytest.mark.parametrize(("interval", "steps"), [(2, [2, 4, 5]), (5, [5]), (9, [5]), (None, [])])
def test_snapshots_are_of_every_so_many_steps_and_of_the_end(tiny_config, interval, steps):
    options = {"train_cfg.max_iters": 5, "custom_hooks.0.snapshot_interval": interval}
    runner = trained(tiny_config(SEVERAL | options))
    assert [snapshot.steps for snapshot in snapshots_of(runner.work_dir)] == steps


def test_the_interval_counts_optimizer_steps(tiny_config):
    cfg = tiny_config(SEVERAL | {"train_cfg.max_iters": 12, "custom_hooks.0.snapshot_interval": 3})
    cfg.optim_wrapper.accumulative_counts = 3
    trained(cfg)
    assert [snapshot.steps for snapshot in snapshots_of(cfg.work_dir)] == [3, 4]


def test_a_snapshot_holds_the_averages_and_what_else_the_denoiser_has(tiny_config):
    runner = RUNNERS.build(tiny_config(SEVERAL | {"train_cfg.max_iters": 2}))
    runner.model.denoiser.embed.requires_grad_(False)
    runner.train()
    *_, last = snapshots_of(runner.work_dir)
    assert last.profiles == [PowerEMA(0.05), PowerEMA(gamma=2.5), ConstantEMA(0.5)]
    assert last.cfg["model"]["denoiser"]["width"] == 16
    content, checkpoint = (
        load_checkpoint(last.path),
        load_checkpoint(f"{runner.work_dir}/iter_2"),
    )
    for i, name in enumerate(NAMES):
        found = {k.removeprefix(f"{i}."): v for k, v in content.items() if k.startswith(f"{i}.")}
        assert same(found, checkpoint["ema_profiles"][name])
    state = runner.model.denoiser.state_dict()
    rest = {k.removeprefix("rest."): v for k, v in content.items() if k.startswith("rest.")}
    assert {"pos_embed", "embed.proj.weight"} <= set(rest)
    assert all(torch.equal(value, state[key]) for key, value in rest.items())
    assert posthoc_ema(runner.work_dir, PowerEMA(0.1)).weights.keys() == state.keys()


def test_half_precision_takes_half_the_disk_and_little_from_the_values(tiny_config):
    made, size = [], []
    for dtype in ("float32", "float16"):
        options = {"custom_hooks.0.snapshot_dtype": dtype, "train_cfg.max_iters": 4}
        runner = trained(tiny_config(SEVERAL | options))
        made.append(posthoc_ema(runner.work_dir, PowerEMA(0.1)))
        size.append(
            sum(t.nbytes for t in load_checkpoint(snapshots_of(runner.work_dir)[0].path).values())
        )
    assert size[1] < 0.6 * size[0]
    one, other = (torch.cat([v.flatten() for v in each.weights.values()]) for each in made)
    assert other.dtype == torch.float32
    assert 0 < (one - other).norm() / one.norm() < 1e-3


def test_of_several_processes_one_writes(tiny_config, monkeypatch):
    monkeypatch.setattr("mmsora.engine.hooks.ema_hook.is_main_process", lambda: False)
    runner = trained(tiny_config(SEVERAL | {"train_cfg.max_iters": 2}))
    assert not (Path(runner.work_dir) / "ema_snapshots").exists()


def test_weights_in_half_precision_are_averaged_in_float32():
    model = nn.Linear(3, 5).bfloat16()
    wrapper = SimpleNamespace(stepped=True)
    runner = SimpleNamespace(
        model=SimpleNamespace(denoiser=model), optim_wrapper=wrapper, iter=0, max_iters=99
    )
    hook = DenoiserEMAHook(decay=0.999, warmup=False)
    hook.before_train(runner)
    expected = model.weight.detach().double()
    for _ in range(20):
        nn.init.normal_(model.weight)
        expected = 0.999 * expected + 0.001 * model.weight.detach().double()
        hook.after_train_iter(runner, 0)
    checkpoint = {}
    hook.before_save_checkpoint(runner, checkpoint)
    assert checkpoint["ema"]["weight"].dtype == torch.float32
    torch.testing.assert_close(
        checkpoint["ema"]["weight"].double(), expected, rtol=1e-5, atol=1e-6
    )
    before = model.weight.detach().clone()
    with hook.applied():
        assert torch.equal(model.weight, checkpoint["ema"]["weight"].bfloat16())
    assert torch.equal(model.weight, before)


# Mistakes


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be in"):
        DenoiserEMAHook(decay)


TWO = [PowerEMA(0.05), PowerEMA(0.1)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(profiles=[*TWO, PowerEMA(0.05)]), "profiles: sigma_rel=0.05 is kept twice"),
        (dict(profiles=[WarmupEMA(0.9999)]), "decay=0.9999 after a warm-up is kept twice"),
        (dict(snapshot_interval=5), "snapshot_interval needs profiles"),
        (dict(profiles=TWO, snapshot_interval=0), "snapshot_interval must be at least 1, got 0"),
        (dict(profiles=TWO, snapshot_dtype="fp16"), "one of float32, float16; got 'fp16'"),
    ],
)
def test_arguments_that_keep_nothing_of_use(arguments, words):
    with pytest.raises(ValueError, match=words):
        DenoiserEMAHook(**arguments)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (dict(type="PowerEMA", sigma_rle=0.1), "PowerEMA takes no 'sigma_rle'; did you mean"),
        (dict(type="PowrEMA", sigma_rel=0.1), "did you mean 'PowerEMA'"),
        (dict(sigma_rel=0.1), "missing 'type'"),
    ],
)
def test_a_typo_in_a_profile_is_told(tiny_config, profile, words):
    cfg = tiny_config()
    cfg.custom_hooks[0]["profiles"] = [profile]
    with pytest.raises(UserError, match=words):
        check_config(cfg)

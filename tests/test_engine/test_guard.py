"""Updates that would spoil the weights are skipped: which, by whom, and what the log says."""

import json
import math
import sys

import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from torch import nn

from mmsora.engine import AutocastOptimWrapper
from mmsora.engine.guard import UpdateGuard, Verdict
from mmsora.models.latent_diffusion import TrainedBatch
from mmsora.registry import RUNNERS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.user_error import UserError
from tests.ranks import start_ranks
from tests.test_engine.guard_worker import Poison


@pytest.fixture(autouse=True)
def log(monkeypatch):
    """What is logged, as a list of lines, by a run of its own that is in its 42nd iteration."""
    MessageHub.get_instance("guard").update_info("iter", 41)
    lines = []
    monkeypatch.setattr(MMLogger, "log", lambda self, level, line, *args: lines.append(line))
    return lines


def batch(*losses, first=0, **fields):
    samples = [
        VideoSample(metainfo={"index": first + i, **{k: v[i] for k, v in fields.items()}})
        for i in range(len(losses))
    ]
    half = torch.tensor(losses) / 2
    return TrainedBatch(samples, {"loss_diffusion": half, "loss_alignment": half})


# The verdict


def test_every_finite_update_is_made_by_default(log):
    guard = UpdateGuard()
    assert all(guard.verdict(norm) is Verdict.STEP for norm in [1e-3] * 200 + [0.0, 1e6])
    assert log == []


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_skips_and_names_what_is_at_fault(norm, log):
    guard = UpdateGuard()
    guard.note(batch(1.0, 2.0, path=["a.mp4", "b.mp4"]))
    guard.note(None)
    guard.note(batch(3.0, math.nan, first=56, path=["c.mp4", "d.mp4"]))
    assert guard.verdict(norm) is Verdict.SKIP
    assert log == ["iteration 42: update skipped: loss of sample 57 (d.mp4) is nan"]
    guard.note(batch(1.0, 5.0, 4.0, 3.0, label=[4, 5, 6, 7]))
    guard.verdict(norm)
    assert log[1] == (
        "iteration 42: update skipped: gradients are not finite; the largest losses are "
        "5 of sample 1 (label 5), 4 of sample 2 (label 6), 3 of sample 3 (label 7)"
    )
    guard.note(batch(math.inf, *[math.nan] * 4, text=["a whale"] * 5))
    guard.verdict(norm)
    assert log[2].count("is nan") == 2
    assert log[2].endswith("; and more")
    assert "loss of sample 0 ('a whale') is inf" in log[2]
    guard.verdict(norm)
    assert log[3] == "iteration 42: update skipped: gradients are not finite"
    assert guard.skipped == 4


def test_spikes_are_measured_against_a_geometric_average(log):
    guard = UpdateGuard(spike_factor=10, average_over=4)
    assert [guard.verdict(norm) for norm in (0.5, 99.0, 2.0, 8.0)] == [Verdict.STEP] * 4
    average = (0.5 * 99 * 2 * 8) ** 0.25
    guard.note(batch(2.0, 7.0))
    assert guard.verdict(10.01 * average) is Verdict.SKIP
    assert log[0].startswith("iteration 42: update skipped: gradient norm 53.1 is 10 times its")
    assert log[0].endswith("average; the largest losses are 7 of sample 1, 2 of sample 0")
    assert guard.verdict(9.99 * average) is Verdict.STEP  # the spike is not in the average
    average = average**0.75 * (9.99 * average) ** 0.25
    assert guard.verdict(10.01 * average) is Verdict.SKIP
    assert guard.verdict(9.99 * average) is Verdict.STEP


def test_a_narrow_spike_is_told_to_three_digits(log):
    guard = UpdateGuard(spike_factor=1.01, average_over=1)
    guard.verdict(2.0)
    assert guard.verdict(2.036) is Verdict.SKIP
    assert log == ["iteration 42: update skipped: gradient norm 2.036 is 1.02 times its average"]


def test_a_resumed_guard_decides_the_same():
    norms = [1.0, 2.0, 1.5, 40.0, 1.0, 16.0, 3.0, 25.0, math.nan]

    def decide(guard, norms):
        return [guard.verdict(norm) for norm in norms]

    whole = UpdateGuard(spike_factor=8, average_over=2)
    expected = decide(whole, norms)
    assert {Verdict.STEP, Verdict.SKIP} == set(expected[4:])
    first, second = (UpdateGuard(spike_factor=8, average_over=2) for _ in range(2))
    decide(first, norms[:4])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert decide(second, norms[4:]) == expected[4:]
    assert second.state_dict() == whole.state_dict()


def test_too_many_skips_in_a_row_end_the_run(log):
    guard = UpdateGuard(max_skips=3)
    for norm in (math.nan, math.nan, 1.0, math.nan, math.nan):
        guard.verdict(norm)
    guard.note(batch(math.nan, path=["bad.mp4"]))
    text = (
        r"3 updates in a row were skipped, the last at iteration 42: loss of sample 0 \(bad.mp4\)"
    )
    with pytest.raises(UserError, match=text + " is nan; begin with a lower learning rate"):
        guard.verdict(math.nan)
    MessageHub.get_current_instance().update_info("last_ckpt", "run/iter_40")
    with pytest.raises(
        UserError, match="; the last checkpoint is from before, go on from it with"
    ):
        guard.verdict(math.nan)


def test_overflows_of_fp16_are_no_faults_until_they_go_on(log):
    guard = UpdateGuard(max_skips=3)
    for _ in range(2):
        guard.note(batch(1.0))
        assert guard.verdict(math.inf, may_overflow=True) is Verdict.OVERFLOW
    assert (log, guard.skipped) == ([], 0)
    with pytest.raises(UserError, match="3 updates in a row were.*: gradients overflow fp16;"):
        guard.verdict(math.inf, may_overflow=True)
    guard = UpdateGuard(spike_factor=2, average_over=1)
    guard.verdict(1.0, may_overflow=True)
    assert guard.verdict(3.0, may_overflow=True) is Verdict.SKIP
    guard.note(batch(math.nan))
    assert guard.verdict(math.nan, may_overflow=True) is Verdict.SKIP


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spike_factor": 1}, "guard.spike_factor must be a number above 1, got 1"),
        ({"spike_factor": "ten"}, "guard.spike_factor must be a number above 1, got 'ten'"),
        ({"average_over": 0}, "guard.average_over must be a whole number from 1 on, got 0"),
        ({"max_skips": True}, "guard.max_skips must be a whole number from 1 on, got True"),
    ],
)
def test_arguments_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        UpdateGuard(**change)


# The optimizer wrapper


class Model(nn.Linear):
    last_batch = None

    def forward(self, x):
        losses = super().forward(x).float().square().mean(1)
        self.last_batch = batch(*losses.tolist(), first=x.shape[0])
        return losses.mean()


@pytest.mark.parametrize("precision", ["off", "fp16"])
def test_one_bad_micro_batch_skips_the_whole_update_and_changes_nothing(precision, log):
    torch.manual_seed(0)
    model = Model(3, 2)
    wrapper = AutocastOptimWrapper(
        torch.optim.AdamW(model.parameters(), lr=0.1), precision, accumulative_counts=3
    )
    wrapper.initialize_count_status(model, 0, 9)

    def state():
        moments = [value for s in wrapper.optimizer.state.values() for value in s.values()]
        return [value.clone() for value in [*moments, *model.parameters()]]

    stepped, states = [], [state()]
    for i in range(9):
        data = 0.1 * torch.randn(2, 3)  # so that fp16 does not overflow
        if i == 4:
            data[1, 0] = torch.nan
        with wrapper.optim_context(model):
            loss = model(data)
        wrapper.update_params(loss)
        stepped.append(wrapper.stepped)
        states.append(state())
    assert stepped == [False] * 2 + [True] + [False] * 5 + [True]
    for i in range(3, 9):
        assert all(map(torch.equal, states[i], states[3]))
    assert not any(map(torch.equal, states[9], states[3]))
    assert all(value.isfinite().all() for value in states[9])
    assert log == ["iteration 42: update skipped: loss of sample 3 is nan"]
    assert wrapper.scaler.get_scale() == (2.0**16 if precision == "fp16" else 1)
    assert wrapper.scaler._get_growth_tracker() == (2 if precision == "fp16" else 0)


def test_a_loss_that_is_not_finite_skips_though_its_gradient_is(log):
    weight = nn.Parameter(torch.ones(2))
    wrapper = AutocastOptimWrapper(torch.optim.SGD([weight], lr=0.5))
    wrapper.update_params((weight + torch.tensor([0, torch.inf])).sum())
    assert not wrapper.stepped
    assert torch.equal(weight, torch.ones(2))
    wrapper.update_params(weight.sum())
    assert wrapper.stepped
    assert torch.equal(weight, torch.full([2], 0.5))


def test_gradients_are_those_of_the_loss_bit_for_bit():
    torch.manual_seed(0)
    model, data = nn.Linear(5, 3), torch.randn(7, 5)
    model(data).square().mean().backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    wrapper = AutocastOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0))
    wrapper.backward(model(data).square().mean())
    assert torch.equal(model.weight.grad, expected)


def test_the_state_of_the_guard_is_saved():
    weight = nn.Parameter(torch.ones(2))

    def wrapper():
        return AutocastOptimWrapper(torch.optim.SGD([weight], lr=0.5), guard={"max_skips": 2})

    one, other = wrapper(), wrapper()
    one.update_params(weight.sum() * torch.nan)
    other.load_state_dict(one.state_dict())
    with pytest.raises(UserError, match="2 updates in a row"):
        other.update_params(weight.sum() * torch.nan)


# A run


def test_a_run_goes_on_after_a_bad_sample_and_is_resumed_exactly(
    tiny_config, tmp_path, scalars, log
):
    changes = {"default_hooks.checkpoint.interval": 4}

    def run(work_dir, resume=None):
        cfg = tiny_config(changes, work_dir=work_dir)
        if resume:
            cfg.resume, cfg.load_from = True, str(resume)
        runner, poison = RUNNERS.build(cfg), Poison((3,))
        runner.register_hook(poison)
        runner.train()
        return poison, runner

    poison, runner = run(tmp_path / "run")
    assert poison.kept() == [False, True, False, False, False]
    assert all(value.isfinite().all() for value in poison.states[-1])
    assert poison.rates[2] < poison.rates[1]  # the schedule went on
    name = f"sample {poison.sample.index} (label {int(poison.sample.label)})"
    assert f"iteration 3: update skipped: loss of {name} is nan" in log
    lines = scalars(tmp_path / "run")
    assert [line.get("skipped") for line in lines] == [None, None, 1, 1, 1, 1]
    again, resumed = run(tmp_path / "again", tmp_path / "run/iter_4")
    assert all(map(torch.equal, again.states[-1], poison.states[-1]))
    assert resumed.optim_wrapper.guard.state_dict() == runner.optim_wrapper.guard.state_dict()


# Several processes


def case(mode, precision="off", accumulate=1):
    """NaN on the second process, in an update that is the third, or the second of three."""
    return {
        "name": f"{mode}-{precision}-{accumulate}",
        "parallel": {"mode": mode},
        "iterations": [3],
        "changes": {
            "train_cfg.max_iters": 6,
            "optim_wrapper.precision": precision,
            "optim_wrapper.accumulative_counts": accumulate,
        },
    }


CASES = [
    case("ddp"),
    case("ddp", accumulate=2),
    case("zero1"),
    case("zero2", "bf16"),
    case("zero3", "fp16"),
    case("zero3", accumulate=2),
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "cases.json").write_text(json.dumps(CASES))
    worker = f"{__file__.removesuffix('test_guard.py')}guard_worker.py"
    command = [sys.executable, worker, folder / "cases.json", folder]
    processes = start_ranks(command, 2, folder)
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (folder / "rank_0.txt").read_text()[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_nan_on_one_rank_skips_the_update_on_all_and_changes_no_bit(case, two_processes):
    ranks = [
        json.loads((two_processes / f"{case['name']}_{rank}.json").read_text()) for rank in (0, 1)
    ]
    if case["changes"]["optim_wrapper.accumulative_counts"] == 2:
        stepped = [False, True, False, False, False, True]
        kept = [False, True, True, True, False]
    else:
        stepped, kept = [True, True, False, True, True, True], [False, True, False, False, False]
    for rank in ranks:
        assert rank["stepped"] == stepped
        assert rank["kept"] == kept
        assert rank["finite"]
        assert rank["skipped"] == 1
        assert rank["scale"] == (2**16 if "fp16" in case["name"] else 1)
    index, label = ranks[1]["sample"]
    text = f"update skipped: loss of sample {index} (label {label}) is nan on rank 1\n"
    assert ranks[0]["log"].count(text) == 1

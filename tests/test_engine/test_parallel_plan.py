"""How a user says what is spread over processes, and what is answered."""

import re

import pytest

from mmsora.engine.parallel import MODES, Parallel
from mmsora.registry import RUNNERS
from mmsora.utils.user_error import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mode": "fsdp"},
            "parallel.mode must be one of none, ddp, zero1, zero2, zero3; got 'fsdp'",
        ),
        ({"sequence": 0}, "parallel.sequence must be a whole number from 1 on, got 0"),
        ({"sequence": "two"}, "parallel.sequence must be a whole number from 1 on, got 'two'"),
        ({"sequence": 1.5}, "parallel.sequence must be a whole number from 1 on, got 1.5"),
        ({"offload": "maybe"}, "parallel.offload must be True or False, got 'maybe'"),
        ({"mode": "ddp", "offload": True}, "parallel.offload needs mode zero2 or zero3, got"),
        ({"offload": True}, "offload needs mode zero2 or zero3, got None"),
    ],
)
def test_a_plan_that_is_none_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Parallel(**options)


@pytest.mark.parametrize(
    ("options", "world", "message"),
    [
        (
            {"sequence": 4},
            6,
            "parallel.sequence=4 does not divide the number of processes, 6; start 8, or take a",
        ),
        ({"sequence": 2}, 1, "the number of processes, 1; start 2, or take a divisor"),
        ({"mode": "none"}, 2, "parallel.mode='none' is for one process, there are 2; take"),
    ],
)
def test_a_world_that_cannot_be_dealt_out_is_refused(options, world, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Parallel(**options).for_world(world)


@pytest.mark.parametrize(("world", "mode"), [(1, "none"), (2, "ddp")])
def test_without_a_mode_it_is_what_it_always_was(world, mode):
    plan = Parallel().for_world(world)
    assert (plan.mode, plan.is_sharded) == (mode, False)


def test_a_plan_keeps_what_was_said():
    plan = Parallel("zero3", sequence=2, offload=True).for_world(4)
    assert (plan.mode, plan.sequence, plan.offload) == ("zero3", 2, True)
    assert plan.is_sharded


@pytest.mark.parametrize("value", ["zero2", ["zero2"], 2])
def test_a_plan_is_a_dict(value):
    with pytest.raises(ValueError, match=r"parallel is a dict such as dict\(mode='zero2'\), got"):
        Parallel.of(value)


# The command line


def test_flags_go_before_the_config(tool, tmp_path):
    train = tool("train")
    arguments = ["latte_moving_digits", "--work-dir", str(tmp_path)]
    options = ["--cfg-options", "parallel.offload=True"]
    flags = ["--parallel", "zero2", "--sequence", "2"]
    cfg = train.prepare(train.parse_args([*arguments, *flags, *options]))
    assert dict(cfg.parallel) == {"mode": "zero2", "sequence": 2, "offload": True}
    assert "parallel" not in train.prepare(train.parse_args(arguments))
    assert train.MODES == MODES


@pytest.mark.parametrize(
    ("asked", "instead"),
    [
        ([], "--parallel zero2"),
        (["deepspeed_zero1"], "--parallel zero1"),
        (["configs/ds_zero_stage_3.json"], "--parallel zero3"),
        (
            ["deepspeed_zero3_offload"],
            "--parallel zero3 --cfg-options parallel.offload=True",
        ),
    ],
)
def test_who_asks_for_deepspeed_is_told_what_to_type(tool, capsys, asked, instead):
    with pytest.raises(SystemExit, match="2"):
        tool("train").parse_args(["config", "--deepspeed", *asked])
    error = capsys.readouterr().err
    assert error == f"error: ZeRO needs no DeepSpeed here: type {instead}\n"


def test_the_rate_goes_by_samples_not_by_processes_that_share_them(tiny_config):
    runner = RUNNERS.build(tiny_config())  # batches of 4
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    rate = wrapper.param_groups[0]["lr"]
    for sequence, factor in ((1, 4), (2, 2)):
        runner.plan = Parallel(sequence=sequence)
        wrapper.param_groups[0]["lr"] = rate
        runner.scale_lr(wrapper, {"enable": True, "base_batch_size": 1})
        assert wrapper.param_groups[0]["lr"] == rate * factor


def test_what_needs_processes_is_not_tried_without(tiny_config):
    cfg = tiny_config()
    cfg.parallel = {"mode": "zero2"}
    with pytest.raises(UserError, match="parallel.mode='zero2' is for processes that a launcher"):
        RUNNERS.build(cfg)

"""The command, the table of the README, and what tools/train.py refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmsora.apis.estimate.report import MACHINES, _time, machine_of, on, table
from mmsora.utils.config_names import config_names, load_config
from mmsora.utils.gpus import GPUS

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README_zh-CN.md")
LARGE = ["--cfg-options", "model.denoiser.depth=2", "train_dataloader.batch_size=1500"]


@pytest.fixture
def run(tool, capsys):
    def run(*words):
        tool("estimate").main(list(words))
        return capsys.readouterr().out

    return run


def rows(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    found = re.search(r"<!-- estimates -->\n(.*?)<!-- end of estimates -->", text, re.DOTALL)
    return found[1].splitlines()


def test_help_needs_no_torch():
    code = """
import runpy, sys
sys.argv = ["tools/estimate.py", "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not {"torch", "mmengine"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "arithmetic" in done.stdout


def test_the_names_of_gpus_are_those_that_are_known(tool):
    assert set(tool("estimate").GPU_NAMES) == set(GPUS)
    assert all(0 < gpu.fp32 < gpu.bf16 for gpu in GPUS.values())


def test_parts_add_up_and_all_gpus_are_compared(run):
    text = run("latte_moving_digits")
    sizes = [float(size) for size in re.findall(r"^  [\w ]+? +(-?[\d.]+) GB", text, re.MULTILINE)]
    assert sum(sizes[:9]) == pytest.approx(sizes[9], abs=0.05)
    assert text.count("GPU-hours") == text.count(" fits ") == len(GPUS)
    assert "nothing here was measured" in text


def test_a_layout_names_its_gpus(run):
    found = json.loads(run("dit_s2_imagenet_256", "--layout", "4xa6000", "--json"))
    assert (found["processes"], found["batch"], found["global_batch"]) == (4, 64, 256)
    assert found["parallel"]["mode"] == "ddp"
    (seconds,) = [gpu["seconds"] for gpu in found["gpus"].values()]
    assert seconds == pytest.approx(found["flops"]["on each GPU"] / (154.8e12 * 0.4))
    assert found["bytes"]["together"] == sum(
        size for name, size in found["bytes"].items() if name not in ("together", "host")
    )


def test_options_are_those_of_training(run):
    words = ("--gpus", "4", "--parallel", "zero2", "--sequence", "2", "--mfu", "0.2", "--json")
    found = json.loads(run("latte_moving_digits", *words))
    plan = {"mode": "zero2", "sequence": 2, "offload": False}
    assert {key: found["parallel"][key] for key in plan} == plan
    assert (found["mfu"], found["global_batch"]) == (0.2, 64)


def test_what_does_not_fit_comes_with_advice(run):
    text = run("dit_b2_imagenet_256_cached", "--gpu", "rtx4090", *LARGE)
    assert "no  " in text
    assert re.search(r"largest batch on each RTX 4090: [1-9]\d*\n", text)
    assert "it does not fit; these do:" in text
    assert "--cfg-options " in text.split("these do:")[1]


def test_a_large_batch_is_not_sought_for_ever(run, monkeypatch):
    monkeypatch.setattr("mmsora.apis.estimate.report.MOST_SAMPLES", 8)
    small = ["latte_moving_digits", "--gpu", "rtx4090", "--cfg-options"]
    for batch, most in ((2, 8), (12, 12)):
        text = run(*small, f"train_dataloader.batch_size={batch}")
        assert f"largest batch on each RTX 4090: {most} or more\n" in text


@pytest.mark.parametrize(
    ("hours", "text"), [(0.003, "11 s"), (0.3, "18 min"), (1.04, "1.0 h"), (70.4, "70 h")]
)
def test_short_recipes_take_minutes_or_seconds(hours, text):
    assert _time(hours) == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one CONFIG, or say --all"),
        (["latte_ucf", "--mfu", "40"], "--mfu is a share"),
        (["latte_ucf", "--gpus", "0"], "--gpus must be at least 1"),
        (["latte_ucf", "--layout", "9xa100"], "no layout '9xa100'"),
        (
            ["latte_ucf", "--layout", "8xa100", "--gpus", "4"],
            "8xa100 is for 8 GPUs, --gpus says 4",
        ),
        (["latte_ucf", "--gpus", "3", "--sequence", "2"], "sequence=2 does not divide"),
        (["latte_ucf", "--cfg-options", "model.denoiser.width=7"], "a width divisible by 4"),
    ],
)
def test_mistakes_are_one_line(words, message, tool, capsys):
    with pytest.raises(SystemExit) as ended:
        tool("estimate").main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


# The table of the README


def test_both_readmes_have_a_row_for_each_config():
    first, second = map(rows, READMES)
    assert first == second
    names = [re.match(r"\| `(\w+)`", row)[1] for row in first[2:]]
    assert names == sorted(config_names())


def test_rows_are_what_the_tool_prints():
    names = ["dit_s2_imagenet_256", "latte_moving_digits"]
    printed = list(table(names, 0.4))
    assert printed[:2] == rows(READMES[0])[:2]
    assert set(printed) <= set(rows(READMES[0]))


@pytest.mark.slow
def test_the_table_is_what_the_tool_prints():
    assert list(table([], 0.4)) == rows(READMES[0])


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.layout)
def test_machines_have_the_published_batch(machine):
    assert machine_of(machine.layout) is machine
    for name in config_names():
        cfg = load_config(name)
        whole, ours = cfg.get("auto_scale_lr", {}).get("base_batch_size"), on(cfg, machine)
        parts = ours.optim_wrapper.get("accumulative_counts", 1) * machine.gpus
        assert whole in (None, ours.train_dataloader.batch_size * parts), name


# tools/train.py


@pytest.fixture
def a_gpu(monkeypatch):
    """Call it with bytes, for a GPU that has so many."""

    def make(memory):
        gpu = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)

    return make


def test_training_refuses_what_cannot_fit_and_says_what_would(tool, a_gpu, monkeypatch, capsys):
    train, trained = tool("train"), []
    monkeypatch.setattr("mmsora.registry.RUNNERS.build", lambda cfg: trained.append(cfg))
    a_gpu(GPUS["rtx4090"].memory)
    words = ["dit_b2_imagenet_256_cached", *LARGE]
    with pytest.raises(SystemExit) as ended:
        train.main(words)
    assert ended.value.code == 2
    assert not trained
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"needs about \d+\.\d GB on each GPU \(.*\), which has 25\.3", line)
    assert "what fits: --cfg-options " in line
    monkeypatch.setattr(train, "check_paths", lambda cfg: None)  # there are no such data
    with pytest.raises(AttributeError):  # what was built is None, and was built
        train.main([*words, "--skip-fit-check"])
    a_gpu(2 * 10**12)
    with pytest.raises(AttributeError):
        train.main(words)
    assert len(trained) == 2

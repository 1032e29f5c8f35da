"""``tools/benchmark.py methods``: what trains fastest."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def methods():
    """The module, imported as it is by a script in ``tools``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        patch.chdir(ROOT)
        from benchmarks import methods

        yield methods


class Judge:
    """Reads nothing right until the second evaluation, then nine of the first ten clips."""

    def __init__(self):
        self.read_so_far = []

    def read(self, clips):
        assert clips.dtype == np.uint8
        assert clips.shape[1:] == (2, 8, 8)
        self.read_so_far.append(len(clips))
        labels = np.arange(len(clips)) % 10
        wrong = np.arange(len(clips)) >= 9 if len(self.read_so_far) > 1 else True
        return np.where(wrong, -1, labels)


def command(methods, tool, out, *arguments):
    """Run the command of a script that lies beside the module."""
    work = ["--work-dir", str(out.parent / "work"), "--out", str(out)]
    return tool("benchmark").main(["methods", *work, *arguments])


@pytest.fixture(scope="module")
def run(methods, tool, tiny_options, tmp_path_factory):
    """A run of two methods: its file, and how many clips the judge read at a time."""
    out = tmp_path_factory.mktemp("methods") / "figures.json"
    options = [f"{key}={value}" for key, value in tiny_options.items()]
    short = ["--budget", "4", "--clips", "10", "--final-clips", "20", "--precision", "off"]
    arguments = [*short, "--methods", "rf-uniform", "iddpm", "--cfg-options", *options]
    judges = [Judge(), Judge()]

    def measure(name, options, judge):
        return methods_measure(name, options, judges[name == "iddpm"])

    methods_measure = methods.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "build_judge", lambda options: None)
        patch.setattr(methods, "measure", measure)
        patch.setattr(methods, "BATCH", 8)  # more than one batch at each evaluation
        assert command(methods, tool, out, *arguments) == 0
    return SimpleNamespace(out=out, arguments=arguments, judges=judges)


def test_a_method_is_trained_and_read_as_it_goes(run):
    record = json.loads(run.out.read_text())["methods"]["rf-uniform"]
    assert record["curve"] == [[1, 0.0], [2, 0.9], [3, 0.9], [4, 0.9]]
    assert run.judges[0].read_so_far == [10, 10, 10, 20]
    assert record["iterations"] == 4
    assert record["steps_to_target"] == 2
    assert 0 < record["seconds_to_target"] < record["training_seconds"] + 0.1
    assert record["accuracy"] == pytest.approx(0.45)  # of all 20
    assert record["sampler"] == "Euler, 3 steps"
    assert record["network_calls"] == 6  # with and without the label


def test_a_method_may_take_several_budgets(run):
    record = json.loads(run.out.read_text())["methods"]["iddpm"]
    assert record["iterations"] == 12
    assert [step for step, _ in record["curve"]] == list(range(1, 13))
    assert record["sampler"] == "Ancestral, 3 steps"


def test_the_last_checkpoint_is_kept(run):
    kept = {path.parent.name: path.name for path in run.out.parent.rglob("iter_*")}
    assert kept == {"rf-uniform": "iter_4", "iddpm": "iter_12"}
    assert len(list(run.out.parent.rglob("iter_*"))) == 2


def test_what_the_file_holds_is_not_run_again(run, methods, tool, monkeypatch, capsys):
    measured = []

    def measure(name, options, judge):
        measured.append(name)
        raise KeyboardInterrupt  # as a user who loses patience

    monkeypatch.setattr(methods, "measure", measure)
    monkeypatch.setattr(methods, "build_judge", lambda options: None)
    before = run.out.read_bytes()
    assert command(methods, tool, run.out, *run.arguments) == 0
    assert measured == []
    printed = capsys.readouterr().out
    assert "[methods] iddpm: " in printed
    assert "| rf-uniform | 2 | " in printed
    with pytest.raises(SystemExit):
        command(methods, tool, run.out, *run.arguments, "--seed", "1")
    assert measured == ["rf-uniform"]
    assert run.out.read_bytes() == before


def test_each_method_is_written_when_it_is_done(methods, tool, monkeypatch, tmp_path, run):
    record = json.loads(run.out.read_text())["methods"]["iddpm"]

    def measure(name, options, judge):
        if name == "rf-uniform":
            raise KeyboardInterrupt
        return record

    monkeypatch.setattr(methods, "measure", measure)
    monkeypatch.setattr(methods, "build_judge", lambda options: None)
    out = tmp_path / "figures.json"
    chosen = ["--precision", "off", "--methods", "iddpm", "rf-uniform"]
    with pytest.raises(SystemExit):
        command(methods, tool, out, *chosen)
    assert json.loads(out.read_text())["methods"] == {"iddpm": record}


def test_methods_change_the_method_alone(methods):
    for method in methods.METHODS.values():
        own = {"model.diffusion", "model.denoiser.out_channels", "model.alignment"}
        assert method.changes.keys() <= own


def test_every_method_has_a_config_that_builds(methods, tool):
    from mmsora.registry import MODELS

    for name, method in methods.METHODS.items():
        options = tool("benchmark").parse_args(["methods", "--precision", "bf16", "--seed", "3"])
        cfg = methods.config_of_method(name, options)
        model = MODELS.build(cfg.model)
        assert model.diffusion.guidance.scale == 2
        assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == 2000 * method.budgets
        assert cfg.default_hooks.checkpoint.interval == 250
        assert cfg.optim_wrapper.precision == "bf16"
        assert cfg.randomness.seed == 3


def test_the_encoder_is_trained_once(methods, tool, monkeypatch, tmp_path, capsys):
    trained = []

    def train_encoder(folder, frame_size):
        trained.append((folder, frame_size))
        folder.mkdir()
        return 0.975

    monkeypatch.setattr(methods, "train_encoder", train_encoder)
    options = tool("benchmark").parse_args(["methods", "--work-dir", str(tmp_path)])
    options.precision = "off"
    cfg = methods.config_of_method("rf-repa", options)
    methods.prepare_encoder(cfg)
    methods.prepare_encoder(cfg)
    assert trained == [(tmp_path / "digit_encoder", 16)]
    assert "97.5% of held-out frames" in capsys.readouterr().out


def test_the_faster_precision(methods, tool, monkeypatch):
    options = tool("benchmark").parse_args(["methods"])
    for bf16, expected in (0.1, "bf16"), (0.3, "off"):
        speeds = {"off": 0.2, "bf16": bf16}
        monkeypatch.setattr(
            methods.quickstart, "seconds_per_step", lambda cfg, name, device, s=speeds: s[name]
        )
        assert methods.faster_precision(options) == expected


def test_the_table_puts_the_fastest_first(methods, run):
    record = json.loads(run.out.read_text())["methods"]["rf-uniform"]
    late = record | {"steps_to_target": 3, "bar": 0.9, "accuracy": 0.9}
    never = record | {"steps_to_target": None, "seconds_to_target": None, "bar": 0.91}
    lines = methods.table({"never": never, "late": late, "first": record}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| first", "| late", "| never"]
    assert len({line.count("|") for line in lines}) == 1
    assert "0.9 ok" in lines[3]
    assert "not reached" in lines[4]
    assert "0.91 MISSED" in lines[4]


def test_an_unknown_method_is_one_line(methods, tool, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(methods, tool, tmp_path / "figures.json", "--methods", "rf-unifrom")
    error = capsys.readouterr().err
    assert "no method 'rf-unifrom'; there are rf-logit-normal, " in error
    assert error.count("\n") == 1

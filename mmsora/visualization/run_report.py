"""The page of a training run: curves, samples, config and environment, from its directory."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from mmsora.utils.atomic import write_text
from mmsora.utils.user_error import UserError
from mmsora.visualization.curves import Curve, RunCurves
from mmsora.visualization.report_page import content, html_page

__all__ = ["RUN_FILE", "write_run_report"]

RUN_FILE = "run.json"  # beside scalars.json: what the run was started with and how far it is
MOST_SAMPLES = 16  # iterations whose samples are shown
SAMPLE_BYTES = 6_000_000  # of all their videos together
SLOW_DATA = 0.2  # share of the time that is worth a word


class Chart(NamedTuple):
    """Curves in one picture.

    Attributes:
        title: Of the picture.
        pattern: Regular expression of their names.
        kind: ``""``, ``log`` for an axis that can be logarithmic, ``percent`` or ``rising``, where
            the first is drawn palest.
    """

    title: str
    pattern: str
    kind: str = ""


CHARTS = (
    Chart("Loss", r"loss(_\w+)?", "log"),
    Chart("Loss by time, from data (0) to noise (1)", r"loss/t_.+", "rising"),
    Chart("Validation loss", r"val/loss(_\w+)?", "log"),
    Chart("Validation loss by time", r"val/loss/t_.+", "rising"),
    Chart("Validation loss of the average by time", r"val/loss_ema/t_.+", "rising"),
    Chart("Gradient norm", r"grad_norm", "log"),
    Chart("Learning rate", r"lr"),
    Chart("Samples a second", r"samples/s"),
    Chart("TFLOP/s of a process", r"TFLOP/s"),
    Chart("Model FLOP utilisation", r"mfu", "percent"),
    Chart("Time spent waiting for data", r"data_wait", "percent"),
    Chart("Seconds an iteration", r"time|data_time"),
    Chart("Memory, MiB", r"memory(_\w+)?"),
    Chart("Skipped updates", r"skipped"),
)
NO_CHART = ("tokens/s",)  # has the form of samples/s
TILES = (
    ("loss", "loss", "{:.4g}"),
    ("samples/s", "samples/s", "{:,.4g}"),
    ("tokens/s", "tokens/s", "{:,.0f}"),
    ("TFLOP/s", "TFLOP/s", "{:.4g}"),
    ("mfu", "MFU", "{:.1%}"),
    ("data_wait", "waiting for data", "{:.1%}"),
    ("memory", "MiB of memory", "{:,.0f}"),
)


def write_run_report(work_dir: str | Path, curves: RunCurves | None = None) -> Path:
    """Write ``report.html`` of a run, whole or not at all.

    Args:
        work_dir: Directory of the run.
        curves: Of the run; those of an earlier call spare reading all over again.

    Returns:
        The file.

    Raises:
        UserError: No run has logged anything there.
    """
    work_dir = Path(work_dir)
    curves = curves or RunCurves(work_dir)
    curves.update()
    runs = _runs(work_dir)
    if not runs and not curves.curves:
        raise UserError(f"{work_dir} holds no run: there is no */vis_data/{RUN_FILE} in it")
    last = runs[-1] if runs else {}
    samples = _samples(work_dir)
    charts = _charts(curves.curves)
    title = work_dir.resolve().name
    body = [
        _head(title, last, curves),
        _warnings(curves.curves, last),
        _sample_player(samples),
        '<div id="charts"></div><noscript><p>Curves need JavaScript.</p></noscript>'
        * bool(charts),
        _about(work_dir, runs),
        f'<script type="application/json" id="data">{_json(charts, samples)}</script>',
    ]
    here = files("mmsora.visualization")
    style, script = ((here / f"run_report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    path = work_dir / "report.html"
    write_text(path, html_page(f"{title} - MMSora", "\n".join(filter(None, body)), style, script))
    return path


def _runs(work_dir: Path) -> list[dict[str, Any]]:
    """What each start of the run says of itself, the last one last."""
    paths = sorted(work_dir.glob(f"*/vis_data/{RUN_FILE}"))
    return [json.loads(path.read_text("utf-8")) for path in paths]


def _json(charts: Sequence[Mapping[str, Any]], samples: Sequence[Path]) -> str:
    videos = [
        {"step": _step(path), "video": base64.b64encode(path.read_bytes()).decode()}
        for path in samples
    ]
    text = json.dumps({"charts": charts, "samples": videos}, separators=(",", ":"))
    return text.replace("<", "\\u003c")


# Curves


def _charts(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """Known curves in their charts, others in charts of their own."""
    shown = {name: curve for name, curve in curves.items() if curve.points}
    parts = [name for name in shown if name.startswith("loss_")]
    if "loss" in shown and len(parts) == 1:  # the whole of it
        del shown[parts[0]]
    charts, left = [], dict.fromkeys(name for name in shown if name not in NO_CHART)
    for chart in CHARTS:
        names = [name for name in left if re.fullmatch(chart.pattern, name)]
        for name in names:
            del left[name]
        if chart.kind == "rising":
            names.sort()
        charts.append((chart.title, chart.kind, names))
    charts[1:1] = [(name, "", [name]) for name in left]
    return [
        {"title": title, "kind": kind, "lines": {name: _line(shown[name]) for name in names}}
        for title, kind, names in charts
        if names
    ]


def _line(curve: Curve) -> list[list[float]]:
    """Steps, means and, of a thinned curve, the least and greatest: columns of its points."""
    steps, mean, low, high, _ = zip(*curve.points, strict=True)
    columns = (mean,) if low == high else (mean, low, high)
    return [list(steps), *([float(f"{value:.5g}") for value in column] for column in columns)]


# Samples


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("iter_"))


def _samples(work_dir: Path) -> list[Path]:
    """Videos of samples, evenly spread over the run, the first and the last among them."""
    found = work_dir.glob("samples/iter_*.mp4")
    paths = sorted((path for path in found if path.stem[5:].isdigit()), key=_step)
    for count in range(min(MOST_SAMPLES, len(paths)), 0, -1):
        places = [round(i * (len(paths) - 1) / max(count - 1, 1)) for i in range(count)]
        chosen = [paths[place] for place in places] if count > 1 else paths[-1:]
        if count == 1 or sum(path.stat().st_size for path in chosen) <= SAMPLE_BYTES:
            return chosen
    return []


def _sample_player(samples: Sequence[Path]) -> str:
    if not samples:
        return ""
    last, step = len(samples) - 1, _step(samples[-1])
    return (
        '<section id="samples"><h2>Samples</h2>'
        '<video id="clip" autoplay loop muted playsinline></video>'
        f'<label><span id="clip-step">iteration {step:,}</span>'
        f'<input id="clip-at" type="range" min="0" max="{last}" value="{last}" step="1"'
        f' aria-label="iteration of the samples"{" hidden" * (last == 0)}></label></section>'
    )


# Words


def _head(title: str, run: Mapping[str, Any], curves: RunCurves) -> str:
    status, step = run.get("status", "unknown"), run.get("iteration", curves.step)
    total = run.get("max_iters") or step
    facts = [f"iteration {step:,} of {total:,}"]
    if status == "training" and run.get("eta") is not None:
        facts.append(f"{_duration(run['eta'])} left")
    if "updated" in run:
        facts.append(f"as of {run['updated']}")
    tiles = "".join(
        f"<div><b>{form.format(curves.curves[name].last)}</b>{label}</div>"
        for name, label, form in TILES
        if name in curves.curves
    )
    return (
        f'<header><h1>{escape(title)} <span class="{escape(status)}">{escape(status)}</span></h1>'
        f'<progress max="{max(total, 1)}" value="{step}"></progress>'
        f"<p>{escape(', '.join(facts))}</p><div class=tiles>{tiles}</div></header>"
    )


def _warnings(curves: Mapping[str, Curve], run: Mapping[str, Any]) -> str:
    found = []
    if "skipped" in curves:
        found.append(
            f"{curves['skipped'].last:,.0f} updates were skipped; the log names the samples"
        )
    found += [
        f"values of {name} that were not finite: {curve.broken}"
        for name, curve in curves.items()
        if curve.broken
    ]
    waits = [point[1] for point in curves["data_wait"].points] if "data_wait" in curves else []
    recent = waits[-10:]
    if recent and sum(recent) / len(recent) > SLOW_DATA:
        found.append(
            f"{sum(recent) / len(recent):.0%} of the time goes by waiting for data; more "
            "train_dataloader.num_workers, or a cache of latents, may help"
        )
    if run.get("status") == "interrupted":
        found.append("the run was interrupted and saved; go on with --resume")
    if "error" in run:
        found.append(f"the run ended with an error: {run['error']}")
    return f'<div class="warnings">{content(found)}</div>' if found else ""


def _about(work_dir: Path, runs: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    if runs:
        commands = [f"{run['started']}  {run['command']}" for run in runs]
        parts.append(("Command" if len(runs) == 1 else "Commands", content(commands)))
        parts.append(("Environment", content(runs[-1]["environment"])))
    configs = sorted(work_dir.glob("*/vis_data/config.py"))
    if configs:
        parts.append(("Config", f"<pre>{escape(configs[-1].read_text('utf-8'))}</pre>"))
    return "\n".join(
        f"<details><summary>{heading}</summary>{inside}</details>" for heading, inside in parts
    )


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

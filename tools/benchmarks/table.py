"""The table of a benchmark."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.timing import Ratio

__all__ = ["Row", "bar_of", "format_row", "verdict", "write"]


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        model: The network.
        what: What was measured.
        pair: What was compared.
        ratio: Of speed, or of memory.
        bar: What it should be.
        note: Absolute figures.
    """

    model: str
    what: str
    pair: str
    ratio: Ratio
    bar: str
    note: str


# For DiT-S/2 and Latte-S/2 on a CPU, with 32 x 32 latents and 16 frames.
BARS = {
    ("inference", "DiT"): "median >= 1.12",
    ("inference", "Latte"): "median >= 1.10",
    ("train-fp32", "DiT"): "low >= 0.98",
    ("train-fp32", "Latte"): "low >= 1.00",
    ("train-bf16", "DiT"): "median >= 1.05",
    ("train-bf16", "Latte"): "median >= 1.05",
    ("memory", "DiT"): "median <= 0.88",
    ("memory", "Latte"): "median <= 0.93",
    ("optimizer", "DiT"): "median >= 3.00",
    ("optimizer", "Latte"): "median >= 3.00",
    ("ema", "DiT"): "median >= 1.30",
    ("ema", "Latte"): "median >= 1.30",
}


def bar_of(what: str, model: str, device: str) -> str:
    """The bar of a row, empty where there is none."""
    family, _, size = model.partition("-")
    return BARS.get((what, family), "") if size == "S/2" and device == "cpu" else ""


def verdict(row: Row) -> str:
    """Whether a row meets its bar: ``ok`` or ``MISSED``; nothing where there is none."""
    if not row.bar:
        return ""
    name, sign, value = row.bar.split()
    figure = getattr(row.ratio, name)
    met = figure >= float(value) if sign == ">=" else figure <= float(value)
    return "ok" if met else "MISSED"


def format_row(row: Row) -> str:
    """A row as a line."""
    name = f"{row.model:10} {row.what:10} {row.pair:20}"
    if row.what == "outputs":
        figures = f"{row.ratio.median:.1e}" + " " * 15
    else:
        figures = f"{row.ratio.median:6.3f} [{row.ratio.low:.3f}, {row.ratio.high:.3f}]"
    return f"{name} {figures:22} {row.bar:16} {verdict(row):6} {row.note}".rstrip()


def write(rows: Sequence[Row], options: Any, noisy: bool) -> None:
    """Write the table as JSON."""
    figures = [
        row._asdict() | {"ratio": row.ratio._asdict(), "verdict": verdict(row)} for row in rows
    ]
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, one thread"
    about = {"torch": torch.__version__, "device": device, "noisy": noisy}
    about |= {key: getattr(options, key) for key in ("depth", "batch", "rounds", "frames", "side")}
    Path(options.out).write_text(json.dumps(about | {"rows": figures}, indent=2) + "\n")

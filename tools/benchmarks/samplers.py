"""Few steps beside the published 250: a table, a plot and the bars."""

from typing import Any, NamedTuple

import torch
from mmengine.registry import init_default_scope

from benchmarks.bookkeeping import SHAPES, measure_bookkeeping
from benchmarks.plot import Curve, Panel, draw_panels
from benchmarks.sampler_toy import GUIDANCE, Figures, Floor, Sampler, Toy
from mmsora.utils.atomic import atomic_path, write_json

__all__ = ["BUDGETS", "CANDIDATES", "CHOICES", "PUBLISHED", "Bar", "bars", "benchmark_samplers"]

BUDGETS = (10, 15, 20, 25, 35, 50)
PAPER_CALLS = 250
SPACED = {"type": "SpacedGrid"}
KARRAS = {"type": "KarrasGrid"}
LOG_SNR = {"type": "LogSNRGrid"}
LOG_SNR_02 = {"type": "LogSNRGrid", "ratio_min": 0.02}
SDE_GRID = {"type": "SpacedGrid", "last_step": 0.04}
SDE = {"type": "EulerMaruyama", "diffusion": "sigma", "last_step": "mean"}
FORWARD = {"type": "Ancestral", "variance": "forward"}
DPM, SDE_DPM = {"type": "DPMSolverPP2M"}, {"type": "DPMSolverPP2M", "eta": 1.0}
UNIPC, UNIPC3 = {"type": "UniPC"}, {"type": "UniPC", "order": 3}

# With the steps that their papers take.
PUBLISHED = [
    (Sampler("DDPM, posterior variance", "table", {"type": "Ancestral"}, SPACED), PAPER_CALLS),
    (Sampler("DDPM, forward variance", "table", FORWARD, SPACED), PAPER_CALLS),
    (
        Sampler("DDPM, learned variance", "table", {"type": "Ancestral"}, SPACED, learned=True),
        PAPER_CALLS,
    ),
    (Sampler("DDIM", "table", {"type": "Euler"}, SPACED), PAPER_CALLS),
    (Sampler("SiT SDE", "flow", SDE, SDE_GRID), PAPER_CALLS),
    (Sampler("SiT Euler", "flow", {"type": "Euler"}, SPACED), PAPER_CALLS),
]
CANDIDATES = [
    Sampler("DDPM, learned variance", "table", {"type": "Ancestral"}, SPACED, learned=True),
    Sampler("DDIM", "table", {"type": "Euler"}, SPACED),
    Sampler("Heun, Karras", "table", {"type": "Heun"}, KARRAS, calls=2, spared=1),
    Sampler("DPM++ 2M, Karras", "table", DPM, KARRAS),
    Sampler("DPM++ 2M, log SNR", "table", DPM, LOG_SNR),
    Sampler("DPM++ 2M SDE, log SNR", "table", SDE_DPM, LOG_SNR),
    Sampler("UniPC, even", "table", UNIPC, SPACED),
    Sampler("UniPC, Karras", "table", UNIPC, KARRAS),
    Sampler("UniPC, log SNR", "table", UNIPC, LOG_SNR),
    Sampler("UniPC, log SNR from 0.02", "table", UNIPC, LOG_SNR_02),
    Sampler("UniPC-3, log SNR", "table", UNIPC3, LOG_SNR),
    Sampler("SiT SDE", "flow", SDE, SDE_GRID),
    Sampler("Euler, even", "flow", {"type": "Euler"}, SPACED),
    Sampler("Heun, even", "flow", {"type": "Heun"}, SPACED, calls=2, spared=1),
    Sampler("midpoint, even", "flow", {"type": "Midpoint"}, SPACED, calls=2),
    Sampler("AB2, even", "flow", {"type": "AB2"}, SPACED),
    Sampler("DPM++ 2M, log SNR", "flow", DPM, LOG_SNR),
    Sampler("DPM++ 2M, even", "flow", DPM, SPACED),
    Sampler("UniPC, even", "flow", UNIPC, SPACED),
    Sampler("UniPC, Karras", "flow", UNIPC, KARRAS),
    Sampler("UniPC, log SNR", "flow", UNIPC, LOG_SNR),
]


class Choice(NamedTuple):
    """A config's sampler.

    Attributes:
        sampler: Its name.
        distances: The published sampler of the flow, whose distances it is to reach.
    """

    sampler: str
    distances: str


CHOICES = {
    "table": Choice("UniPC, log SNR from 0.02", "DDIM"),
    "flow": Choice("midpoint, even", "SiT Euler"),
}


class Bar(NamedTuple):
    """What a figure is to be.

    Attributes:
        what: The figure.
        value: What it is.
        limit: What it may be at most; at least where ``least``.
        least: Whether more is better.
    """

    what: str
    value: float
    limit: float
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether it is so."""
        return self.value >= self.limit if self.least else self.value <= self.limit


def bars(rows: list[Figures], floor: Floor) -> list[Bar]:
    """What is asked of the chosen samplers, by the figures of the published ones.

    At 25 network calls the likelihood and the modes of the best of them, as far as chance can
    tell, and the median distance; at 50 the root mean square.

    Args:
        rows: All figures.
        floor: What chance does.

    Returns:
        The bars.
    """
    found = []
    for path, choice in CHOICES.items():
        published = [row for row in rows if row.path == path and row.calls == PAPER_CALLS]
        nll = max(min(abs(row.nll) for row in published), 2 * floor.nll)
        tv = max(min(row.tv for row in published), floor.tv + 2 * floor.tv_std)
        flow = next(row for row in published if row.sampler == choice.distances)
        at25, at50 = (_within(rows, path, choice.sampler, calls) for calls in (25, 50))
        where = f"{path}: {choice.sampler}, {at25.calls} calls"
        found += [
            Bar(f"{where}: |NLL gap|", abs(at25.nll), nll),
            Bar(f"{where}: TV of modes", at25.tv, tv),
            Bar(f"{where}: median distance", at25.median or 0.0, flow.median or 0.0),
            Bar(
                f"{path}: {choice.sampler}, {at50.calls} calls: rms",
                at50.rms or 0.0,
                flow.rms or 0.0,
            ),
        ]
    return found


def _within(rows: list[Figures], path: str, name: str, calls: int) -> Figures:
    """The row of a sampler with most calls up to so many."""
    fitting = [row for row in rows if (row.path, row.sampler) == (path, name)]
    return max((row for row in fitting if row.calls <= calls), key=lambda row: row.calls)


def table(rows: list[Figures]) -> str:
    """The figures as a table in Markdown."""
    lines = [
        "| sampler | path | steps | network calls | NLL gap | TV of modes | median distance | rms "
        f"| median, guidance {GUIDANCE:g} | rms, guidance {GUIDANCE:g} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = ["" if value is None else f"{value:.4f}" for value in row[5:]]
        cells = [*row[:2], *(n or "" for n in row[2:4]), f"{row.nll:+.4f}", *figures]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def panels(rows: list[Figures]) -> list[Panel]:
    """Median distance above, root mean square below; a column for each path."""
    titles = {"table": "DDPM's table", "flow": "straight path"}
    drawn = []
    for measure, what in (("median", "median"), ("rms", "root mean square")):
        for path, title in titles.items():
            shown = [
                row for row in rows if row.path == path and row.calls and getattr(row, measure)
            ]
            names = list(dict.fromkeys((row.sampler, row.calls == PAPER_CALLS) for row in shown))
            curves = [
                Curve(
                    f"{name}, published {PAPER_CALLS}" if alone else name,
                    [
                        (row.calls, getattr(row, measure))
                        for row in shown
                        if row.sampler == name and (row.calls == PAPER_CALLS) == alone
                    ],
                )
                for name, alone in names
            ]
            label = f"{title}: {what} distance to the exact end"
            drawn.append(Panel(label, "network calls", curves, [*BUDGETS, 100, PAPER_CALLS]))
    return drawn


def benchmark_samplers(options: Any) -> int:
    """Measure, print the table and the bars, write the plot and the figures.

    Args:
        options: The command line.

    Returns:
        The exit status: 1 if a bar is missed; a quick run, whose figures mean nothing, is 0.
    """
    init_default_scope("mmsora")
    torch.set_num_threads(1)
    toy = Toy(256, 20_000, 100) if options.quick else Toy(options.samples)
    runs = PUBLISHED + [(one, one.steps(budget)) for one in CANDIDATES for budget in BUDGETS]
    rows = [*toy.exact(), *(toy.measure(sampler, steps) for sampler, steps in runs)]
    found = bars(rows, toy.floor)
    costs = {name: measure_bookkeeping(shape, options.rounds) for name, shape in SHAPES.items()}
    for name, cost in costs.items():
        found.append(Bar(f"bookkeeping of {name}: speed", cost.speed.median, 2.5, least=True))
    change = max(change for _, change in toy.ends.values())
    print(
        f"{toy.count} samples; {toy.floor}; half the steps move the exact ends by {change:.1e}\n"
    )
    print(table(rows), end="\n\n")
    for bar in found:
        sign, verdict = ">=" if bar.least else "<=", "ok" if bar.met else "MISSED"
        print(f"{verdict:6} {bar.what}: {bar.value:.4f} {sign} {bar.limit:.4f}")
    if options.plot:
        with atomic_path(options.plot) as path:
            draw_panels(panels(rows)).save(path, optimize=True)
    if options.out:
        record = {
            "torch": torch.__version__,
            "samples": toy.count,
            "floor": toy.floor._asdict(),
            "change_of_exact_ends": change,
            "rows": [row._asdict() for row in rows],
            "bookkeeping": {name: cost.record() for name, cost in costs.items()},
            "bars": [bar._asdict() | {"met": bar.met} for bar in found],
        }
        write_json(options.out, record)
    return int(not options.quick and not all(bar.met for bar in found))

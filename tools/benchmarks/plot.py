"""Curves on logarithmic axes, drawn with Pillow."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Curve", "Panel", "draw_panels"]

PAPER, INK, FAINT = (255, 255, 255), (30, 30, 34), (222, 222, 226)
COLOURS = (
    (31, 119, 180),
    (214, 69, 30),
    (44, 150, 60),
    (148, 80, 189),
    (230, 150, 20),
    (23, 170, 190),
    (227, 90, 170),
    (120, 86, 75),
    (120, 120, 125),
    (150, 165, 30),
)
WIDTH, HEIGHT = 560, 400  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 34, 46
LINE = 18  # of the legend
STEPS = (1, 2, 5)


class Curve(NamedTuple):
    """Points ``(x, y)``, all positive; a single one is drawn as a diamond on a level line."""

    name: str
    points: Sequence[tuple[float, float]]


class Panel(NamedTuple):
    """A pair of axes.

    Attributes:
        title: Above it.
        x_label: Below it.
        curves: What it shows.
        x_ticks: Marks on the horizontal axis, the first and last being its ends.
    """

    title: str
    x_label: str
    curves: Sequence[Curve]
    x_ticks: Sequence[float]


class _Axis(NamedTuple):
    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)


def draw_panels(panels: Sequence[Panel], columns: int = 2) -> Image.Image:
    """Draw panels side by side, each column with one legend below; panels of a column that show
    curves of the same name show them in the same colour.

    Args:
        panels: Row by row.
        columns: Panels in a row.

    Returns:
        The picture, of 64 colours.
    """
    rows = math.ceil(len(panels) / columns)
    names = [
        list(dict.fromkeys(curve.name for panel in panels[i::columns] for curve in panel.curves))
        for i in range(columns)
    ]
    legend = math.ceil(max(map(len, names)) / 2) * LINE + 12
    image = Image.new("RGB", (columns * WIDTH, rows * HEIGHT + legend), PAPER)
    draw = ImageDraw.Draw(image)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        _draw_panel(draw, panel, names[column], (column * WIDTH, row * HEIGHT))
    for column in range(columns):
        _draw_legend(draw, names[column], (column * WIDTH + LEFT, rows * HEIGHT + 4))
    return image.quantize(64, dither=Image.Dither.NONE)


def _draw_panel(
    draw: ImageDraw.ImageDraw, panel: Panel, names: list[str], corner: tuple[int, int]
) -> None:
    left, top = corner
    box = left + LEFT, top + TOP, left + WIDTH - RIGHT, top + HEIGHT - BOTTOM
    values = [y for curve in panel.curves for _, y in curve.points]
    x = _Axis(panel.x_ticks[0] / 1.15, panel.x_ticks[-1] * 1.15, box[0], box[2])
    y = _Axis(min(values) / 1.2, max(values) * 1.2, box[3], box[1])
    for tick in panel.x_ticks:
        draw.line((x(tick), box[1], x(tick), box[3]), FAINT)
        draw.text((x(tick), box[3] + 5), f"{tick:g}", INK, _font(12), "ma")
    for tick in _ticks(y.low, y.high):
        draw.line((box[0], y(tick), box[2], y(tick)), FAINT)
        draw.text((box[0] - 6, y(tick)), f"{tick:g}", INK, _font(12), "rm")
    draw.rectangle(box, outline=INK)
    middle = (box[0] + box[2]) / 2
    draw.text((middle, top + 10), panel.title, INK, _font(15), "ma")
    draw.text((middle, box[3] + 24), panel.x_label, INK, _font(13), "ma")
    for curve in panel.curves:
        spots = [(x(calls), y(value)) for calls, value in curve.points]
        colour = _colour(names, curve.name)
        if len(spots) > 1:
            draw.line(spots, colour, width=2, joint="curve")
        else:
            draw.line((box[0], spots[0][1], box[2], spots[0][1]), colour)
        for spot in spots:
            _mark(draw, spot, colour, alone=len(spots) == 1)


def _draw_legend(draw: ImageDraw.ImageDraw, names: list[str], corner: tuple[int, int]) -> None:
    left, top = corner
    half = math.ceil(len(names) / 2)
    for number, name in enumerate(names):
        spot = left + number // half * (WIDTH - LEFT) // 2, top + number % half * LINE + LINE // 2
        _mark(draw, spot, _colour(names, name), alone=False)
        draw.text((spot[0] + 12, spot[1]), name, INK, _font(12), "lm")


def _mark(
    draw: ImageDraw.ImageDraw,
    spot: tuple[float, float],
    colour: tuple[int, int, int],
    alone: bool,
) -> None:
    (x, y), size = spot, 6 if alone else 3
    if alone:
        draw.polygon([(x - size, y), (x, y - size), (x + size, y), (x, y + size)], colour, INK)
    else:
        draw.ellipse((x - size, y - size, x + size, y + size), colour)


def _colour(names: list[str], name: str) -> tuple[int, int, int]:
    return COLOURS[names.index(name) % len(COLOURS)]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every power of ten in a range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in STEPS]
    return [tick for tick in ticks if low <= tick <= high]

"""Many clips in one picture: frames side by side, or all clips playing together."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["contact_sheet", "video_grid"]

PAPER = (43, 45, 51)  # between clips; neither the black nor the white of a digit
INK = (236, 236, 240)
GAP = 2  # pixels between the frames of a clip
MARGIN = 10  # pixels around a clip
ASPECT = 1.6  # width over height that a picture strives for
FONT_SIZES = (13, 22)


def contact_sheet(
    clips: np.ndarray | Tensor,
    titles: Sequence[Any] | None = None,
    columns: int | None = None,
    scale: int = 1,
) -> np.ndarray:
    """Draw the frames of each clip side by side.

    Args:
        clips: uint8 (N, C, T, H, W), C being 1 or 3.
        titles: What to write at each clip: on its left when short, else above it.
        columns: Clips in a row of the sheet. ``None`` chooses a sheet that fits a screen.
        scale: Enlargement; a pixel becomes a square of so many pixels.

    Returns:
        uint8 (H, W, 3).
    """
    videos = _videos(clips, scale)
    count, frames, height, width, _ = videos.shape
    strips = np.full((count, height, frames * (width + GAP) - GAP, 3), PAPER, np.uint8)
    for frame in range(frames):
        left = frame * (width + GAP)
        strips[:, :, left : left + width] = videos[:, frame]
    sheet, corners = _lay_out(strips.shape[1:3], count, titles, columns, beside=width)
    for strip, (top, left) in zip(strips, corners, strict=True):
        sheet[top : top + height, left : left + strip.shape[1]] = strip
    return sheet


def video_grid(
    clips: np.ndarray | Tensor,
    titles: Sequence[Any] | None = None,
    columns: int | None = None,
    scale: int = 1,
) -> np.ndarray:
    """Tile the clips so that all play together.

    Args:
        clips: uint8 (N, C, T, H, W), C being 1 or 3.
        titles: What to write above each clip.
        columns: Clips in a row. ``None`` chooses a picture that fits a screen.
        scale: Enlargement; a pixel becomes a square of so many pixels.

    Returns:
        uint8 (T, H, W, 3).
    """
    videos = _videos(clips, scale)
    count, frames, height, width, _ = videos.shape
    still, corners = _lay_out((height, width), count, titles, columns, beside=0)
    grid = np.repeat(still[None], frames, axis=0)
    for video, (top, left) in zip(videos, corners, strict=True):
        grid[:, top : top + height, left : left + width] = video
    return grid


def _videos(clips: np.ndarray | Tensor, scale: int) -> np.ndarray:
    """Clips as an array (N, T, H, W, 3), enlarged."""
    array = clips.detach().cpu().numpy() if isinstance(clips, Tensor) else np.asarray(clips)
    if array.dtype != np.uint8 or array.ndim != 5 or array.shape[1] not in (1, 3):
        raise ValueError(
            f"clips must be uint8 (N, 1 or 3, T, H, W), got {array.dtype} {array.shape}"
        )
    if not array.size:
        raise ValueError("there are no clips to draw")
    array = np.moveaxis(array, 1, -1).repeat(scale, axis=2).repeat(scale, axis=3)
    return np.broadcast_to(array, (*array.shape[:-1], 3))


def _lay_out(
    tile: tuple[int, int],
    count: int,
    titles: Sequence[Any] | None,
    columns: int | None,
    beside: int,
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Draw the sheet but for the clips.

    Args:
        tile: Height and width of a clip's picture.
        count: Number of clips.
        titles: Their titles.
        columns: Clips in a row.
        beside: Titles up to this width stand on the left of the clip, wider ones above it.

    Returns:
        The sheet, and the top left corner of each clip.
    """
    height, width = tile
    texts = [] if titles is None else [str(title) for title in titles]
    if titles is not None and len(texts) != count:
        raise ValueError(f"{len(texts)} titles for {count} clips")
    smallest, largest = FONT_SIZES
    size = min(max(height // 5, smallest), largest)
    font = ImageFont.load_default(size)
    gutter = max((math.ceil(font.getlength(text)) for text in texts), default=0) + MARGIN
    line = 0
    if not texts or gutter > beside:
        gutter, line = 0, math.ceil(1.3 * size) if texts else 0
    pitch_x, pitch_y = gutter + width + MARGIN, line + height + MARGIN
    if columns is None:  # as many rows as give the aspect, then as few columns as fill them
        columns = math.ceil(count / max(round(math.sqrt(count * pitch_x / pitch_y / ASPECT)), 1))
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    image = Image.new("RGB", (columns * pitch_x + MARGIN, rows * pitch_y + MARGIN), PAPER)
    corners = [
        (MARGIN + row * pitch_y + line, MARGIN + column * pitch_x + gutter)
        for row, column in (divmod(number, columns) for number in range(count))
    ]
    draw = ImageDraw.Draw(image)
    for text, (top, left) in zip(texts, corners[: len(texts)], strict=True):
        if gutter:
            spot, anchor = (left - MARGIN // 2 - 2, top + height // 2), "rm"
        else:
            spot, anchor = (left, top - line // 4), "ls"
        draw.text(spot, _shorten(text, font, gutter or width), INK, font, anchor)
    return np.array(image), corners


def _shorten(text: str, font: Any, width: int) -> str:
    """The text on one line, cut with an ellipsis where it is too long."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."

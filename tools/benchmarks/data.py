"""What it takes to read training clips.

A row is a ratio of CPU time: another way over ours, so above 1 ours is faster.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.timing import Ratio, interleaved, speed
from mmsora.datasets.transforms.spatial import ResizeCrop
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import probe_video, read_video
from mmsora.utils.video_io.reading import forget

__all__ = ["DataRow", "PARTS", "benchmark_data"]

STRIDE = 3
AVI_FRAMES, AVI_FPS, AVI_SIZE = 50, 25, (240, 320)  # two seconds, in UCF-101's size


class DataRow(NamedTuple):
    """A line of the table.

    Attributes:
        what: What was measured.
        pair: What was compared.
        ratio: Of speed.
        bar: The least that the median should be; None where there is no bar.
        note: Absolute figures.
    """

    what: str
    pair: str
    ratio: Ratio
    bar: float | None
    note: str

    @property
    def verdict(self) -> str:
        """Whether the bar is met."""
        if self.bar is None:
            return ""
        return "ok" if self.ratio.median >= self.bar else "MISSED"


class Clip(NamedTuple):
    """Frames of a file that a sample takes."""

    path: Path
    indices: np.ndarray


def benchmark_data(options: argparse.Namespace) -> int:
    """Print a table of all parts asked for.

    Args:
        options: The command line.

    Returns:
        1 when a bar is missed, else 0.
    """
    torch.set_num_threads(1)
    rows: list[DataRow] = []
    for part in options.what:
        for row in PARTS[part](options):
            print(format_row(row), flush=True)
            rows.append(row)
    if options.out:
        figures = [
            row._asdict() | {"ratio": row.ratio._asdict(), "verdict": row.verdict} for row in rows
        ]
        Path(options.out).write_text(json.dumps({"rows": figures}, indent=2) + "\n")
    return int(any(row.verdict == "MISSED" for row in rows))


def format_row(row: DataRow) -> str:
    """A row as a line."""
    ratio = f"{row.ratio.median:6.2f} [{row.ratio.low:.2f}, {row.ratio.high:.2f}]"
    bar = "" if row.bar is None else f">= {row.bar:g}"
    return f"{row.what:16} {row.pair:26} {ratio:22} {bar:8} {row.verdict:6} {row.note}".rstrip()


def measure_decoding(options: argparse.Namespace) -> list[DataRow]:
    """Rows of reading 16 frames, stride 3, at random starts, resized."""
    folder = Path(options.clips)
    films = sorted(path for path in folder.glob("*") if path.suffix in (".mp4", ".webm", ".mkv"))
    if not films:
        raise UserError(f"{folder}: no .mp4, .webm or .mkv film in it; set --clips")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for what, paths, bar in (
            ("long films", films, 6.0),
            ("two-second AVI", short_avis(films, Path(temporary)), 1.0),
        ):
            rows += compare(what, draw_clips(paths, options), bar, options)
    return rows


def compare(
    what: str, clips: Sequence[Clip], bar: float, options: argparse.Namespace
) -> list[DataRow]:
    """Rows of one kind of file; the frames must be the same."""
    resize = ResizeCrop(options.side)
    ways: dict[str, Callable[[Clip], np.ndarray]] = {
        "ours": by_indices,
        "ours, first time": by_indices_first_time,
        "whole file": whole_file,
        "whole file, lean": whole_file_lean,
    }
    for clip in clips:
        samples = [resized(resize, way, clip) for way in ways.values()]
        for sample in samples[1:]:
            if not np.array_equal(samples[0], sample):
                raise RuntimeError(f"{clip.path}: the ways read different frames")
    passes = {name: partial(read_all, resize, way, clips) for name, way in ways.items()}
    spent = interleaved(passes, options.rounds, "cpu")
    ms = {name: 1e3 * float(np.median(values)) / len(clips) for name, values in spent.items()}
    rows = []
    for ours in ("ours", "ours, first time"):
        for other in ("whole file", "whole file, lean"):
            note = f"{ms[ours]:.1f} beside {ms[other]:.1f} ms a clip"
            ratio = speed(spent[ours], spent[other])
            has_bar = other == "whole file" and (ours == "ours" or bar == 1)
            rows.append(DataRow(what, f"{ours} / {other}", ratio, bar if has_bar else None, note))
    return rows


def read_all(resize: ResizeCrop, way: Callable[[Clip], np.ndarray], clips: Sequence[Clip]) -> None:
    """One pass over the clips."""
    for clip in clips:
        resized(resize, way, clip)


def resized(
    resize: ResizeCrop, way: Callable[[Clip], np.ndarray], clip: Clip
) -> np.ndarray[Any, Any]:
    """A sample's frames."""
    return resize.transform({"frames": way(clip)})["frames"]


def by_indices(clip: Clip) -> np.ndarray:
    """As DecodeVideo does it, when the file's index is remembered."""
    return read_video(clip.path, clip.indices)


def by_indices_first_time(clip: Clip) -> np.ndarray:
    """As SampleFrames and DecodeVideo do it with a file that they have not seen."""
    forget()
    probe_video(clip.path)
    return read_video(clip.path, clip.indices)


def whole_file(clip: Clip) -> np.ndarray:
    """As torchvision's ``read_video`` did it: all pixels of a file, of which some are chosen."""
    import av

    with av.open(str(clip.path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)[clip.indices]


def whole_file_lean(clip: Clip) -> np.ndarray:
    """The fastest way to decode all frames: only those that are wanted become RGB."""
    import av
    from av.video.reformatter import VideoReformatter

    converter = VideoReformatter()
    with av.open(str(clip.path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = list(container.decode(video=0))
    return np.stack(
        [converter.reformat(frames[i], format="rgb24").to_ndarray() for i in clip.indices]
    )


def draw_clips(paths: Sequence[Path], options: argparse.Namespace) -> list[Clip]:
    """Clips of each file at random starts, the same in every run."""
    rng, clips = np.random.default_rng(0), []
    for path in paths:
        room = probe_video(path).frames - (options.frames - 1) * STRIDE
        if room < 1:
            raise UserError(f"{path}: too short for {options.frames} frames, {STRIDE} apart")
        for start in rng.integers(room, size=options.starts):
            clips.append(Clip(path, start + STRIDE * np.arange(options.frames)))
    return clips


def short_avis(films: Sequence[Path], folder: Path) -> list[Path]:
    """Two seconds of each film as UCF-101 has them: MPEG-4 in AVI."""
    import av

    paths = []
    for film in films:
        frames = read_video(film, range(min(AVI_FRAMES, probe_video(film).frames)))
        small = ResizeCrop(AVI_SIZE).transform({"frames": frames})["frames"]
        paths.append(folder / f"{film.stem}.avi")
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream("mpeg4", rate=AVI_FPS, options={"g": "12", "bf": "0"})
            stream.height, stream.width, stream.pix_fmt = *AVI_SIZE, "yuv420p"
            for pixels in small:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    return paths


PARTS = {"decoding": measure_decoding}

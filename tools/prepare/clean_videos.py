"""Cut videos into scenes and sort out what is not worth training on: a list, nothing is deleted.

    python tools/prepare/clean_videos.py data/own
    python tools/prepare/clean_videos.py data/own --min-side 480 --min-seconds 2

Writes ``clean.csv`` with a row for each scene, kept or not and why, and ``clean.jsonl`` of the
scenes that are kept, which ``AnnotatedVideos`` trains on (``ann_file="clean.jsonl"``). Scenes are
found by PySceneDetect (``pip install scenedetect``), hard cuts alone: fades and dissolves are not.
"""

import argparse
import csv
import importlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmsora.utils.user_error import UserError, user_errors_as_one_line

if TYPE_CHECKING:
    import numpy as np

COLUMNS = ["path", "start", "end", "num_frames", "height", "width", "fps", "kept", "reason"]
WIDTH = 256  # pixels that scenes are looked for in; as PySceneDetect does
SMALL = 32, 18  # columns and rows that movement is measured in
BAND = 16  # bits; scenes that differ in few bits have one of these in common


class Scene(NamedTuple):
    """A part of a video without a cut.

    Attributes:
        start: Its first frame.
        end: The frame after its last one.
        brightness: Mean grey level.
        motion: How much a pixel changes: the standard deviation over time of its grey level, as
            a mean over all pixels.
        picture: What the first, the middle and the last frame look like, 192 bits.
    """

    start: int
    end: int
    brightness: float
    motion: float
    picture: bytes


class Video(NamedTuple):
    """A video and its scenes; none where it cannot be read.

    Attributes:
        entry: What is known of it.
        height: Pixels.
        width: Pixels.
        fps: Frames per second.
        scenes: Its scenes.
        cause: Why it cannot be read.
    """

    entry: dict[str, Any]
    height: int = 0
    width: int = 0
    fps: float = 0.0
    scenes: tuple[Scene, ...] = ()
    cause: str = ""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Cut videos into scenes and sort out what is not worth training on. Writes "
        "a list; no video is changed."
    )
    parser.add_argument("root", help="folder of the videos, with a list of them or without")
    parser.add_argument(
        "--ann-file", help="list in the folder, if it has another name than metadata.csv and such"
    )
    parser.add_argument("--out", help="the list to write; default clean.csv in the folder")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-scenes", action="store_true", help="a video is one scene")
    parser.add_argument(
        "--cut", type=float, default=27.0, help="PySceneDetect's threshold; lower finds more cuts"
    )
    parser.add_argument("--min-frames", type=int, default=16)
    parser.add_argument("--min-seconds", type=float, default=0.0)
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.add_argument("--min-side", type=int, default=256, help="pixels of the shorter side")
    parser.add_argument(
        "--brightness",
        type=float,
        nargs=2,
        default=(16.0, 240.0),
        metavar=("LEAST", "MOST"),
        help="mean grey level, 0 to 255",
    )
    parser.add_argument(
        "--min-motion", type=float, default=1.0, help="grey levels that a pixel changes by"
    )
    parser.add_argument(
        "--duplicates",
        type=int,
        default=8,
        metavar="BITS",
        help="of 192 that two scenes may differ in and be the same, 0 to 11; -1 keeps all",
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if not -1 <= args.duplicates <= 11:
        parser.error(f"--duplicates must be from -1 to 11, got {args.duplicates}")
    if args.out is not None and not args.out.endswith(".csv"):
        parser.error(f"--out must end in .csv, got {args.out}")
    return args


def detector(threshold: float) -> Any:
    """PySceneDetect's detector of hard cuts.

    Args:
        threshold: How much a frame differs from the one before.

    Returns:
        The detector, for one video.

    Raises:
        UserError: It is not installed.
    """
    try:
        library: Any = importlib.import_module("scenedetect")
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"scenes need PySceneDetect ({error}): pip install scenedetect, or --no-scenes"
        ) from error
    # Short scenes stay scenes: merged into a neighbour, they would put a cut into it.
    return library.ContentDetector(threshold, min_scene_len=1)


def look(entry: dict[str, Any], path: str, args: argparse.Namespace) -> Video:
    """Go through a video.

    Args:
        entry: What is known of it.
        path: The file.
        args: The command line.

    Returns:
        Its scenes, at least one, unless it cannot be read.
    """
    import cv2
    import numpy as np

    from mmsora.utils.video_io import MediaError, probe_video
    from mmsora.utils.video_io.about import iterate_video

    cutter = None if args.no_scenes else detector(args.cut)
    cuts, small, pictures = [0], [], []
    try:
        info = probe_video(path)
        for number, frame in enumerate(iterate_video(path)):
            if cutter is not None:
                cuts += new_cuts(cutter, frame, number, info.fps)
            grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
            small.append(cv2.resize(grey, SMALL, interpolation=cv2.INTER_AREA))
            nine = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA).astype(int)
            pictures.append(np.packbits(nine[:, 1:] > nine[:, :-1]).tobytes())
    except MediaError as error:
        return Video(entry, cause=str(error.cause))
    ends = [*cuts[1:], len(small)]
    scenes = tuple(
        scene(start, end, np.array(small[start:end]), pictures)
        for start, end in zip(cuts, ends, strict=True)
    )
    return Video(entry, info.height, info.width, info.fps, scenes)


def new_cuts(cutter: Any, frame: "np.ndarray", number: int, fps: float) -> list[int]:
    """Show PySceneDetect the next frame.

    Args:
        cutter: The detector.
        frame: uint8 (H, W, 3), RGB.
        number: Of the frame.
        fps: Frames per second.

    Returns:
        Frames that a scene begins with, seldom any.
    """
    import cv2

    timecode: Any = importlib.import_module("scenedetect").FrameTimecode
    height, width = frame.shape[:2]
    if width > WIDTH:
        size = WIDTH, max(round(height * WIDTH / width), 1)
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    found = cutter.process_frame(timecode(number, fps), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    return [int(cut.frame_num) for cut in found]


def scene(start: int, end: int, small: "np.ndarray", pictures: list[bytes]) -> Scene:
    """Measure a scene.

    Args:
        start: Its first frame.
        end: The frame after its last one.
        small: Its frames, small and grey.
        pictures: What each frame of the video looks like.

    Returns:
        The scene.
    """
    shown = b"".join(pictures[number] for number in (start, (start + end - 1) // 2, end - 1))
    return Scene(start, end, float(small.mean()), float(small.std(axis=0).mean()), shown)


def fault(video: Video, part: Scene, args: argparse.Namespace) -> str:
    """What is wrong with a scene by itself; empty if nothing is.

    Args:
        video: The video.
        part: Its scene.
        args: The command line.

    Returns:
        The first reason not to keep it.
    """
    frames, (least, most) = part.end - part.start, args.brightness
    seconds, side = frames / video.fps, min(video.height, video.width)
    if frames < args.min_frames:
        return f"short: {frames} frames"
    if seconds < args.min_seconds:
        return f"short: {seconds:.2f} s"
    if seconds > args.max_seconds:
        return f"long: {seconds:.2f} s"
    if side < args.min_side:
        return f"small: {side} pixels"
    if part.brightness < least:
        return f"dark: {part.brightness:.1f}"
    if part.brightness > most:
        return f"bright: {part.brightness:.1f}"
    if part.motion < args.min_motion:
        return f"static: {part.motion:.2f}"
    return ""


class Known:
    """Scenes that are kept, found again by what they look like.

    Two that differ in ``bits`` bits or fewer, fewer than there are bands, have a band in common.

    Args:
        bits: In which the same scene may differ.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.bands: dict[tuple[int, bytes], list[tuple[int, str]]] = defaultdict(list)

    def same(self, picture: bytes, name: str) -> str:
        """The name of a scene that looks the same; without one this scene is remembered."""
        if self.bits < 0:
            return ""
        number, step = int.from_bytes(picture, "big"), BAND // 8
        keys = [(n, picture[n : n + step]) for n in range(0, len(picture), step)]
        for key in keys:
            for other, known in self.bands[key]:
                if (number ^ other).bit_count() <= self.bits:
                    return known
        for key in keys:
            self.bands[key].append((number, name))
        return ""


def rows(video: Video, known: Known, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the list of a video.

    Args:
        video: The video.
        known: The scenes kept so far.
        args: The command line.

    Yields:
        A row for each scene, one for a video that cannot be read.
    """
    path = video.entry["path"]
    size = {"height": video.height, "width": video.width, "fps": round(video.fps, 4)}
    if video.cause:
        reason = f"unreadable: {video.cause}"
        empty = {"start": 0, "end": 0, "num_frames": 0}
        yield {"path": path, **empty, **size, "kept": 0, "reason": reason}
    for part in video.scenes:
        reason = fault(video, part, args)
        if not reason:
            same = known.same(part.picture, f"{path} {part.start}-{part.end}")
            reason = f"duplicate: {same}" if same else ""
        place = {"start": part.start, "end": part.end, "num_frames": part.end - part.start}
        yield {"path": path, **place, **size, "kept": int(not reason), "reason": reason}


def videos(args: argparse.Namespace) -> Iterator[Video]:
    """Look at all videos.

    Args:
        args: The command line.

    Yields:
        The videos, in the order of the list.

    Raises:
        UserError: There is nothing to look at, or not as files.
    """
    from mmsora.datasets.file_dataset import VIDEO_EXTENSIONS
    from mmsora.datasets.survey import entries_of_folder, in_parallel

    dataset = entries_of_folder(args.root, args.ann_file)
    entries = [dataset.get_data_info(number) for number in range(len(dataset))]
    if any("shard" in entry or "cut" in entry for entry in entries):
        raise UserError(f"{args.root}: files are cut, not tar files and not what is cut already")
    entries = [entry for entry in entries if entry["path"].lower().endswith(VIDEO_EXTENSIONS)]
    if not entries:
        raise UserError(f"{args.root}: no videos ({', '.join(VIDEO_EXTENSIONS)})")
    if not args.no_scenes:
        detector(args.cut)  # complains before anything is read
    yield from in_parallel(
        lambda entry: look(entry, os.path.join(args.root, entry["path"]), args),
        entries,
        args.workers,
        "videos",
    )


def listed(entry: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A scene as ``AnnotatedVideos`` reads it.

    Args:
        entry: What is known of its video.
        row: Of the list.

    Returns:
        An entry.
    """
    known: dict[str, Any] = {key: entry[key] for key in ("text", "label") if key in entry}
    size = {key: row[key] for key in ("num_frames", "height", "width", "fps")}
    return {"path": row["path"], **known, **size, "cut": [row["start"], row["end"]]}


def main(argv: list[str] | None = None) -> None:
    """Clean."""
    args = parse_args(argv)
    with user_errors_as_one_line():
        from mmsora.utils.atomic import write_text

        out = Path(args.out or Path(args.root, "clean.csv"))
        table, known = io.StringIO(), Known(args.duplicates)
        kept: list[str] = []
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        reasons: dict[str, int] = defaultdict(int)
        for video in videos(args):
            for row in rows(video, known, args):
                writer.writerow(row)
                reasons[row["reason"].partition(":")[0] or "kept"] += 1
                if row["kept"]:
                    kept.append(json.dumps(listed(video.entry, row), ensure_ascii=False) + "\n")
        write_text(out, table.getvalue())
        write_text(out.with_suffix(".jsonl"), "".join(kept))
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
            print(f"{reason:12}{count:9,} scenes")
        print(f"wrote {out} and {out.with_suffix('.jsonl')}")


if __name__ == "__main__":
    main()

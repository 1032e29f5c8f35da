"""What lies in a dataset or a folder: every file is looked at, nothing is changed."""

import math
import os
import re
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsora.datasets.annotated import AnnotatedVideos
from mmsora.datasets.buckets import Buckets
from mmsora.datasets.file_dataset import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, FileDataset
from mmsora.datasets.frame_folder import frame_files
from mmsora.datasets.records import find_list
from mmsora.datasets.tar import TarVideos
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import MediaError
from mmsora.utils.video_io.about import MediaFacts, media_facts

__all__ = [
    "Looked",
    "check_tree",
    "entries_of",
    "entries_of_folder",
    "find_splits",
    "in_parallel",
    "missing_numbers",
    "summary",
    "survey",
]

SECONDS = 5.0  # between two lines of progress
AHEAD = 4  # files for each worker that are looked at before they are asked for
SHAPE = ("num_frames", "height", "width")
BARS = 12  # of a histogram


class Looked(NamedTuple):
    """An entry of a dataset, and what its file holds.

    Attributes:
        entry: What the dataset says of it: ``path`` and, where they are known, ``text``,
            ``label``, ``num_frames``, ``height``, ``width``, ``cut`` and ``crop``.
        facts: What was found; None where it cannot be read.
        cause: Why not.
    """

    entry: dict[str, Any]
    facts: MediaFacts | None
    cause: str = ""


def entries_of(dataset: Any) -> list[tuple[Any, int]]:
    """The samples of a dataset that are files, of its parts where it is made of several.

    Args:
        dataset: A dataset.

    Returns:
        The dataset of files and the number in it, for each.

    Raises:
        UserError: Its samples are no files.
    """
    parts = [getattr(dataset, name, None) for name in ("dataset", "videos", "images")]
    parts = [part for part in [*parts, *getattr(dataset, "datasets", ())] if part is not None]
    if isinstance(dataset, FileDataset):
        return [(dataset, number) for number in range(len(dataset))]
    if not parts:
        raise UserError(f"the samples of {type(dataset).__name__} are no files to look at")
    return [entry for part in parts for entry in entries_of(part)]


def entries_of_folder(root: str | Path, ann_file: str | None = None) -> FileDataset:
    """A dataset of all that a folder holds.

    A list, or captions beside the clips, are read as ``AnnotatedVideos`` reads them, tar files as
    ``TarVideos``. Else every video and image in the folder or below is an entry.

    Args:
        root: The folder.
        ann_file: A list in it.

    Returns:
        A dataset without transforms.

    Raises:
        UserError: There is nothing to look at.
    """
    if ann_file or find_list(root) is not None:
        return AnnotatedVideos(str(root), ann_file=ann_file)
    if any(Path(root).glob("*.tar")):
        return TarVideos(str(root))
    return _Tree(str(root))


class _Tree(FileDataset):
    """Every video and image below a folder, with the caption that may lie beside it."""

    def load_data_list(self) -> list[dict[str, Any]]:
        kinds, infos = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS), []
        for folder, inside, files in os.walk(self.data_root, followlinks=True):
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            there = set(files)
            for name in sorted(files):
                stem, kind = os.path.splitext(name)
                if kind.lower() not in kinds or name.startswith("."):
                    continue
                path = os.path.join(folder, name)
                info = {"path": os.path.relpath(path, self.data_root)}
                if f"{stem}.txt" in there:
                    text = Path(folder, f"{stem}.txt").read_text("utf-8-sig", "replace")
                    info["text"] = " ".join(text.split())
                infos.append(info)
        if not infos:
            raise UserError(f"{self.data_root}: no {', '.join(kinds)} files in it or below")
        return infos


def survey(
    entries: Sequence[tuple[Any, int]],
    workers: int = 1,
    decode: bool = False,
    show: Callable[[str], None] = print,
) -> Iterator[Looked]:
    """Look at files, several at a time.

    Args:
        entries: Datasets and numbers, from :func:`entries_of`.
        workers: Files that are looked at together.
        decode: Decode every frame.
        show: Takes the lines of progress.

    Yields:
        What was found, in the order of the entries.
    """

    def look(entry: tuple[Any, int]) -> Looked:
        dataset, number = entry
        info = dataset.get_data_info(number)
        results = {**info, "path": os.path.join(dataset.data_root, info["path"])}
        try:
            dataset.fetch(results)
            source = results.get("frame_files") or results.get("media") or results["path"]
            return Looked(info, media_facts(source, results["path"], decode))
        except MediaError as error:
            return Looked(info, None, str(error.cause))

    yield from in_parallel(look, entries, workers, "files", show)


def in_parallel(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    workers: int,
    what: str,
    show: Callable[[str], None] = print,
) -> Iterator[Any]:
    """As ``map`` in threads, saying from time to time how far it is.

    Args:
        function: Called with each item.
        items: The items.
        workers: How many at the same time.
        what: The items are.
        show: Takes the lines of progress.

    Yields:
        The results in order; few of them wait to be taken.
    """
    told, rest = time.perf_counter(), iter(items)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        first = islice(rest, AHEAD * max(workers, 1))
        waiting = deque(pool.submit(function, item) for item in first)
        for count in range(1, len(items) + 1):
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
            if time.perf_counter() - told > SECONDS:
                told = time.perf_counter()
                show(f"{count:,} of {len(items):,} {what} looked at")


def missing_numbers(files: Sequence[str]) -> int:
    """How many numbers are left out, or come twice, between the first and the last frame."""
    found = [re.search(r"(\d+)\.\w+$", os.path.basename(file)) for file in files]
    numbers = [int(match[1]) for match in found if match]
    if not numbers:
        return 0
    span = max(numbers) - min(numbers) + 1
    return span - len(set(numbers)) + len(numbers) - len(set(numbers))


def summary(found: Sequence[Looked], buckets: Buckets | None = None) -> dict[str, Any]:
    """Counts, sizes and lengths of what was found.

    Args:
        found: From :func:`survey`.
        buckets: Sizes to count the clips into.

    Returns:
        Plain values, for JSON.
    """
    good = [(looked.entry, looked.facts) for looked in found if looked.facts is not None]
    clips = [_clip(entry, facts) for entry, facts in good]
    moving = [facts for _, facts in good if facts.kind == "video"]
    kinds = Counter(facts.kind for _, facts in good)
    report: dict[str, Any] = {
        "files": len(found),
        "videos": kinds["video"],
        "images": kinds["image"],
        "frame_folders": kinds["frames"],
        "bytes": sum(facts.nbytes for _, facts in good),
        "hours": sum(facts.info.duration for facts in moving) / 3600,
        "unreadable": [
            {"path": looked.entry["path"], "cause": looked.cause}
            for looked in found
            if looked.facts is None
        ],
        "codecs": _counts(facts.codec for _, facts in good),
        "sizes": _counts(f"{f.info.height} x {f.info.width}" for _, f in good),
        "fps": _counts(f"{facts.info.fps:.3f}".rstrip("0").rstrip(".") for facts in moving),
        "frames": _spread([clip[0] for clip in clips]),
        "seconds": _spread([facts.info.duration for facts in moving]),
        "captions": _captions([looked.entry for looked in found]),
        "classes": _classes([looked.entry for looked in found]),
        "wrong_in_list": _wrong(good),
    }
    if buckets is not None and clips:
        report["buckets"] = _buckets(buckets, np.array(clips))
    return report


def _clip(entry: dict[str, Any], facts: MediaFacts) -> tuple[int, int, int]:
    """Frames, height and width of what is used of a file."""
    count, height, width = facts.info.frames, facts.info.height, facts.info.width
    if entry.get("cut"):
        count = max(min(entry["cut"][1], count) - entry["cut"][0], 1)
    if entry.get("crop"):
        left, right, top, bottom = entry["crop"]
        height, width = bottom - top, right - left
    return count, height, width


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Least, mean, median, most, and a histogram; None of nothing."""
    if not values:
        return None
    low, high = min(values), max(values)
    whole = all(isinstance(value, int) for value in values)
    step = max((high - low) / BARS, 1 if whole else 1e-3)
    step = math.ceil(step) if whole else step
    bars = Counter(int((value - low) / step) for value in values)
    last = max(bars)
    if not whole and last == BARS:  # the greatest value closes the last bar
        bars[BARS - 1] += bars.pop(BARS)
        last = BARS - 1
    names = [
        f"{low + n * step} to {low + (n + 1) * step - 1}"
        if whole
        else f"{low + n * step:.2f} to {low + (n + 1) * step:.2f}"
        for n in range(last + 1)
    ]
    return {
        "least": low,
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "most": high,
        "histogram": {name: bars[n] for n, name in enumerate(names)},
    }


def _captions(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of how many entries, how many words; None where nothing has a caption."""
    texts = []
    for entry in entries:
        text = entry.get("text") or []
        texts.append([text] if isinstance(text, str) else list(text))
    every = [text for some in texts for text in some]
    if not every:
        return None
    return {
        "entries_with": sum(bool(some) for some in texts),
        "entries_without": sum(not some for some in texts),
        "captions": len(every),
        "different": len(set(every)),
        "words": _spread([len(text.split()) for text in every]),
        "most_frequent": dict(Counter(every).most_common(10)),
    }


def _classes(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    counts = Counter(entry["label"] for entry in entries if entry.get("label") is not None)
    if not counts:
        return None
    return {"number": len(counts), "samples": _spread(list(counts.values()))}


def _wrong(good: Sequence[tuple[dict[str, Any], MediaFacts]]) -> list[dict[str, Any]]:
    """Entries of which the list says another size than the file has; buckets go by the list."""
    wrong = []
    for entry, facts in good:
        said = {key: entry[key] for key in SHAPE if entry.get(key) is not None}
        found = dict(zip(SHAPE, _clip(entry, facts), strict=True))
        if any(found[key] != value for key, value in said.items()):
            wrong.append({"path": entry["path"], "list": said, "file": found})
    return wrong


def _buckets(buckets: Buckets, clips: np.ndarray) -> dict[str, int]:
    """Clips in each bucket; ``short`` decides over those with too few frames."""
    numbers = buckets.assign(clips)
    counts = {
        " x ".join(map(str, shape)): int((numbers == number).sum())
        for number, shape in enumerate(buckets.shapes)
    }
    none = int((numbers < 0).sum())
    return {**counts, "too few frames": none} if none else counts


def find_splits(root: str | Path, splits: Sequence[str]) -> list[Path]:
    """The splits of a dataset that are there.

    Args:
        root: Folder of the splits.
        splits: Their names; the first must be there.

    Returns:
        Their folders.

    Raises:
        UserError: The first is not there.
    """
    if not Path(root, splits[0]).is_dir():
        raise UserError(f"{Path(root, splits[0])}: no such folder; unpack the dataset into {root}")
    return [Path(root, split) for split in splits if Path(root, split).is_dir()]


def check_tree(
    dataset: FileDataset, name: str, workers: int = 1, decode: bool = False
) -> list[Looked]:
    """Look at every file of a dataset and print what was found.

    Args:
        dataset: The dataset.
        name: What to call it.
        workers: Files that are looked at together.
        decode: Decode every frame.

    Returns:
        What was found.
    """
    found = list(survey(entries_of(dataset), workers, decode))
    report = summary(found)
    frames, sizes = report["frames"], list(report["sizes"])
    print(f"{name}: {len(found):,} clips")
    if frames:
        print(f"  frames    {frames['least']:,} to {frames['most']:,} in a clip")
        print(f"  pixels    {', '.join(sizes[:5])}{', ...' if len(sizes) > 5 else ''}")
    torn = [
        looked.entry["path"]
        for looked in found
        if looked.facts is not None
        and looked.facts.kind == "frames"
        and missing_numbers(frame_files(Path(dataset.data_root, looked.entry["path"])))
    ]
    if torn:
        print(f"warning: {len(torn):,} clips miss frames by their numbers, the first is {torn[0]}")
    for one in report["unreadable"]:
        print(f"unreadable: {one['path']}: {one['cause']}")
    print(f"  {len(found) - len(report['unreadable']):,} of {len(found):,} can be read")
    return found

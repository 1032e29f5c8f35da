"""Cached latents beside one file for each, and beside decoding."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.timing import Ratio, speed
from mmsora.datasets.cached import CachedLatents, NpyLatents, stack_latents
from mmsora.datasets.class_folder import ClassFolderVideos
from mmsora.datasets.transforms.loading import DecodeVideo, SampleFrames
from mmsora.datasets.transforms.packing import PackVideo
from mmsora.datasets.transforms.spatial import ResizeCrop
from mmsora.utils.feature_store import FeatureWriter
from mmsora.utils.npy_store import NpyWriter

__all__ = ["benchmark_cache"]

SHAPE = (4, 1, 32, 32)
BARS = {"cold": 3.0, "warm": 1.5, "disk": 0.7, "decoding": 20.0}


def write_both(root: Path, samples: int) -> tuple[CachedLatents, NpyLatents]:
    """The same latents and labels in both layouts.

    Args:
        root: Folder to write to.
        samples: How many.

    Returns:
        A dataset of each layout.
    """
    about: dict[str, Any] = {"rows": samples, "rows_per_shard": 1000, "samples": samples}
    about |= {"clips": 1, "flip": 0.0, "seed": 0, "vae": {}, "classes": None}
    shards = FeatureWriter(root / "shards", {**about, "layout": "shards"})
    files = NpyWriter(root / "npy", {**about, "layout": "npy"})
    generator = torch.Generator().manual_seed(0)
    for number in range(shards.num_shards):
        records = []
        for row in shards.rows_of(number):
            text = bytearray(json.dumps({"label": row % 1000}).encode())
            records.append(
                {
                    "moments": torch.randn(1, 1, *SHAPE, generator=generator),
                    "annotation": torch.frombuffer(text, dtype=torch.uint8),
                }
            )
        shards.write(number, records)
        files.write(number, [{**one, "moments": one["moments"][0, 0]} for one in records])
    shards.finish()
    return CachedLatents(str(root / "shards")), NpyLatents(str(root / "npy"))


def go_through(dataset: Any, workers: int, batch: int) -> None:
    """All samples once, in random order."""
    loader = DataLoader(
        dataset,
        batch,
        shuffle=True,
        num_workers=workers,
        collate_fn=stack_latents,
        generator=torch.Generator().manual_seed(0),
    )
    for _ in loader:
        pass


def take(dataset: Any, places: Iterable[int]) -> None:
    """Some samples, one after the other."""
    for place in places:
        dataset[place]


def seconds_of(function: Callable[[], None]) -> float:
    """Wall time of a call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def forget(root: Path) -> None:
    """Have the kernel drop its copies of files, so that they come from the disk again."""
    for path in root.rglob("*.*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def disk(root: Path) -> int:
    """Bytes that a folder takes on the disk."""
    return sum(path.stat().st_blocks * 512 for path in root.rglob("*"))


def benchmark_cache(args: argparse.Namespace) -> int:
    """Measure, and print the table.

    Args:
        args: The command line.

    Returns:
        1 if a bar is missed, else 0.
    """
    torch.set_num_threads(1)
    rows: list[tuple[str, Ratio, str]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        shards, files = write_both(root, args.samples)
        spent: dict[str, list[float]] = {}
        for number in range(args.rounds):
            pair = [("shards", shards), ("npy", files)]
            for name, dataset in pair if number % 2 else reversed(pair):
                forget(root)
                for state in ("cold", "warm"):
                    took = seconds_of(partial(go_through, dataset, args.workers, args.batch))
                    spent.setdefault(f"{name} {state}", []).append(took)
        for state in ("cold", "warm"):
            ratio = speed(spent[f"shards {state}"], spent[f"npy {state}"])
            figures = [args.samples / min(spent[f"{name} {state}"]) for name in ("shards", "npy")]
            rows.append((state, ratio, "{:,.0f} and {:,.0f} samples/s".format(*figures)))
        sizes = [disk(root / name) for name in ("shards", "npy")]
        share = sizes[0] / sizes[1]
        note = "{:.1f} and {:.1f} MiB".format(*(size / 2**20 for size in sizes))
        rows.append(("disk", Ratio(share, share, share), note))
    if args.clips:
        rows.append(against_decoding(args))
    return report(rows, args.out)


def against_decoding(args: argparse.Namespace) -> tuple[str, Ratio, str]:
    """Cached latents of clips beside decoding the clips.

    Args:
        args: The command line.

    Returns:
        A row of the table.
    """
    decoded = ClassFolderVideos(
        args.clips,
        [
            SampleFrames(num_frames=16, short="loop"),
            DecodeVideo(),
            ResizeCrop(size=256),
            PackVideo(),
        ],
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        about: dict[str, Any] = {"rows": 256, "rows_per_shard": 64, "samples": 256}
        about |= {"clips": 1, "flip": 0.5}
        about |= {"seed": 0, "vae": {}, "classes": None, "layout": "shards"}
        writer = FeatureWriter(folder, about)
        text = torch.frombuffer(bytearray(b'{"label": 1}'), dtype=torch.uint8)
        for number in writer.missing():
            moments = torch.randn(len(writer.rows_of(number)), 2, 2, 4, 16, 32, 32)
            writer.write(number, [{"moments": one, "annotation": text} for one in moments])
        writer.finish()
        cached, few = CachedLatents(folder), 8
        spent: dict[str, list[float]] = {"cached": [], "decoded": []}
        for number in range(args.rounds):
            begin = number * few
            for name, dataset, count in (("cached", cached, 256), ("decoded", decoded, few)):
                took = seconds_of(partial(take, dataset, range(begin, begin + count)))
                spent[name].append(took / count)
    note = "{:,.0f} and {:,.1f} clips/s, 16 frames".format(*(1 / min(s) for s in spent.values()))
    return "decoding", speed(spent["cached"], spent["decoded"]), note


def report(rows: list[tuple[str, Ratio, str]], out: str | None) -> int:
    """Print the table, and write it.

    Args:
        rows: What was measured, the ratio, and figures.
        out: JSON file.

    Returns:
        1 if a bar is missed, else 0.
    """
    missed, found = 0, {}
    for what, ratio, note in rows:
        bar = BARS[what]
        met = ratio.median <= bar if what == "disk" else ratio.median >= bar
        missed |= not met
        sign = "<=" if what == "disk" else ">="
        print(
            f"{what:9} {ratio.median:7.2f} [{ratio.low:.2f}, {ratio.high:.2f}]  {sign} {bar:<5}"
            f"{'ok' if met else 'MISSED':7} {note}"
        )
        found[what] = {**ratio._asdict(), "bar": bar, "met": met, "note": note}
    if out:
        Path(out).write_text(json.dumps(found, indent=2) + "\n")
    return int(missed)

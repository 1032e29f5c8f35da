"""Check a UCF-101 download: its classes, clips and lists, and that every clip can be decoded.

UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip come from
https://www.crcv.ucf.edu/data/UCF101.php. Unpack both into one folder:

    unrar x UCF101.rar data/ucf101/
    unzip UCF101TrainTestSplits-RecognitionTask.zip -d data/ucf101/
    python tools/prepare/ucf101.py

Nothing is changed. A part of UCF-101, or anything laid out like it, can be checked as well.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmsora.utils.user_error import UserError, user_errors_as_one_line

CLASSES, CLIPS = 101, 13_320
LISTS = {
    "trainlist01.txt": 9_537,
    "testlist01.txt": 3_783,
    "trainlist02.txt": 9_586,
    "testlist02.txt": 3_734,
    "trainlist03.txt": 9_624,
    "testlist03.txt": 3_696,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check a UCF-101 download.")
    parser.add_argument(
        "--root", default="data/ucf101", help="folder of UCF-101, or of the class folders"
    )
    parser.add_argument(
        "--lists",
        help="folder of classInd.txt and the train and test lists; default: "
        "ucfTrainTestlist beside UCF-101",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="clips decoded at the same time"
    )
    return parser.parse_args(argv)


def check_counts(classes: int, clips: int) -> Iterator[str]:
    """Warnings about a tree that is not all of UCF-101."""
    for what, found, expected in (("classes", classes, CLASSES), ("clips", clips, CLIPS)):
        if found != expected:
            yield f"UCF-101 has {expected:,} {what}, here are {found:,}"


def check_lists(folder: Path, found: dict[str, list[str]]) -> Iterator[str]:
    """Print how many clips the lists name.

    Args:
        folder: Of the lists.
        found: The clips of each class.

    Yields:
        Warnings.
    """
    from mmsora.datasets.class_folder import read_classes, read_split

    if not folder.is_dir():
        yield f"{folder}: no such folder, the lists are not checked"
        return
    there = {f"{name}/{file}" for name, files in found.items() for file in files}
    for name, expected in LISTS.items():
        if not (folder / name).is_file():
            yield f"{folder / name} is missing"
            continue
        named = read_split(folder / name)
        print(f"{name:16}{len(named):7,} clips")
        missing = [path for path in named if path not in there]
        if missing:
            yield f"{name}: {len(missing):,} clips are not there, the first is {missing[0]}"
        if len(named) != expected:
            yield f"{name} names {expected:,} clips in UCF-101, here {len(named):,}"
    if not (folder / "classInd.txt").is_file():
        yield f"{folder / 'classInd.txt'} is missing"
    elif set(read_classes(folder / "classInd.txt")) != set(found):
        yield "classInd.txt names other classes than there are folders"


def check_clips(paths: list[Path], workers: int) -> list[str]:
    """Decode every clip and print how long they are.

    Args:
        paths: Of the clips.
        workers: Clips decoded at the same time.

    Returns:
        A line for each clip that cannot be read.
    """
    from mmsora.utils.video_io import MediaError, VideoInfo, probe_video

    def probe(path: Path) -> VideoInfo | MediaError:
        try:
            return probe_video(path)
        except MediaError as error:
            return error

    infos, errors = [], []
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for number, result in enumerate(pool.map(probe, paths), start=1):
            if isinstance(result, MediaError):
                errors.append(str(result))
            else:
                infos.append(result)
            if number % 1000 == 0:
                print(f"{number:,} of {len(paths):,} clips decoded", flush=True)
    if infos:
        lengths = [info.frames for info in infos]
        sizes = sorted({f"{info.width}x{info.height}" for info in infos})
        print(f"frames          {min(lengths):7,} to {max(lengths):,} in a clip")
        print(f"pixels          {', '.join(sizes[:5])}{', ...' if len(sizes) > 5 else ''}")
    return errors


def main(argv: list[str] | None = None) -> int:
    """Check.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        1 when a clip cannot be read, else 0.
    """
    args = parse_args(argv)
    with user_errors_as_one_line():
        from mmsora.datasets.class_folder import VIDEO_EXTENSIONS
        from mmsora.datasets.file_dataset import scan_classes

        root = Path(args.root)
        if (root / "UCF-101").is_dir():
            root /= "UCF-101"
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; unpack UCF101.rar there")
        found = scan_classes(root, VIDEO_EXTENSIONS)
        paths = [root / name / file for name, files in found.items() for file in files]
        print(f"classes         {len(found):7,}")
        print(f"clips           {len(paths):7,}")
        warnings = [
            *check_counts(len(found), len(paths)),
            *check_lists(Path(args.lists or root.parent / "ucfTrainTestlist"), found),
        ]
        errors = check_clips(paths, args.workers)
    for warning in warnings:
        print(f"warning: {warning}")
    for error in errors:
        print(f"unreadable: {error}")
    print(f"{len(paths) - len(errors):,} of {len(paths):,} clips can be read")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

"""Unpack and check FaceForensics as Latte preprocessed it: one folder of face videos.

``FaceForensics.zip`` (27.8 GB) comes from https://huggingface.co/datasets/maxin-cn/FaceForensics,
by the authors of Latte; FaceForensics itself from https://github.com/ondyari/FaceForensics, whose
terms of use its users sign. What must lie where, whatever it came from:

    data/faceforensics/train/videos/*.mp4

    python tools/prepare/faceforensics.py --archive FaceForensics.zip
    python tools/prepare/faceforensics.py
"""

import argparse
import os
import sys

from mmsora.utils.user_error import user_errors_as_one_line

SPLITS = ("train",)
LATTE_FRAMES = 16  # Latte stops at clips with fewer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Unpack and check FaceForensics.")
    parser.add_argument("--root", default="data/faceforensics", help="folder of train/videos")
    parser.add_argument("--archive", help="the download, to unpack there first")
    parser.add_argument(
        "--decode", action="store_true", help="decode every frame, which alone finds all damage"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Unpack and check.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        1 when a video cannot be read, else 0.
    """
    args = parse_args(argv)
    with user_errors_as_one_line():
        from mmsora.datasets.class_folder import ClassFolderVideos
        from mmsora.datasets.survey import check_tree, find_splits
        from mmsora.utils.unpack import from_name, unpack

        if args.archive:
            unpack([args.archive], args.root, from_name(("train/videos",)))
        failed = 0
        for folder in find_splits(args.root, SPLITS):
            videos = ClassFolderVideos(str(folder))
            found = check_tree(videos, folder.name, args.workers, args.decode)
            failed += sum(looked.facts is None for looked in found)
            few = [f for f in found if f.facts is not None and f.facts.info.frames < LATTE_FRAMES]
            for looked in few:
                print(f"warning: {looked.entry['path']}: fewer than {LATTE_FRAMES} frames")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

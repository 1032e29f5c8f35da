"""Unpack and check Taichi-HD at 256 x 256 pixels: folders of frames.

Five parts of a zip file come from https://huggingface.co/datasets/maxin-cn/Taichi-HD, by the
authors of Latte. What must lie where, whatever it came from:

    data/taichi/frames/{train,test}/<clip>/*.png

    zip taichi-256-part.zip -s=0 --out taichi-256.zip
    python tools/prepare/taichi.py --archive taichi-256.zip
    python tools/prepare/taichi.py
"""

import argparse
import os
import sys
from pathlib import Path

from mmsora.utils.user_error import user_errors_as_one_line

SPLITS = ("frames/train", "frames/test")
SIDE = 256


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Unpack and check Taichi-HD.")
    parser.add_argument("--root", default="data/taichi", help="folder of frames/train")
    parser.add_argument("--archive", help="the download, to unpack there first")
    parser.add_argument(
        "--decode", action="store_true", help="read every frame and not only each clip's first"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Unpack and check.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        1 when a clip cannot be read, else 0.
    """
    args = parse_args(argv)
    with user_errors_as_one_line():
        from mmsora.datasets.frame_folder import FrameFolderVideos
        from mmsora.datasets.survey import check_tree, find_splits
        from mmsora.utils.unpack import from_name, unpack

        if args.archive:
            unpack([args.archive], args.root, from_name(SPLITS))
        failed = 0
        for folder in find_splits(args.root, SPLITS):
            name = str(Path(folder).relative_to(args.root))
            found = check_tree(FrameFolderVideos(str(folder)), name, args.workers, args.decode)
            failed += sum(looked.facts is None for looked in found)
            sizes = {f.facts.info[2:4] for f in found if f.facts is not None}
            if sizes - {(SIDE, SIDE)}:
                print(
                    f"warning: {name}: Latte does not resize Taichi-HD, its frames are {SIDE} x "
                    f"{SIDE} pixels; with others the config needs SquareCrop and ResizeCrop"
                )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

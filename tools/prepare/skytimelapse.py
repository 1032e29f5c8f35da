"""Unpack and check SkyTimelapse: folders of frames, the videos of Latte's configs.

``sky_timelapse.zip`` comes from https://huggingface.co/datasets/maxin-cn/SkyTimelapse, by the
authors of Latte. What must lie where, whatever it came from:

    data/sky/sky_train/<id>/<id>_<k>/*.jpg

    python tools/prepare/skytimelapse.py --archive sky_timelapse.zip
    python tools/prepare/skytimelapse.py
"""

import argparse
import os
import sys
from pathlib import Path

from mmsora.utils.user_error import user_errors_as_one_line

SPLITS = ("sky_train", "sky_test")
LATTE_FRAMES = 49  # Latte leaves out clips with fewer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Unpack and check SkyTimelapse.")
    parser.add_argument("--root", default="data/sky", help=f"folder of {' and '.join(SPLITS)}")
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
            clips = FrameFolderVideos(str(folder))
            found = check_tree(clips, Path(folder).name, args.workers, args.decode)
            failed += sum(looked.facts is None for looked in found)
            long = sum(f.facts is not None and f.facts.info.frames >= LATTE_FRAMES for f in found)
            print(f"  {long:,} clips have {LATTE_FRAMES} frames or more; Latte takes those")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Check Pixabay100, the hundred clips that lite-sora learns by heart.

``metadata.json`` lies in data/pixabay100 of https://github.com/modelscope/lite-sora and names a
hundred videos of https://pixabay.com, which are downloaded by hand. What must lie where:

    data/pixabay100/metadata.json
    data/pixabay100/videos/<name> (1080p).mp4

    python tools/prepare/pixabay100.py
"""

import argparse
import os
import sys
from pathlib import Path

from mmsora.utils.user_error import user_errors_as_one_line

CLIPS = 100


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check Pixabay100.")
    parser.add_argument("--root", default="data/pixabay100", help="folder of metadata.json")
    parser.add_argument(
        "--decode", action="store_true", help="decode every frame, which alone finds all damage"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Check.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        1 when a clip is missing or cannot be read, else 0.
    """
    args = parse_args(argv)
    with user_errors_as_one_line():
        from mmsora.datasets.annotated import AnnotatedVideos
        from mmsora.datasets.survey import check_tree

        clips = AnnotatedVideos(args.root, ann_file="metadata.json")
        found = check_tree(clips, "metadata.json", args.workers, args.decode)
        missing = [f for f in found if not Path(args.root, f.entry["path"]).exists()]
        silent = [f.entry["path"] for f in found if not f.entry.get("text")]
        if len(found) != CLIPS:
            print(f"warning: Pixabay100 has {CLIPS} clips, the list names {len(found)}")
        if silent:
            print(f"warning: {len(silent)} clips have no caption, the first is {silent[0]}")
        if missing:
            print(f"{len(missing)} of {len(found)} videos are still to be downloaded")
    return 1 if any(looked.facts is None for looked in found) else 0


if __name__ == "__main__":
    sys.exit(main())

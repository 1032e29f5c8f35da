"""Unpack and check ImageNet-1K, from OpenDataLab or from ImageNet's own site.

From OpenDataLab, with an account of it:

    pip install openxlab
    openxlab login
    openxlab dataset get --dataset-repo OpenDataLab/ImageNet-1K
    python tools/prepare/imagenet.py --archives OpenDataLab___ImageNet-1K/raw/*.tar.gz*

From https://image-net.org, with an account of it, ILSVRC2012_img_train.tar and
ILSVRC2012_img_val.tar; the classes of the latter's images are ``val.txt`` of
caffe_ilsvrc12.tar.gz:

    python tools/prepare/imagenet.py --archives ILSVRC2012_img_*.tar caffe_ilsvrc12.tar.gz
    python tools/prepare/imagenet.py

What lies where in the end, of which the validation images may be left out:

    data/imagenet/train/<class>/*.JPEG
    data/imagenet/val/*.JPEG and meta/val.txt, or val/<class>/*.JPEG
"""

import argparse
import os
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path, PurePosixPath

from mmsora.utils.user_error import UserError, user_errors_as_one_line

CLASSES = 1000
IMAGES = {"train": 1_281_167, "val": 50_000}
LISTS = ("train.txt", "val.txt")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Unpack and check ImageNet-1K.")
    parser.add_argument("--root", default="data/imagenet", help="folder of train and val")
    parser.add_argument(
        "--archives", nargs="+", default=[], help="the download, to unpack there first"
    )
    parser.add_argument(
        "--decode", action="store_true", help="decode every image: hours, for all of ImageNet"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


def place(archive: str, name: PurePosixPath) -> PurePosixPath | None:
    """Where a file of an archive goes.

    Args:
        archive: Name of the archive.
        name: Of the file in it.

    Returns:
        The place; None for what is not needed.
    """
    if archive.startswith("caffe_ilsvrc12"):
        return PurePosixPath("meta", name.name) if name.name in LISTS else None
    if "img_val" in archive:
        return PurePosixPath("val", name.name) if name.suffix == ".JPEG" else None
    if "img_train" in archive:  # a tar file of each class, or its files
        return PurePosixPath("train", *name.parts[-2:]) if name.suffix == ".JPEG" else None
    for known in ("train", "val", "meta"):  # OpenDataLab's: ImageNet-1K/train/...
        if known in name.parts[:-1]:
            return PurePosixPath(*name.parts[name.parts.index(known) :])
    return None


def unpack_all(archives: list[str], root: str) -> None:
    """Unpack what was downloaded; parts of an archive belong together.

    Args:
        archives: The files.
        root: Where to.

    Raises:
        UserError: One is not there, or none of ImageNet.
    """
    from mmsora.utils.unpack import unpack

    whole = defaultdict(list)
    for path in sorted(archives):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        whole[re.sub(r"\.\d+$", "", path)].append(path)
    for name, parts in whole.items():
        archive = Path(name).name
        if not unpack(parts, root, partial(place, archive)):
            raise UserError(f"{name}: nothing of ImageNet in it")


def main(argv: list[str] | None = None) -> int:
    """Unpack and check.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        1 when an image cannot be read, else 0.
    """
    args = parse_args(argv)
    with user_errors_as_one_line():
        from mmsora.datasets.image_folder import ImageNetFolder
        from mmsora.datasets.survey import check_tree, find_splits

        unpack_all(args.archives, args.root)
        failed = 0
        for folder in find_splits(args.root, tuple(IMAGES)):
            images = ImageNetFolder(args.root, split=folder.name)
            labels = {images.get_data_info(number)["label"] for number in range(len(images))}
            print(f"{folder.name}: {len(images):,} images in {len(labels):,} classes")
            for what, here, all_of_it in (
                ("images", len(images), IMAGES[folder.name]),
                ("classes", len(labels), CLASSES),
            ):
                if here != all_of_it:
                    print(f"warning: ImageNet-1K has {all_of_it:,} {what} there")
            if args.decode:
                found = check_tree(images, folder.name, args.workers, True)
                failed += sum(looked.facts is None for looked in found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Lists of clips in the formats that people keep them in: CSV, TSV, JSON, JSONL, Parquet, text."""

import csv
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsora.datasets.file_dataset import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, read_lines
from mmsora.utils.user_error import UserError

__all__ = ["find_list", "read_records"]

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# Two files of which a line of one belongs to the same line of the other.
PROMPTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
VIDEOS = ("videos.txt", "video.txt")
MERGED = "merge_data.txt"
NAMES = (*(f"metadata{kind}" for kind in TABLES), MERGED, *PROMPTS)

Record = dict[str, Any]


def find_list(root: str | Path) -> str | None:
    """The list of a folder, by its name.

    Args:
        root: The folder.

    Returns:
        ``metadata.csv`` and so on, or None where no such file is there.

    Raises:
        UserError: There is no such folder, or more than one list in it.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; set train_dataloader.dataset.data_root")
    found = [name for name in NAMES if Path(root, name).is_file()]
    if len(found) > 1:
        names = " and ".join(found)
        raise UserError(f"{root}: has {names}; say which with train_dataloader.dataset.ann_file")
    return found[0] if found else None


def read_records(root: str | Path, name: str | None) -> list[Record]:
    """The entries of a list as they stand in it.

    Args:
        root: What paths start from.
        name: The list in it. Without one, each video or image that has a text file of the same
            name beside it is an entry ``path``, ``text``.

    Returns:
        A dict for each entry.

    Raises:
        UserError: It cannot be read.
    """
    if name is None:
        return _pairs(Path(root))
    path = Path(root, name)
    if path.name in PROMPTS:
        return _aligned(path)
    if path.suffix == ".txt":
        return _merged(Path(root), path)
    return _table(path)


def _table(path: Path) -> list[Record]:
    readers = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}
    kind = path.suffix.lower()
    if kind not in readers:
        raise UserError(f"{path}: a list ends in {', '.join(TABLES)} or .txt")
    try:
        records = readers[kind](path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:  # of JSON and of encodings too
        raise UserError(f"{path}: not valid {kind[1:].upper()} ({error})") from error
    if not records:
        raise UserError(f"{path}: an empty list")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            what = type(record).__name__
            raise UserError(f"{path}: entry {number} is a {what}; a list of objects is needed")
    return records


def _csv(path: Path) -> list[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # captions may be long
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        records: list[Record] = list(csv.DictReader(file, delimiter=delimiter))
    for number, record in enumerate(records, 2):
        if None in record:
            raise ValueError(f"row {number} has more cells than the first row has names")
        if None in record.values():
            raise ValueError(f"row {number} has fewer cells than the first row has names")
    return records


def _json(path: Path) -> list[Record]:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, list):
        raise ValueError(f"a list of objects is needed, got a {type(content).__name__}")
    return content


def _jsonl(path: Path) -> list[Record]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def _parquet(path: Path) -> list[Record]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install pyarrow ({error})") from error
    return parquet.read_table(path).to_pylist()


def _aligned(path: Path) -> list[Record]:
    """``prompts.txt`` with a prompt in each line, ``videos.txt`` with its video."""
    videos = next((path.parent / name for name in VIDEOS if (path.parent / name).is_file()), None)
    if videos is None:
        raise UserError(f"{path}: has no {VIDEOS[0]} beside it")
    texts, files = read_lines(path), read_lines(videos)
    if len(texts) != len(files):
        raise UserError(f"{path}: {len(texts)} lines, {videos} has {len(files)}")
    return [{"path": file, "text": text} for file, text in zip(files, texts, strict=True)]


def _merged(root: Path, path: Path) -> list[Record]:
    """Lines ``folder,list``, as in Open-Sora-Plan's ``merge_data.txt``."""
    records = []
    for line in read_lines(path):
        folder, comma, name = line.rpartition(",")
        if not comma or not name.strip().endswith(TABLES):
            raise UserError(f"{path}: a line is FOLDER,LIST with a list of entries, got {line!r}")
        for record in _table(root / name.strip()):
            records.append({**record, "_folder": folder.strip()})
    return records


def _pairs(root: Path) -> list[Record]:
    """``a.mp4`` with ``a.txt`` beside it, in ``root`` or below."""
    kinds: Sequence[str] = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)
    records = []
    for folder, inside, files in os.walk(root, followlinks=True):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        there = set(files)
        for name in sorted(files):
            stem, kind = os.path.splitext(name)
            if kind.lower() in kinds and not name.startswith(".") and f"{stem}.txt" in there:
                text = " ".join(read_lines(Path(folder, f"{stem}.txt")))
                path = os.path.relpath(os.path.join(folder, name), root)
                records.append({"path": path, "text": text})
    if not records:
        raise UserError(
            f"{root}: no list ({', '.join(NAMES[:3])}, ...) and no pairs such as a.mp4 and a.txt; "
            "train_dataloader.dataset.ann_file names a list"
        )
    return records

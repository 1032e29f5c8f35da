"""Clips with captions in a list, as Open-Sora, finetrainers, Hugging Face and others have them."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmsora.datasets.file_dataset import FileDataset
from mmsora.datasets.records import find_list, read_records
from mmsora.registry import DATASETS
from mmsora.utils.user_error import UserError

__all__ = ["AnnotatedVideos"]

# What the columns are called elsewhere. A dot leads into an entry's own entries.
COLUMNS = {
    "path": ("path", "video_path", "file_name", "video", "image_path", "image", "file"),
    "text": ("text", "caption", "cap", "prompt", "captions"),
    "label": ("label",),
    "num_frames": ("num_frames", "frame"),
    "height": ("height", "resolution.height"),
    "width": ("width", "resolution.width"),
    "cut": ("cut",),
    "crop": ("crop",),
}
LENGTHS = {"cut": 2, "crop": 4}


@DATASETS.register_module()
class AnnotatedVideos(FileDataset):
    """Videos and images of a list, with their captions.

    The list is a table (``.csv``, ``.tsv``, ``.json``, ``.jsonl``, ``.parquet``) with a column
    for the path and, if there are captions, one for them; ``prompts.txt`` beside ``videos.txt``;
    or ``merge_data.txt`` with lines ``folder,list``. An entry may have several captions, of which
    each epoch takes one; frames ``cut`` (begin, end) and pixels ``crop`` (left, right, top,
    bottom) of Open-Sora-Plan's lists are what is read of its video.

    Args:
        data_root: Folder that the paths in the list start from.
        pipeline: Transforms, or dicts of them.
        ann_file: The list in it. By default ``metadata.csv`` (or ``.json`` and so on),
            ``merge_data.txt`` or ``prompts.txt``, whichever is there; where none is, each
            ``a.mp4`` with its caption in ``a.txt`` beside it.
        columns: What the list calls ``path``, ``text``, ``label``, ``num_frames``, ``height``,
            ``width``, ``cut`` and ``crop``, as far as it is not recognised; None for what is
            there but not to be read. ``resolution.height`` leads into an entry's own entries.
        seed: Of the random choices, not of the run.
        on_error: What to do with files that cannot be read: ``raise`` or ``skip``.
        indices: Take these samples alone, or so many from the start.
        test_mode: Nothing is chosen at random.
    """

    def __init__(
        self,
        data_root: str,
        pipeline: Sequence[Any] = (),
        ann_file: str | None = None,
        columns: Mapping[str, str | None] | None = None,
        seed: int = 0,
        on_error: str = "raise",
        indices: int | Sequence[int] | None = None,
        test_mode: bool = False,
    ) -> None:
        self.list_file, self.columns = ann_file, dict(columns or {})
        unknown = sorted(self.columns.keys() - COLUMNS.keys())
        if unknown:
            names = ", ".join(COLUMNS)
            raise ValueError(f"columns gives names to {names}; {unknown[0]!r} is none of them")
        super().__init__(data_root, pipeline, seed, on_error, indices, test_mode)

    def load_data_list(self) -> list[dict[str, Any]]:
        """What the list says of each sample, by our names."""
        name = self.list_file or find_list(self.data_root)
        where = os.path.join(self.data_root, name or "")
        records = read_records(self.data_root, name)
        columns = self._recognise(records, where)
        return [
            self._info(record, columns, f"{where}: entry {number}")
            for number, record in enumerate(records)
        ]

    def _recognise(self, records: Sequence[Mapping], where: str) -> dict[str, list[str]]:
        """The columns that stand for each of our names; entries need not have the same."""
        there = {path for record in records for path in _paths(record)}
        found = {
            ours: [name for name in names if name in there] for ours, names in COLUMNS.items()
        }
        for ours, name in self.columns.items():
            if name is not None and name not in there:
                raise UserError(
                    f"{where}: columns.{ours}={name!r}, but there are {_listed(there)}"
                )
            found[ours] = [] if name is None else [name]
        if not found["path"]:
            raise UserError(
                f"{where}: none of the columns {_listed(there)} is known to hold paths; say which "
                "with train_dataloader.dataset.columns.path"
            )
        return found

    @staticmethod
    def _info(record: Mapping, columns: Mapping[str, list[str]], where: str) -> dict[str, Any]:
        values = {}
        for ours, names in columns.items():
            given = [v for v in (_get(record, name) for name in names) if not _is_nothing(v)]
            if given:
                values[ours] = given[0]
        if not isinstance(values.get("path"), str):
            raise UserError(f"{where}: has no path, only {dict(record)}")
        info = {"path": os.path.join(record.get("_folder", ""), values.pop("path"))}
        texts = values.pop("text", None)
        if texts is not None:
            many = isinstance(texts, list | tuple)
            info["text"] = [str(text) for text in texts] if many else str(texts)
        for ours, value in values.items():
            try:
                info[ours] = _whole(value, LENGTHS.get(ours))
            except (TypeError, ValueError):
                what = f"{LENGTHS[ours]} whole numbers" if ours in LENGTHS else "a whole number"
                raise UserError(f"{where}: {ours} is {value!r}, not {what}") from None
        if "cut" in info:
            info["num_frames"] = info["cut"][1] - info["cut"][0]
        if "crop" in info:
            left, right, top, bottom = info["crop"]
            info["height"], info["width"] = bottom - top, right - left
        return info


def _whole(value: Any, length: int | None) -> int | list[int]:
    if length is None:
        return int(float(value))
    numbers = [int(number) for number in value]
    if len(numbers) != length:
        raise ValueError
    return numbers


def _paths(record: Mapping) -> list[str]:
    """The names of an entry's values, through its own entries."""
    paths = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            paths += [f"{key}.{inner}" for inner in value]
        paths.append(str(key))
    return paths


def _get(record: Mapping, name: str) -> Any:
    if name in record:
        return record[name]
    outer, _, inner = name.partition(".")
    value = record.get(outer)
    return value.get(inner) if isinstance(value, Mapping) else None


def _is_nothing(value: Any) -> bool:
    return value is None or value in ("", []) or (isinstance(value, float) and math.isnan(value))


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names - {"_folder"}))

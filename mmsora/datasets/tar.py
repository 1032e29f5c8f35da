"""Clips in tar files: WebDataset's shards."""

import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmsora.datasets.file_dataset import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, FileDataset
from mmsora.registry import DATASETS
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import MediaError

__all__ = ["TarVideos"]

CAPTIONS = ("text", "caption", "cap", "prompt")  # names in a .json
SHAPE = ("num_frames", "height", "width")


@DATASETS.register_module()
class TarVideos(FileDataset):
    """Videos and images in the tar files of a folder, as WebDataset lays them out.

    Members of one name belong together: ``a.mp4`` is a sample, ``a.txt`` its caption, ``a.cls``
    its class number, and ``a.json`` may have ``text`` (or ``caption``, a list of them too),
    ``label``, ``num_frames``, ``height`` and ``width``. The tars are gone through once at the
    start; then each sample is read from its place, in any order, without unpacking.

    Args:
        data_root: Folder of the tar files, which are taken in the order of their names.
        pipeline: Transforms, or dicts of them.
        pattern: Which of its files.
        seed: Of the random choices, not of the run.
        on_error: What to do with samples that cannot be read: ``raise`` or ``skip``.
        indices: Take these samples alone, or so many from the start.
        test_mode: Nothing is chosen at random.
    """

    def __init__(
        self,
        data_root: str,
        pipeline: Sequence[Any] = (),
        pattern: str = "*.tar",
        seed: int = 0,
        on_error: str = "raise",
        indices: int | Sequence[int] | None = None,
        test_mode: bool = False,
    ) -> None:
        self.pattern = pattern
        super().__init__(data_root, pipeline, seed, on_error, indices, test_mode)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Where each sample is in which tar, and what lies beside it."""
        root = Path(self.data_root)
        shards = sorted(path for path in root.glob(self.pattern) if path.is_file())
        if not shards:
            raise UserError(f"{root}: no {self.pattern} in it")
        infos = [info for shard in shards for info in _index(shard, shard.relative_to(root))]
        if not infos:
            kinds = ", ".join((*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS))
            raise UserError(f"{root}: no {kinds} files in its {len(shards)} tar files")
        return infos

    def fetch(self, results: dict[str, Any]) -> None:
        """Read the sample's file out of the tar."""
        offset, size = results["place"]
        try:
            with open(os.path.join(self.data_root, results["shard"]), "rb") as file:
                file.seek(offset)
                results["media"] = file.read(size)
        except OSError as error:
            raise MediaError(results["path"], error.strerror or error) from error
        if len(results["media"]) < size:
            raise MediaError(results["path"], "the tar file ends within it")


def _index(shard: Path, name: Path) -> list[dict[str, Any]]:
    """The samples of a tar file."""
    infos: dict[str, dict[str, Any]] = {}
    beside: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                stem, _, kind = base.partition(".")
                key, kind = os.path.join(folder, stem), f".{kind.lower()}"
                if not member.isfile() or not stem:
                    continue
                if kind.endswith((*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)):
                    if key in infos:
                        raise UserError(f"{shard}: two files are sample {key!r}: {member.name}")
                    infos[key] = {
                        "path": f"{name}/{member.name}",
                        "shard": str(name),
                        "place": (member.offset_data, member.size),
                    }
                elif kind in READERS:
                    content = tar.extractfile(member)
                    assert content is not None
                    beside.setdefault(key, {}).update(
                        _beside(kind, content.read(), f"{shard}: {member.name}")
                    )
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{shard}: not a whole tar file without compression ({error})") from error
    return [{**beside.get(key, {}), **info} for key, info in infos.items()]


def _beside(kind: str, content: bytes, where: str) -> dict[str, Any]:
    try:
        return READERS[kind](content.decode("utf-8-sig"))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {error}") from error


def _from_json(text: str) -> dict[str, Any]:
    entry = json.loads(text)
    info = {key: int(entry[key]) for key in ("label", *SHAPE) if entry.get(key) is not None}
    captions = [entry[key] for key in CAPTIONS if entry.get(key)]
    return {**info, "text": captions[0]} if captions else info


READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    ".txt": lambda text: {"text": " ".join(text.split())},
    ".cls": lambda text: {"label": int(text)},
    ".json": _from_json,
}

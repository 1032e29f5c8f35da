"""Latents one by one in files of their own, in the layout of fast-DiT and MiniSora-DiT."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmsora.utils.feature_store import FeatureWriter
from mmsora.utils.user_error import UserError

__all__ = ["NpyWriter"]


class NpyWriter(FeatureWriter):
    """Writes ``<name>_features/N.npy``, (1, c, h, w), and ``<name>_labels/N.npy``, (1,).

    Args:
        root: Folder to write to. One that is there must have the same manifest.
        manifest: Plain values; what lies in a shard elsewhere is written at once here.
        rank: Number of this process.
        world: Number of processes.
        name: What the names of the folders begin with.
    """

    def __init__(
        self,
        root: str | Path,
        manifest: Mapping[str, Any],
        rank: int = 0,
        world: int = 1,
        name: str = "imagenet256",
    ) -> None:
        self._features, self._labels = (
            Path(root, f"{name}_{kind}") for kind in ("features", "labels")
        )
        super().__init__(root, {**manifest, "name": name}, rank, world)

    def _clean(self) -> None:
        for folder in (self._features, self._labels):
            for left in folder.glob(".*.tmp.npy"):
                row = left.name.split(".")[1]
                if row.isdigit() and int(row) // self.rows_per_shard % self.world == self.rank:
                    left.unlink(missing_ok=True)

    def _is_there(self, shard: int) -> bool:
        # A latent comes after its label.
        return all((self._features / f"{row}.npy").exists() for row in self.rows_of(shard))

    def write(self, shard: int, records: Sequence[Mapping[str, Tensor]]) -> None:
        """Write the latents of a shard and their labels.

        Args:
            shard: Its number.
            records: ``moments``, a latent (c, 1, h, w), and ``annotation`` of each sample.

        Raises:
            UserError: A sample is a clip, or has no label.
        """
        written: list[tuple[Path, Path]] = []
        for row, record in zip(self.rows_of(shard), records, strict=True):
            latent, about = record["moments"], json.loads(record["annotation"].numpy().tobytes())
            if latent.shape[1] != 1:
                raise UserError(
                    f"sample {row} has {latent.shape[1]} frames: the npy layout is for images"
                )
            if "label" not in about:
                raise UserError(f"sample {row} has no label, which the npy layout stores")
            label = np.array([about["label"]])
            written.append(_save(self._labels / f"{row}.npy", label))
            written.append(_save(self._features / f"{row}.npy", latent.transpose(0, 1).numpy()))
        os.sync()  # once: flushing file by file takes longer than encoding
        for temporary, path in written:
            os.replace(temporary, path)

    def finish(self) -> int:
        """How many shards are missing, of all processes."""
        return sum(not self._is_there(shard) for shard in range(self.num_shards))


def _save(path: Path, array: np.ndarray) -> tuple[Path, Path]:
    """Write beside a path, under a name that is not read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npy")
    np.save(temporary, array)
    return temporary, path

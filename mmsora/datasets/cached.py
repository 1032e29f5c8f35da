"""Latents that were computed before: training on them needs no VAE, and no text encoder."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmsora.registry import DATASETS, FUNCTIONS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws
from mmsora.utils.feature_store import MANIFEST, FeatureStore, read_manifest
from mmsora.utils.user_error import UserError

__all__ = ["CachedLatents", "NpyLatents", "stack_latents"]

EMBEDDINGS = ("text_embedding", "image_text_embeddings")
SEEN = "seen."  # in a store, before what a conditioner saw in both sides of a clip


@FUNCTIONS.register_module()
def stack_latents(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One tensor for a batch, which passes from a worker to its trainer faster than many."""
    return {
        "inputs": torch.stack([sample["inputs"] for sample in batch]),
        "data_samples": [sample["data_samples"] for sample in batch],
    }


class _Epochs:
    """Indices beyond the length count epochs, as in datasets of files."""

    takes_epochs = True

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, idx: int) -> dict[str, Any]:
        raise NotImplementedError

    def locate(self, idx: int) -> tuple[int, int]:
        """The epoch and the number of a sample."""
        if idx < 0:
            raise IndexError(f"samples are counted from 0, got {idx}")
        return divmod(int(idx), len(self))


@DATASETS.register_module()
class CachedLatents(_Epochs):
    """What ``tools/extract_features.py`` wrote, in the order of the dataset that it was made of.

    Gives the mean and standard deviation of each latent, (2, c, t, h, w), or of VAEs that draw
    none the latent, (1, c, t, h, w). A sample has the index, flip and annotation that the dataset
    itself gives it, so that the loss is the same, and for a model of texts its ``text_embedding``,
    (tokens, channels) in float32 with the states of padding too, and ``text_mask``, which tokens
    are the text's own. What conditioners saw in the clip is there too, in float32.

    Args:
        data_root: Folder of the cache.
        seed: Of flips; None takes the dataset's own.
        test_mode: Nothing is flipped.
    """

    def __init__(self, data_root: str, seed: int | None = None, test_mode: bool = False) -> None:
        self.data_root, self.test_mode = str(data_root), test_mode
        about = read_manifest(data_root)
        if about["layout"] != "shards":
            raise UserError(f"{data_root}: written with --layout npy; read it as NpyLatents")
        self._store = FeatureStore(data_root)
        self._flip, self._clips, self._size = about["flip"], about["clips"], about["samples"]
        self.seed = about["seed"] if seed is None else seed
        self.latents_of, self.metainfo = about["vae"], _metainfo(about)
        self.texts_of: dict[str, Any] | None = about.get("text")
        self.seen_by: dict[str, Any] = about.get("seen") or {}
        self._tensors = [key for key in self._store.names if key.startswith("sample.")]
        self._seen = [key for key in self._store.names if key.startswith(SEEN)]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, idx: int) -> dict[str, Any]:
        epoch, number = self.locate(idx)
        row = number * self._clips + epoch % self._clips
        flipped = 0
        if self._flip and not self.test_mode:
            chance = Draws(self.seed, [number], epoch).uniform("clip flip").item()
            flipped = int(chance < self._flip)
        sample = VideoSample(index=int(idx), **self._annotation(row))
        for key in self._tensors:
            value, name = self._store.read(key, row), key.removeprefix("sample.")
            setattr(sample, name, value.float() if name in EMBEDDINGS else value)
        for key in self._seen:
            value = self._store.read(key, row, flipped).float()
            setattr(sample, key.removeprefix(SEEN), value)
        inputs = self._store.read("moments", row, flipped)
        return {"inputs": inputs, "data_samples": sample}

    def texts(self) -> dict[str, torch.Tensor]:
        """The embeddings of the empty text and of the prompts that were extracted.

        Returns:
            By text, each (tokens, channels) in float32.

        Raises:
            UserError: There are none.
        """
        shared = self._store.shared()
        if "texts" not in shared:
            raise UserError(
                f"{self.data_root} has no embedding of the empty text; run "
                "tools/extract_features.py again: only what is missing is made"
            )
        known = json.loads(shared["texts"].numpy().tobytes())
        return dict(zip(known, shared["text_embeddings"].float(), strict=True))

    def _annotation(self, row: int) -> dict[str, Any]:
        return json.loads(self._store.read("annotation", row).numpy().tobytes())


@DATASETS.register_module()
class NpyLatents(_Epochs):
    """One file for each latent and one for its label, as MiniSora-DiT and fast-DiT write them.

    ``<data_root>/<name>_features/N.npy`` is a latent (1, c, h, w), drawn and scaled,
    ``<data_root>/<name>_labels/N.npy`` its label (1,). The two are paired by their names.
    Written by ``tools/extract_features.py --layout npy`` they say which VAE made them.

    Args:
        data_root: Folder of the two folders.
        name: What the names of the folders begin with.
    """

    def __init__(self, data_root: str, name: str = "imagenet256") -> None:
        self.data_root = str(data_root)
        ours = Path(data_root, MANIFEST).is_file()
        about = read_manifest(data_root) if ours else {"vae": {}, "classes": None}
        self.latents_of, self.metainfo = about["vae"], _metainfo(about)
        self._features = os.path.join(data_root, f"{name}_features")
        self._labels = os.path.join(data_root, f"{name}_labels")
        features, labels = _stems(self._features), _stems(self._labels)
        for stems, others, folder in (
            (features, labels, self._labels),
            (labels, features, self._features),
        ):
            alone = sorted(stems - others, key=_by_number)
            if alone:
                missing = os.path.join(folder, f"{alone[0]}.npy")
                more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
                raise UserError(f"{missing}{more}: missing, its partner is there")
        self._names = np.array(sorted(features, key=_by_number))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        _, number = self.locate(idx)
        name = f"{self._names[number]}.npy"
        latent = _load(os.path.join(self._features, name))
        if latent.ndim != 4 or len(latent) != 1:
            raise UserError(
                f"{os.path.join(self._features, name)}: a latent is (1, c, h, w), got "
                f"{tuple(latent.shape)}"
            )
        inputs = torch.from_numpy(latent).unsqueeze(2)
        label = int(_load(os.path.join(self._labels, name)).item())
        return {"inputs": inputs, "data_samples": VideoSample(index=int(idx), label=label)}


def _metainfo(about: dict[str, Any]) -> dict[str, Any]:
    return {} if about["classes"] is None else {"classes": tuple(about["classes"])}


def _stems(folder: str) -> set[str]:
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; set train_dataloader.dataset.data_root")
    found = {file.removesuffix(".npy") for file in os.listdir(folder) if file.endswith(".npy")}
    found = {stem for stem in found if not stem.startswith(".")}
    if not found:
        raise UserError(f"{folder}: no .npy files in it")
    return found


def _by_number(stem: str) -> tuple[int, str]:
    return (int(stem), stem) if stem.isdecimal() else (-1, stem)


def _load(path: str) -> np.ndarray:
    try:
        return np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error

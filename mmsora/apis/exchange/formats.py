"""Weights of a denoiser out of a checkpoint, into other formats, and back."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmsora.apis.build import FOR_TRAINING, config_of
from mmsora.apis.exchange.stored import (
    CONFIG_FILE,
    CONFIG_KEY,
    WEIGHTS_FILE,
    Stored,
    content_of,
)
from mmsora.registry import DENOISERS
from mmsora.utils.atomic import write_json
from mmsora.utils.checkpoint import LoadReport, load_denoiser, save_checkpoint
from mmsora.utils.checkpoint_folder import is_folder, save_folder
from mmsora.utils.config_check import check_config, config_dict, user_errors
from mmsora.utils.user_error import UserError
from mmsora.utils.weights_file import write_weights_file
from mmsora.version import __version__

__all__ = ["FORMATS", "export_weights", "import_weights", "public_weights"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT = ("iter", "cfg", "seed", "experiment_name", "time", "mmsora_version")  # of a run's meta
RAW = {"state_dict": "denoiser.", "model": ""}  # parts of raw weights, and what names begin with
LABELS = "embed_label.weight"


def export_weights(
    stored: Stored,
    out: str | Path,
    form: str = "safetensors",
    which: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> str:
    """Write a denoiser's weights alone.

    Args:
        stored: A checkpoint of ours.
        out: File or folder to write; it appears whole or not at all.
        form: One of ``FORMATS``.
        which: ``ema`` or ``raw``; None takes the average where there is one.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None leaves each as it is.
        force: Whether to replace what is there.

    Returns:
        What was written, in words.

    Raises:
        UserError: The checkpoint has no config or not these weights, the denoiser has no such
            format, or ``out`` is taken.
    """
    out = Path(out)
    part, names = _names_of(stored, which)
    cfg = config_of({"meta": stored.meta}, stored.path)
    _check_free(out, force, is_ours=form == "diffusers" and (out / CONFIG_FILE).is_file())
    weights = {key: stored.read(name) for key, name in names.items()}
    if dtype is not None:
        weights = {
            k: v.to(DTYPES[dtype]) if v.is_floating_point() else v for k, v in weights.items()
        }
    written = FORMATS[form](out, weights, cfg, _kept(stored.meta, part))
    average = "averaged" if part == "ema" else "raw"
    return f"{average} weights of {_kind(cfg)}, {len(weights)} tensors, {written}"


def _names_of(stored: Stored, which: str | None) -> tuple[str, dict[str, str]]:
    """Whether they are ``ema`` or the raw ``model``, and flat names by the denoiser's own."""
    of_model = ("denoiser.", *FOR_TRAINING)
    beside = [key for key in stored.named("state_dict") if not key.startswith(of_model)]
    if beside:
        raise UserError(
            f"{stored.path} has trained weights beside the denoiser's, as {beside[0]}, which "
            "would be lost"
        )
    average = stored.named("ema")
    if average and which != "raw":
        return "ema", average
    for part, start in RAW.items():
        found = stored.named(part)
        names = {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
        if names and which != "ema":
            return "model", names
    wanted = {"ema": "averaged ", "raw": "raw "}.get(which or "", "")
    hint = "" if "cfg" in stored.meta else "; import it first, with its config"
    raise UserError(f"{stored.path} holds no {wanted}weights of a checkpoint of ours{hint}")


def _build(cfg: Config) -> Any:
    if "model" not in cfg:
        raise UserError("the config has no model, so no denoiser")
    init_default_scope("mmsora")
    with user_errors():
        return DENOISERS.build(cfg.model.denoiser)


def _merged(cfg: Config, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The denoiser without memory, and its weights; with additions to them the one that these are
    made to, and their sums."""
    with torch.device("meta"):
        denoiser = _build(cfg)
    if not hasattr(type(denoiser), "merged"):
        return denoiser, weights
    denoiser.load_state_dict(weights, assign=True)
    return denoiser.base, denoiser.merged()


def _kind(cfg: Config) -> str:
    """The denoiser's class; a config in a checkpoint has its dotted name."""
    return cfg.model.denoiser.type.rpartition(".")[2]


def _kept(meta: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What goes along with weights."""
    classes = [str(name) for name in (meta.get("dataset_meta") or {}).get("classes", ())]
    told = {"dataset_meta": {"classes": classes}} if classes else {}
    return {**{key: meta[key] for key in KEPT if key in meta}, **told, "part": part}


def _check_free(out: Path, force: bool, is_ours: bool) -> None:
    """Nothing is overwritten unasked, and no folder of other things at all."""
    if out.is_dir() and not is_ours:
        raise UserError(f"{out} is a folder of other things; choose another place")
    if out.exists() and not force:
        raise UserError(f"{out} exists; choose another place, or --force")


# Formats


def _write_safetensors(
    out: Path, weights: dict[str, Tensor], cfg: Config, meta: dict[str, Any]
) -> str:
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors")
    write_weights_file(out, weights, meta["part"], meta)
    return "with their config"


def _write_public(out: Path, weights: dict[str, Tensor], cfg: Config, meta: dict[str, Any]) -> str:
    theirs = public_weights(*_merged(cfg, weights))
    if out.suffix == ".safetensors":
        write_weights_file(out, theirs)
    elif out.suffix in (".pt", ".pth"):
        save_checkpoint(theirs, out)
    else:
        raise UserError(f"{out} must end in .pt, .pth or .safetensors")
    return "by the names of its authors"


def _write_diffusers(
    out: Path, weights: dict[str, Tensor], cfg: Config, meta: dict[str, Any]
) -> str:
    denoiser, weights = _merged(cfg, weights)
    # Of the class: a network within another one cannot speak for it.
    theirs = denoiser.diffusers_config if hasattr(type(denoiser), "diffusers_config") else None
    config = theirs or {"_class_name": type(denoiser).__name__, "_mmsora_version": __version__}
    with _whole_folder(out) as folder:
        write_weights_file(folder / WEIGHTS_FILE, weights)
        write_json(folder / CONFIG_FILE, {**config, CONFIG_KEY: meta})
    whose = "diffusers' class" if theirs else "a class of ours, which diffusers does not have"
    return f"for {config['_class_name']}, {whose}"


FORMATS = {
    "safetensors": _write_safetensors,
    "diffusers": _write_diffusers,
    "public": _write_public,
}


@contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """Lend a hidden folder that takes the place of ``path`` when the block ends well."""
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{name}") for name in ("tmp", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def public_weights(denoiser: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``load_denoiser`` undoes: names and shapes as in the authors' files.

    Args:
        denoiser: Whose class knows the names, by ``public_keys`` or ``to_public``.
        weights: Its own.

    Returns:
        The same. A table of positions that is not of a square is left out, as there is none.

    Raises:
        UserError: Its authors have published no files, or the class does not know their names.
    """
    network: Any = denoiser
    kind = type(network)  # a network within another one cannot speak for it
    if hasattr(kind, "to_public"):
        return network.to_public(weights)
    if not hasattr(kind, "public_keys"):
        raise UserError(f"{kind.__name__} has no public format; take another --format")
    ours, span = dict(weights), network.patch
    if network.grid[1] != network.grid[2]:
        del ours["pos_embed"]
    for table in ("pos_embed", "temp_embed"):
        if table in ours:
            ours[table] = ours[table][None]
    sides = span if span[0] > 1 else span[1:]  # theirs are of images
    flat = ours["embed.proj.weight"]
    ours["embed.proj.weight"] = flat.reshape(len(flat), network.in_channels, *sides)
    return {_public_name(key, kind.public_keys): value for key, value in ours.items()}


def _public_name(key: str, public_keys: Sequence[tuple[str, str]]) -> str:
    """The inverse of ``re.sub(pattern, ours, key)`` for patterns of words and one group."""
    for pattern, ours in public_keys:
        group = re.search(r"\(.*\)", pattern)
        theirs = pattern.replace(group[0], r"\1") if group else pattern
        found = re.escape(ours).replace(r"\\1", group[0] if group else "")
        key = re.sub(f"^{found}", theirs.replace(r"\.", "."), key)
    return key


# Import


def import_weights(
    source: str | Path, out: str | Path, config: Config | None = None, force: bool = False
) -> LoadReport:
    """Make a checkpoint folder of weights, which sampling and ``load_from`` take.

    What the source has nothing for is left out of it, so that later it is missing still, and not
    made up.

    Args:
        source: A checkpoint, a file of ours or of the authors', or a folder of diffusers' kind.
        out: The folder to write.
        config: Of the model; None takes the source's own.
        force: Whether to replace a checkpoint.

    Returns:
        What did not fit straight.

    Raises:
        UserError: There is no config, the weights are not of its denoiser, or ``out`` is taken.
    """
    source, out = Path(source), Path(out)
    _check_free(out, force, is_folder(out))
    content = content_of(source)
    cfg = config or config_of(content, source)
    init_default_scope("mmsora")
    check_config(cfg)
    denoiser = _build(cfg)
    report = load_denoiser(denoiser, content, str(source))
    weights = {k: v for k, v in denoiser.state_dict().items() if not _is_kept(k, report.kept)}
    for key in weights:
        if key.endswith(LABELS) and not getattr(denoiser, "knows_null", True):
            weights[key] = weights[key][:-1]  # it has no row for "none"
    meta = _kept(content.get("meta") or {}, "ema") | {
        "cfg": json.dumps(config_dict(cfg)),
        "imported_from": source.name,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "mmsora_version": __version__,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_folder({"meta": meta, "ema": weights}, out)
    return report


def _is_kept(key: str, kept: Sequence[str]) -> bool:
    return key in kept or key.removeprefix("image.") in kept

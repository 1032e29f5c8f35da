"""Checkpoints, ours and public ones: whole or not there, read without running code."""

import argparse
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmsora.utils.atomic import atomic_path
from mmsora.utils.checkpoint_folder import CheckpointFolder, is_folder, is_whole
from mmsora.utils.shards import part_of
from mmsora.utils.user_error import UserError
from mmsora.utils.weights_file import read_weights_file

__all__ = [
    "WEIGHTS",
    "LoadReport",
    "check_sizes",
    "latest_checkpoint",
    "load_checkpoint",
    "load_denoiser",
    "load_weights",
    "numbered_checkpoints",
    "plain",
    "save_checkpoint",
]

WEIGHTS = ("state_dict", "ema")  # parts of a checkpoint that inference needs


def plain(value: Any) -> Any:
    """A copy of plain types only: what is neither number, text, tensor nor container is left out.

    Args:
        value: Anything.

    Returns:
        The copy. Tensors are on the CPU.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items() if _is_plain(v)}
    if isinstance(value, list | tuple):
        items = [plain(v) for v in value if _is_plain(v)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _is_plain(value: Any) -> bool:
    types = Tensor | Mapping | list | tuple | str | bytes | bool | int | float | None
    return isinstance(value, types) and type(value).__module__ != "numpy"


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a single file; a kill at any moment leaves the old file or the new one, whole.

    Args:
        checkpoint: Plain types and tensors.
        path: Where to.
    """
    with atomic_path(path) as temporary:
        torch.save(dict(checkpoint), temporary)


def load_checkpoint(path: str | Path, parts: Collection[str] | None = None) -> dict[str, Any]:
    """Read a checkpoint to the CPU. No code in it is run.

    Args:
        path: Ours is a folder ``iter_N``; public ones are files, and so are weights of ours
            that are written alone.
        parts: Of a folder, read only tensors of these parts, such as ``ema``; None reads all.

    Returns:
        Its content.

    Raises:
        UserError: There is no such checkpoint, or it is none.
    """
    path = Path(path)
    if is_folder(path):
        return CheckpointFolder(path).load(parts)
    if path.is_dir():
        newest = latest_checkpoint(path)
        hint = f"; its newest checkpoint is {newest}" if newest else ""
        raise UserError(f"{path} is no checkpoint, it is a folder{hint}")
    if not path.is_file():
        near = [
            near
            for near in path.parent.glob("*")
            if _numbered(near) is not None or (near.suffix == ".pth" and near.name[0] != ".")
        ]
        near = sorted(near, key=lambda near: near.stat().st_mtime)[-3:]
        hint = f"; there are {', '.join(p.name for p in near)}" if near else ""
        raise UserError(f"checkpoint {path} does not exist{hint}")
    if is_folder(path.parent):
        raise UserError(f"{path} is a part of the checkpoint {path.parent}; give the folder")
    try:
        content = _read(path)
    except Exception as error:  # any bytes may be fed to the unpickler
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it is empty"
        if reason.startswith("Weights only"):  # PyTorch goes on to advise running its code
            reason = "it holds more than weights"
        raise UserError(
            f"checkpoint {path} cannot be read, it is truncated or no checkpoint: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not a dict")
    return content


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return read_weights_file(path)
    # The public trainers keep their command line beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load all weights of a module, or name what does not fit.

    Args:
        module: Where to.
        weights: Its state dict.
        source: Where the weights come from, for the message.

    Raises:
        UserError: Keys or shapes differ: the checkpoint is of another architecture.
    """
    check_sizes(module, {key: value.shape for key, value in weights.items()}, source)
    module.load_state_dict(weights, strict=False)  # what a module leaves out, as a VAE, stays


def check_sizes(module: nn.Module, sizes: Mapping[str, torch.Size], source: str | Path) -> None:
    """Name what of a state dict does not fit a module.

    Args:
        module: The module.
        sizes: Of all weights in the state dict.
        source: Where it comes from, for the message.

    Raises:
        UserError: Keys or shapes differ: the checkpoint is of another architecture.
    """
    own = {key: value.shape for key, value in module.state_dict().items()}
    faults = [f"missing {key}" for key in own if key not in sizes]
    faults += [f"unknown {key}" for key in sizes if key not in own]
    faults += [
        f"{key} is {tuple(sizes[key])} there and {tuple(own[key])} here"
        for key in own
        if key in sizes and sizes[key] != own[key]
    ]
    if faults:
        raise UserError(
            f"{source} is of another architecture than the config's "
            f"{type(module).__name__}: {_first_of(faults, '; ')}"
        )


def _first_of(items: Sequence[str], joint: str) -> str:
    """Three of them, and how many more there are."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{joint.join(items[:3])}{more}"


class LoadReport(NamedTuple):
    """What did not go straight from a file into a denoiser.

    Attributes:
        changed: Keys of ours whose weights were cut or resized to fit, and how.
        kept: Keys of ours that the file has nothing for; they stay as they were.
        unused: Keys of the file that the denoiser has no place for.
    """

    changed: list[str]
    kept: list[str]
    unused: list[str]

    def lines(self, source: str | Path) -> list[str]:
        """What a log says of it.

        Args:
            source: The file.

        Returns:
            A line for each kind, none where all went straight.
        """
        unlike = [key for key in self.kept if key in self.unused]
        kinds = {
            f"{source}: changed to fit": self.changed,
            f"of another shape in {source}, as initialised": unlike,
            f"not in {source}, as initialised": [k for k in self.kept if k not in unlike],
            f"in {source} alone, left out": [k for k in self.unused if k not in unlike],
        }
        many = {kind: f"{len(keys)} tensors, " for kind, keys in kinds.items() if len(keys) > 3}
        return [
            f"{kind}: {many.get(kind, '')}{_first_of(keys, ', ')}"
            for kind, keys in kinds.items()
            if keys
        ]


def load_denoiser(
    denoiser: nn.Module,
    source: str | Path | Mapping[str, Any],
    name: str | None = None,
    projector: nn.Module | None = None,
) -> LoadReport:
    """Load weights of ours, or those of the public DiT, SiT and Latte, into a denoiser.

    Averaged weights are taken where there are any. What may differ, does: outputs of a learned
    variance are dropped where the denoiser has none; tables of positions are resized; of a label
    table of ``num_classes`` rows, of a model trained without label dropout, the row for "none"
    stays the denoiser's own (``knows_null`` turns False, and guidance is refused); one of another
    number of classes, or tables that the file does not have, leave the denoiser's own.

    Args:
        denoiser: Where to. ``public_keys`` of its class maps public names to its own.
        source: A file, or its content.
        name: What messages call the source; a file is called by its path.
        projector: Takes the file's REPA projector where it fits; without one that is left out.

    Returns:
        What was not loaded straight.

    Raises:
        UserError: The file cannot be read, or anything else does not fit; every key is named.
    """
    name = name or ("the state dict" if isinstance(source, Mapping) else str(source))
    content = source if isinstance(source, Mapping) else load_checkpoint(source)
    found = _numbered_on(_weights_in(content))
    if not found:
        raise UserError(f"{name} holds no weights of a denoiser")
    if hasattr(type(denoiser), "bare"):
        return _load_adapted(denoiser, found, name)
    if hasattr(denoiser, "temporal") and hasattr(denoiser, "image"):
        return _load_video(denoiser, found, name)
    if hasattr(denoiser, "from_public"):
        found = cast(Any, denoiser).from_public(found)
    keys = getattr(denoiser, "public_keys", ())
    weights = {_our_name(k, keys): v for k, v in found.items()}
    own = denoiser.state_dict()
    fitted, report, faults = _matched(denoiser, weights, own)
    if faults:
        raise UserError(
            f"{name} is of another architecture than the config's {type(denoiser).__name__}: "
            f"{'; '.join(faults)}"
        )
    parts = {key: part_of(value, own[key]) for key, value in fitted.items()}
    denoiser.load_state_dict(parts, strict=False)
    if "embed_label.weight" in fitted:
        rows = len(weights["embed_label.weight"])
        cast(Any, denoiser).knows_null = rows == len(own["embed_label.weight"])
    if projector is not None:
        _load_projector(projector, content, report)
    return report


def _load_adapted(denoiser: Any, found: Mapping[str, Tensor], name: str) -> LoadReport:
    """Into a denoiser with low-rank additions, of which a file of another has none."""
    if any(key.startswith("base.") for key in found):
        load_weights(denoiser, found, name)
        return LoadReport([], [], [])
    with denoiser.bare() as base:
        return load_denoiser(base, found, name)


def _load_video(denoiser: nn.Module, found: Mapping[str, Tensor], name: str) -> LoadReport:
    """Into a denoiser of images with temporal layers, of which a file of images has none."""
    parts: dict[str, dict[str, Tensor]] = {"image": {}, "temporal": {}}
    for key, value in found.items():
        part = "temporal" if key.startswith("temporal.") else "image"
        parts[part][key.removeprefix(f"{part}.")] = value
    image, temporal = (cast(nn.Module, getattr(denoiser, part)) for part in parts)
    report = load_denoiser(image, parts["image"], name)
    if parts["temporal"]:
        load_weights(temporal, parts["temporal"], name)
    else:
        report.kept.extend(f"temporal.{key}" for key in temporal.state_dict())
    return report


def _load_projector(projector: nn.Module, content: Mapping[str, Any], report: LoadReport) -> None:
    """Load the first of a public file's projectors, or ours, where it fits; report where not."""
    found: dict[str, Tensor] = {}
    for part in (content, *(content.get(name) for name in ("ema", "model", "state_dict"))):
        for key, value in part.items() if isinstance(part, Mapping) else ():
            if match := re.fullmatch(PROJECTOR, key):
                found.setdefault(match[1], value)
    own = projector.state_dict()
    if {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}:
        projector.load_state_dict({k: part_of(v, own[k]) for k, v in found.items()})
        report.unused[:] = [key for key in report.unused if not key.startswith("projectors.0.")]
    else:
        report.kept.append("alignment.projector")


def _matched(
    denoiser: nn.Module, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], LoadReport, list[str]]:
    """What of the weights fits, what was done with the rest, and what is wrong."""
    fitted: dict[str, Tensor] = {}
    report, faults = LoadReport([], [], []), []
    for key, value in weights.items():
        fit = _fit(denoiser, key, value, own[key]) if key in own else None
        if fit is not None:
            fitted[key] = fit
            if fit.numel() != value.numel() or (key == "pos_embed" and fit.ne(value).any()):
                note = " (the variance is left out)" if key.startswith("head.") else ""
                report.changed.append(f"{key} {tuple(value.shape)} -> {tuple(fit.shape)}{note}")
        elif key.startswith(OPTIONAL):
            report.unused.append(key)
        elif key in own:
            faults.append(f"{key} {tuple(value.shape)} there, {tuple(own[key].shape)} here")
        else:
            faults.append(f"unknown {key}")
    for key in own:
        if key not in weights and not key.startswith(OPTIONAL):
            faults.append(f"missing {key}")
        elif key not in fitted:
            report.kept.append(key)
    return fitted, report, faults


# What may be missing or left over: tables, labels, texts, and REPA's projectors.
OPTIONAL = ("pos_embed", "temp_embed", "embed_label.", "embed_text.", "projectors.")

PROJECTOR = r"(?:module\.)?(?:projectors\.0|alignment\.projector)\.(.+)"


def _weights_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The denoiser's weights in any container, averaged ones first."""
    for name in ("ema", "model", "state_dict"):
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    found = {k.removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    if any(key.startswith("denoiser.") for key in found):
        found = {k[9:]: v for k, v in found.items() if k.startswith("denoiser.")}
    return found


def _numbered_on(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """REPA's first files count the blocks after the projector anew, as ``decoder_blocks``."""
    if not any(key.startswith("decoder_blocks.") for key in weights):
        return weights
    first = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})

    def name(key: str) -> str:
        return re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) + first}", key)

    return {name(key): value for key, value in weights.items()}


def _our_name(key: str, public_keys: Sequence[tuple[str, str]]) -> str:
    for pattern, ours in public_keys:
        key = re.sub(f"^{pattern}", ours, key)
    return key


def _fit(denoiser: Any, key: str, value: Tensor, own: Tensor) -> Tensor | None:
    """A weight in the denoiser's shape, or None when it does not fit."""
    if key == "pos_embed" and value.shape[-1] == own.shape[-1]:
        is_square = value.ndim == 3  # a public one; ours are (N, width), of any grid
        return _resized_grid(value.reshape(-1, own.shape[-1]), denoiser.grid[1:], is_square)
    if key == "temp_embed" and value.shape[-1] == own.shape[-1]:
        table = value.reshape(1, -1, own.shape[-1]).transpose(1, 2)
        if table.shape[-1] != len(own):
            table = F.interpolate(table, len(own), mode="linear", align_corners=True)
        return table[0].T
    if key == "embed_label.weight" and value.shape == (len(own) - 1, own.shape[1]):
        return torch.cat([value, own[-1:].to(value)])  # trained without dropout: no row for "none"
    if key.startswith("head.") and len(value) == 2 * len(own):
        # rows are (place in the patch, channel), the mean's channels before the variance's
        channels = denoiser.out_channels
        return value.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)
    if key == "embed.proj.weight" and value.numel() == own.numel():
        return value.reshape(own.shape)
    return value if value.shape == own.shape else None


def _resized_grid(table: Tensor, grid: tuple[int, int], is_square: bool) -> Tensor | None:
    """A table for another grid, or None where its own is not known."""
    side = math.isqrt(len(table))
    if (side, side) == grid or (not is_square and len(table) == grid[0] * grid[1]):
        return table
    if side**2 != len(table):
        return None
    square = table.T.reshape(1, -1, side, side)
    resized = F.interpolate(square, grid, mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T


def latest_checkpoint(work_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run.

    Args:
        work_dir: The run's directory.

    Returns:
        Its path, or None when there is none.
    """
    for path in reversed(numbered_checkpoints(work_dir)):
        if is_whole(path):
            return path
        print(f"warning: {path} is damaged; passed over", file=sys.stderr, flush=True)
    return None


def numbered_checkpoints(work_dir: str | Path) -> list[Path]:
    """The ``iter_N`` of a run, damaged ones too, by their numbers."""
    numbered = ((_numbered(path), path) for path in Path(work_dir).glob("iter_*"))
    return [path for _, path in sorted((n, path) for n, path in numbered if n is not None)]


def _numbered(path: Path) -> int | None:
    """The iteration in a checkpoint's name, or None where it is another name."""
    match = re.fullmatch(r"iter_(\d+)", path.name)
    return int(match[1]) if match else None

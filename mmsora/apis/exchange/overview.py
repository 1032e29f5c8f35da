"""What a checkpoint holds, for a person and for scripts."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from mmsora.apis.exchange.stored import Entry, Stored

__all__ = ["listing", "overview", "overview_lines"]

SAID = ("iter", "seed", "time", "experiment_name", "mmsora_version", "world_size")
MODEL_PARTS = ("denoiser", "diffusion", "vae", "conditioner", "alignment")


def overview(stored: Stored) -> dict[str, Any]:
    """What a checkpoint is and has, as JSON can hold it. No tensor is read.

    Args:
        stored: The checkpoint.

    Returns:
        ``path``, ``kind``, ``bytes`` on the disk, what it says of itself, the types of its
        model's parts, and for each part that holds tensors how many, of how many values, bytes
        and types.
    """
    config = stored.config or {}
    found = {"path": str(stored.path), "kind": stored.kind, "bytes": stored.num_bytes}
    found |= {key: stored.meta[key] for key in SAID if key in stored.meta}
    world = stored.meta.get("world_size")
    if world is not None:
        mode = (config.get("parallel") or {}).get("mode")
        found["parallel_mode"] = mode or ("ddp" if world > 1 else "none")
    model = config.get("model") or {}
    parts = ((name, model.get(name)) for name in MODEL_PARTS)
    found["model"] = {name: value["type"] for name, value in parts if value and value.get("type")}
    found["parts"] = {part: _summary(stored, part) for part in stored.parts}
    found["denoiser_values"] = sum(stored.entries[name].values for name in _weights_of(stored))
    return found


def _weights_of(stored: Stored) -> list[str]:
    """The flat names of one copy of the denoiser's weights."""
    for part in ("state_dict", "ema", "model", "weights"):
        names = stored.named(part)
        if names:
            own = [flat for key, flat in names.items() if key.startswith("denoiser.")]
            return own or list(names.values())
    return []


def _summary(stored: Stored, part: str) -> dict[str, Any]:
    entries = [stored.entries[name] for name in stored.named(part).values()]
    found: dict[str, Any] = {
        "tensors": len(entries),
        "values": sum(entry.values for entry in entries),
        "bytes": sum(entry.bytes for entry in entries),
        "dtypes": dict(Counter(_dtype(entry) for entry in entries)),
    }
    if part in ("ema_profiles", "rng"):
        found["of"] = sorted({key.partition("/")[0] for key in stored.named(part)})
    return found


def overview_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The same to be read by a person.

    Args:
        found: From :func:`overview`.

    Yields:
        Lines.
    """
    yield f"{found['path']}: {found['kind']}, {found['bytes']:,} bytes on the disk"
    if "iter" in found:
        yield f"iteration {found['iter']}, seed {found.get('seed')}, {found.get('time')}"
    if "experiment_name" in found:
        yield f"{found['experiment_name']}, by mmsora {found.get('mmsora_version')}"
    if "world_size" in found:
        yield f"saved by {found['world_size']} processes, parallel mode {found['parallel_mode']}"
    for name, kind in found["model"].items():
        yield f"{name}: {kind}"
    yield f"the denoiser: {found['denoiser_values']:,} values, fixed tables included"
    yield f"\n{'part':<14}{'tensors':>8}{'values':>16}{'bytes':>18}  types"
    for part, each in found["parts"].items():
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in each["dtypes"].items())
        of = f" ({', '.join(each['of'])})" if "of" in each else ""
        counts = f"{each['tensors']:>8}{each['values']:>16,}{each['bytes']:>18,}"
        yield f"{part:<14}{counts}  {dtypes}{of}"


def listing(stored: Stored, pattern: str) -> list[dict[str, Any]]:
    """Tensors whose flat names a regular expression is found in.

    Args:
        stored: The checkpoint.
        pattern: The expression.

    Returns:
        For each ``name``, ``shape``, ``dtype`` and ``bytes``.
    """
    return [
        {
            "name": name,
            "shape": list(entry.shape),
            "dtype": _dtype(entry),
            "bytes": entry.bytes,
        }
        for name, entry in stored.entries.items()
        if re.search(pattern, name)
    ]


def _dtype(entry: Entry) -> str:
    return str(entry.dtype).removeprefix("torch.")

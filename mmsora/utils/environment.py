"""What a bug report, and the report of a run, need to say of a machine."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mmsora.version import __version__

__all__ = ["collect_env"]

PACKAGES = (  # alternatives provide the same module
    ("torch",),
    ("mmengine", "mmengine-lite"),
    ("mmcv-lite", "mmcv"),
    ("diffusers",),
    ("transformers",),
    ("av",),
    ("opencv-python", "opencv-python-headless"),
    ("numpy",),
)


@cache
def collect_env() -> dict[str, str]:
    """Describes the environment.

    Returns:
        Descriptions by subject. What is missing or broken is said, never raised.
    """
    return {
        "mmsora": f"{__version__} ({_revision()})",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        **{names[0]: _installed(names) for names in PACKAGES},
        **_accelerators(),
    }


def _revision() -> str:
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
    if not (root / ".git").exists():  # installed: a repository further up is not ours
        return "not a checkout"
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "git revision unknown"


def _installed(names: tuple[str, ...]) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found) or "not installed"


def _accelerators() -> dict[str, str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken install is what the report is for
        return {"cuda": f"torch cannot be imported: {error}"}
    if not torch.cuda.is_available():
        return {"cuda": "not available"}
    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    gpus = {f"gpu {i}": f"{c.name}, {c.total_memory / 2**30:.1f} GiB" for i, c in enumerate(cards)}
    return {"cuda": str(torch.version.cuda), **gpus}

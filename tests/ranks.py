"""Several processes of one run, started by environment variables alone, as launchers do."""

import importlib
import os
import socket
import subprocess
from pathlib import Path

__all__ = ["ROOT", "free_port", "preload", "start_ranks"]

ROOT = Path(__file__).parents[1]


def preload():
    """Import what a run imports on its way, so that forks of this process have it."""
    for name in ("sklearn.datasets", "torch._dynamo", "torch.distributed.checkpoint"):
        importlib.import_module(name)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_ranks(command, world, folder):
    """Start ``world`` processes; each writes what it says to ``folder/rank_N.txt``."""
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = []
    for rank in map(str, range(world)):
        with open(folder / f"rank_{rank}.txt", "w") as output:
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**common, "RANK": rank, "LOCAL_RANK": rank},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes

"""What a launcher tells a process in its environment, and the group that it joins by that."""

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from mmsora.utils.user_error import UserError

__all__ = ["environment_of", "first_host", "join"]

# What each launcher calls rank, world size, rank and number of processes on this machine.
# Of those that start by MPI: Open MPI; MPICH and Intel MPI.
LAUNCHERS = {
    "pytorch": [("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")],
    "slurm": [("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")],
    "mpi": [
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ],
}
STARTED_BY = {
    "pytorch": "torchrun, as tools/dist_train.sh does",
    "slurm": "srun, as tools/slurm_train.sh does",
    "mpi": "mpirun",
}


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: ``gpu[07-09,12],big1`` is ``gpu07``."""
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", name[0]) if name else ""


def environment_of(launcher: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What torch reads, from what a launcher sets.

    Args:
        launcher: ``pytorch``, ``slurm`` or ``mpi``.
        environment: Of the process.

    Returns:
        ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``.

    Raises:
        UserError: The launcher did not start this process, or nobody said where the first is.
    """
    dialects = LAUNCHERS[launcher]
    names = next((names for names in dialects if names[0] in environment), None)
    if names is None or any(name not in environment for name in names[:3]):
        missing = next(name for name in names or dialects[0] if name not in environment)
        raise UserError(
            f"--launcher {launcher}: {missing} is not set; start the processes by "
            f"{STARTED_BY[launcher]}"
        )
    rank, world, local_rank = (environment[name] for name in names[:3])
    master = environment.get("MASTER_ADDR")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST")
    if not master and launcher == "slurm" and nodes:
        master = first_host(nodes)
    if not master and environment.get(names[3], "1" if world == "1" else "") == world:
        master = "127.0.0.1"  # all of them are on this machine
    if not master:
        raise UserError(
            f"--launcher {launcher}: MASTER_ADDR is not set; set it to the name of the machine "
            "of the first process"
        )
    job = int(environment.get("SLURM_JOB_ID", 0)) if launcher == "slurm" else 0
    return {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": master,
        # Jobs that share a machine do not share a port.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(29500 + job % 10000),
    }


def join(launcher: str, dist_cfg: Mapping[str, Any]) -> None:
    """Join the other processes: GPUs over NCCL, the rest over gloo.

    Args:
        launcher: What started the processes.
        dist_cfg: ``backend`` instead of these where there are GPUs, ``timeout`` in seconds, and
            further arguments of ``torch.distributed.init_process_group``.
    """
    os.environ.update(environment_of(launcher, os.environ))
    options = dict(dist_cfg)
    backend = options.pop("backend", "cpu:gloo,cuda:nccl")
    if "timeout" in options:
        options["timeout"] = timedelta(seconds=options["timeout"])
    if torch.cuda.is_available():
        number, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= here:
            raise UserError(
                f"process {number} of this machine has no GPU, there are {here}; start as many "
                "processes as GPUs"
            )
        torch.cuda.set_device(number)
    else:
        backend = "gloo"
    distributed.init_process_group(backend, **options)

"""What starts processes, and how these find one another."""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from mmsora.engine.parallel.launch import environment_of, first_host, join
from mmsora.utils.user_error import UserError

ROOT = Path(__file__).parents[2]
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODELIST": "gpu[07-08]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "one",
    "MASTER_PORT": "1234",
}


# What a process is told


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-09,12],big1", "gpu07"),
        ("gpu[3,5-6]", "gpu3"),
        ("node-a,node-b", "node-a"),
        ("rack[1-2]n[03-04]", "rack1n03"),
        ("rack[1-2]-ib.cluster", "rack1-ib.cluster"),
        ("localhost", "localhost"),
    ],
)
def test_the_first_host_of_slurm(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("launcher", "environment", "expected"),
    [
        ("pytorch", TORCHRUN, ("1", "4", "1", "one", "1234")),
        ("slurm", SLURM, ("5", "8", "1", "gpu07", "29500")),
        ("slurm", SLURM | {"SLURM_JOB_ID": "1230042"}, ("5", "8", "1", "gpu07", "29542")),
        ("slurm", SLURM | {"SLURM_STEP_NODELIST": "gpu08"}, ("5", "8", "1", "gpu08", "29500")),
        (
            "slurm",
            SLURM | {"MASTER_ADDR": "x", "MASTER_PORT": "9", "SLURM_JOB_ID": "7"},
            ("5", "8", "1", "x", "9"),
        ),
        ("mpi", OPEN_MPI, ("1", "2", "1", "127.0.0.1", "29500")),
        ("mpi", MPICH | {"MASTER_ADDR": "one"}, ("3", "4", "1", "one", "29500")),
        ("mpi", OPEN_MPI | MPICH, ("1", "2", "1", "127.0.0.1", "29500")),
    ],
)
def test_what_torch_reads_comes_from_what_the_launcher_sets(launcher, environment, expected):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert environment_of(launcher, environment) == dict(zip(names, expected, strict=True))


@pytest.mark.parametrize(
    ("launcher", "environment", "message"),
    [
        ("pytorch", {}, "--launcher pytorch: RANK is not set.*torchrun, as tools/dist_train.sh"),
        ("slurm", TORCHRUN, "SLURM_PROCID is not set; start the processes by srun"),
        ("mpi", {}, "OMPI_COMM_WORLD_RANK is not set; start the processes by mpirun"),
        ("mpi", {"PMI_RANK": "0", "PMI_SIZE": "1"}, "MPI_LOCALRANKID is not set"),
        ("mpi", MPICH, "MASTER_ADDR is not set; set it to the name of the machine"),
    ],
)
def test_what_is_missing_is_named(launcher, environment, message):
    with pytest.raises(UserError, match=message):
        environment_of(launcher, environment)


# How it joins the others


@pytest.fixture
def joined(monkeypatch):
    """What ``join`` called, on a machine with so many GPUs."""
    calls = {}
    monkeypatch.setattr(os, "environ", dict(TORCHRUN))

    def on(gpus, **dist_cfg):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda number: calls.update(device=number))
        monkeypatch.setattr(
            distributed, "init_process_group", lambda *args, **kwargs: calls.update(
                backend=args[0], **kwargs
            )
        )  # fmt: skip
        join("pytorch", dist_cfg)
        return calls

    return on


def test_gpus_speak_nccl_and_their_hosts_gloo(joined):
    assert joined(2) == {"device": 1, "backend": "cpu:gloo,cuda:nccl"}


def test_the_config_may_choose_backend_and_patience(joined):
    expected = {"device": 1, "backend": "nccl", "timeout": timedelta(seconds=60)}
    assert joined(2, backend="nccl", timeout=60) == expected


def test_without_gpus_it_is_gloo_whatever_the_config_says(joined):
    assert joined(0, backend="nccl") == {"backend": "gloo"}


def test_more_processes_than_gpus_are_refused(joined):
    with pytest.raises(UserError, match="process 1 of this machine has no GPU, there are 1"):
        joined(1)


# Scripts


@pytest.fixture
def called(tmp_path):
    """Run a script with a program of a fake that notes its arguments."""

    def run(script, arguments, fake, **environment):
        program = tmp_path / "bin" / fake
        program.parent.mkdir(exist_ok=True)
        note = tmp_path / "arguments"
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {note}\n')
        program.chmod(0o755)
        path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", f"tools/{script}", *arguments],
            cwd=ROOT,
            env={**os.environ, "VIRTUAL_ENV": "set", **environment, "PATH": path},
            capture_output=True,
            text=True,
        )
        return result, note.read_text().splitlines() if note.exists() else None

    return run


def test_slurm_gets_a_process_for_each_gpu(called):
    arguments = ["video", "first", "dit_s2_imagenet_256", "16", "--amp", "bf16"]
    result, got = called("slurm_train.sh", arguments, "srun", SRUN_ARGS="--time=1:00 --qos=low")
    assert result.returncode == 0, result.stderr
    assert got[:9] == [
        "--partition=video",
        "--job-name=first",
        "--gres=gpu:8",
        "--ntasks=16",
        "--ntasks-per-node=8",
        "--cpus-per-task=5",
        "--kill-on-bad-exit=1",
        "--time=1:00",
        "--qos=low",
    ]
    assert got[9:11] == ["python", "-u"]
    assert got[11].endswith("tools/train.py")
    assert got[12:] == ["dit_s2_imagenet_256", "--launcher", "slurm", "--amp", "bf16"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["video", "first", "config"], {}, "usage: bash tools/slurm_train.sh PARTITION"),
        (["video", "first", "config", "many"], {}, "usage: "),
        (
            ["video", "first", "config", "12"],
            {"GPUS_PER_NODE": "8"},
            "error: 12 GPUS are no whole number of machines with GPUS_PER_NODE=8",
        ),
    ],
)
def test_slurm_is_not_called_with_less(called, arguments, environment, message):
    result, got = called("slurm_train.sh", arguments, "srun", **environment)
    assert (result.returncode, got) == (2, None)
    assert result.stderr.startswith(message)


def test_without_slurm_the_other_script_is_named(tmp_path):
    result = subprocess.run(
        ["/bin/bash", ROOT / "tools/slurm_train.sh", "video", "first", "config", "2"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr == (
        "error: there is no srun here; without Slurm use tools/dist_train.sh\n"
    )


def test_torchrun_gets_the_node_and_the_master(called):
    places = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "one", "PORT": "77"}
    arguments = ["config", "4", "--parallel", "zero2"]
    result, got = called("dist_train.sh", arguments, "python", **places)
    assert result.returncode == 0, result.stderr
    assert got[0].endswith("tools/torchrun.py")
    options = dict(zip(got[1:11:2], got[2:11:2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--node_rank": "1",
        "--master_addr": "one",
        "--master_port": "77",
        "--nproc_per_node": "4",
    }
    assert got[11].endswith("tools/train.py")
    assert got[12:] == ["config", "--launcher", "pytorch", "--parallel", "zero2"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "usage: "),
        (["config"], {}, "usage: "),
        (["config", "2"], {"NNODES": "2"}, "error: NNODES=2 needs MASTER_ADDR and NODE_RANK"),
    ],
)
def test_torchrun_is_not_called_with_less(called, arguments, environment, message):
    result, got = called("dist_train.sh", arguments, "python", **environment)
    assert (result.returncode, got) == (2, None)
    assert result.stderr.startswith(message)


# A failed run ends with one line


FAILURES = """
import os, signal, sys, time
rank = os.environ["RANK"]
if rank == "1":
    {}
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        ("sys.exit(2)", 2, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit(3)", 3, "error: process 1 failed; it says why above\n"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "error: process 1 was ended by SIGKILL; the others stop\n",
        ),
    ],
)
def test_a_failed_process_ends_all_with_its_code(tmp_path, failure, code, said):
    program = tmp_path / "program.py"
    program.write_text(FAILURES.format(failure))
    result = subprocess.run(
        [sys.executable, "tools/torchrun.py", "--standalone", "--nproc_per_node=2", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (result.returncode, result.stderr) == (code, said)


# Two machines


def losses_of(work_dir):
    lines = [
        json.loads(line)
        for path in sorted(Path(work_dir).glob("*/vis_data/scalars.json"))
        for line in path.read_text().splitlines()
    ]
    return [(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]


def test_two_agents_equal_one_with_as_many_processes(tiny_config, tmp_path):
    config = tmp_path / "config.py"
    cfg = tiny_config({"train_cfg.max_iters": 4})
    cfg.default_hooks.checkpoint = None
    cfg.dump(config)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def start(name, processes, **environment):
        options = ["--parallel", "zero2", "--work-dir", tmp_path / name]
        return subprocess.Popen(
            ["bash", "tools/dist_train.sh", config, str(processes), *options],
            cwd=ROOT,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "VIRTUAL_ENV": sys.prefix,
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    loopback = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "PORT": str(port)}
    agents = [start("two", 1, **loopback, NODE_RANK=str(rank)) for rank in range(2)]
    for started in ([agents[0], agents[1]], [start("one", 2)]):
        said = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0] * len(started), said
    both = losses_of(tmp_path / "two")
    assert len(both) == 4
    assert both == losses_of(tmp_path / "one")

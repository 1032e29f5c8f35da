"""One of four processes that save sharded tensors, and of two that read some of them.

``python folder_worker.py FOLDER``, with the environment of a launcher.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mmsora.utils.checkpoint_folder import CheckpointFolder, save_folder, save_folder_behind
from mmsora.utils.shards import local_part, part_of, whole
from mmsora.utils.user_error import UserError

SIZES = {"rows": (6, 3), "few": (2, 5), "one": (1,), "many": (9,)}


def full(name):
    return torch.arange(float(torch.Size(SIZES[name]).numel())).view(SIZES[name]) + len(name)


def state(mesh):
    """Sharded unevenly, so that some processes have nothing; whole; and of each process alone."""
    sharded = {name: distribute_tensor(full(name), mesh, [Shard(0)]) for name in SIZES}
    rank = distributed.get_rank()
    return {
        "state_dict": {**sharded, "whole": torch.tensor([1.5, 2.5])},
        "rng": {rank: {"cpu": torch.full((4,), rank, dtype=torch.uint8)}},
        "meta": {"written_by": rank, "classes": ("a", "b")},
    }


def parts_are_torchs(mesh):
    for name in SIZES:
        like = distribute_tensor(torch.zeros(SIZES[name]), mesh, [Shard(0)])
        part = part_of(full(name), like)
        assert isinstance(part, DTensor)
        assert torch.equal(
            part.to_local(), distribute_tensor(full(name), mesh, [Shard(0)]).to_local()
        )
        assert torch.equal(whole(part), full(name))


def a_failing_process_fails_all(folder, mesh):
    write = dcp.FileSystemWriter.write_data

    def failing(self, *args):
        if distributed.get_rank() == 2:
            raise OSError(28, "No space left on device")
        return write(self, *args)

    def elsewhere(self, *args):
        result = write(self, *args)
        if distributed.get_rank() == 3:
            (self.path / "__3_0.distcp").unlink()
        return result

    dcp.FileSystemWriter.write_data = elsewhere
    words = "iter_7 cannot be written by rank 0: __3_0.distcp is on another machine"
    with pytest.raises(UserError, match=words):
        save_folder(state(mesh), folder / "iter_7")
    distributed.barrier()
    dcp.FileSystemWriter.write_data = failing
    for save in (save_folder, lambda *args: save_folder_behind(*args).result()):
        with pytest.raises(UserError, match="iter_7 cannot be written by rank 2: No space left"):
            save(state(mesh), folder / "iter_7")
        distributed.barrier()
        assert not list(folder.glob("*iter_7*"))
    dcp.FileSystemWriter.write_data = write


def main():
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    four = DeviceMesh("cpu", range(4))
    two = DeviceMesh("cpu", range(2))
    grid = DeviceMesh("cpu", [[0, 1], [2, 3]])
    parts_are_torchs(four)
    save_folder(state(four), folder / "iter_3")
    content = state(four)
    saving = save_folder_behind(content, folder / "iter_4")
    for tensor in content["state_dict"].values():
        local_part(tensor).zero_()  # training goes on
    saving.result()
    assert (folder / "iter_4").is_dir()  # when any process knows that it is done
    a_failing_process_fails_all(folder, four)

    rank, saved = distributed.get_rank(), CheckpointFolder(folder / "iter_4")
    meshes = [(grid, [Replicate(), Shard(0)])] + [(two, [Shard(0)])] * (rank < 2)
    for mesh, placements in meshes:
        zeros = {name: torch.zeros(size) for name, size in SIZES.items()}
        tensors = {k: part_of(v, like(mesh, v, placements)) for k, v in zeros.items()}
        saved.read_into({"state_dict": tensors})
        for name, tensor in tensors.items():
            expected = part_of(full(name), tensor).to_local()
            assert torch.equal(tensor.to_local(), expected), (mesh, name)
    distributed.barrier()
    os._exit(0)


def like(mesh, tensor, placements):
    """A DTensor whose making sends nothing: some processes are not asked."""
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = [*tensor.chunk(mesh.size(dim)), *[tensor[:0]] * mesh.size(dim)]
            local = parts[mesh.get_local_rank(dim)]
    return DTensor.from_local(
        local, mesh, placements, shape=tensor.shape, stride=tensor.stride(), run_check=False
    )


if __name__ == "__main__":
    main()

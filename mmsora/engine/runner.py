"""MMEngine's Runner with the smallest set of repairs that training needs."""

import os
import warnings

import torch
from mmengine.device import get_device
from mmengine.dist import is_distributed
from torch import distributed, nn

from mmsora.engine.resumable_runner import ResumableRunner
from mmsora.registry import RUNNERS

__all__ = ["SoraRunner"]

# What each launcher calls the rank, the world size and the rank on this machine.
LAUNCHERS = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


@RUNNERS.register_module()
class SoraRunner(ResumableRunner):
    """Runs any config that MMEngine's own Runner runs, and besides

    * several processes without a GPU, over gloo;
    * checkpoints of plain types that load without running code, written whole or not at all,
      with the resolved config inside;
    * a resume that says what changed in the config.
    """

    def setup_env(self, env_cfg: dict) -> None:
        """Join the other processes, over gloo where there is no GPU."""
        if self.distributed and not is_distributed() and not torch.cuda.is_available():
            names = LAUNCHERS[self.launcher]
            for ours, theirs in zip(LAUNCHERS["pytorch"], names, strict=True):
                os.environ.setdefault(ours, os.environ.get(theirs, ""))
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", "29500")
            distributed.init_process_group("gloo")
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap for data parallelism; without a GPU there is no device number to give."""
        if self.distributed and model_wrapper_cfg is None and get_device() == "cpu":
            model_wrapper_cfg = {
                "type": "MMDistributedDataParallel",
                "device_ids": None,
                "broadcast_buffers": False,
            }
        with warnings.catch_warnings():  # MMEngine's spelling of an option, new in torch 2.12
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            return super().wrap_model(model_wrapper_cfg, model)

    def get_hooks_info(self) -> str:
        """The hooks by name, in one line where MMEngine prints a page."""
        return ", ".join(type(hook).__name__ for hook in self.hooks)

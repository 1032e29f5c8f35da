"""MMEngine's Runner with the smallest set of repairs that training needs."""

import warnings
from typing import Any

from mmengine.dataset import sampler
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.optim import OptimWrapper
from torch import nn

from mmsora.engine.hooks.ema_hook import denoiser_of
from mmsora.engine.hooks.interrupt_hook import InterruptHook
from mmsora.engine.hooks.report_hook import reporting_failure
from mmsora.engine.hooks.watchdog_hook import naming_lost_ranks
from mmsora.engine.optim_wrapper import DTYPES, AutocastOptimWrapper
from mmsora.engine.parallel.launch import join
from mmsora.engine.parallel.optimizers import (
    leave_out_frozen,
    separate_sharded,
    share_state,
)
from mmsora.engine.parallel.plan import Parallel
from mmsora.engine.parallel.sharding import make_mesh, same_on_all, shard
from mmsora.engine.recompute import ActivationCheckpointing
from mmsora.engine.resumable_runner import ResumableRunner
from mmsora.registry import RUNNERS
from mmsora.utils.process_groups import data_info
from mmsora.utils.shards import local_part
from mmsora.utils.user_error import UserError

__all__ = ["SoraRunner"]

# To MMEngine's samplers, processes that share their samples are one.
sampler.get_dist_info = data_info


@RUNNERS.register_module()
class SoraRunner(ResumableRunner):
    """Runs any config that MMEngine's own Runner runs, and besides

    * several processes without a GPU, over gloo;
    * weights, gradients and the optimizer's state spread over processes as ``parallel`` says;
    * checkpoints of plain types that load without running code, written whole or not at all,
      with the resolved config inside;
    * a resume that says what changed in the config.

    Attributes:
        plan: What is spread over the processes.
        mesh: The processes by what they share; None for a single one.
    """

    def setup_env(self, env_cfg: dict) -> None:
        """Join the other processes and decide what is shared with them."""
        if self.distributed and not is_distributed():
            join(self.launcher, env_cfg.get("dist_cfg", {}))
        super().setup_env(env_cfg)
        wanted = Parallel.of(self.cfg.get("parallel"))
        self.plan = wanted.for_start(self.world_size, self.distributed)
        self.mesh = make_mesh(self.plan, self.world_size)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Spread the model over the processes; without a GPU there is no device number to give."""
        if self.plan.is_sharded and model_wrapper_cfg is not None:
            raise UserError(
                f"parallel.mode={self.plan.mode!r} has no place for model_wrapper_cfg; remove one"
            )
        model = model.to(get_device())
        if self.plan.is_sharded:
            denoiser: Any = getattr(model, "denoiser", None)
            if denoiser is None:
                raise UserError(
                    f"parallel.mode={self.plan.mode!r} deals out a denoiser, and "
                    f"{type(model).__name__} has none; take ddp or zero1"
                )
            same_on_all(model.state_dict().values())
            shard(denoiser, self.plan, DTYPES[self._precision])
        elif self.plan.mode in ("ddp", "zero1"):
            model = self._wrap_ddp(model_wrapper_cfg, model)
        self._say_what_is_shared(model)
        return model

    def _wrap_ddp(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if model_wrapper_cfg is None and get_device() == "cpu":
            model_wrapper_cfg = {
                "type": "MMDistributedDataParallel",
                "device_ids": None,
                "broadcast_buffers": False,
            }
        with warnings.catch_warnings():  # MMEngine's spelling of an option, new in torch 2.12
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            return super().wrap_model(model_wrapper_cfg, model)

    @property
    def _precision(self) -> str:
        wrapper: Any = self.optim_wrapper
        if isinstance(wrapper, dict):
            return wrapper.get("precision", "off")
        return getattr(wrapper, "precision", "off")

    def _say_what_is_shared(self, model: nn.Module) -> None:
        if self.mesh is None:
            return
        names = self.mesh.mesh_dim_names or ()
        shape = " x ".join(f"{n} {size}" for n, size in zip(names, self.mesh.shape, strict=True))
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        total = sum(weight.numel() for weight in weights)
        here = sum(local_part(weight).numel() for weight in weights)
        self.logger.info(
            f"parallel {self.plan.mode}: {self.world_size} processes ({shape}); this one holds "
            f"{here / 1e6:.2f} M of {total / 1e6:.2f} M trained parameters"
        )

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Without what is frozen, and with a state that is spread as the weights are."""
        wrapper: Any = super().build_optim_wrapper(optim_wrapper)
        if hasattr(wrapper, "optimizer"):  # a wrapper of several has none
            leave_out_frozen(wrapper.optimizer)
        if self.plan.mode in ("none", "ddp"):
            return wrapper
        if not isinstance(wrapper, AutocastOptimWrapper):
            raise UserError(
                f"parallel.mode={self.plan.mode!r} needs "
                f"optim_wrapper.type=AutocastOptimWrapper, got {type(wrapper).__name__}"
            )
        if self.plan.mode == "zero1":
            wrapper.optimizer = share_state(wrapper.optimizer)
        else:
            separate_sharded(wrapper.optimizer)
            wrapper.averages = True
        return wrapper

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Go by the samples of a batch: processes that share them count once."""
        if auto_scale_lr and auto_scale_lr.get("enable"):
            base = auto_scale_lr["base_batch_size"] * self.plan.sequence
            auto_scale_lr = {**auto_scale_lr, "base_batch_size": base}
        super().scale_lr(optim_wrapper, auto_scale_lr)

    def _init_model_weights(self) -> None:
        """Load what the model reads from files; all processes start from the first one's state.
        Activations are recomputed from then on."""
        model: Any = self.bare_model
        if hasattr(model, "init_weights"):
            model.init_weights()
            same_on_all(model.state_dict().values())
        # MMEngine's own looks for the key next.
        self._recomputed = self.cfg.pop("activation_checkpointing", None)
        if self._recomputed is not None:
            ActivationCheckpointing.of(self._recomputed).apply(denoiser_of(self))

    def load_or_resume(self) -> None:
        """Load, with the key for recomputed activations back in its place."""
        if getattr(self, "_recomputed", None) is not None:
            self.cfg.activation_checkpointing = self._recomputed
        super().load_or_resume()

    def train(self) -> nn.Module:
        """Train; an error is reported, and of several processes one that dies is named."""
        try:
            with naming_lost_ranks(self), reporting_failure(self):
                return super().train()
        finally:
            for hook in self.hooks:
                if isinstance(hook, InterruptHook):
                    hook.stop_listening()

    def get_hooks_info(self) -> str:
        """The hooks by name, in one line where MMEngine prints a page."""
        return ", ".join(type(hook).__name__ for hook in self.hooks)

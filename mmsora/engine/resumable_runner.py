"""A Runner that saves and resumes a run."""

import json
import time
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from mmengine.dist import master_only
from mmengine.runner import Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch import nn

from mmsora.engine.hooks.ema_hook import denoiser_of, model_of
from mmsora.utils.checkpoint import (
    load_checkpoint,
    load_denoiser,
    load_weights,
    plain,
    save_checkpoint,
)
from mmsora.utils.config_check import config_dict, config_diff
from mmsora.utils.user_error import UserError
from mmsora.version import __version__

__all__ = ["ResumableRunner"]

# What differs at every resume, and tells nothing.
RUN_KEYS = ("experiment_name", "launcher", "load_from", "resume", "work_dir")


class ResumableRunner(Runner):
    """Saves checkpoints of plain types, whole or not at all, and says at a resume what changed."""

    @property
    def bare_model(self) -> nn.Module:
        """The model without its wrapper."""
        return model_of(self)

    @property
    def resolved_config(self) -> dict[str, Any]:
        """The config as plain types, made once."""
        if not hasattr(self, "_resolved_config"):
            self._resolved_config = config_dict(self.cfg)
        return self._resolved_config

    @property
    def data_sampler(self) -> Any:
        """What decides the order of the training data, if it can start in the middle, or None."""
        loader = self.train_dataloader
        samplers = (loader.batch_sampler, loader.sampler)
        return next((s for s in samplers if hasattr(s, "load_state_dict")), None)

    def _data_state(self) -> dict[str, Any] | None:
        """Where the run is in its data after this iteration."""
        sampler, loader = self.data_sampler, self.train_dataloader
        if sampler is None:
            return None
        taken = self.iter + 1 - getattr(self, "_resumed_iter", 0)
        if sampler is not loader.batch_sampler:  # counts samples, of all processes
            taken *= loader.batch_size * self.world_size
        return sampler.state_dict(taken)

    def _resume_data(self, state: dict[str, Any] | None) -> None:
        """Start the data in the middle, where MMEngine would load all that came before."""
        if state is None or self.data_sampler is None:
            return
        loop = self.train_loop
        self.data_sampler.load_state_dict(state)
        self._resumed_iter = loop.iter
        # The loop drops as many batches as it has done iterations: those are none.
        loop.dataloader_iterator = chain(
            repeat(None, loop.iter), _InfiniteDataloaderIterator(loop.dataloader)
        )

    @master_only
    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = False,
        backend_args: dict | None = None,
    ) -> None:
        """Write a checkpoint of plain types, whole or not at all.

        Args:
            out_dir: Directory.
            filename: Name in it.
            file_client_args: Unused, as ``backend_args``: checkpoints are local files.
            save_optimizer: Whether the optimizer's state goes in.
            save_param_scheduler: Whether the schedulers' states go in.
            meta: What else to note.
            by_epoch: Unused: iterations are what is counted.
            backend_args: Unused.
        """
        hub = self.message_hub.state_dict()
        info = plain(hub["runtime_info"])
        info.pop("cfg", None)  # stands in meta
        checkpoint = {
            "meta": {
                "epoch": self.epoch,
                "iter": self.iter + 1,
                "cfg": json.dumps(self.resolved_config),
                "seed": self.seed,
                "experiment_name": self.experiment_name,
                "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                "mmsora_version": __version__,
                "dataset_meta": plain(getattr(self.train_dataloader.dataset, "metainfo", None)),
                **(meta or {}),
            },
            "state_dict": plain(self.bare_model.state_dict()),
            "data": self._data_state(),
            "message_hub": {
                "log_scalars": {},
                "runtime_info": info,
                "resumed_keys": {k: v for k, v in hub["resumed_keys"].items() if k in info},
            },
        }
        if save_optimizer:
            checkpoint["optimizer"] = plain(self.optim_wrapper.state_dict())
        if save_param_scheduler and self.param_schedulers is not None:
            checkpoint["param_schedulers"] = [plain(s.state_dict()) for s in self.param_schedulers]
        self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        save_checkpoint(checkpoint, Path(out_dir) / filename)

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = "cpu",
        strict: bool = True,
        revise_keys: Any = (),
    ) -> dict[str, Any]:
        """Load weights: all of them to resume, else the denoiser's, from ours or a public file.

        Hooks see the checkpoint first.

        Args:
            filename: The file.
            map_location: Unused: files are read to the CPU, so that resuming takes no memory of
                the GPU twice.
            strict: Unused: what does not fit is an error that names it.
            revise_keys: Unused.

        Returns:
            The checkpoint.
        """
        checkpoint = load_checkpoint(filename)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        if self._resume:
            load_weights(self.bare_model, checkpoint["state_dict"], filename)
            self.logger.info(f"loaded {filename}")
        else:
            denoiser: Any = denoiser_of(self)
            alignment = getattr(self.bare_model, "alignment", None)
            projector = getattr(alignment, "projector", None)
            report = load_denoiser(denoiser, checkpoint, filename, projector)
            if getattr(self.bare_model.conditioner, "drop_prob", 0):
                denoiser.knows_null = True  # training teaches it from here on
            for what, keys in report._asdict().items():
                if keys:
                    self.logger.warning(f"{filename}: {what} {', '.join(keys)}")
            self.logger.info(f"the denoiser starts from {filename}")
        self._has_loaded = True
        return checkpoint

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Go on where a checkpoint stopped, and say what changed in the config since."""
        try:
            content = load_checkpoint(filename)
            then = content["state_dict"] and json.loads(content["meta"]["cfg"])
        except (KeyError, TypeError, json.JSONDecodeError):
            raise UserError(
                f"checkpoint {filename} holds weights, not a run to resume; use load_from"
            ) from None
        kept, now = (
            {key: value for key, value in cfg.items() if key not in RUN_KEYS}
            for cfg in (then, self.resolved_config)
        )
        changes = config_diff(kept, now)
        if changes:
            lines = "\n  ".join(changes)
            self.logger.warning(
                f"the config changed since {filename} was written; the optimizer and its "
                f"schedules go on as they were saved, the rest as it is now:\n  {lines}"
            )
        super().resume(filename, *args, **{**kwargs, "map_location": "cpu"})
        self._resume_data(content.get("data"))

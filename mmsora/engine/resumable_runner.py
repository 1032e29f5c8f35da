"""A Runner that saves and resumes a run."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from itertools import dropwhile, islice, repeat
from pathlib import Path
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.runner import Runner
from mmengine.runner.loops import BaseLoop
from torch import distributed, nn

from mmsora.engine.hooks.ema_hook import denoiser_of, model_of
from mmsora.engine.optimizer_state import load_optimizer, optimizer_settings, optimizer_state
from mmsora.utils.checkpoint import (
    WEIGHTS,
    check_sizes,
    latest_checkpoint,
    load_checkpoint,
    load_denoiser,
    numbered_checkpoints,
    plain,
)
from mmsora.utils.checkpoint_folder import (
    CheckpointFolder,
    is_folder,
    is_whole,
    save_folder,
    save_folder_behind,
)
from mmsora.utils.config_check import config_dict, config_diff
from mmsora.utils.process_groups import data_info
from mmsora.utils.random_state import derive_random_state, random_state, set_random_state
from mmsora.utils.user_error import UserError
from mmsora.version import __version__

__all__ = ["ResumableRunner"]

# What differs at every resume, and tells nothing.
RUN_KEYS = ("experiment_name", "launcher", "load_from", "resume", "work_dir")

# What is read straight to where it is used, so that it is never whole in memory.
IN_PLACE = ("state_dict", "ema", "ema_profiles", "optimizer", "rng")


class ResumableRunner(Runner):
    """Saves checkpoints, whole or not at all, and goes on from them exactly, with as many
    processes or others.

    Attributes:
        resumed: The checkpoint that the run goes on from, or None.
    """

    resumed: CheckpointFolder | None = None
    _resume: bool
    _load_from: str | None
    _train_dataloader: Any
    _saving_group: distributed.ProcessGroup | None = None

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
    def _dataset_meta(self) -> Any:
        return plain(getattr(self.train_dataloader.dataset, "metainfo", None))

    # Saving

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
        behind: bool = False,
    ) -> Future[None] | None:
        """Write a checkpoint, whole or not at all. All processes call it.

        Args:
            out_dir: Directory.
            filename: Name of the checkpoint's folder in it.
            file_client_args: Unused, as ``backend_args``: checkpoints are local.
            save_optimizer: Whether to save what only a resumed run needs.
            save_param_scheduler: Whether the schedulers' states go in.
            meta: What else to note.
            by_epoch: Unused: iterations are what is counted.
            backend_args: Unused.
            behind: Copy the state, and write it while training goes on.

        Returns:
            With ``behind``, what tells when it is whole.
        """
        checkpoint = self._checkpoint(meta or {}, save_optimizer, save_param_scheduler)
        self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        path = Path(out_dir) / filename
        if not behind:
            save_folder(checkpoint, path)
            return None
        if distributed.is_initialized() and self._saving_group is None:
            self._saving_group = distributed.new_group(backend="gloo")  # training has another
        return save_folder_behind(checkpoint, path, self._saving_group)

    def _checkpoint(
        self, meta: dict[str, Any], save_optimizer: bool, save_param_scheduler: bool
    ) -> dict[str, Any]:
        """The state of the run: tensors as they are, all else as plain types."""
        hub = self.message_hub.state_dict()
        info = plain(hub["runtime_info"])
        info.pop("cfg", None)  # stands in meta
        done = meta.get("iter", self.iter + 1)
        checkpoint: dict[str, Any] = {
            "meta": {
                "epoch": self.epoch,
                "iter": done,
                "cfg": json.dumps(self.resolved_config),
                "seed": self.seed,
                "experiment_name": self.experiment_name,
                "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                "mmsora_version": __version__,
                "world_size": self.world_size,
                "dataset_meta": self._dataset_meta,
                **meta,
            },
            "state_dict": self.bare_model.state_dict(),
            "message_hub": {
                "log_scalars": {},
                "runtime_info": info,
                "resumed_keys": {k: v for k, v in hub["resumed_keys"].items() if k in info},
            },
        }
        if save_optimizer:
            checkpoint["data"] = self._data_state(done)
            checkpoint["rng"] = {self.rank: random_state()}
            checkpoint["optimizer"] = optimizer_state(self.optim_wrapper, self.bare_model)
            checkpoint["optim_wrapper"] = optimizer_settings(self.optim_wrapper, self.bare_model)
        if save_param_scheduler and self.param_schedulers is not None:
            checkpoint["param_schedulers"] = [plain(s.state_dict()) for s in self.param_schedulers]
        return checkpoint

    # Loading

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = "cpu",
        strict: bool = True,
        revise_keys: Any = (),
    ) -> dict[str, Any]:
        """Start the denoiser from weights of ours or of a public file. Hooks see these first.

        Args:
            filename: The checkpoint.
            map_location: Unused: weights are read to the CPU.
            strict: Unused: what does not fit is an error that names it.
            revise_keys: Unused.

        Returns:
            The checkpoint, of one of ours the weights only.
        """
        checkpoint = load_checkpoint(filename, WEIGHTS)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        denoiser: Any = denoiser_of(self)
        alignment = getattr(self.bare_model, "alignment", None)
        projector = getattr(alignment, "projector", None)
        report = load_denoiser(denoiser, checkpoint, filename, projector)
        if getattr(self.bare_model.conditioner, "drop_prob", 0):
            denoiser.knows_null = True  # training teaches it from here on
        for line in report.lines(filename):
            self.logger.warning(line)
        self.logger.info(f"the denoiser starts from {filename}")
        self._has_loaded = True
        return checkpoint

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build it; the data of a run that is resumed begin where they were left."""
        if self._resume and self._load_from is None:
            found = latest_checkpoint(self.work_dir)
            self._load_from, self._resume = found and str(found) or None, found is not None
        if self._resume and self._load_from is not None:
            self.resumed = _open(self._load_from)
            self._resume_seed(self.resumed.rest["meta"])
            if isinstance(self._train_dataloader, dict):
                self._train_dataloader = self.build_dataloader(
                    self._train_dataloader,
                    self.seed,
                    self._randomness_cfg.get("diff_rank_seed", False),
                )
            self._place_sampler(self.resumed.rest["data"])
        return super().build_train_loop(loop)

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: Any = "cpu",
    ) -> None:
        """Go on where a checkpoint stopped, and say what changed in the config since.

        Args:
            filename: The checkpoint.
            resume_optimizer: Unused: the whole state is taken.
            resume_param_scheduler: Unused.
            map_location: Unused: tensors are read to where they are used.
        """
        folder = self.resumed = self.resumed or _open(filename)
        rest, loop = folder.rest, self.train_loop
        self._tell_damaged(Path(filename))
        self._tell_changes(rest["meta"], filename)
        loop._epoch, loop._iter = rest["meta"]["epoch"], rest["meta"]["iter"]
        self.message_hub.load_state_dict(rest["message_hub"])

        own = {key: stored.size for key, stored in folder.named("state_dict").items()}
        check_sizes(self.bare_model, own, filename)
        folder.read_into({"state_dict": self.bare_model.state_dict()})
        load_optimizer(self.optim_wrapper, self.bare_model, folder)
        for scheduler, state in zip(
            self.param_schedulers or (), rest.get("param_schedulers", ()), strict=False
        ):
            name, groups = scheduler.param_name, scheduler.optimizer.param_groups
            scheduler.load_state_dict(state)
            scheduler.base_values = [group[f"initial_{name}"] for group in groups]
            scheduler._last_value = [group[name] for group in groups]
        rest = folder.load(folder.parts - set(IN_PLACE))
        self.call_hook("after_load_checkpoint", checkpoint=rest)
        self._resume_data()
        self._has_loaded = True
        self.logger.info(f"resumed from {filename}, iteration {loop._iter}")

    def _tell_damaged(self, path: Path) -> None:
        """What was passed over stands in the log."""
        for other in dropwhile(path.__ne__, numbered_checkpoints(path.parent)):
            if not is_whole(other):
                self.logger.warning(f"{other} is damaged; passed over")

    def _tell_changes(self, meta: Mapping[str, Any], filename: str) -> None:
        kept, now = (
            {key: value for key, value in cfg.items() if key not in RUN_KEYS}
            for cfg in (json.loads(meta["cfg"]), self.resolved_config)
        )
        changes = config_diff(kept, now)
        if changes:
            lines = "\n  ".join(changes)
            self.logger.warning(
                f"the config changed since {filename} was written; the optimizer and its "
                f"schedules go on as they were saved, the rest as it is now:\n  {lines}"
            )
        if meta["dataset_meta"] != self._dataset_meta:
            self.logger.warning(
                f"the dataset's metainfo, such as its classes, changed since {filename}"
            )

    def _resume_seed(self, meta: Mapping[str, Any]) -> None:
        """The run's own seed stays; one that is configured now is another."""
        now = self._randomness_cfg.get("seed")
        if meta["seed"] != now:
            if now is not None:
                self.logger.warning(
                    f"the run goes on with its own seed {meta['seed']}, not with {now}"
                )
            self._randomness_cfg.update(seed=meta["seed"])
            self.set_randomness(**self._randomness_cfg)

    # Data and random states

    def _sampler_of(self, loader: Any) -> Any:
        """What decides the order of the data, if it can start in the middle, or None."""
        for sampler in (loader.batch_sampler, loader.sampler):
            if hasattr(sampler, "load_state_dict"):
                return sampler
        if isinstance(loader.sampler, InfiniteSampler):
            if not hasattr(self, "_infinite"):
                self._infinite = _InfinitePlace(loader.sampler)
            return self._infinite
        return None

    def _place_sampler(self, state: Mapping[str, Any] | None) -> None:
        """Start the data where they were left, unless another sampler left them."""
        sampler = self._sampler_of(self._train_dataloader)
        if sampler is None or state is None:
            return
        if state["sampler"] == type(sampler).__name__:
            sampler.load_state_dict(state)
        else:
            self.logger.warning("the sampler is another one: the data begin anew")

    def _data_state(self, done: int) -> dict[str, Any] | None:
        """Where the run is in its data after so many iterations."""
        loader = self.train_dataloader
        sampler = self._sampler_of(loader)
        if sampler is None:
            return None
        taken = done - (self.resumed.rest["meta"]["iter"] if self.resumed else 0)
        if sampler is not loader.batch_sampler:  # counts samples, of all processes
            taken *= loader.batch_size * data_info()[1]
        return {"sampler": type(sampler).__name__, **sampler.state_dict(taken)}

    def _resume_data(self) -> None:
        """Data and random generators go on when the loop has dropped as many batches as it has
        done iterations; they are none where the sampler has skipped them."""
        loop: Any = self.train_loop
        if not hasattr(loop, "dataloader_iterator"):  # it goes by epochs
            self._resume_random_state()
            return
        batches, done = loop.dataloader_iterator, loop._iter
        is_there = self._sampler_of(loop.dataloader) is not None
        if is_there:
            self.logger.addFilter(_skips_no_data)

        def from_here() -> Iterator[Any]:
            self.logger.removeFilter(_skips_no_data)
            yield from repeat(None, done) if is_there else islice(batches, done)
            self._resume_random_state()
            yield from batches

        loop.dataloader_iterator = from_here()

    def _resume_random_state(self) -> None:
        folder: Any = self.resumed
        meta = folder.rest["meta"]
        if meta["world_size"] == self.world_size:
            set_random_state(folder.load(["rng"])["rng"][str(self.rank)])
            return
        derive_random_state(self.seed, meta["iter"], self.rank)
        self.logger.info(
            f"saved by {meta['world_size']} processes, resumed by {self.world_size}: new random "
            "states are derived from seed, iteration and rank"
        )


def _skips_no_data(record: logging.LogRecord) -> bool:
    """Whether a line is another than the one by which MMEngine's loop says that it skips data."""
    return not record.getMessage().startswith("Advance dataloader")


class _InfinitePlace:
    """Where MMEngine's InfiniteSampler is, whose order is a function of its seed."""

    def __init__(self, sampler: InfiniteSampler) -> None:
        self.sampler, self.start = sampler, 0

    def state_dict(self, taken: int) -> dict[str, Any]:
        return {"start": self.start + taken, "seed": self.sampler.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.start, self.sampler.seed = state["start"], state["seed"]
        rank, world = data_info()
        numbers = self.sampler._infinite_indices()
        self.sampler.indices = islice(numbers, self.start + rank, None, world)


def _open(path: str) -> CheckpointFolder:
    """A checkpoint to resume from."""
    if not is_folder(path):
        load_checkpoint(path)  # or there is none
    elif "optim_wrapper" in (folder := CheckpointFolder(path)).rest:
        return folder
    raise UserError(f"checkpoint {path} holds weights, not a run to resume; use load_from")

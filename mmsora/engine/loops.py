"""Loops beside those of MMEngine."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import Evaluator
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner, ValLoop
from torch import Tensor
from torch.utils.data import DataLoader

from mmsora.engine.hooks.ema_hook import DenoiserEMAHook, model_of
from mmsora.registry import LOOPS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.process_groups import sequence_group
from mmsora.utils.random_state import random_state, set_random_state
from mmsora.utils.user_error import UserError

__all__ = ["DenoisingValLoop"]


@LOOPS.register_module()
class DenoisingValLoop(ValLoop):
    """Hands the evaluator the training loss of each sample at fixed places of the path.

    It is that of the weights and of their average, where one is kept. No condition is dropped, and
    noise is a function of (seed, sample, place). Each sample passes the network alone,
    ``batch_size`` of its places at once, so it does not matter how many processes there are. The
    run goes on as if it had not been validated.

    Args:
        runner: The runner.
        dataloader: Of the samples; each process has equally many.
        evaluator: Gets a dict for each sample: ``index``, ``weight``, ``places``, and ``losses``,
            tensors (num_times,) by the name of the weights.
        num_times: Places: the middles of so many even parts of the way from data to noise.
        seed: Of the noise.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        evaluator: Evaluator | dict | list,
        num_times: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(runner, dataloader, evaluator)
        if num_times < 1:
            raise ValueError(f"val_cfg.num_times must be at least 1, got {num_times}")
        if sequence_group() and isinstance(self.dataloader.sampler, DefaultSampler):
            raise UserError(
                "val_dataloader.sampler: DefaultSampler gives processes that share a sample's "
                "tokens different ones; take OrderedSampler"
            )
        self.places = (torch.arange(num_times, dtype=torch.float64) + 0.5) / num_times
        self.seed = seed

    def run(self) -> dict:
        """Validate, and leave random generators as they were."""
        state = random_state()
        try:
            return super().run()
        finally:
            set_random_state(state)

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: dict[str, Sequence]) -> None:
        """Validate the samples of a batch.

        Args:
            idx: Number of the batch.
            data_batch: ``inputs`` and ``data_samples``, as the model's preprocessor takes them.
        """
        self.runner.call_hook("before_val_iter", batch_idx=idx, data_batch=data_batch)
        samples, losses = data_batch["data_samples"], {}
        for name, weights in self._weights().items():
            with weights:
                pairs = zip(data_batch["inputs"], samples, strict=True)
                losses[name] = [self._losses(clip, sample) for clip, sample in pairs]
        outputs = [
            {
                "index": sample.index,
                "weight": sample.get("weight", 1.0),
                "places": self.places,
                "losses": {name: found[i] for name, found in losses.items()},
            }
            for i, sample in enumerate(samples)
        ]
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook(
            "after_val_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs
        )

    def _weights(self) -> dict[str, AbstractContextManager]:
        """The weights to validate: as they are, and averaged while training."""
        weights: dict[str, AbstractContextManager] = {"loss": nullcontext()}
        hooks = [hook for hook in self.runner.hooks if isinstance(hook, DenoiserEMAHook)]
        if hooks and isinstance(self.runner.optim_wrapper, OptimWrapper):  # built by training
            weights["loss_ema"] = hooks[0].applied()
        return weights

    def _losses(self, clip: Tensor, sample: VideoSample) -> Tensor:
        model, wrapper = model_of(self.runner), self.runner.optim_wrapper
        inputs = model.data_preprocessor({"inputs": [clip], "data_samples": [sample]})["inputs"]
        at_once = self.dataloader.batch_size or len(self.places)
        with wrapper.autocast() if hasattr(wrapper, "autocast") else nullcontext():
            return model.losses_at(inputs, sample, self.places, self.seed, at_once).cpu()

"""One of the processes that validate the same filled weights under one plan after another.

``python validation_worker.py FOLDER`` reads ``plans.json`` there; the first process writes the
metrics of each plan to ``NAME.json``, and a single process to ``one.json``.
"""

import json
import os
import sys
from pathlib import Path

from torch import distributed

from mmsora.registry import RUNNERS
from tests.conftest import _filled, tiny
from tests.test_engine.test_validation import with_validation, without_files


def main():
    from mmsora.engine import DenoiserEMAHook, SoraRunner

    build, restart = SoraRunner.build_model, DenoiserEMAHook.before_train

    def filled(self, model):
        model = build(self, model)
        for name, weight in model.named_parameters():
            weight.data.copy_(_filled(name, weight.shape, 0.5))
        return model

    def apart(self, runner):  # averages that are not the weights
        restart(self, runner)
        for average in self._averages[0]:
            average.mul_(0.5)

    SoraRunner.build_model, DenoiserEMAHook.before_train = filled, apart
    folder, alone = Path(sys.argv[1]), os.environ["WORLD_SIZE"] == "1"
    plans = {"one": None} if alone else json.loads((folder / "plans.json").read_text())
    changes = {"train_cfg.max_iters": 1, "optim_wrapper.optimizer.lr": 0.0}
    for name, plan in plans.items():
        cfg = without_files(with_validation(tiny(folder / "runs" / name, changes)))
        cfg.custom_hooks[0].decay, cfg.custom_hooks[0].warmup = 0.999999, False
        if plan:
            cfg.launcher, cfg.parallel = "pytorch", plan
        runner = RUNNERS.build(cfg)
        runner.train()
        metrics = runner.val_loop.run()
        if runner.rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(metrics))
    if distributed.is_initialized():
        distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

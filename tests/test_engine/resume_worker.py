"""One of the processes that train several runs one after another.

``python resume_worker.py RUNS.json``, with the environment of a launcher. A run is its
``work_dir``, the ``changes`` of the tiny config, ``parallel``, and ``resume``, a checkpoint or
null; ``load_from`` only starts from one.
"""

import json
import os
import sys
from pathlib import Path

from torch import distributed

from tests.test_engine.parallel_worker import conftest, start_filled


def main():
    from mmsora.registry import RUNNERS

    tools = conftest()
    start_filled(tools._filled)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        cfg = tools.tiny(run["work_dir"], run["changes"])
        cfg.launcher, cfg.parallel = "pytorch", run["parallel"]
        cfg.resume, cfg.load_from = run["resume"] is not None, run.get("load_from", run["resume"])
        RUNNERS.build(cfg).train()
    distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

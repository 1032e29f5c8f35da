"""torchrun, which ends a failed run with one line instead of three pages.

python tools/torchrun.py --nproc_per_node 2 tools/train.py CONFIG --launcher pytorch
"""

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

SAID = (2, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # codes of processes that have told why


def main() -> int:
    """Run.

    Returns:
        The code of the process that failed first, 128 + n where signal n ended it.
    """
    logging.disable(logging.ERROR)  # of torchrun alone; the processes have logs of their own
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0:
            name = signal.Signals(-code).name
            print(f"error: process {rank} was ended by {name}; the others stop", file=sys.stderr)
            return 128 - code
        if code not in SAID:
            print(f"error: process {rank} failed; it says why above", file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + error.sigval
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        print(f"error: the processes cannot be started: {line}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

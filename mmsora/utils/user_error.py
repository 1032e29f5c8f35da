"""Mistakes of the user, as opposed to mistakes of ours."""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Where launchers say which of several processes this is.
RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class UserError(Exception):
    """A mistake of the user: commands print it as one line and exit with code 2."""


@contextmanager
def user_errors_as_one_line() -> Iterator[None]:
    """Ends the process with code 2 and one line on stderr when a ``UserError`` escapes.

    So it does when the disk is full and, with code 130, at Ctrl-C. With ``MMSORA_TRACEBACK=1`` in
    the environment the traceback comes instead of the first two.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("MMSORA_TRACEBACK") == "1":
            raise
        # An error of a loader's worker comes with that process's traceback before it.
        line = re.sub(r"^mmsora\.[\w.]+: ", "", str(error).strip().splitlines()[-1])
        if _rank() != "0":
            # The first process speaks for all, and its end is that of the others; if only this
            # one fails, it is this one's to say.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_full or os.environ.get("MMSORA_TRACEBACK") == "1":
            raise
        print(f"error: {error.strerror}; make room on the disk", file=sys.stderr)
        raise SystemExit(2) from None


def _rank() -> str:
    return next((os.environ[name] for name in RANKS if name in os.environ), "0")

"""Mistakes of the user, as opposed to mistakes of ours."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake of the user: commands print it as one line and exit with code 2."""


@contextmanager
def user_errors_as_one_line() -> Iterator[None]:
    """Ends the process with code 2 and one line on stderr when a ``UserError`` escapes.

    With ``MMSORA_TRACEBACK=1`` in the environment the traceback comes instead.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("MMSORA_TRACEBACK") == "1":
            raise
        # An error of a loader's worker comes with that process's traceback before it.
        line = re.sub(r"^mmsora\.[\w.]+: ", "", str(error).strip().splitlines()[-1])
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None

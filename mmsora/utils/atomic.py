"""Files appear whole or not at all.

A file is written beside its target under a hidden name, flushed to disk and renamed, so that a
process killed at any moment leaves the old file.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_path", "write_json", "write_text"]


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Lend a temporary path that becomes ``path`` when the block ends well.

    Missing parent directories are created. When the block raises, the temporary file is removed
    and ``path`` stays as it was.

    Args:
        path: The file to write.

    Yields:
        A hidden path in the same directory with the same extension.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, obj: Any) -> None:
    """Write an indented JSON file whole."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")

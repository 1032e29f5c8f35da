"""Unpacks archives, also those that came in parts, so that it can be stopped and started again."""

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from mmsora.utils.atomic import atomic_path
from mmsora.utils.user_error import UserError

__all__ = ["from_name", "unpack"]

EVERY = 10_000  # files between two lines of progress

Place = Callable[[PurePosixPath], PurePosixPath | None]


def unpack(
    parts: Sequence[str | Path],
    folder: str | Path,
    place: Place = lambda path: path,
    show: Callable[[str], None] = print,
) -> int:
    """Unpack a zip or tar file, and the tar files in that.

    Files that are there in their full size are left as they are, others are written whole or not
    at all. Links and names that lead out of the folder are refused.

    Args:
        parts: The archive, or the parts of a tar file in their order.
        folder: Where its files go.
        place: Where a file of this name goes in the folder; None leaves it out. Files in a tar
            file in the archive come as ``<name of the tar file without .tar>/<name>``.
        show: Takes the lines of progress.

    Returns:
        How many files of the archive are in the folder now.

    Raises:
        UserError: It cannot be read to its end.
    """
    first, count = Path(parts[0]), 0
    try:
        if len(parts) == 1 and zipfile.is_zipfile(first):
            members = _zipped(first)
        else:
            members = _tarred(io.BufferedReader(_Joined(parts)), PurePosixPath())
        for name, size, content in members:
            target = place(name)
            if target is None:
                continue
            if target.is_absolute() or ".." in target.parts:
                raise UserError(f"{first}: {name} leads out of {folder}")
            _write(Path(folder, *target.parts), size, content)
            count += 1
            if count % EVERY == 0:
                show(f"{first.name}: {count:,} files unpacked")
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"{first}: not a whole zip or tar file ({error})") from error
    show(f"{first.name}: {count:,} files in {folder}")
    return count


class _Joined(io.RawIOBase):
    """Files one after the other as one."""

    def __init__(self, parts: Sequence[str | Path]) -> None:
        self.files = [io.FileIO(part) for part in parts]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while self.files:
            count = self.files[0].readinto(buffer)
            if count:
                return count
            self.files.pop(0).close()
        return 0

    def close(self) -> None:
        for file in self.files:
            file.close()
        super().close()


def _zipped(path: Path) -> Iterator[tuple[PurePosixPath, int, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                with archive.open(member) as content:
                    yield PurePosixPath(member.filename), member.file_size, content


def _tarred(
    file: IO[bytes], inside: PurePosixPath
) -> Iterator[tuple[PurePosixPath, int, IO[bytes]]]:
    with file, tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            name = inside / member.name
            if name.suffix == ".tar":
                yield from _tarred(content, name.with_suffix(""))
            else:
                yield name, member.size, content


def _write(path: Path, size: int, content: IO[bytes]) -> None:
    if path.is_file() and path.stat().st_size == size:
        return
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        shutil.copyfileobj(content, file)


def from_name(folders: Sequence[str]) -> Place:
    """Keep what lies below folders of these names, wherever in the archive they are.

    Args:
        folders: As ``train/videos``.

    Returns:
        For :func:`unpack`: ``any/train/videos/a.mp4`` goes to ``train/videos/a.mp4``.
    """

    def place(path: PurePosixPath) -> PurePosixPath | None:
        for folder in folders:
            wanted = PurePosixPath(folder).parts
            for start in range(len(path.parts) - len(wanted)):
                if path.parts[start : start + len(wanted)] == wanted:
                    return PurePosixPath(*path.parts[start:])
        return None

    return place

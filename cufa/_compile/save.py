"""Files kept for a reader, in a directory that others may be able to write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def save(target: Path, files: Mapping[str, bytes]) -> None:
    """Write `files`, by their paths below `target`, replacing those of before.

    The parent of `target` may be a link, since the user names it. If it is shared, others can plant what lies below, so
    no link is followed there: in place of a folder it is an OSError, in place of a file it is replaced. Folders stay
    open while they are written in, so none can be exchanged for a link meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        *folders, name = path.split("/")
        with contextlib.ExitStack() as opened:
            place = opened.enter_context(_closing(os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)))
            for folder in (target.name, *folders):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, dir_fd=place)
                place = opened.enter_context(_closing(os.open(folder, _FOLDER, dir_fd=place)))
            _replace(place, name, content)


def _replace(place: int, name: str, content: bytes) -> None:
    """Let `name` in the open folder `place` be a new file, whatever it was."""
    temporary = f".tmp-{os.urandom(8).hex()}"
    with open(os.open(temporary, _NEW_FILE, 0o666, dir_fd=place), "wb") as file:
        try:
            file.write(content)
            file.flush()
            os.rename(temporary, name, src_dir_fd=place, dst_dir_fd=place)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=place)
            raise


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)

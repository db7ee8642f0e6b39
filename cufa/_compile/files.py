"""Files that nobody else may have written, and what differs there between systems.

On POSIX, owners and modes say who could have written a file, and flags of ``open`` keep links and FIFOs away.

On Windows they say nothing. What is relied on there is that a directory below the user's profile, such as
``%LOCALAPPDATA%``, inherits an access control list that admits the user, administrators and the system only; a
directory that is named elsewhere is as private as whoever named it has made it. Junctions and other reparse points
are refused as symbolic links are, and a file that another process has open cannot be replaced or removed, which is
tried again for a moment.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

TROUBLE = (OSError, NameError)
"""What the disk is in the way with: while the interpreter ends, `open` is the name of nothing."""

TEMPORARY = ".tmp-"

BUSY_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16)
"""Pauses between attempts to replace or remove a file that another process has open, on Windows."""


class Posix:
    """Owners, modes, and flags of ``open``."""

    cache_homes: tuple[tuple[str, str], ...] = (("XDG_CACHE_HOME", "cufa"), ("HOME", ".cache/cufa"))
    """Variables that name a place of the user's own, and where in it the cache is."""

    def is_superuser(self) -> bool:
        """Whether this process may write everywhere, and so has to ask whose place it is."""
        return os.geteuid() == 0

    def is_link(self, status: os.stat_result) -> bool:
        """Whether what ``lstat`` describes leads elsewhere."""
        return stat.S_ISLNK(status.st_mode)

    def foreign(self, path: Path, status: os.stat_result) -> str | None:
        """How somebody else than this user and root could have written `path`, or None."""
        remedy = "or set CUFA_CACHE_TRUST_SHARED=1"
        if status.st_uid not in (os.geteuid(), 0):
            return f"{path} belongs to user {status.st_uid} and not to this one; use another directory {remedy}"
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(status.st_mode)
            return f"{path} can be written by other users (mode {mode:04o}); chmod go-w it {remedy}"
        return None

    def open_existing(self, path: str | Path) -> int:
        """A descriptor for reading, of no link."""
        # O_NONBLOCK: opening a FIFO that lies here must not wait for a writer.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)

    def open_new(self, path: str | Path) -> int:
        """A descriptor for writing a private file that is not there yet."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def set_mode(self, descriptor: int, mode: int) -> None:
        os.fchmod(descriptor, mode)

    def touch(self, path: Path) -> None:
        """Set the times of a file to now, by the clock of whoever keeps it, which may be a file server."""
        os.utime(path, follow_symlinks=False)

    def replace(self, source: str, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def save(self, target: Path, files: Mapping[str, bytes]) -> None:
        """`save` of this module."""
        folder = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        for path, content in files.items():
            *folders, name = path.split("/")
            with contextlib.ExitStack() as opened:
                start = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                place = opened.enter_context(_closing(start))
                for each in (target.name, *folders):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(each, dir_fd=place)
                    place = opened.enter_context(_closing(os.open(each, folder, dir_fd=place)))
                _save_in(place, name, content)


class Windows(Posix):
    """What holds on Windows instead; the module says what is relied on there."""

    cache_homes = (("LOCALAPPDATA", "cufa/cache"),)

    def is_superuser(self) -> bool:
        return False

    def is_link(self, status: os.stat_result) -> bool:
        attributes: int = getattr(status, "st_file_attributes", 0)
        return stat.S_ISLNK(status.st_mode) or bool(attributes & stat.FILE_ATTRIBUTE_REPARSE_POINT)

    def foreign(self, path: Path, status: os.stat_result) -> str | None:
        return None

    def open_existing(self, path: str | Path) -> int:
        before = os.lstat(path)
        if self.is_link(before):
            raise OSError(f"{path} is a link")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOINHERIT", 0))
        if os.path.samestat(before, os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)
        raise OSError(f"{path} was exchanged while it was opened")

    def open_new(self, path: str | Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOINHERIT", 0)
        return os.open(path, flags, 0o600)

    def set_mode(self, descriptor: int, mode: int) -> None:
        pass

    def touch(self, path: Path) -> None:
        os.utime(path)

    def replace(self, source: str, target: Path) -> None:
        _while_busy(lambda: os.replace(source, target))

    def unlink(self, path: Path) -> None:
        _while_busy(lambda: os.unlink(path))

    def save(self, target: Path, files: Mapping[str, bytes]) -> None:
        for path, content in files.items():
            folder = target
            for each in ("", *path.split("/")[:-1]):
                folder = folder / each
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder)
                if self.is_link(os.lstat(folder)):
                    raise OSError(f"{folder} is a link")
            publish(target / path, content, 0o666)


SYSTEM: Posix = Windows() if os.name == "nt" else Posix()
"""The rules of the system that this runs on."""


def read(path: Path, limit: int) -> tuple[bytes, os.stat_result]:
    """Content and status of one regular file, by one descriptor so that they belong together.

    Of a file larger than `limit` no content.
    """
    descriptor = SYSTEM.open_existing(path)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a regular file")
        if status.st_size > limit:
            return b"", status
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size), status
    finally:
        os.close(descriptor)


def publish(target: Path, data: bytes, mode: int) -> int:
    """Write `target` so that it appears whole or not at all, also if the process is killed on the way.

    Returns when that was, in nanoseconds, by the clock that stamps files there.
    """
    descriptor, temporary = temporary_file(target.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            SYSTEM.set_mode(descriptor, mode)
            now = os.fstat(descriptor).st_mtime_ns
        SYSTEM.replace(temporary, target)
        return now
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def temporary_file(directory: Path) -> tuple[int, str]:
    """Descriptor and path of a new private file.

    As tempfile makes it, which takes milliseconds to import and cannot be imported while the interpreter ends.
    """
    path = os.path.join(directory, f"{TEMPORARY}{os.urandom(8).hex()}")
    return SYSTEM.open_new(path), path


def make_directory(path: Path, mode: int, *, private_parents: bool = False) -> None:
    """Create `path` with `mode`, whatever the umask, and the parents that it lacks.

    Those are private or, as those of ``mkdir -p``, what the umask leaves and the next directory needs.
    """
    missing = [parent for parent in (path, *path.parents) if not os.path.lexists(parent)]
    for parent in reversed(missing):
        with contextlib.suppress(FileExistsError):
            if parent == path or private_parents:
                os.mkdir(parent, 0o700)
                os.chmod(parent, mode if parent == path else 0o700)
            else:
                os.mkdir(parent)
                os.chmod(parent, stat.S_IMODE(os.stat(parent).st_mode) | stat.S_IWUSR | stat.S_IXUSR)


def clock(directory: Path) -> int:
    """The time in nanoseconds by the clock that stamps files in `directory`: a file server's may be minutes off.

    This machine's own where no file can be made.
    """
    try:
        descriptor, path = temporary_file(directory)
    except TROUBLE:
        return time.time_ns()
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(path)


def nearest(path: Path) -> Path:
    """`path`, or the nearest of its parents that exists."""
    return next(parent for parent in (path, *path.parents) if os.path.lexists(parent))


def listing(directory: str | Path) -> list[os.DirEntry[str]]:
    """What is in a directory; nothing, if it cannot be read."""
    with contextlib.suppress(OSError), os.scandir(directory) as items:
        return list(items)
    return []


def unlink_unchanged(path: Path, before: os.stat_result) -> bool:
    """Remove `path` unless it is no longer the file that `before` describes; say whether it is gone."""
    with contextlib.suppress(OSError):
        try:
            now = os.lstat(path)
        except FileNotFoundError:
            return True
        same = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
        if all(getattr(now, name) == getattr(before, name) for name in same):
            SYSTEM.unlink(path)
            return True
    return False


def save(target: Path, files: Mapping[str, bytes]) -> None:
    """Write `files`, by their paths below `target`, for a reader, replacing those of before.

    The parent of `target` may be a link, since the user names it. If it is shared, others can plant what lies below, so
    no link is followed there: in place of a folder it is an OSError, in place of a file it is replaced. On POSIX
    folders stay open while they are written in, so none can be exchanged for a link meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    SYSTEM.save(target, files)


def _save_in(place: int, name: str, content: bytes) -> None:
    """Let `name` in the open folder `place` be a new file, whatever it was."""
    temporary = f"{TEMPORARY}{os.urandom(8).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(temporary, flags, 0o666, dir_fd=place), "wb") as file:
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


def _while_busy(function: Callable[[], None]) -> None:
    for pause in BUSY_SECONDS:
        try:
            return function()
        except PermissionError:
            time.sleep(pause)
    return function()

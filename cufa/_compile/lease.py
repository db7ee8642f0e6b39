"""Leases: how processes that want the same kernel at once let one of them compile it.

A lease is a file beside the entry, made with ``O_EXCL`` by whoever compiles. The others look now and then whether the
entry is there, and nobody relies on them for more than saving work: a lease that cannot be made, that lasts too long
or whose holder is dead means that the kernel is compiled all the same, and two that compile it publish the same.

No two clocks are compared. A lease's age is told by the clock that stamps files in its directory, a file server's
perhaps, and from then on by the waiting process's own. Whether the holder lives is asked of the system only where its
process number means the same process: in the same boot of the same kernel, and the same namespace of processes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from . import files as _files

SECONDS = 30.0
"""Age at which a lease has expired: several times what compiling one kernel takes on a busy machine."""

EMPTY_SECONDS = 1.0
"""Age at which one that says nothing has: its holder was killed before it wrote."""

WAIT_SECONDS = 60.0
"""Longest wait for one kernel, whoever has leases on it meanwhile."""

PAUSES = (0.005, 0.2)
"""First and longest pause between two looks, each half as long again as the one before."""

PREFIX = ".lease-"

_LIMIT = 4096
_T = TypeVar("_T")
_logger = logging.getLogger("cufa")


class Lease(NamedTuple):
    """One that this process holds."""

    path: Path
    content: bytes
    pid: int

    def release(self) -> None:
        """Remove it, unless somebody took it for expired and has one of his own now."""
        if self.pid == os.getpid():  # and not in a child forked meanwhile
            with contextlib.suppress(*_files.TROUBLE):
                _remove(self.path, self.content)


@contextlib.contextmanager
def turn(path: Path, mode: int, look: Callable[[], _T | None], words: str) -> Iterator[_T | None]:
    """What `look` finds because another process has made it, or None if this one is to make it now.

    Of processes that come at once one gets None at once, and holds the lease at `path` while it is within.
    """
    lease: Lease | None = None
    found: _T | None = None
    with contextlib.suppress(*_files.TROUBLE):  # where leases cannot be made, each compiles for itself
        lease, found = _await(path, mode, look, words)
    try:
        yield found
    finally:
        if lease is not None:
            lease.release()


def take(path: Path, mode: int, content: bytes) -> Lease | None:
    """A lease at `path`, whose directory must exist, that says `content`; None if somebody has one."""
    try:
        descriptor = _files.SYSTEM.open_new(path)
    except FileExistsError:
        return None
    try:
        os.write(descriptor, content)
        _files.SYSTEM.set_mode(descriptor, mode)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    return Lease(path, content, os.getpid())


def _await(path: Path, mode: int, look: Callable[[], _T | None], words: str) -> tuple[Lease | None, _T | None]:
    """A lease, or what was found; neither where waiting or being waited for would gain nothing."""
    give_up = time.monotonic() + WAIT_SECONDS
    pause, longest = PAUSES
    content = own_content()
    seen: bytes | None = None
    expires, waited = 0.0, False
    while time.monotonic() < give_up:
        if (lease := take(path, mode, content)) is not None:
            with contextlib.ExitStack() as undo:
                undo.callback(lease.release)
                found = look()
                # A holder that ended without an entry could not keep what it made. Nor will this process, so that
                # the others should not wait for it.
                if found is None and not waited:
                    undo.pop_all()
                    return lease, None
            return None, found
        holder = _content(path)
        if holder is None:
            continue
        if holder != seen:
            seen, expires = holder, time.monotonic() + (SECONDS if holder else EMPTY_SECONDS) - _age(path)
        if time.monotonic() >= expires or _is_dead(holder):
            _remove(path, holder)
            waited = False
            continue
        if waited and (found := look()) is not None:
            return None, found
        if not waited:
            with contextlib.suppress(Exception):
                _logger.info("waiting for another process, which is %s", words)
        waited = True
        time.sleep(pause)
        pause = min(1.5 * pause, longest)
    return None, None


def _content(path: Path) -> bytes | None:
    """What a lease says; None if there is none."""
    try:
        return _files.read(path, _LIMIT)[0]
    except FileNotFoundError:
        return None


def _remove(path: Path, content: bytes) -> None:
    """Remove the lease at `path` if it is still the one that says `content`."""
    with contextlib.suppress(FileNotFoundError):
        if _content(path) == content:
            _files.SYSTEM.unlink(path)


def _age(path: Path) -> float:
    """Seconds since a lease was made, by the clock that stamps it; 0 if that cannot be told."""
    try:
        made = os.lstat(path).st_mtime_ns
        return max(0.0, (_files.clock(path.parent) - made) / 1e9)
    except OSError:
        return 0.0


def _is_dead(content: bytes) -> bool:
    """Whether the holder is known to have ended."""
    try:
        holder = json.loads(content)
        place, pid, started = holder["place"], holder["pid"], holder["started"]
    except (ValueError, KeyError, TypeError):
        return False
    if not place or place != _place() or not isinstance(pid, int) or pid <= 0:
        return False
    return bool(_started(pid) != started)


def own_content() -> bytes:
    """What a lease of this process says."""
    return json.dumps({**_this_process(), "token": os.urandom(8).hex()}).encode()


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "started": _started(pid), "place": _place()}


@lru_cache(maxsize=1)
def _place() -> str:
    """Where process numbers mean the same processes; empty where that cannot be told, as outside Linux."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except (OSError, ValueError):
        return ""


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the boot: it tells processes apart that had the same number in turn."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b") ")[2].split()
        return None if state in (b"Z", b"X") else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None

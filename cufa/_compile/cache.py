"""The store of compiled kernels on disk.

One file holds one kernel, and its name is the digest of everything that went into compiling it. An entry is
published by renaming a finished file, so a reader sees all of it or nothing, and two processes that compile
the same kernel only do the work twice. No lock is taken anywhere: dict operations are atomic, counters may
lose a count under threads, and a fork at any moment leaves nothing held.

A cubin is code that runs with all of this process's device memory in reach. The trailing checksum finds
accidents and not attackers; against those, a directory or entry that another user can write is not used.

Layout of an entry, little endian::

    magic (8) · schema (4) · length of meta (8) · meta, JSON · cubin · SHA-256 of all before (32)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import struct
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import env as _env

SCHEMA = 1
"""Version of key and file; a change makes older entries unreachable, and eviction removes them in time."""

MAX_ENTRY_SIZE = 64 << 20
"""Largest file that is read or written, in bytes: cubins are 20 to 500 KB, and anything huge is not one."""

STALE_SECONDS = 3600.0
"""Age after which a temporary file belongs to no living writer."""

LIVELY_SECONDS = 60.0
"""Age after which it hardly does, so that it goes before any entry where space is needed."""

TROUBLE = (OSError, NameError)
"""What the disk is in the way with: while the interpreter ends, `open` is the name of nothing."""

_MAGIC = b"CUFA\r\n\x1a\n"  # as in PNG, the line ends show a transfer in text mode
_HEAD = struct.Struct("<8sIQ")
_TRAILER_SIZE = 32
_TEMPORARY = ".tmp-"
_KEY = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[0-9a-f]{62}\.cufa|\.tmp-.*")
_logger = logging.getLogger("cufa")


def log(level: int, message: str, *arguments: object) -> None:
    """Log as ``cufa``; a handler that fails, as on a closed stderr, must not fail the call that speaks."""
    with contextlib.suppress(Exception):
        _logger.log(level, message, *arguments)


@dataclass(frozen=True)
class Entry:
    """A compiled kernel: the cubin, and what is known of it as a JSON object."""

    cubin: bytes
    meta: dict[str, Any]


@dataclass(frozen=True)
class Stats:
    """Counts of a cache: `entries` and `size` are on disk now, the rest happened in this process.

    `size` is in bytes, those of temporary files included.
    """

    entries: int
    size: int
    max_size: int
    in_memory: int
    hits: int
    misses: int
    writes: int
    damaged: int
    evicted: int


def digest(fields: Mapping[str, bytes | str | int | list[str] | tuple[str, ...]]) -> str:
    """Key of a kernel: 64 hexadecimal digits that depend on every label, type and value, and on nothing else.

    Parameters
    ----------
    fields : mapping
        Label to value. The order of labels does not count; that of a sequence does. A list equals a tuple.
    """
    # Every part carries its length, so parts cannot run into each other; the tag keeps 1, "1" and b"1" apart.
    # usedforsecurity=False: the function stays available on systems restricted to approved cryptography.
    state = hashlib.sha256(usedforsecurity=False)

    def feed(part: bytes) -> None:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)

    feed(b"cufa %d" % SCHEMA)
    for label in sorted(fields):
        value = fields[label]
        feed(label.encode())
        if isinstance(value, bytes):
            feed(b"bytes")
            feed(value)
        elif isinstance(value, str):
            feed(b"str")
            feed(value.encode())
        elif isinstance(value, int):
            feed(b"bool" if isinstance(value, bool) else b"int")
            feed(b"%d" % value)
        elif isinstance(value, (list, tuple)):  # and no set, whose order changes from process to process
            feed(b"sequence %d" % len(value))
            for item in value:
                feed(item.encode())
        else:
            raise TypeError(f"cache: cannot digest {label}, a {type(value).__name__}")
    return state.hexdigest()


class CubinCache:
    """Compiled kernels in memory, in a directory of the user's own, and in a second one that is only read.

    Parameters
    ----------
    directory : path or None
        Where entries are kept; None keeps them in memory only. It is created at the first `put`.
    max_size : int
        Most bytes kept in `directory`; at a write, the least recently used entries beyond it are removed.
    trust_shared : bool
        Accept what other users own or can write. Whoever can write it can run code on the device with this
        process's memory in reach. New entries are then readable to those to whom the directory is.
    read_only_dir : path or None
        A second directory, looked at when the first has no entry and never written.
    enabled : bool
        False keeps entries in memory only.
    named : bool
        Somebody named `directory`, which is made wherever that is, and parents that it lacks with the modes of
        ``mkdir -p``. False if it follows from the home: then parents are private, as the XDG specification asks of
        ``~/.cache``, and root makes nothing in the home of another user, who could not use it.

    Notes
    -----
    Constructing a cache touches nothing; the first `get` or `put` does. No trouble with the disk raises: in
    reading it is a miss, and in writing it is logged once as a warning and the entry stays in memory.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        *,
        max_size: int = 512 << 20,
        trust_shared: bool = False,
        read_only_dir: str | os.PathLike[str] | None = None,
        enabled: bool = True,
        named: bool = True,
    ) -> None:
        self.max_size = max_size
        self.trust_shared = trust_shared
        self.enabled = enabled
        self.named = named
        self._path = Path(os.path.abspath(directory)) if enabled and directory is not None else None
        self._read_only = Path(os.path.abspath(read_only_dir)) if enabled and read_only_dir is not None else None
        self._memory: dict[str, Entry] = {}
        self._counts: Counter[str] = Counter()
        self._warned: dict[str, object] = {}
        self._write_error: str | None = None

    @classmethod
    def from_env(cls) -> CubinCache:
        """Cache as the ``CUFA_CACHE*`` variables describe it; a wrong value raises ValueError."""
        return cls(
            _env.cache_dir(),
            max_size=_env.cache_max_size(),
            trust_shared=_env.cache_trust_shared(),
            read_only_dir=_env.cache_read_only_dir(),
            enabled=_env.cache_enabled(),
            named=_env.cache_dir_is_named(),
        )

    @property
    def path(self) -> Path | None:
        """Directory of the entries, which need not exist yet; None when kernels stay in memory."""
        return self._path

    def file(self, key: str) -> Path | None:
        """Where the entry of `key` is or would be on disk; None when kernels stay in memory."""
        name = _relative(key)
        return None if self._path is None else self._path / name

    def get(self, key: str) -> Entry | None:
        """Entry of `key`, which comes from `digest`, or None when there is none or it cannot be trusted."""
        _relative(key)
        entry = self._memory.get(key)
        if entry is None and self._path is not None:
            entry = self._load(self._path, key, touch=True)
        if entry is None and self._read_only is not None:
            entry = self._load(self._read_only, key)
        self._counts["misses" if entry is None else "hits"] += 1
        return None if entry is None else self._memory.setdefault(key, entry)

    def put(self, key: str, entry: Entry) -> bool:
        """Keep `entry` in memory and, if possible, on disk; say whether it is on disk.

        Raises
        ------
        TypeError, ValueError
            If ``entry.meta`` is not a JSON object or `key` does not come from `digest`.
        """
        target = self.file(key)
        record = json.dumps({"key": key, "meta": entry.meta}, allow_nan=False).encode()
        # What JSON makes of the meta data is also what memory holds, so that both tiers return the same.
        meta = json.loads(record)["meta"]
        if not isinstance(meta, dict):
            raise TypeError(f"cache: expected a dict as meta, got {type(entry.meta).__name__}")
        data = _encode(record, entry.cubin)
        self._memory[key] = Entry(bytes(entry.cubin), meta)
        if self._path is None or target is None or len(data) > min(self.max_size, MAX_ENTRY_SIZE):
            return False
        try:
            if (reason := self._misplaced(self._path)) is not None:
                self._warn("misplaced", f"compiled kernels stay in memory: {reason}")
                return False
            _make_directory(self._path, 0o700, private_parents=not self.named)
            # A shared directory passes its own mode on; without trust it is private, and so is all below.
            mode = stat.S_IMODE(os.stat(self._path).st_mode) if self.trust_shared else 0o700
            if not self._trusts(self._path):
                return False
            _make_directory(target.parent, mode)
            if not self._trusts(target.parent):
                return False
            _publish(target, data, 0o600 | (mode & 0o044))
        except TROUBLE as error:
            self._write_error = f"writing to {self._path} failed: {getattr(error, 'strerror', None) or error}"
            self._warn("write", f"{self._write_error}; compiled kernels stay in memory")
            return False
        self._write_error = None
        self._counts["writes"] += 1
        self._shrink(self.max_size, keep=target)
        return True

    def discard(self, key: str) -> Path | None:
        """Remove the entry of `key`, whose cubin does not load; the path it had, for the message, or None."""
        target = self.file(key)
        self._memory.pop(key, None)
        with contextlib.suppress(OSError):
            if self._path is not None and target is not None and self._trusts(self._path, target.parent):
                target.unlink()
                return target
        return None

    def clear(self) -> int:
        """Remove every entry, from memory too, and return how many files went; other processes go on."""
        self._memory.clear()
        return self._shrink(-1)

    def prune(self, max_size: int | None = None) -> int:
        """Remove abandoned temporary files, and the least recently used entries beyond `max_size` bytes.

        Returns the number of entries removed. The default size is that of the cache.
        """
        return self._shrink(self.max_size if max_size is None else max_size)

    def verify(self) -> list[Path]:
        """Read every entry on disk, remove the damaged ones and return their paths."""
        damaged: list[Path] = []
        for path, _ in self._files():
            if self._path is not None and not path.name.startswith(_TEMPORARY):
                self._load(self._path, path.parent.name + path.stem, damaged=damaged)
        return damaged

    def stats(self) -> Stats:
        """Counts of what is on disk now and of what happened in this process."""
        files = self._files()
        entries = sum(not path.name.startswith(_TEMPORARY) for path, _ in files)
        size = sum(status.st_size for _, status in files)
        counts = {name: self._counts[name] for name in ("hits", "misses", "writes", "damaged", "evicted")}
        return Stats(entries, size, self.max_size, len(self._memory), **counts)

    def state(self) -> str:
        """Say in one sentence where kernels are kept and, if not on disk, why; this changes nothing."""
        if not self.enabled:
            return "memory only: CUFA_CACHE is 0"
        also = ""
        if self._read_only is not None:
            reason = self._trouble(self._read_only)
            also = f"; reads {self._read_only} too" if reason is None else f"; cannot read a second one: {reason}"
        if self._path is None:
            return f"memory only: no home directory, and CUFA_CACHE_DIR is not set{also}"
        nearest = _nearest(self._path)
        reason = self._trouble(self._path) if nearest == self._path else self._misplaced(self._path)
        if reason is not None:
            return f"memory only: {reason}{also}"
        stats = self.stats()
        held = f"{stats.entries} {'entry' if stats.entries == 1 else 'entries'}, {_human(stats.size)}"
        reason = self._write_error
        if reason is None and not os.access(nearest, os.W_OK | os.X_OK):
            reason = f"{nearest} is not writable"
        if reason is None:
            return f"ok, {held}{also}"
        return f"read only: {reason}; {held}{also}" if stats.entries else f"memory only: {reason}{also}"

    def _load(self, root: Path, key: str, *, touch: bool = False, damaged: list[Path] | None = None) -> Entry | None:
        """Read one entry. Damage removes the file, unless it is below the directory that is only read."""
        path = root / _relative(key)
        try:
            if not self._trusts(root, path.parent):
                return None
            data, status = _read(path)
        except TROUBLE:
            return None
        if not self.trust_shared and (reason := _foreign(path, status)) is not None:
            self._warn("unsafe", f"cached kernel not used: {reason}")
            return None
        try:
            entry = _decode(data, key)
        except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
            log(logging.INFO, "damaged cached kernel %s: %s", path, error)
            self._counts["damaged"] += 1
            if damaged is not None:
                damaged.append(path)
            if root == self._path:
                _unlink_unchanged(path, status)
            return None
        if touch and entry is not None:
            # Most file systems are mounted so that reading does not update this, and eviction goes by it.
            with contextlib.suppress(OSError):
                os.utime(path, ns=(time.time_ns(), status.st_mtime_ns), follow_symlinks=False)
        return entry

    def _shrink(self, max_size: int, keep: Path | None = None) -> int:
        temporary, entries = [], []
        total = 0
        now = time.time_ns()
        for path, status in self._files():
            # abs: a time far in the future comes from a wrong clock, and would keep the file for ever.
            if not path.name.startswith(_TEMPORARY):
                entries.append((abs(now - status.st_atime_ns), path, status))
            else:
                age = abs(now - status.st_mtime_ns)
                if age > STALE_SECONDS * 1e9 and _unlink_unchanged(path, status):
                    continue
                if age > LIVELY_SECONDS * 1e9:
                    temporary.append((age, path, status))
            total += status.st_size
        removed = 0
        for files in (temporary, entries):
            for _, path, status in sorted(files, key=lambda item: item[0], reverse=True):
                if total <= max_size:
                    break
                if path != keep and _unlink_unchanged(path, status):
                    total -= status.st_size
                    removed += files is entries
        self._counts["evicted"] += removed
        return removed

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """Entries and temporary files, if the directory is trusted; nothing else in it is ever touched."""
        with contextlib.suppress(OSError):
            if self._path is not None and self._trusts(self._path):
                return list(_scan(self._path))
        return []

    def _misplaced(self, directory: Path) -> str | None:
        """Why root does not make `directory`, which nobody named, or None."""
        if self.named or os.geteuid() != 0 or os.path.lexists(directory):
            return None
        home = _nearest(directory)
        if home not in list(directory.parents)[:2]:  # ~/.cache is made where it is missing, and never a home
            return f"{directory.parents[1]} does not exist; set CUFA_CACHE_DIR"
        try:
            owner = os.stat(home).st_uid
        except OSError:  # which making it will meet too
            return None
        if owner == 0:
            return None
        return f"{home} belongs to user {owner}, who could not use what root makes there; set CUFA_CACHE_DIR"

    def _trouble(self, directory: Path) -> str | None:
        try:
            return self._refusal(directory)
        except OSError as error:
            return f"{directory}: {error.strerror or error}"

    def _trusts(self, *directories: Path) -> bool:
        for directory in directories:
            if (reason := self._refusal(directory)) is not None:
                self._warn(f"directory {directory}", f"cache of compiled kernels not used: {reason}")
                return False
        return True

    def _refusal(self, directory: Path) -> str | None:
        """Why `directory` is not used, or None; asked each time, as it costs a microsecond and may change."""
        status = os.stat(directory) if self.trust_shared else os.lstat(directory)
        if stat.S_ISLNK(status.st_mode):
            return f"{directory} is a symbolic link; name the directory itself"
        if not stat.S_ISDIR(status.st_mode):
            return f"{directory} is not a directory"
        return None if self.trust_shared else _foreign(directory, status)

    def _warn(self, kind: str, message: str) -> None:
        token = object()
        if self._warned.setdefault(kind, token) is token:
            log(logging.WARNING, "%s", message)


def _foreign(path: Path, status: os.stat_result) -> str | None:
    """How somebody else than this user and root could have written `path`, or None."""
    remedy = "or set CUFA_CACHE_TRUST_SHARED=1"
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to user {status.st_uid} and not to this one; use another directory {remedy}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        return f"{path} can be written by other users (mode {mode:04o}); chmod go-w it {remedy}"
    return None


def _relative(key: str) -> str:
    # The key becomes a path, so nothing but a digest will do.
    if _KEY.fullmatch(key) is None:
        raise ValueError(f"cache: expected a key of 64 hexadecimal digits, got {key!r}")
    return f"{key[:2]}/{key[2:]}.cufa"


def _encode(meta: bytes, cubin: bytes) -> bytes:
    body = _HEAD.pack(_MAGIC, SCHEMA, len(meta)) + meta + cubin
    return body + hashlib.sha256(body, usedforsecurity=False).digest()


def _decode(data: bytes, key: str) -> Entry | None:
    """Parse a file: None if another version of cufa wrote it, ValueError or its like if it is damaged."""
    magic, schema, meta_size = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError("not an entry")
    if schema != SCHEMA:
        return None
    body, trailer = data[:-_TRAILER_SIZE], data[-_TRAILER_SIZE:]
    start = _HEAD.size + meta_size
    if hashlib.sha256(body, usedforsecurity=False).digest() != trailer or start > len(body):
        raise ValueError("checksum does not match")
    record = json.loads(body[_HEAD.size : start])
    if record["key"] != key or not isinstance(record["meta"], dict):
        raise ValueError("entry of another key")
    return Entry(body[start:], record["meta"])


def _read(path: Path) -> tuple[bytes, os.stat_result]:
    """Content and status of one regular file, by one descriptor so that they belong together."""
    # O_NONBLOCK: opening a FIFO that lies here must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a regular file")
        if status.st_size > MAX_ENTRY_SIZE:
            return b"", status
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size), status
    finally:
        os.close(descriptor)


def _publish(target: Path, data: bytes, mode: int) -> None:
    """Write `target` so that it appears whole or not at all, also if the process is killed on the way."""
    descriptor, temporary = _temporary_file(target.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            os.fchmod(descriptor, mode)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _temporary_file(directory: Path) -> tuple[int, str]:
    """Descriptor and path of a new private file.

    As tempfile makes it, which takes milliseconds to import and cannot be imported while the interpreter ends.
    """
    path = os.path.join(directory, f"{_TEMPORARY}{os.urandom(8).hex()}")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), path


def _nearest(path: Path) -> Path:
    """`path`, or the nearest of its parents that exists."""
    return next(parent for parent in (path, *path.parents) if os.path.lexists(parent))


def _make_directory(path: Path, mode: int, *, private_parents: bool = False) -> None:
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


def _scan(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for shard in _list(root):
        if re.fullmatch(r"[0-9a-f]{2}", shard.name) and shard.is_dir(follow_symlinks=False):
            for item in _list(shard.path):
                if _FILE.fullmatch(item.name):
                    # Another process may remove the file at any moment.
                    with contextlib.suppress(OSError):
                        if not item.is_dir(follow_symlinks=False):
                            yield Path(item.path), item.stat(follow_symlinks=False)


def _list(directory: str | Path) -> list[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(directory) as items:
        return list(items)
    return []


def _unlink_unchanged(path: Path, before: os.stat_result) -> bool:
    """Remove `path` unless it is no longer the file that `before` describes; say whether it is gone."""
    with contextlib.suppress(OSError):
        try:
            now = os.lstat(path)
        except FileNotFoundError:
            return True
        same = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
        if all(getattr(now, name) == getattr(before, name) for name in same):
            os.unlink(path)
            return True
    return False


def _human(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.99995 * scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"

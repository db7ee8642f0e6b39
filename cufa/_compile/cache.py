"""The store of compiled kernels on disk.

One file holds one kernel, and its name is the digest of everything that went into compiling it. An entry is
published by renaming a finished file, so a reader sees all of it or nothing, and two processes that compile
the same kernel only do the work twice; `CubinCache.claim` lets one of many do it. No lock is taken anywhere: single
operations of a dict are whole, in the build without the interpreter's lock too, counters may lose a count under
threads, and a fork at any moment leaves nothing held.

A cubin is code that runs with all of this process's device memory in reach. The trailing checksum finds
accidents and not attackers; against those, a directory or entry that another user can write is not used.

Which entry was used least recently is told by the times of modification, which are set to the file system's own now
whenever an entry is read: so they are all of one clock, a file server's perhaps, and it is asked for the time.

Beside the entries lie notes, small facts that take long to find out. They are files of the same layout, without a
cubin.

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
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import env as _env
from . import files as _files
from . import lease as _lease

SCHEMA = 1
"""Version of key and file; a change makes older entries unreachable, and eviction removes them in time."""

MAX_ENTRY_SIZE = 64 << 20
"""Largest file that is read or written, in bytes: cubins are 20 to 500 KB, and anything huge is not one."""

STALE_SECONDS = 3600.0
"""Age after which a temporary file belongs to no living writer."""

LIVELY_SECONDS = 60.0
"""Age after which it hardly does, so that it goes before any entry where space is needed."""

MAX_NOTES = 100
"""Most notes that are kept: where processes run in ever new containers, each container's make notes of their own."""

TROUBLE = _files.TROUBLE

_MAGIC = b"CUFA\r\n\x1a\n"  # as in PNG, the line ends show a transfer in text mode
_HEAD = struct.Struct("<8sIQ")
_TRAILER_SIZE = 32
_ENTRY, _NOTE = ".cufa", ".note"
_KEY = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(rf"[0-9a-f]{{62}}({_ENTRY}|{_NOTE})|({_files.TEMPORARY}|{_lease.PREFIX}).*")
_logger = logging.getLogger("cufa")


def log(level: int, message: str, *arguments: object) -> None:
    """Log as ``cufa``; a handler that fails, as on a closed stderr, must not fail the call that speaks."""
    with contextlib.suppress(Exception):
        _logger.log(level, message, *arguments)


class Entry(NamedTuple):
    """A compiled kernel: the cubin, and what is known of it as a JSON object."""

    cubin: bytes
    meta: dict[str, Any]


@dataclass(frozen=True)
class Stats:
    """Counts of a cache: `entries` and `size` are on disk now, the rest happened in this process.

    `size` is in bytes, those of notes and temporary files included; `waited` are kernels that another process
    compiled while this one waited for them.
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
    waited: int = 0


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

    @property
    def read_only_path(self) -> Path | None:
        """The second directory, which is only read."""
        return self._read_only

    def file(self, key: str) -> Path | None:
        """Where the entry of `key` is or would be on disk; None when kernels stay in memory."""
        name = _relative(key)
        return None if self._path is None else self._path / name

    def get(self, key: str) -> Entry | None:
        """Entry of `key`, which comes from `digest`, or None when there is none or it cannot be trusted."""
        _relative(key)
        entry = self._memory.get(key) or self._look(key, _ENTRY)
        self._counts["misses" if entry is None else "hits"] += 1
        return None if entry is None else self._memory.setdefault(key, entry)

    def put(self, key: str, entry: Entry) -> bool:
        """Keep `entry` in memory and, if possible, on disk; say whether it is on disk.

        Raises
        ------
        TypeError, ValueError
            If ``entry.meta`` is not a JSON object or `key` does not come from `digest`.
        """
        _relative(key)
        data, meta = _encode(key, entry)
        self._memory[key] = Entry(bytes(entry.cubin), meta)
        kept = self._keep(key, _ENTRY, data)
        self._counts["writes"] += kept
        return kept

    @contextlib.contextmanager
    def claim(self, key: str, words: str) -> Iterator[Entry | None]:
        """Let one of the processes that lack the entry of `key` make it, within, and the others wait for that.

        What is yielded is None to the one that is to make it, and the entry to those that waited. Nobody waits long
        for a process that does not end (see `SECONDS` in lease.py); `words` say what it does in the log. Without a
        directory, or where it cannot be written, it is None at once.
        """
        with self._claim(key, _ENTRY, words) as entry:
            self._counts["waited"] += entry is not None
            yield None if entry is None else self._memory.setdefault(key, entry)

    def note(self, key: str) -> dict[str, Any] | None:
        """The note of `key`, which comes from `digest`, or None when there is none or it cannot be trusted."""
        found = self._look(key, _NOTE)
        return None if found is None else found.meta

    @contextlib.contextmanager
    def claim_note(self, key: str, words: str) -> Iterator[dict[str, Any] | None]:
        """`claim` for a note."""
        with self._claim(key, _NOTE, words) as found:
            yield None if found is None else found.meta

    def keep_note(self, key: str, note: dict[str, Any]) -> bool:
        """Keep a JSON object on disk, if possible, and say whether it is."""
        return self._keep(key, _NOTE, _encode(key, Entry(b"", note))[0])

    def listed(self) -> Iterator[str]:
        """The keys of the entries in the directory."""
        return (path.parent.name + path.stem for path, _ in self._files() if path.suffix == _ENTRY)

    def peek(self, key: str) -> Entry | None:
        """What `get` finds on disk, without counting it as a use."""
        return self._look(key, _ENTRY, touch=False)

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
            if self._path is not None and not _is_temporary(path):
                self._load(self._path, path.parent.name + path.stem, path.suffix, damaged=damaged)
        return damaged

    def stats(self) -> Stats:
        """Counts of what is on disk now and of what happened in this process."""
        files = self._files()
        entries = sum(path.suffix == _ENTRY for path, _ in files)
        size = sum(status.st_size for _, status in files)
        counts = {name: self._counts[name] for name in ("hits", "misses", "writes", "damaged", "evicted", "waited")}
        return Stats(entries, size, self.max_size, len(self._memory), **counts)

    def state(self) -> str:
        """Say in one sentence where kernels are kept and, if not on disk, why; this changes nothing."""
        also = ""
        if self._read_only is not None:
            reason = self._trouble(self._read_only)
            also = f"; reads {self._read_only} too" if reason is None else f"; cannot read a second one: {reason}"
        reason = self.unused()
        if reason is not None or self._path is None:
            return f"memory only: {reason}{also}"
        nearest = _files.nearest(self._path)
        stats = self.stats()
        held = f"{stats.entries} {'entry' if stats.entries == 1 else 'entries'}, {human(stats.size)}"
        reason = self._write_error
        if reason is None and not os.access(nearest, os.W_OK | os.X_OK):
            reason = f"{nearest} is not writable"
        if reason is None:
            return f"ok, {held}{also}"
        return f"read only: {reason}; {held}{also}" if stats.entries else f"memory only: {reason}{also}"

    def unused(self) -> str | None:
        """Why kernels are not kept in a directory, or None if they are, or will be as soon as there are any."""
        if not self.enabled:
            return "CUFA_CACHE is 0"
        if self._path is None:
            return "no home directory, and CUFA_CACHE_DIR is not set"
        missing = _files.nearest(self._path) != self._path
        return self._misplaced(self._path) if missing else self._trouble(self._path)

    def _look(self, key: str, suffix: str, *, touch: bool = True) -> Entry | None:
        """What is on disk, in either directory."""
        found = None if self._path is None else self._load(self._path, key, suffix, touch=touch)
        if found is None and self._read_only is not None:
            found = self._load(self._read_only, key, suffix)
        return found

    def _load(
        self, root: Path, key: str, suffix: str, *, touch: bool = False, damaged: list[Path] | None = None
    ) -> Entry | None:
        """Read one file. Damage removes it, unless it is below the directory that is only read."""
        path = root / _relative(key, suffix)
        try:
            if not self._trusts(root, path.parent):
                return None
            data, status = _files.read(path, MAX_ENTRY_SIZE)
        except TROUBLE:
            return None
        if not self.trust_shared and (reason := _files.SYSTEM.foreign(path, status)) is not None:
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
                _files.unlink_unchanged(path, status)
            return None
        if touch and entry is not None:
            with contextlib.suppress(OSError):
                _files.SYSTEM.touch(path)
        return entry

    @contextlib.contextmanager
    def _claim(self, key: str, suffix: str, words: str) -> Iterator[Entry | None]:
        target, mode = self.file(key), None
        with contextlib.suppress(*TROUBLE):  # keeping what is made will meet it too, and speak
            mode = None if target is None else self._ready(target.parent)
        if target is None or mode is None:
            yield None
            return
        root, lease = target.parents[1], target.with_name(f"{_lease.PREFIX}{key[2:]}")
        with _lease.turn(lease, mode, lambda: self._load(root, key, suffix, touch=True), words) as found:
            yield found

    def _keep(self, key: str, suffix: str, data: bytes) -> bool:
        """Write one file, if possible, and say whether it is on disk."""
        if self._path is None or len(data) > min(self.max_size, MAX_ENTRY_SIZE):
            return False
        target = self._path / _relative(key, suffix)
        try:
            mode = self._ready(target.parent)
            if mode is None:
                return False
            now = _files.publish(target, data, mode)
        except TROUBLE as error:
            self._write_error = f"writing to {self._path} failed: {getattr(error, 'strerror', None) or error}"
            self._warn("write", f"{self._write_error}; compiled kernels stay in memory")
            return False
        self._write_error = None
        self._shrink(self.max_size, now, keep=target)
        return True

    def _ready(self, shard: Path) -> int | None:
        """Make the directory of an entry, and return the mode of files in it; None if it is not used."""
        root = shard.parent
        if (reason := self._misplaced(root)) is not None:
            self._warn("misplaced", f"compiled kernels stay in memory: {reason}")
            return None
        _files.make_directory(root, 0o700, private_parents=not self.named)
        # A shared directory passes its own mode on; without trust it is private, and so is all below.
        mode = stat.S_IMODE(os.stat(root).st_mode) if self.trust_shared else 0o700
        if not self._trusts(root):
            return None
        _files.make_directory(shard, mode)
        return 0o600 | (mode & 0o044) if self._trusts(shard) else None

    def _shrink(self, max_size: int, now: int | None = None, keep: Path | None = None) -> int:
        files = self._files()
        if not files or self._path is None:
            return 0
        if now is None:
            now = _files.clock(self._path)
        temporary, kept = [], []
        total = 0
        for path, status in files:
            # abs: a time far in the future comes from a clock that was wrong, and would keep the file for ever.
            age = abs(now - status.st_mtime_ns)
            if not _is_temporary(path):
                kept.append((age, path, status))
            else:
                if age > STALE_SECONDS * 1e9 and _files.unlink_unchanged(path, status):
                    continue
                if age > LIVELY_SECONDS * 1e9:
                    temporary.append((age, path, status))
            total += status.st_size
        notes = sorted((item for item in kept if item[1].suffix == _NOTE), key=lambda item: item[0])
        for item in notes[MAX_NOTES:]:
            if item[1] != keep and _files.unlink_unchanged(*item[1:]):
                kept.remove(item)
                total -= item[2].st_size
        removed = 0
        for group in (temporary, kept):
            for _, path, status in sorted(group, key=lambda item: item[0], reverse=True):
                if total <= max_size:
                    break
                if path != keep and _files.unlink_unchanged(path, status):
                    total -= status.st_size
                    removed += path.suffix == _ENTRY
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
        if self.named or not _files.SYSTEM.is_superuser() or os.path.lexists(directory):
            return None
        home = _files.nearest(directory)
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
        if _files.SYSTEM.is_link(status):
            return f"{directory} is a symbolic link; name the directory itself"
        if not stat.S_ISDIR(status.st_mode):
            return f"{directory} is not a directory"
        return None if self.trust_shared else _files.SYSTEM.foreign(directory, status)

    def _warn(self, kind: str, message: str) -> None:
        token = object()
        if self._warned.setdefault(kind, token) is token:
            log(logging.WARNING, "%s", message)


def _relative(key: str, suffix: str = _ENTRY) -> str:
    # The key becomes a path, so nothing but a digest will do.
    if _KEY.fullmatch(key) is None:
        raise ValueError(f"cache: expected a key of 64 hexadecimal digits, got {key!r}")
    return f"{key[:2]}/{key[2:]}{suffix}"


def _encode(key: str, entry: Entry) -> tuple[bytes, dict[str, Any]]:
    """The file of an entry, and what JSON makes of its meta data, so that memory and disk return the same."""
    meta = json.dumps({"key": key, "meta": entry.meta}, allow_nan=False).encode()
    read: Any = json.loads(meta)["meta"]
    if not isinstance(read, dict):
        raise TypeError(f"cache: expected a dict as meta, got {type(entry.meta).__name__}")
    body = _HEAD.pack(_MAGIC, SCHEMA, len(meta)) + meta + entry.cubin
    return body + hashlib.sha256(body, usedforsecurity=False).digest(), read


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


def _scan(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for shard in _files.listing(root):
        if re.fullmatch(r"[0-9a-f]{2}", shard.name) and shard.is_dir(follow_symlinks=False):
            for item in _files.listing(shard.path):
                if _FILE.fullmatch(item.name):
                    # Another process may remove the file at any moment.
                    with contextlib.suppress(OSError):
                        if not item.is_dir(follow_symlinks=False):
                            yield Path(item.path), item.stat(follow_symlinks=False)


def _is_temporary(path: Path) -> bool:
    """Whether it is the file of a writer that has not finished, or a lease."""
    return path.name.startswith((_files.TEMPORARY, _lease.PREFIX))


def human(size: int) -> str:
    """A size for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.99995 * scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"

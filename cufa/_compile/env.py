"""Every ``CUFA_*`` environment variable: its name, its default and what it does.

Variables are read when they are used and not at import, so that a change takes effect at the next use and a
wrong value is reported by the call that needs it. A variable set to the empty string counts as not set.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from . import files as _files

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Variable(NamedTuple):
    """One environment variable.

    Attributes
    ----------
    name : str
        The whole name, with ``CUFA_``.
    default : str
        What holds when the variable is not set, as it would be written; for a path, a description of it.
    kind : {'flag', 'choice', 'size', 'path', 'paths'}
        How the value is read: ``0`` or ``1``; ``0``, ``1`` or ``auto``; a number of bytes; a path; paths with
        `os.pathsep` between them.
    meaning : str
        One line, which also ends the message about a value that cannot be read.
    """

    name: str
    default: str
    kind: Literal["flag", "choice", "size", "path", "paths"]
    meaning: str


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "CUFA_CACHE_DIR",
        "$XDG_CACHE_HOME/cufa, else ~/.cache/cufa; on Windows %LOCALAPPDATA%\\cufa\\cache",
        "path",
        "directory of compiled kernels; created with mode 0700",
    ),
    Variable("CUFA_CACHE", "1", "flag", "1 keeps compiled kernels on disk, 0 in memory only"),
    Variable(
        "CUFA_CACHE_MAX_SIZE",
        "512M",
        "size",
        "most bytes of kernels kept on disk, the least recently used going first",
    ),
    Variable(
        "CUFA_CACHE_TRUST_SHARED",
        "0",
        "flag",
        "1 accepts a cache directory that other users can write, and so run code in this process",
    ),
    Variable(
        "CUFA_CACHE_READONLY_DIR",
        "none",
        "path",
        "second directory of compiled kernels, which is read and never written",
    ),
    Variable(
        "CUFA_BUNDLE_PATH",
        "none",
        "paths",
        "bundles of compiled kernels, and directories that hold some, which are read before the cache",
    ),
    Variable(
        "CUFA_BUNDLE_KEYS",
        "none",
        "paths",
        "files of public keys; where there are any, only bundles that one of them has signed are used",
    ),
    Variable(
        "CUFA_DISABLE_JIT",
        "0",
        "flag",
        "1 raises MissingKernelError for a kernel that is neither bundled nor cached instead of compiling it",
    ),
    Variable(
        "CUFA_SAVE_SOURCE",
        "none",
        "path",
        "directory that receives the source, headers and log of every kernel that is compiled",
    ),
    Variable(
        "CUFA_PROGRESS",
        "auto",
        "choice",
        "1 says on stderr what is being compiled, 0 does not, auto does on a terminal",
    ),
    Variable(
        "CUFA_RECORD",
        "none",
        "path",
        "file to which programs append which kernels they use, for cufa bundle build --from-log",
    ),
    Variable("CUFA_LINEINFO", "0", "flag", "1 compiles kernels with source line information, for profilers"),
    Variable("CUFA_DEBUG", "0", "flag", "1 checks lengths, offsets and pages on a GPU too, for which calls wait"),
)

_BY_NAME = {variable.name: variable for variable in VARIABLES}


def cache_dir() -> Path | None:
    """Directory of compiled kernels, from ``CUFA_CACHE_DIR``, the XDG base directory rules or ``%LOCALAPPDATA%``.

    Returns
    -------
    pathlib.Path or None
        An absolute path, which need not exist. None when nothing names a place of the user's own: kernels
        then stay in memory, since a predictable name in a public directory could be taken by anyone.

    Notes
    -----
    As the XDG specification asks, an ``XDG_CACHE_HOME`` that is not absolute is ignored; so is such a
    ``HOME``.
    """
    path = _path("CUFA_CACHE_DIR")
    if path is not None:
        return path
    for base, below in _files.SYSTEM.cache_homes:
        value = os.environ.get(base, "")
        if os.path.isabs(value):
            return Path(value, below)
    return None


def cache_dir_is_named() -> bool:
    """Whether ``CUFA_CACHE_DIR`` names the directory of compiled kernels, which else follows from the home."""
    return bool(os.environ.get("CUFA_CACHE_DIR", "").strip())


def cache_enabled() -> bool:
    """Whether compiled kernels are kept on disk (``CUFA_CACHE``)."""
    return _flag("CUFA_CACHE")


def cache_max_size() -> int:
    """Most bytes that the directory of compiled kernels may hold (``CUFA_CACHE_MAX_SIZE``)."""
    name = "CUFA_CACHE_MAX_SIZE"
    text = _text(name)
    size = size_of(text)
    if size is None:
        raise _error(name, "a number of bytes such as 1048576, 512M or 2G", text)
    return size


def size_of(text: str) -> int | None:
    """The bytes that a text such as 512M stands for; None if it stands for none."""
    match = re.fullmatch(r"(\d+) ?([KMG]?)", text.upper(), flags=re.ASCII)
    # No disk holds 10**18 bytes, and int() refuses numbers of thousands of digits in words of its own.
    return None if match is None or len(match[1]) > 18 else int(match[1]) * _UNITS[match[2]]


def cache_trust_shared() -> bool:
    """Whether a cache directory that others can write is accepted (``CUFA_CACHE_TRUST_SHARED``)."""
    return _flag("CUFA_CACHE_TRUST_SHARED")


def cache_read_only_dir() -> Path | None:
    """Second directory of compiled kernels, only read (``CUFA_CACHE_READONLY_DIR``); None when not set."""
    return _path("CUFA_CACHE_READONLY_DIR")


def bundle_path() -> tuple[Path, ...]:
    """Bundles, and directories that hold some, in the order in which they are searched (``CUFA_BUNDLE_PATH``)."""
    return _paths("CUFA_BUNDLE_PATH")


def bundle_keys() -> tuple[Path, ...]:
    """Files of the public keys that bundles must be signed by (``CUFA_BUNDLE_KEYS``); none if any bundle will do."""
    return _paths("CUFA_BUNDLE_KEYS")


def bundle_dir() -> Path | None:
    """Directory of installed bundles, beside the cached kernels; None if those stay in memory."""
    cache = cache_dir()
    return None if cache is None else cache / "bundles"


def jit_disabled() -> bool:
    """Whether a kernel that is neither bundled nor cached is an error and not compiled (``CUFA_DISABLE_JIT``)."""
    return _flag("CUFA_DISABLE_JIT")


def save_source_dir() -> Path | None:
    """Directory that receives every generated source (``CUFA_SAVE_SOURCE``); None when not set."""
    return _path("CUFA_SAVE_SOURCE")


def progress() -> bool | None:
    """Whether to say what is being compiled (``CUFA_PROGRESS``); None is auto: only on a terminal."""
    text = _text("CUFA_PROGRESS")
    if text.lower() == "auto":
        return None
    if text not in ("0", "1"):
        raise _error("CUFA_PROGRESS", "0, 1 or auto", text)
    return text == "1"


def record_file() -> Path | None:
    """File to which used kernels are appended (``CUFA_RECORD``); None when not set."""
    return _path("CUFA_RECORD")


def lineinfo() -> bool:
    """Whether kernels carry source line information (``CUFA_LINEINFO``)."""
    return _flag("CUFA_LINEINFO")


def debug() -> bool:
    """Whether values of arrays on a GPU are checked (``CUFA_DEBUG``)."""
    return _flag("CUFA_DEBUG")


def describe() -> list[tuple[str, str, str]]:
    """Every variable as (name, value, meaning), in the order of the table.

    The value is the one in the environment as it was written, wrong or not, and else the default: a report
    about a broken environment must not itself fail.
    """
    return [(variable.name, _text(variable.name), variable.meaning) for variable in VARIABLES]


def _text(name: str) -> str:
    return os.environ.get(name, "").strip() or _BY_NAME[name].default


def _flag(name: str) -> bool:
    text = _text(name)
    if text not in ("0", "1"):
        raise _error(name, "0 or 1", text)
    return text == "1"


def _path(name: str) -> Path | None:
    """Read a path; ``~`` is expanded, and a relative path made absolute, once, so that a later chdir is harmless."""
    text = os.environ.get(name, "").strip()
    return _path_of(name, text, text) if text else None


def _paths(name: str) -> tuple[Path, ...]:
    """Read paths, each as `_path` does; empty ones count as none."""
    text = os.environ.get(name, "").strip()
    return tuple(_path_of(name, part.strip(), text) for part in text.split(os.pathsep) if part.strip())


def _path_of(name: str, part: str, text: str) -> Path:
    expanded = os.path.expanduser(part)
    if expanded.startswith("~"):
        raise _error(name, "a path whose home directory can be found", text)
    if os.path.isabs(expanded):
        return Path(os.path.normpath(expanded))
    try:
        return _absolute(name, expanded)
    except OSError:
        raise _error(name, "an absolute path, because the working directory is gone", text) from None


@cache
def _absolute(name: str, relative: str) -> Path:
    """Where a variable with a relative path led when it was first used."""
    return Path(os.path.abspath(relative))


def _error(name: str, expected: str, text: str) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {text!r}; {_BY_NAME[name].meaning}.")

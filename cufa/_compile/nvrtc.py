"""Which NVRTC there is, told apart from every other build, and loaded only to compile.

Keys of kernels cover every byte of the library and of its builtins. Reading them takes a quarter of a second, so a
note in the cache remembers what was found of files with these paths, inodes, sizes and times. A second note remembers
which library was found, by all that the search depends on, so that a process whose kernels are all cached need not
load it. What compiles is settled before it compiles (`settle`): what was remembered counts no longer if another
library is then loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import site
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from .._driver import forks as _forks
from ..errors import CompileError
from . import cache as _cache
from . import files as _files
from .cache import CubinCache

RECENT_SECONDS = 2.0
"""Age below which a file may change again without a change of its times, and is not remembered."""

_REMEMBERED = ("site-packages", "conda")
_NOT_REMEMBERED = ("system-search", "CUDA_PATH")
"""Ways of pathfinder's to a library: those that `_search` covers, and those that depend on more."""

_BUILTINS = re.compile(r"libnvrtc-builtins\.so.*|nvrtc-builtins64_.*\.dll", re.IGNORECASE)


class Nvrtc(NamedTuple):
    """The run-time compiler.

    Attributes
    ----------
    version : tuple of int
    path, found_via : str
    build : str
        Digest of the library and its builtins, which tells builds of one version apart.
    archs : tuple of int
        Compute capabilities it compiles for.
    """

    version: tuple[int, int]
    path: str
    found_via: str
    build: str
    archs: tuple[int, ...]


class Loaded(NamedTuple):
    """The library in this process.

    Attributes
    ----------
    path, found_via : str
    version : tuple of int
    archs : tuple of int
    bindings : module
        Kept here, since nothing can be imported while the interpreter ends.
    """

    path: str
    found_via: str
    version: tuple[int, int]
    archs: tuple[int, ...]
    bindings: Any


_known: Nvrtc | None = None
_settled: Nvrtc | None = None


def find(notes: Callable[[], CubinCache | None]) -> Nvrtc:
    """The NVRTC that would compile now, without loading it if the notes know it; `notes` gives them.

    Raises
    ------
    CompileError
        If there is none; the message says what to install.
    """
    global _known
    known = _known
    if known is None:
        known = _known = _remembered(notes()) or settle(notes)
    return known


def settle(notes: Callable[[], CubinCache | None]) -> Nvrtc:
    """Load NVRTC; from now on, and whatever was remembered of it, `find` says what was loaded."""
    global _known, _settled
    known = _settled
    if known is None:
        known = _settled = _known = _look(notes())
    return known


def forget() -> None:
    """Drop what this process knows of NVRTC; a library that is loaded stays so."""
    global _known, _settled
    _known = _settled = None
    load.cache_clear()


@lru_cache(maxsize=1)
def load() -> Loaded:
    """Find and load the library."""
    try:
        with _forks.section():
            from cuda import pathfinder
            from cuda.bindings import nvrtc as bindings

            found = pathfinder.load_nvidia_dynamic_lib("nvrtc")
            _, major, minor = call("nvrtcVersion", bindings.nvrtcVersion())
            _, archs = call("nvrtcGetSupportedArchs", bindings.nvrtcGetSupportedArchs())
    except CompileError:
        raise
    except Exception as error:  # pathfinder and bindings raise classes of their own
        raise CompileError(
            f"cufa: NVRTC, which compiles the kernels, cannot be loaded: {error}. Install it with "
            "pip install 'cufa[cuda13]' or 'cufa[cuda12]', whichever CUDA the driver supports."
        ) from error
    return Loaded(str(found.abs_path), str(found.found_via), (major, minor), tuple(map(int, archs)), bindings)


def call(function: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The result of a function of NVRTC's; CompileError if it failed."""
    if result[0] != 0:
        raise CompileError(f"cufa: {function} failed: {getattr(result[0], 'name', result[0])}.")
    return result


def _look(notes: CubinCache | None) -> Nvrtc:
    """What is loaded, which is noted."""
    path, found_via, version, archs, _ = load()
    try:
        files = _files_of(path)
        key = _note_key(files)
        build = _build_in(None if notes is None else notes.note(key))
        if notes is None or any(_is_recent(file) for file in files):
            return Nvrtc(version, path, found_via, build or _digest(files), archs)
        if not build:
            with notes.claim_note(key, "reading NVRTC") as note:
                build = _build_in(note)
                if not build:
                    build = _digest(files)
                    notes.keep_note(key, {"build": build, "version": version, "archs": archs})
    except OSError as error:
        raise CompileError(
            f"cufa: NVRTC is loaded, but its file {path} cannot be read: {error.strerror or error}. If it was replaced "
            "or removed while this process ran, start the process again; else install NVRTC again."
        ) from error
    if found_via in _REMEMBERED or found_via in _NOT_REMEMBERED:
        search, place = _search(), {"path": path if found_via in _REMEMBERED else "", "found_via": found_via}
        if search is not None and notes.note(search) != place:
            notes.keep_note(search, place)
    return Nvrtc(version, path, found_via, build, archs)


def _remembered(notes: CubinCache | None) -> Nvrtc | None:
    """What the notes know of the library that the search would find now.

    Of processes that start at once one finds it and reads it, and the others wait for its notes.
    """
    if notes is None or _is_loaded() or (search := _search()) is None:
        return None
    place = notes.note(search)
    known = _recall(notes, place)
    if known is not None or _text(place, "found_via") in _NOT_REMEMBERED:
        return known
    with notes.claim_note(search, "looking for NVRTC") as place:
        known = _recall(notes, place)
        return settle(lambda: notes) if known is None else known


def _recall(notes: CubinCache, place: dict[str, Any] | None) -> Nvrtc | None:
    """What the notes know of the library at a place."""
    path, found_via = _text(place, "path"), _text(place, "found_via")
    if not path:
        return None
    try:
        about = notes.note(_note_key(_files_of(path)))
        build = _build_in(about)
        if about is None or not build:
            return None
        major, minor = map(int, about["version"])
        return Nvrtc((major, minor), path, found_via, build, tuple(map(int, about["archs"])))
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _is_recent(path: str) -> bool:
    return time.time() - os.stat(path).st_ctime < RECENT_SECONDS


def _build_in(note: dict[str, Any] | None) -> str:
    build = _text(note, "build")
    return build if re.fullmatch(r"[0-9a-f]{64}", build) else ""


def _text(note: dict[str, Any] | None, name: str) -> str:
    value = None if note is None else note.get(name)
    return value if isinstance(value, str) else ""


def _files_of(path: str) -> list[str]:
    """The library at `path`, and all builtins that it might load: they lie beside it, or where the loader is told."""
    real = os.path.realpath(path)
    found = {real}
    for folder in (os.path.dirname(path), os.path.dirname(real), *_library_path()):
        for item in _files.listing(folder):
            if _BUILTINS.fullmatch(item.name):
                found.add(os.path.realpath(item.path))
    return [real, *sorted(found - {real})]


def _library_path() -> list[str]:
    return [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if os.path.isabs(folder)]


def _note_key(files: list[str]) -> str:
    return _cache.digest({"note": "the build of NVRTC", "files": [stamp for file in files for stamp in _stamp(file)]})


def _digest(files: list[str]) -> str:
    """Digest of all bytes of `files`; not of their paths, since what they compile is the same elsewhere."""
    parts = []
    for path in files:
        with open(path, "rb") as file:
            parts.append(hashlib.file_digest(file, _sha256).hexdigest())
    return _cache.digest({"library": parts[0], "builtins": sorted(parts[1:])})


def _sha256() -> Any:
    return hashlib.sha256(usedforsecurity=False)


def _stamp(path: str) -> Iterator[str]:
    """What changes when `path` does, without reading it."""
    status = os.stat(path)
    yield path
    for name in ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"):
        yield str(getattr(status, name))


def _search() -> str | None:
    """Key of the note that says where NVRTC is: everything that pathfinder's search in wheels and conda looks at.

    Installing a package, into a directory of packages or with conda, changes the times of directories. What else could
    lead to another library is a system's linker, or one that is loaded already; neither is noted. Nor is anything
    outside Linux, where it cannot be told cheaply what is loaded.
    """
    if not sys.platform.startswith("linux"):
        return None
    folders = [*site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    watched = [each for folder in folders for each in (folder, f"{folder}/nvidia", *_below(f"{folder}/nvidia"))]
    conda = os.environ.get("CONDA_PREFIX", "")
    if conda:
        watched += [conda, *(f"{conda}/{name}" for name in ("conda-meta", "lib", "targets/x86_64-linux/lib"))]
    try:
        finder = importlib.util.find_spec("cuda.pathfinder")
    except Exception:  # whatever a broken package raises, which loading it will say
        return None
    if finder is None or finder.origin is None:
        return None
    fields: list[str] = []
    for path in (*watched, finder.origin):
        with contextlib.suppress(OSError):
            fields += _stamp(path)
    return _cache.digest({"note": "where NVRTC is", "conda": conda, "watched": fields})


def _below(folder: str) -> list[str]:
    """The directories of libraries in a directory of NVIDIA's packages."""
    found = sorted(item.path for item in _files.listing(folder) if item.is_dir())
    return [each for path in found for each in (path, f"{path}/lib")]


def _is_loaded() -> bool:
    """Whether this process has an NVRTC, which pathfinder would take whatever else there is."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return b"/libnvrtc" in file.read()
    except OSError:
        return True

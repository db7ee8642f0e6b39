"""Where kernels come from before the cache is asked and NVRTC is loaded: the bundles that are at hand.

Those that ``CUFA_BUNDLE_PATH`` names come first, then installed ones, then those in wheels. A bundle is opened when
those before it have not served, once for a process. What is wrong with one is logged once, and it is not used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from .._driver import forks as _forks
from .._kernels.unit import Unit
from . import cache as _cache
from . import env as _env
from . import files as _files
from . import sources as _sources
from .bundle import SUFFIX, Bundle, Listed, Manifest, architectures, command_for, open_bundle, targets_for
from .cache import Entry

ENDING = (ImportError, NameError)
"""What it looks like when the interpreter ends: nothing can be imported, and `open` is the name of nothing."""

GROUP = "cufa.bundles"
"""The entry points by which bundles in wheels are found. Each names the path of one, or a function that returns it."""


class Served(NamedTuple):
    """A kernel from a bundle.

    Attributes
    ----------
    path : Path
        Of the bundle.
    listed : Listed
    entry : Entry
    """

    path: Path
    listed: Listed
    entry: Entry

    @property
    def name(self) -> str:
        """What tells the kernel from all others."""
        return self.listed.name


class Where(NamedTuple):
    """What the environment says of bundles.

    Attributes
    ----------
    named : tuple of Path
        Bundles and directories.
    installed : Path or None
    keys : tuple of Path
        Files of public keys; if there are any, one of them must have signed a bundle.
    trust_shared : bool
        Whether bundles that other users own or can write are used.
    """

    named: tuple[Path, ...]
    installed: Path | None
    keys: tuple[Path, ...]
    trust_shared: bool


class Place:
    """A bundle that may be there: what came of opening it is remembered.

    Attributes
    ----------
    path : Path
    origin : {'CUFA_BUNDLE_PATH', 'installed', 'wheel'}
    trouble : str
        Why it is not used, in a sentence; empty if nothing is known to be wrong.
    """

    def __init__(self, path: Path, origin: str, where: Where, trouble: str = "") -> None:
        self.path = path
        self.origin = origin
        self.trouble = ""
        self._where = where
        self._bundle: Bundle | None = None
        if trouble:
            self.give_up(trouble)

    def bundle(self) -> Bundle | None:
        """The bundle, open, or None if it is not used."""
        if self._bundle is None and not self.trouble:
            try:
                self._bundle = self._opened()
            except (ValueError, OSError) as error:
                self.give_up(_sentence(error, self.path))
        return self._bundle

    def give_up(self, trouble: str) -> None:
        """Use the bundle no more."""
        self._bundle, self.trouble = None, trouble.removeprefix("cufa: ").rstrip(".")
        _cache.log(logging.WARNING, "bundle not used: %s", self.trouble)

    def _opened(self) -> Bundle:
        bundle = open_bundle(self.path)
        try:
            # What pip has installed is trusted as the Python code beside it is.
            (check_signature if self.origin == "wheel" else check_trust)(bundle, self._where)
        except BaseException:
            bundle.close()
            raise
        return bundle


def check_trust(bundle: Bundle, where: Where) -> None:
    """Refuse a bundle that others could have written, or that lacks a signature that is asked for, by a ValueError."""
    if not where.trust_shared:
        # The directory that was named, and the one that the file is in if a link leads there.
        for directory in (bundle.path.parent, Path(os.path.realpath(bundle.path)).parent):
            _check_owner(directory, os.stat(directory))
        _check_owner(bundle.path, bundle.status)
    check_signature(bundle, where)


def check_signature(bundle: Bundle, where: Where) -> None:
    """Refuse a bundle that is not signed by one of the keys, if there are any, by a ValueError."""
    if where.keys:
        from . import signing  # cryptography takes long to import

        signing.check(bundle, where.keys, where.trust_shared)


def _check_owner(path: Path, status: os.stat_result) -> None:
    if (reason := _files.SYSTEM.foreign(path, status)) is not None:
        raise ValueError(reason)


def _sentence(error: Exception, path: Path) -> str:
    return f"{path}: {error.strerror or error}" if isinstance(error, OSError) else str(error)


class Bundles:
    """The bundles at hand, in the order in which they are searched."""

    def __init__(self, where: Where) -> None:
        self.places = [Place(path, origin, where, trouble) for path, origin, trouble in _found(where)]
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self.places)

    def find(self, key: str, unit: Unit) -> Served | None:
        """The kernel of a `source_key`, from the first bundle that has it for the GPUs of `unit`."""
        for place in self.places:
            with self._lock:
                bundle = self._usable(place)
                listed = None if bundle is None else bundle.find(key, unit)
                if bundle is None or listed is None:
                    continue
                try:
                    return Served(place.path, listed, bundle.entry(listed))
                except (ValueError, OSError) as error:
                    place.give_up(_sentence(error, place.path))
                except ENDING:
                    return None
        return None

    def why(self, unit: Unit) -> str:
        """Why none of the bundles serves a unit, in one sentence that ends with what to do."""
        reasons = []
        for place in self.places:
            with self._lock:
                bundle = self._usable(place)
            reasons.append(place.trouble if bundle is None else f"{place.path} {_why_not(bundle, unit)}")
        command = command_for(unit.plan) if unit.plan is not None else ""
        remedy = f"{command} makes one that serves" if command else _NO_COMMAND
        return f"No bundle serves: {'; '.join(reasons)}; {remedy}."

    def _usable(self, place: Place) -> Bundle | None:
        try:
            return place.bundle()
        except ENDING:
            return None


_NO_COMMAND = (
    "bundles hold no score terms but cufa's own, so let the cache hold it, after a call where that may compile"
)


def made_from(manifest: Manifest) -> str:
    """That a bundle was made from other sources than these, in words."""
    from .. import __version__

    return (
        f"was made from cufa {manifest.cufa} sources {manifest.sources[:8]}…, this is {__version__} "
        f"({_sources.version()[:8]}…)"
    )


def _why_not(bundle: Bundle, unit: Unit) -> str:
    manifest = bundle.manifest
    if manifest.sources != _sources.version():
        return made_from(manifest)
    if not targets_for(manifest.targets, unit.arch):
        return f"was built for {architectures(manifest.targets)}; this GPU is sm_{unit.arch}"
    words = _without_arch(unit.words)
    if any(_without_arch(entry.what) == words for entry in manifest.entries):
        return f"has {words} for other architectures, or other lengths or layouts of arrays, only"
    return f"has no {words}"


def _without_arch(words: str) -> str:
    return words.rpartition(" for ")[0]


_known: dict[Where, Bundles] = {}
_lock = threading.Lock()


def _forget() -> None:
    """In a forked child, which has places in open files in common with its parent, and no thread to release a lock."""
    global _lock
    _lock = threading.Lock()
    _known.clear()


_forks.after_in_child(_forget)


def where() -> Where:
    """What the environment says now; a wrong value raises ValueError."""
    return Where(_env.bundle_path(), _env.bundle_dir(), _env.bundle_keys(), _env.cache_trust_shared())


def bundles() -> Bundles:
    """The bundles that the environment describes now, looked for once."""
    described = where()
    found = _known.get(described)
    if found is None:
        with _lock:
            found = _known.get(described)
            if found is None:
                found = _known[described] = Bundles(described)
    return found


def _found(where: Where) -> Iterator[tuple[Path, str, str]]:
    """Paths of bundles, where each comes from, and what is known to be wrong with it."""
    for path in where.named:
        try:
            inside = _inside(path)
        except NotADirectoryError:
            inside = [path]
        except OSError as error:
            yield path, "CUFA_BUNDLE_PATH", f"{path}, which CUFA_BUNDLE_PATH names: {error.strerror or error}"
            continue
        yield from ((each, "CUFA_BUNDLE_PATH", "") for each in inside)
    with contextlib.suppress(OSError):
        if where.installed is not None:
            yield from ((each, "installed", "") for each in _inside(where.installed))
    yield from ((path, "wheel", trouble) for path, trouble in _in_wheels())


def _inside(directory: Path) -> list[Path]:
    return sorted(directory / name for name in os.listdir(directory) if name.endswith(SUFFIX))


@lru_cache(maxsize=1)
def _in_wheels() -> tuple[tuple[Path, str], ...]:
    """Bundles of installed distributions, in the order of their entry points' names."""
    try:
        if not any(map(_has_entry_points, sys.path or ())):  # it is None when the interpreter ends
            return ()
        from importlib.metadata import entry_points
    except ENDING:
        return ()
    found = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            value = point.load()
            found.append((Path(value() if callable(value) else value), ""))
        except Exception as error:  # whatever another's package does
            what = f"the entry point {point.name} = {point.value} of the group {GROUP} fails"
            found.append((Path(point.name), f"{what}: {type(error).__name__}: {error}"))
    return tuple(found)


def _has_entry_points(directory: str) -> bool:
    """Whether some distribution below a directory of `sys.path` mentions the group.

    Reading all of them so takes a millisecond or two, and importing importlib.metadata twenty.
    """
    with contextlib.suppress(OSError), os.scandir(directory or ".") as items:
        for item in items:
            if item.name.endswith((".dist-info", ".egg-info")):
                with contextlib.suppress(OSError), open(os.path.join(item.path, "entry_points.txt"), "rb") as file:
                    if GROUP.encode() in file.read():
                        return True
    return False

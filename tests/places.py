"""Surroundings of a test's own: no variables of cufa's, an empty cache, no bundles but those it makes, and bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from cufa._call import kvcache as _kvcache
from cufa._call import problem as _problem
from cufa._compile import jit as _jit
from cufa._compile import lookup as _lookup


def use(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache in `directory`, and look for it and for bundles anew."""
    for name in [*os.environ]:
        if name.startswith("CUFA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUFA_CACHE_DIR", str(directory / "cache"))
    monkeypatch.setattr(_lookup, "_known", {})
    monkeypatch.setattr(_lookup, "_in_wheels", tuple)
    monkeypatch.setattr(_jit, "_caches", {})


@contextmanager
def bounds(module: ModuleType, **bounds: int) -> Iterator[None]:
    """Other bounds than a module's, by which it is decided what kernel serves a problem."""
    with pytest.MonkeyPatch.context() as patch:
        for name, bound in bounds.items():
            patch.setattr(module, name, bound)
        _problem._checked.cache_clear()
        yield
    _problem._checked.cache_clear()


@contextmanager
def few_fill_tiles() -> Iterator[None]:
    """However few queries over caches are, they count as many, which the kernel for large tiles serves."""
    with bounds(_kvcache, FULL_ROWS=0, FULL_GPU_ROWS=0):
        yield


def imported_by(arguments: list[str], modules: tuple[str, ...]) -> str:
    """The output of a command in a new process, whose last line lists which of `modules` it has imported."""
    script = (
        f"import sys; from cufa._cli.main import main; sys.argv = {['cufa', *arguments]}\n"
        "try: main()\n"
        f"except SystemExit: print([m for m in {modules} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

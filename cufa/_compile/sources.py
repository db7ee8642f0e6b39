"""The CUDA sources that come with the package."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import CompileError
from . import cache as _cache


@lru_cache(maxsize=1)
def headers() -> dict[str, bytes]:
    """Every header under ``cuda_src``, by its path there."""
    package: Any = Path(__file__).parents[1]
    if not package.is_dir():  # in a zip file
        import importlib.resources  # slow to import, and seldom needed

        package = importlib.resources.files("cufa")
    # Beside the package in a source tree, and in it where it is installed.
    for root in (package / "cuda_src", package.parent / "cuda_src"):
        if found := dict(_headers_below(root, "")):
            return found
    raise CompileError(f"cufa: the CUDA sources are missing from {package}; install cufa again.")


def _headers_below(folder: Any, prefix: str) -> Iterator[tuple[str, bytes]]:
    for item in sorted(folder.iterdir(), key=lambda item: str(item.name)) if folder.is_dir() else ():
        if item.name.endswith(".cuh"):
            yield f"{prefix}{item.name}", item.read_bytes()
        elif item.is_dir():
            yield from _headers_below(item, f"{prefix}{item.name}/")


@lru_cache(maxsize=1)
def version() -> str:
    """Digest of all headers, by which sentences tell the sources of a bundle from these."""
    return _cache.digest(headers())

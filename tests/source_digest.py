"""The digest of the sources that a run of the GPU tests has verified."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".py", ".cuh", ".cu")


def digest_of(root: Path) -> str:
    """Of everything under cufa/ and cuda_src/ of a tree that a GPU run verifies, but for comments in CUDA."""
    state = hashlib.sha256()
    for path in sorted(path for top in ("cufa", "cuda_src") for path in (root / top).rglob("*")):
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts:
            content = path.read_bytes()
            if path.suffix != ".py":
                lines = (line.partition(b"//")[0].strip() for line in content.splitlines())
                content = b"\n".join(filter(None, lines))
            name = path.relative_to(root).as_posix()
            state.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return state.hexdigest()

"""Bundles of kernels that are none, and damaged archives, for the tests."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plans

from cufa._call.problem import Static
from cufa._compile import jit as _jit
from cufa._compile.bundle import MANIFEST, Item, write
from cufa._kernels.unit import Unit

FACTS = Static("f16", 64, 64, "causal", (), False, False, 16, 16, True, False)
META = {"kernel": "a_kernel", "what": "a_kernel (f16) for sm_80", "arch": "80", "registers": 128, "spill_bytes": 0}
META |= {"seconds": 1.5, "config": {"head_dim": 64, "causal": True}, "nvrtc": "13.0 abc"}


def unit(arch: int = 80, **facts: Any) -> Unit:
    """What a call needs on a GPU."""
    return _jit.unit_of(plans.forward(FACTS._replace(**facts), arch))


def item(name: str | Unit = "one", target: str = "80", cubin: bytes = b"not really a cubin", **meta: Any) -> Item:
    """A kernel of a made-up key, or of a unit's."""
    if isinstance(name, Unit):
        return Item(_jit.source_key(name), target, cubin, META | {"what": name.words} | meta)
    return Item(hashlib.sha256(name.encode()).hexdigest(), target, cubin, META | meta)


def made(path: Path, *items: Item, **options: Any) -> Path:
    """A bundle at `path`."""
    write(path, items, archs=["sm_80"], **options)
    return path


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path: Path, change: Callable[[dict[str, bytes]], Any]) -> Path:
    """The same bundle with other files in it, as somebody else would write it."""
    files = contents(path)
    change(files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def with_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same bundle with another manifest."""

    def changed(files: dict[str, bytes]) -> None:
        manifest = json.loads(files[MANIFEST])
        change(manifest)
        files[MANIFEST] = json.dumps(manifest).encode()

    return rewritten(path, changed)

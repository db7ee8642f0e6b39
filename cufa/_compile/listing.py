"""A kernel to be read: its source in one piece, PTX, machine code, and what each of its functions takes."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from .._kernels.unit import Unit
from ..errors import CompileError
from . import jit as _jit
from .jit import Compiled


class Takes(NamedTuple):
    """What a ``__global__`` function takes: registers and threads, and shared memory and spills in bytes."""

    entry: str
    registers: int
    spill_bytes: int
    threads: int
    smem_bytes: int


def inlined(unit: Unit) -> str:
    """The source with every header in place of the first line that includes it."""
    seen: set[str] = set()

    def expand(text: str) -> str:
        return re.sub(r'^#include "([^"]+)"\n?', header, text, flags=re.MULTILINE)

    def header(found: re.Match[str]) -> str:
        name = found[1]
        if name in seen or name not in unit.headers:
            return "" if name in seen else found[0]
        seen.add(name)
        text = re.sub(r"^#pragma once\n", "", unit.headers[name].decode(), flags=re.MULTILINE)
        return f"// --- {name}\n{expand(text).rstrip()}\n// --- end of {name}\n"

    return expand(unit.source)


def compiled(unit: Unit) -> Compiled:
    """What the compiler makes of a unit now, PTX included, whatever there is of it already."""
    return _jit.compile_source(unit.source, _jit.options_of(_jit.target_of(unit)), unit.words, unit.headers, ptx=True)


def takes(unit: Unit, compiled: Compiled) -> list[Takes]:
    """What each function takes, in the order of the launches, from what ptxas has logged."""
    assert unit.plan is not None
    logged = by_function(compiled.log)
    return [
        Takes(step.entry, *_jit.resources_of(logged.get(step.entry, "")), step.threads, step.smem_bytes)
        for step in unit.plan.steps
    ]


def by_function(log: str) -> dict[str, str]:
    """What ptxas has logged of each ``__global__`` function."""
    parts = re.split(r"Compiling entry function '(\w+)'", log)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def can_disassemble() -> bool:
    """Whether `sass` finds its programs."""
    return None not in map(_find_tool, ("cuobjdump", "nvdisasm"))


def sass(cubin: bytes) -> str:
    """The machine code of a cubin.

    Raises
    ------
    CompileError
        If there is no cuobjdump or nvdisasm, or they fail.
    """
    cuobjdump, nvdisasm = _tool("cuobjdump"), _tool("nvdisasm")
    # cuobjdump looks for nvdisasm on the path.
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])
    with tempfile.TemporaryDirectory(prefix="cufa-") as directory:
        file = Path(directory, "kernel.cubin")
        file.write_bytes(cubin)
        run = subprocess.run(
            [cuobjdump, "-sass", str(file)], capture_output=True, text=True, env=os.environ | {"PATH": path}
        )
    if run.returncode:
        raise CompileError(f"cufa: {cuobjdump} failed: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout


def _find_tool(name: str) -> str | None:
    """Where a program of the CUDA toolkit is: in NVIDIA's wheels, an environment of conda, or an installed toolkit."""
    import shutil

    from cuda import pathfinder

    find = getattr(pathfinder, "find_nvidia_binary_utility", None)  # older versions have none
    found: str | None = find(name) if find is not None else None
    return found or shutil.which(name)


def _tool(name: str) -> str:
    found = _find_tool(name)
    if found is None:
        raise CompileError(
            f"cufa: machine code is read by {name}, which is not here; install it with "
            "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or put a CUDA toolkit's bin on the path."
        )
    return found

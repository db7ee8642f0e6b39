"""Which kernels a program uses, written to a file while it runs: ``CUFA_RECORD``.

A line is a JSON object that tells of one kernel and one process: enough to choose the kernel again, for any GPU. Lines
of all processes and threads end up whole in the file, as far as its file system appends at once, which those of a
network may not. Whoever is killed while it writes leaves a piece of a line, which readers skip.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .._call.problem import CACHE_DTYPES, ROTARY, Static
from .._kernels import Plan
from .._kernels.kernel import MASKS, SIZEOF
from .._terms import TERMS, Term
from . import cache as _cache
from . import env as _env

TROUBLE = (*_cache.TROUBLE, ValueError)
"""What keeps a line from being written; ValueError is a wrong value of the variable."""

_TERMS: dict[str, Term] = {term.name: term for term in TERMS}
_noted: set[tuple[str, Static | None, int]] = set()
_failed = False


class Use(NamedTuple):
    """A kernel that was used: its name, what calls it served, and on which GPU.

    Attributes
    ----------
    kernel : str
    static : Static or None
        None for the kernel that copies arrays.
    arch : int
    """

    kernel: str
    static: Static | None
    arch: int


def note(plan: Plan, static: Static | None, operation: str) -> None:
    """Write down that a kernel was loaded for calls of an operation: once, and only where ``CUFA_RECORD`` asks for it.

    Nothing raises: trouble is logged, the first time.
    """
    global _failed
    try:
        path = _env.record_file()
        use = (plan.name, static, plan.arch)
        if path is None or use in _noted:
            return
        _noted.add(use)
        _append(path, json.dumps(_told(plan, static, operation)).encode() + b"\n")
    except TROUBLE as error:
        if not _failed:
            _failed = True
            _cache.log(logging.WARNING, "used kernels are not recorded: %s", error)


def _told(plan: Plan, static: Static | None, operation: str) -> dict[str, Any]:
    from .. import __version__

    told = {"cufa": __version__, "kernel": plan.name, "arch": plan.arch, "operation": operation}
    if static is None:
        return told
    outside = [_full_name(term) for term in static.terms if type(term) is not type(_TERMS.get(term.name))]
    if outside:  # a class of the program's own, which nobody else can find by a name
        return told | {"outside": outside}
    return told | {"static": static._asdict() | {"terms": [term.name for term in static.terms]}}


def _full_name(term: Term) -> str:
    return f"{type(term).__module__}.{type(term).__qualname__}"


def _append(path: Path, line: bytes) -> None:
    """Add a line in one piece, behind whatever piece of one a killed writer has left."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a file")
        if status.st_size:
            os.lseek(descriptor, -1, os.SEEK_END)
            line = line if os.read(descriptor, 1) == b"\n" else b"\n" + line
        if os.write(descriptor, line) != len(line):
            raise OSError(f"{path} cannot hold all of a line; is the disk full?")
    finally:
        os.close(descriptor)


def read(path: Path) -> tuple[list[Use], list[str]]:
    """The distinct kernels of a record, in their order, and a sentence about each line that is left out."""
    uses: dict[Use, None] = {}
    notices: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            uses[_use(json.loads(line))] = None
        except _Skipped as skipped:
            notices.append(f"line {number}: {skipped}")
        except (ValueError, TypeError, KeyError, RecursionError):
            notices.append(f"line {number} is no record of a kernel, or a piece of one; it is skipped.")
    return list(uses), notices


class _Skipped(Exception):
    """Why a kernel cannot be chosen again, in a sentence."""


def _use(told: Mapping[str, Any]) -> Use:
    if "outside" in told:
        raise _Skipped(
            f"{told['kernel']} has the score term {', '.join(map(str, told['outside']))}, which is the program's own "
            "and cannot be compiled without it; it is skipped."
        )
    kernel, arch = told["kernel"], told["arch"]
    if type(kernel) is not str or type(arch) is not int:
        raise TypeError
    if "static" not in told:
        return Use(kernel, None, arch)
    return Use(kernel, _static(told["static"], told["cufa"]), arch)


def _static(told: Mapping[str, Any], version: str) -> Static:
    """The facts of a line. They become source, so that nothing but what they may be is taken."""
    unknown = [name for name in told["terms"] if name not in _TERMS]
    if told.keys() != {*Static._fields} or unknown:
        from .. import __version__

        raise _Skipped(
            f"it was written by cufa {version}, which tells kernels apart otherwise than {__version__}; record anew. "
            "It is skipped."
        )
    facts = dict(told) | {"terms": tuple(_TERMS[name] for name in told["terms"])}
    right = (
        facts["element"] in SIZEOF
        and facts["mask"] in [mask.name for mask in MASKS]
        and facts["rotary"] in ROTARY
        and facts["kv_element"] in ("", *CACHE_DTYPES.values())
        and all(type(facts[name]) is kind for name, kind in _KINDS.items())
        and all(facts[name] > 0 for name in ("head_dim", "head_dim_v"))
        and all(facts[name] >= 0 for name, kind in _KINDS.items() if kind is int)
    )
    if not right:
        raise ValueError
    return Static(**facts)


_EXAMPLE = Static("f16", 1, 1, "none", (), False, False, 16, 16, True, False)
_KINDS = {name: type(value) for name, value in _EXAMPLE._asdict().items() if type(value) in (int, bool)}

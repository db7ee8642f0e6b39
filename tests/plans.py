"""Plans and grids by what tests vary: the facts of problems, at the edges of the tables of tiles."""

from __future__ import annotations

import math
import re
from typing import Any

from cufa._call.problem import LONG_ROWS, Problem, Static
from cufa._compile import jit as _jit
from cufa._kernels import Plan, align, choose
from cufa._kernels.kernel import SIZEOF, has_short_tile
from cufa._operations.backward import BACKWARD as GRADIENTS
from cufa._operations.forward import FORWARD
from cufa._operations.kvcache import KVCACHE
from cufa._terms import TERMS

ALL_TERMS = tuple(term for term in TERMS if term.name != "large_softcap")
"""Of those of cufa what one call may have: a softcap is low or large."""

ARCHS = (80, 86, 90, 100, 120)
HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (40, 57), (64, 128), (192, 128))
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": "causal"},
    "short": {"mask": "causal", "short": True},
    "sharing": {"pack": 4, "mask": "causal", "short": True},
    "window": {"mask": "window"},
    "packed": {"mask": "causal", "short": True, "varlen": True},
    "everything": {"mask": "window", "softcap": True, "alibi": True, "sinks": True, "varlen": True},
    "elementwise": {"mask": "causal", "varlen": True, "copy_bytes": 0, "store_bytes": 0},
    "many": {"varlen": True, "many": True},
}


def static(element: str, head_dim: int, head_dim_v: int, **features: Any) -> Static:
    """The facts of a problem; a score term is there if its name is among the features."""
    size = SIZEOF[element]
    facts: dict[str, Any] = {"mask": "none", "sinks": False, "varlen": False}
    facts |= {"tma": features.get("copy_bytes", 16) == 16, "short": False}
    facts |= {"copy_bytes": 16, "out_copy_bytes": 16, "store_bytes": max(size, math.gcd(16, head_dim_v * size))}
    facts |= features
    facts["terms"] = tuple(term for term in TERMS if facts.pop(term.name, False))
    facts |= {name: facts[name] or size for name in ("store_bytes", "out_copy_bytes")}
    facts["copy_bytes"] = facts["copy_bytes"] or SIZEOF[facts.get("kv_element") or element]
    return Static(element=element, head_dim=head_dim, head_dim_v=head_dim_v, **facts)


def compile_plan(plan: Plan) -> _jit.Compiled:
    return _jit.compile_unit(_jit.unit_of(plan))


def static_memory(log: str) -> dict[str, int]:
    """Bytes of shared memory that the code of each entry declares, from what ``--ptxas-options=-v`` logs."""
    sizes = {}
    for entry in log.split("Compiling entry function '")[1:]:
        used = re.search(r"Used \d+ registers.*", entry)
        assert used is not None, log
        declared = re.search(r"(\d+) bytes smem", used[0])
        sizes[entry.partition("'")[0]] = int(declared[1]) if declared else 0
    return sizes


BACKWARD: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": "causal"},
    "packed": {"mask": "causal", "varlen": True},
    "window": {"mask": "window", "sinks": True},
    "slopes": {"alibi": True},
    "everything": {"mask": "window", "softcap": True, "alibi": True, "sinks": True, "varlen": True},
    "elementwise": {"mask": "causal", "varlen": True, "copy_bytes": 0, "out_copy_bytes": 0, "store_bytes": 0},
    "elementwise results": {"mask": "causal", "varlen": True, "out_copy_bytes": 0, "store_bytes": 0},
}

SHORT_TILES = ((16, 16), (32, 32), (16, 64), (32, 16), (16, 32), (32, 64))


def short(element: str, head_dims: tuple[int, int], tile: tuple[int, int], features: dict[str, Any]) -> Static:
    """Of sequences that have small tiles to themselves."""
    facts = static(element, *head_dims, **features)._replace(pack=1, short_rows=tile[0], short_keys=tile[1])
    assert has_short_tile(facts)
    return facts


FEW_ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": "causal", "chains": True},
    "everything": {"mask": "window", "softcap": True, "alibi": True, "sinks": True, "chains": True},
    "elementwise": {"mask": "causal", "copy_bytes": 0, "store_bytes": 0},
    "narrow": {"chains": True, "copy_bytes": 4, "store_bytes": 4},
    "sinks": {"sinks": True, "softcap": True},
}


def few(element: str, head_dims: tuple[int, int], rows: int, features: dict[str, Any]) -> Static:
    """Of few query rows, whose keys thread blocks share."""
    return static(element, *head_dims, **features)._replace(few_rows=rows)


CACHES: dict[str, dict[str, Any]] = {
    "plain": {"chains": True},
    "paged": {"page_rows": 16, "slots": True, "chains": True},
    "packed": {"mask": "causal", "varlen": True, "page_rows": 16, "chains": True},
    "everything": {"mask": "window", "softcap": True, "alibi": True, "sinks": True, "varlen": True, "page_rows": 1},
    "elementwise": {"mask": "causal", "varlen": True, "page_rows": 1, "slots": True, "copy_bytes": 0, "store_bytes": 0},
    "rotary": {"mask": "causal", "page_rows": 64, "slots": True, "rotary": "halves", "appends": True},
}
EIGHT_BITS = {name: {**facts, "kv_element": "e4m3"} for name, facts in CACHES.items()}
"""The same of caches of float8."""


def cached(element: str, head_dims: tuple[int, int], rows: int, features: dict[str, Any], arch: int) -> Plan:
    """The kernel over caches for tiles of so many rows."""
    facts = static(element, *head_dims, **features)
    q_copy_bytes = SIZEOF[element] if facts.copy_bytes < 16 else 16
    return choose(KVCACHE, facts._replace(few_rows=rows, q_copy_bytes=q_copy_bytes), arch)


def cached_many(element: str, head_dims: tuple[int, int], features: dict[str, Any]) -> Plan:
    """The kernel over caches for many queries."""
    return choose(KVCACHE, static(element, *head_dims, **features)._replace(full_tiles=True), 90)


def forward(static: Static, arch: int) -> Plan:
    """The kernel of the forward for a GPU of compute capability `arch`."""
    return choose(FORWARD, static, arch)


def backward(static: Static, arch: int, deterministic: bool = False, average_rows: int = LONG_ROWS) -> Plan:
    """The kernel of the gradients."""
    return choose(GRADIENTS, static._replace(deterministic=deterministic, average_rows=average_rows), arch)


def aligned(arch: int) -> Plan:
    """The kernel that copies."""
    return align.plan_for(arch)


def grid(plan: Plan, problem: Problem, num_sms: int) -> Any:
    """How a problem is divided."""
    return plan.kernel.grid(plan.config, problem, num_sms)

"""`cufa.attention` and `cufa.attention_varlen`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._call.problem import Problem, check_offsets
from .._kernels import Kernel
from .._kernels.forward_cluster_sm90 import ForwardClusterSm90
from .._kernels.forward_listed_sm90 import ForwardListedSm90
from .._kernels.forward_packed_sm90 import ForwardPackedSm90
from .._kernels.forward_sm80 import ForwardSm80
from .._kernels.forward_sm90 import ForwardSm90
from .._kernels.forward_split_sm80 import ForwardSplitSm80
from .._terms import TERMS
from .operation import Operation, Result

FORWARD: tuple[Kernel, ...] = (
    ForwardClusterSm90(),
    ForwardSplitSm80(),
    ForwardPackedSm90(),
    ForwardListedSm90(),
    ForwardSm90(),
    ForwardSm80(),
)
INPUTS = ("q", "k", "v", *(name for term in TERMS for name in term.arrays), "sinks")
OFFSETS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")


def results_of(problem: Problem) -> tuple[Result, ...]:
    out = problem.operation.result("out", problem.out_shape, problem.dtype)
    if not problem.options.return_lse:
        return (out,)
    return out, problem.operation.result("lse", problem.lse_shape, problem.lse_dtype)


def _on_cpu(problem: Problem, arrays: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    from .._cpu import forward as _cpu

    q, k, v = (arrays[name] for name in "qkv")
    out, lse = results["out"], results.get("lse")
    options = problem.scoring(arrays)
    if problem.varlen:
        first, second, used = (arrays[name] for name in OFFSETS)
        _cpu.varlen_forward(q, k, v, first, second, used, out, lse, fresh="out" not in problem.specs, **options)
    else:
        _cpu.forward(q, k, v, out, lse, **options)


ATTENTION = Operation(
    name="attention",
    arrays=(*INPUTS, "out"),
    written=("out",),
    tiles=("q", "k", "v"),
    results=results_of,
    terms=TERMS,
    kernels=FORWARD,
    on_cpu=_on_cpu,
)

ATTENTION_VARLEN = Operation(
    name="attention_varlen",
    arrays=(*INPUTS, "out", *OFFSETS),
    written=("out",),
    tiles=("q", "k", "v"),
    results=results_of,
    terms=TERMS,
    kernels=FORWARD,
    on_cpu=_on_cpu,
    check_values=check_offsets,
)

"""`cufa.attention_backward` and `cufa.attention_varlen_backward`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._call.problem import Problem, check_offsets
from .._kernels import Kernel
from .._kernels.backward_sm80 import BackwardSm80
from .._kernels.backward_sm90 import BackwardSm90
from .._kernels.backward_split_sm90 import BackwardSplitSm90
from .._terms import TERMS
from .forward import ATTENTION, ATTENTION_VARLEN
from .operation import Operation, Result

BACKWARD: tuple[Kernel, ...] = (BackwardSm90(), BackwardSplitSm90(), BackwardSm80())
BESIDE = ("dout", "lse", "dlse", "dq", "dk", "dv")
"""What gradients take after the arrays of the forward."""


def _results(problem: Problem) -> tuple[Result, ...]:
    result = problem.operation.result
    gradients = [result(f"d{name}", problem.shape(name), problem.dtype) for name in "qkv"]
    if "sinks" in problem.specs:
        gradients.append(result("dsinks", (problem.num_heads_q,), problem.lse_dtype))
    for term in problem.terms:
        shapes = term.results(problem)
        gradients += (result(name, *shapes[name]) for name in term.gradients)
    return tuple(gradients)


def _on_cpu(problem: Problem, arrays: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    from .._cpu import backward as _cpu_backward

    dout, q, k, v, out, lse, dlse = (arrays[name] for name in ("dout", "q", "k", "v", "out", "lse", "dlse"))
    dq, dk, dv, dsinks = (results.get(name) for name in ("dq", "dk", "dv", "dsinks"))
    gradients: tuple[Any, Any, Any, Any] = dq, dk, dv, dsinks
    of_terms = {name: results[name] for term in problem.terms for name in term.gradients}
    options = problem.scoring(arrays)
    if problem.varlen:
        offsets: tuple[Any, Any, Any] = (arrays["cu_seqlens_q"], arrays["cu_seqlens_k"], arrays["seqused_k"])
        _cpu_backward.varlen_backward(dout, q, k, v, *offsets, out, lse, dlse, *gradients, of_terms, **options)
    else:
        _cpu_backward.backward(dout, q, k, v, out, lse, dlse, *gradients, of_terms, **options)


ATTENTION_BACKWARD = Operation(
    name="attention_backward",
    arrays=(*ATTENTION.arrays, *BESIDE),
    written=("dq", "dk", "dv"),
    tiles=("q", "k", "v", "dout"),
    results=_results,
    terms=TERMS,
    kernels=BACKWARD,
    on_cpu=_on_cpu,
    of=ATTENTION,
)

ATTENTION_VARLEN_BACKWARD = Operation(
    name="attention_varlen_backward",
    arrays=(*ATTENTION_VARLEN.arrays, *BESIDE),
    written=("dq", "dk", "dv"),
    tiles=("q", "k", "v", "dout"),
    results=_results,
    terms=TERMS,
    kernels=BACKWARD,
    on_cpu=_on_cpu,
    of=ATTENTION_VARLEN,
    check_values=check_offsets,
)

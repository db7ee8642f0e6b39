"""`cufa.attention_with_kvcache` and `cufa.decode_plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .._call import options as _options
from .._call.arrays import CPU
from .._call.kvcache import KVCacheProblem, cache_dtype, check_values, facts_of, of_kvcache
from .._call.options import Option
from .._call.problem import Problem
from .._kernels import Kernel
from .._kernels.forward_cache_sm80 import CachePlan, ForwardCacheSm80, plan_words
from .._kernels.forward_cache_sm90 import ForwardCacheSm90
from .._kernels.forward_cluster_cache_sm90 import ClusterCachePlan, ForwardClusterCacheSm90
from .._terms import TERMS
from .call import planned
from .forward import results_of
from .operation import Operation, Result

KVCACHE: tuple[Kernel, ...] = (ForwardClusterCacheSm90(), ForwardCacheSm90(), ForwardCacheSm80())
PLANNING: tuple[Kernel, ...] = (ClusterCachePlan(), CachePlan())


def _on_cpu(problem: Problem, arrays: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    from .._cpu import kvcache as _cpu

    assert isinstance(problem, KVCacheProblem)
    _cpu.forward(problem, arrays, results["out"], results.get("lse"))


ATTENTION_WITH_KVCACHE = Operation(
    name="attention_with_kvcache",
    arrays=(
        *("q", "k_cache", "v_cache", *(name for term in TERMS for name in term.arrays), "sinks", "out", "k", "v"),
        *("cache_seqlens", "block_table", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q"),
        *("rotary_cos", "rotary_sin", "k_descale", "v_descale", "plan"),
    ),
    written=("out",),
    changed=("k_cache", "v_cache"),
    tiles=("k_cache", "v_cache"),
    results=results_of,
    terms=TERMS,
    kernels=KVCACHE,
    on_cpu=_on_cpu,
    check=of_kvcache,
    check_values=check_values,
    options=(
        Option("rotary_interleaved", _options.flag),
        Option("num_splits", _options.integer),
        Option("plan", facts_of),
        Option("cache_dtype", cache_dtype),
    ),
)


def _plan_of(problem: Problem) -> tuple[Result, ...]:
    words = 0 if problem.device == CPU else plan_words(problem, planned(problem).grid)
    return (problem.operation.result("plan", (words,), "int32"),)


def _plan_on_cpu(problem: Problem, arrays: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """There is nothing to divide."""


DECODE_PLAN = replace(
    ATTENTION_WITH_KVCACHE,
    name="decode_plan",
    written=("plan",),
    tiles=(),
    results=_plan_of,
    kernels=PLANNING,
    on_cpu=_plan_on_cpu,
)

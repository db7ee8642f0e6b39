"""The members of ``attention::Params``, which every kernel of attention is given, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .._call.arrays import contiguous
from .._call.problem import MAX_SEQLEN, Problem
from .._terms import Term
from .kernel import four


def params_of(
    problem: Problem,
    *,
    m_blocks: int,
    heads_per_section: int,
    m_units: int | None = None,
    units_per_block: int = 1,
    strides: Mapping[str, tuple[int, ...]] | None = None,
    terms: Sequence[Term] | None = None,
) -> dict[str, Any]:
    """All of them but the addresses; `m_units` are `m_blocks` where tiles are dealt out one by one.

    `strides` are those of q, k, v and the other arrays that the kernel reads, and `terms` its score terms, if not those
    of the problem.
    """
    assert problem.static is not None
    terms = problem.static.terms if terms is None else terms
    strides = problem.strides if strides is None else strides
    lse = contiguous(problem.lse_shape)
    left, right = (MAX_SEQLEN if side is None else side for side in (problem.window_left, problem.window_right))
    return {
        "q_strides": four(strides["q"]),
        "k_strides": four(strides["k"]),
        "v_strides": four(strides["v"]),
        "out_strides": four(strides.get("out") or contiguous(problem.out_shape)),
        "lse_batch_stride": lse[0] if len(lse) == 3 else 0,
        "lse_head_stride": lse[-2],
        **{f"{name}_stride": strides.get(name, (0,))[0] for name in VECTORS},
        "batch": problem.batch,
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
        "num_heads_q": problem.num_heads_q,
        "qheads_per_khead": max(1, problem.num_heads_q // max(1, problem.num_heads_k)),
        "m_blocks": m_blocks,
        "heads_per_section": heads_per_section,
        "window_left": left,
        "window_right": right,
        "softmax_scale": problem.softmax_scale,
        "m_units": m_blocks if m_units is None else m_units,
        "units_per_block": units_per_block,
        "clear_out": "out" not in strides,
        "exponent_scale": problem.softmax_scale / math.log(2.0),
        "terms": {term.name: term.values(problem) for term in terms},
    }


VECTORS = ("sinks", "cu_seqlens_q", "cu_seqlens_k", "seqused_k")

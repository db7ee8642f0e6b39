"""The score term that lowers scores of keys that are far away: ``s - slope · |distance|``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .term import Array, Point, Term

if TYPE_CHECKING:
    from .._call.problem import Check, Problem


class Alibi(Term):
    """Source: Press, Smith and Lewis, *Train Short, Test Long*, 2022."""

    name = "alibi"
    header = "attention/alibi.cuh"
    type = "attention::Alibi"
    data = "AlibiData"
    foldable = True
    arrays = ("alibi_slopes",)
    bends = False

    def check(self, call: Check) -> None:
        slopes, heads, batch = call.specs.get("alibi_slopes"), call.specs["q"].shape[-2], call.batch()
        if slopes is None:
            return
        call.check_float32("alibi_slopes", slopes)
        if slopes.shape not in ((heads,), (batch, heads)):
            call.value_error(
                f"alibi_slopes has shape {slopes.shape}; ({heads},) or ({batch}, {heads}), that is (num_heads_q,) or "
                "(batch, num_heads_q), is expected."
            )

    def values(self, problem: Problem) -> dict[str, Any]:
        *batch, head = problem.strides["alibi_slopes"]
        return {"batch_stride": batch[0] if batch else 0, "head_stride": head}

    def fits(self, given: Mapping[str, Any], farthest: int, largest: float) -> bool:
        return farthest * float(np.abs(given["alibi_slopes"]).max(initial=0)) < largest

    def score(self, s: Array, at: Point, given: Mapping[str, Any]) -> Array:
        slopes = given["alibi_slopes"]
        chosen = slopes[at.head] if slopes.ndim == 1 else slopes[at.batch, at.head]
        # Differences of integers as numbers of s's dtype, without a whole matrix of integers: from the first key on.
        first = at.key.flat[0]
        bias: Array = (at.query + (at.offset - first)).astype(s.dtype) - (at.key - first).astype(s.dtype)
        np.abs(bias, out=bias)
        if chosen.size == 1:  # which needs no second matrix
            bias *= chosen.item()
            s -= bias
        else:
            s -= chosen.astype(s.dtype) * bias
        return s

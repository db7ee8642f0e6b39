"""The score term that adds a number for each head and distance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._call.arrays import CPU
from . import exact_sums
from .score_array import MAX_STRIDE, Specialised
from .term import Array, Point

if TYPE_CHECKING:
    from .._call.problem import Check, Problem
    from .._operations.features import Feature


class RelBias(Specialised):
    """Its array is (num_heads_q, 2 · reach + 1); distances beyond the reach have what its ends say.

    Parameters
    ----------
    exact : bool
        Whether sums of its gradient are exact.
    """

    name = "rel_bias"
    header = "attention/rel_bias.cuh"
    foldable = True
    arrays = ("rel_bias",)
    gradients = ("drel_bias",)
    bends = False
    loaded_bytes = 2  # a register for two scores: most of what a thread loads is for two rows
    stages = True

    def __init__(self, exact: bool = False) -> None:
        self.facts = (exact,)
        self.ordered = self.finishes = exact
        self.type = f"attention::RelBias<{str(exact).lower()}>"
        self.data = "OrderedRelBiasData" if exact else "RelBiasData"

    def staged_bytes(self, rows: int, columns: int) -> int:
        return 2 * 4 * (rows + columns)

    def in_order(self) -> RelBias:
        return RelBias(exact=True)

    def check_order(self, call: Check) -> None:
        exact_sums.check(call, "rel_bias", 1 if call.varlen else call.batch(), diagonals=True)

    def check(self, call: Check) -> None:
        spec, heads = call.specs.get("rel_bias"), call.specs["q"].shape[-2]
        if spec is None:
            return
        call.check_float32("rel_bias", spec)
        if len(spec.shape) != 2 or spec.shape[0] != heads or spec.shape[1] % 2 == 0:
            call.value_error(
                f"rel_bias has shape {spec.shape}; ({heads}, an odd number), that is (num_heads_q, 2 * reach + 1), is "
                "expected."
            )
        if spec.device != CPU and 4 * abs(spec.strides[1]) > MAX_STRIDE:
            call.unsupported(
                f"rel_bias has strides {spec.strides}; that of distances must be less than 2^31 bytes. Pass a copy of "
                "it."
            )

    def results(self, problem: Problem) -> dict[str, tuple[tuple[int, ...], str]]:
        return {"drel_bias": (problem.specs["rel_bias"].shape, problem.lse_dtype)}

    def values(self, problem: Problem) -> dict[str, Any]:
        (heads, distances), strides = problem.specs["rel_bias"].shape, problem.strides["rel_bias"]
        numbers = {"reach": distances // 2, "size": heads * distances}
        own = {"head_stride": strides[0], "distance_stride": strides[1], **numbers}
        return {"own": own} if self.finishes else own

    def scratch(self, problem: Problem) -> dict[str, int]:
        if not self.finishes:
            return {}
        return {"drel_bias_words": exact_sums.floats(math.prod(problem.specs["rel_bias"].shape))}

    def fits(self, given: Mapping[str, Any], farthest: int, largest: float) -> bool:
        return float(np.abs(given["rel_bias"]).max(initial=0)) < largest

    def place(self, at: Point, distances: int) -> Array:
        """The columns of scores, (queries, keys)."""
        reach = distances // 2
        found: Array = np.clip(at.distance, -reach, reach) + reach
        return found

    def score(self, s: Array, at: Point, given: Mapping[str, Any]) -> Array:
        table = given["rel_bias"]
        s += table[at.head, self.place(at, table.shape[1])].astype(s.dtype)
        return s

    def gradient(self, dscored: Array, at: Point, given: Mapping[str, Any], into: Mapping[str, Array]) -> None:
        sums, distances = dscored.sum(axis=0, dtype=np.float64), into["drel_bias"].shape[1]
        place = self.place(at, distances).ravel()
        for head, own in zip(at.head.flat, sums, strict=True):
            into["drel_bias"][head] += np.bincount(place, own.ravel(), distances)


REL_BIAS = RelBias()


def rel_bias_feature(function: str, rel_bias: Any) -> Feature:
    """The term of a call with a relative bias."""
    from .._operations.features import Feature

    return Feature(REL_BIAS, (rel_bias,))

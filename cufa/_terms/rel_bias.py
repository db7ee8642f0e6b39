"""The score term that adds a number for each head and distance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._call.arrays import CPU
from .score_array import MAX_STRIDE
from .term import Array, Point, Term

if TYPE_CHECKING:
    from .._call.problem import Check, Problem
    from .._operations.features import Feature


class RelBias(Term):
    """Its array is (num_heads_q, 2 · reach + 1); distances beyond the reach have what its ends say."""

    name = "rel_bias"
    header = "attention/rel_bias.cuh"
    type = "attention::RelBias"
    data = "RelBiasData"
    foldable = True
    arrays = ("rel_bias",)
    gradients = ("drel_bias",)
    bends = False

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
        return {"head_stride": strides[0], "distance_stride": strides[1], **numbers}

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

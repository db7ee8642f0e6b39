"""The score term that adds an array: ``s + bias[batch, head, query, key]``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._call.arrays import CPU
from . import exact_sums, score_array
from .score_array import Access, Parts, Specialised
from .term import Array, Point

if TYPE_CHECKING:
    from .._call.arrays import Spec
    from .._call.problem import Check, Problem
    from .._operations.features import Feature

TILE = 128
"""Queries and keys of a tile of a gradient, about."""

APART_TILES = 64
"""Tiles of a gradient that keep enough of a GPU busy for a kernel that goes over these: to compute scores once more
takes an SM about 40 times as long as all of them take to add to as many numbers in memory. Reckoned, not measured."""

ELEMENTS = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}


class Bias(Specialised):
    """A bias of any axes, with its gradient.

    Parameters
    ----------
    access : Access
        How kernels read the array.
    element : str
        The C++ type of its elements.
    exact : bool
        Whether sums of its gradient are exact.
    tiled : bool
        Whether it pays to make its gradient tile by tile, each for all sequences and heads that share it.
    apart : bool
        Whether a kernel of its own does so.
    """

    name = "bias"
    header = "attention/bias.cuh"
    type = "attention::Bias"
    data = "BiasData"
    foldable = True
    arrays = ("bias",)
    gradients = ("dbias",)
    bends = False

    def __init__(
        self,
        access: Access = Access(),  # noqa: B008
        element: str = "f32",
        exact: bool = False,
        tiled: bool = False,
        apart: bool = False,
    ) -> None:
        self.facts = access, element, exact, tiled, apart
        self.per_head = access.per_head
        self.loaded_bytes = access.bytes
        self.apart = apart
        self.boxed = access.mapped and access.wide and access.bytes == 2 and not (access.bounded or access.shared[2])
        self.stages = self.boxed
        self.ordered = exact or apart or not any(access.shared)
        self.finishes = exact
        if exact:
            self.data = "OrderedBiasData"

    def struct(self, element: str) -> str:
        access, own, exact, _, apart = self.facts
        *_, queries, keys = access.shared
        flags = (access.per_head, not any(access.shared), queries, keys, exact, apart, self.boxed)
        return f"{self.type}<{own}, {access.arguments()}, {', '.join(str(flag).lower() for flag in flags)}>"

    def specialised(self, specs: Mapping[str, Spec], packed: bool) -> Bias:
        spec, access = specs["bias"], Access.of("bias", specs, packed)
        sequences, heads, queries, keys = access.shared
        tiles = math.prod(spec.shape[:2]) * math.prod(-(-n // TILE) for n in spec.shape[2:])
        tiled = not packed and (sequences or heads) and not (queries or keys) and tiles >= APART_TILES
        return Bias(access, ELEMENTS[spec.dtype], tiled=tiled)

    def in_order(self) -> Bias:
        access, element, _, tiled, _ = self.facts
        return self if self.ordered else Bias(access, element, exact=True, tiled=tiled)

    def staged_bytes(self, rows: int, columns: int) -> int:
        return rows * columns * self.facts[0].bytes if self.boxed else 0

    def set_apart(self) -> Bias:
        access, element, _, tiled, _ = self.facts
        return Bias(access, element, tiled=True, apart=True) if tiled else self

    def check(self, call: Check) -> None:
        spec = call.specs.get("bias")
        if spec is None:
            return
        own = call.specs[call.together()[0]].dtype
        allowed = [*dict.fromkeys((own, "float32"))]
        if spec.dtype not in allowed and not (spec.dtype == "float64" and spec.device == CPU):
            call.value_error(f"bias has dtype {spec.dtype}; pass {' or '.join(allowed)}.")
        score_array.check(call, "bias")

    def check_order(self, call: Check) -> None:
        access, _, exact, *_ = self.facts
        sequences, heads, queries, keys = access.shared
        if exact and queries and keys:
            times = call.specs["q"].shape[-2] if heads else 1
            exact_sums.check(call, "bias", times * (call.batch() if sequences and not call.varlen else 1))

    def check_lengths(self, problem: Problem, longest_q: int, longest_k: int) -> None:
        score_array.check_lengths(problem, "bias", longest_q, longest_k)

    def results(self, problem: Problem) -> dict[str, tuple[tuple[int, ...], str]]:
        return {"dbias": (problem.specs["bias"].shape, problem.lse_dtype)}

    def values(self, problem: Problem) -> dict[str, Any]:
        shape = problem.specs["bias"].shape
        _, _, exact, _, apart = self.facts
        batch, head, query = (0 if n == 1 else 4 * math.prod(shape[axis + 1 :]) for axis, n in enumerate(shape[:3]))
        sees_all = problem.window_left is None and problem.window_right is None
        every_one = sees_all and not problem.varlen and not any(term.hides for term in problem.terms)
        stored = apart or (every_one and self.ordered and not exact)
        strides = {"dbatch_stride": batch, "dhead_stride": head, "dquery_stride": query}
        own = {"layout": score_array.layout(problem, "bias"), "zeros": 0 if stored else math.prod(shape), **strides}
        return {"own": own} if exact else own

    def scratch(self, problem: Problem) -> dict[str, int]:
        _, _, exact, *_ = self.facts
        return {"dbias_words": exact_sums.floats(math.prod(problem.specs["bias"].shape))} if exact else {}

    def fits(self, given: Mapping[str, Any], farthest: int, largest: float) -> bool:
        return float(np.abs(given["bias"]).max(initial=0)) < largest

    def score(self, s: Array, at: Point, given: Mapping[str, Any]) -> Array:
        bias = given["bias"]
        parts = Parts.at(at, bias.shape)
        s[parts.of_scores] += bias[parts.of_array].astype(s.dtype)
        return s

    def gradient(self, dscored: Array, at: Point, given: Mapping[str, Any], into: Mapping[str, Array]) -> None:
        dbias = into["dbias"]
        parts = Parts.at(at, dbias.shape)
        dbias[parts.of_array] += parts.sums(dscored, dbias.shape)


BIAS = Bias()


def bias_feature(function: str, bias: Any) -> Feature:
    """The term of a call with a bias."""
    from .._operations.features import Feature

    return Feature(BIAS, (bias,))

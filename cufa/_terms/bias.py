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
    """

    name = "bias"
    header = "attention/bias.cuh"
    type = "attention::Bias"
    data = "BiasData"
    foldable = True
    arrays = ("bias",)
    gradients = ("dbias",)
    bends = False

    def __init__(self, access: Access = Access(), element: str = "f32", exact: bool = False) -> None:  # noqa: B008
        self.facts = access, element, exact
        self.per_head = access.per_head
        self.loaded_bytes = access.bytes
        self.ordered = exact or not any(access.shared)
        self.finishes = exact
        if exact:
            self.data = "OrderedBiasData"

    def struct(self, element: str) -> str:
        access, own, exact = self.facts
        *_, queries, keys = access.shared
        flags = (access.per_head, not any(access.shared), queries, keys, *([True] if exact else []))
        return f"{self.type}<{own}, {access.arguments()}, {', '.join(str(flag).lower() for flag in flags)}>"

    def specialised(self, specs: Mapping[str, Spec], packed: bool) -> Bias:
        return Bias(Access.of("bias", specs, packed), ELEMENTS[specs["bias"].dtype])

    def in_order(self) -> Bias:
        access, element, _ = self.facts
        return self if self.ordered else Bias(access, element, exact=True)

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
        access, _, exact = self.facts
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
        *_, exact = self.facts
        batch, head, query = (0 if n == 1 else 4 * math.prod(shape[axis + 1 :]) for axis, n in enumerate(shape[:3]))
        sees_all = problem.window_left is None and problem.window_right is None
        every_one = sees_all and not problem.varlen and not any(term.hides for term in problem.terms)
        stored = every_one and self.ordered and not exact
        strides = {"dbatch_stride": batch, "dhead_stride": head, "dquery_stride": query}
        own = {"layout": score_array.layout(problem, "bias"), "zeros": 0 if stored else math.prod(shape), **strides}
        return {"own": own} if exact else own

    def scratch(self, problem: Problem) -> dict[str, int]:
        *_, exact = self.facts
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

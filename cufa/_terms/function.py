"""Score terms that are functions of the caller's: of scores, or of which keys queries see."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .emission import bends, gradients_of, mask_struct, reads_score, score_struct
from .graph import BOOL, FLOAT, INT, Differential, Graph
from .term import Array, Late, Point, Term
from .trace import Trace, trace

if TYPE_CHECKING:
    from .._call.problem import Check, Problem
    from .._operations.features import Feature

DTYPES = {FLOAT: ("float32",), INT: ("int32",), BOOL: ("bool",)}
"""Of arrays, by the kind of their numbers; on the CPU also float64."""

MAX_BYTES = 160
"""Of a function's arrays and scalars, as kernels are given them: a part of ``Params::max_term_words``."""


class FunctionTerm(Term):
    """A traced function. Two whose graphs are the same are the same."""

    def __init__(self, graph: Graph, differential: Differential | None) -> None:
        self.graph = graph
        self.differential = differential
        self.arrays = tuple(name for name, _, _ in graph.arrays)
        self.late_names = tuple(name for name, _ in graph.scalars)
        self.per_head = graph.uses("head")
        self.foldable = not graph.uses("batch", "head")
        if differential is None:
            self.name, struct = "mask_function", mask_struct(graph)
            self.bends, self.hides = False, True
        else:
            self.name, struct = "score", score_struct(differential)
            self.bends = self.gives_slope = bends(differential)
            self.reads_score = reads_score(differential)
            self.gradients = tuple(f"d{name}" for name in gradients_of(differential))
        self.type, self.data, self.header = struct.type, struct.data, struct.path
        self.headers = {struct.path: struct.text}
        self._key = graph, None if differential is None else differential.reads
        self._hash = hash(self._key)

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is FunctionTerm and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash

    def wanting(self, gradients: Collection[str]) -> Term:
        if all(name in gradients for name in self.gradients):
            return self
        assert self.differential is not None
        arrays = [f"d{name}" for name, _, _ in self.graph.arrays]
        nodes = self.graph.nodes
        reads = tuple(read for read in self.differential.reads if arrays[nodes[read[0]].value] in gradients)
        return FunctionTerm(self.graph, self.differential._replace(reads=reads))

    def plain_late(self, function: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        kinds = (kind for _, kind in self.graph.scalars)
        return tuple(int(value) if kind == INT else float(value) for value, kind in zip(values, kinds, strict=True))

    def asked(self, specs: Mapping[str, Any], options: Any) -> bool:
        return True

    def check(self, call: Check) -> None:
        check_arrays(call, self.graph.arrays)
        kind = self.name.removesuffix("_function")
        check_size(call, kind, self.graph.arrays, len(self.graph.scalars), len(self.gradients))

    def results(self, problem: Problem) -> Mapping[str, tuple[tuple[int, ...], str]]:
        return {name: (problem.specs[name[1:]].shape, problem.lse_dtype) for name in self.gradients}

    def values(self, problem: Problem) -> dict[str, Any]:
        found: dict[str, Any] = {**layout_values(problem, self.graph.arrays)}
        found |= {name: Late(name) for name in self.late_names}
        return found or {"nothing": 0}

    def score(self, s: Array, at: Point, given: Mapping[str, Any]) -> Array:
        if self.differential is None:
            return s
        (found,) = self.graph.evaluate([self.differential.result], s, at, given)
        return np.broadcast_to(found, s.shape)

    def dscore(self, scored: Array, at: Point, given: Mapping[str, Any]) -> Array | float:
        assert self.differential is not None
        (found,) = self.graph.evaluate([self.differential.slope], given["score"], at, given)
        slope: Array | float = found
        return slope

    def keeps(self, at: Point, given: Mapping[str, Any]) -> Array | bool:
        (found,) = self.graph.evaluate(self.graph.results, None, at, given)
        kept: Array | bool = found
        return kept

    def gradient(self, dscored: Array, at: Point, given: Mapping[str, Any], into: Mapping[str, Array]) -> None:
        assert self.differential is not None
        graph, score = self.graph, given.get("score", dscored)  # whose dtype counts, where no derivative reads it
        for read, derivative in self.differential.reads:
            node = graph.nodes[read]
            name = graph.arrays[node.value][0]
            by, *indices = graph.evaluate([derivative, *node.args], score, at, given)
            with np.errstate(all="ignore"):
                share = np.where(dscored == 0, 0, dscored * by)  # a derivative may be anything where nothing is seen
            add_at(into[f"d{name}"], indices, share)


def check_arrays(call: Check, arrays: tuple[tuple[str, str, int], ...]) -> None:
    """Refuse arrays of a function whose dtypes or shapes will not do."""
    for name, kind, _ in arrays:
        spec = call.specs.get(name)
        if spec is None:
            call.type_error(f"{name} is None; pass an array.")
        if kind == FLOAT:
            call.check_float32(name, spec)
        elif spec.dtype not in DTYPES[kind]:
            call.value_error(f"{name} has dtype {spec.dtype}; pass {DTYPES[kind][0]}.")
        if 0 in spec.shape:
            call.value_error(f"{name} has shape {spec.shape}; there is nothing in it that could be read.")


def check_size(call: Check, kind: str, arrays: tuple[tuple[str, str, int], ...], scalars: int, gradients: int) -> None:
    """Refuse more arrays and numbers than the argument of a kernel has room for."""
    size = 4 * scalars + 8 * gradients + sum(8 + 12 * ndim for _, _, ndim in arrays)
    if size > MAX_BYTES:
        call.unsupported(
            f"the {kind} function reads arrays and numbers that take {size} bytes of a kernel's argument, and "
            f"{MAX_BYTES} are left for them; join arrays, or write numbers as literals."
        )


def layout_values(problem: Problem, arrays: tuple[tuple[str, str, int], ...]) -> dict[str, int]:
    """Strides and extents of arrays, by the names that the C++ data have for them."""
    found = {}
    for place, (name, _, ndim) in enumerate(arrays):
        for axis in range(ndim):
            found[f"stride{place}_{axis}"] = problem.strides[name][axis]
            found[f"extent{place}_{axis}"] = problem.specs[name].shape[axis]
    return found


def add_at(into: Array, indices: list[Any], share: Array) -> None:
    """Add numbers to an array at indices, which broadcast to them; those outside are the nearest ones inside."""
    places = np.zeros((1,) * share.ndim, np.int64)
    for index, extent in zip(indices, into.shape, strict=True):
        places = places * extent + np.clip(index, 0, extent - 1)
    alike = tuple(axis for axis in range(share.ndim) if places.shape[axis] == 1)
    sums = share.sum(axis=alike, keepdims=True, dtype=np.float64)
    counts = np.bincount(np.broadcast_to(places, sums.shape).ravel(), sums.ravel(), minlength=into.size)
    into += counts.reshape(into.shape)


@lru_cache(maxsize=256)
def term_of(found: Trace) -> FunctionTerm:
    """The term of a function that was traced."""
    return FunctionTerm(found.graph, found.differential)


def score_feature(function: str, value: Any) -> Feature:
    """The score term of a function, or of one with arrays, that a call of `function` is given as ``score``."""
    return _feature(function, "score", value)


def mask_feature(function: str, value: Any) -> Feature:
    """The same of ``mask``."""
    return _feature(function, "mask", value)


def _feature(function: str, kind: str, value: Any) -> Feature:
    from .._operations.features import Feature
    from .snippet import CudaFunction, snippet_feature

    if isinstance(value, CudaFunction):
        return snippet_feature(function, kind, value)
    own, arrays = (value[0], value[1:]) if isinstance(value, tuple) and value else (value, ())
    found, values = trace(f"{function}: {kind}", kind, own, arrays)
    chosen = [values[place].value for place in found.places]
    count = len(found.graph.arrays)
    return Feature(term_of(found), tuple(chosen[:count]), tuple(chosen[count:]))

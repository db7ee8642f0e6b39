"""The C++ struct of a score term that is a traced function."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .graph import BOOL, FLOAT, INT, Differential, Graph

TYPES = {FLOAT: "float", INT: "int", BOOL: "bool"}
MEMBER_TYPES = {FLOAT: "float", INT: "i32", BOOL: "bool"}
"""Of arrays and scalars."""

BINARY = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "lt": "<",
    "le": "<=",
    "eq": "==",
    "ne": "!=",
    "and": "&",
    "or": "|",
    "xor": "^",
    "lshift": "<<",
    "rshift": ">>",
}
FLOAT_CALLS = {"abs": "fabsf", "min": "fminf", "max": "fmaxf", "sqrt": "sqrtf", "floor": "floorf", "ceil": "ceilf"}
INT_CALLS = {"min": "min_of", "max": "max_of"}
INPUTS = {
    "score": "s",
    "query": "at.query",
    "key": "at.key",
    "distance": "int(at.distance)",
    "float_distance": "at.distance",
    "batch": "batch",
    "head": "head",
}


class Struct(NamedTuple):
    """A C++ struct: its name, that of its data, and the header that has both.

    Attributes
    ----------
    type, data, path, text : str
    """

    type: str
    data: str
    path: str
    text: str


def struct_of(kind: str, words: str, include: str, data: Iterable[str], bases: str, lines: Iterable[str]) -> Struct:
    """The struct of a function that has such lines, in which @ stands for its name: that is a digest of the text."""
    text = "\n".join(
        [
            f"// attention: a {kind} function{words}.",
            "#pragma once",
            "",
            '#include "attention/functions.cuh"',
            '#include "attention/term.cuh"',
            f'#include "{include}"',
            '#include "core/types.cuh"',
            "",
            "namespace attention {",
            "",
            "struct @Data {",
            *data,
            "};",
            "",
            "template <class element>",
            f"struct @ : {bases} {{",
            "  using Data = @Data;",
            *lines,
            "};",
            "",
            "}  // namespace attention",
            "",
        ]
    )
    name = f"{kind.title()}{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    path = f"attention/{name.lower()}.cuh"
    return Struct(f"attention::{name}<{{element}}>", f"{name}Data", path, text.replace("@", name))


def data_members(
    arrays: Iterable[tuple[str, str, int]], gradients: Iterable[str], scalars: Iterable[tuple[str, str]]
) -> list[str]:
    """What a function's kernels are given: arrays and their gradients, strides and extents, and numbers."""
    arrays = tuple(arrays)
    found = [f"  const {MEMBER_TYPES[kind]}* {name};" for name, kind, _ in arrays]
    found += [f"  float* d{name};" for name in gradients]
    for what, type_name in (("stride", "i64"), ("extent", "i32")):
        for place, (_, _, ndim) in enumerate(arrays):
            found += [f"  {type_name} {what}{place}_{axis};" for axis in range(ndim)]
    found += [f"  {MEMBER_TYPES[kind]} {name};" for name, kind in scalars]
    return found or ["  i32 nothing;"]


def score_struct(differential: Differential) -> Struct:
    """That of a score function."""
    return _Emission(differential.graph, differential).struct("score")


def mask_struct(graph: Graph) -> Struct:
    """That of a mask function."""
    return _Emission(graph, None).struct("mask")


def gradients_of(differential: Differential) -> tuple[str, ...]:
    """Names of the arrays that have gradients."""
    graph = differential.graph
    read = {graph.nodes[node].value for node, derivative in differential.reads}
    return tuple(name for place, (name, _, _) in enumerate(graph.arrays) if place in read)


def bends(differential: Differential) -> bool:
    """Whether the derivative by the score may be another than 1."""
    slope = differential.graph.nodes[differential.slope]
    return not (slope.op == "constant" and slope.value == 1.0)


def reads_score(differential: Differential) -> bool:
    """Whether derivatives by arrays depend on the score."""
    graph = differential.graph
    needed = graph.needed([derivative for _, derivative in differential.reads])
    return any(graph.nodes[each].op == "score" for each in needed)


UNBOUNDED = ("div", "pow", "exp", "exp2", "log", "log2", "sqrt", "mod", "floordiv")
"""Operations on floats that may give what is not finite."""


def is_wild(differential: Differential) -> bool:
    """Whether the derivative by the score may not be finite where the score is no more than any number."""
    graph = differential.graph
    uniform = graph.uniform()
    nodes = ((each, graph.nodes[each]) for each in graph.needed([differential.slope]))
    return any(node.op in UNBOUNDED and node.kind == FLOAT and not uniform[each] for each, node in nodes)


class _Emission:
    """Writes a graph down. Numbers that a sequence and head share are members `u`, others are locals `x`."""

    def __init__(self, graph: Graph, differential: Differential | None) -> None:
        self.graph = graph
        self.differential = differential
        self.uniform = graph.uniform()
        self.gradients = () if differential is None else gradients_of(differential)

    def struct(self, kind: str) -> Struct:
        lines = [
            "  using F = Functions<element>;",
            *self._flags(),
            "",
            "  const Data* data;",
            *self._members(),
            "",
            *self._constructor(),
            "",
            *(self._keeps() if self.differential is None else self._scores(self.differential)),
        ]
        data = data_members(self.graph.arrays, self.gradients, self.graph.scalars)
        return struct_of(kind, ", traced", "core/math.cuh", data, "Term", lines)

    def _flags(self) -> Iterator[str]:
        flags = {"per_head": self.graph.uses("head")}
        if self.differential is None:
            flags |= {"bends": False, "hides": True}
        else:
            own = bends(self.differential)
            flags |= {"bends": own, "gives_slope": own, "has_gradient": bool(self.gradients)}
            flags |= {"reads_score": reads_score(self.differential), "wild": is_wild(self.differential)}
        for name, value in flags.items():
            yield f"  static constexpr bool {name} = {str(value).lower()};"

    def _results(self) -> list[int]:
        """All nodes that methods ask for."""
        if self.differential is None:
            return list(self.graph.results)
        found = [*self.graph.results[:2]]
        for read, derivative in self.differential.reads:
            found += [derivative, *self.graph.nodes[read].args]
        return found

    def _shared(self) -> list[int]:
        """Numbers that a sequence and head share and that methods read."""
        graph, results = self.graph, self._results()
        read = {arg for each in graph.needed(results) if not self.uniform[each] for arg in graph.nodes[each].args}
        return [each for each in sorted({*read, *results}) if self.uniform[each] and graph.nodes[each].op != "constant"]

    def _members(self) -> Iterator[str]:
        for each in self._shared():
            yield f"  {TYPES[self.graph.nodes[each].kind]} u{each};"
        if self.differential is not None:
            for read, _ in self.differential.reads:
                if self.uniform[read]:
                    yield f"  mutable float sum{read} = 0.0f;"

    def _constructor(self) -> Iterator[str]:
        shared = self._shared()
        used = self.graph.needed(shared)
        batch, head = (
            f"int {op}" if any(self.graph.nodes[each].op == op for each in used) else "int" for op in ("batch", "head")
        )
        if not shared:
            yield "  @(const Data& given, int, int) : data(&given) {}"
            return
        yield f"  @(const Data& given, {batch}, {head}) : data(&given) {{"
        yield from self._locals(used, members=False)
        for each in shared:
            yield f"    u{each} = x{each};"
        yield "  }"

    def _locals(self, numbers: Iterable[int], members: bool = True) -> Iterator[str]:
        for each in numbers:
            node = self.graph.nodes[each]
            if node.op == "constant" or (members and self.uniform[each]):
                continue
            yield f"    const {TYPES[node.kind]} x{each} = {self._operation(each, members)};"

    def _name(self, number: int, members: bool) -> str:
        node = self.graph.nodes[number]
        if node.op == "constant":
            return literal(node.value)
        return f"{'u' if members and self.uniform[number] else 'x'}{number}"

    def _operation(self, number: int, members: bool) -> str:
        node = self.graph.nodes[number]
        op, args = node.op, [self._name(each, members) for each in node.args]
        if op in INPUTS:
            return INPUTS[op]
        if op == "scalar":
            return f"data->{self.graph.scalars[node.value][0]}"
        if op == "read":
            return f"data->{self.graph.arrays[node.value][0]}[{self._offset(number, members)}]"
        if op in BINARY:
            return f"{args[0]} {BINARY[op]} {args[1]}"
        if op == "neg":
            return f"-{args[0]}"
        if op == "not":
            return f"{'!' if node.kind == BOOL else '~'}{args[0]}"
        if op == "where":
            return f"{args[0]} ? {args[1]} : {args[2]}"
        if op in ("to_float", "to_int"):
            return f"{TYPES[node.kind]}({args[0]})"
        if op == "stop":
            return args[0]
        if op == "div":
            return f"F::divide({args[0]}, {args[1]})" if not self.uniform[number] else f"{args[0]} / {args[1]}"
        calls = FLOAT_CALLS if node.kind == FLOAT else INT_CALLS
        return f"{calls.get(op, f'F::{op}')}({', '.join(args)})"

    def _offset(self, number: int, members: bool) -> str:
        """Where an array is read, in elements."""
        node = self.graph.nodes[number]
        places = self._places(number, members)
        return " + ".join(f"{each} * data->stride{node.value}_{axis}" for axis, each in enumerate(places)) or "0"

    def _gradient_offset(self, number: int) -> str:
        """The same in the contiguous array of its gradient."""
        node, found = self.graph.nodes[number], "0"
        for axis, each in enumerate(self._places(number, True)):
            found = each if axis == 0 else f"({found}) * data->extent{node.value}_{axis} + {each}"
        return found

    def _places(self, number: int, members: bool) -> list[str]:
        node = self.graph.nodes[number]
        return [
            f"F::place({self._name(each, members)}, data->extent{node.value}_{axis})"
            for axis, each in enumerate(node.args)
        ]

    def _method(self, head: str, results: Sequence[int], *last: str) -> list[str]:
        return [f"  {head} {{", *self._locals(self.graph.needed(results)), *(f"    {line}" for line in last), "  }", ""]

    def _keeps(self) -> list[str]:
        (result,) = self.graph.results
        return self._method("bool keeps(const Point& at) const", [result], f"return {self._name(result, True)};")[:-1]

    def _scores(self, differential: Differential) -> list[str]:
        result, slope = differential.result, differential.slope
        scored = f"return {self._name(result, True)};"
        lines = self._method("float score(float s, const Point& at) const", [result], scored)
        if bends(differential):
            lines += self._method(
                "float score(float s, const Point& at, float& slope) const",
                [result, slope],
                f"slope = {self._name(slope, True)};",
                scored,
            )
        return (lines + self._gradients(differential))[:-1]

    def _gradients(self, differential: Differential) -> list[str]:
        if not self.gradients:
            return []
        results, adds, flushes = [], [], []
        for read, derivative in differential.reads:
            node = self.graph.nodes[read]
            array = f"data->d{self.graph.arrays[node.value][0]}"
            by = self.graph.nodes[derivative]
            one = by.op == "constant" and by.value == 1.0
            share = "dscored" if one else f"dscored * {self._name(derivative, True)}"
            results += [derivative, *node.args]
            if self.uniform[read]:
                adds.append(f"sum{read} += {share};")
                flushes.append(f"    add_of_warp({array} + {self._gradient_offset(read)}, sum{read});")
            else:
                adds.append(f"ptx::red_add_f32({array} + {self._gradient_offset(read)}, {share});")
        told = ", float s" if reads_score(differential) else ""
        lines = self._method(f"void gradient(float dscored, const Point& at{told}) const", results, *adds)
        if flushes:
            lines += ["  void flush() const {", *flushes, "  }", ""]
        lines.append("  static void begin(const Data& given, i64 thread, i64 threads) {")
        for place, (name, _, ndim) in enumerate(self.graph.arrays):
            if name in self.gradients:
                size = " * ".join(f"i64(given.extent{place}_{axis})" for axis in range(ndim)) or "1"
                lines.append(f"    for (i64 i = thread; i < {size}; i += threads) given.d{name}[i] = 0.0f;")
        return [*lines, "  }", ""]


def literal(value: float | int | bool) -> str:
    """A constant in C++."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if value > -(1 << 31) else "(-2147483647 - 1)"
    rounded = float(np.float32(value))
    if math.isnan(rounded):
        return "not_a_number"
    if math.isinf(rounded):
        return "infinity" if rounded > 0 else "(-infinity)"
    return f"{rounded.hex()}f" if rounded >= 0 and math.copysign(1, rounded) > 0 else f"({rounded.hex()}f)"

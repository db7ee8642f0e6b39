"""Score and mask functions in C++."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .capture import KINDS, NUMBERS, dtype_of, scalar_kind
from .emission import Struct, data_members, struct_of
from .function import FunctionTerm, check_arrays, check_size, layout_values
from .graph import INT
from .term import Array, Late, Point, Term
from .trace import trace
from .traced import is_array

if TYPE_CHECKING:
    from .._call.problem import Check, Problem
    from .._operations.features import Feature

PLACES = ("batch", "head", "query", "key", "distance")
RESERVED = ("score", "Real", "data", "at", "element", *PLACES)
"""Names that a snippet finds beside those of its arrays and numbers."""

_WORDS = (
    "alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class compl "
    "concept const consteval constexpr constinit const_cast continue co_await co_return co_yield decltype default "
    "delete do double dynamic_cast else enum explicit export extern false float for friend goto if inline int long "
    "mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected public register "
    "reinterpret_cast requires return short signed sizeof static static_assert static_cast struct switch template this "
    "thread_local throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor "
    "xor_eq"
)
KEYWORDS = frozenset(_WORDS.split())
"""Of C++20."""

CALLS = ("exp", "exp2", "log", "log2", "tanh", "sigmoid", "sqrt", "abs", "floor", "ceil", "minimum", "maximum", "where")
"""Functions of ``DualFunctions`` in cuda_src/attention/functions.cuh."""


@dataclass(frozen=True, eq=False)
class CudaFunction:
    """What `cufa.cuda_function` gives."""

    source: str
    arrays: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, float | int] = field(default_factory=dict)
    twin: Callable[..., Any] | None = None


def cuda_function(
    source: str,
    *,
    arrays: Mapping[str, Any] | None = None,
    scalars: Mapping[str, float] | None = None,
    twin: Callable[..., Any] | None = None,
) -> CudaFunction:
    """A score or mask function in CUDA C++, for ``score=`` and ``mask=`` of `attention` and its like.

    Parameters
    ----------
    source : str
        An expression, or statements that return. It finds `batch`, `head`, `query` and `key`, of type int, `distance`,
        a float, which is how far the key lies before the query's own position, and, for ``score=``, `score`. That is a
        float or a number that carries its derivative along, of type Real: ``Real x = 2.0f * score;``. Functions of
        `cufa.functions` that have the same names take both.
    arrays : mapping of str to array, optional
        Float32, int32 or bool, of q's framework and device: ``table(head, key)`` is the number there or, outside, the
        nearest one inside. They get no gradients.
    scalars : mapping of str to number, optional
        Floats and ints. Kernels are not made anew for other values.
    twin : function, optional
        The same in Python, as `cufa.functions` says, for arrays on the CPU. It is called with the arrays and then the
        scalars behind `key`. Without one they raise UnsupportedError.

    Returns
    -------
    CudaFunction

    Raises
    ------
    TypeError, ValueError
        If a name is none in C++, or means something else there; if values are no arrays or no numbers.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> from cufa import functions
    >>> def twin(score, batch, head, query, key, cap):
    ...     return cap * functions.tanh(score / cap)
    >>> capped = cufa.cuda_function("cap * tanh(score / cap)", scalars={"cap": 20.0}, twin=twin)
    >>> q = np.ones((1, 4, 2, 8), np.float32)
    >>> cufa.attention(q, q, q, score=capped).shape
    (1, 4, 2, 8)
    """
    if not isinstance(source, str):
        raise TypeError(f"cuda_function: source is a {type(source).__name__}; pass C++ as a str.")
    if not source.strip():
        raise ValueError("cuda_function: source is empty; pass an expression, or statements that return.")
    arrays, scalars = dict(arrays or {}), dict(scalars or {})
    for name in (*arrays, *scalars):
        if not isinstance(name, str):
            raise TypeError(f"cuda_function: {name!r} is a {type(name).__name__}; the names of arrays are texts.")
        known = name in {*RESERVED, *CALLS, *KEYWORDS} or (name in arrays and name in scalars)
        if known or not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or "__" in name:
            raise ValueError(f"cuda_function: {name!r} cannot be the name of an array or a number; choose another.")
    for name, value in arrays.items():
        if not is_array(value) or dtype_of(value) not in KINDS:
            found = f"has dtype {dtype_of(value)}" if is_array(value) else f"is a {type(value).__name__}"
            raise TypeError(f"cuda_function: {name} {found}; pass an array of float32, int32 or bool.")
    for name, value in scalars.items():
        if isinstance(value, bool) or not isinstance(value, NUMBERS):
            raise TypeError(f"cuda_function: {name} is a {type(value).__name__}; pass a number.")
        scalar_kind("cuda_function", name, value)
    return CudaFunction(source, arrays, scalars, twin)


class SnippetTerm(Term):
    """A function in C++. Two of the same text, arrays, numbers and twin are the same."""

    def __init__(
        self,
        kind: str,
        source: str,
        arrays: tuple[tuple[str, str, int], ...],
        scalars: tuple[tuple[str, str], ...],
        twin: FunctionTerm | None,
        twin_names: tuple[tuple[str, str], ...],
    ) -> None:
        self.kind, self.source, self.layouts, self.scalars = kind, source, arrays, scalars
        self.twin, self.twin_names = twin, twin_names
        self.name = "score" if kind == "score" else "mask_function"
        self.arrays = tuple(name for name, _, _ in arrays)
        self.late_names = tuple(name for name, _ in scalars)
        self.bends = self.gives_slope = kind == "score"
        self.hides = kind == "mask"
        struct = self._struct()
        self.type, self.data, self.header = struct.type, struct.data, struct.path
        self.headers = {struct.path: struct.text}
        self._key = kind, source, arrays, scalars, twin, twin_names

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is SnippetTerm and self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def _struct(self) -> Struct:
        is_score = self.kind == "score"
        returned = "Real" if is_score else "bool"
        body = self.source if re.search(r"\breturn\b", self.source) else f"return {returned}({self.source}\n    );"
        using = [f"  using DualFunctions<element>::{name};" for name in CALLS]
        found = []
        for place, (name, _, ndim) in enumerate(self.layouts):
            indices = [f"i{axis}" for axis in range(ndim)]
            where = " + ".join(
                f"Functions<element>::place({index}, data->extent{place}_{axis}) * data->stride{place}_{axis}"
                for axis, index in enumerate(indices)
            )
            parameters = ", ".join(f"int {index}" for index in indices)
            own = name.removeprefix(f"{self.kind}_")
            found.append(f"    const auto {own} = [&]({parameters}) {{ return data->{name}[{where or '0'}]; }};")
        for name, kind in self.scalars:
            own = name.removeprefix(f"{self.kind}_")
            found.append(f"    const {'int' if kind == INT else 'float'} {own} = data->{name};")
        header = "template <class Real>\n  Real apply(Real score, const Point& at) const" if is_score else ""
        lines = [
            *using,
            f"  static constexpr bool bends = {str(is_score).lower()}, gives_slope = bends, wild = bends;",
            f"  static constexpr bool hides = {str(not is_score).lower()};",
            "",
            "  const Data* data;",
            "  int batch, head;",
            "",
            "  @(const Data& given, int batch, int head) : data(&given), batch(batch), head(head) {}",
            "",
            f"  {header or 'bool keeps(const Point& at) const'} {{",
            "    const int query = at.query, key = at.key;",
            "    const float distance = at.distance;",
            *found,
            body,
            "  }",
        ]
        if is_score:
            lines += [
                "",
                "  float score(float s, const Point& at) const { return apply(s, at); }",
                "",
                "  float score(float s, const Point& at, float& slope) const {",
                "    const Dual scored = apply(Dual(s, 1.0f), at);",
                "    slope = scored.slope;",
                "    return scored.value;",
                "  }",
            ]
        data = data_members(self.layouts, (), self.scalars)
        return struct_of(self.kind, " of the caller's", "core/dual.cuh", data, "Term, DualFunctions<element>", lines)

    def plain_late(self, function: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        kinds = (kind for _, kind in self.scalars)
        return tuple(int(value) if kind == INT else float(value) for value, kind in zip(values, kinds, strict=True))

    def asked(self, specs: Mapping[str, Any], options: Any) -> bool:
        return True

    def check(self, call: Check) -> None:
        from .._call.arrays import CPU

        if call.specs["q"].device == CPU and self.twin is None:
            call.unsupported(
                f"the {self.kind} function is in C++, and q is on the CPU; give cuda_function a twin in Python, or "
                "pass arrays on a GPU."
            )
        check_arrays(call, self.layouts)
        check_size(call, self.kind, self.layouts, len(self.scalars), 0)

    def values(self, problem: Problem) -> dict[str, Any]:
        late = {name: Late(name) for name in self.late_names}
        return {**layout_values(problem, self.layouts), **late} or {"nothing": 0}

    def _of_twin(self, given: Mapping[str, Any]) -> tuple[FunctionTerm, dict[str, Any]]:
        """The twin, and what it is given, by its own names."""
        assert self.twin is not None
        own = {name: given[ours] for name, ours in self.twin_names}
        return self.twin, own | {"score": given["score"]} if "score" in given else own

    def score(self, s: Array, at: Point, given: Mapping[str, Any]) -> Array:
        if self.hides:
            return s
        twin, own = self._of_twin(given)
        return twin.score(s, at, own)

    def dscore(self, scored: Array, at: Point, given: Mapping[str, Any]) -> Array | float:
        twin, own = self._of_twin(given)
        return twin.dscore(scored, at, own)

    def keeps(self, at: Point, given: Mapping[str, Any]) -> Array | bool:
        twin, own = self._of_twin(given)
        return twin.keeps(at, own)


def snippet_feature(function: str, kind: str, value: CudaFunction) -> Feature:
    """The score term of a function in C++."""
    from .._operations.features import Feature
    from .function import term_of

    arrays = {f"{kind}_{name}": array for name, array in value.arrays.items()}
    scalars = {f"{kind}_{name}": number for name, number in value.scalars.items()}
    layouts = tuple((name, KINDS[dtype_of(array)], len(array.shape)) for name, array in arrays.items())
    kinds = tuple((name, scalar_kind(function, name, number)) for name, number in scalars.items())
    twin: FunctionTerm | None = None
    twin_names: tuple[tuple[str, str], ...] = ()
    if value.twin is not None:
        words = f"{function}: the twin of {kind}"
        given = (*arrays.values(), *scalars.values())
        found, values = trace(words, kind, value.twin, given)
        if len(values) > len(given):
            raise TypeError(
                f"{words} finds {values[len(given)].name.removeprefix(f'{kind}_')} around itself; name all arrays and "
                "numbers in cuda_function."
            )
        twin = term_of(found)
        ours = (*arrays, *scalars)
        names = (*twin.arrays, *twin.late_names)
        twin_names = tuple((name, ours[place]) for name, place in zip(names, found.places, strict=True))
    term = SnippetTerm(kind, value.source, layouts, kinds, twin, twin_names)
    return Feature(term, tuple(arrays.values()), tuple(scalars.values()))

"""From a Python function to the graph of what it computes: it is called with values that write that down.

Arrays and numbers that a function finds around itself, in a closure, in defaults or among the globals of its module,
become arguments of the kernel: it is called as a copy of itself that finds stand-ins for them.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .capture import NUMBERS, Found, Search
from .graph import BOOL, FLOAT, INT, Differential, Graph, differentiate
from .traced import Traced, Tracer, is_array

SIGNATURES = {"score": ("score", "batch", "head", "query", "key"), "mask": ("batch", "head", "query", "key")}
"""What functions of either kind are called with before their arrays."""


class Trace(NamedTuple):
    """What a function computes; names of arrays and scalars, in the order in which they were found, as in its graph.

    Attributes
    ----------
    graph : Graph
        Of a score function, its derivatives included.
    differential : Differential or None
        None for a mask function.
    places : tuple of int
        Which of the found values the arrays and then the scalars of the graph are.
    """

    graph: Graph
    differential: Differential | None
    places: tuple[int, ...]


def trace(words: str, kind: str, function: Any, arrays: Sequence[Any]) -> tuple[Trace, list[Found]]:
    """What a function of a kind of `SIGNATURES` computes, and the values that it finds, those in `arrays` first.

    Traces of equal functions are remembered: of the same code that finds as many arrays and numbers of the same kinds.
    """
    if not isinstance(function, (types.FunctionType, types.MethodType)):
        raise TypeError(f"{words} is a {type(function).__name__}; pass a Python function, or (function, array, ...).")
    search = Search(words, kind)
    for name, value in zip(_given_names(kind, function, len(arrays)), arrays, strict=True):
        if not is_array(value) and (isinstance(value, (bool, np.bool_)) or not isinstance(value, NUMBERS)):
            raise TypeError(f"{words} is given {_a(value)} behind the function; pass arrays and numbers.")
        search.found_array(name, value) if is_array(value) else search.found_scalar(name, value)
    bound = isinstance(function, types.MethodType)
    search.function(_plain(function))
    key = (kind, len(arrays), tuple(search.tokens)) if search.lasting and not bound else None
    known = None if key is None else _traces.get(key)
    if known is None:
        known = _traced(words, kind, function, len(arrays), search)
        if key is not None:
            if len(_traces) >= MAX_TRACES:
                _traces.clear()
            _traces[key] = known
    return known, search.found


def _given_names(kind: str, function: Any, count: int) -> list[str]:
    """What a function calls the arrays that are given behind it."""
    code = function.__code__
    first = len(SIGNATURES[kind]) + isinstance(function, types.MethodType)
    names = list(code.co_varnames[first : code.co_argcount])[:count]
    return names + [f"argument{index}" for index in range(len(names), count)]


_traces: dict[Any, Trace] = {}
MAX_TRACES = 256


def _traced(words: str, kind: str, function: Any, given: int, search: Search) -> Trace:
    tracer = Tracer(words)
    tracer.kinds = search.array_kinds
    stand_ins: list[Any] = []
    array_place, scalar_place = 0, 0
    for found, found_kind in zip(search.found, search.kinds, strict=True):
        if found_kind[0] == "array":
            ndim = len(found.value.shape)
            stand_ins.append(tracer.read(array_place, ndim, ()))
            array_place += 1
        else:
            node = tracer.builder.node("scalar", (), found_kind[1], scalar_place)
            stand_ins.append(Traced(tracer, node))
            scalar_place += 1
    builder = tracer.builder
    inputs = [Traced(tracer, builder.node(name, (), FLOAT if name == "score" else INT)) for name in SIGNATURES[kind]]
    copy: Any = search.copies(stand_ins)[id(_plain(function))]
    if isinstance(function, types.MethodType):
        copy = types.MethodType(copy, function.__self__)
    _check_arity(words, kind, function, given)
    result = copy(*inputs, *stand_ins[:given])
    number = _result_of(words, kind, tracer, result)
    names = [(found.name, each[1], len(found.value.shape)) for found, each in search.of("array")]
    scalars = [(found.name, each[1]) for found, each in search.of("scalar")]
    differential = None
    if kind == "score":
        differential = differentiate(builder, number, names, scalars)
        graph = differential.graph
    else:
        graph = builder.graph((number,), names, scalars)
    order = {found.name: place for place, found in enumerate(search.found)}
    read = [array[0] for array in graph.arrays] + [scalar[0] for scalar in graph.scalars]
    places = tuple(order[name] for name in read)
    return Trace(graph, differential, places)


def _plain(function: Any) -> types.FunctionType:
    """The function of a bound method, or a function itself."""
    found: types.FunctionType = getattr(function, "__func__", function)
    return found


def _check_arity(words: str, kind: str, function: Any, given: int) -> None:
    """Whether a function takes what it is called with."""
    expected = (*SIGNATURES[kind], *_given_names(kind, function, given))
    try:
        inspect.signature(function).bind(*expected)
    except TypeError as error:
        raise TypeError(
            f"{words}: {function.__qualname__} cannot be called with ({', '.join(expected)}): {error}; a {kind} "
            f"function takes {', '.join(SIGNATURES[kind])} and what is given behind it."
        ) from None


def _result_of(words: str, kind: str, tracer: Tracer, result: Any) -> int:
    plain = isinstance(result, (bool, int, float, np.bool_, np.integer, np.floating))
    if not plain and not (isinstance(result, Traced) and result._tracer is tracer):
        raise TypeError(f"{words}: the function returns {_a(result)}; it must return a {RESULTS[kind]}.")
    number = tracer.number_of(result)
    is_bool = tracer.builder.kind(number) == BOOL
    if is_bool != (kind == "mask"):
        found = "a bool" if is_bool else "a number"
        raise TypeError(f"{words}: the function returns {found}; it must return a {RESULTS[kind]}.")
    return number if kind == "mask" else tracer.builder.to_float(number)


RESULTS = {"score": "score, which is a number", "mask": "bool, whether the query sees the key"}


def _a(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"

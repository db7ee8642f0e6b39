"""Numbers and arrays that write down what a function does with them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from .graph import BOOL, FLOAT, INT, INT_LIMIT, Builder


class Traced:
    """A number that is not known yet. Functions of `cufa.functions` take it, and operators."""

    __slots__ = ("_tracer", "number")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tracer: Tracer, number: int) -> None:
        self._tracer = tracer
        self.number = number

    @property
    def position(self) -> Traced:
        """Of a query: its own position among the keys, query + seqlen_k - seqlen_q."""
        builder = self._tracer.builder
        if builder.nodes[self.number].op != "query":
            self._tracer.refuse("only the query has a position", AttributeError)
        distance, key = builder.node("distance", (), INT), builder.node("key", (), INT)
        return Traced(self._tracer, builder.apply("add", distance, key))

    def apply(self, op: str, *args: Any) -> Traced:
        """An operation on values, of which this is one."""
        return self._tracer.apply(op, *args)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        op = UFUNCS.get(ufunc.__name__)
        if op is None or method != "__call__" or options:
            self._tracer.refuse(f"numpy.{ufunc.__name__} does not take what is traced; use cufa.functions")
        if op in SWAPPED:
            op, inputs = SWAPPED[op], inputs[::-1]
        return self._tracer.apply(op, *inputs)

    def __pos__(self) -> Traced:
        return self

    def _refuse_value(self, *_: Any) -> NoReturn:
        self._tracer.refuse(
            "a traced value is not known while the kernel is made: if, and, or, not, chained comparisons, int(), "
            "range() and loops cannot ask for it; use cufa.functions.where, and &, | and ~"
        )

    __bool__ = __int__ = __iter__ = __len__ = _refuse_value

    def _refuse_number(self, *_: Any) -> NoReturn:
        self._tracer.refuse(
            "a traced value cannot become a plain number: instead of math's functions use those of cufa.functions, and "
            "give arrays that are reached through an object behind the function, as (function, array)"
        )

    __float__ = __index__ = __complex__ = _refuse_number

    def __getitem__(self, _: Any) -> NoReturn:
        self._tracer.refuse("a traced value is one number, and has no items")

    def __eq__(self, other: Any) -> Any:
        return self._tracer.apply("eq", self, other)

    def __ne__(self, other: Any) -> Any:
        return self._tracer.apply("ne", self, other)


def _operator(op: str, swapped: bool = False) -> Callable[..., Any]:
    def operate(self: Traced, *others: Any) -> Any:
        return self.apply(op, *others, self) if swapped else self.apply(op, self, *others)

    return operate


OPERATORS = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "truediv": "div",
    "floordiv": "floordiv",
    "mod": "mod",
    "pow": "pow",
    "and": "and",
    "or": "or",
    "xor": "xor",
    "lshift": "lshift",
    "rshift": "rshift",
}
for _name, _op in OPERATORS.items():
    setattr(Traced, f"__{_name}__", _operator(_op))
    setattr(Traced, f"__r{_name}__", _operator(_op, swapped=True))
for _name, _op in {"neg": "neg", "abs": "abs", "invert": "not", "lt": "lt", "le": "le"}.items():
    setattr(Traced, f"__{_name}__", _operator(_op))
for _name, _op in {"gt": "lt", "ge": "le"}.items():
    setattr(Traced, f"__{_name}__", _operator(_op, swapped=True))

UFUNCS = {
    "add": "add",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "power": "pow",
    "negative": "neg",
    "absolute": "abs",
    "minimum": "min",
    "maximum": "max",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "equal": "eq",
    "not_equal": "ne",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "invert": "not",
    "left_shift": "lshift",
    "right_shift": "rshift",
    **{name: name for name in ("exp", "exp2", "log", "log2", "tanh", "sqrt", "floor", "ceil")},
}
"""Operations by the names of NumPy's functions."""
SWAPPED = {"gt": "lt", "ge": "le"}


class TracedArray:
    """An array that a kernel reads: it is indexed until no axis is left, and then a number."""

    __slots__ = ("_indices", "_tracer", "ndim", "place")
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None

    def __init__(self, tracer: Tracer, place: int, ndim: int, indices: tuple[int, ...] = ()) -> None:
        self._tracer = tracer
        self.place = place
        self.ndim = ndim
        self._indices = indices

    def __getitem__(self, index: Any) -> Any:
        tracer = self._tracer
        given = index if isinstance(index, tuple) else (index,)
        if len(given) > self.ndim:
            tracer.refuse(f"an array of {self.ndim} dimensions is indexed by {len(given)} numbers")
        found = []
        for each in given:
            if each is None or each is Ellipsis or isinstance(each, (slice, list, np.ndarray, bool)):
                tracer.refuse(f"an array is indexed by {type(each).__name__}; index it by an integer for each axis")
            number = tracer.number_of(each)
            if tracer.builder.kind(number) != INT:
                tracer.refuse("an array is indexed by a number that is no integer; use cufa.functions.to_int")
            value = tracer.builder.value(number)
            if value is not None and value < 0:
                tracer.refuse(f"an array is indexed by {value}; indices count from 0")
            found.append(number)
        return tracer.read(self.place, self.ndim - len(given), (*self._indices, *found))

    def _refuse(self, *_: Any) -> NoReturn:
        left = f"its last {self.ndim} axes too" if self._indices else f"all of its {self.ndim} axes"
        self._tracer.refuse(f"an array is used as a number; index {left}, as table[head, key]")

    __bool__ = __int__ = __float__ = __index__ = __iter__ = __len__ = __neg__ = __abs__ = __invert__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse


for _name in OPERATORS:
    setattr(TracedArray, f"__{_name}__", TracedArray._refuse)
    setattr(TracedArray, f"__r{_name}__", TracedArray._refuse)


class Tracer:
    """What a function is called with, and the graph that grows while it runs; `words` name it in messages."""

    def __init__(self, words: str) -> None:
        self.words = words
        self.builder = Builder()

    def refuse(self, text: str, error: type[Exception] = TypeError) -> NoReturn:
        """Raise an error that names the line outside of cufa where it happened."""
        frame = sys._getframe(1)
        while frame.f_back is not None and is_ours(frame.f_globals.get("__name__", "")):
            frame = frame.f_back
        raise error(f"{self.words}: {frame.f_code.co_filename}, line {frame.f_lineno}: {text}.")

    def number_of(self, value: Any) -> int:
        """The node of a value, traced or a plain number."""
        if isinstance(value, Traced):
            if value._tracer is not self:
                self.refuse("a value of another function is used; nothing traced may outlive its call")
            return value.number
        if isinstance(value, TracedArray):
            value._refuse()
        if isinstance(value, (bool, np.bool_)):
            return self.builder.constant(bool(value))
        if isinstance(value, (int, np.integer)):
            if not -INT_LIMIT <= value < INT_LIMIT:
                self.refuse(f"{value} is no number of 32 bits; write it as a float")
            return self.builder.constant(int(value))
        if isinstance(value, (float, np.floating)):
            return self.builder.constant(float(value))
        return self.refuse(
            f"a {type(value).__name__} meets a traced value; numbers do, and arrays that the function finds in its "
            "closure, its defaults or its module, or that are given behind it, as (function, array)"
        )

    def apply(self, op: str, *values: Any) -> Traced:
        numbers = tuple(map(self.number_of, values))
        kinds = [self.builder.kind(each) for each in numbers]
        if op in ("and", "or", "xor", "not", "lshift", "rshift") and FLOAT in kinds:
            self.refuse("&, |, ^, ~, << and >> take integers and conditions, and no floats")
        if op == "where" and kinds[0] != BOOL:
            self.refuse("the condition of where is no bool; compare it with something")
        if op == "pow":
            return Traced(self, self._power(*numbers))
        if op in ("to_float", "to_int"):
            return Traced(self, getattr(self.builder, op)(*numbers))
        return Traced(self, self.builder.apply(op, *numbers))

    def _power(self, base: int, exponent: int) -> int:
        """Small whole powers are products."""
        builder, value = self.builder, self.builder.value(exponent)
        if value is not None and value == int(value) and 0 < abs(value) <= 8:
            if value < 0:
                base = builder.to_float(base)
            result = base
            for _ in range(abs(int(value)) - 1):
                result = builder.apply("mul", result, base)
            return result if value > 0 else builder.apply("div", builder.constant(1.0), result)
        if value == 0.5:
            return builder.apply("sqrt", base)
        return builder.apply("pow", builder.to_float(base), builder.to_float(exponent))

    def read(self, place: int, left: int, indices: tuple[int, ...]) -> Any:
        """An array of which some indices are known, or the number that it holds where all are."""
        if left:
            return TracedArray(self, place, left, indices)
        return Traced(self, self.builder.node("read", indices, self.kinds[place], place))

    kinds: Sequence[str] = ()
    """Of the arrays."""


def is_array(value: Any) -> bool:
    """Whether a value is an array of some framework."""
    return (
        hasattr(value, "dtype")
        and hasattr(value, "shape")
        and not isinstance(value, (type, types.ModuleType, np.generic, Traced, TracedArray))
    )


def is_ours(module: str) -> bool:
    return module == "cufa" or module.startswith("cufa.")

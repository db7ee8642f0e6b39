"""The arrays and numbers that a function finds around itself, and copies of it that find others."""

from __future__ import annotations

import dis
import math
import types
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .graph import BOOL, FLOAT, INT, INT_LIMIT
from .traced import is_array, is_ours

KINDS = {"float32": FLOAT, "float64": FLOAT, "int32": INT, "bool": BOOL}
"""What arrays of a dtype hold."""

NUMBERS = (int, float, np.integer, np.floating)


class Found(NamedTuple):
    """An array or a number that a function finds around itself."""

    name: str
    value: Any


def dtype_of(array: Any) -> str:
    """The name of an array's dtype, without its framework's."""
    return str(array.dtype).rpartition(".")[2]


def scalar_kind(words: str, name: str, value: Any) -> str:
    """The kind of a number; TypeError for one that kernels cannot hold."""
    if isinstance(value, (int, np.integer)):
        if not -INT_LIMIT <= value < INT_LIMIT:
            raise TypeError(f"{words}: {name} is {value}, which is no number of 32 bits; make it a float.")
        return INT
    if math.isfinite(value) and abs(value) > float(np.finfo(np.float32).max):
        raise TypeError(f"{words}: {name} is {value}, which is no number of float32.")
    return FLOAT


@lru_cache(maxsize=1024)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Names that a function, or one inside of it, looks for in its module."""
    found = {each.argval: None for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= dict.fromkeys(_globals_of(constant))
    return tuple(found)


LASTING_MODULES = ("math", "numpy", "operator")
"""Modules whose contents do not change."""


def _is_lasting(value: Any) -> bool:
    """Whether a value is a class whose attributes do not change."""
    module = value.__module__.partition(".")[0] if isinstance(value, type) else ""
    return module in ("builtins", *LASTING_MODULES)


class Search:
    """Looks for what a function finds around itself, functions that it calls included.

    Attributes
    ----------
    tokens : list
        What makes two functions compute the same of the same numbers.
    lasting : bool
        Whether `tokens` say all of it.
    found : list of Found
        The arrays and numbers.
    kinds : list of (str, str)
        What each is, ``array`` or ``scalar``, and of which kind its numbers are.
    """

    def __init__(self, words: str, kind: str) -> None:
        self._words, self._kind = words, kind
        self.tokens: list[Any] = []
        self.lasting = True
        self.found: list[Found] = []
        self.kinds: list[tuple[str, str]] = []
        self._functions: dict[int, tuple[types.FunctionType, dict[tuple[str, Any], Any]]] = {}
        self._names: set[str] = set()

    def of(self, what: str) -> Iterator[tuple[Found, tuple[str, str]]]:
        """Those that are arrays, or scalars."""
        return (each for each in zip(self.found, self.kinds, strict=True) if each[1][0] == what)

    @property
    def array_kinds(self) -> list[str]:
        return [kind for what, kind in self.kinds if what == "array"]

    def _name(self, name: str) -> str:
        """A name of its own, that can be one in C++."""
        base = f"{self._kind}_{name}" if name.isascii() and name.isidentifier() else f"{self._kind}_value"
        chosen, number = base, 2
        while chosen in self._names:
            chosen, number = f"{base}_{number}", number + 1
        self._names.add(chosen)
        return chosen

    def found_array(self, name: str, array: Any) -> int:
        dtype = dtype_of(array)
        named = self._name(name)
        if dtype not in KINDS:
            raise TypeError(f"{self._words}: {named} has dtype {dtype}; pass float32, int32 or bool.")
        self.tokens.append(("array", named, len(array.shape), KINDS[dtype]))
        self.kinds.append(("array", KINDS[dtype]))
        self.found.append(Found(named, array))
        return len(self.found) - 1

    def found_scalar(self, name: str, value: Any) -> int:
        named = self._name(name)
        kind = scalar_kind(self._words, named, value)
        self.tokens.append(("scalar", named, kind))
        self.kinds.append(("scalar", kind))
        self.found.append(Found(named, int(value) if kind == INT else float(value)))
        return len(self.found) - 1

    def function(self, function: types.FunctionType) -> None:
        """What a function finds: values by where they are, as places in `found` or, of functions, their ids."""
        if id(function) in self._functions:
            self.tokens.append(("again", list(self._functions).index(id(function))))
            return
        code = function.__code__
        self.tokens.append(("function", code))
        self.lasting = self.lasting and not function.__dict__
        places: dict[tuple[str, Any], Any] = {}
        self._functions[id(function)] = function, places
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            self._look_at(name, value, ("cell", name), places)
        defaults = function.__defaults__ or ()
        names = code.co_varnames[: code.co_argcount]
        for index, (name, value) in enumerate(zip(names[len(names) - len(defaults) :], defaults, strict=True)):
            self._look_at(name, value, ("default", index), places)
        for name, value in (function.__kwdefaults__ or {}).items():
            self._look_at(name, value, ("kwdefault", name), places)
        for name in _globals_of(code):
            if name in function.__globals__:
                self._look_at(name, function.__globals__[name], ("global", name), places)

    def _look_at(self, name: str, value: Any, where: tuple[str, Any], places: dict[tuple[str, Any], Any]) -> None:
        if value is None or isinstance(value, (bool, str, bytes, np.bool_)):
            self.tokens.append(("literal", type(value), value))
        elif isinstance(value, NUMBERS):
            places[where] = self.found_scalar(name, value)
        elif is_array(value):
            places[where] = self.found_array(name, value)
        elif isinstance(value, types.FunctionType):
            if is_ours(value.__module__ or ""):
                self.tokens.append(("ours", value.__qualname__))
            else:
                self.function(value)
                places[where] = value
        elif isinstance(value, types.ModuleType):
            root = value.__name__.partition(".")[0]
            self.tokens.append(("module", value.__name__))
            self.lasting = self.lasting and (root in LASTING_MODULES or is_ours(value.__name__))
        elif isinstance(value, (types.BuiltinFunctionType, np.ufunc)) or _is_lasting(value):
            self.tokens.append(("object", value))
        else:
            self.lasting = False

    def copies(self, stand_ins: Sequence[Any]) -> dict[int, types.FunctionType]:
        """Copies of all functions, by the ids of these, that find the stand-ins and the copies of each other."""
        made: dict[int, types.FunctionType] = {}
        spaces: dict[int, dict[str, Any]] = {}
        for key, (function, _) in self._functions.items():
            spaces[key] = dict(function.__globals__)
            closure = None if function.__closure__ is None else tuple(types.CellType() for _ in function.__closure__)
            made[key] = types.FunctionType(
                function.__code__, spaces[key], function.__name__, function.__defaults__, closure
            )
        for key, (function, places) in self._functions.items():
            copy = made[key]
            copy.__dict__.update(function.__dict__)
            replaced = {
                where: made[id(value)] if isinstance(value, types.FunctionType) else stand_ins[value]
                for where, value in places.items()
            }
            for name, own, cell in zip(
                function.__code__.co_freevars, copy.__closure__ or (), function.__closure__ or (), strict=True
            ):
                if ("cell", name) in replaced:
                    own.cell_contents = replaced["cell", name]
                else:
                    try:
                        own.cell_contents = cell.cell_contents
                    except ValueError:  # not bound yet
                        continue
            if function.__defaults__ is not None:
                copy.__defaults__ = tuple(
                    replaced.get(("default", index), value) for index, value in enumerate(function.__defaults__)
                )
            for (where, name), value in replaced.items():
                if where == "global":
                    spaces[key][name] = value
            if function.__kwdefaults__ is not None:
                copy.__kwdefaults__ = {
                    name: replaced.get(("kwdefault", name), value) for name, value in function.__kwdefaults__.items()
                }
        return made

"""The problem that a call would have, from the arguments of its function: nothing is computed, made or written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._call import arrays as _arrays
from .._call import options as _options
from .._call import problem as _problem
from .._call.arrays import Arrays
from .._call.kvcache import parts_of
from .._call.problem import Problem
from .call import interop_jax, interop_torch
from .operation import Operation

OPTIONS: dict[str, Any] = {
    "causal": False,
    "window_size": None,
    "softmax_scale": None,
    "softcap": 0.0,
    "return_lse": False,
    "deterministic": False,
}
"""The options that every call has, in the order of `Options`, and what they are where a function does not take them."""

NOT_TAKEN = {**OPTIONS, "rotary_interleaved": True, "cache_dtype": None}
"""The same of all options that some function of an operation does not take."""


def asked_by(operation: Operation, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arrays, in the operation's order, and the options of a call with these arguments of its function, by name."""
    memory, facts = parts_of(operation.name, arguments.get("plan"))
    arrays, options = {**arguments, "plan": memory}, {**NOT_TAKEN, **arguments, "plan": facts}
    names = (*OPTIONS, *operation.owned.names)
    return tuple(map(arrays.get, operation.arrays)), tuple(options[name] for name in names)


def problem_of(operation: Operation, given: tuple[Any, ...], asked: tuple[Any, ...]) -> Problem:
    """The problem of a call with such arrays, in the operation's order, and options."""
    options = _options.of(operation.name, asked, operation.owned)
    if not _arrays.is_jax(given[0]):
        return _problem.checked(operation, _view(operation, given), options)
    interop_jax().check_given(operation, given)
    return _problem.check(operation, interop_jax().view(operation, given), options)


def _view(operation: Operation, given: tuple[Any, ...]) -> Arrays:
    try:
        return _arrays.view(operation.name, operation.arrays, given, operation.uncopied_indices)
    except _arrays.Recorded:
        given = interop_torch().detached(operation, given)
        return _arrays.view(operation.name, operation.arrays, given, operation.uncopied_indices)

"""`cufa.merge_states` and `cufa.merge_states_backward`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._call.problem import Problem
from .._call.states import of_states
from .._kernels.merge_states import MergeStates, MergeStatesBackward
from .operation import Operation, Result

STATES = ("out_a", "lse_a", "out_b", "lse_b")
"""States a, one or several along a first axis, and state b behind them, if there is one."""


def _results(problem: Problem) -> tuple[Result, ...]:
    result = problem.operation.result
    return result("out", problem.out_shape, problem.dtype), result("lse", problem.lse_shape, problem.lse_dtype)


def _on_cpu(problem: Problem, arrays: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    from .._cpu import states as _cpu

    outs, lses = _states(arrays, len(problem.out_shape))
    _cpu.merge(outs, lses, results["out"], results["lse"])


def _gradients(problem: Problem) -> tuple[Result, ...]:
    given = [(name, problem.specs[name].shape) for name in STATES if name in problem.specs]
    dtypes = {"o": problem.dtype, "l": problem.lse_dtype}
    return tuple(problem.operation.result(f"d{name}", shape, dtypes[name[0]]) for name, shape in given)


def _gradients_on_cpu(problem: Problem, arrays: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    from .._cpu import states as _cpu

    outs, lses = _states(arrays, len(problem.out_shape))
    douts, dlses = _states(results, len(problem.out_shape), "d")
    _cpu.merge_backward(arrays["dout"], arrays["dlse"], outs, lses, douts, dlses)


def _states(arrays: Mapping[str, Any], rank: int, prefix: str = "") -> tuple[list[Any], list[Any]]:
    """out and lse of every state; `rank` is that of an out."""
    given: list[Any] = [arrays.get(prefix + name) for name in STATES]
    several = given[0].ndim > rank
    outs, lses = (list(x) if several else [x] for x in given[:2])
    return (outs, lses) if given[2] is None else ([*outs, given[2]], [*lses, given[3]])


MERGE_STATES = Operation(
    name="merge_states",
    arrays=(*STATES, "out"),
    written=("out",),
    tiles=(),
    rows=("out_a", "out_b"),
    results=_results,
    terms=(),
    kernels=(MergeStates(),),
    on_cpu=_on_cpu,
    check=of_states,
)

MERGE_STATES_BACKWARD = Operation(
    name="merge_states_backward",
    arrays=(*STATES, "dout", "dlse"),
    written=(),
    tiles=(),
    rows=("out_a", "out_b"),
    results=_gradients,
    terms=(),
    kernels=(MergeStatesBackward(),),
    on_cpu=_gradients_on_cpu,
    check=of_states,
    of=MERGE_STATES,
)

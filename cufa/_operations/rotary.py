"""`cufa.rotary`, and its gradients, which autograd of frameworks asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._call import options as _options
from .._call.options import Option
from .._call.problem import Problem
from .._call.rotary import GRADIENTS, HEADS, RotaryProblem, check_values, of_rotary
from .._kernels.rotary import Rotary, RotaryBackward
from .operation import Operation, Result

PLACES = ("cos", "sin", "positions", "offsets", "cu_seqlens")
"""What says by which angle a row is turned."""

OPTIONS = (Option("interleaved", _options.flag), Option("inverse", _options.flag))


def _of_heads(problem: Problem, names: tuple[str, str]) -> tuple[Result, ...]:
    assert isinstance(problem, RotaryProblem)
    given = zip(names, HEADS[: 1 + problem.has_k], strict=False)
    return tuple(problem.operation.result(name, problem.heads_shape(head), problem.dtype) for name, head in given)


def _results(problem: Problem) -> tuple[Result, ...]:
    return _of_heads(problem, ("q_out", "k_out"))


def _gradients(problem: Problem) -> tuple[Result, ...]:
    return _of_heads(problem, ("dq", "dk"))


def _on_cpu(problem: Problem, arrays: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    from .._cpu import rotary as _cpu

    assert isinstance(problem, RotaryProblem)
    names = GRADIENTS if problem.operation.gradient else HEADS
    places = {name: arrays[name] for name in PLACES}
    inverse = problem.inverse != problem.operation.gradient
    for name, result in zip(names, results.values(), strict=False):
        _cpu.rotate(arrays[name], result, **places, interleaved=problem.interleaved, inverse=inverse)


ROTARY = Operation(
    name="rotary",
    arrays=(*HEADS, *PLACES, "q_out", "k_out"),
    written=("q_out", "k_out"),
    tiles=(),
    results=_results,
    terms=(),
    kernels=(Rotary(),),
    on_cpu=_on_cpu,
    check=of_rotary,
    check_values=check_values,
    options=OPTIONS,
    rows=HEADS,
    gives=("q_out", "k_out"),
    grouped=False,
)

ROTARY_BACKWARD = Operation(
    name="rotary_backward",
    arrays=(*GRADIENTS, *PLACES),
    written=(),
    tiles=(),
    results=_gradients,
    terms=(),
    kernels=(RotaryBackward(),),
    on_cpu=_on_cpu,
    check=of_rotary,
    check_values=check_values,
    options=OPTIONS,
    of=ROTARY,
    rows=GRADIENTS,
    grouped=False,
)
"""The gradient by what was turned is that by the result, turned back."""

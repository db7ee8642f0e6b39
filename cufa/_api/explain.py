"""Which kernel serves a call, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._call import arrays as _arrays
from .._call import options as _options
from .._call import problem as _problem
from .._call.arrays import CPU, Arrays
from .._call.problem import Problem
from .._operations.call import interop_jax, interop_torch
from .._operations.explanation import Explanation as Explanation
from .._operations.explanation import explained
from .._operations.forward import ATTENTION, ATTENTION_VARLEN
from .._operations.operation import Operation
from ..errors import UnsupportedError


def explain(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    *,
    seqused_k: Any = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    out: Any = None,
) -> Explanation:
    """Say which kernel would serve a call of `attention`, or `attention_varlen` if offsets are given, and why.

    Nothing is computed. A kernel that is not there yet is compiled, since what it takes is known only then.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, out : array
        As for `attention` and `attention_varlen`.
    causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, return_lse
        Likewise.

    Returns
    -------
    Explanation

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError
        As the call itself would.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> q = np.zeros((1, 16, 2, 64), np.float32)
    >>> print(cufa.explain(q, q, q))
    attention: cpu on the CPU
      because    q is a numpy array in host memory; CuPy, torch or JAX arrays on a GPU are computed there
    """
    given: tuple[Any, ...] = (q, k, v, alibi_slopes, sinks, out)
    operation = ATTENTION
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        operation = ATTENTION_VARLEN
        given = (*given, cu_seqlens_q, cu_seqlens_k, seqused_k)
    problem = problem_of(operation, given, (causal, window_size, softmax_scale, softcap, return_lse, False))
    if problem.device == CPU:
        framework = problem.specs["q"].framework
        reason = f"q is a {framework} array in host memory; CuPy, torch or JAX arrays on a GPU are computed there"
        return Explanation(problem.function, "cpu", "the CPU", "not needed", reason)
    return explained(problem)


def problem_of(operation: Operation, given: tuple[Any, ...], asked: tuple[Any, ...]) -> Problem:
    """The problem of a call with such arrays, in the operation's order, and options; nothing is made or written."""
    options = _options.of(operation.name, asked, operation.owned)
    if not _arrays.is_jax(given[0]):
        return _problem.checked(operation, _view(operation, given), options)
    if given[operation.arrays.index("out")] is not None:
        raise UnsupportedError(f"{operation.name}: out is not supported for JAX arrays, which cannot be written.")
    return _problem.check(operation, interop_jax().view(operation, given), options)


def _view(operation: Operation, given: tuple[Any, ...]) -> Arrays:
    try:
        return _arrays.view(operation.name, operation.arrays, given, operation.uncopied_indices)
    except _arrays.Recorded:
        given = interop_torch().detached(operation, given)
        return _arrays.view(operation.name, operation.arrays, given, operation.uncopied_indices)

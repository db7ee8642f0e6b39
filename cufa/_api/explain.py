"""Which kernel serves a call, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .._call.arrays import CPU
from .._masks.blocks import BlockMask
from .._operations.asked import asked_by, problem_of
from .._operations.explanation import Explanation as Explanation
from .._operations.explanation import explained
from .._operations.features import extended
from .._operations.sketch import OPERATIONS
from .features import FEATURES, features_of, without_ranges
from .functions import FUNCTIONS, arguments_of

PACKED = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")


def explain(*arguments: Any, **options: Any) -> Explanation:
    """Say which kernel would serve a call, and why.

    Nothing is computed, appended or written. A kernel that is not there yet is compiled, since what it takes is known
    only then.

    Parameters
    ----------
    *arguments, **options
        A function of cufa and the arguments of a call of it, as in ``explain(cufa.rotary, q, k, cos=cos, sin=sin)``:
        `attention`, `attention_varlen`, their gradients, `attention_with_kvcache`, `decode_plan`, `merge_states` and
        its gradients, or `rotary`. Without a function it is `attention_varlen` if offsets are given, else `attention`.

    Returns
    -------
    Explanation

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError
        As the call itself would; TypeError also for other functions.

    See Also
    --------
    warmup : Compiles and loads what calls need.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> q = np.zeros((1, 16, 2, 64), np.float32)
    >>> print(cufa.explain(q, q, q))
    attention: cpu on the CPU
      because    q is a numpy array in host memory; CuPy, torch or JAX arrays on a GPU are computed there
    >>> print(cufa.explain(cufa.attention_with_kvcache, q, q, q, causal=True).function)
    attention_with_kvcache
    """
    function, arguments, options = _call_of(arguments, options)
    operation = OPERATIONS[function.__name__]
    named = arguments_of("explain", function, arguments, options)
    given, asked = asked_by(operation, named)
    if "dropout_p" in named:
        named["mask"], asked = without_ranges(operation, given, named["mask"], asked)
        features = features_of(operation.name, *(named[name] for name in FEATURES))
        operation, given, asked = extended(operation, given, asked, features)
    mask = repr(named["mask"]) if isinstance(named.get("mask"), BlockMask) else ""
    problem = problem_of(operation, given, asked)
    if problem.device == CPU:
        first = operation.arrays[0]
        framework = problem.specs[first].framework
        reason = f"{first} is a {framework} array in host memory; CuPy, torch or JAX arrays on a GPU are computed there"
        return Explanation(problem.function, "cpu", "the CPU", "not needed", reason, mask=mask)
    return replace(explained(problem), mask=mask)


def _call_of(
    arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The function that is meant, and its arguments."""
    if arguments and callable(arguments[0]):
        function: Callable[..., Any] = arguments[0]
        if FUNCTIONS.get(getattr(function, "__name__", "")) is not function:
            raise TypeError(f"explain: {function!r} is not one of the functions {', '.join(FUNCTIONS)}.")
        return function, arguments[1:], options
    offsets = [*arguments[3:5], *(options.get(name) for name in PACKED[:2])]
    if any(each is not None for each in offsets):
        return FUNCTIONS["attention_varlen"], arguments, options
    given = {name: value for name, value in options.items() if name not in PACKED or value is not None}
    return FUNCTIONS["attention"], (*arguments[:3], *arguments[5:]), given

"""Score and mask functions of your own, and what they may call.

``score=f`` gives `cufa.attention` and its like a function of every score, and ``mask=f`` one that says which keys
queries see::

    def f(score, batch, head, query, key, *arrays):  # what becomes of a score
    def f(batch, head, query, key, *arrays):  # whether the query sees the key

`score` is ``softmax_scale · q k`` behind softcap and ALiBi; what is returned goes on to biases, masks and the softmax.
`query` and `key` are counted from the first of their sequence, `head` is q's, and ``query.position`` is the query's own
position among the keys, ``query + seqlen_k - seqlen_q``, which causal masks and windows count from. Numbers are
float32, int32 or bool (on the CPU in the dtype of scores).

The function is called once, with values that stand for all scores: it becomes part of the kernel, and of its gradients.
So it is written with operators, the functions of this module and NumPy's of the same names; ``if``, ``and``, loops over
values and ``math`` cannot be told what a value is, and raise TypeError.

**Arrays** are those that the function finds in its closure, its defaults or its module, or that are passed behind it:
``score=(f, array, ...)``. They are float32 (float64 on the CPU), int32 or bool, of q's framework and device, and are
read at integers for all their axes, ``table[head, key]``; an index outside reads the nearest number inside. Floats get
gradients: `cufa.attention_backward` returns them behind the others, in the order of ``f``'s arrays, first those passed
behind it, but for arrays in whose numbers the score has no derivative, as behind `stop_gradient`. Their sums have no
fixed order on a GPU.

**Numbers** that the function finds by a name are given to the kernel, which other values do not make anew. Literals,
bools, and what is read from an attribute or an item are part of it.

Examples
--------
>>> import numpy as np
>>> import cufa
>>> from cufa import functions
>>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 16, 2, 8), dtype=np.float32)
>>> slopes = np.array([0.5, 0.25], np.float32)
>>> def alibi(score, batch, head, query, key):
...     return score - slopes[head] * functions.abs(query.position - key)
>>> out = cufa.attention(q, k, v, score=alibi)
>>> np.array_equal(out, cufa.attention(q, k, v, alibi_slopes=slopes))
True
>>> near = cufa.attention(q, k, v, mask=lambda batch, head, query, key: (query - key) % 4 == 0)
>>> near.shape
(1, 16, 2, 8)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._terms.graph import OPERATIONS
from ._terms.traced import Traced

__all__ = [
    "abs",
    "ceil",
    "clip",
    "exp",
    "exp2",
    "floor",
    "log",
    "log2",
    "maximum",
    "minimum",
    "sigmoid",
    "sqrt",
    "stop_gradient",
    "tanh",
    "to_float",
    "to_int",
    "where",
]


def _applied(op: str, *values: Any) -> Any:
    """An operation on values of which some are traced, or on NumPy arrays."""
    for value in values:
        if isinstance(value, Traced):
            return value.apply(op, *values)
    return OPERATIONS[op](*values)


def where(condition: Any, x: Any, y: Any) -> Any:
    """x where a condition holds, else y."""
    return _applied("where", condition, x, y)


def exp(x: Any) -> Any:
    """e to the power of x."""
    return _applied("exp", x)


def exp2(x: Any) -> Any:
    """2 to the power of x."""
    return _applied("exp2", x)


def log(x: Any) -> Any:
    """The natural logarithm."""
    return _applied("log", x)


def log2(x: Any) -> Any:
    """The logarithm to the base 2."""
    return _applied("log2", x)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent."""
    return _applied("tanh", x)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return _applied("sigmoid", x)


def sqrt(x: Any) -> Any:
    """The square root."""
    return _applied("sqrt", x)


def abs(x: Any) -> Any:
    """The absolute value; its derivative at 0 counts as 1."""
    return _applied("abs", x)


def minimum(x: Any, y: Any) -> Any:
    """The smaller one; of equal ones x has the derivative."""
    return _applied("min", x, y)


def maximum(x: Any, y: Any) -> Any:
    """The larger one; of equal ones x has the derivative."""
    return _applied("max", x, y)


def clip(x: Any, low: Any, high: Any) -> Any:
    """x within bounds."""
    return minimum(maximum(x, low), high)


def floor(x: Any) -> Any:
    """The largest whole number up to x, as a float."""
    return _applied("floor", x)


def ceil(x: Any) -> Any:
    """The smallest whole number from x on, as a float."""
    return _applied("ceil", x)


def to_int(x: Any) -> Any:
    """An integer; the fraction of a float is dropped."""
    return _applied("to_int", x)


def to_float(x: Any) -> Any:
    """A float; of arrays of integers and bools float64."""
    if isinstance(x, Traced):
        return x.apply("to_float", x)
    return x if np.asarray(x).dtype.kind == "f" else np.asarray(x).astype(np.float64)


def stop_gradient(x: Any) -> Any:
    """x, in which nothing has a derivative."""
    return _applied("stop", x)

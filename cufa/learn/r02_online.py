"""Rung 2: the online softmax, which meets the keys of a row block by block and never goes back.

The softmax of rung 1 goes over a row three times: for its maximum, for the sum of exponentials, and for the mean of v.
But all that has to be remembered of the keys so far are three things, the *state* of the row::

    m   the largest score so far                                a number
    l   Σ exp(s - m) of the keys so far                         a number
    o   Σ exp(s - m) · v of the keys so far                     head_dim numbers

When a block of keys brings a larger maximum, l and o were computed with the wrong one. They need not be computed anew:
``exp(s - new) = exp(s - old) · exp(old - new)``, and the second factor is the same for all keys so far. So both are
multiplied by it, and the block is added::

    new = max(m, maximum of the block)
    l   = exp(m - new) · l + Σ exp(s - new)
    o   = exp(m - new) · o + Σ exp(s - new) · v
    m   = new

In the end the output is ``o / l``, for the denominators of all probabilities are the same.

Before the first block ``m = -inf``, ``l = 0`` and ``o = 0``. ``exp(-inf - new)`` is 0, so the first block needs no
special case. A row that sees no key stays there, and is 0.

Blocks may have any size: one key at a time gives the same as all of them at once, which is rung 1, up to rounding. They
may also come in any order, and states of parts of the keys can be put together, see rung 6. This is all of the
mathematics behind FlashAttention's forward; the rest is what lies in which memory, and when.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TITLE = "online softmax, row by row"
BLOCK_N = 64


def row(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], scale: float, block_n: int = BLOCK_N) -> NDArray[Any]:
    """The output (head_dim,) of one query (head_dim,) that sees all of the keys k (seqlen, head_dim)."""
    m, l, o = -np.inf, 0.0, np.zeros_like(v, shape=v.shape[1])
    for j in range(0, len(k), block_n):
        s = scale * (k[j : j + block_n] @ q)
        new = max(m, s.max())
        p = np.exp(s - new)
        correction = np.exp(m - new)
        l = correction * l + p.sum()
        o = correction * o + p @ v[j : j + block_n]
        m = new
    return o / l if l > 0 else o


def attention(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *, causal: bool = False, softmax_scale: float | None = None
) -> NDArray[Any]:
    """Attention of arrays (batch, seqlen, heads, head_dim), in their own dtype, as `cufa.attention` has it."""
    if q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k and v have the shapes {q.shape}, {k.shape} and {v.shape}, which do not go together.")
    if q.dtype.kind != "f":  # means of integers would be cut off
        raise TypeError(f"q is {q.dtype}; pass float16, float32 or float64.")
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    out = np.empty_like(q, shape=(*q.shape[:3], v.shape[3]))
    for b, i, h in np.ndindex(q.shape[:3]):
        seen = max(i + 1 + seqlen_k - seqlen_q, 0) if causal else seqlen_k
        out[b, i, h] = row(q[b, i, h], k[b, :seen, h], v[b, :seen, h], scale)
    return out

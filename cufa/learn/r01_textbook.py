"""Rung 1: attention as the textbook has it.

For one head, q is a matrix (seqlen_q, head_dim), k and v are (seqlen_k, head_dim). Every query gets a mean of the
values, weighted by how well their keys match it::

    S = scale · Q Kᵀ                    scores         (seqlen_q, seqlen_k)
    P = exp(S - m) / Σ exp(S - m)       probabilities  (seqlen_q, seqlen_k), row by row, m the maximum of the row
    O = P V                             output         (seqlen_q, head_dim)

Without m the result is the same on paper, as it cancels, but exp of a float32 overflows beyond 88. With it the largest
exponential is 1, and what underflows is too small to matter beside that.

Under a causal mask a query sees keys up to its own. Where there are more keys than queries, as when a text is
continued, the last query sees the last key: query i sees keys ``j <= i + seqlen_k - seqlen_q``. A query that sees no
key at all has no mean, and its output is defined as 0.

What is wrong with it: S and P have seqlen_q · seqlen_k entries, and each operation on them reads and writes them all.
At 16k tokens and 16 heads S alone takes 16 GiB in float32. The products would keep a GPU busy for a time; moving S and
P takes many times as long. All further rungs compute the same numbers and never hold S.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TITLE = "textbook softmax"


def head(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], causal: bool, scale: float) -> NDArray[Any]:
    """One head of one sequence: q (seqlen_q, head_dim), k and v (seqlen_k, head_dim)."""
    s = scale * (q @ k.T)
    if causal:
        i, j = np.ogrid[: len(q), : len(k)]
        s = np.where(j <= i + len(k) - len(q), s, -np.inf)
    m = s.max(axis=1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(m > -np.inf, m, 0))
    l = p.sum(axis=1, keepdims=True)
    out: NDArray[Any] = p / np.where(l > 0, l, 1) @ v
    return out


def attention(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *, causal: bool = False, softmax_scale: float | None = None
) -> NDArray[Any]:
    """Attention of arrays (batch, seqlen, heads, head_dim), in their own dtype, as `cufa.attention` has it."""
    if q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k and v have the shapes {q.shape}, {k.shape} and {v.shape}, which do not go together.")
    if q.dtype.kind != "f":  # means of integers would be cut off
        raise TypeError(f"q is {q.dtype}; pass float16, float32 or float64.")
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    out = np.empty_like(q, shape=(*q.shape[:3], v.shape[3]))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):  # independent of each other: on a GPU they run side by side
        out[b, :, h] = head(q[b, :, h], k[b, :, h], v[b, :, h], causal, scale)
    return out

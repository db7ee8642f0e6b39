"""Rung 3: FlashAttention, version 1. The outer loop goes over blocks of keys, the inner one over blocks of queries.

Rung 2 reads all keys anew for every single query. A *tile* of scores, block_m queries by block_n keys, needs only
block_m + block_n rows for block_m · block_n scores, so k and v are read block_m times less often. Everything of a tile
fits the fast memory of a processor (shared memory and registers of a GPU's SM). S and P never exist as a whole.

Here a slice ``q[rows]`` stands for a copy from slow memory (HBM) to fast, ``out[rows] = …`` for one back, and
everything else for arithmetic in fast memory. `cufa.learn.counting` takes that literally and counts the bytes.

Version 1 (Dao et al., 2022, Algorithm 1) keeps a block of keys and values in fast memory and lets all queries pass
by. The next block of keys meets every query again, so the states (m, l, o) of *all* rows have to wait in slow memory
meanwhile, and each tile reads and writes those of its rows::

    for each block of keys:            read K_j, V_j                    once each
        for each block of queries:     read Q_i, O_i, l_i, m_i          as often as there are blocks of keys
            tile of scores, online softmax
                                       write O_i, l_i, m_i              as often

o is kept divided by l, as in the paper, so that out holds the result when the last block has passed; to add a block
it has to be multiplied by the old l and divided by the new one.

Under a causal mask a tile whose last query does not see its first key is skipped: about half of all. Of the tiles on
the diagonal the keys that are not seen get a score of -inf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TITLE = "FlashAttention v1: outer loop over keys"
BLOCK_M = BLOCK_N = 64


def head(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    causal: bool,
    scale: float,
    block_m: int = BLOCK_M,
    block_n: int = BLOCK_N,
) -> NDArray[Any]:
    """One head of one sequence: q (seqlen_q, head_dim), k and v (seqlen_k, head_dim)."""
    offset = len(k) - len(q)  # query i is at the position of key i + offset
    out = np.empty_like(q, shape=(len(q), v.shape[1]))
    l, m = np.empty_like(q, shape=(len(q), 1)), np.empty_like(q, shape=(len(q), 1))
    out[:], l[:], m[:] = 0, 0, -np.inf

    for j in range(0, len(k), block_n):
        k_j, v_j = k[j : j + block_n], v[j : j + block_n]
        for i in range(0, len(q), block_m):
            rows = slice(i, min(i + block_m, len(q)))
            if causal and rows.stop - 1 + offset < j:
                continue
            s = scale * (q[rows] @ k_j.T)
            if causal:
                seen = j + np.arange(len(k_j)) <= np.arange(i, rows.stop)[:, None] + offset
                s = np.where(seen, s, -np.inf)
            m_old, l_old, o_old = m[rows], l[rows], out[rows]
            m_new = np.maximum(m_old, s.max(axis=1, keepdims=True))
            base = np.where(m_new > -np.inf, m_new, 0)  # of a row that has seen no key yet any number will do
            p = np.exp(s - base)
            kept = np.exp(m_old - base) * l_old
            l_new = kept + p.sum(axis=1, keepdims=True)
            out[rows] = (kept * o_old + p @ v_j) / np.where(l_new > 0, l_new, 1)
            l[rows], m[rows] = l_new, m_new
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
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        out[b, :, h] = head(q[b, :, h], k[b, :, h], v[b, :, h], causal, scale)
    return out

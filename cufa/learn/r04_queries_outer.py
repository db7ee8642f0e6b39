"""Rung 4: FlashAttention, version 2. The outer loop goes over blocks of queries, the inner one over blocks of keys.

The tiles are those of rung 3, and only the order of the two loops is another (Dao, 2023, Algorithm 1). But now a block
of queries meets all of its keys in a row, so its states (m, l, o) stay in fast memory from the first tile to the last::

    for each block of queries:         read Q_i                         once each
        for each block of keys:        read K_j, V_j                    as often as there are blocks of queries
            tile of scores, online softmax
                                       write O_i and lse_i              once each

Three things follow.

- **Bytes**: a tile moves 2 · block_n rows (k and v) instead of 3 · block_m rows (q, o twice) and the statistics.
- **Parallelism**: a pass of the outer loop depends on no other, so each is a thread block of its own. In version 1
  every pass writes every row of out: its passes can only follow each other, and a GPU with 132 SMs needs 132 heads.
- **Fewer operations beside the products**: o is divided by l once, at the end, and not in every tile.

Under a causal mask the inner loop ends at the last key that the block's last query sees. Only tiles on the diagonal
have to be masked.

Beside out there is one number per row, the logarithm of the sum of exponentials ``lse = m + log(l)``. From it alone
any probability comes back as ``exp(s - lse)``, which the gradients (rung 5) and merging (rung 6) need.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TITLE = "FlashAttention v2: outer loop over queries"
BLOCK_M = BLOCK_N = 64


def head(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    causal: bool,
    scale: float,
    block_m: int = BLOCK_M,
    block_n: int = BLOCK_N,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """One head of one sequence: out (seqlen_q, head_dim) and lse (seqlen_q,) of q, k and v."""
    offset = len(k) - len(q)  # query i is at the position of key i + offset
    out, lse = np.empty_like(q, shape=(len(q), v.shape[1])), np.empty_like(q, shape=len(q))

    for i in range(0, len(q), block_m):  # on a GPU these are thread blocks, side by side
        rows = slice(i, min(i + block_m, len(q)))
        q_i = q[rows]
        m, l = np.full((len(q_i), 1), -np.inf, q.dtype), np.zeros((len(q_i), 1), q.dtype)
        o = np.zeros((len(q_i), v.shape[1]), q.dtype)
        end = min(rows.stop + offset, len(k)) if causal else len(k)
        for j in range(0, end, block_n):
            k_j, v_j = k[j : j + block_n], v[j : j + block_n]
            s = scale * (q_i @ k_j.T)
            if causal and j + len(k_j) - 1 > i + offset:  # the tile's first query does not see its last key
                seen = j + np.arange(len(k_j)) <= np.arange(i, rows.stop)[:, None] + offset
                s = np.where(seen, s, -np.inf)
            m_new = np.maximum(m, s.max(axis=1, keepdims=True))
            base = np.where(m_new > -np.inf, m_new, 0)  # of a row that has seen no key yet any number will do
            p, correction = np.exp(s - base), np.exp(m - base)
            l = correction * l + p.sum(axis=1, keepdims=True)
            o = correction * o + p @ v_j
            m = m_new
        some = l > 0  # rows without keys have l = 0, out = 0 and lse = -inf
        out[rows] = o / np.where(some, l, 1)
        lse[rows] = np.where(some, m + np.log(np.where(some, l, 1)), -np.inf)[:, 0]
    return out, lse


def attention_and_lse(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *, causal: bool = False, softmax_scale: float | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Attention and lse (batch, heads, seqlen_q) of arrays (batch, seqlen, heads, head_dim), in their own dtype."""
    if q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k and v have the shapes {q.shape}, {k.shape} and {v.shape}, which do not go together.")
    if q.dtype.kind != "f":  # means of integers would be cut off
        raise TypeError(f"q is {q.dtype}; pass float16, float32 or float64.")
    batch, seqlen_q, heads, head_dim = q.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = np.empty_like(q, shape=(batch, seqlen_q, heads, v.shape[3]))
    lse = np.empty_like(q, shape=(batch, heads, seqlen_q))
    for b, h in np.ndindex(batch, heads):
        out[b, :, h], lse[b, h] = head(q[b, :, h], k[b, :, h], v[b, :, h], causal, scale)
    return out, lse


def attention(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *, causal: bool = False, softmax_scale: float | None = None
) -> NDArray[Any]:
    """Attention of arrays (batch, seqlen, heads, head_dim), in their own dtype, as `cufa.attention` has it."""
    return attention_and_lse(q, k, v, causal=causal, softmax_scale=softmax_scale)[0]

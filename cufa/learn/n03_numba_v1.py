"""Rung 3 in Numba: FlashAttention, version 1, one thread for each row of a block of queries.

A kernel is the program of one thread, launched for a grid of thread blocks: ``blockIdx`` says which block a thread is
in, and ``threadIdx`` which of its threads it is. The loops are those of `cufa.learn.r03_keys_outer`, now with a name
for every memory:

- **shared memory** holds the block of keys and values, which all threads of the block read: each of its elements is
  loaded once and used by BLOCK_M rows. ``syncthreads`` keeps it from being read before it is there, and from being
  overwritten while it is read.
- **registers** (Numba's local arrays, if the compiler finds room) hold a thread's row of q, its scores, and its o.
- **global memory** holds out, l and m of all rows between one block of keys and the next.

A thread block takes one head of one sequence, for the passes of the outer loop follow each other. With 16 heads a GPU
of 132 SMs is idle for seven eighths: rung 4 mends that, see `cufa.learn.n04_numba_v2`.

Nothing here is fast: one thread computes what a tensor core does for a warp. Rungs 7 to 13 go on in CUDA C++.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda, float32

TITLE = "FlashAttention v1 in Numba"
BLOCK_M = BLOCK_N = 32


@functools.cache
def kernel_of(head_dim: int) -> Any:
    """The kernel for a head_dim, which decides the sizes of shared memory and registers."""

    @cuda.jit
    def kernel(q, k, v, out, l, m, causal, scale):  # type: ignore[no-untyped-def]
        b, h, thread = cuda.blockIdx.y, cuda.blockIdx.x, cuda.threadIdx.x
        seqlen_q, seqlen_k = q.shape[1], k.shape[1]
        offset = seqlen_k - seqlen_q if causal else seqlen_k
        k_j = cuda.shared.array((BLOCK_N, head_dim), float32)
        v_j = cuda.shared.array((BLOCK_N, head_dim), float32)
        s = cuda.local.array(BLOCK_N, float32)
        for j in range(0, seqlen_k, BLOCK_N):
            keys = min(BLOCK_N, seqlen_k - j)
            for place in range(thread, keys * head_dim, BLOCK_M):
                n, d = place // head_dim, place % head_dim
                k_j[n, d], v_j[n, d] = k[b, j + n, h, d], v[b, j + n, h, d]
            cuda.syncthreads()
            for row in range(thread, seqlen_q, BLOCK_M):
                seen = min(keys, row + offset + 1 - j)
                if seen <= 0:
                    continue
                m_old, l_old = m[b, h, row], l[b, h, row]
                m_new = m_old
                for n in range(seen):
                    score = float32(0)
                    for d in range(head_dim):
                        score += float32(q[b, row, h, d]) * k_j[n, d]
                    s[n] = scale * score
                    m_new = max(m_new, s[n])
                kept = math.exp(m_old - m_new) * l_old
                l_new = kept
                for n in range(seen):
                    s[n] = math.exp(s[n] - m_new)
                    l_new += s[n]
                for d in range(head_dim):
                    value = kept * out[b, row, h, d]
                    for n in range(seen):
                        value += s[n] * v_j[n, d]
                    out[b, row, h, d] = value / l_new
                m[b, h, row], l[b, h, row] = m_new, l_new
            cuda.syncthreads()

    return kernel


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, softmax_scale: float | None = None) -> Any:
    """Attention of arrays (batch, seqlen, heads, head_dim), float16 or float32, as a Numba array in float32.

    Arrays are on the GPU (Numba's, CuPy's, torch's), or NumPy's and contiguous, which Numba copies there. head_dim is
    at most 128.
    """
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v have the shapes {q.shape}, {k.shape} and {v.shape}, which do not go together.")
    if not 1 <= q.shape[3] <= 128 or 0 in q.shape or 0 in k.shape:
        raise ValueError(
            f"q and k have the shapes {q.shape} and {k.shape}, expected head_dim 1 to 128, and none empty."
        )
    batch, seqlen_q, heads, head_dim = q.shape
    scale = np.float32(head_dim**-0.5 if softmax_scale is None else softmax_scale)
    out = cuda.to_device(np.zeros(q.shape, np.float32))
    l = cuda.to_device(np.zeros((batch, heads, seqlen_q), np.float32))
    m = cuda.to_device(np.full((batch, heads, seqlen_q), -np.inf, np.float32))
    kernel_of(head_dim)[(heads, batch), BLOCK_M](q, k, v, out, l, m, causal, scale)
    return out

"""Rung 4 in Numba: FlashAttention, version 2, a thread block for each block of queries.

The loops of `cufa.learn.n03_numba_v1` are turned around, as in `cufa.learn.r04_queries_outer`. The state of a row, m, l
and o, is in the registers of its thread from the first block of keys to the last, and global memory sees out once. The
grid has another axis, the blocks of queries, so 16 heads of 4096 queries are 2048 thread blocks instead of 16.

The last blocks of queries see the most keys under a causal mask. Those that begin last should be short, so that no SM
ends long after the others: blocks are numbered from the last queries to the first.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda, float32

TITLE = "FlashAttention v2 in Numba"
BLOCK_M = BLOCK_N = 32


@functools.cache
def kernel_of(head_dim: int) -> Any:
    """The kernel for a head_dim, which decides the sizes of shared memory and registers."""

    @cuda.jit
    def kernel(q, k, v, out, causal, scale):  # type: ignore[no-untyped-def]
        b, h, thread = cuda.blockIdx.z, cuda.blockIdx.y, cuda.threadIdx.x
        seqlen_q, seqlen_k = q.shape[1], k.shape[1]
        offset = seqlen_k - seqlen_q if causal else seqlen_k
        first = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * BLOCK_M
        row = first + thread
        k_j = cuda.shared.array((BLOCK_N, head_dim), float32)
        v_j = cuda.shared.array((BLOCK_N, head_dim), float32)
        s = cuda.local.array(BLOCK_N, float32)
        q_i = cuda.local.array(head_dim, float32)
        o = cuda.local.array(head_dim, float32)
        m, l = float32(-math.inf), float32(0)
        for d in range(head_dim):
            q_i[d] = float32(q[b, row, h, d]) if row < seqlen_q else float32(0)  # an integer 0 would make it a float64
            o[d] = 0
        end = min(min(first + BLOCK_M, seqlen_q) + offset, seqlen_k)  # the same for all threads: all of them load
        for j in range(0, end, BLOCK_N):
            keys = min(BLOCK_N, seqlen_k - j)
            for place in range(thread, keys * head_dim, BLOCK_M):
                n, d = place // head_dim, place % head_dim
                k_j[n, d], v_j[n, d] = k[b, j + n, h, d], v[b, j + n, h, d]
            cuda.syncthreads()
            seen = min(keys, row + offset + 1 - j)
            if seen > 0:
                m_new = m
                for n in range(seen):
                    score = float32(0)
                    for d in range(head_dim):
                        score += q_i[d] * k_j[n, d]
                    s[n] = scale * score
                    m_new = max(m_new, s[n])
                correction = math.exp(m - m_new)
                l *= correction
                for n in range(seen):
                    s[n] = math.exp(s[n] - m_new)
                    l += s[n]
                for d in range(head_dim):
                    value = correction * o[d]
                    for n in range(seen):
                        value += s[n] * v_j[n, d]
                    o[d] = value
                m = m_new
            cuda.syncthreads()
        if row < seqlen_q:
            for d in range(head_dim):
                out[b, row, h, d] = o[d] / l if l > 0 else float32(0)

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
    out = cuda.device_array(q.shape, np.float32)
    grid = -(-seqlen_q // BLOCK_M), heads, batch
    kernel_of(head_dim)[grid, BLOCK_M](q, k, v, out, causal, scale)
    return out

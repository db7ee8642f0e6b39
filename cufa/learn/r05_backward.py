"""Rung 5: the gradients, which compute every tile of probabilities a second time instead of keeping it.

Given ``dout``, the gradient of some loss by out, the chain rule goes through the three steps of rung 1 backwards::

    dV = Pᵀ dO                        of O = P V
    dP = dO Vᵀ
    dS = P ∘ (dP - delta)             of P = softmax(S), row by row
    dQ = scale · dS K                 of S = scale · Q Kᵀ
    dK = scale · dSᵀ Q

P is not kept from the forward, as it does not fit. But lse is, one number per row, and ``P = exp(S - lse)`` needs
neither maxima nor sums: a tile of P is there after one product.

delta is where the denominator of the softmax comes in: all probabilities of a row depend on all of its scores. For one
row the softmax's derivative gives ``dS_j = P_j (dP_j - Σ_n P_n dP_n)``: a sum over the whole row, and so, it seems, a
pass of its own over all keys. It is not, since ``Σ_n P_n dP_n = Σ_n P_n (dO · V_n) = dO · (Σ_n P_n V_n) = dO · O``.
Both are at hand, so ``delta = rowsum(dO ∘ O)`` takes one look at dout and out.

The outer loop goes over keys here, as sums for dK_j and dV_j are over queries: they stay in fast memory while the
queries pass by. dQ_i is a sum over keys, so every block of keys adds to all of it, in slow memory: on a GPU by atomic
additions, whose order is not fixed, and neither are the last bits. A loop over queries outside would turn that around
for dQ and make two such sums of dK and dV. Computing scores twice, once for each, avoids both and costs two products
more (`docs/backward.md` says when that pays)::

    delta, a pass over out and dout
    for each block of keys:            read K_j, V_j                              once each
        for each block of queries:     read Q_i, dO_i, lse_i, delta_i             as often as there are blocks of keys
            S, P, dP, dS: five products with dV, dK and dQ
                                       add to dQ_i                                as often: a read and a write
                                       write dK_j, dV_j                           once each
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TITLE = "the gradients, tile by tile"
BLOCK_M = BLOCK_N = 64


def head_backward(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    lse: NDArray[Any],
    dout: NDArray[Any],
    causal: bool,
    scale: float,
    block_m: int = BLOCK_M,
    block_n: int = BLOCK_N,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """One head of one sequence: dq, dk and dv, shaped as q, k and v."""
    offset = len(k) - len(q)
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    delta = np.empty_like(lse)
    blocks = [slice(i, min(i + block_m, len(q))) for i in range(0, len(q), block_m)]
    for rows in blocks:
        delta[rows] = (dout[rows] * out[rows]).sum(axis=1)
        dq[rows] = 0

    for j in range(0, len(k), block_n):  # on a GPU these are thread blocks, side by side
        keys = slice(j, min(j + block_n, len(k)))
        k_j, v_j = k[keys], v[keys]
        dk_j, dv_j = np.zeros(k_j.shape, k.dtype), np.zeros(v_j.shape, v.dtype)
        for rows in blocks:
            if causal and rows.stop - 1 + offset < j:  # no query of the tile sees a key of it
                continue
            q_i, dout_i = q[rows], dout[rows]
            s = scale * (q_i @ k_j.T)
            if causal and keys.stop - 1 > rows.start + offset:
                seen = np.arange(j, keys.stop) <= np.arange(rows.start, rows.stop)[:, None] + offset
                s = np.where(seen, s, -np.inf)
            lse_i = lse[rows, None]
            p = np.exp(s - np.where(lse_i > -np.inf, lse_i, np.inf))  # a row without keys has probabilities of 0
            dv_j += p.T @ dout_i
            ds = p * (dout_i @ v_j.T - delta[rows, None])
            dk_j += scale * (ds.T @ q_i)
            dq[rows] += scale * (ds @ k_j)
        dk[keys], dv[keys] = dk_j, dv_j
    return dq, dk, dv


def attention_backward(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    lse: NDArray[Any],
    dout: NDArray[Any],
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Gradients by q, k and v of ``sum(dout * out)``.

    All arrays are (batch, seqlen, heads, head_dim) but lse, (batch, heads, seqlen_q), which comes from rung 4.
    """
    if q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k and v have the shapes {q.shape}, {k.shape} and {v.shape}, which do not go together.")
    if q.dtype.kind != "f":  # means of integers would be cut off
        raise TypeError(f"q is {q.dtype}; pass float16, float32 or float64.")
    batch, seqlen_q, heads, head_dim = q.shape
    if not out.shape == dout.shape == (batch, seqlen_q, heads, v.shape[3]) or lse.shape != (batch, heads, seqlen_q):
        raise ValueError(f"out, dout and lse have the shapes {out.shape}, {dout.shape} and {lse.shape}, not q's.")
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    for b, h in np.ndindex(batch, heads):
        of_queries, of_keys = (b, slice(None), h), (b, slice(None), h)
        given = q[of_queries], k[of_keys], v[of_keys], out[of_queries], lse[b, h], dout[of_queries]
        dq[of_queries], dk[of_keys], dv[of_keys] = head_backward(*given, causal, scale)
    return dq, dk, dv

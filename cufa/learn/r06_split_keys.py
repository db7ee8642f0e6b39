"""Rung 6: keys split among workers, whose results are merged.

Rung 4 has a thread block for each block of queries. When a language model writes a text there is one query per head
and sequence, but thousands of keys: with 8 heads 8 thread blocks, on a GPU with 132 SMs. So the keys are split as well
(Dao et al., *Flash-Decoding*, 2023): each part of them is attention by itself, and gives a state (out, lse).

States of disjoint parts of the keys merge into the state of all of them::

    lse = log Σ exp(lse_s)                    over the parts s
    out = Σ exp(lse_s - lse) · out_s          a mean of means, weighted by the probability that each part has

That is rung 2 once more: ``(out, lse)`` is ``(m, l, o)`` with o divided by l, and m + log(l) for both. Merging is
associative and commutative, and an empty part, with ``lse = -inf``, changes nothing; `docs/learn/theory.md` proves it.
So it does not matter which part of the keys is where: other SMs here, pages of a cache, prefixes that many sequences
share, or other GPUs (ring attention).

Here each part is computed as in rung 1, since it does not matter how.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

TITLE = "split keys, merged states"
SPLITS = 4


def state(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], seen: NDArray[np.bool_], scale: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Attention over a part of the keys: out (seqlen_q, head_dim), lse (seqlen_q,); `seen` is (seqlen_q, keys)."""
    s = np.where(seen, scale * (q @ k.T), -np.inf)
    m = s.max(axis=1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(m > -np.inf, m, 0))
    l = p.sum(axis=1, keepdims=True)
    some = l > 0
    out = p @ v / np.where(some, l, 1)
    return out, np.where(some, m + np.log(np.where(some, l, 1)), -np.inf)[:, 0]


def merge(outs: NDArray[Any], lses: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The state of all parts: of out (parts, rows, head_dim) and lse (parts, rows) of each."""
    m = lses.max(axis=0)
    weights = np.exp(lses - np.where(m > -np.inf, m, 0))
    l = weights.sum(axis=0)
    some = l > 0
    out = (weights[..., None] * outs).sum(axis=0) / np.where(some, l, 1)[:, None]
    return out, np.where(some, m + np.log(np.where(some, l, 1)), -np.inf)


def head(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], causal: bool, scale: float, splits: int = SPLITS
) -> NDArray[Any]:
    """One head of one sequence: q (seqlen_q, head_dim), k and v (seqlen_k, head_dim)."""
    i, j = np.ogrid[: len(q), : len(k)]
    seen = j <= i + len(k) - len(q) if causal else np.ones((len(q), len(k)), bool)
    edges = [len(k) * part // splits for part in range(splits + 1)]
    parts = [slice(start, stop) for start, stop in pairwise(edges)]
    states = [state(q, k[part], v[part], seen[:, part], scale) for part in parts]  # on a GPU side by side
    return merge(np.stack([out for out, _ in states]), np.stack([lse for _, lse in states]))[0]


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

"""Rung 4 in Triton: FlashAttention, version 2, with blocks instead of threads.

In Triton a program has a tile of queries, as a pass of the outer loop of `cufa.learn.r04_queries_outer` has, and says
what becomes of whole tiles; which thread holds what, copies into shared memory, and the instructions of the tensor
cores are the compiler's. So the loop below reads almost as it does in NumPy. What differs:

- **Pointers**: a tile is loaded from the addresses of its elements, ``pointer + row · stride + column``, and a mask
  says which of them are there. Others are read as 0, and cost nothing.
- **Powers of 2**: tiles have such sizes, so head_dim is filled up with columns of zeros, which add nothing to products.
- **Exponentials are those of 2**, which is what the hardware has: ``exp(x) = 2^(x · log2 e)``, and the factor is part
  of the scale.
- **P is rounded to the dtype of v**, since tensor cores multiply 16-bit numbers, and add up in float32.
- **Two loops**: tiles that all queries see need no mask, so only those on the diagonal are compared.

What Triton does not give: loads by one warp while others compute (from version 3 on its compiler does that for some
programs), who waits for whom, and which registers hold what: rungs 7 to 13.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

TITLE = "FlashAttention v2 in Triton"
BLOCK_M, BLOCK_N = 64, 64


@triton.jit  # type: ignore[untyped-decorator]
def _blocks(  # type: ignore[no-untyped-def]
    state, q, k_ptr, v_ptr, row, begin, end, last_keys, seqlen_k, head_dim, scale,
    masked: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """The state of a tile's rows after the blocks of keys from `begin` to `end`; rows see keys to their last ones."""
    m, l, o = state
    d = tl.arange(0, o.shape[1])
    for j in range(begin, end, block_n):
        keys = j + tl.arange(0, block_n)
        there = (keys < seqlen_k)[:, None] & (d < head_dim)[None, :]
        k = tl.load(k_ptr + keys[:, None] * row + d[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + keys[:, None] * row + d[None, :], mask=there, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if masked:
            s = tl.where(keys[None, :] <= last_keys[:, None], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new > -float("inf"), m_new, 0.0)  # of a row that has seen no key yet any number will do
        p = tl.exp2(s - base[:, None])
        correction = tl.exp2(m - base)
        l = l * correction + tl.sum(p, 1)
        o = o * correction[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
    return m, l, o


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, heads, seqlen_q, seqlen_k, head_dim, scale,
    causal: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    row = heads * head_dim  # from one row of a head to the next
    q_ptr += batch * seqlen_q * row + head * head_dim
    k_ptr += batch * seqlen_k * row + head * head_dim
    v_ptr += batch * seqlen_k * row + head * head_dim
    out_ptr += batch * seqlen_q * row + head * head_dim
    first = tl.program_id(0) * block_m
    rows, d = first + tl.arange(0, block_m), tl.arange(0, columns)
    there = (rows < seqlen_q)[:, None] & (d < head_dim)[None, :]
    places = rows[:, None] * row + d[None, :]
    q = tl.load(q_ptr + places, mask=there, other=0.0)
    m = tl.full([block_m], -float("inf"), tl.float32)
    l = tl.zeros([block_m], tl.float32)
    o = tl.zeros([block_m, columns], tl.float32)

    # Blocks of keys up to `whole` are seen by all rows, and keys up to `end` by some.
    offset = seqlen_k - seqlen_q if causal else seqlen_k
    last_keys = tl.minimum(rows + offset, seqlen_k - 1)
    end = tl.maximum(tl.minimum(first + block_m + offset, seqlen_k), 0)
    whole = tl.maximum(tl.minimum(first + offset + 1, seqlen_k), 0) // block_n * block_n
    m, l, o = _blocks((m, l, o), q, k_ptr, v_ptr, row, 0, whole, last_keys, seqlen_k, head_dim, scale, False, block_n)
    m, l, o = _blocks((m, l, o), q, k_ptr, v_ptr, row, whole, end, last_keys, seqlen_k, head_dim, scale, True, block_n)
    o = o / tl.where(l > 0.0, l, 1.0)[:, None]
    tl.store(out_ptr + places, o.to(out_ptr.dtype.element_ty), mask=there)


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, softmax_scale: float | None = None) -> Any:
    """Attention of torch tensors (batch, seqlen, heads, head_dim), float16, bfloat16 or float32, head_dim to 128.

    Those that are not contiguous are copied first. One sequence has less than 2^31 elements.
    """
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v have the shapes {q.shape}, {k.shape} and {v.shape}, which do not go together.")
    if not 1 <= q.shape[3] <= 128 or q[:1].numel() >= 2**31 or k[:1].numel() >= 2**31:
        raise ValueError(
            f"q and k have the shapes {q.shape} and {k.shape}, expected head_dim 1 to 128, below 2^31 elements."
        )
    batch, seqlen_q, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    scale = (head_dim**-0.5 if softmax_scale is None else softmax_scale) * math.log2(math.e)
    columns = max(triton.next_power_of_2(head_dim), 16)  # the least that a product takes
    if out.numel():
        _kernel[triton.cdiv(seqlen_q, BLOCK_M), batch * heads](
            *(x.contiguous() for x in (q, k, v)), out, heads, seqlen_q, k.shape[1], head_dim, scale,
            causal=causal, block_m=BLOCK_M, block_n=BLOCK_N, columns=columns,
        )  # fmt: skip
    return out

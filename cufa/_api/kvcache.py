"""`cufa.attention_with_kvcache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._call.arrays import unscriptable
from .._call.kvcache import DecodePlan, parts_of
from .._operations.call import call
from .._operations.kvcache import ATTENTION_WITH_KVCACHE
from .attention import Array


@unscriptable
def attention_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    k: Array | None = None,
    v: Array | None = None,
    cache_seqlens: Array | None = None,
    block_table: Array | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    cu_seqlens_q: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    rotary_interleaved: bool = True,
    causal: bool = False,
    window_size: Sequence[int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    cache_dtype: str | None = None,
    num_splits: int = 0,
    plan: DecodePlan | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Attention over caches of keys and values, to which new ones are first appended in place.

    For generating text: a step of decoding, a chunk of a prompt, or, packed, some of both. Sequences have caches of
    their own or pages of a common one. The host never reads lengths on a GPU, but with ``CUFA_DEBUG=1``.

    Parameters
    ----------
    q : array, (batch, seqlen_q, num_heads_q, head_dim) or, with `cu_seqlens_q`, (total_q, num_heads_q, head_dim)
        As for `attention`, but neither JAX arrays, which cannot change in place, nor tensors that require grad.
    k_cache : array, (num_caches, capacity, num_heads_k, head_dim) or (num_pages, page_size, num_heads_k, head_dim)
        Of q's dtype, or beside q of float16 or bfloat16 of float8_e4m3fn; any strides, of which they are never copied.
        Read-only arrays will do if nothing is appended.
    v_cache : array, (num_caches, capacity, num_heads_k, head_dim_v) or (num_pages, page_size, num_heads_k, head_dim_v)
    k, v : array, (batch, seqlen_new, num_heads_k, head_dim or head_dim_v) or, packed like q, (total_q, ...), optional
        New rows: row i of sequence b becomes key ``cache_seqlens[b] + i`` before any sequence attends.
    cache_seqlens : int32 array, (batch,), optional
        Keys in each cache, without new ones; it is not changed. None means full caches, to which nothing can be
        appended. What lies behind the last key, NaN included, does not count.
    block_table : int32 array, (batch, max_pages), optional
        Makes the caches pages: key j of sequence b is row ``j % page_size`` of page
        ``block_table[b, j // page_size]``, and the capacity ``max_pages * page_size``. Entries for pages without
        keys may hold anything. Any page_size will do; multiples of 16 are the fastest. Pages of keys and of values may
        take turns in one pool, so that both caches reach over it, as long as no page holds both.
    cache_batch_idx : int32 array, (batch,), optional
        The cache of each sequence, where they are not pages; by default sequence b has cache b.
    cache_leftpad : int32 array, (batch,), optional
        So many rows at the head of each cache are no keys. Others keep their positions.
    cu_seqlens_q : int32 array, (batch + 1,), optional
        Rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of q, k and v are sequence b's, as for `attention_varlen`.
    rotary_cos, rotary_sin : array, (max_position, rotary_dim / 2), optional
        Rotary embedding of the first rotary_dim columns of k and q; needs k. Of q's dtype or float32. New row i of k
        has the position ``cache_seqlens[b] + i``; so has row i of q if `causal` or in a window, else all rows of q have
        the position ``cache_seqlens[b]``.
    rotary_interleaved : bool
        Rotate pairs of columns ``(2i, 2i + 1)``; else ``(i, i + rotary_dim / 2)``.
    causal, window_size, softmax_scale, softcap, alibi_slopes, sinks
        As for `attention`, within each sequence: its last query sees its last key, that which is appended last.
    k_descale, v_descale : float32 array, () or (num_heads_k,) or (batch, num_heads_k), optional
        For caches of float8_e4m3fn: keys and values are what is stored times a positive number, by default 1. New rows,
        keys rotated, are divided by it in float32, and then rounded to the nearest number; those beyond 448 become 448.
    cache_dtype : {None, 'float8_e4m3fn'}
        What the bytes of caches of uint8 are, for libraries without the dtype, such as CuPy.
    num_splits : int
        0 divides the work evenly over the GPU, so that the last bits of results depend on the whole batch. 1 to 256
        divide the keys of every sequence into so many parts: a sequence's results are then the same bits in any batch.
        On the CPU they always are.
    plan : DecodePlan, optional
        How the work is divided, made once for many calls.
    return_lse : bool
        Return `lse` too.
    out : array, like the result, optional
        Written and returned instead of a new array; must not share memory with the other arrays.

    Returns
    -------
    out : array, (batch, seqlen_q, num_heads_q, head_dim_v) or (total_q, num_heads_q, head_dim_v)
        Rows of sequences without keys, and rows that see none, are 0.
    lse : float32 array, (batch, num_heads_q, seqlen_q) or (num_heads_q, total_q)
        Only if `return_lse`; -inf for a row that sees no key. float64 for float64 arrays.

    Raises
    ------
    TypeError
        If an argument is no array or of another framework than q, or lacks another that belongs to it.
    ValueError
        If shapes, dtypes or devices disagree or, on the CPU or with ``CUFA_DEBUG=1``, if lengths, caches, pages or
        positions are not there, scales are not from 2^-126 to 2^126, or two sequences append to the same row. Then
        nothing has been written.
    UnsupportedError
        For JAX arrays and for tensors that require grad; with ``CUFA_DEBUG=1``, in the capture of a CUDA graph; and as
        for `attention`.
    CompileError, MissingKernelError
        As for `attention`.

    See Also
    --------
    attention_varlen : The same without caches.
    reference.attention_with_kvcache : The specification.

    Notes
    -----
    On a GPU, where checking them would make the host wait, lengths, caches, pages and positions that are not there are
    clamped to those that are, and rows that would be appended where nothing is are dropped: `cufa.reference` says how.
    Set ``CUFA_DEBUG=1`` to have them checked as on the CPU.
    A sequence may read rows of pages that others append to in the same call, and then sees them.

    torch.compile leaves the call out of its graph.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> rng = np.random.default_rng(0)
    >>> k_cache, v_cache = np.zeros((2, 3, 16, 2, 64), np.float32)  # of 3 sequences, each with room for 16 keys
    >>> lengths = np.array([4, 0, 9], np.int32)
    >>> q, k, v = (rng.standard_normal((3, 1, heads, 64), dtype=np.float32) for heads in (8, 2, 2))
    >>> cufa.attention_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths).shape
    (3, 1, 8, 64)
    >>> bool((k_cache[2, 9] == k[2, 0]).all())
    True
    >>> lengths += 1  # for the next token
    """
    memory, facts = parts_of("attention_with_kvcache", plan)
    given = (
        q, k_cache, v_cache, alibi_slopes, sinks, out, k, v, cache_seqlens, block_table, cache_batch_idx, cache_leftpad,
        cu_seqlens_q, rotary_cos, rotary_sin, k_descale, v_descale, memory,
    )  # fmt: skip
    own = (rotary_interleaved, num_splits, facts, cache_dtype)
    asked = (causal, window_size, softmax_scale, softcap, return_lse, False, *own)
    return call(ATTENTION_WITH_KVCACHE, given, asked)

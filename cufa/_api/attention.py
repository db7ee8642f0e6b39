"""The public functions: what they take and give. The way of a call is `_operations.call`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._call.arrays import unscriptable
from .._operations.forward import ATTENTION, ATTENTION_VARLEN
from .features import call_featured

Array = Any
"""An array of CuPy, torch, JAX, Numba or NumPy, or any with ``__dlpack__``."""


@unscriptable
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window_size: Sequence[int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    score: Any = None,
    bias: Array | None = None,
    rel_bias: Array | None = None,
    mask: Any = None,
    dropout_p: float = 0.0,
    seed: int | Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Exact attention, ``softmax(softmax_scale · q kᵀ) v``, for each batch entry and head.

    Computed where the arrays are: GPU arrays on their GPU and the caller's current stream, without waiting for it;
    arrays in host memory on the CPU. Nothing of size seqlen_q × seqlen_k is stored.

    Parameters
    ----------
    q : array, (batch, seqlen_q, num_heads_q, head_dim)
        CuPy, torch, JAX, Numba or NumPy, or any array with ``__dlpack__``; float16, bfloat16 or float32, on the CPU
        also float64. Any strides. head_dim is 1 to 256.
    k : array, (batch, seqlen_k, num_heads_k, head_dim)
        num_heads_q must be a multiple of num_heads_k: query head h reads key head ``h // (num_heads_q // num_heads_k)``
        (grouped-query attention; multi-query if num_heads_k is 1).
    v : array, (batch, seqlen_k, num_heads_k, head_dim_v)
        head_dim_v is 1 to 256, independent of head_dim.
    causal : bool
        Query i sees key j if ``j <= i + seqlen_k - seqlen_q``: the last query sees the last key.
    window_size : (int or None, int or None), optional
        Keys that a query sees to the (left, right) of the key at its own position ``i + seqlen_k - seqlen_q``, both
        inclusive; None (or -1) is unbounded. The mask is drawn in `cufa.reference`.
    softmax_scale : float, optional
        Multiplies q·kᵀ; default ``head_dim ** -0.5``. From 2^-126 to 2^127. This and `softcap` may be arrays of no
        dimensions, whose value is read at the call, for which the host waits if it is on a GPU.
    softcap : float
        Scores become ``softcap * tanh(scores / softcap)``; 0.0 is off.
    alibi_slopes : float32 array, (num_heads_q,) or (batch, num_heads_q), optional
        ``slope * |i + seqlen_k - seqlen_q - j|`` is subtracted from each score.
    sinks : float32 array, (num_heads_q,), optional
        Score, per head, of one more key that takes probability and has no value.
    score : function, optional
        What becomes of a score behind the softcap and ALiBi: see `cufa.functions`.
    bias : array, (batch, num_heads_q, seqlen_q, seqlen_k), optional
        Added to scores behind those and `score`. Any axis may be 1, which serves all; any strides; of q's dtype or
        float32, on the CPU also float64.
    rel_bias : float32 array, (num_heads_q, 2 · reach + 1), optional
        Added like `bias`: ``rel_bias[h, reach + d]``, where ``d = i + seqlen_k - seqlen_q - j`` is how far the key lies
        before the query's own position, clipped to -reach and reach.
    mask : array, mask or function, optional
        Which keys a query sees, beside what `causal` and `window_size` say: a boolean array shaped like `bias`, one of
        `cufa.masks`, a `cufa.BlockMask`, or a function of (batch, head, query, key), see `cufa.functions`.
    dropout_p : float
        Probabilities are 0 with this probability, from 0, which is off, to less than 1; the others are divided by
        1 - dropout_p. `lse` does not change.
    seed : int or array, optional
        From which what is dropped follows, as `cufa.dropout_mask` gives it; needed with `dropout_p`. An integer that
        int64 holds, or an array of no dimensions, of int32, uint32 or int64 and of q's framework and device, which
        kernels read: under `jax.jit` and in CUDA graphs it may change. Another seed takes no more time than the same,
        but for an integer under `jax.jit`, which traces anew.
    return_lse : bool
        Return `lse` too.
    out : array, (batch, seqlen_q, num_heads_q, head_dim_v), optional
        Written and returned instead of a new array; must not share memory with the inputs.

    Returns
    -------
    out : array, (batch, seqlen_q, num_heads_q, head_dim_v)
        Of q's framework, dtype and device. Rows that see no key are 0.
    lse : float32 array, (batch, num_heads_q, seqlen_q)
        Only if `return_lse`: natural logarithm of the sum of exponentials of a row's scores, the sink's included;
        -inf for a row that sees no key. float64 for float64 arrays.

    Raises
    ------
    TypeError
        If an argument is no array or of another framework than q.
    ValueError
        If shapes, dtypes, devices or values disagree.
    UnsupportedError
        If the GPU is older than compute capability 8.0, or for float64 on a GPU, or a head_dim above 256.
    CompileError, MissingKernelError
        If the kernel is needed for the first time and cannot be compiled, or not now.

    See Also
    --------
    attention_varlen : Sequences of any lengths, packed without padding.
    reference.attention : The specification, in NumPy float64.
    explain : Which kernel serves a call, and why.

    Notes
    -----
    Dao, *FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning*, 2023. Results are bitwise
    repeatable, and a row does not depend on what else is in the batch. All arguments are checked before anything is
    written.

    On a GPU 16-bit arrays q, k and v that cannot be copied 16 bytes at a time, as if head_dim is odd, are first copied
    into rows that can, where there are queries enough for that to pay. For as long as the call takes, the copies need
    memory from the caller's framework: as much as the arrays, with rows rounded up to 16 bytes.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 128, 8, 64), dtype=np.float32)
    >>> k, v = rng.standard_normal((2, 2, 128, 2, 64), dtype=np.float32)
    >>> cufa.attention(q, k, v, causal=True).shape
    (2, 128, 8, 64)
    """
    given = (q, k, v, alibi_slopes, sinks, out)
    asked = causal, window_size, softmax_scale, softcap, return_lse, False
    return call_featured(ATTENTION, given, asked, score, bias, rel_bias, mask, dropout_p, seed)


@unscriptable
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    seqused_k: Array | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    score: Any = None,
    bias: Array | None = None,
    rel_bias: Array | None = None,
    mask: Any = None,
    dropout_p: float = 0.0,
    seed: int | Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """`attention` of sequences of any lengths, packed end to end without padding.

    Parameters
    ----------
    q : array, (total_q, num_heads_q, head_dim)
    k : array, (total_k, num_heads_k, head_dim)
    v : array, (total_k, num_heads_k, head_dim_v)
        As for `attention`.
    cu_seqlens_q, cu_seqlens_k : int32 array, (batch + 1,)
        Sequence b is rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. They begin with 0 and do not decrease, but for
        zeros behind the last, with which programs of fixed shapes pad: checked on the CPU, and with
        ``CUFA_DEBUG=1``. On a GPU, where reading them makes the host wait, an offset else counts as the largest up to
        it, clamped to the packed array. Rows of q that are no sequence's are 0 in a new `out`, left as they are in a
        given one, and their lse is -infinity.
    seqused_k : int32 array, (batch,), optional
        Live keys of each sequence; whatever its other rows of k and v hold, NaN included, does not count.
    causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, score, rel_bias, dropout_p, seed, return_lse, out
        As for `attention`, within each sequence. `alibi_slopes` may be (batch, num_heads_q).
    bias, mask
        As for `attention`, of the longest sequence: queries and keys are counted from the first of their sequence. An
        array that is shorter is refused on the CPU. On a GPU, where lengths are not looked at, a bias is 0 beyond its
        ends, and a mask hides what lies there.

    Returns
    -------
    out : array, (total_q, num_heads_q, head_dim_v)
    lse : float32 array, (num_heads_q, total_q)
        Only if `return_lse`; float64 for float64 arrays.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError
        As for `attention`.

    See Also
    --------
    reference.attention_varlen : The specification.

    Notes
    -----
    No longest length is asked for: the kernel finds its sequence from the offsets on the GPU.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 12, 4, 32), dtype=np.float32)
    >>> offsets = np.array([0, 5, 12], np.int32)  # sequences of 5 and 7 tokens
    >>> cufa.attention_varlen(q, k, v, offsets, offsets, causal=True).shape
    (12, 4, 32)
    """
    given = (q, k, v, alibi_slopes, sinks, out, cu_seqlens_q, cu_seqlens_k, seqused_k)
    asked = causal, window_size, softmax_scale, softcap, return_lse, False
    return call_featured(ATTENTION_VARLEN, given, asked, score, bias, rel_bias, mask, dropout_p, seed)

"""The public gradients: what they take and give. The way of a call is `_operations.call`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._call.arrays import unscriptable
from .._operations.backward import ATTENTION_BACKWARD, ATTENTION_VARLEN_BACKWARD
from .features import call_featured

Array = Any
"""An array of CuPy, torch, JAX, Numba or NumPy, or any with ``__dlpack__``."""


@unscriptable
def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    dlse: Array | None = None,
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
    deterministic: bool = False,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
) -> Any:
    """Gradients of `attention` by q, k, v, the sinks, biases and what `score` reads.

    Nothing of size seqlen_q × seqlen_k is stored: scores are computed again, and `lse` makes probabilities of them.

    Parameters
    ----------
    dout : array, (batch, seqlen_q, num_heads_q, head_dim_v)
        Gradient by `out`, in q's dtype.
    q, k, v : array
        What `attention` was called with.
    out : array, (batch, seqlen_q, num_heads_q, head_dim_v)
        What it returned.
    lse : float32 array, (batch, num_heads_q, seqlen_q)
        What it returned with ``return_lse=True``; for float64 arrays in float64. (They accept a float32 one, too, and
        then err by its rounding: relatively by 2^-24 times lse.)
    dlse : float32 array, (batch, num_heads_q, seqlen_q), optional
        Gradient by `lse`, for float64 arrays float64 or float32; 0 if None.
    causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, score, bias, rel_bias, mask, dropout_p, seed
        What `attention` was called with.
    deterministic : bool
        dq, dbias and drel_bias are the same bits in every run. Without, thread blocks add to them as they come, which
        is faster. dk, dv and dsinks always are, and so are all on the CPU, dq on Hopper above head_dim 128, and dbias
        where each of its elements is for one score only. Where several share it, and of drel_bias, sums are exact then,
        and take 64 bytes of memory for each element while they are computed. A call whose `score` has gradients by
        arrays is refused on a GPU.
    dq, dk, dv : array, optional
        Shaped like q, k and v, and in their dtype. Written and returned instead of new arrays; must not share memory
        with each other or with the inputs.

    Returns
    -------
    dq, dk, dv : array
        Of q's framework, dtype and device. A row that sees no key has gradient 0, whatever its dout and dlse hold, and
        so has a key that no row sees.
    dsinks : float32 array, (num_heads_q,)
        Only if `sinks` are given; float64 for float64 arrays.
    dscore_... : float32 array
        For each array that `score` reads, as `cufa.functions` says, in the order in which it is found.
    dbias, drel_bias : float32 array
        Only if these are given, and shaped like them.

    Raises
    ------
    TypeError, ValueError
        As for `attention`; also if `out`, `lse`, `dout` or `dlse` are not shaped as that call's results.
    UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `attention`; `UnsupportedError` also for dq, dk or dv with JAX arrays, which cannot be written.

    See Also
    --------
    reference.attention_backward : The specification, in NumPy float64.

    Notes
    -----
    On a GPU the sums of dq take memory while they add up, from the caller's framework: 4 bytes for each element of q,
    head_dim rounded up to 32, 64 or 128, and 8 for each row; on Hopper above head_dim 128 only the latter. Packed
    sequences take at most twice the former if they have 128 rows on average, and at most five times as much if they
    have fewer. Where sequences have up to 32 rows and 64 keys, packed ones take the former on every GPU, once, and
    dense ones none of it. To the latter packed ones add 32 bytes for each of them that has rows, and 16 for each that
    has not, in all. Copies of q, k, v and dout, as `attention` makes of arrays that are not aligned, come on top.

    Dao, *FlashAttention-2*, 2023, Algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 128, 2, 64), dtype=np.float32)
    >>> out, lse = cufa.attention(q, k, v, causal=True, return_lse=True)
    >>> dq, dk, dv = cufa.attention_backward(dout, q, k, v, out, lse, causal=True)
    >>> dk.shape
    (1, 128, 2, 64)
    """
    forward = (q, k, v, alibi_slopes, sinks, out)
    given = (*forward, dout, lse, dlse, dq, dk, dv)
    asked = causal, window_size, softmax_scale, softcap, False, deterministic
    return call_featured(ATTENTION_BACKWARD, given, asked, score, bias, rel_bias, mask, dropout_p, seed)


@unscriptable
def attention_varlen_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    seqused_k: Array | None = None,
    dlse: Array | None = None,
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
    deterministic: bool = False,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
) -> Any:
    """Gradients of `attention_varlen` by q, k, v, the sinks, biases and what `score` reads.

    Parameters
    ----------
    dout, out : array, (total_q, num_heads_q, head_dim_v)
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k
        What `attention_varlen` was called with.
    lse, dlse : float32 array, (num_heads_q, total_q)
    causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, score, bias, rel_bias, mask, dropout_p, seed
        What `attention_varlen` was called with.
    deterministic, dq, dk, dv
        As for `attention_backward`.

    Returns
    -------
    dq, dk, dv : array
        Shaped like q, k and v; 0 for rows that are not live.
    dsinks : float32 array, (num_heads_q,)
        Only if `sinks` are given; float64 for float64 arrays.
    dscore_..., dbias, drel_bias : float32 array
        As for `attention_backward`.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        As for `attention_backward`.

    See Also
    --------
    reference.attention_varlen_backward : The specification.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 12, 4, 32), dtype=np.float32)
    >>> offsets = np.array([0, 5, 12], np.int32)  # sequences of 5 and 7 tokens
    >>> out, lse = cufa.attention_varlen(q, k, v, offsets, offsets, return_lse=True)
    >>> cufa.attention_varlen_backward(dout, q, k, v, out, lse, offsets, offsets)[0].shape
    (12, 4, 32)
    """
    forward = (q, k, v, alibi_slopes, sinks, out, cu_seqlens_q, cu_seqlens_k, seqused_k)
    given = (*forward, dout, lse, dlse, dq, dk, dv)
    asked = causal, window_size, softmax_scale, softcap, False, deterministic
    return call_featured(ATTENTION_VARLEN_BACKWARD, given, asked, score, bias, rel_bias, mask, dropout_p, seed)

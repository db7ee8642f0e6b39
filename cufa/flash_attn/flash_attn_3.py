"""The functions of FlashAttention-3's module ``flash_attn_interface``, computed by cufa.

Its rows without keys have -inf in lse, as cufa's. What is not served raises `cufa.UnsupportedError`, which names the
argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from .._api.features import call_featured
from .._api.kvcache import attention_with_kvcache
from .._api.states import merge_states
from .._call import options as _options
from .._call.arrays import unscriptable
from .._call.kvcache import DecodePlan
from .._operations.call import call
from .._operations.forward import ATTENTION, ATTENTION_VARLEN
from ..errors import ArgumentError, UnsupportedError
from . import _common
from ._common import Array, window

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]


@unscriptable
def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """FlashAttention-3's ``flash_attn_func``: `cufa.attention` with its arguments.

    Parameters
    ----------
    q, k, v, softmax_scale, causal, window_size, softcap, deterministic
        As for `cufa.flash_attn.flash_attn_func`.
    qv, q_descale, k_descale, v_descale : None
        Not supported.
    attention_chunk : int
        A query sees the keys of its own chunk of so many positions, which are counted from the first key; 0 is off.
    num_splits : {1, 0}
        How keys are divided is cufa's to decide; other numbers are not supported.
    pack_gqa : None
        Not supported: how heads share tiles is cufa's to decide.
    sm_margin : 0
        Not supported.
    return_attn_probs : bool
        Return softmax_lse too.

    Returns
    -------
    out : array, (batch_size, seqlen, nheads, headdim)
    softmax_lse : float32 array, (batch_size, nheads, seqlen)
        Only with `return_attn_probs`; -inf for a row that sees no key.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `cufa.attention`; `UnsupportedError` also for what is not supported.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.flash_attn import flash_attn_3
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 128, 4, 64), dtype=np.float32)
    >>> flash_attn_3.flash_attn_func(q, k, v, causal=True, attention_chunk=32).shape
    (2, 128, 4, 64)
    """
    _refuse("flash_attn_func", qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, pack_gqa=pack_gqa)
    _refuse_numbers("flash_attn_func", num_splits, sm_margin)
    asked = causal, window(window_size), softmax_scale, softcap, return_attn_probs, deterministic
    return _attend(ATTENTION, (q, k, v, None, None, None), asked, attention_chunk)


@unscriptable
def flash_attn_qkvpacked_func(
    qkv: Array,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of queries, keys and values in one array, whose gradient is one array too.

    Parameters
    ----------
    qkv : array, (batch_size, seqlen, 3, nheads, headdim) or (batch_size, seqlen, nheads + 2 * nheads_k, headdim)
    num_heads_q : int, optional
        For the second shape of `qkv`.
    softmax_scale, causal, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap, deterministic
        As for `flash_attn_func`.
    sm_margin, return_attn_probs
        As for `flash_attn_func`.

    Returns
    -------
    out, softmax_lse : array
        As `flash_attn_func` gives them.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `flash_attn_func`.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.flash_attn import flash_attn_3
    >>> qkv = np.random.default_rng(0).standard_normal((2, 128, 8, 64), dtype=np.float32)
    >>> flash_attn_3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4).shape
    (2, 128, 4, 64)
    """
    function = "flash_attn_qkvpacked_func"
    _refuse(function, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    _refuse_numbers(function, 1, sm_margin)
    heads = None
    if len(_common.shape_of(qkv)) == 4:
        heads = _heads(function, qkv.shape[2], num_heads_q)
    else:
        _common.check_packed(function, "qkv", qkv, 5, 3)
        if num_heads_q is not None and num_heads_q != qkv.shape[3]:
            raise ArgumentError(f"{function}: num_heads_q is {num_heads_q} but qkv has {qkv.shape[3]} heads.")
    asked = causal, window(window_size), softmax_scale, softcap, return_attn_probs, deterministic
    attention_chunk = _options.integer(function, "attention_chunk", attention_chunk)
    if attention_chunk == 0 and _common.records(qkv, None):
        asked = _options.of(ATTENTION.name, asked)[:-2]  # as plain values, as in flash_attn_interface
        out, lse = _torch().Packed.apply(None, qkv, (), None, asked, (0.0, None), heads)
        return (out, lse) if asked[4] else out
    q, k, v = _common.parts(qkv) if heads is None else _common.split(qkv, heads)
    return _attend(ATTENTION, (q, k, v, None, None, None), asked, attention_chunk)


@unscriptable
def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: None = None,
    seqused_k: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """FlashAttention-3's ``flash_attn_varlen_func``: `cufa.attention_varlen` with its arguments.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As for `cufa.flash_attn.flash_attn_varlen_func`.
    seqused_q : None
        Not supported.
    seqused_k : int32 array, (batch_size,), optional
        Live keys of each sequence.
    softmax_scale, causal, qv, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap, num_splits
        As for `flash_attn_func`, within each sequence.
    pack_gqa, deterministic, sm_margin, return_attn_probs
        As for `flash_attn_func`.

    Returns
    -------
    out : array, (total_q, nheads, headdim)
    softmax_lse : float32 array, (nheads, total_q)
        Only with `return_attn_probs`.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `flash_attn_func`.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.flash_attn import flash_attn_3
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 12, 4, 32), dtype=np.float32)
    >>> offsets = np.array([0, 5, 12], np.int32)
    >>> flash_attn_3.flash_attn_varlen_func(q, k, v, offsets, offsets, 7, 7, causal=True).shape
    (12, 4, 32)
    """
    function = "flash_attn_varlen_func"
    _refuse(function, seqused_q=seqused_q, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    _refuse(function, pack_gqa=pack_gqa)
    _refuse_numbers(function, num_splits, sm_margin)
    asked = causal, window(window_size), softmax_scale, softcap, return_attn_probs, deterministic
    given = q, k, v, None, None, None, cu_seqlens_q, cu_seqlens_k, seqused_k
    return _attend(ATTENTION_VARLEN, given, asked, attention_chunk)


@unscriptable
def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    qv: None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: Array | int | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    page_table: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k_new: Array | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: None = None,
    q_descale: None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: DecodePlan | None = None,
    num_splits: int = 0,
    pack_gqa: None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """FlashAttention-3's ``flash_attn_with_kvcache``: `cufa.attention_with_kvcache` with its arguments.

    Parameters
    ----------
    q : array, (batch_size, seqlen, nheads, headdim) or, with `cu_seqlens_q`, (total_q, nheads, headdim)
    k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad
        As for `cufa.flash_attn.flash_attn_with_kvcache`. Caches may be of float8_e4m3fn beside q of 16 bits.
    page_table : int32 array, (batch_size, max_num_pages_per_seq), optional
    cu_seqlens_q : int32 array, (batch_size + 1,), optional
    cu_seqlens_k_new : int32 array, optional
        The same array as `cu_seqlens_q`: as many rows are appended as there are queries.
    max_seqlen_q : int, optional
        Not needed, and never read.
    k_descale, v_descale : float32 array, (batch_size, nheads_k), optional
        For caches of float8_e4m3fn.
    scheduler_metadata : cufa.DecodePlan, optional
        What `cufa.decode_plan` gives.
    num_splits : int
        Parts into which keys are divided, at most 256; 0 is as many as there are best.
    qv, rotary_seqlens, q_descale, pack_gqa : None
        Not supported.
    attention_chunk, sm_margin : 0
        Not supported.
    softmax_scale, causal, window_size, softcap, rotary_interleaved, return_softmax_lse
        As for `cufa.flash_attn.flash_attn_with_kvcache`.

    Returns
    -------
    out : array, shaped like q
    softmax_lse, out_accum, softmax_lse_accum : array
        Only with `return_softmax_lse`; the last two, parts of the sums, have no elements.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError
        As for `cufa.attention_with_kvcache`; `UnsupportedError` also for what is not supported.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.flash_attn import flash_attn_3
    >>> k_cache, v_cache = np.ones((2, 3, 16, 2, 64), np.float32)
    >>> q = np.ones((3, 1, 8, 64), np.float32)
    >>> flash_attn_3.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=4).shape
    (3, 1, 8, 64)
    """
    function = "flash_attn_with_kvcache"
    _refuse(function, qv=qv, rotary_seqlens=rotary_seqlens, q_descale=q_descale, pack_gqa=pack_gqa)
    if _options.integer(function, "attention_chunk", attention_chunk) != 0:
        raise UnsupportedError(f"{function}: attention_chunk is {attention_chunk}; caches have no chunks, so pass 0.")
    _refuse_numbers(function, 0, sm_margin)
    if cu_seqlens_k_new is not None and cu_seqlens_k_new is not cu_seqlens_q:
        raise UnsupportedError(
            f"{function}: cu_seqlens_k_new is another array than cu_seqlens_q; rows are appended for as many queries."
        )
    batch = q if cu_seqlens_q is None else cu_seqlens_q[1:]
    if page_table is None and cache_batch_idx is None:
        k_cache, v_cache = _common.first_caches(batch, k_cache, v_cache)
    window_size = window(window_size)
    if rotary_cos is not None:
        window_size = _common.without_far_sides(window_size, k_cache, page_table)
    found = attention_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=k,
        v=v,
        cache_seqlens=_common.lengths(cache_seqlens, batch, q),
        block_table=page_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        cu_seqlens_q=cu_seqlens_q,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        k_descale=k_descale,
        v_descale=v_descale,
        num_splits=num_splits,
        plan=scheduler_metadata,
        return_lse=return_softmax_lse,
    )
    return (*found, _common.nothing(found[0]), _common.nothing(found[1])) if return_softmax_lse else found


@unscriptable
def flash_attn_combine(
    out_partial: Array, lse_partial: Array, out: Array | None = None, out_dtype: Any = None
) -> tuple[Array, Array]:
    """FlashAttention-3's ``flash_attn_combine``: `cufa.merge_states`.

    Parameters
    ----------
    out_partial : array, (num_splits, batch_size, seqlen, nheads, headdim) or (num_splits, total_q, nheads, headdim)
    lse_partial : float32 array, (num_splits, batch_size, seqlen, nheads) or (num_splits, total_q, nheads)
    out : array, optional
        Written and returned.
    out_dtype : dtype, optional
        Of `out`; by default that of `out_partial`, and another one is supported for torch tensors only.

    Returns
    -------
    out : array, (batch_size, seqlen, nheads, headdim) or (total_q, nheads, headdim)
    lse : float32 array, (batch_size, seqlen, nheads) or (total_q, nheads)

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError
        As for `cufa.merge_states`.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.flash_attn import flash_attn_3
    >>> out, lse = flash_attn_3.flash_attn_combine(np.ones((3, 2, 9, 4, 64), "f"), np.ones((3, 2, 9, 4), "f"))
    >>> out.shape, lse.shape
    ((2, 9, 4, 64), (2, 9, 4))
    """
    function = "flash_attn_combine"
    if not hasattr(lse_partial, "swapaxes"):
        raise TypeError(f"{function}: lse_partial is a {type(lse_partial).__name__}; pass an array.")
    dtype = getattr(out_partial, "dtype", None)
    other = next((given for given in (out_dtype, getattr(out, "dtype", None)) if given not in (None, dtype)), None)
    if other is None:
        found, lse = merge_states(out_partial, _swapped(lse_partial), out=out)
        return found, _swapped(lse)
    if not _common.is_torch(out_partial):
        raise UnsupportedError(
            f"{function}: out_dtype is {other} but out_partial has {dtype}; for arrays that are no torch tensors they "
            "must be the same."
        )
    if out is not None and not _common.is_torch(out):
        raise TypeError(f"{function}: out is a {type(out).__name__} but out_partial is a torch tensor; pass another.")
    if not getattr(other, "is_floating_point", False):
        raise TypeError(f"{function}: out_dtype is {other!r}; pass a dtype of torch for floating point numbers.")
    if out is not None:
        if out_dtype not in (None, out.dtype):
            raise ArgumentError(f"{function}: out has dtype {out.dtype} but out_dtype is {out_dtype}.")
        if out.shape != out_partial.shape[1:] or out.device != out_partial.device:
            raise ArgumentError(
                f"{function}: out has shape {tuple(out.shape)} on {out.device}; {tuple(out_partial.shape[1:])} on "
                f"{out_partial.device} is expected."
            )
    found, lse = merge_states(out_partial, _swapped(lse_partial))
    return found.to(other) if out is None else out.copy_(found), _swapped(lse)


def _swapped(array: Array) -> Array:
    """lse with rows and heads in the other order."""
    return array.swapaxes(-1, -2)


def _attend(operation: Any, given: tuple[Any, ...], asked: tuple[Any, ...], attention_chunk: int) -> Any:
    size = _options.integer("flash_attn_func", "attention_chunk", attention_chunk)
    if size == 0:
        return call(operation, given, asked)
    from ..masks import chunked

    return call_featured(operation, given, asked, None, None, None, chunked(size), 0.0, None)


def _heads(function: str, total: int, num_heads_q: int | None) -> tuple[int, int]:
    if num_heads_q is not None:
        num_heads_q = _options.integer(function, "num_heads_q", num_heads_q)
    if num_heads_q is None or (total - num_heads_q) % 2 or not 0 < num_heads_q < total:
        raise ArgumentError(
            f"{function}: num_heads_q is {num_heads_q} but qkv has {total} heads; those of q, and twice those of k, "
            "are expected."
        )
    return num_heads_q, (total - num_heads_q) // 2


def _refuse(function: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise UnsupportedError(f"{function}: {name} is not supported; leave it out.")


def _refuse_numbers(function: str, num_splits: int, sm_margin: int) -> None:
    if _options.integer(function, "num_splits", num_splits) not in (0, 1):
        raise UnsupportedError(f"{function}: num_splits is {num_splits}; how keys are divided is cufa's to decide.")
    if _options.integer(function, "sm_margin", sm_margin) != 0:
        raise UnsupportedError(f"{function}: sm_margin is {sm_margin}; cufa leaves no SMs to others, so pass 0.")


@cache
def _torch() -> Any:
    from . import _torch

    return _torch

"""The functions of flash_attn 2.8, computed by cufa."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from .._api.features import call_featured
from .._api.kvcache import attention_with_kvcache
from .._call import options as _options
from .._call.arrays import unscriptable
from .._operations.call import call
from .._operations.forward import ATTENTION, ATTENTION_VARLEN
from .._terms.dropout import plain_rate
from ..errors import UnsupportedError
from . import _common
from ._common import Array, window

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

STATES = {f"_flash_attn_{kind}{way}" for kind in ("", "varlen_") for way in ("forward", "backward")}
"""Functions with an underscore that programs call, for torch alone; ``_wrapped`` before it makes no difference here."""


def __getattr__(name: str) -> Any:
    home = name.removeprefix("_wrapped")
    if home not in STATES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _states

    return getattr(_states, home)


@unscriptable
def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn's ``flash_attn_func``: `cufa.attention` with flash_attn's arguments.

    Parameters
    ----------
    q : array, (batch_size, seqlen, nheads, headdim)
        Whatever `cufa.attention` takes.
    k, v : array, (batch_size, seqlen, nheads_k, headdim)
        nheads is a multiple of nheads_k; v may have another headdim.
    dropout_p : float
        Probabilities are dropped with this probability, of torch tensors only. What is dropped follows from torch's
        default generator of the tensors' device, as `torch.manual_seed` sets it.
    softmax_scale : float, optional
        Default ``headdim ** -0.5``.
    causal : bool
        The last query sees the last key: query i sees key j if ``j <= i + seqlen_k - seqlen_q``.
    window_size : (int, int)
        Keys that a query sees to the left and to the right of its position; a negative side, or None, is unbounded.
    softcap : float
        Scores become ``softcap * tanh(scores / softcap)``; 0.0 is off. It may be combined with dropout.
    alibi_slopes : float32 array, (nheads,) or (batch_size, nheads), optional
        ``slope * |i + seqlen_k - seqlen_q - j|`` is subtracted from scores.
    deterministic : bool
        Gradients, where torch or JAX computes them, are the same bits in every run.
    return_attn_probs : bool
        Return softmax_lse and S_dmask too.

    Returns
    -------
    out : array, (batch_size, seqlen, nheads, headdim)
        Rows that see no key are 0.
    softmax_lse : float32 array, (batch_size, nheads, seqlen)
        Only with `return_attn_probs`: the natural logarithm of the sum of exponentials of a row's scores, +inf for a
        row that sees no key. It has a gradient.
    S_dmask : array, (batch_size, nheads, seqlen_q, seqlen_k)
        Only with `return_attn_probs`: with dropout the probabilities before it, negative where they are dropped, for
        which memory of that size is taken; without, an array without elements, as in flash_attn. It has no gradient.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `cufa.attention`; `UnsupportedError` also for `dropout_p` of arrays that are no torch tensors, and in the
        capture of a CUDA graph, which would drop the same at every replay.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.flash_attn import flash_attn_func
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 128, 4, 64), dtype=np.float32)
    >>> out, softmax_lse, _ = flash_attn_func(q, k, v, causal=True, window_size=(32, 0), return_attn_probs=True)
    >>> out.shape, softmax_lse.shape
    ((2, 128, 4, 64), (2, 4, 128))
    """
    asked = causal, window(window_size), softmax_scale, softcap, return_attn_probs, deterministic
    if dropout_p == 0.0 and return_attn_probs is False:
        return call(ATTENTION, (q, k, v, alibi_slopes, None, None), asked)
    return _attend(ATTENTION, (q, k, v), (), alibi_slopes, asked, dropout_p)


@unscriptable
def flash_attn_kvpacked_func(
    q: Array,
    kv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of keys and values in one array, which is not copied, and whose gradient is one array too.

    Parameters
    ----------
    q : array, (batch_size, seqlen, nheads, headdim)
    kv : array, (batch_size, seqlen, 2, nheads_k, headdim)
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_func`.

    Returns
    -------
    out, softmax_lse, S_dmask : array
        As `flash_attn_func` gives them.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `flash_attn_func`.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.flash_attn import flash_attn_kvpacked_func
    >>> rng = np.random.default_rng(0)
    >>> q, kv = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 9, 4, 64), (2, 128, 2, 1, 64)))
    >>> flash_attn_kvpacked_func(q, kv).shape
    (2, 9, 4, 64)
    """
    _common.check_packed("flash_attn_kvpacked_func", "kv", kv, 5, 2)
    asked = causal, window(window_size), softmax_scale, softcap, return_attn_probs, deterministic
    return _attend_packed(ATTENTION, q, kv, (), alibi_slopes, asked, dropout_p)


@unscriptable
def flash_attn_qkvpacked_func(
    qkv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of queries, keys and values in one array.

    It is not copied, and its gradient is one array too, into which those of q, k and v are written.

    Parameters
    ----------
    qkv : array, (batch_size, seqlen, 3, nheads, headdim)
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_func`.

    Returns
    -------
    out, softmax_lse, S_dmask : array
        As `flash_attn_func` gives them.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `flash_attn_func`.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.flash_attn import flash_attn_qkvpacked_func
    >>> qkv = np.random.default_rng(0).standard_normal((2, 128, 3, 4, 64), dtype=np.float32)
    >>> flash_attn_qkvpacked_func(qkv, causal=True).shape
    (2, 128, 4, 64)
    """
    _common.check_packed("flash_attn_qkvpacked_func", "qkv", qkv, 5, 3)
    asked = causal, window(window_size), softmax_scale, softcap, return_attn_probs, deterministic
    return _attend_packed(ATTENTION, None, qkv, (), alibi_slopes, asked, dropout_p)


@unscriptable
def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Array | None = None,
) -> Any:
    """flash_attn's ``flash_attn_varlen_func``: `cufa.attention_varlen` with flash_attn's arguments.

    Parameters
    ----------
    q : array, (total_q, nheads, headdim)
    k, v : array, (total_k, nheads_k, headdim), or with `block_table` (num_blocks, page_block_size, nheads_k, headdim)
    cu_seqlens_q, cu_seqlens_k : int32 array, (batch_size + 1,)
        Sequence b is rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``; with `block_table` cu_seqlens_k says how many
        keys it has.
    max_seqlen_q, max_seqlen_k : int
        The longest lengths. They are not needed, and never read: kernels find lengths in the offsets.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_func`, within each sequence.
    block_table : int32 array, (batch_size, max_num_blocks_per_seq), optional
        Makes k and v pages, of any size, as `cufa.attention_with_kvcache` has them; without dropout and gradients.

    Returns
    -------
    out : array, (total_q, nheads, headdim)
    softmax_lse : float32 array, (nheads, total_q)
        Only with `return_attn_probs`, as for `flash_attn_func`.
    S_dmask : array
        Only with `return_attn_probs`, and without elements.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `flash_attn_func`; `UnsupportedError` also for `return_attn_probs` together with `dropout_p`, and for
        what `block_table` excludes.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.flash_attn import flash_attn_varlen_func
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 12, 4, 32), dtype=np.float32)
    >>> offsets = np.array([0, 5, 12], np.int32)  # sequences of 5 and 7 tokens
    >>> flash_attn_varlen_func(q, k, v, offsets, offsets, 7, 7, causal=True).shape
    (12, 4, 32)
    """
    asked = causal, window(window_size), softmax_scale, softcap, return_attn_probs, deterministic
    if block_table is not None:
        return _attend_pages(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, asked, dropout_p, block_table)
    if dropout_p == 0.0 and return_attn_probs is False:
        return call(ATTENTION_VARLEN, (q, k, v, alibi_slopes, None, None, cu_seqlens_q, cu_seqlens_k, None), asked)
    return _attend(ATTENTION_VARLEN, (q, k, v), (cu_seqlens_q, cu_seqlens_k, None), alibi_slopes, asked, dropout_p)


@unscriptable
def flash_attn_varlen_kvpacked_func(
    q: Array,
    kv: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of keys and values in one array, which is not copied, and whose gradient is one, too.

    Parameters
    ----------
    q : array, (total_q, nheads, headdim)
    kv : array, (total_k, 2, nheads_k, headdim)
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As for `flash_attn_varlen_func`.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_func`, within each sequence.

    Returns
    -------
    out, softmax_lse, S_dmask : array
        As `flash_attn_varlen_func` gives them.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `flash_attn_varlen_func`.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.flash_attn import flash_attn_varlen_kvpacked_func
    >>> rng = np.random.default_rng(0)
    >>> q, kv = (rng.standard_normal(shape, dtype=np.float32) for shape in ((12, 4, 32), (12, 2, 1, 32)))
    >>> offsets = np.array([0, 5, 12], np.int32)
    >>> flash_attn_varlen_kvpacked_func(q, kv, offsets, offsets, 7, 7).shape
    (12, 4, 32)
    """
    _common.check_packed("flash_attn_varlen_kvpacked_func", "kv", kv, 4, 2)
    asked = causal, window(window_size), softmax_scale, softcap, return_attn_probs, deterministic
    offsets = cu_seqlens_q, cu_seqlens_k, None
    return _attend_packed(ATTENTION_VARLEN, q, kv, offsets, alibi_slopes, asked, dropout_p)


@unscriptable
def flash_attn_varlen_qkvpacked_func(
    qkv: Array,
    cu_seqlens: Array,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of queries, keys and values in one array, which is not copied; so is its gradient.

    Parameters
    ----------
    qkv : array, (total, 3, nheads, headdim)
    cu_seqlens : int32 array, (batch_size + 1,)
    max_seqlen : int
        As for `flash_attn_varlen_func`.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_func`, within each sequence.

    Returns
    -------
    out, softmax_lse, S_dmask : array
        As `flash_attn_varlen_func` gives them.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `flash_attn_varlen_func`.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.flash_attn import flash_attn_varlen_qkvpacked_func
    >>> qkv = np.random.default_rng(0).standard_normal((12, 3, 4, 32), dtype=np.float32)
    >>> flash_attn_varlen_qkvpacked_func(qkv, np.array([0, 5, 12], np.int32), 7, causal=True).shape
    (12, 4, 32)
    """
    _common.check_packed("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4, 3)
    asked = causal, window(window_size), softmax_scale, softcap, return_attn_probs, deterministic
    return _attend_packed(ATTENTION_VARLEN, None, qkv, (cu_seqlens, cu_seqlens, None), alibi_slopes, asked, dropout_p)


@unscriptable
def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: Array | int | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """flash_attn's ``flash_attn_with_kvcache``: `cufa.attention_with_kvcache` with flash_attn's arguments.

    Parameters
    ----------
    q : array, (batch_size, seqlen, nheads, headdim)
        As `cufa.attention_with_kvcache` takes it: neither JAX arrays nor, unless under ``torch.no_grad()``, tensors
        that require grad, since there are no gradients.
    k_cache, v_cache : array, (batch_size_cache, seqlen_cache, nheads_k, headdim)
        Or, with `block_table`, (num_blocks, page_block_size, nheads_k, headdim), with pages of any size. Without
        `block_table` and `cache_batch_idx` sequence b has cache b, and there may be more caches than sequences.
    k, v : array, (batch_size, seqlen_new, nheads_k, headdim), optional
        Written into the caches, behind `cache_seqlens`, before anything is read.
    rotary_cos, rotary_sin : array, (seqlen_ro, rotary_dim / 2), optional
        Rotary embedding of k, for positions from `cache_seqlens` on, and of q: for the same positions if `causal` or in
        a window, else all for position `cache_seqlens`.
    cache_seqlens : int or int32 array, (batch_size,), optional
        Keys in each cache, without new ones.
    cache_batch_idx : int32 array, (batch_size,), optional
        The cache of each sequence.
    cache_leftpad : int32 array, (batch_size,), optional
        The first row of each cache that is a key.
    block_table : int32 array, (batch_size, max_num_blocks_per_seq), optional
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As for `flash_attn_func`.
    rotary_interleaved : bool
        Rotate pairs of columns ``(2i, 2i + 1)``; else ``(i, i + rotary_dim / 2)``.
    num_splits : int
        Parts into which keys are divided, at most 256; 0 is as many as there are best.
    return_softmax_lse : bool
        Return softmax_lse too.

    Returns
    -------
    out : array, (batch_size, seqlen, nheads, headdim)
    softmax_lse : float32 array, (batch_size, nheads, seqlen)
        Only with `return_softmax_lse`; +inf for a row that sees no key.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError
        As for `cufa.attention_with_kvcache`.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.flash_attn import flash_attn_with_kvcache
    >>> rng = np.random.default_rng(0)
    >>> k_cache, v_cache = np.zeros((2, 3, 16, 2, 64), np.float32)
    >>> q, k, v = (rng.standard_normal((3, 1, heads, 64), dtype=np.float32) for heads in (8, 2, 2))
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=4, causal=True).shape
    (3, 1, 8, 64)
    >>> bool((k_cache[:, 4] == k[:, 0]).all())
    True
    """
    if block_table is None and cache_batch_idx is None:
        k_cache, v_cache = _common.first_caches(q, k_cache, v_cache)
    window_size = window(window_size)
    if rotary_cos is not None:
        window_size = _common.without_far_sides(window_size, k_cache, block_table)
    found = attention_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=k,
        v=v,
        cache_seqlens=_common.lengths(cache_seqlens, q, k_cache),
        block_table=block_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        return_lse=return_softmax_lse,
    )
    return (found[0], _without_keys(found[1])) if return_softmax_lse else found


def _attend(
    operation: Any,
    qkv: tuple[Array, Array, Array],
    offsets: tuple[Array, ...],
    alibi_slopes: Array | None,
    asked: tuple[Any, ...],
    dropout_p: float,
) -> Any:
    """What is no plain call: with dropout, or with lse."""
    if dropout_p != 0.0 and _common.compiling(qkv[0]):
        return _common.outside("dropout", _attend, operation, qkv, offsets, alibi_slopes, asked, dropout_p)
    with_probs = asked[4]
    dropout_p, seed = _dropout(operation, qkv[0], dropout_p, bool(offsets) and with_probs)
    given = *qkv, alibi_slopes, None, None, *offsets
    found = call_featured(operation, given, asked, None, None, None, None, dropout_p, seed)
    return _with_probs(found, qkv, offsets, alibi_slopes, asked, dropout_p, seed) if with_probs else found


def _attend_packed(
    operation: Any,
    q: Array | None,
    packed: Array,
    offsets: tuple[Array, ...],
    alibi_slopes: Array | None,
    asked: tuple[Any, ...],
    dropout_p: float,
) -> Any:
    """`_attend` of k and v, and of q unless it is given, that lie side by side in one array."""
    if not _common.records(packed, q, alibi_slopes):
        parts = _common.parts(packed)
        return _attend(operation, parts if q is None else (q, *parts), offsets, alibi_slopes, asked, dropout_p)
    # As plain values: no backward is to meet what is none, and torch sees only tensors that are arguments themselves.
    asked = _options.of(operation.name, asked)[:-2]
    with_probs = asked[4]
    dropout_p, seed = _dropout(operation, packed, dropout_p, bool(offsets) and with_probs)
    out, lse = _torch().Packed.apply(q, packed, offsets, alibi_slopes, asked, (dropout_p, seed), None)
    if not with_probs:
        return out
    parts = _common.parts(packed.detach())
    qkv = parts if q is None else (q.detach(), *parts)
    return _with_probs((out, lse), qkv, offsets, alibi_slopes, asked, dropout_p, seed)


def _with_probs(
    found: tuple[Array, Array],
    qkv: tuple[Array, Array, Array],
    offsets: tuple[Array, ...],
    alibi_slopes: Array | None,
    asked: tuple[Any, ...],
    dropout_p: float,
    seed: int | None,
) -> tuple[Array, Array, Array]:
    """out, and lse and S_dmask as flash_attn has them."""
    out, lse = found
    if seed is None:
        return out, _without_keys(lse), _common.nothing(out)
    return out, _without_keys(lse), _torch().signed_probabilities(*qkv, alibi_slopes, asked, dropout_p, seed)


def _attend_pages(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    alibi_slopes: Array | None,
    asked: tuple[Any, ...],
    dropout_p: float,
    block_table: Array,
) -> Any:
    if dropout_p != 0.0:
        raise UnsupportedError(
            "flash_attn_varlen_func: dropout_p is given together with block_table; keys in pages are served without "
            "dropout."
        )
    causal, window_size, softmax_scale, softcap, return_lse, deterministic = asked
    _options.flag("flash_attn_varlen_func", "deterministic", deterministic)  # of no gradients
    if not hasattr(cu_seqlens_k, "dtype"):
        raise TypeError(f"flash_attn_varlen_func: cu_seqlens_k is a {type(cu_seqlens_k).__name__}; pass an array.")
    found = attention_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=cu_seqlens_k[1:] - cu_seqlens_k[:-1],
        block_table=block_table,
        cu_seqlens_q=cu_seqlens_q,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_lse,
    )
    return (found[0], _without_keys(found[1]), _common.nothing(found[0])) if return_lse else found


def _dropout(operation: Any, array: Array, dropout_p: float, refused: bool) -> tuple[float, int | None]:
    """The rate, and a seed if it is not 0; `refused` is whether S_dmask of packed sequences is asked for."""
    if dropout_p == 0.0:
        return 0.0, None
    rate = plain_rate(operation.name, dropout_p)  # before a seed is drawn
    function = "flash_attn"
    if refused:
        raise UnsupportedError(
            f"{function}: return_attn_probs is given together with dropout_p, and the probabilities of packed "
            "sequences are not made; call it without one of them, or flash_attn_func for each sequence."
        )
    if not _common.is_torch(array):
        raise UnsupportedError(
            f"{function}: dropout_p is given, and only torch has a default generator for the seed; call cufa.attention "
            "or cufa.attention_varlen with dropout_p and seed."
        )
    return rate, _torch().next_seed(array)


def _without_keys(lse: Array) -> Array:
    """lse with +inf for rows that see no key, as flash_attn 2 has it, where cufa has -inf."""
    return _common.replaced(lse, -float("inf"), float("inf"))


@cache
def _torch() -> Any:
    from . import _torch

    return _torch

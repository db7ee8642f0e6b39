"""flash_attn's functions as transformers calls them: those of `cufa.flash_attn`, which take sinks besides.

transformers passes on what it finds in signatures, and leaves sinks out of calls of functions that have no ``s_aux``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import flash_attn as _flash
from .._api.attention import Array, attention, attention_varlen
from .._api.kvcache import attention_with_kvcache
from ..errors import UnsupportedError
from .attention import Options, check_deterministic


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
    s_aux: Array | None = None,
) -> Any:
    """`cufa.flash_attn.flash_attn_func` with ``s_aux``, the sinks of heads."""
    if s_aux is None:
        asked = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        return _flash.flash_attn_func(q, k, v, *asked)
    options = _options(q, softmax_scale, softcap, s_aux, dropout_p, deterministic, return_attn_probs)
    return attention(q, k, v, causal=causal, window_size=window_size, alibi_slopes=alibi_slopes, **options)


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
    s_aux: Array | None = None,
) -> Any:
    """`cufa.flash_attn.flash_attn_varlen_func` with ``s_aux``, the sinks of heads."""
    offsets = cu_seqlens_q, cu_seqlens_k
    if s_aux is None:
        asked = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        return _flash.flash_attn_varlen_func(q, k, v, *offsets, max_seqlen_q, max_seqlen_k, *asked, block_table)
    if block_table is not None:
        raise UnsupportedError("flash_attn_varlen_func: s_aux is not served beside block_table; leave one out.")
    options = _options(q, softmax_scale, softcap, s_aux, dropout_p, deterministic, return_attn_probs)
    more = {"causal": causal, "window_size": window_size, "alibi_slopes": alibi_slopes}
    return attention_varlen(q, k, v, *offsets, **more, **options)


def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    cache_seqlens: Array | int | None = None,
    block_table: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: Array | None = None,
) -> Any:
    """What transformers passes of `cufa.flash_attn.flash_attn_with_kvcache`, with ``s_aux``, the sinks of heads."""
    more: dict[str, Any] = {"k": k, "v": v, "cache_seqlens": cache_seqlens, "block_table": block_table}
    more |= {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
    if s_aux is None:
        return _flash.flash_attn_with_kvcache(q, k_cache, v_cache, **more)
    return attention_with_kvcache(q, k_cache, v_cache, sinks=s_aux.float(), **more)


def _options(
    q: Array,
    softmax_scale: float | None,
    softcap: float,
    s_aux: Any,
    dropout_p: float,
    deterministic: bool,
    probs: bool,
) -> dict[str, Any]:
    """The arguments of cufa's functions where there are sinks."""
    if probs:
        raise UnsupportedError("cufa.transformers: return_attn_probs is not served beside s_aux; leave one out.")
    check_deterministic(deterministic)
    return Options(softmax_scale, softcap, s_aux.float(), dropout_p).all(q)

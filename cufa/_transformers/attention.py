"""The attention function of ``attn_implementation="cufa"``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .._api.attention import attention, attention_varlen
from .._api.kvcache import attention_with_kvcache
from ..errors import UnsupportedError
from .masks import PendingMask, pending_of

Tensor = Any

OF_THE_MODEL = frozenset(
    (
        *("cache", "cache_position", "past_key_values", "use_cache", "position_ids", "position_embeddings", "seq_idx"),
        *("input_ids", "inputs_embeds", "token_type_ids", "mm_token_type_ids", "labels", "num_items_in_batch"),
        *("output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "interpolate_pos_encoding"),
        *("encoder_hidden_states", "encoder_attention_mask", "layer_idx", "is_first_iteration"),
        *("max_length_q", "max_length_k", "target_dtype", "kernel_options"),
    )
)
"""Arguments of models that reach the attention function and say nothing of attention, or nothing that it has to know.

``position_ids`` are in the mask already, and lengths of packed sequences in their offsets.
"""


class Options(NamedTuple):
    """What all of cufa's functions take here."""

    softmax_scale: float | None
    softcap: float
    sinks: Tensor | None
    dropout_p: float

    def common(self) -> dict[str, Any]:
        return {"softmax_scale": self.softmax_scale, "softcap": self.softcap, "sinks": self.sinks}

    def all(self, like: Tensor) -> dict[str, Any]:
        """With dropout, whose seed is drawn where an array lies, so that nothing waits and graphs draw anew."""
        if self.dropout_p == 0.0:
            return self.common()
        seed = torch.randint(2**62, (), dtype=torch.int64, device=like.device)
        return self.common() | {"dropout_p": self.dropout_p, "seed": seed}


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    deterministic: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as layers of transformers' models call it.

    Parameters
    ----------
    module : torch.nn.Module
        Of which ``is_causal`` is read where the argument is None; True if it has none.
    query : tensor, (batch, num_heads_q, seqlen_q, head_dim)
        Or of batch 1 beside more keys, where all have the same queries.
    key, value : tensor, (batch, num_heads_k, seqlen_k, head_dim or head_dim_v)
    attention_mask : tensor or None
        Of `cufa._transformers.masks.attention_mask`, or any other: booleans of four axes, True for what is seen;
        floats of four axes that are added to scores; or (batch, seqlen_k), what of the keys is no padding, beside
        `is_causal` and `sliding_window`. Under a mask of four axes these two say nothing: the mask holds them.
    dropout, scaling, softcap, s_aux
        `dropout_p`, `softmax_scale`, `softcap` and `sinks` of `cufa.attention`.
    is_causal : bool, optional
    sliding_window : int, optional
        Keys that a query sees on either side, its own included.
    position_bias : tensor, (1 or batch, num_heads_q, seqlen_q, seqlen_k), optional
        Added to scores.
    cu_seq_lens_q, cu_seq_lens_k : int tensor, (sequences + 1,), optional
        Offsets of sequences that are packed into one.
    deterministic : bool, optional
        Whether gradients are to be the same bits in every run, which torch has to be told.
    **kwargs
        Arguments of models that do not concern attention, and those that are refused.

    Returns
    -------
    out : tensor, (batch, seqlen_q, num_heads_q, head_dim_v)
    None
        In the place of probabilities, which are not kept.

    Raises
    ------
    UnsupportedError
        For what is not served; the message names the argument.
    """
    for name, given in kwargs.items():
        if name not in OF_THE_MODEL and given is not None and given is not False:
            _refuse(name)
    check_deterministic(deterministic)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if query.shape[0] == 1 < key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)
    sinks = None if s_aux is None else s_aux.to(torch.float32)
    options = Options(scaling, 0.0 if softcap is None else softcap, sinks, dropout)
    arrays = tuple(each.transpose(1, 2) for each in (query, key, value))
    window = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        out = _packed(arrays, attention_mask, position_bias, cu_seq_lens_q, cu_seq_lens_k, causal, window, options)
    elif attention_mask is None and position_bias is None and dropout == 0.0:
        out = attention(*arrays, causal=causal, window_size=window, **options.common())
    elif not torch.compiler.is_compiling():
        out = _masked(arrays, attention_mask, position_bias, causal, window, options)
    elif isinstance(attention_mask, PendingMask):
        out = _outside(arrays, attention_mask, position_bias, causal, window, options)
    else:
        out = _by_arrays(arrays, attention_mask, position_bias, causal, window, options)
    return out, None


_REASONS = {
    "output_attentions": 'probabilities are never kept; take attn_implementation="eager" for them',
    "head_mask": 'probabilities are never kept, to be multiplied by it; take attn_implementation="eager"',
    "block_table": 'pages are served under the name "cufa/flash-attn2", as continuous batching wants them',
}
for _name in ("layer_head_mask", "cross_attn_head_mask"):
    _REASONS[_name] = _REASONS["head_mask"]
for _name in ("k_cache", "v_cache", "read_index", "write_index"):
    _REASONS[_name] = _REASONS["block_table"]
for _name in ("indices", "block_indices"):
    _REASONS[_name] = 'keys that are chosen for each query are not served; take attn_implementation="sdpa"'


def check_deterministic(asked: bool | None) -> None:
    """Refuse to promise what torch is not set to."""
    if asked and not torch.are_deterministic_algorithms_enabled():
        raise UnsupportedError(
            "cufa.transformers: deterministic gradients are asked for; call torch.use_deterministic_algorithms(True), "
            "which cufa follows."
        )


def _refuse(name: str) -> None:
    reason = _REASONS.get(name, "it is not known whether it concerns attention, so it is not left out silently")
    raise UnsupportedError(f"cufa.transformers: the argument {name} is not served: {reason}.")


def _packed(
    arrays: tuple[Tensor, ...],
    mask: Tensor | None,
    position_bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: Any,
    options: Options,
) -> Tensor:
    """Of sequences whose offsets the caller has."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError("cufa.transformers: of cu_seq_lens_q and cu_seq_lens_k one is missing.")
    if position_bias is not None:
        raise UnsupportedError("cufa.transformers: position_bias is not served beside cu_seq_lens_q.")
    pending = pending_of(mask)
    if pending is not None and pending.covers(arrays[1].shape[1]):
        # No padding: what is left is a window, and the same sequences, if positions told of them too.
        causal, window = pending.pattern.causal, pending.pattern.window
    elif mask is not None:
        raise ValueError(
            "cufa.transformers: cu_seq_lens_q says what of the keys is whose, and so does attention_mask; pass one."
        )
    offsets = cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32)
    return _varlen(arrays, offsets, {"causal": causal, "window_size": window}, options)


def _varlen(arrays: tuple[Tensor, ...], offsets: tuple[Tensor, ...], more: dict[str, Any], options: Options) -> Tensor:
    """Of dense arrays, of which all rows lie behind each other."""
    q, k, v = (each.reshape(-1, *each.shape[2:]) for each in arrays)
    out = attention_varlen(q, k, v, *offsets, **more, **options.all(q))
    return out.reshape(*arrays[0].shape[:-1], v.shape[-1])


def _masked(
    arrays: tuple[Tensor, ...],
    mask: Tensor | None,
    position_bias: Tensor | None,
    causal: bool,
    window: Any,
    options: Options,
) -> Tensor:
    """With a mask, a bias or dropout."""
    pending = pending_of(mask)
    if pending is not None:
        out = _by_lengths(arrays, pending, options) if position_bias is None else None
        if out is not None:
            return out
        mask = pending.dense
    return _by_arrays(arrays, mask, position_bias, causal, window, options)


_outside = torch.compiler.disable(_masked)
"""The same, which breaks the graph of torch.compile: what of a mask is pending cannot be part of it."""


def _by_arrays(
    arrays: tuple[Tensor, ...],
    mask: Tensor | None,
    position_bias: Tensor | None,
    causal: bool,
    window: Any,
    options: Options,
) -> Tensor:
    """With a mask that is an ordinary tensor, or none."""
    q = arrays[0]
    asked: dict[str, Any] = {}
    if mask is None:
        asked = {"causal": causal, "window_size": window}
    elif mask.ndim == 2:
        asked = {"causal": causal, "window_size": window, "mask": mask.to(torch.bool)[:, None, None, :]}
    elif mask.ndim != 4:
        raise ValueError(
            f"cufa.transformers: attention_mask has {mask.ndim} axes; pass (batch, seqlen_k), or four axes of which "
            "seqlen_q and seqlen_k are the last."
        )
    elif mask.dtype == torch.bool:
        asked["mask"] = mask
    elif mask.is_floating_point():
        asked["bias"] = mask
    else:
        raise TypeError(f"cufa.transformers: attention_mask is of {mask.dtype}; pass booleans, or floats to be added.")
    if position_bias is not None:
        asked["bias"] = position_bias if "bias" not in asked else position_bias + asked["bias"]
    if "bias" in asked and asked["bias"].dtype not in (q.dtype, torch.float32):
        asked["bias"] = asked["bias"].to(torch.promote_types(q.dtype, torch.float32))
    return attention(*arrays, **asked, **options.all(q))


def _recorded(tensors: list[Tensor]) -> bool:
    """Whether autograd is to differentiate by one of them."""
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def _is_within(batch: Any, head: Any, query: Any, key: Any, first: Any, last: Any) -> Any:
    return (first[batch] <= key) & (key < last[batch])


def _by_lengths(arrays: tuple[Tensor, ...], mask: PendingMask, options: Options) -> Tensor | None:
    """Without an array of booleans; None if there is no other way.

    A past without padding is a slice of the keys, and what is within lengths a mask function. Otherwise caches serve
    where nothing is differentiated: they know lengths and padding on the left, and copy nothing, whatever strides keys
    have. Packed sequences serve the rest.
    """
    q, k, v = arrays
    asked: dict[str, Any] = {"causal": mask.pattern.causal, "window_size": mask.pattern.window}
    if mask.within is not None:
        assert isinstance(mask.end, int)
        asked["mask"] = (_is_within, *mask.within)
        return attention(q, k[:, : mask.end], v[:, : mask.end], **asked, **options.all(q))
    if mask.offsets is None:
        if mask.start is None and isinstance(mask.end, int):
            return attention(q, k[:, : mask.end], v[:, : mask.end], **asked, **options.all(q))
        given = [each for each in (*arrays, options.sinks) if each is not None]
        aligned = mask.pattern.window is None or mask.pattern.causal
        if aligned and not _recorded(given) and options.dropout_p == 0.0:
            if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
                q, k, v = (each.to(torch.get_autocast_dtype(q.device.type)) for each in arrays)
            return attention_with_kvcache(
                q, k, v, cache_seqlens=mask.ends, cache_leftpad=mask.start, **asked, **options.common()
            )
    segments = mask.segments
    if segments is None:
        return None
    asked["seqused_k"] = segments.seqused_k
    return _varlen(arrays, segments[:2], asked, options)

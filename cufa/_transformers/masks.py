"""The mask function of ``attn_implementation="cufa"``: what of a mask is a length, an offset or a window.

Models ask for a mask once per forward, and hand it to every layer. None stands for what the attention function knows by
itself. What else is lengths, offsets and windows becomes a `PendingMask`: all layers share its few integers, and its
booleans are computed only for those that look at them. The rest is an array of booleans, as for ``"sdpa"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from transformers import masking_utils as _utils
from transformers.utils.import_utils import is_tracing

Tensor = Any
MaskFunction = Callable[..., Any]


class Pattern(NamedTuple):
    """What a mask function of transformers shows a query, its padding aside.

    Attributes
    ----------
    left, right : int or None
        Keys before and behind its own position; None is unbounded. Causal masks have 0 on the right.
    chunk : int or None
        Keys of its own chunk of so many positions.
    sequences : int tensor, (batch, seqlen), or None
        Keys of its own sequence, by its number.
    """

    left: int | None = None
    right: int | None = None
    chunk: int | None = None
    sequences: Tensor | None = None

    def __and__(self, other: Pattern) -> Pattern:
        return Pattern(*(_both(mine, its) for mine, its in zip(self, other, strict=True)))

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def window(self) -> tuple[int | None, int | None] | None:
        return None if self.left is None and self.right is None else (self.left, self.right)


def _both(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    if one is other:
        return one
    return min(one, other)


_COMPOSED = {
    "and_masks": (_utils.causal_mask_function,),
    "sliding_window_overlay": (1,),
    "sliding_window_bidirectional_overlay": (1,),
    "chunked_overlay": (1, torch.zeros(1)),
    "packed_sequence_mask_function": (torch.zeros(1),),
    "remap_positions_for_packed_sequence": (_utils.causal_mask_function, torch.zeros(1)),  # from 5.23 on
}
"""Functions that transformers composes masks by, with arguments to call them by."""

_KINDS = {
    getattr(_utils, name)(*arguments).__code__: name for name, arguments in _COMPOSED.items() if hasattr(_utils, name)
}
"""By their code the closures are known that these return; what they close over says the rest."""


def _kind(function: MaskFunction) -> str | None:
    return _KINDS.get(getattr(function, "__code__", None))


def _parts(function: MaskFunction) -> Iterator[MaskFunction]:
    if _kind(function) == "and_masks":
        for part in _held(function, "mask_functions"):
            yield from _parts(part)
    else:
        yield function


def _held(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def pattern_of(function: MaskFunction) -> Pattern | None:
    """What a mask function shows; None for those that are not composed of transformers' own alone."""
    found = Pattern()
    for part in _parts(function):
        kind = _kind(part)
        if part is _utils.causal_mask_function:
            found &= Pattern(right=0)
        elif part is _utils.bidirectional_mask_function:
            continue
        elif kind == "sliding_window_overlay":
            found &= Pattern(left=_held(part, "sliding_window") - 1)
        elif kind == "sliding_window_bidirectional_overlay":
            found &= Pattern(*[_held(part, "sliding_window")] * 2)
        elif kind == "chunked_overlay":
            found &= Pattern(chunk=_held(part, "chunk_size"))
        elif kind == "remap_positions_for_packed_sequence":
            # Positions follow each other within a sequence, so that distances are the same.
            inner = pattern_of(_held(part, "mask_function"))
            if inner is None or inner.chunk is not None:
                return None
            found &= inner
        elif kind == "packed_sequence_mask_function":
            found &= Pattern(sequences=_held(part, "packed_sequence_mask"))
        else:
            return None
    return found


class Segments(NamedTuple):
    """Sequences of `cufa.attention_varlen`, by which padding is no sequence's keys."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor | None


class PendingMask(torch.Tensor):  # type: ignore[misc, unused-ignore]
    """A boolean mask (batch, 1, seqlen_q, seqlen_k) that is not computed before something looks at it.

    torch sees a tensor of this shape. Every operation on it, but those that ask for its shape and the like, is told of
    the booleans instead, which are computed then. cufa's attention function only reads the attributes.

    Attributes
    ----------
    pattern : Pattern
        The window, within [start, end).
    start : int32 tensor, (batch,), or None
        The first key that is no padding; None if there is no padding before the keys.
    end : int or int32 tensor, (batch,)
        The key behind the last one. Where there is a window, the last query is at the last key.
    offsets : int32 tensor, (sequences + 1,), or None
        Where sequences begin that are packed into the rows of all batch entries.
    within : (int32 tensor, int32 tensor), each (batch,), or None
        The first key that is no padding and the key behind the last one, where the last query is at neither's end.
    """

    pattern: Pattern
    start: Tensor | None
    end: int | Tensor
    offsets: Tensor | None
    within: tuple[Tensor, Tensor] | None
    _compute: Callable[[], Tensor]

    @staticmethod
    def of(
        shape: tuple[int, ...],
        device: Any,
        compute: Callable[[], Tensor],
        pattern: Pattern,
        end: int | Tensor,
        start: Tensor | None = None,
        offsets: Tensor | None = None,
        within: tuple[Tensor, Tensor] | None = None,
    ) -> PendingMask:
        one = torch.empty((1, 1, 1, 1), dtype=torch.bool, device=device)
        made: PendingMask = torch.Tensor._make_subclass(PendingMask, one.expand(shape))
        made.pattern, made.start, made.end, made.offsets, made.within = pattern, start, end, offsets, within
        made._compute = compute
        return made

    def covers(self, keys: int) -> bool:
        """Whether none of so many keys is padding, or not there yet."""
        return self.start is None and self.within is None and isinstance(self.end, int) and self.end == keys

    @cached_property
    def dense(self) -> Tensor:
        return self._compute()

    @cached_property
    def segments(self) -> Segments | None:
        """The sequences that the mask consists of; None if queries do not lie as keys do and a window asks where."""
        batch, _, rows, keys = _shape(self)
        if self.offsets is not None:
            return Segments(self.offsets, self.offsets, None)
        if self.pattern.window is not None and rows != keys:
            return None
        ends = self.ends
        starts = torch.zeros_like(ends) if self.start is None else self.start
        first = torch.arange(batch, dtype=torch.int32, device=ends.device)
        # Three sequences for each batch entry, of which those around the live one have no keys.
        of_k = torch.stack((first * keys + starts, first * keys + ends, (first + 1) * keys), 1)
        lasts = (first + 1) * rows
        of_q = of_k if self.pattern.window is not None else torch.stack((first * rows, lasts, lasts), 1)
        used = torch.stack((torch.zeros_like(ends), ends - starts, torch.zeros_like(ends)), 1)
        cu_seqlens_q, cu_seqlens_k = (torch.nn.functional.pad(each.flatten(), (1, 0)) for each in (of_q, of_k))
        return Segments(cu_seqlens_q, cu_seqlens_k, used.flatten())

    @cached_property
    def ends(self) -> Tensor:
        """`end` of each batch entry, an int32 tensor."""
        if not isinstance(self.end, int):
            return self.end
        device = self.device if self.start is None else self.start.device
        return torch.full((_shape(self)[0],), self.end, dtype=torch.int32, device=device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KEPT:
            return args[0]
        if func in _ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        args, kwargs = torch.utils._pytree.tree_map(_computed, (args, kwargs or {}))
        return func(*args, **kwargs)


_ASKED = {
    *(torch.Tensor.dim, torch.Tensor.size, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.stride),
    *(torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.get_device, torch.Tensor.is_inference),
    *(torch.Tensor.storage_offset, torch.Tensor.untyped_storage, torch.Tensor._is_view, torch.Tensor.is_contiguous),
    *(torch.Tensor.is_conj, torch.Tensor.is_neg, torch.is_floating_point, torch.is_complex, torch.is_inference),
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "_version")),
    *(getattr(torch.Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad_fn", "_base", "is_nested")),
    *(getattr(torch.Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized")),
}
"""What does not look at the booleans."""

_KEPT = {torch.Tensor.contiguous, torch.Tensor.detach}
"""What leaves them as they are."""


def _computed(value: Any) -> Any:
    return value.dense if isinstance(value, PendingMask) else value


def _shape(mask: PendingMask) -> tuple[int, int, int, int]:
    batch, heads, rows, keys = mask.shape
    return batch, heads, rows, keys


def pending_of(mask: Any) -> PendingMask | None:
    """The `PendingMask` that a mask is, or that a mask of one query has been made of."""
    return mask if isinstance(mask, PendingMask) else getattr(mask, "_cufa_pending", None)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = _utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What models hand to their layers as ``attention_mask``; the arguments are those of transformers' mask functions.

    Returns
    -------
    mask : None, PendingMask or bool tensor, (batch_size, 1, q_length, kv_length)
        None where one of the skips is allowed and ``is_causal`` says all: without padding, or, where gradients are
        recorded, with padding on the right of causal sequences, which no token sees that is none.
    """
    if isinstance(q_offset, torch.Tensor) and not is_tracing(q_offset):
        q_offset = q_offset.clone()  # a static cache counts up in place, and booleans may be computed later

    def compute(skip: bool = False) -> Tensor | None:
        return _utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=skip and allow_is_causal_skip,
            allow_is_bidirectional_skip=skip and allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            device=device,
        )

    frontier = q_offset + q_length - kv_offset  # the key behind that of the last query
    values = [each for each in (q_offset, attention_mask) if isinstance(each, torch.Tensor)]
    if torch.compiler.is_compiling() or any(map(is_tracing, values)):
        # Nothing can be asked of values here; lengths alone say when a mask is nothing but causal.
        return compute(skip=allow_is_bidirectional_skip or (isinstance(frontier, int) and frontier == kv_length))
    pattern = None if use_vmap else pattern_of(mask_function)
    if pattern is not None and pattern.chunk is not None:
        whole = kv_offset + kv_length <= pattern.chunk  # all positions are of the first chunk
        pattern = pattern._replace(chunk=None) if whole else None
    if pattern is None:
        return compute()

    def pending(pattern: Pattern, end: int | Tensor, **more: Any) -> Tensor:
        shape = (batch_size, 1, q_length, kv_length)
        made = PendingMask.of(shape, device, compute, pattern, end, **more)
        if q_length > 1 or allow_is_causal_skip or allow_is_bidirectional_skip:
            return made
        # For a compiled step of decoding, in whose graph only plain tensors go: of one query it is small.
        plain = made.dense.contiguous()
        plain._cufa_pending = made
        return plain

    if pattern.sequences is not None:
        return pending(pattern._replace(sequences=None), kv_length, offsets=_offsets_of(pattern.sequences))
    windowed = pattern.window is not None
    if isinstance(frontier, int):
        pattern = _narrowed(pattern, max(frontier, kv_length))
    end: int | Tensor = frontier if windowed else kv_length
    padding = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
    start = within = None
    if windowed and not pattern.causal and not (isinstance(frontier, int) and frontier == kv_length):
        return compute()  # queries see keys behind the last query's, by distances from places that no end tells
    if padding is not None:
        found = _live_range(padding, kv_length, end)
        if found is None:
            return compute()
        first, last, padded_left, padded_right = found
        start = first if padded_left else None
        if padded_right and not pattern.causal:
            if windowed and q_length != kv_length:
                return compute()
            end = last
        elif padded_right and not torch.is_grad_enabled():
            if not isinstance(end, int):
                return compute()
            within = first, last
        # Of causal masks padding on the right hides keys from its own rows alone. Where something is differentiated
        # nothing follows from these, and a mask that says more than when keys begin would only take time.
    if isinstance(end, int):
        if not 0 < end <= kv_length:
            return compute()  # queries that lie beyond the keys have no place that an end could tell
        skip = allow_is_causal_skip if pattern.causal else allow_is_bidirectional_skip
        whole = start is None and within is None and end == kv_length
        if skip and whole and pattern.window in (None, (None, 0)):
            return None
    elif end.ndim == 0:
        end = end.to(torch.int32).expand(batch_size).contiguous()
    return pending(pattern, end, start=start, within=within)


def _narrowed(pattern: Pattern, keys: int) -> Pattern:
    """Without sides of a window beyond which there is no key."""
    left = None if pattern.left is not None and pattern.left >= keys - 1 else pattern.left
    right = None if pattern.right is not None and pattern.right > 0 and pattern.right >= keys - 1 else pattern.right
    return pattern._replace(left=left, right=right)


def _live_range(padding: Tensor, kv_length: int, end: int | Tensor) -> tuple[Tensor, Tensor, bool, bool] | None:
    """Where the keys of each sequence begin and end that are no padding, and whether some is before or behind them.

    None if there is padding between them. The host waits, once per forward, as it does for ``"sdpa"``.
    """
    batch, length = padding.shape
    places = torch.arange(length, dtype=torch.int32, device=padding.device)
    beyond = torch.where(padding, places, length).amin(1) if length else places.new_zeros(batch)
    last = torch.where(padding, places + 1, 0).amax(1) if length else places.new_zeros(batch)
    start = torch.minimum(beyond, last)  # without any key both are 0
    start = torch.where(last == 0, length, start)
    last = torch.where(last == 0, length, last)
    whole = (last - start == padding.sum(1)).all()
    end = torch.as_tensor(end, device=padding.device)
    facts = torch.stack((whole, (start > 0).any(), (last < end).any())).tolist()
    if not facts[0]:
        return None
    return start.to(torch.int32), last.to(torch.int32), facts[1], facts[2]


def _offsets_of(sequences: Tensor) -> Tensor:
    """Where sequences begin in the rows of all batch entries, behind each other."""
    first = torch.ones_like(sequences[:, :1], dtype=torch.bool)
    begins = torch.cat((first, sequences.diff(dim=1) != 0), 1).flatten()
    rows = begins.nonzero().flatten().to(torch.int32)
    return torch.nn.functional.pad(rows, (0, 1), value=begins.numel())

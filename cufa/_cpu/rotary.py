"""Rotary embedding of NumPy arrays, which are validated by the caller."""

from __future__ import annotations

import numpy as np

from .._terms.term import Array
from .kvcache import rotate as _rotate_rows

PIECE = 1 << 16
"""Elements that are worked on at once, so that they stay in the cache."""


def rotate(
    x: Array,
    out: Array,
    *,
    cos: Array,
    sin: Array,
    positions: Array | None,
    offsets: Array | None,
    cu_seqlens: Array | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Write (…, rows, heads, columns), turned, to `out`. Rows that are no sequence's stay as they are."""
    batched, written = (each if each.ndim == 4 else each[None] for each in (x, out))
    batch, length, heads, columns = batched.shape
    where, live = _positions(batch, length, positions, offsets, cu_seqlens)
    where = np.clip(where, 0, len(cos) - 1)  # programs of JAX's have values that nobody has looked at
    step = max(1, PIECE // max(1, heads * columns))
    for b in range(batch):
        for first in range(0, length, step):
            rows = slice(first, first + step)
            at = where[b, rows]
            turned = _rotate_rows(batched[b, rows], cos[at], -sin[at] if inverse else sin[at], interleaved)
            written[b, rows] = np.where(live[b, rows, None, None], turned, batched[b, rows])


def _positions(
    batch: int, length: int, positions: Array | None, offsets: Array | None, cu_seqlens: Array | None
) -> tuple[Array, Array]:
    """The position of every row, (batch, length), and whether it is a sequence's."""
    rows = np.broadcast_to(np.arange(length), (batch, length))
    if positions is not None:
        return positions.reshape(batch, length), np.full((batch, length), True)
    if cu_seqlens is None:
        first = np.zeros(1, np.int64) if offsets is None else offsets.astype(np.int64)
        return first[:, None] + rows, np.full((batch, length), True)
    ends = np.maximum.accumulate(np.clip(cu_seqlens, 0, length).astype(np.int64))
    sequence = np.searchsorted(ends, rows, side="right") - 1
    live = (sequence >= 0) & (sequence < len(ends) - 1)
    sequence = np.clip(sequence, 0, max(0, len(ends) - 2))
    where = rows - ends[sequence]
    if offsets is not None and len(offsets):
        where = where + offsets.astype(np.int64)[sequence]
    return where, live

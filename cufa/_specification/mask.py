"""A mask as the reference takes it: an array of booleans, a function, or what has a `dense` one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from .bias import of_points

if TYPE_CHECKING:
    from ..reference import At

Array = NDArray[Any]


class Mask:
    """Key j is kept by query i if ``mask[b, h, i, j]``, where an axis of 1 serves all; nothing is beyond the ends.

    A function is asked, with the arrays that it comes with: ``mask(b, h, i, j, *arrays)``. One of `cufa.masks` is asked
    for the entries of each sequence and head, and a `cufa.BlockMask` for all of those that it is for.
    """

    def __init__(self, mask: Any) -> None:
        self.mask = mask

    def score(self, s: Array, at: At) -> Array:
        return s

    def slope(self, s: Array, at: At) -> float:
        return 1.0

    def keep(self, at: At) -> Array:
        if hasattr(self.mask, "entries"):
            return self._entries(at)
        if hasattr(self.mask, "block_size"):
            return self._listed(at)
        function, *arrays = self.mask if isinstance(self.mask, tuple) else (self.mask,)
        if callable(function):
            return np.asarray(function(at.batch, at.head, at.query, at.key, *arrays), bool)
        return of_points(np.asarray(self.mask) != 0, at, False)

    def _entries(self, at: At) -> Array:
        queries, keys = at.query.size, at.key.size
        kept = np.zeros((at.batch.size, at.head.size, queries, keys), bool)
        for (b, h), where in zip(np.ndindex(*kept.shape[:2]), np.broadcast(at.batch, at.head), strict=True):
            kept[b, h] = self.mask.entries(*map(int, where), range(queries), queries, keys)
        return kept

    def _listed(self, at: At) -> Array:
        lists = self.mask.dense()
        sequences, heads = lists.shape[:2]
        if lists.shape[2:] != (at.query.size, at.key.size) or sequences not in (1, at.batch.size):
            raise ArgumentError(
                f"the mask is for {sequences} sequences of {lists.shape[2]} queries and {lists.shape[3]} keys; there "
                f"are {at.batch.size} of {at.query.size} and {at.key.size}."
            )
        of_head = at.head * heads // max(1, at.head.size)  # heads that share a key head share its lists
        kept: Array = lists[at.batch % sequences, of_head, at.query, at.key]
        return kept

    def factor(self, at: At) -> float:
        return 1.0

    def gradient(self, ds: Array, s: Array, at: At) -> tuple[()]:
        return ()


class Seen:
    """Removes the keys for which an array holds False: (batch, heads, seqlen_q, seqlen_k), or 1 in their places."""

    def __init__(self, seen: Any) -> None:
        self.seen = np.asarray(seen, bool)

    def score(self, s: Array, at: Any) -> Array:
        return s

    def slope(self, s: Array, at: Any) -> Any:
        return 1.0

    def keep(self, at: Any) -> Any:
        places = zip((at.batch, at.head, at.query, at.key), self.seen.shape, strict=True)
        kept: NDArray[np.bool_] = self.seen[tuple(place % extent for place, extent in places)]
        return kept

    def factor(self, at: Any) -> Any:
        return 1.0

    def gradient(self, ds: Array, s: Array, at: Any) -> tuple[()]:
        return ()

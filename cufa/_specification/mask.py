"""A mask as the reference takes it: an array of booleans, a function, or what has a `dense` one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .bias import of_points

if TYPE_CHECKING:
    from ..reference import At

Array = NDArray[Any]


class Mask:
    """Key j is kept by query i if ``mask[b, h, i, j]``, where an axis of 1 serves all; nothing is beyond the ends.

    A function is asked, with the arrays that it comes with: ``mask(b, h, i, j, *arrays)``. A mask object gives an array
    for as many queries and keys as a sequence has: ``mask.dense(batch, heads, seqlen_q, seqlen_k)``.
    """

    def __init__(self, mask: Any) -> None:
        self.mask = mask

    def score(self, s: Array, at: At) -> Array:
        return s

    def slope(self, s: Array, at: At) -> float:
        return 1.0

    def keep(self, at: At) -> Array:
        if hasattr(self.mask, "dense"):
            sizes = int(at.batch.max(initial=-1)) + 1, int(at.head.max(initial=-1)) + 1, at.query.size, at.key.size
            return of_points(np.asarray(self.mask.dense(*sizes)), at, False)
        function, *arrays = self.mask if isinstance(self.mask, tuple) else (self.mask,)
        if callable(function):
            return np.asarray(function(at.batch, at.head, at.query, at.key, *arrays), bool)
        return of_points(np.asarray(self.mask) != 0, at, False)

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

"""A mask as the reference takes it: an array of booleans, or one of `cufa.masks`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .bias import of_points
from .term import Array, At, Term


class Mask(Term):
    """Key j is kept by query i if ``mask[b, h, i, j]``, where an axis of 1 serves all; nothing is beyond the ends.

    A mask of `cufa.masks` is asked for the entries of each sequence and head.
    """

    def __init__(self, mask: Any) -> None:
        self.mask = mask

    def keep(self, at: At) -> Array:
        if hasattr(self.mask, "entries"):
            return self._entries(at)
        return of_points(np.asarray(self.mask) != 0, at, False)

    def _entries(self, at: At) -> Array:
        queries, keys = at.query.size, at.key.size
        kept = np.zeros((at.batch.size, at.head.size, queries, keys), bool)
        for (b, h), where in zip(np.ndindex(*kept.shape[:2]), np.broadcast(at.batch, at.head), strict=True):
            kept[b, h] = self.mask.entries(*map(int, where), range(queries), queries, keys)
        return kept

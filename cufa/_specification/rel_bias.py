"""A relative bias as the reference takes it: one number after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .bias import evenly
from .term import Array, At, Term


class RelBias(Term):
    """``s + rel_bias[h, reach + d]``, with d the distance ``i + offset - j``, but at least -reach and at most reach."""

    def __init__(self, rel_bias: ArrayLike) -> None:
        self.rel_bias = np.asarray(rel_bias, np.float64)

    def score(self, s: Array, at: At) -> Array:
        scored: Array = s + self.rel_bias[at.head, self._column(at)].astype(s.dtype)
        return scored

    def gradient(self, ds: Array, s: Array, at: At) -> tuple[Array]:
        return (self._sums(ds, at),)

    def spread(self, alone: Array, shared: Sequence[Array], s: Array, at: At) -> tuple[tuple[Array, Array]]:
        column = self._column(at)
        for end in (0, self.rel_bias.shape[1] - 1):  # only there a row has several entries of one number
            shared = [evenly(errors, column == end) for errors in shared]
        return ((self._sums(alone, at), self._sums(sum(errors**2 for errors in shared), at)),)

    def _sums(self, x: Any, at: At) -> Array:
        """Of numbers of scores, by the elements that these read."""
        of_heads, column = x.sum(axis=0), self._column(at)
        found = np.zeros(self.rel_bias.shape)
        for each in np.unique(column):
            found[at.head.ravel(), each] = of_heads[:, column == each].sum(axis=1)
        return found

    def _column(self, at: At) -> Array:
        reach = (self.rel_bias.shape[1] - 1) // 2
        column: Array = np.maximum(0, np.minimum(2 * reach, reach + at.distance))
        return column

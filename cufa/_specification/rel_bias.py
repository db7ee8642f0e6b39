"""A relative bias as the reference takes it: one number after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .term import Array, At, Term


class RelBias(Term):
    """``s + rel_bias[h, reach + d]``, with d the distance ``i + offset - j``, but at least -reach and at most reach."""

    def __init__(self, rel_bias: ArrayLike) -> None:
        self.rel_bias = np.asarray(rel_bias, np.float64)

    def score(self, s: Array, at: At) -> Array:
        scored: Array = s + self.rel_bias[at.head, self._column(at)].astype(s.dtype)
        return scored

    def gradient(self, ds: Array, s: Array, at: At) -> tuple[Array]:
        of_heads, column = ds.sum(axis=0), self._column(at)
        drel_bias = np.zeros(self.rel_bias.shape)
        for each in np.unique(column):
            drel_bias[at.head.ravel(), each] = of_heads[:, column == each].sum(axis=1)
        return (drel_bias,)

    def _column(self, at: At) -> Array:
        reach = (self.rel_bias.shape[1] - 1) // 2
        column: Array = np.maximum(0, np.minimum(2 * reach, reach + at.distance))
        return column

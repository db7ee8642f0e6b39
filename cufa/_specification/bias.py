"""A bias as the reference takes it: an array of which any axis may be 1, indexed score by score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .term import Array, At, Term


class Bias(Term):
    """``s + bias[b, h, i, j]``, where an axis of 1 serves all, and what lies beyond the ends of the others is 0."""

    def __init__(self, bias: ArrayLike) -> None:
        self.bias = np.asarray(bias, np.float64)

    def score(self, s: Array, at: At) -> Array:
        scored: Array = s + of_points(self.bias, at, 0.0).astype(s.dtype)
        return scored

    def gradient(self, ds: Array, s: Array, at: At) -> tuple[Array]:
        return (self._sums(ds, at),)

    def spread(self, alone: Array, shared: Sequence[Array], s: Array, at: At) -> tuple[tuple[Array, Array]]:
        if self.bias.shape[3] == 1:
            shared = [evenly(errors, np.True_) for errors in shared]
        return ((self._sums(alone, at), self._sums(sum(errors**2 for errors in shared), at)),)

    def _sums(self, x: Any, at: At) -> Array:
        """Of numbers of scores, by the elements that these read."""
        found = np.zeros(self.bias.shape)
        index, inside = places(self.bias, at)
        np.add.at(found, np.broadcast_arrays(*index, x)[:4], np.where(inside, x, 0))
        return found


def evenly(errors: Array, together: Any) -> Array:
    """Errors that entries of a row share, with those of some entries made such that their squares add up to the square
    of their sum."""
    there = np.broadcast_to(together, errors.shape)
    total, count = (np.where(there, x, 0).sum(axis=3, keepdims=True) for x in (errors, 1.0))
    return np.where(there, np.abs(total) / np.sqrt(np.maximum(count, 1)), errors)


def places(array: Array, at: At) -> tuple[list[Array], Any]:
    """Indices of the elements that belong to scores, clipped, and whether they were inside without that."""
    index, inside = [], np.True_
    for where, extent in zip((at.batch, at.head, at.query, at.key), array.shape, strict=True):
        own = np.zeros_like(where) if extent == 1 else where
        inside = inside & (own < extent)
        index.append(np.clip(own, 0, max(extent - 1, 0)))
    return index, inside


def of_points(array: Array, at: At, otherwise: Any) -> Array:
    """The elements that belong to scores, or something else where there are none."""
    index, inside = places(array, at)
    if array.size == 0:
        return np.full(np.broadcast_shapes(*(each.shape for each in index)), otherwise)
    return np.where(inside, array[tuple(index)], otherwise)

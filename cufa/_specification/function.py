"""Score and mask functions: they are called with NumPy arrays, and derivatives are differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .term import Array, Term

STEP = 2.0**-10
"""Of differences, relative to numbers larger than 1. They err by its fourth power where four derivatives exist, and
are wrong within two steps of where a function has none."""


class Query(np.ndarray):
    """Numbers of queries, and where these are among the keys."""

    position: Any


class Clipped:
    """An array that is read at its nearest element where an index lies outside of it."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __getitem__(self, index: Any) -> Array:
        indices = index if isinstance(index, tuple) else (index,)
        nearest = zip(indices, self.array.shape, strict=True)
        read: Array = self.array[tuple(np.clip(np.asarray(each), 0, extent - 1) for each, extent in nearest)]
        return read


class Function(Term):
    """What `score` or `mask` is given, with the arrays behind it; `differentiated` are the places of those that have
    gradients."""

    def __init__(
        self,
        *arrays: Any,
        score: Callable[..., Any] | None = None,
        mask: Callable[..., Any] | None = None,
        differentiated: tuple[int, ...] = (),
    ) -> None:
        self.arrays = [_wide(array) for array in arrays]
        self.function = score or mask
        self.is_mask = score is None
        self.differentiated = differentiated

    @classmethod
    def of(cls, given: Any, kind: str) -> Function:
        """That of what calls take as ``score`` or ``mask``, by `kind`: a function, or one and arrays behind its points.

        Arrays of floats have gradients.
        """
        function, *arrays = given if isinstance(given, tuple) else (given,)
        floats = (place for place, array in enumerate(arrays) if np.asarray(array).dtype.kind not in "iub")
        return cls(*arrays, **{kind: function}, differentiated=tuple(floats) if kind == "score" else ())

    def _called(self, at: Any, *score: Array, arrays: list[Array] | None = None) -> Array:
        assert self.function is not None
        query = np.asarray(at.query).view(Query)
        query.position = at.distance + at.key
        given = (Clipped(array) if array.ndim else array[()] for array in (self.arrays if arrays is None else arrays))
        return np.asarray(self.function(*score, at.batch, at.head, query, at.key, *given))

    def score(self, s: Array, at: Any) -> Array:
        return s if self.is_mask else np.broadcast_to(self._called(at, s), s.shape)

    def slope(self, s: Array, at: Any) -> Array | float:
        if self.is_mask:
            return 1.0
        step = STEP * np.maximum(1, np.abs(s))
        return _difference(lambda factor: self.score(s + factor * step, at), step)

    def keep(self, at: Any) -> Array | bool:
        return self._called(at).astype(bool) if self.is_mask else True

    def gradient(self, ds: Array, s: Array, at: Any) -> tuple[Array, ...]:
        return tuple(
            self._by_elements(place, [np.where(ds != 0, ds * by, 0).sum() for by in self._derivatives(place, s, at)])
            for place in self.differentiated
        )

    def spread(self, alone: Array, shared: Sequence[Array], s: Array, at: Any) -> tuple[tuple[Array, Array], ...]:
        found = []
        for place in self.differentiated:
            single, together = [], []
            for by in self._derivatives(place, s, at):
                single.append(np.where(alone != 0, alone * by**2, 0).sum())
                rows = (np.where(errors != 0, errors * by, 0).sum(axis=3) for errors in shared)
                together.append(sum((row**2).sum() for row in rows))
            found.append((self._by_elements(place, single), self._by_elements(place, together)))
        return tuple(found)

    def _by_elements(self, place: int, found: Sequence[Any]) -> Array:
        return np.array(found, float).reshape(self.arrays[place].shape)

    def _derivatives(self, place: int, s: Array, at: Any) -> Iterator[Array]:
        """Of scores, by each element of an array."""
        for index in np.ndindex(self.arrays[place].shape):
            step = STEP * max(1.0, abs(float(self.arrays[place][index])))

            def moved(factor: float, index: tuple[int, ...] = index, step: float = step) -> Array:
                arrays = [array.copy() for array in self.arrays]
                arrays[place][index] += factor * step
                return self._called(at, s, arrays=arrays)

            yield _difference(moved, step)


def _difference(function: Callable[[float], Array], step: Any) -> Array:
    """A derivative at 0, by four values; 0 where a function stays at infinity, as a score does that is hidden so."""
    near, far = (_apart(function(factor), function(-factor)) for factor in (1, 2))
    found: Array = (8 * near - far) / (12 * step)
    return found


def _apart(one: Array, other: Array) -> Array:
    found: Array = np.where(np.equal(one, other), 0, np.subtract(one, other))
    return found


def _wide(array: Any) -> Array:
    """Floats in float64."""
    array = np.asarray(array)
    wide: Array = array.astype(np.float64) if array.dtype.kind == "f" else array
    return wide

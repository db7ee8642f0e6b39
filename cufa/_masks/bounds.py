"""What masks know of whole blocks without looking at their entries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


class Bounds(NamedTuple):
    """What is certain of blocks: booleans that broadcast to (query_blocks, key_blocks).

    Attributes
    ----------
    all : bool array or bool
        True where all entries are seen; it may be False there too.
    some : bool array or bool
        False where none is; it may be True there too.
    """

    all: Any
    some: Any

    def __and__(self, other: Bounds) -> Bounds:
        return Bounds(self.all & other.all, self.some & other.some)

    def __or__(self, other: Bounds) -> Bounds:
        return Bounds(self.all | other.all, self.some | other.some)

    def __invert__(self) -> Bounds:
        return Bounds(np.logical_not(self.some), np.logical_not(self.all))


UNKNOWN = Bounds(False, True)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a sequence, neither of whose lengths is 0.

    Attributes
    ----------
    sequence : int
    seqlen_q, seqlen_k : int
    rows, columns : int
        Queries and keys of a block.
    """

    sequence: int
    seqlen_q: int
    seqlen_k: int
    rows: int
    columns: int

    @cached_property
    def first_query(self) -> Array:
        """(query_blocks, 1)"""
        found: Array = np.arange(0, self.seqlen_q, self.rows)[:, None]
        return found

    @cached_property
    def first_key(self) -> Array:
        """(key_blocks,)"""
        return np.arange(0, self.seqlen_k, self.columns)

    @cached_property
    def last_key(self) -> Array:
        found: Array = np.minimum(self.first_key + self.columns, self.seqlen_k) - 1
        return found

    @property
    def offset(self) -> int:
        return self.seqlen_k - self.seqlen_q

    @cached_property
    def first_position(self) -> Array:
        """Of queries."""
        found: Array = self.first_query + self.offset
        return found

    @cached_property
    def last_position(self) -> Array:
        found: Array = np.minimum(self.first_query + self.rows, self.seqlen_q) - 1 + self.offset
        return found

    @cached_property
    def distance(self) -> Array:
        """How far a block's first key lies before its first query's position, but no farther than any entry tells."""
        found: Array = np.clip(self.first_position - self.first_key, -self.rows, self.columns)
        return found

    def before(self, right: int) -> Bounds:
        """Of the keys up to so many behind a query's position."""
        last, first = self.last_position + right, self.first_position + right
        return Bounds(self.last_key <= first, self.first_key <= last)

    def after(self, left: int) -> Bounds:
        """Of the keys from so many before a query's position on."""
        last, first = self.last_position - left, self.first_position - left
        return Bounds(self.first_key >= last, self.last_key >= first)

    def labels(self, labels: Array) -> tuple[Array, Array]:
        """Those of the queries of each block, (query_blocks, rows), and of the keys, (key_blocks, columns).

        Queries before the first key have the label -1, and positions behind the last label have that.
        """
        positions = np.arange(self.offset, self.seqlen_k)
        last = len(labels) - 1
        own = np.where(positions >= 0, labels[np.clip(positions, 0, last)], -1)
        others = labels[np.minimum(np.arange(self.seqlen_k), last)]
        whole = ((x, -len(x) % side, side) for x, side in ((own, self.rows), (others, self.columns)))
        one, other = (np.pad(x, (0, missing), "edge").reshape(-1, side) for x, missing, side in whole)
        return one, other

"""What a mask is, and how masks are combined."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from . import drawing
from .bounds import UNKNOWN, Blocks, Bounds
from .host import copied, to_numpy

Array: TypeAlias = NDArray[Any]
Window: TypeAlias = tuple[int | None, int | None]


@dataclass(frozen=True, eq=False)
class At:
    """Where entries of a mask are: integers, or arrays of them that broadcast to (batch, heads, queries, keys).

    Attributes
    ----------
    batch, head : integers
        Which sequence, and which head of q.
    query, key : integers
        Of the sequence's own.
    position : integers
        The key at the query's own position, ``query + seqlen_k - seqlen_q``; it may be negative.
    where : callable
        ``where(condition, a, b)`` of such integers.
    nearest : callable
        ``nearest(index, extent)``: an index that is not negative as one into an axis. Arrays of kernels read the
        nearest element outside anyway, so that no extent is part of a kernel.
    """

    batch: Any
    head: Any
    query: Any
    key: Any
    position: Any
    where: Callable[[Any, Any, Any], Any] = np.where
    nearest: Callable[[Any, int], Any] = lambda index, extent: np.minimum(index, extent - 1)

    @classmethod
    def grid(cls, batch: int, heads: int, queries: range, keys: int, offset: int) -> At:
        """All entries of some queries of every sequence and head."""
        numbers = np.arange(queries.start, queries.stop)[:, None]
        query = numbers.view(Queries)
        query.position = numbers + offset
        return cls(
            np.arange(batch)[:, None, None, None],
            np.arange(heads)[:, None, None],
            query,
            np.arange(keys),
            query.position,
        )


class Queries(np.ndarray):
    """Numbers of queries that know their positions, as those do that a function is traced with."""

    position: Any = None


class Mask:
    """Which keys a query sees. Masks are combined by ``&``, ``|`` and ``~``, and compared by what they are made of.

    Those of `cufa.masks` speak of positions, which count from the first key: query i has the position
    ``i + seqlen_k - seqlen_q``, so that the last query is at the last key, as under ``causal=True``.
    """

    arrays: tuple[Array, ...] = ()
    """What `seen` reads, in its order."""

    _placed: tuple[Any, ...] | None = None

    def seen(self, at: At, *arrays: Any) -> Any:
        """Which of the entries are seen: booleans that broadcast to them. It consists of operators alone."""
        raise NotImplementedError

    @property
    def placed(self) -> tuple[Any, ...]:
        """The arrays where `to` has put them."""
        return self.arrays if self._placed is None else self._placed

    def to(self, like: Any) -> Mask:
        """The same mask, with what it reads in the framework and on the device of an array.

        ``mask=`` wants it there. Masks that read no array serve arrays anywhere as they are.

        Parameters
        ----------
        like : array or None
            None is NumPy.

        Returns
        -------
        Mask
        """
        found = copy.copy(self)
        found._placed = tuple(copied(array, like) for array in self.arrays)
        return found

    def call(self, batch: Any, head: Any, query: Any, key: Any, *arrays: Any) -> Any:
        """The mask as a function for ``mask=``: see `cufa.functions`, of whose queries it asks the position."""
        from .. import functions

        at = At(batch, head, query, key, query.position, functions.where, lambda index, extent: index)
        return self.seen(at, *arrays)

    def parts(self) -> tuple[Any, ...]:
        """What the mask is made of: numbers, arrays, functions or masks."""
        return ()

    def ranges(self) -> tuple[Window, Mask | None]:
        """The window that it is, as of `window_size`, and the mask that has to be met besides."""
        return (None, None), self

    def bounds(self, blocks: Blocks) -> Bounds:
        """What is certain of the blocks of a sequence, whatever the head."""
        return UNKNOWN

    def alike(self, blocks: Blocks) -> tuple[Array, ...] | None:
        """Numbers of the blocks: where they are the same, blocks of the same size look alike. None if there are none.

        They need not tell blocks apart that `bounds` decides. Arrays broadcast to (query_blocks, key_blocks).
        """
        return None

    def check(self, batch: int, heads: int) -> None:
        """Refuse arrays that are of another number of sequences or heads."""

    def check_lengths(self, seqlen_q: int, seqlen_k: int) -> None:
        """Refuse arrays that are of other lengths."""

    @property
    def sizes(self) -> tuple[int, int]:
        """How many sequences and heads it is for; 1 where it serves all."""
        return 1, 1

    @property
    def lengths(self) -> tuple[int | None, int | None]:
        """How many queries and keys it is for; None where it serves any number."""
        return None, None

    def entries(
        self, batch: int, head: int, queries: range, seqlen_q: int, seqlen_k: int, keys: Array | None = None
    ) -> NDArray[np.bool_]:
        """What some queries of one sequence and head see of some keys, or of all, (queries, keys)."""
        at = At.grid(1, 1, queries, seqlen_k, seqlen_k - seqlen_q)
        at = At(at.batch + batch, at.head + head, at.query, at.key if keys is None else keys, at.position)
        found = np.asarray(self.seen(at, *self.arrays), dtype=bool)
        one: NDArray[np.bool_] = np.broadcast_to(found, (1, 1, len(queries), len(at.key)))[0, 0]
        return one

    def dense(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> NDArray[np.bool_]:
        """The mask as an array.

        Parameters
        ----------
        batch, heads : int
            Sequences, and heads of q.
        seqlen_q, seqlen_k : int

        Returns
        -------
        bool array, (batch, heads, seqlen_q, seqlen_k)
            True where the query sees the key.

        Examples
        --------
        >>> from cufa import masks
        >>> masks.causal().dense(1, 1, 2, 3)[0, 0].astype(int)
        array([[1, 1, 0],
               [1, 1, 1]])
        """
        self.check(batch, heads)
        self.check_lengths(seqlen_q, seqlen_k)
        shape = batch, heads, seqlen_q, seqlen_k
        found = self.seen(At.grid(batch, heads, range(seqlen_q), seqlen_k, seqlen_k - seqlen_q), *self.arrays)
        return np.broadcast_to(np.asarray(found, dtype=bool), shape).copy()

    def draw(self, seqlen_q: int, seqlen_k: int, batch: int = 0, head: int = 0) -> str:
        """The mask as text, a line for each query, as `cufa.reference` draws masks: ``#`` is seen, ``.`` is not.

        Parameters
        ----------
        seqlen_q, seqlen_k : int
        batch, head : int
            Whose mask is drawn.

        Returns
        -------
        str

        Examples
        --------
        >>> from cufa import masks
        >>> print(masks.causal().draw(2, 3))
               j 0 1 2
           i 0   # # .
           i 1   # # #
        """
        return drawing.text(self._entries(seqlen_q, seqlen_k, batch, head))

    def to_svg(self, seqlen_q: int, seqlen_k: int, batch: int = 0, head: int = 0) -> str:
        """The same as an SVG image.

        Parameters
        ----------
        seqlen_q, seqlen_k : int
        batch, head : int

        Returns
        -------
        str
        """
        return drawing.svg(self._entries(seqlen_q, seqlen_k, batch, head))

    def _repr_svg_(self) -> str | None:
        queries, keys = (drawing.SIDE if length is None else length for length in self.lengths)
        return self.to_svg(queries, keys) if max(queries, keys) <= drawing.LARGEST else None

    def _entries(self, seqlen_q: int, seqlen_k: int, batch: int, head: int) -> NDArray[np.bool_]:
        check_drawn("masks", self.sizes, batch, head)
        self.check(*self.sizes)
        self.check_lengths(seqlen_q, seqlen_k)
        return self.entries(batch, head, range(seqlen_q), seqlen_q, seqlen_k)

    def __and__(self, other: object) -> Mask:
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: object) -> Mask:
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value; combine masks by &, | and ~, not by `and`, `or` and `not`.")

    def _key(self) -> tuple[Any, ...]:
        return type(self), *map(_comparable, self.parts())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"{self.called}({', '.join(map(_told, self.parts()))})"

    called = "mask"
    """The function that makes it."""


class Combined(Mask):
    """A mask made of two."""

    sign: str

    def __init__(self, first: Mask, second: Mask) -> None:
        self.first, self.second = first, second
        self.arrays = first.arrays + second.arrays

    def both(self, at: At, arrays: tuple[Any, ...]) -> tuple[Any, Any]:
        count = len(self.first.arrays)
        return self.first.seen(at, *arrays[:count]), self.second.seen(at, *arrays[count:])

    def alike(self, blocks: Blocks) -> tuple[Array, ...] | None:
        one, other = self.first.alike(blocks), self.second.alike(blocks)
        return None if one is None or other is None else one + other

    @property
    def placed(self) -> tuple[Any, ...]:
        return self.first.placed + self.second.placed

    def to(self, like: Any) -> Mask:
        return type(self)(self.first.to(like), self.second.to(like))

    def parts(self) -> tuple[Any, ...]:
        return self.first, self.second

    @property
    def sizes(self) -> tuple[int, int]:
        (sequences, heads), (others, other_heads) = self.first.sizes, self.second.sizes
        return max(sequences, others), max(heads, other_heads)

    @property
    def lengths(self) -> tuple[int | None, int | None]:
        queries, keys = self.first.lengths
        other_queries, other_keys = self.second.lengths
        return other_queries if queries is None else queries, other_keys if keys is None else keys

    def check(self, batch: int, heads: int) -> None:
        self.first.check(batch, heads)
        self.second.check(batch, heads)

    def check_lengths(self, seqlen_q: int, seqlen_k: int) -> None:
        self.first.check_lengths(seqlen_q, seqlen_k)
        self.second.check_lengths(seqlen_q, seqlen_k)

    def __repr__(self) -> str:
        return f"({self.first!r} {self.sign} {self.second!r})"


class And(Combined):
    sign = "&"

    def seen(self, at: At, *arrays: Any) -> Any:
        first, second = self.both(at, arrays)
        return first & second

    def bounds(self, blocks: Blocks) -> Bounds:
        return self.first.bounds(blocks) & self.second.bounds(blocks)

    def ranges(self) -> tuple[Window, Mask | None]:
        (one, first), (other, second) = self.first.ranges(), self.second.ranges()
        rest = second if first is None else first if second is None else And(first, second)
        return narrowed(one, other), rest


class Or(Combined):
    sign = "|"

    def seen(self, at: At, *arrays: Any) -> Any:
        first, second = self.both(at, arrays)
        return first | second

    def bounds(self, blocks: Blocks) -> Bounds:
        return self.first.bounds(blocks) | self.second.bounds(blocks)


class Not(Mask):
    def __init__(self, mask: Mask) -> None:
        self.mask, self.arrays = mask, mask.arrays

    def seen(self, at: At, *arrays: Any) -> Any:
        return ~self.mask.seen(at, *arrays)

    def bounds(self, blocks: Blocks) -> Bounds:
        return ~self.mask.bounds(blocks)

    def alike(self, blocks: Blocks) -> tuple[Array, ...] | None:
        return self.mask.alike(blocks)

    @property
    def placed(self) -> tuple[Any, ...]:
        return self.mask.placed

    def to(self, like: Any) -> Mask:
        return Not(self.mask.to(like))

    def parts(self) -> tuple[Any, ...]:
        return (self.mask,)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.mask.sizes

    @property
    def lengths(self) -> tuple[int | None, int | None]:
        return self.mask.lengths

    def check(self, batch: int, heads: int) -> None:
        self.mask.check(batch, heads)

    def check_lengths(self, seqlen_q: int, seqlen_k: int) -> None:
        self.mask.check_lengths(seqlen_q, seqlen_k)

    def __repr__(self) -> str:
        return f"~{self.mask!r}"


def narrowed(one: Window, other: Window) -> Window:
    """The window of the keys that are in both."""
    left, right = ([side for side in sides if side is not None] for sides in zip(one, other, strict=True))
    return min(left, default=None), min(right, default=None)


def check_drawn(room: str, sizes: tuple[int, int], batch: int, head: int) -> None:
    """Refuse a sequence or head of a mask that is for others."""
    for name, number, size, what in zip(("batch", "head"), (batch, head), sizes, ("sequences", "heads"), strict=True):
        if number < 0 or 1 < size <= number:
            there = f"the mask is for {size} {what}, from 0 on" if size > 1 else f"{what} are counted from 0"
            raise ArgumentError(f"{room}: {name} is {number}; {there}.")


def integers(function: str, name: str, given: Any, *ranks: int, room: str = "masks") -> Array:
    """An array of integers of any framework, as NumPy's int32; its values are read, for which the host may wait."""
    found = to_numpy(given)
    if (found.size and found.dtype.kind not in "iu") or found.ndim not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise ArgumentError(
            f"{room}.{function}: {name} has dtype {found.dtype} and {found.ndim} dimensions; integers of {wanted} are "
            "expected."
        )
    return as_int32(function, name, found, room)


def as_int32(function: str, name: str, given: Array, room: str = "masks") -> Array:
    """Integers as int32, as kernels read them, or an error where it does not hold one."""
    found = given.astype(np.int32)
    if (found != given).any():
        raise ArgumentError(f"{room}.{function}: {name} holds {given[found != given][0]}, which int32 does not hold.")
    return found


def _comparable(part: Any) -> Any:
    return (part.shape, part.dtype.str, part.tobytes()) if isinstance(part, np.ndarray) else part


def _told(part: Any) -> str:
    return f"<{part.dtype} {part.shape}>" if isinstance(part, np.ndarray) else getattr(part, "__name__", repr(part))

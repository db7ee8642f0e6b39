"""The masks of `cufa.masks`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._call.options import MAX_SEQLEN, integer
from ..errors import ArgumentError
from .bounds import Blocks, Bounds
from .host import to_numpy
from .mask import Array, At, Mask, Window, as_int32, integers, narrowed


def _size(function: str, name: str, given: Any, least: int = 1) -> int:
    value = integer(f"masks.{function}", name, given)
    if value < least:
        raise ArgumentError(f"masks.{function}: {name} is {value}; it must be at least {least}.")
    return min(value, MAX_SEQLEN)  # no two positions are farther apart, and kernels compute with 32 bits


def _of_sequences(function: str, name: str, array: Array, batch: int) -> None:
    if array.shape[0] not in (1, batch):
        raise ArgumentError(
            f"masks.{function}: {name} is for {array.shape[0]} sequences, but there are {batch}; 1 or {batch} are "
            "expected."
        )


class Causal(Mask):
    called = "causal"

    def seen(self, at: At, *arrays: Any) -> Any:
        return at.key <= at.position

    def bounds(self, blocks: Blocks) -> Bounds:
        return blocks.before(0)

    def alike(self, blocks: Blocks) -> tuple[Array, ...]:
        return (blocks.distance,)

    def ranges(self) -> tuple[Window, Mask | None]:
        return (None, 0), None


class SlidingWindow(Mask):
    called = "sliding_window"

    def __init__(self, left: int | None, right: int | None) -> None:
        self.window = left, right

    def seen(self, at: At, *arrays: Any) -> Any:
        left, right = self.window
        found = at.key == at.key
        if left is not None:
            found = found & (at.key >= at.position - left)
        if right is not None:
            found = found & (at.key <= at.position + right)
        return found

    def bounds(self, blocks: Blocks) -> Bounds:
        left, right = self.window
        found = Bounds(True, True)
        if left is not None:
            found = found & blocks.after(left)
        if right is not None:
            found = found & blocks.before(right)
        return found

    def alike(self, blocks: Blocks) -> tuple[Array, ...]:
        return (blocks.first_position - blocks.first_key,)

    def parts(self) -> tuple[Any, ...]:
        return self.window

    def ranges(self) -> tuple[Window, Mask | None]:
        return narrowed(self.window, (None, None)), None


class Chunked(Mask):
    called = "chunked"

    def __init__(self, size: int) -> None:
        self.size = size

    def seen(self, at: At, *arrays: Any) -> Any:
        return at.key // self.size == at.position // self.size

    def bounds(self, blocks: Blocks) -> Bounds:
        first, last = blocks.first_position // self.size, blocks.last_position // self.size
        first_key, last_key = blocks.first_key // self.size, blocks.last_key // self.size
        return Bounds((first == last_key) & (last == first_key), (first <= last_key) & (first_key <= last))

    def alike(self, blocks: Blocks) -> tuple[Array, ...]:
        first, key = blocks.first_position, blocks.first_key
        return first // self.size - key // self.size, first % self.size, key % self.size

    def parts(self) -> tuple[Any, ...]:
        return (self.size,)


class Dilated(Mask):
    called = "dilated"

    def __init__(self, step: int) -> None:
        self.step = step

    def seen(self, at: At, *arrays: Any) -> Any:
        return (at.key - at.position) % self.step == 0

    def bounds(self, blocks: Blocks) -> Bounds:
        return Bounds(self.step == 1, True)

    def alike(self, blocks: Blocks) -> tuple[Array, ...]:
        return ((blocks.first_key - blocks.first_position) % self.step,)

    def parts(self) -> tuple[Any, ...]:
        return (self.step,)


class PrefixLm(Mask):
    called = "prefix_lm"

    def __init__(self, lengths: Array) -> None:
        self.arrays = (lengths,)

    def seen(self, at: At, *arrays: Any) -> Any:
        (lengths,) = arrays
        own = lengths[at.batch if self.arrays[0].shape[0] > 1 else 0 * at.batch]
        return (at.key <= at.position) | (at.key < own)

    def _length(self, blocks: Blocks) -> int:
        (lengths,) = self.arrays
        return int(lengths[blocks.sequence % len(lengths)])

    def bounds(self, blocks: Blocks) -> Bounds:
        length = self._length(blocks)
        return blocks.before(0) | Bounds(blocks.last_key < length, blocks.first_key < length)

    def alike(self, blocks: Blocks) -> tuple[Array, ...]:
        return blocks.distance, np.clip(self._length(blocks) - blocks.first_key, 0, blocks.columns)

    def parts(self) -> tuple[Any, ...]:
        return self.arrays

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.arrays[0]), 1

    def check(self, batch: int, heads: int) -> None:
        _of_sequences("prefix_lm", "prefix_lengths", self.arrays[0], batch)


class Labelled(Mask):
    """A mask by numbers of positions: below 0, or beyond them, a position has none."""

    def __init__(self, labels: Array, name: str) -> None:
        self.arrays = (np.pad(labels, ((0, 0), (0, 1)), constant_values=-1),)  # whose last is all behind it
        self.name = name

    def labels(self, at: At, array: Any, position: Any) -> Any:
        sequences, length = self.arrays[0].shape
        sequence = at.batch if sequences > 1 else 0 * at.batch
        label = array[sequence, at.nearest(at.where(position >= 0, position, 0), length)]
        return at.where(position >= 0, label, -1)

    def of_blocks(self, blocks: Blocks) -> tuple[Array, Array]:
        """The numbers of each block's queries, and of its keys."""
        (labels,) = self.arrays
        return blocks.labels(labels[blocks.sequence % len(labels)])

    def ends(self, blocks: Blocks) -> tuple[Array, Array, Array, Array]:
        """The least and largest number of each block's queries, and of its keys."""
        queries, keys = self.of_blocks(blocks)
        return queries.min(axis=1)[:, None], queries.max(axis=1)[:, None], keys.min(axis=1), keys.max(axis=1)

    def alike(self, blocks: Blocks) -> tuple[Array, ...]:
        queries, keys = (np.unique(x, axis=0, return_inverse=True)[1].ravel() for x in self.of_blocks(blocks))
        return queries[:, None], keys

    def parts(self) -> tuple[Any, ...]:
        return self.arrays

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.arrays[0]), 1

    def check(self, batch: int, heads: int) -> None:
        _of_sequences(self.called, self.name, self.arrays[0], batch)


class Document(Labelled):
    """Also of ranges: a query sees the keys of its own number."""

    def __init__(self, labels: Array, name: str, called: str = "document") -> None:
        super().__init__(labels, name)
        self.called = called

    def seen(self, at: At, *arrays: Any) -> Any:
        own = self.labels(at, arrays[0], at.position)
        return (own >= 0) & (own == self.labels(at, arrays[0], at.key))

    def bounds(self, blocks: Blocks) -> Bounds:
        least, largest, least_key, largest_key = self.ends(blocks)
        whole = (least >= 0) & (least == largest_key) & (largest == least_key)
        return Bounds(whole, (np.maximum(least, 0) <= largest_key) & (np.maximum(least_key, 0) <= largest))

    def parts(self) -> tuple[Any, ...]:
        return self.called, *self.arrays

    def __repr__(self) -> str:
        sequences, length = self.arrays[0].shape
        return f"{self.called}(<{self.name} of {(sequences, length - 1)}>)"


class GlobalTokens(Labelled):
    called = "global_tokens"

    def seen(self, at: At, *arrays: Any) -> Any:
        return (self.labels(at, arrays[0], at.key) >= 0) | (self.labels(at, arrays[0], at.position) >= 0)

    def bounds(self, blocks: Blocks) -> Bounds:
        least, largest, least_key, largest_key = self.ends(blocks)
        return Bounds((least >= 0) | (least_key >= 0), (largest >= 0) | (largest_key >= 0))


class FromArray(Mask):
    called = "from_array"

    def __init__(self, array: Array) -> None:
        self.arrays = (array,)

    def seen(self, at: At, *arrays: Any) -> Any:
        places = zip((at.batch, at.head, at.query, at.key), self.arrays[0].shape, strict=True)
        return arrays[0][tuple(place if extent > 1 else 0 * place for place, extent in places)] != 0

    def parts(self) -> tuple[Any, ...]:
        return self.arrays

    @property
    def sizes(self) -> tuple[int, int]:
        sequences, heads, *_ = self.arrays[0].shape
        return sequences, heads

    @property
    def lengths(self) -> tuple[int | None, int | None]:
        queries, keys = (None if n == 1 else n for n in self.arrays[0].shape[2:])
        return queries, keys

    def check(self, batch: int, heads: int) -> None:
        shape = self.arrays[0].shape
        if shape[0] not in (1, batch) or shape[1] not in (1, heads):
            raise ArgumentError(
                f"masks.from_array: the array has shape {shape}; its first axes are to be 1 or {batch}, the sequences, "
                f"and 1 or {heads}, the heads."
            )

    def check_lengths(self, seqlen_q: int, seqlen_k: int) -> None:
        shape = self.arrays[0].shape
        if shape[2] not in (1, seqlen_q) or shape[3] not in (1, seqlen_k):
            raise ArgumentError(
                f"masks.from_array: the array has shape {shape}; its last axes are to be 1 or the {seqlen_q} queries, "
                f"and 1 or the {seqlen_k} keys."
            )


class FromFunction(Mask):
    called = "from_function"

    def __init__(self, function: Callable[..., Any], arrays: tuple[Array, ...]) -> None:
        self.function, self.arrays = function, arrays

    def seen(self, at: At, *arrays: Any) -> Any:
        found = self.function(at.batch, at.head, at.query, at.key, *arrays)
        if isinstance(found, bool):  # of which ~ would make a number
            return at.key == at.key if found else at.key != at.key
        if found is None or (
            isinstance(found, (int, float, np.generic, np.ndarray)) and np.asarray(found).dtype != bool
        ):
            what = "None" if found is None else "a number"
            raise TypeError(
                f"masks: the function returns {what}; it must return a bool, whether the query sees the key."
            )
        return found

    def parts(self) -> tuple[Any, ...]:
        return self.function, *self.arrays


def causal() -> Mask:
    """A query sees the keys up to its own position, as with ``causal=True``.

    Returns
    -------
    Mask

    Examples
    --------
    >>> from cufa import masks
    >>> print(masks.causal().draw(2, 4))
           j 0 1 2 3
       i 0   # # # .
       i 1   # # # #
    """
    return Causal()


def sliding_window(left: int | None, right: int | None) -> Mask:
    """A query sees the keys from `left` before its own position to `right` behind it, as with `window_size`.

    Parameters
    ----------
    left, right : int or None
        None (or -1) is unbounded.

    Returns
    -------
    Mask

    Examples
    --------
    >>> from cufa import masks
    >>> print(masks.sliding_window(1, 0).draw(3, 3))
           j 0 1 2
       i 0   # . .
       i 1   # # .
       i 2   . # #
    """
    sides = {"left": left, "right": right}
    given = (
        None if side is None or side == -1 else _size("sliding_window", name, side, 0) for name, side in sides.items()
    )
    return SlidingWindow(*given)


def chunked(size: int) -> Mask:
    """A query sees the keys of its own chunk of so many positions, the first of which begins with the first key.

    Parameters
    ----------
    size : int

    Returns
    -------
    Mask

    Examples
    --------
    >>> from cufa import masks
    >>> print((masks.chunked(2) & masks.causal()).draw(4, 4))
           j 0 1 2 3
       i 0   # . . .
       i 1   # # . .
       i 2   . . # .
       i 3   . . # #
    """
    return Chunked(_size("chunked", "size", size))


def dilated(step: int) -> Mask:
    """A query sees every `step`-th key, counted from its own position both ways.

    Parameters
    ----------
    step : int

    Returns
    -------
    Mask

    Examples
    --------
    >>> from cufa import masks
    >>> print((masks.dilated(2) & masks.causal()).draw(3, 3))
           j 0 1 2
       i 0   # . .
       i 1   . # .
       i 2   # . #
    """
    return Dilated(_size("dilated", "step", step))


def prefix_lm(prefix_lengths: Any) -> Mask:
    """A query sees the keys up to its own position, and all those of its sequence's prefix.

    Parameters
    ----------
    prefix_lengths : int or int array, (batch,)
        Keys of the prefix, of all sequences or of each. An array's values are read at once.

    Returns
    -------
    Mask

    Examples
    --------
    >>> from cufa import masks
    >>> print(masks.prefix_lm(2).draw(3, 3))
           j 0 1 2
       i 0   # # .
       i 1   # # .
       i 2   # # #
    """
    lengths = np.atleast_1d(integers("prefix_lm", "prefix_lengths", prefix_lengths, 0, 1))
    if lengths.size == 0 or lengths.min() < 0:
        raise ArgumentError("masks.prefix_lm: prefix_lengths must be at least one, and none of them negative.")
    return PrefixLm(lengths)


def document(ids: Any = None, *, offsets: Any = None) -> Mask:
    """A query sees the keys of its own document.

    Parameters
    ----------
    ids : int array, (seqlen_k,) or (batch, seqlen_k)
        Which document each key's position is of. What is below 0, or beyond the array, is of none, and sees and is
        seen by nobody.
    offsets : int array, (documents + 1,)
        In its place: document d has the positions from ``offsets[d]`` on that are less than ``offsets[d + 1]``.

    Returns
    -------
    Mask

    Examples
    --------
    >>> from cufa import masks
    >>> print((masks.document(offsets=[0, 2, 3]) & masks.causal()).draw(3, 3))
           j 0 1 2
       i 0   # . .
       i 1   # # .
       i 2   . . #
    """
    if (ids is None) == (offsets is None):
        raise TypeError("masks.document: pass either ids or offsets.")
    if ids is not None:
        return Document(np.atleast_2d(integers("document", "ids", ids, 1, 2)), "ids")
    given = integers("document", "offsets", offsets, 1)
    if given.size == 0 or given[0] < 0 or (np.diff(given) < 0).any():
        raise ArgumentError("masks.document: offsets must begin with 0 or more, and not decrease.")
    labels = np.full((1, given[-1]), -1, np.int32)
    labels[0, given[0] :] = np.repeat(np.arange(len(given) - 1), np.diff(given))
    return Document(labels, "offsets")


def image_ranges(ranges: Any) -> Mask:
    """A query sees the keys of its own range, before and behind it; outside of all ranges it sees none.

    ``causal() | image_ranges(r)`` is what a model of text and images asks for.

    Parameters
    ----------
    ranges : int array, (n, 2) or (batch, n, 2)
        The (start, end) of ranges of positions, the end exclusive. One whose end is its start, or less, is none. The
        values are read at once.

    Returns
    -------
    Mask

    Raises
    ------
    ValueError
        If a range begins before 0, or two of a sequence overlap.

    Examples
    --------
    >>> from cufa import masks
    >>> print((masks.causal() | masks.image_ranges([[1, 3]])).draw(4, 4))
           j 0 1 2 3
       i 0   # . . .
       i 1   # # # .
       i 2   # # # .
       i 3   # # # #
    """
    given = integers("image_ranges", "ranges", ranges, 2, 3)
    if given.shape[-1] != 2:
        raise ArgumentError(f"masks.image_ranges: ranges has shape {given.shape}; (n, 2) or (batch, n, 2) is expected.")
    sequences = given[None] if given.ndim == 2 else given
    labels = np.full((len(sequences), max(0, given[..., 1].max(initial=0))), -1, np.int32)
    for row, pairs in zip(labels, sequences, strict=True):
        for number, (start, end) in enumerate(pairs.tolist()):
            if start >= end:
                continue
            if start < 0:
                raise ArgumentError(f"masks.image_ranges: a range begins at {start}; ranges begin at 0 or later.")
            if (row[start:end] >= 0).any():
                raise ArgumentError(
                    f"masks.image_ranges: the range ({start}, {end}) overlaps another of its sequence; join the two."
                )
            row[start:end] = number
    return Document(labels, "ranges", "image_ranges")


def global_tokens(tokens: int | Sequence[int]) -> Mask:
    """Some positions see, and are seen by, all others; the others see these alone.

    Parameters
    ----------
    tokens : int or sequence of int
        How many of the first positions, or which.

    Returns
    -------
    Mask

    Examples
    --------
    >>> from cufa import masks
    >>> print((masks.global_tokens([2]) | masks.sliding_window(0, 0)).draw(4, 4))
           j 0 1 2 3
       i 0   # . # .
       i 1   . # # .
       i 2   # # # #
       i 3   . . # #
    """
    given = integers("global_tokens", "tokens", tokens, 0, 1)
    which = np.arange(int(given)) if given.ndim == 0 else given
    if given.min(initial=0) < 0:
        raise ArgumentError("masks.global_tokens: tokens must not be negative.")
    labels = np.full((1, which.max(initial=-1) + 1), -1, np.int32)
    labels[0, which] = 0
    return GlobalTokens(labels, "tokens")


def from_array(array: Any) -> Mask:
    """A query sees the keys for which an array holds True. It is for sequences of one length, and not for packed ones.

    Parameters
    ----------
    array : bool array, (batch, heads, seqlen_q, seqlen_k)
        Of any framework; any axis may be 1, which serves all, and the first may be missing. Its values are read at
        once.

    Returns
    -------
    Mask

    Examples
    --------
    >>> import numpy as np
    >>> from cufa import masks
    >>> print(masks.from_array(np.eye(2, 3, dtype=bool)).draw(2, 3))
           j 0 1 2
       i 0   # . .
       i 1   . # .
    """
    given = to_numpy(array)
    if given.dtype != bool or not 2 <= given.ndim <= 4:
        raise ArgumentError(
            f"masks.from_array: the array has dtype {given.dtype} and shape {given.shape}; booleans of 2 to 4 "
            "dimensions are expected."
        )
    return FromArray(given.reshape((1,) * (4 - given.ndim) + given.shape))


def from_function(function: Callable[..., Any], *arrays: Any) -> Mask:
    """A query sees the keys for which a function gives True.

    Parameters
    ----------
    function : callable
        ``function(batch, head, query, key, *arrays)``, of operators on arrays of integers: `query` and `key` are the
        sequence's own numbers.
    *arrays : array
        What it reads, integers as int32. Their values are read at once.

    Returns
    -------
    Mask

    Examples
    --------
    >>> from cufa import masks
    >>> print(masks.from_function(lambda batch, head, query, key: key % 2 == 0).draw(1, 4))
           j 0 1 2 3
       i 0   # . # .
    """
    if not callable(function):
        raise TypeError(f"masks.from_function: function is a {type(function).__name__}; pass a function.")
    found = [to_numpy(array) for array in arrays]
    return FromFunction(
        function, tuple(as_int32("from_function", "an array", x) if x.dtype.kind in "iu" else x for x in found)
    )

"""Lists of the blocks of a mask, which kernels go over: `cufa.BlockMask`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._call.options import MAX_SEQLEN, integer
from ..errors import ArgumentError
from . import drawing
from .bounds import Blocks
from .host import copied, to_numpy
from .mask import Array, At, Mask, check_drawn, integers
from .shapes import FromFunction

EMPTY, PARTIAL, FULL = 0, 1, 2
"""Of which nothing is seen, of which something, and of which all."""

UNIT = 64
"""What the sides of blocks are multiples of: tiles of kernels divide it."""

WORD = 32
"""Keys of a word of bits."""

MAX_BOUND = 1 << 14
"""The longest side of blocks whose bounds are two halves of a word."""

TILES_AT_ONCE = 256
"""Tiles whose bounds are sought together: a few megabytes."""


class BlockMask:
    """A mask as lists of blocks: kernels skip the blocks of which nothing is seen, and mask those that are partly seen.

    It is made once, by `of`, `from_csr` or `from_coo`, and handed to ``mask=`` by as many calls as have its lengths.
    What is seen of partial blocks it keeps as bits, blocks that look alike once.

    Attributes
    ----------
    seqlen_q, seqlen_k : int
        Of the sequences that it is for.
    block_size : (int, int)
        Queries and keys of a block.
    shape : (int, int, int, int)
        Sequences, key heads, and blocks of queries and of keys. The first two are 1 where one list serves all.
    arrays : tuple of int32 array
        For each block of queries its blocks of keys, in increasing order, as ``2 · block``, plus 1 if all of it is
        seen; where these begin, (sequences, heads, blocks + 1); both for blocks of keys; which tile of bits each block
        has, (sequences, heads, blocks of queries, blocks of keys), -1 if all and -2 if nothing of it is seen; and the
        bits, (tiles, queries, keys / 32). Then the tile of each entry of the first list, and of the second; the blocks
        of queries, those of which most blocks are not empty first, (sequences, heads, blocks), and those of keys;
        for each block of keys its parts of 64 queries of which something is seen, as entries, where they begin, and
        their tiles; and bounds, (tiles, queries + keys): what is seen of each query's row, and of each key's column, as
        the first place and, 16 bits up, the place behind the last.
    longest : (int, int)
        Keys of the blocks that are not empty of a row of blocks that has most of them, and queries of such a column.
    bounded : bool
        Whether there are such bounds: what is seen of rows, and of columns, lies side by side in all partial blocks.

    See Also
    --------
    masks : Masks that say entry by entry what is seen.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> mask = cufa.BlockMask.of(cufa.masks.causal(), 1, 1, 256, 256, block_size=64)
    >>> mask
    BlockMask(256 × 256 in blocks of 64 × 64: 6 full, 4 partial, 6 empty)
    >>> print(mask.draw())
    = . . .
    # = . .
    # # = .
    # # # =
    """

    def __init__(
        self,
        kinds: NDArray[np.int8],
        tiles: NDArray[np.int32],
        bits: NDArray[np.int32],
        seqlen_q: int,
        seqlen_k: int,
        block_size: tuple[int, int],
    ) -> None:
        self.shape = kinds.shape
        self.seqlen_q, self.seqlen_k = seqlen_q, seqlen_k
        self.block_size = block_size
        self.kinds = kinds
        by_row, by_column = (int(np.count_nonzero(kinds, axis=axis).max(initial=0)) for axis in (3, 2))
        self.longest = by_row * block_size[1], by_column * block_size[0]
        bounds = _bounds(bits, _of_end(tiles, len(bits)), seqlen_q % block_size[0])
        self.bounded = bounds is not None
        if bounds is None:
            bounds = np.zeros((1, sum(block_size)), np.int32)
        by_entry = _of_entries(kinds, tiles), _of_entries(kinds.swapaxes(2, 3), tiles.swapaxes(2, 3))
        lists = *_listed(kinds), *_listed(kinds.swapaxes(2, 3))
        orders = _longest_first(kinds), _longest_first(kinds.swapaxes(2, 3))
        parts = _parts(kinds.swapaxes(2, 3), tiles.swapaxes(2, 3), bits, seqlen_q)
        self._host: tuple[Array, ...] = (*lists, tiles, bits, *by_entry, *orders, *parts, bounds)
        self.arrays: tuple[Any, ...] = self._host

    @classmethod
    def of(
        cls,
        mask: Mask | Callable[..., Any],
        batch: int,
        heads: int,
        seqlen_q: int,
        seqlen_k: int,
        block_size: int | Sequence[int] = 128,
        *,
        like: Any = None,
    ) -> BlockMask:
        """The blocks of a mask. Entries are computed, in NumPy, of blocks that are not known to be full or empty.

        Of functions that are all blocks; of the others of `cufa.masks` those at edges, and of an array as many.

        Parameters
        ----------
        mask : Mask or callable
            One of `cufa.masks`, or a function of (batch, head, query, key).
        batch : int
            Sequences; 1 for a mask that is the same for all.
        heads : int
            Key heads; 1 for a mask that is the same for all. Query heads that share a key head see the same keys, and
            `head` is the number of the key head.
        seqlen_q, seqlen_k : int
        block_size : int or (int, int)
            Queries and keys of a block, multiples of 64. The kernels for Hopper want 128.
        like : array, optional
            The lists are in its framework and on its device; by default NumPy's.

        Returns
        -------
        BlockMask

        Raises
        ------
        ValueError
            If the sizes are no multiples of 64, or the mask is of other sequences or heads.
        """
        if not isinstance(mask, Mask):
            if not callable(mask):
                raise TypeError(
                    f"BlockMask.of: mask is a {type(mask).__name__}; pass one of cufa.masks, or a function."
                )
            mask = FromFunction(mask, ())
        size = _sides(block_size)
        batch, heads = (_extent("of", name, n, 1) for name, n in (("batch", batch), ("heads", heads)))
        seqlen_q, seqlen_k = _lengths("of", seqlen_q, seqlen_k)
        mask.check(batch, heads)
        mask.check_lengths(seqlen_q, seqlen_k)
        return cls._made(_Entries(mask, batch, heads, seqlen_q, seqlen_k, size), None).to(like)

    @classmethod
    def from_csr(
        cls,
        offsets: Any,
        blocks: Any,
        seqlen_q: int,
        seqlen_k: int,
        block_size: int | Sequence[int] = 128,
        *,
        mask: Mask | None = None,
        like: Any = None,
    ) -> BlockMask:
        """The blocks of keys that each block of queries sees, as compressed sparse rows.

        Parameters
        ----------
        offsets : int array, (query_blocks + 1,) or (batch, heads, query_blocks + 1)
            Where the blocks of keys of each block of queries begin in `blocks`, and end.
        blocks : int array, (entries,)
            Blocks of keys, in increasing order for each block of queries.
        seqlen_q, seqlen_k : int
        block_size : int or (int, int)
            As for `of`.
        mask : Mask, optional
            What is seen of the blocks; by default all.
        like : array, optional
            As for `of`.

        Returns
        -------
        BlockMask

        Raises
        ------
        ValueError
            If offsets decrease or lead out of `blocks`, or blocks are not there or do not increase.

        Examples
        --------
        >>> import cufa
        >>> print(cufa.BlockMask.from_csr([0, 1, 3], [0, 0, 2], 128, 192, 64).draw())
        # . .
        # . #
        """
        size = _sides(block_size)
        seqlen_q, seqlen_k = _lengths("from_csr", seqlen_q, seqlen_k)
        starts, columns = integers("from_csr", "offsets", offsets, 1, 3, room="BlockMask"), _flat("blocks", blocks)
        starts = starts.reshape((1,) * (3 - starts.ndim) + starts.shape)
        query_blocks, key_blocks = -(-seqlen_q // size[0]), -(-seqlen_k // size[1])
        if starts.shape[2] != query_blocks + 1:
            raise ArgumentError(
                f"BlockMask.from_csr: offsets has shape {starts.shape}; one more than the {query_blocks} blocks of "
                "queries are expected last."
            )
        if (np.diff(starts) < 0).any() or starts.min(initial=0) < 0 or starts.max(initial=0) > len(columns):
            raise ArgumentError(
                f"BlockMask.from_csr: offsets must not decrease, and lie between 0 and the {len(columns)} blocks."
            )
        counts = np.diff(starts).ravel()
        begins = starts[..., :-1].ravel()
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        chosen = columns[np.repeat(begins, counts) + within]
        rows = np.repeat(np.arange(len(counts)), counts)
        _check_places("from_csr", "blocks", chosen, key_blocks)
        if ((np.diff(chosen) <= 0) & (np.diff(rows) == 0)).any():
            raise ArgumentError("BlockMask.from_csr: the blocks of keys of a block of queries must increase.")
        listed = np.zeros((len(counts), key_blocks), bool)
        listed[rows, chosen] = True
        return cls._of_listed(
            "from_csr",
            listed.reshape(*starts.shape[:2], query_blocks, key_blocks),
            mask,
            seqlen_q,
            seqlen_k,
            size,
            like,
        )

    @classmethod
    def from_coo(
        cls,
        query_blocks: Any,
        key_blocks: Any,
        seqlen_q: int,
        seqlen_k: int,
        block_size: int | Sequence[int] = 128,
        *,
        mask: Mask | None = None,
        like: Any = None,
    ) -> BlockMask:
        """The same from pairs of blocks, in any order, for all sequences and heads.

        Parameters
        ----------
        query_blocks, key_blocks : int array, (entries,)
            Block ``query_blocks[n]`` of queries sees block ``key_blocks[n]`` of keys. No pair comes twice.
        seqlen_q, seqlen_k : int
        block_size : int or (int, int)
            As for `of`.
        mask : Mask, optional
            What is seen of the blocks; by default all.
        like : array, optional
            As for `of`.

        Returns
        -------
        BlockMask

        Raises
        ------
        ValueError
            If a block is not there, or a pair comes twice.

        Examples
        --------
        >>> import cufa
        >>> print(cufa.BlockMask.from_coo([1, 0, 1], [2, 0, 0], 128, 192, 64).draw())
        # . .
        # . #
        """
        size = _sides(block_size)
        seqlen_q, seqlen_k = _lengths("from_coo", seqlen_q, seqlen_k)
        rows, columns = _flat("query_blocks", query_blocks), _flat("key_blocks", key_blocks)
        if len(rows) != len(columns):
            raise ArgumentError(
                f"BlockMask.from_coo: query_blocks has {len(rows)} entries but key_blocks has {len(columns)}; they "
                "must agree."
            )
        listed = np.zeros((-(-seqlen_q // size[0]), -(-seqlen_k // size[1])), bool)
        _check_places("from_coo", "query_blocks", rows, listed.shape[0])
        _check_places("from_coo", "key_blocks", columns, listed.shape[1])
        listed[rows, columns] = True
        if np.count_nonzero(listed) < len(rows):
            raise ArgumentError("BlockMask.from_coo: a pair of blocks comes twice; pass each once.")
        return cls._of_listed("from_coo", listed[None, None], mask, seqlen_q, seqlen_k, size, like)

    @classmethod
    def _of_listed(
        cls,
        function: str,
        listed: NDArray[np.bool_],
        mask: Mask | None,
        seqlen_q: int,
        seqlen_k: int,
        size: tuple[int, int],
        like: Any,
    ) -> BlockMask:
        if mask is None:
            kinds = np.where(listed, FULL, EMPTY).astype(np.int8)
            return cls(kinds, *_full_tiles(kinds, size), seqlen_q, seqlen_k, size).to(like)
        if not isinstance(mask, Mask):
            raise TypeError(f"BlockMask.{function}: mask is a {type(mask).__name__}; pass one of cufa.masks.")
        batch, heads = listed.shape[:2]
        mask.check(batch, heads)
        mask.check_lengths(seqlen_q, seqlen_k)
        return cls._made(_Entries(mask, batch, heads, seqlen_q, seqlen_k, size), listed).to(like)

    @classmethod
    def _made(cls, entries: _Entries, listed: NDArray[np.bool_] | None) -> BlockMask:
        """Classify all blocks, or those that are listed; the others are empty."""
        rows, columns = size = entries.size
        query_blocks, key_blocks = -(-entries.seqlen_q // rows), -(-entries.seqlen_k // columns)
        batch, heads = entries.lists if listed is None else np.maximum(entries.lists, listed.shape[:2]).tolist()
        kinds = np.zeros((batch, heads, query_blocks, key_blocks), np.int8)
        tiles = np.full(kinds.shape, -2, np.int32)
        known: dict[bytes, int] = {}
        for block, sequence, head in np.ndindex(query_blocks, batch, heads):
            wanted = None if listed is None else listed[sequence % len(listed), head % listed.shape[1], block]
            kind, partial = entries.row(sequence, head, block, wanted)
            kinds[sequence, head, block] = kind
            tiles[sequence, head, block] = np.where(kind == FULL, -1, -2)
            for key_block, words in partial:
                tiles[sequence, head, block, key_block] = known.setdefault(words, len(known))
        bits = np.frombuffer(b"".join(known), "<i4").reshape(-1, rows, columns // WORD)
        bits = bits if len(bits) else np.zeros((1, rows, columns // WORD), np.int32)
        return cls(kinds, tiles, np.ascontiguousarray(bits, np.int32), entries.seqlen_q, entries.seqlen_k, size)

    def to(self, like: Any) -> BlockMask:
        """The same mask in the framework and on the device of an array.

        Parameters
        ----------
        like : array or None
            None is NumPy.

        Returns
        -------
        BlockMask
        """
        return self._copied(lambda array: copied(array, like))

    def _copied(self, copy: Callable[[Array], Any]) -> BlockMask:
        found = object.__new__(BlockMask)
        found.__dict__ |= self.__dict__ | {"arrays": tuple(map(copy, self._host))}
        return found

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many blocks are full, partial and empty, of all lists."""
        empty, partial, full = (int(np.count_nonzero(self.kinds == kind)) for kind in (EMPTY, PARTIAL, FULL))
        return full, partial, empty

    def dense(self, batch: int = 1, heads: int = 1) -> NDArray[np.bool_]:
        """The mask as an array.

        Parameters
        ----------
        batch, heads : int
            Sequences and key heads, where one list serves all.

        Returns
        -------
        bool array, (batch, heads, seqlen_q, seqlen_k)
        """
        rows, columns = self.block_size
        tiles, bits = self._host[4:6]
        unpacked = np.unpackbits(bits.view(np.uint8), axis=2, bitorder="little").astype(bool)
        query, key = np.arange(self.seqlen_q)[:, None], np.arange(self.seqlen_k)
        tile = tiles[:, :, query // rows, key // columns]
        seen = np.where(tile < 0, tile == -1, unpacked[np.maximum(tile, 0), query % rows, key % columns])
        shape = tuple(max(pair) for pair in zip((batch, heads), seen.shape[:2], strict=True))
        return np.broadcast_to(seen, (*shape, *seen.shape[2:])).copy()

    def draw(self, batch: int = 0, head: int = 0) -> str:
        """A line for each block of queries: ``#`` is full, ``=`` partial and ``.`` empty.

        Parameters
        ----------
        batch, head : int
            Whose blocks are drawn: a sequence and a key head.

        Returns
        -------
        str
        """
        sizes = self.shape[:2]
        check_drawn("BlockMask", sizes, batch, head)
        place = tuple(number if size > 1 else 0 for number, size in zip((batch, head), sizes, strict=True))
        return drawing.blocks(self.kinds[place])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockMask) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        tiles, bits = self._host[4:6]
        return self.seqlen_q, self.seqlen_k, self.block_size, self.shape, tiles.tobytes(), bits.tobytes()

    def __repr__(self) -> str:
        full, partial, empty = self.counts
        batch, heads, *_ = self.shape
        lists = f", {batch} × {heads} lists" if batch * heads > 1 else ""
        blocks = " × ".join(map(str, self.block_size))
        return (
            f"BlockMask({self.seqlen_q} × {self.seqlen_k} in blocks of {blocks}{lists}: {full} full, "
            f"{partial} partial, {empty} empty)"
        )


class _Entries:
    """What a mask says of rows of blocks. Only of blocks that its bounds leave open entries are computed, and of those
    that look alike once.

    `lists` are the sequences and heads that differ.
    """

    def __init__(self, mask: Mask, batch: int, heads: int, seqlen_q: int, seqlen_k: int, size: tuple[int, int]) -> None:
        self.mask, self.seqlen_q, self.seqlen_k, self.size = mask, seqlen_q, seqlen_k, size
        one = At.grid(batch, heads, range(1), 1, seqlen_k - seqlen_q)
        shape = np.shape(mask.seen(one, *mask.arrays)) if seqlen_q and seqlen_k else ()
        self.lists = ((1,) * 4 + shape)[-4:][:2]
        self._bounds: dict[int, tuple[NDArray[np.int8], NDArray[np.int64] | None]] = {}
        self._known: dict[tuple[int, int], tuple[int, bytes]] = {}

    def row(
        self, sequence: int, head: int, block: int, wanted: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int8], list[tuple[int, bytes]]]:
        """The kinds of a row's blocks, and the bits of those that are partial; what is not wanted is empty."""
        if sequence not in self._bounds:
            self._bounds[sequence] = self._bounds_of(sequence)
        kinds, alike = self._bounds[sequence]
        kind = kinds[block].copy()
        if wanted is not None:
            kind[~wanted] = EMPTY
        opened = np.flatnonzero(kind == PARTIAL)
        if alike is None:
            found = self._computed(sequence, head, block, opened)
        else:
            keys = [(sequence, each) for each in alike[block, opened].tolist()]
            new = {key: place for place, key in enumerate(keys) if key not in self._known}
            computed = self._computed(sequence, head, block, opened[list(new.values())])
            self._known.update(zip(new, computed, strict=True))
            found = [self._known[key] for key in keys]
        kind[opened] = [each for each, _ in found]
        return kind, [
            (place, bits) for place, (each, bits) in zip(opened.tolist(), found, strict=True) if each == PARTIAL
        ]

    def _bounds_of(self, sequence: int) -> tuple[NDArray[np.int8], NDArray[np.int64] | None]:
        """The kinds of all blocks, partial where entries must tell, and numbers of these, equal if they look alike."""
        rows, columns = self.size
        shape = -(-self.seqlen_q // rows), -(-self.seqlen_k // columns)
        kinds = np.full(shape, PARTIAL, np.int8)
        if 0 in shape:
            return kinds, None
        blocks = Blocks(sequence, self.seqlen_q, self.seqlen_k, rows, columns)
        whole, some = self.mask.bounds(blocks)
        kinds[np.broadcast_to(np.logical_not(some), shape)] = EMPTY
        kinds[np.broadcast_to(whole, shape)] = FULL
        numbers = self.mask.alike(blocks)
        if numbers is None:
            return kinds, None
        opened, alike = kinds == PARTIAL, np.zeros(shape, np.int64)
        live = self.seqlen_q - blocks.first_query, self.seqlen_k - blocks.first_key
        for each in (*numbers, *(np.minimum(x, side) for x, side in zip(live, self.size, strict=True))):
            _, own = np.unique(np.broadcast_to(each, shape)[opened], return_inverse=True)
            _, alike[opened] = np.unique(alike[opened] * (own.max(initial=0) + 1) + own, return_inverse=True)
        return kinds, alike

    def _computed(self, sequence: int, head: int, block: int, key_blocks: Array) -> list[tuple[int, bytes]]:
        """The kinds and bits of some of a row's blocks, from their entries."""
        if not len(key_blocks):
            return []
        rows, columns = self.size
        queries = range(block * rows, min((block + 1) * rows, self.seqlen_q))
        keys = (columns * key_blocks[:, None] + np.arange(columns)).ravel()
        last = self.seqlen_k - 1
        seen = self.mask.entries(
            sequence, head, queries, self.seqlen_q, self.seqlen_k, np.minimum(keys, last) if keys[-1] > last else keys
        )
        tiles = np.zeros((rows, len(key_blocks), columns), bool)
        tiles[: len(queries)] = seen.reshape(len(queries), -1, columns)
        lengths = np.minimum(columns, self.seqlen_k - columns * key_blocks)
        for place in np.flatnonzero(lengths < columns).tolist():
            tiles[:, place, lengths[place] :] = False
        counts = np.count_nonzero(tiles, axis=(0, 2))
        kinds = np.where(counts == 0, EMPTY, np.where(counts == len(queries) * lengths, FULL, PARTIAL)).tolist()
        tiles[len(queries) :] = True  # rows that hide all would be computed more carefully
        return [
            (kind, np.packbits(tiles[:, place], axis=1, bitorder="little").tobytes() if kind == PARTIAL else b"")
            for place, kind in enumerate(kinds)
        ]


def _listed(kinds: NDArray[np.int8]) -> tuple[Array, Array]:
    """Entries of the blocks of each row of blocks, and where they begin."""
    *_, found = places = np.nonzero(kinds)
    entries = (2 * found + (kinds[places] == FULL)).astype(np.int32)
    ends = np.cumsum(np.count_nonzero(kinds, axis=3)).reshape(kinds.shape[:3]).astype(np.int32)
    begins = np.zeros((*kinds.shape[:2], kinds.shape[2] + 1), np.int32)
    begins[..., 1:] = ends
    flat = begins.reshape(-1, begins.shape[2])
    flat[1:, 0] = flat[:-1, -1]
    # An array without elements has no address.
    return (entries if len(entries) else np.zeros(1, np.int32)), begins


def _longest_first(kinds: NDArray[np.int8]) -> Array:
    """Rows of blocks, those of the most blocks that are not empty first, for each sequence and head."""
    order = np.argsort(-np.count_nonzero(kinds, axis=3), axis=2, kind="stable").astype(np.int32)
    return order if order.size else np.zeros((*order.shape[:2], 1), np.int32)


def _of_entries(kinds: NDArray[np.int8], tiles: NDArray[np.int32]) -> Array:
    """The tile of each of the entries of `_listed`."""
    found = np.ascontiguousarray(tiles[np.nonzero(kinds)], np.int32)
    return found if len(found) else np.zeros(1, np.int32)


def _parts(
    kinds: NDArray[np.int8], tiles: NDArray[np.int32], bits: NDArray[np.int32], seqlen_q: int
) -> tuple[Array, Array, Array]:
    """For blocks of keys, by which kinds and tiles are given first, entries of the parts of `UNIT` queries of their
    blocks, where they begin, and their tiles: without those of which nothing is seen, and full where a part is."""
    parts = bits.shape[1] // UNIT
    place = np.arange(kinds.shape[3] * parts) % parts
    kinds, tiles = kinds.repeat(parts, axis=3), tiles.repeat(parts, axis=3)
    kinds[..., -(-seqlen_q // UNIT) :] = EMPTY
    partial = kinds == PARTIAL
    if partial.any():
        of_part = bits.reshape(len(bits), parts, -1)
        tile, place = tiles[partial], np.broadcast_to(place, kinds.shape)[partial]
        empty, full = (of_part == 0).all(axis=2)[tile, place], (of_part == -1).all(axis=2)[tile, place]
        kinds[partial] = np.where(empty, EMPTY, np.where(full, FULL, PARTIAL))
    return *_listed(kinds), _of_entries(kinds, np.where(kinds == FULL, -1, tiles))


def _of_end(tiles: NDArray[np.int32], count: int) -> NDArray[np.bool_]:
    """Which tiles only blocks of a sequence's last queries have."""
    of_end = np.zeros(count, bool)
    for some, at_end in ((tiles[:, :, -1:], True), (tiles[:, :, :-1], False)):
        of_end[some[some >= 0]] = at_end
    return of_end


def _bounds(bits: NDArray[np.int32], of_end: NDArray[np.bool_], live: int) -> Array | None:
    """Of each tile where what is seen of its rows, and then of its columns, begins and ends; None if some has gaps.

    Those that are `of_end` have so many rows that are live, or, if that is 0, all. The others count for no column.
    """
    rows, columns = bits.shape[1], WORD * bits.shape[2]
    if max(rows, columns) > MAX_BOUND:
        return None
    found = []
    for first_tile in range(0, len(bits), TILES_AT_ONCE):
        some = slice(first_tile, first_tile + TILES_AT_ONCE)
        seen = np.unpackbits(bits[some].view(np.uint8), axis=2, bitorder="little").astype(bool)
        live_rows = np.arange(rows) < np.where(of_end[some] & (live > 0), live, rows)[:, None]
        each = []
        for lines in (seen, (seen & live_rows[:, :, None]).swapaxes(1, 2)):
            counts, first = np.count_nonzero(lines, axis=2), lines.argmax(2)
            end = np.where(counts > 0, lines.shape[2] - lines[:, :, ::-1].argmax(2), 0)
            if (end - first != counts).any():
                return None
            each.append(first | end << 16)
        found.append(np.concatenate(each, axis=1))
    return np.concatenate(found).astype(np.int32)


def _full_tiles(kinds: NDArray[np.int8], size: tuple[int, int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return np.where(kinds == FULL, -1, -2).astype(np.int32), np.zeros((1, size[0], size[1] // WORD), np.int32)


def _sides(block_size: int | Sequence[int]) -> tuple[int, int]:
    sides = tuple(block_size) if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    try:
        found = tuple(map(operator.index, sides))
    except TypeError:
        found = ()
    if len(found) != 2 or any(side < UNIT or side % UNIT for side in found):
        raise ArgumentError(f"BlockMask: block_size is {block_size!r}; pass a multiple of {UNIT}, or two of them.")
    return found[0], found[1]


def _lengths(function: str, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    return _extent(function, "seqlen_q", seqlen_q, 0), _extent(function, "seqlen_k", seqlen_k, 0)


def _extent(function: str, name: str, given: int, least: int) -> int:
    value = integer(f"BlockMask.{function}", name, given)
    if not least <= value <= MAX_SEQLEN:
        raise ArgumentError(f"BlockMask.{function}: {name} is {value}; it must be from {least} to {MAX_SEQLEN}.")
    return value


def _flat(name: str, given: Any) -> Array:
    found = to_numpy(given)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ArgumentError(
            f"BlockMask: {name} has dtype {found.dtype} and shape {found.shape}; integers of one dimension are "
            "expected."
        )
    return found.astype(np.int64)


def _check_places(function: str, name: str, given: Array, count: int) -> None:
    if given.size and not 0 <= given.min() <= given.max() < count:
        wrong = given[(given < 0) | (given >= count)][0]
        raise ArgumentError(f"BlockMask.{function}: {name} holds {wrong}; there are {count} such blocks, from 0 on.")

"""`cufa.PagedBatch`: block table and lengths of a step, on the device."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArgumentError
from .sequence import PagedSequence

if TYPE_CHECKING:
    from .cache import PagedKVCache

_UNSET, _PADDING = -1, -2
"""Versions of table rows that are no sequence's."""


class PagedBatch:
    """Block table and lengths of the sequences of a step, on the device: `PagedKVCache.batch` makes one.

    All of it lies in one array, which stays where it is, so that CUDA graphs may read it, and which `update` fills by
    one copy. With NumPy, and with torch on the CPU, the arrays are the host's own and nothing is copied.

    Attributes
    ----------
    cache_seqlens : array of shape (batch,)
        Keys in the cache, without those of the new tokens.
    cu_seqlens_q : array of shape (batch + 1,)
        Where each sequence's new tokens begin if those of all lie end to end, and their number.
    block_table : array of shape (batch, max_pages)
        The pages of each sequence. Entries behind a sequence's last page are of no meaning.
    sequences : tuple of PagedSequence
        What the batch was last updated with.
    num_tokens : int
        New tokens of all sequences.
    """

    def __init__(self, cache: PagedKVCache, max_batch: int, max_pages: int) -> None:
        self._cache = cache
        self._max_batch, self._max_pages = max_batch, max_pages
        offsets = _aligned(max_batch)
        rows = _aligned(offsets + max_batch + 1)
        host = np.zeros(rows + max_batch * max_pages, np.int32)
        self._host, self._mirror = host, cache._memory.mirror(host)
        self._first_row = rows
        self._parts = [slice(0, max_batch), slice(offsets, offsets + max_batch + 1), slice(rows, None)]
        self._lengths, self._offsets, table = (host[part] for part in self._parts)
        self._table = table.reshape(max_batch, max_pages)
        self._versions = [_UNSET] * max_batch
        self._rows = -1
        self.sequences: tuple[PagedSequence, ...] = ()
        self.num_tokens = 0
        self._trim(max_batch)

    def _trim(self, rows: int) -> None:
        """Let the arrays be those of so many sequences."""
        if rows != self._rows:
            lengths, offsets, table = (self._mirror[part] for part in self._parts)
            self.cache_seqlens, self.cu_seqlens_q = lengths[:rows], offsets[: rows + 1]
            self.block_table = table.reshape(self._max_batch, self._max_pages)[:rows]
            self._rows = rows

    def update(self, sequences: Iterable[PagedSequence], pad_to: int | None = None) -> PagedBatch:
        """Bring the arrays up to date for a step of these sequences, and copy what pages have to be copied.

        Everything is put into the caller's current stream, and nothing waits. A table that has not changed is not
        copied again, so a decoding step usually costs the copy of two short arrays.

        Parameters
        ----------
        sequences : iterable of PagedSequence
            Each once, at most `max_batch`, in the order of q's rows.
        pad_to : int, optional
            Batch of the arrays, if more than there are sequences, as a CUDA graph of a fixed batch wants. The others
            are empty: they have no key, no row of packed q, and pages that do not exist. So on a GPU what would be
            appended for them is dropped. On the CPU it is an error, except with `cu_seqlens_q`, when there is nothing.

        Returns
        -------
        PagedBatch
            The batch itself.

        Raises
        ------
        ValueError
            If a sequence is there twice, was freed, is another cache's or is too long for the batch, or if there are
            too many. Nothing has changed then.

        See Also
        --------
        cufa.PagedKVCache.batch : has an example.
        """
        rows = self._cache._checked("update", sequences)
        count = len(rows) if pad_to is None else operator.index(pad_to)
        if not len(rows) <= count <= self._max_batch:
            raise ArgumentError(
                f"PagedBatch.update: there are {len(rows)} sequences, to be padded to {count}, and the batch was made "
                f"for {self._max_batch}."
            )
        for sequence in rows:
            if len(sequence._pages) > self._max_pages:
                raise ArgumentError(
                    f"PagedBatch.update: a sequence has {len(sequence._pages)} pages and the batch was made for "
                    f"{self._max_pages}; make one with a larger max_seqlen."
                )
        self._cache._copy_pages()
        new = [len(sequence._tokens) - sequence._length for sequence in rows]
        for sequence, tokens in zip(rows, new, strict=True):
            sequence._tabled = tokens
        self.sequences, self.num_tokens = tuple(rows), sum(new)
        self._lengths[: len(rows)] = [sequence._length for sequence in rows]
        self._lengths[len(rows) : count] = 0
        self._offsets[1 : len(rows) + 1] = list(itertools.accumulate(new))
        self._offsets[len(rows) + 1 : count + 1] = self.num_tokens
        changed = 0  # rows up to the last one that did
        for row in range(count):
            version = rows[row]._version if row < len(rows) else _PADDING
            if self._versions[row] != version:
                self._versions[row] = version
                changed = row + 1
                if row < len(rows):
                    self._table[row, : len(rows[row]._pages)] = rows[row]._pages
                else:
                    self._table[row] = -1
        self._cache._memory.upload(self._mirror, self._host, self._first_row + changed * self._max_pages)
        self._trim(count)
        return self

    def __repr__(self) -> str:
        return f"<PagedBatch: {len(self.sequences)} sequences, {self.num_tokens} new tokens>"


def _aligned(count: int) -> int:
    """The next number of 32-bit elements that is whole 16-byte chunks."""
    return -(-count // 4) * 4

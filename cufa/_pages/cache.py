"""`cufa.PagedKVCache`: pages, and the sequences that are made of them."""

from __future__ import annotations

import hashlib
import itertools
import operator
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArgumentError, OutOfPagesError
from .batch import PagedBatch
from .memory import memory_of
from .pool import PagePool
from .sequence import PagedSequence


class PageStats(NamedTuple):
    """What `PagedKVCache.stats` counts.

    Attributes
    ----------
    num_pages, held, cached, free : int
        All pages, and how many are held by sequences, are held by none but may be found again, and hold nothing.
    evictions : int
        Cached pages that were taken for something else.
    copies : int
        Pages copied because several sequences held them when one of them went on.
    prompt_tokens, cached_tokens : int
        Tokens that `PagedKVCache.add_sequence` was given, and how many of them were found.
    """

    num_pages: int
    held: int
    cached: int
    free: int
    evictions: int
    copies: int
    prompt_tokens: int
    cached_tokens: int


class PagedKVCache:
    """Keys and values of many sequences, in pages that are given out as sequences grow, shared, and found again.

    The arrays are the caller's, on the GPU or the CPU; this is the bookkeeping on the host, in plain integers, O(1) for
    each operation and each page that it touches. It says where keys and values go; `cufa.attention_with_kvcache`
    writes them there. A step of a server is

    1. `append` the next tokens to each sequence: some of a prompt, or the one that was sampled;
    2. `PagedBatch.update`, then in every layer `cufa.attention_with_kvcache` with the batch's arrays;
    3. `commit`: the tokens are in the cache now, and pages that became full can be found by their content.

    Pages are shared wherever that cannot be seen: by a `fork` and its origin, and by sequences that begin with the same
    tokens. Who writes to a shared page gets a copy of it first.

    Parameters
    ----------
    k_caches, v_caches : sequence of array
        For each layer (num_pages, page_size, num_heads_k, head_dim) and (num_pages, page_size, num_heads_k,
        head_dim_v), NumPy, CuPy or torch arrays on one device, with any strides, of float16, bfloat16, float32 or (on
        the CPU) float64. Layers may differ in heads, head_dim and dtype.
    prefix_caching : bool, default True
        Whether full pages are found again by their tokens and all tokens before them.

    Attributes
    ----------
    k_caches, v_caches : tuple of array
    num_pages, page_size : int

    Raises
    ------
    ValueError
        If the arrays do not fit together.
    cufa.UnsupportedError
        For arrays that cannot be written in place, as JAX's.

    See Also
    --------
    PagedKVCache.empty : makes the arrays too.
    cufa.attention_with_kvcache : attention over the pages.

    Notes
    -----
    Nothing but the order of calls decides which page is given out, so caches in several processes, as for tensor
    parallelism, agree if they are called alike. An object must not be used by two threads at once.

    Pages are found by a BLAKE2b digest of their tokens and of all before them, 256 bits long, so that no prompt can be
    made to hit another one's pages. Give each tenant, adapter or image a `salt` where equal tokens do not mean equal
    keys, or must not be shared.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> cache = cufa.PagedKVCache.empty(
    ...     num_layers=2, num_pages=8, page_size=4, num_heads_k=1, head_dim=16, dtype="float32", xp=np
    ... )
    >>> prompt = [5, 3, 8, 8, 1, 2]
    >>> first = cache.add_sequence(prompt)
    >>> cache.append(first, prompt)
    >>> batch = cache.batch(max_batch=2, max_seqlen=16).update([first])
    >>> batch.cache_seqlens, batch.cu_seqlens_q, batch.block_table[:, :2]
    (array([0], dtype=int32), array([0, 6], dtype=int32), array([[0, 1]], dtype=int32))

    Here the model computes keys and values of the six tokens. Then a second request with that prompt finds the page
    that is full, and has two tokens to compute:

    >>> cache.commit([first])
    >>> second = cache.add_sequence(prompt)
    >>> second.length, second.pages
    (4, (0,))
    >>> cache.append(second, prompt[second.length :])
    >>> batch.update([second]).cache_seqlens, batch.num_tokens
    (array([4], dtype=int32), 2)
    >>> cache.commit([second])
    >>> cache.free(first)
    >>> cache.free(second)
    >>> cache.num_available_pages
    8
    """

    def __init__(self, k_caches: Sequence[Any], v_caches: Sequence[Any], *, prefix_caching: bool = True) -> None:
        self.k_caches, self.v_caches = tuple(k_caches), tuple(v_caches)
        self._memory, (self.num_pages, self.page_size) = memory_of("PagedKVCache", self.k_caches, self.v_caches)
        self._prefix_caching = bool(prefix_caching)
        self._pool = PagePool(self.num_pages)
        # Pages that the next update of a batch makes what others are, by the former. One that was given back meanwhile
        # does not matter: who has it now writes to it after that update.
        self._copies: dict[int, int] = {}
        self._count = self._prompt_tokens = self._cached_tokens = 0
        self._versions = itertools.count()
        self._epoch = 0

    @classmethod
    def empty(
        cls,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_heads_k: int,
        head_dim: int,
        dtype: Any,
        xp: Any,
        head_dim_v: int | None = None,
        device: Any = None,
        prefix_caching: bool = True,
    ) -> PagedKVCache:
        """A cache whose arrays ``xp.empty`` makes.

        Parameters
        ----------
        num_layers, num_pages, page_size, num_heads_k, head_dim : int
        dtype : dtype of `xp`
            As ``xp.empty`` takes it: ``torch.bfloat16``, ``"float16"``.
        xp : module
            ``numpy``, ``cupy`` or ``torch``.
        head_dim_v : int, optional
            That of the values, `head_dim` if not given.
        device : optional
            Handed on to ``xp.empty``, as torch takes it. CuPy's arrays are made on its current device.
        prefix_caching : bool, default True

        Returns
        -------
        PagedKVCache

        Examples
        --------
        >>> import numpy as np
        >>> import cufa
        >>> cache = cufa.PagedKVCache.empty(
        ...     num_layers=1, num_pages=64, page_size=16, num_heads_k=2, head_dim=64, dtype="float16", xp=np
        ... )
        >>> cache.k_caches[0].shape
        (64, 16, 2, 64)
        """
        place = {} if device is None else {"device": device}
        k_caches, v_caches = (
            [xp.empty((num_pages, page_size, num_heads_k, dim), dtype=dtype, **place) for _ in range(num_layers)]
            for dim in (head_dim, head_dim if head_dim_v is None else head_dim_v)
        )
        return cls(k_caches, v_caches, prefix_caching=prefix_caching)

    @property
    def num_available_pages(self) -> int:
        """Pages that can be given out: free ones, and cached ones, which are evicted for it."""
        return self._pool.available

    def stats(self) -> PageStats:
        """Count pages now, and what happened to them so far.

        Returns
        -------
        PageStats

        Examples
        --------
        >>> import numpy as np
        >>> import cufa
        >>> cache = cufa.PagedKVCache([np.zeros((8, 4, 1, 16))], [np.zeros((8, 4, 1, 16))])
        >>> cache.stats().free
        8
        """
        pool = self._pool
        return PageStats(
            pool.num_pages,
            pool.num_pages - pool.available,
            pool.cached,
            pool.free,
            pool.evictions,
            self._count,
            self._prompt_tokens,
            self._cached_tokens,
        )

    def batch(self, max_batch: int, max_seqlen: int) -> PagedBatch:
        """Device arrays for steps of up to `max_batch` sequences of up to `max_seqlen` tokens, reserved ones included.

        Make one and keep it: its arrays stay where they are. `max_seqlen` says how wide the block table is.

        Parameters
        ----------
        max_batch, max_seqlen : int

        Returns
        -------
        PagedBatch

        Examples
        --------
        >>> import numpy as np
        >>> import cufa
        >>> cache = cufa.PagedKVCache([np.zeros((8, 4, 1, 16))], [np.zeros((8, 4, 1, 16))])
        >>> batch = cache.batch(max_batch=4, max_seqlen=30)
        >>> sequence = cache.add_sequence()
        >>> cache.append(sequence, [1, 2, 3])
        >>> batch.update([sequence]).block_table.shape
        (1, 8)
        """
        max_batch, max_seqlen = operator.index(max_batch), operator.index(max_seqlen)
        if max_batch < 1 or max_seqlen < 1:
            raise ArgumentError(f"PagedKVCache.batch: {max_batch} sequences of {max_seqlen} tokens; pass at least 1.")
        return PagedBatch(self, max_batch, -(-max_seqlen // self.page_size))

    def add_sequence(self, tokens: Iterable[int] = (), *, salt: bytes = b"") -> PagedSequence:
        """A new sequence, which holds the pages that already have what the first tokens of a prompt need.

        What is left of the prompt, ``tokens[sequence.length:]``, is to be appended, all at once or in chunks. That is
        one token at least, since it takes a query to get a result.

        Parameters
        ----------
        tokens : iterable of int, optional
            The prompt, of which full pages are looked up.
        salt : bytes, optional
            Only pages of sequences with the same salt are found.

        Returns
        -------
        PagedSequence
            Of length 0 where nothing was found. It takes no page that was not cached or held.

        See Also
        --------
        PagedKVCache.append, PagedKVCache.free

        Examples
        --------
        See `cufa.PagedKVCache`.
        """
        ids = _ids("add_sequence", tokens)
        if not isinstance(salt, bytes):
            raise TypeError(f"PagedKVCache.add_sequence: salt is a {type(salt).__name__}; pass bytes.")
        root = hashlib.blake2b(salt + self._epoch.to_bytes(8, "little"), digest_size=32).digest()
        sequence = PagedSequence(self, root, array("q"))
        size = self.page_size
        for stop in range(size, len(ids) if self._prefix_caching else 0, size):
            digest = _digest(sequence._digests[-1], ids[stop - size : stop])
            page = self._pool.find(digest)
            if page is None:
                break
            self._pool.hold(page)
            sequence._pages.append(page)
            sequence._digests.append(digest)
        sequence._length = len(sequence._pages) * size
        sequence._tokens = ids[: sequence._length]
        sequence._version = next(self._versions)
        self._prompt_tokens += len(ids)
        self._cached_tokens += sequence._length
        return sequence

    def append(self, sequence: PagedSequence, tokens: Iterable[int]) -> None:
        """Append tokens, whose keys and values the next step will compute, and make room for them.

        Parameters
        ----------
        sequence : PagedSequence
        tokens : iterable of int
            Their ids; in `num_new_tokens` they add up with what was appended since the last `commit`.

        Raises
        ------
        cufa.OutOfPagesError
            If there are too few pages. Nothing has changed then: free or truncate a sequence, and try again.

        See Also
        --------
        PagedKVCache.reserve : makes room only.
        PagedKVCache.pages_needed : tells beforehand.

        Examples
        --------
        See `cufa.PagedKVCache`.
        """
        ids = _ids("append", tokens)
        self._make_room("append", sequence, len(ids))
        sequence._tokens.extend(ids)

    def reserve(self, sequence: PagedSequence, num_tokens: int) -> None:
        """Make room for tokens that will be appended later, so that this cannot fail and changes no table then.

        Reserved pages are the sequence's until `truncate` or `free`; a `fork` does not share them.

        Parameters
        ----------
        sequence : PagedSequence
        num_tokens : int
            Behind those appended already.

        Raises
        ------
        cufa.OutOfPagesError
            If there are too few pages. Nothing has changed then.

        Examples
        --------
        >>> import numpy as np
        >>> import cufa
        >>> cache = cufa.PagedKVCache([np.zeros((8, 4, 1, 16))], [np.zeros((8, 4, 1, 16))])
        >>> sequence = cache.add_sequence()
        >>> cache.reserve(sequence, 9)
        >>> sequence.length, sequence.pages
        (0, (0, 1, 2))
        """
        self._make_room("reserve", sequence, num_tokens)

    def pages_needed(self, sequence: PagedSequence, num_tokens: int) -> int:
        """How many pages `append` or `reserve` of so many tokens would take now.

        Parameters
        ----------
        sequence : PagedSequence
        num_tokens : int

        Returns
        -------
        int
            To be compared with `num_available_pages`.

        Examples
        --------
        >>> import numpy as np
        >>> import cufa
        >>> cache = cufa.PagedKVCache([np.zeros((8, 4, 1, 16))], [np.zeros((8, 4, 1, 16))])
        >>> cache.pages_needed(cache.add_sequence(), 5)
        2
        """
        self._check("pages_needed", sequence)
        stop = len(sequence._tokens) + _count("pages_needed", num_tokens)
        return max(-(-stop // self.page_size) - len(sequence._pages), 0) + self._needs_copy(sequence, stop)

    def _needs_copy(self, sequence: PagedSequence, stop: int) -> bool:
        """Whether positions up to `stop` begin inside of a page that others hold too."""
        page, row = divmod(sequence._length, self.page_size)
        return row > 0 and stop > sequence._length and self._pool.shared(sequence._pages[page])

    def _make_room(self, function: str, sequence: PagedSequence, num_tokens: int) -> None:
        """Let the pages behind the sequence's length be its own, for so many tokens more than it has."""
        self._check(function, sequence)
        pool, pages = self._pool, sequence._pages
        num_tokens = _count(function, num_tokens)
        needed = self.pages_needed(sequence, num_tokens)
        if needed > pool.available:
            raise OutOfPagesError(
                f"PagedKVCache.{function}: {num_tokens} tokens need {needed} more pages, and {pool.available} of "
                f"{self.num_pages} are available; free or truncate a sequence."
            )
        stop = len(sequence._tokens) + num_tokens
        partial, row = divmod(sequence._length, self.page_size)
        if self._needs_copy(sequence, stop):
            source, page = pages[partial], pool.take()
            pool.release(source)
            self._copies[page] = self._copies.get(source, source)  # what is copied later is what `source` will be
            self._count += 1
            pages[partial] = page
            needed -= 1
            sequence._version = next(self._versions)
        elif row and stop > sequence._length:
            pool.forget(pages[partial])
        if needed:
            pages.extend(pool.take() for _ in range(needed))
            sequence._version = next(self._versions)

    def fork(self, sequence: PagedSequence) -> PagedSequence:
        """A second sequence with the same tokens, on the same pages: a beam, or another answer to one prompt.

        The first of the two that goes on within the last page, if it is not full, gets a copy of it.

        Parameters
        ----------
        sequence : PagedSequence
            Without new tokens: `commit` or `truncate` it first.

        Returns
        -------
        PagedSequence

        Examples
        --------
        >>> import numpy as np
        >>> import cufa
        >>> cache = cufa.PagedKVCache([np.zeros((8, 4, 1, 16))], [np.zeros((8, 4, 1, 16))])
        >>> batch = cache.batch(max_batch=2, max_seqlen=16)
        >>> origin = cache.add_sequence()
        >>> cache.append(origin, range(6))
        >>> batch = batch.update([origin])
        >>> cache.commit([origin])
        >>> fork = cache.fork(origin)
        >>> cache.append(fork, [7])
        >>> origin.pages, fork.pages
        ((0, 1), (0, 2))
        """
        self._check("fork", sequence)
        if sequence.num_new_tokens:
            raise ArgumentError(
                f"PagedKVCache.fork: the sequence has {sequence.num_new_tokens} tokens that are not in the cache yet; "
                "commit it after the step that computes them."
            )
        fork = PagedSequence(self, b"", sequence._tokens[:])
        fork._digests = sequence._digests[:]
        fork._pages = sequence._pages[: -(-sequence._length // self.page_size)]
        fork._version = next(self._versions)
        for page in fork._pages:
            self._pool.hold(page)
        return fork

    def truncate(self, sequence: PagedSequence, length: int) -> None:
        """Take back tokens, as a draft that was rejected, and give back the pages that are not needed any more.

        Tokens that were appended and not committed are taken back in any case, and so are reserved pages. So
        ``truncate(sequence, sequence.length)`` undoes an `append` whose step failed.

        Parameters
        ----------
        sequence : PagedSequence
        length : int
            At most that of the sequence.

        Examples
        --------
        >>> import numpy as np
        >>> import cufa
        >>> cache = cufa.PagedKVCache([np.zeros((8, 4, 1, 16))], [np.zeros((8, 4, 1, 16))])
        >>> sequence = cache.add_sequence()
        >>> cache.append(sequence, range(6))
        >>> cache.truncate(sequence, 0)
        >>> sequence.num_new_tokens, cache.num_available_pages
        (0, 8)
        """
        self._check("truncate", sequence)
        length = operator.index(length)
        if not 0 <= length <= sequence._length:
            raise ArgumentError(
                f"PagedKVCache.truncate: length is {length}, and {sequence._length} tokens are in the cache."
            )
        del sequence._tokens[length:]
        sequence._length = length
        sequence._tabled = 0
        del sequence._digests[length // self.page_size + 1 :]
        self._release(sequence, -(-length // self.page_size))

    def free(self, sequence: PagedSequence) -> None:
        """Give back all pages of a sequence, which cannot be used any more.

        Full pages stay cached until others are out, the last ones of a sequence least long, so that a prompt that was
        preempted, or is asked again, finds them.

        Parameters
        ----------
        sequence : PagedSequence

        Examples
        --------
        See `cufa.PagedKVCache`.
        """
        self._check("free", sequence)
        self._release(sequence, 0)
        sequence._cache = None

    def _release(self, sequence: PagedSequence, keep: int) -> None:
        """Give back all pages but the first `keep`, the last ones first."""
        pages = sequence._pages
        if len(pages) > keep:
            sequence._version = next(self._versions)
        for page in reversed(pages[keep:]):
            self._pool.release(page)
        del pages[keep:]

    def commit(self, sequences: Iterable[PagedSequence]) -> None:
        """Count the new tokens of sequences as being in the cache, since all launches that put them there are made.

        Pages that became full can be found by other sequences from now on, whose launches come later.

        Parameters
        ----------
        sequences : iterable of PagedSequence

        Raises
        ------
        ValueError
            If tokens were appended to one of them behind the last `PagedBatch.update`, so that no step has computed
            them. Nothing has changed then.

        Examples
        --------
        See `cufa.PagedKVCache`.
        """
        rows = self._checked("commit", sequences)
        for sequence in rows:
            if sequence._tabled != sequence.num_new_tokens:
                raise ArgumentError(
                    f"PagedKVCache.commit: a sequence has {sequence.num_new_tokens} new tokens, and a batch was last "
                    f"updated when it had {sequence._tabled}; update one, and compute the step, before."
                )
        size = self.page_size
        for sequence in rows:
            sequence._length = len(sequence._tokens)
            sequence._tabled = 0
            if self._prefix_caching:
                for page in range(len(sequence._digests) - 1, sequence._length // size):
                    digest = _digest(sequence._digests[-1], sequence._tokens[page * size : (page + 1) * size])
                    sequence._digests.append(digest)
                    self._pool.publish(sequence._pages[page], digest)

    def reset_prefix_cache(self) -> None:
        """Find nothing again of what was computed so far, nor what running sequences compute: weights have changed.

        Examples
        --------
        >>> import numpy as np
        >>> import cufa
        >>> cache = cufa.PagedKVCache([np.zeros((8, 4, 1, 16))], [np.zeros((8, 4, 1, 16))])
        >>> cache.reset_prefix_cache()
        >>> cache.stats().cached
        0
        """
        self._epoch += 1  # part of the digests that later sequences begin with
        self._pool.forget_all()

    def _copy_pages(self) -> None:
        """Copy the pages that sequences have had to leave to others, in all layers."""
        if self._copies:
            pages = np.array([list(self._copies), list(self._copies.values())])
            self._memory.copy_pages(self.k_caches + self.v_caches, pages)
            self._copies.clear()

    def _check(self, function: str, sequence: PagedSequence) -> None:
        """Check that a sequence is one of this cache's, and not freed."""
        if not isinstance(sequence, PagedSequence):
            raise TypeError(
                f"PagedKVCache.{function}: {type(sequence).__name__} is not a sequence; pass what add_sequence gives."
            )
        if sequence._cache is not self:
            why = "was freed" if sequence._cache is None else "is of another cache"
            raise ArgumentError(f"PagedKVCache.{function}: the sequence {why}.")

    def _checked(self, function: str, sequences: Iterable[PagedSequence]) -> list[PagedSequence]:
        """The sequences of a step, each of which must be there once."""
        rows = list(sequences)
        for sequence in rows:
            self._check(function, sequence)
        if len(set(map(id, rows))) != len(rows):
            raise ArgumentError(f"PagedKVCache.{function}: a sequence is there twice; its rows can be written once.")
        return rows

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"<PagedKVCache: {len(self.k_caches)} layers, {stats.num_pages} pages of {self.page_size}: "
            f"{stats.held} held, {stats.cached} cached, {stats.free} free>"
        )


def _count(function: str, num_tokens: int) -> int:
    if operator.index(num_tokens) < 0:
        raise ArgumentError(f"PagedKVCache.{function}: num_tokens is {num_tokens}; pass 0 or more.")
    return operator.index(num_tokens)


def _ids(function: str, tokens: Iterable[int]) -> array[int]:
    """Token ids as 64-bit integers, or an error that says that they are not."""
    try:
        return array("q", tokens)
    except (TypeError, OverflowError) as error:
        raise TypeError(f"PagedKVCache.{function}: tokens must be a sequence of 64-bit integers ({error}).") from None


def _digest(before: bytes, tokens: array[int]) -> bytes:
    """What stands for the tokens of a page and, by their digest, for all before them."""
    return hashlib.blake2b(before + tokens.tobytes(), digest_size=32).digest()

"""`cufa.PagedSequence`: what a cache knows of one sequence."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cache import PagedKVCache


class PagedSequence:
    """A sequence of a `PagedKVCache`, which makes it and does everything with it.

    Attributes
    ----------
    length : int
        Tokens whose keys and values are in the cache: `PagedKVCache.commit` makes it grow.
    num_new_tokens : int
        Tokens that were appended since, whose keys and values the next step computes.
    tokens : list of int
        All of them, new ones included.
    pages : tuple of int
        The pages that the sequence holds, in order; those behind the last token are reserved.
    """

    __slots__ = ("_cache", "_digests", "_length", "_pages", "_tabled", "_tokens", "_version")

    def __init__(self, cache: PagedKVCache, root: bytes, tokens: array[int]) -> None:
        self._cache: PagedKVCache | None = cache
        self._tokens = tokens
        self._length = len(tokens)
        self._pages = array("i")
        self._digests = [root]  # and, for each full page, one of all tokens up to its end
        self._version = 0  # another one whenever pages change, and no other sequence's
        self._tabled = 0  # how many new tokens there were when a batch was last updated with the sequence

    @property
    def length(self) -> int:
        return self._length

    @property
    def num_new_tokens(self) -> int:
        return len(self._tokens) - self._length

    @property
    def tokens(self) -> list[int]:
        return self._tokens.tolist()

    @property
    def pages(self) -> tuple[int, ...]:
        return tuple(self._pages)

    def __repr__(self) -> str:
        if self._cache is None:
            return "<PagedSequence: freed>"
        return f"<PagedSequence: {self._length} + {self.num_new_tokens} tokens on {len(self._pages)} pages>"

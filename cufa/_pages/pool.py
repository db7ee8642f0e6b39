"""Pages by number: how many sequences hold each, which are to be had, and what the full ones are known to hold."""

from __future__ import annotations

from collections import OrderedDict


class PagePool:
    """Pages 0 to num_pages - 1, each of which is in one of three states.

    *Held* by one sequence or more; *cached*, held by none but found by the digest of its content; or *free*. What is
    cached is had as well: where no page is free, the one that was released first is evicted.

    Every method is O(1).
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.evictions = 0
        self._holders = [0] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages
        self._by_digest: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """How many pages `take` would give."""
        return len(self._free) + len(self._cached)

    def take(self) -> int:
        """A page that nobody holds, whose content is forgotten; the caller has made sure that there is one."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self.forget(page)
            self.evictions += 1
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more sequence holds `page`, which is held or cached."""
        if not self._holders[page]:
            del self._cached[page]
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One sequence fewer holds `page`."""
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if self._digests[page] is None:
            self._free.append(page)
        else:
            self._cached[page] = None

    def shared(self, page: int) -> bool:
        """Whether several sequences hold `page`, so that none of them may write to it."""
        return self._holders[page] > 1

    def find(self, digest: bytes) -> int | None:
        """The page that holds what `digest` stands for."""
        return self._by_digest.get(digest)

    def publish(self, page: int, digest: bytes) -> None:
        """Let `page` be found by `digest`, unless another page is already."""
        if self._by_digest.setdefault(digest, page) == page:
            self._digests[page] = digest

    def forget(self, page: int) -> None:
        """Let `page`, which is held or about to be, not be found any more: it will hold something else."""
        digest = self._digests[page]
        if digest is not None:
            del self._by_digest[digest]
            self._digests[page] = None

    def forget_all(self) -> None:
        """Let no page be found any more."""
        self._by_digest.clear()
        self._digests = [None] * self.num_pages
        self._free.extend(reversed(self._cached))
        self._cached.clear()

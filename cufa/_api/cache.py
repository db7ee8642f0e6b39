"""`cufa.cache`: the compiled kernels on disk."""

from __future__ import annotations

from pathlib import Path

from .._compile import jit as _jit
from .._compile.cache import Stats as CacheStats


class Cache:
    """The store of compiled kernels, which `cufa.cache` is. The ``CUFA_CACHE*`` variables describe it.

    Nothing here is needed to use cufa: entries are made by calls, found by the digest of all that went into them, and
    evicted when they take more than ``CUFA_CACHE_MAX_SIZE``. Trouble with the disk never fails a call.

    Examples
    --------
    >>> import cufa
    >>> cufa.cache.stats().entries >= 0
    True
    >>> cufa.cache.verify()
    []
    """

    @property
    def path(self) -> Path | None:
        """Directory of the kernels, which need not exist yet; None if they stay in memory.

        Examples
        --------
        >>> import cufa
        >>> cufa.cache.path == cufa.cache.path
        True
        """
        return _jit.cache().path

    @property
    def state(self) -> str:
        """Where kernels are kept and, if not on disk, why: one sentence.

        Examples
        --------
        >>> import cufa
        >>> isinstance(cufa.cache.state, str)
        True
        """
        return _jit.cache().state()

    def stats(self) -> CacheStats:
        """Count what is on disk now, and what happened in this process.

        Returns
        -------
        CacheStats
            `entries` and `size` are on disk, `max_size` is their limit, and `in_memory`, `hits`, `misses`, `writes`,
            `damaged`, `evicted` and `waited` are counts of this process. Sizes are in bytes.

        Examples
        --------
        >>> import cufa
        >>> stats = cufa.cache.stats()
        >>> stats.size <= stats.max_size
        True
        """
        return _jit.cache().stats()

    def clear(self) -> int:
        """Remove all kernels, which are compiled again when they are needed.

        What is loaded stays so, and the second directory (``CUFA_CACHE_READONLY_DIR``) is left alone.

        Returns
        -------
        int
            How many there were.

        Examples
        --------
        >>> import cufa
        >>> cufa.cache.clear()  # doctest: +SKIP
        12
        """
        return _jit.cache().clear()

    def prune(self, max_size: int | None = None) -> int:
        """Remove what killed processes have left, and the least recently used kernels beyond a size.

        Parameters
        ----------
        max_size : int, optional
            Most bytes to keep, ``CUFA_CACHE_MAX_SIZE`` if not given. Calls keep to that one afterwards.

        Returns
        -------
        int
            How many kernels went.

        Examples
        --------
        >>> import cufa
        >>> cufa.cache.prune(1 << 40)
        0
        """
        if max_size is not None and max_size < 0:
            raise ValueError(f"cache.prune: max_size is {max_size}; pass a number of bytes.")
        return _jit.cache().prune(max_size)

    def verify(self) -> list[Path]:
        """Read every kernel on disk and remove the damaged ones, which every reader would refuse.

        Returns
        -------
        list of Path
            Where those were.

        Examples
        --------
        >>> import cufa
        >>> cufa.cache.verify()
        []
        """
        return _jit.cache().verify()

    def __repr__(self) -> str:
        return f"<cufa.cache: {self.path or 'in memory'}>"


cache = Cache()

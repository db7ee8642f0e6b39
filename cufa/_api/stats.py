"""What ran, which kernels that took, and what did not run on cufa."""

from __future__ import annotations

from dataclasses import dataclass

from .._driver import counts as _counts


@dataclass(frozen=True)
class Stats:
    """Counts of launches, kernels, and calls that were handed on. ``str()`` gives them as a report.

    Attributes
    ----------
    launches : dict of str to int
        By kernel and specialisation, the most frequent first; gradients, which launch several, are one. Calls with
        arrays in host memory count as ``cpu``.
    handed_on : dict of str to int
        By reason: calls of torch's own attention that `cufa.torch` left to torch. What begins with ``refused:`` is an
        error of cufa's checks, with N in place of numbers.
    kernels : dict of str to int
        How many kernels were ``compiled``, taken from the cache (``cached``) or from a bundle (``bundled``), and
        ``loaded`` onto a GPU. Where none of them grows, no call had to wait for a kernel.
    """

    launches: dict[str, int]
    handed_on: dict[str, int]
    kernels: dict[str, int]

    def __str__(self) -> str:
        lines = [f"kernels: {', '.join(f'{count} {what}' for what, count in self.kernels.items())}"]
        for title, counts in (("launches", self.launches), ("handed on to torch", self.handed_on)):
            lines.append(f"{title}: {sum(counts.values())}")
            width = max(map(len, map(str, counts.values())), default=0)
            lines += [f"  {count:>{width}}  {name}" for name, count in counts.items()]
        return "\n".join(lines)


def stats(*, reset: bool = False) -> Stats:
    """Say which kernels were launched how often, and which calls of torch were handed on to it.

    Parameters
    ----------
    reset : bool
        Begin again from 0 afterwards.

    Returns
    -------
    Stats
        Of this process and all its threads, since it started or since the last reset. What replays of a CUDA graph
        launch nobody counts.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> before = cufa.stats(reset=True)
    >>> q = np.zeros((1, 16, 2, 64), np.float32)
    >>> out = cufa.attention(q, q, q)
    >>> print(cufa.stats())
    kernels: 0 compiled, 0 cached, 0 bundled, 0 loaded
    launches: 1
      1  cpu (attention)
    handed on to torch: 0
    """
    kernels = dict.fromkeys(("compiled", "cached", "bundled", "loaded"), 0) | _counts.read("kernels", reset)
    return Stats(_counts.read("launches", reset), _counts.read("handed on", reset), kernels)

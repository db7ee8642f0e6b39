"""Having kernels ready before they are needed: in the cache, or loaded onto a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from .._compile import jit as _jit
from .._driver import counts as _counts
from .._kernels import Plan


@dataclass(frozen=True)
class Warmed:
    """What a warm-up did. ``str()`` gives it as a sentence.

    Attributes
    ----------
    kernels : int
        Those that are ready now, of which so many were, in this process meanwhile:
    compiled, cached, bundled : int
        Compiled, or taken from the cache or a bundle.
    loaded : int
        Loaded onto a GPU.
    seconds : float
    """

    kernels: int
    compiled: int
    cached: int
    bundled: int
    loaded: int
    seconds: float

    def __str__(self) -> str:
        came = f"{self.compiled} compiled, {self.cached} from the cache, {self.bundled} from bundles"
        return f"{self.kernels} kernels are ready after {self.seconds:.1f} s: {came}, {self.loaded} loaded"


def warm(
    plans: Sequence[tuple[Plan, int | None]],
    jobs: int,
    watched: Callable[[Iterable[Plan]], Iterable[Plan]] = iter,
) -> Warmed:
    """Have the kernel of each plan loaded on its GPU, by ordinal, or in the cache where that is None.

    Threads do it, since the compiler and the driver leave Python to others while they work.
    """
    began, before = time.perf_counter(), _counts.read("kernels")
    with contextlib.closing(_done(plans, jobs)) as done:  # so that it ends with the first that fails
        for _ in watched(done):
            pass
    after = _counts.read("kernels")
    counts = {name: after.get(name, 0) - before.get(name, 0) for name in ("compiled", "cached", "bundled", "loaded")}
    return Warmed(len(plans), seconds=time.perf_counter() - began, **counts)


def _done(plans: Sequence[tuple[Plan, int | None]], jobs: int) -> Generator[Plan, None, None]:
    pool = ThreadPoolExecutor(max(1, min(jobs, len(plans))), thread_name_prefix="cufa warm-up")
    try:
        futures = {pool.submit(_have, plan, device): plan for plan, device in plans}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _have(plan: Plan, device: int | None) -> None:
    with _jit.silently():
        if device is None:
            _jit.entry_of(_jit.unit_of(plan))
        elif not _jit.is_loaded(plan, device):
            _jit.load(plan, device)

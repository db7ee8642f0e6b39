"""Compiling many kernels ahead, in processes beside each other, into a bundle."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from .._compile import bundle as _bundle
from .._compile import jit as _jit
from .._compile.bundle import Item
from .._kernels import Plan
from ..errors import CompileError

MINIMUM_PER_PROCESS = 4
"""Kernels for which it pays to start a process, which takes about as long as one of them."""


class Made(NamedTuple):
    """What became of a plan: an item of a bundle, or why there is none; and whether the cache had it."""

    words: str
    item: Item | None
    cached: bool
    error: str = ""


class Built(NamedTuple):
    """A bundle: its kernels, those of them that the cache had, messages about what failed, and its size in bytes."""

    kernels: int
    cached: int
    failed: list[str]
    size: int
    seconds: float


def build(
    plans: Sequence[Plan],
    out: Path,
    *,
    archs: Sequence[int],
    preset: str | None = None,
    jobs: int | None = None,
    signer: Callable[[bytes], bytes] | None = None,
    keep_going: bool = False,
    watched: Callable[[Iterable[Made]], Iterable[Made]] = iter,
) -> Built:
    """Compile `plans` for GPUs of `archs` and write them to `out`, which is there at the end or not touched at all.

    `watched` may look at what is made as it comes.

    Raises
    ------
    CompileError
        If a kernel does not compile, unless `keep_going`; or if none does.
    """
    began = time.perf_counter()
    items: dict[tuple[str, str], Item] = {}
    failed, cached = [], 0
    with contextlib.closing(compiled(plans, jobs or cores())) as done:  # so that it ends with the first that fails
        for made in watched(done):
            if made.item is not None:
                items[made.item.key, made.item.target] = made.item
                cached += made.cached
            elif keep_going:
                failed.append(made.error)
            else:
                raise CompileError(made.error)
    if not items:
        raise CompileError(f"cufa: no kernel could be compiled; the first message is: {failed[0]}")
    ordered = [items[key] for key in sorted(items)]
    _bundle.write(out, ordered, archs=sorted({item.target for item in ordered}), preset=preset, signer=signer)
    return Built(len(ordered), cached, failed, out.stat().st_size, time.perf_counter() - began)


def compiled(plans: Sequence[Plan], jobs: int) -> Generator[Made, None, None]:
    """Compile plans in up to `jobs` processes, and yield what becomes of each as it is done.

    Processes and not threads, so that one which the compiler brings down takes none of the others with it, and so that
    what is under way can be given up at once. They are spawned: a fork would inherit the locks of NVRTC.
    """
    jobs = min(jobs, -(-len(plans) // MINIMUM_PER_PROCESS))
    if jobs <= 1:
        yield from map(make, plans)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_leave_interrupts_to_parent)
    try:
        # Those that take longest first, so that processes end together.
        futures = [pool.submit(make, plan) for plan in sorted(plans, key=_expected, reverse=True)]
        for future in as_completed(futures):
            yield future.result()
    except BrokenExecutor as error:
        raise CompileError(
            f"cufa: one of the {jobs} processes that compile has ended, as it does where memory runs out; compile in "
            "fewer with --jobs."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _expected(plan: Plan) -> int:
    """How long compiling takes, very roughly: more functions take longer, and larger tiles."""
    return len(plan.entries) * 1000 + int(getattr(plan.config, "num_threads", 0))


def make(plan: Plan) -> Made:
    """The kernel of a plan from the cache, or else compiled, which the cache is not told of: a build fills no disk."""
    words = plan.words()
    try:
        unit = _jit.unit_of(plan)
        entry = _jit.cache().get(_jit.key_of(unit))
        cached = entry is not None
        with _jit.silently():
            entry = entry or _jit.compiled_entry(unit)
    except CompileError as error:
        return Made(words, None, False, str(error))
    meta = {**entry.meta, "config": plain(plan)}
    return Made(words, Item(_jit.source_key(unit), _jit.target_of(unit), entry.cubin, meta), cached)


def plain(plan: Plan) -> dict[str, Any]:
    """The members of a plan's Config as JSON has them; score terms by name."""
    members: Mapping[str, Any] = vars(plan.config)
    return {name: [each.name for each in value] if name == "variant" else value for name, value in members.items()}


def cores() -> int:
    """The processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def supported(archs: Iterable[int]) -> None:
    """Refuse compute capabilities that NVRTC does not compile for.

    Raises
    ------
    CompileError
    """
    found = _jit.nvrtc()
    for arch in archs:
        if arch not in found.archs:
            there = ", ".join(f"sm_{each}" for each in found.archs if each >= 80)
            version = "{}.{}".format(*found.version)
            raise CompileError(f"cufa: NVRTC {version} does not compile for sm_{arch}; it does for {there}.")

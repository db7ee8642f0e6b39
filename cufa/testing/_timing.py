"""How long a call takes: on the host's clock, or on the GPU's."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

FLUSH_BYTES = 256 << 20
"""Written between calls on a GPU, to push the arrays out of the L2 cache: more than any has."""


@dataclass(frozen=True)
class BenchResult:
    """Times of repeated calls, in seconds.

    Attributes
    ----------
    median, p10, p90 : float
        Percentiles of the time of one call.
    repeats : int
    """

    median: float
    p10: float
    p90: float
    repeats: int

    def __str__(self) -> str:
        scale, unit = (1, "s") if self.median >= 1 else (1e3, "ms") if self.median >= 1e-3 else (1e6, "µs")
        spread = f"p10 {self.p10 * scale:.4g}, p90 {self.p90 * scale:.4g}, {self.repeats} repeats"
        return f"{self.median * scale:.4g} {unit} ({spread})"


def bench(
    fn: Callable[[], object],
    *,
    like: Any = None,
    seconds: float = 0.5,
    min_repeats: int = 5,
    max_repeats: int = 500,
    flush_l2: bool = True,
    graph: bool = True,
) -> BenchResult:
    """Measure how long a call takes.

    Parameters
    ----------
    fn : callable
        Called without arguments. On a GPU it must use the framework's current stream.
    like : array, optional
        One of the arrays at work, which says what clock to look at: of CuPy or torch and on a GPU, the GPU's
        time between two events; of JAX, the host's until the result is ready; anything else, the host's.
    seconds : float
        How long to measure, about.
    min_repeats, max_repeats : int
        Bounds of the number of calls, whatever `seconds` says.
    flush_l2 : bool
        GPU: push the arrays out of the L2 cache before each call.
    graph : bool
        GPU: replay the call as a CUDA graph, without the host's share, if it can be captured.

    Returns
    -------
    BenchResult

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.testing import bench
    >>> x = np.ones((64, 64))
    >>> result = bench(lambda: x @ x, like=x, seconds=0.01)
    >>> result.p10 <= result.median <= result.p90
    True
    """
    gpu = gpu_of(like)

    def repeats(one: float) -> int:
        return max(min(int(seconds / max(one, 1e-9)), max_repeats), min_repeats)

    times = _host_times(fn, like, repeats) if gpu is None else _gpu_times(fn, gpu, repeats, flush_l2, graph)
    p10, median, p90 = np.percentile(times, (10, 50, 90)).tolist()
    return BenchResult(median, p10, p90, len(times))


def _host_times(fn: Callable[[], object], like: Any, repeats: Callable[[float], int]) -> list[float]:
    jax = sys.modules.get("jax")
    wait = jax.block_until_ready if jax is not None and isinstance(like, jax.Array) else lambda result: None

    def once() -> float:
        start = time.perf_counter()
        wait(fn())
        return time.perf_counter() - start

    once()  # the first call compiles, fills caches and touches fresh memory
    return [once() for _ in range(repeats(once()))]


class Gpu(NamedTuple):
    """What timing asks of a framework, on the stream that `stream` makes current.

    `capture` makes a CUDA graph of a call, and raises what the call raises if it cannot be captured. `record` marks a
    moment, and `seconds` tells how far two are apart.
    """

    stream: Any
    synchronize: Callable[[], object]
    flush: Callable[[], object]
    capture: Callable[[Callable[[], object]], Callable[[], object]]
    record: Callable[[], Any]
    seconds: Callable[[Any, Any], float]


def _gpu_times(
    fn: Callable[[], object], gpu: Gpu, repeats: Callable[[float], int], flush: bool, graph: bool
) -> list[float]:
    def timed(call: Callable[[], object], count: int) -> list[float]:
        events = []
        for _ in range(count):
            if flush:
                gpu.flush()
            start = gpu.record()
            call()
            events.append((start, gpu.record()))
        gpu.synchronize()
        return [gpu.seconds(start, stop) for start, stop in events]

    with gpu.stream:
        fn()  # compiles, and fills the memory pool: neither may happen while a graph is captured
        fn()
        gpu.synchronize()
        call = fn
        if graph:
            with contextlib.suppress(Exception):  # what cannot be captured is measured as it is
                call = gpu.capture(fn)
        return timed(call, repeats(float(np.median(timed(call, 3)))))


def gpu_of(like: Any) -> Gpu | None:
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy is not None and isinstance(like, cupy.ndarray):
        return _cupy_gpu(cupy, like)
    if torch is not None and isinstance(like, torch.Tensor) and like.is_cuda:
        return _torch_gpu(torch, like)
    return None


def _cupy_gpu(cupy: Any, like: Any) -> Gpu:
    cupy.cuda.get_current_stream().synchronize()  # the arrays may still be in the making there
    with like.device:
        stream = cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be captured
        junk = cupy.empty(FLUSH_BYTES, dtype=np.uint8)

    def capture(fn: Callable[[], object]) -> Callable[[], object]:
        stream.begin_capture()
        try:
            kept = fn()
            graph = stream.end_capture()
        except Exception:
            if stream.is_capturing():
                stream.end_capture()
            raise

        def replay(_kept: Any = (fn, kept)) -> None:  # what fn holds, the graph has addresses of
            graph.launch(stream)

        return replay

    def seconds(start: Any, stop: Any) -> float:
        return float(cupy.cuda.get_elapsed_time(start, stop)) / 1e3

    return Gpu(stream, stream.synchronize, lambda: junk.fill(0), capture, stream.record, seconds)


def _torch_gpu(torch: Any, like: Any) -> Gpu:
    stream = torch.cuda.Stream(like.device)
    stream.wait_stream(torch.cuda.current_stream(like.device))
    junk = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=like.device)

    def capture(fn: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = fn()

        def replay(_kept: Any = (fn, kept)) -> None:  # what fn holds, the graph has addresses of
            graph.replay()

        return replay

    def record() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    return Gpu(
        torch.cuda.stream(stream),
        stream.synchronize,
        lambda: junk.zero_(),
        capture,
        record,
        lambda start, stop: start.elapsed_time(stop) / 1e3,
    )

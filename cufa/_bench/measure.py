"""Measuring cufa and its peers on a GPU, row by row, with the same inputs and by turns."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..testing import _timing
from .frameworks import Framework, difference, norms, results_of
from .peers import Call, Peer
from .reports import Results, Row

BACKWARD_WORK = 2.5
"""Five matrix products to the forward's two."""

MAX_ERROR = 0.01
"""What peers may differ by, relatively: about three times what rounding to bfloat16 makes of it."""

Say = Callable[[str], object]


def say_on_stdout(line: str) -> None:
    print(line, flush=True)


def take_turns(calls: Mapping[str, Call], gpu: _timing.Gpu, repeats: int = 30) -> dict[str, float]:
    """Median time of each call on the GPU, in seconds.

    The calls take turns, in an order that moves on by one every time: what heats the GPU, or follows one that did, is
    then the same for all. The L2 cache is flushed before each.
    """
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeats + 3):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gpu.flush()
            start = gpu.record()
            calls[name]()
            events[name].append((start, gpu.record()))
        gpu.synchronize()
    return {
        name: statistics.median(gpu.seconds(start, stop) for start, stop in pairs[3:]) for name, pairs in events.items()
    }


def back_to_back_seconds(fn: Call, calls: int = 20) -> float:
    """Least mean time of calls in a row: for JAX, whose stream other frameworks' events do not see."""
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(calls):
            out = fn()
        results_of(out)[-1].block_until_ready()
        best = min(best, (time.perf_counter() - began) / calls)
    return best


def host_seconds(fn: Call, synchronize: Callable[[], object], calls: int = 200, batches: int = 20) -> float:
    """Least mean time, over several batches of calls, until a call returns."""
    for _ in range(50):
        fn()
    synchronize()
    best = math.inf
    for _ in range(batches):
        began = time.perf_counter()
        for _ in range(calls):
            fn()
        best = min(best, (time.perf_counter() - began) / calls)
        synchronize()
    return best


def captured(fn: Call, gpu: _timing.Gpu, say: Say = say_on_stdout) -> Call | None:
    """`fn` as a CUDA graph, or None where it cannot be captured, which is said."""
    for _ in range(3):
        fn()
    try:
        return gpu.capture(fn)
    except Exception as reason:
        gpu.synchronize()
        say(f"# not captured: {type(reason).__name__}: {str(reason)[:120]}")
        return None


def matmul_ceiling(framework: Framework) -> float:
    """TFLOP/s of an 8192³ matrix product of 16-bit numbers."""
    gpu = framework.clock()
    with gpu.stream:
        a, b = (framework.random((8192, 8192), framework.matmul_dtype, seed) for seed in range(2))
        return 2 * 8192**3 / take_turns({"matmul": lambda: a @ b}, gpu)["matmul"] / 1e12


def compile_ahead(rows: list[Row], make: Peer, framework: Framework, *, backward: bool = False) -> None:
    """Let cufa compile what `rows` take side by side: in turn it would take longer than the measurements."""

    def call(row: Row) -> None:
        with contextlib.suppress(Exception):  # what fails, fails again where it is told
            make(framework, row, *framework.inputs(row, 0)[: 4 if backward else 3])()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(call, rows))
    framework.release()


def measure(
    rows: list[Row],
    peers: Mapping[str, Peer],
    framework: Framework,
    *,
    backward: bool = False,
    check_alone: Callable[..., None] | None = None,
    repeats: int = 30,
    say: Say = say_on_stdout,
) -> tuple[Results, set[tuple[Row, str]]]:
    """TFLOP/s of every peer on every row.

    Parameters
    ----------
    rows : list of Row
    peers : dict of str to Peer
        Each is given the framework, a row, q, k and v, for the backward dout too, and returns what is measured. What it
        returns in turn is compared. An ImportError leaves it out for good, a NotImplementedError on this row.
    framework : Framework
    backward : bool
        Whether the peers compute gradients.
    check_alone : callable, optional
        Given a dense row, its inputs and cufa's result where no peer has one to compare it with.
    repeats : int
    say : callable
        Is given a line for every row as soon as it is measured, and for what is left out.

    Returns
    -------
    results : dict
        Of each row, by peer.
    eager : set of (Row, str)
        What could not be captured.
    """
    gpu = framework.clock()
    work = BACKWARD_WORK if backward else 1.0
    dead: set[str] = set()
    eager: set[tuple[Row, str]] = set()
    results: Results = {}
    # autograd computes gradients on the stream of their forward: they are captured only if that is the captured one.
    with gpu.stream:
        for index, row in enumerate(rows):
            given = framework.inputs(row, index)[: 4 if backward else 3]
            calls: dict[str, Call] = {}
            foreign: dict[str, Call] = {}
            expected: tuple[Any, ...] | None = None
            checked = ""
            # cufa last: what it computes is held to what a peer does.
            for name in sorted((name for name in peers if name not in dead), key="cufa".__eq__):
                try:
                    fn = peers[name](framework, row, *given)
                    found = tuple(map(framework.view, results_of(fn())))
                    if not all(map(math.isfinite, norms(framework, found))):
                        raise ArithmeticError("the result is not finite")
                    if expected is not None:
                        error = difference(framework, found, expected)
                        if not error < MAX_ERROR:
                            raise ArithmeticError(f"differs by {error:.3g}")
                        if name == "cufa":
                            checked = f"  (cufa differs by {error:.1e})"
                    elif name == "cufa":
                        if check_alone is None or row.lengths is not None:
                            checked = "  (no peer to check cufa with)"
                        else:
                            check_alone(row, *given, *found)
                            checked = "  (cufa agrees with the float64 reference)"
                    expected = found if expected is None else expected
                    if hasattr(fn, "foreign"):
                        foreign[name] = fn
                        continue
                    graph = captured(fn, gpu, say)
                    calls[name] = graph or fn
                    if graph is None:
                        eager.add((row, name))
                except ImportError as reason:
                    say(f"# {name} left out: {reason}")
                    dead.add(name)
                except NotImplementedError:
                    pass
                except Exception as reason:
                    say(f"# {name} fails on {row}: {type(reason).__name__}: {str(reason)[:120]}")
            times = take_turns(calls, gpu, repeats) if calls else {}
            times |= {name: back_to_back_seconds(fn) for name, fn in foreign.items()}
            results[row] = {name: work * row.flop / times[name] / 1e12 for name in peers if name in times}
            shown = "  ".join(f"{name} {value:.0f}" for name, value in results[row].items())
            say(f"[{index + 1}/{len(rows)}] {row}: {shown}{checked}")
    return results, eager


def check_last_rows(row: Row, q: Any, k: Any, v: Any, out: Any, rows: int = 256) -> None:
    """Hold the last rows of one head of a dense forward to the reference."""
    from ..testing import assert_close

    keys = slice(None if row.window is None else -(rows + row.window), None)
    window = None if row.window is None else (row.window, None)
    q, out = q[:1, -rows:, :1], out[:1, -rows:, :1]
    assert_close(out, q, k[:1, keys, :1], v[:1, keys, :1], causal=row.causal, window_size=window)


def setting(framework: Framework) -> str:
    """When and with what a run is."""
    import datetime

    from .._api.config import show_config

    report = show_config("dicts")
    return (
        f"{datetime.date.today()}, driver {report['gpu']['driver']}, NVRTC {report['nvrtc']['version']}, "
        f"{framework.version()}"
    )


def conditions(framework: Framework, ceiling: float, dtype: str = "bfloat16") -> str:
    """When, with what and how a run of rows was measured."""
    return (
        f"{setting(framework)}. {dtype}, TFLOP/s, medians of CUDA-graph replays with the L2 flushed before each. "
        f"An 8192³ {framework.matmul_dtype} matrix product in the same run: {ceiling:.0f} TFLOP/s."
    )

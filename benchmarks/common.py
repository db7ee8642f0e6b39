"""What the benchmarks on a GPU share: command line, inputs, clocks and measurements."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from reports import BASELINE, COLORS, Results, Row, check_colors, ladder, plot, write_rows

import cufa
from cufa._call import problem as _problem

Call = Callable[[], Any]
Peer = Callable[..., Call]
BACKWARD_WORK = 2.5
"""Five matrix products to the forward's two."""

MAX_ERROR = 0.01
"""What peers may differ by, relatively: about three times what rounding to bfloat16 makes of it."""


def inputs(row: Row, seed: int) -> tuple[Any, Any, Any, Any]:
    """Random q, k, v and dout."""
    generator = torch.Generator("cuda").manual_seed(seed)
    dtype = getattr(torch, row.dtype)

    def tokens(seqlen: int) -> tuple[int, ...]:
        return (row.batch, seqlen) if row.lengths is None else (sum(row.lengths),)

    queries = (*tokens(row.seqlen), row.num_heads_q, row.head_dim)
    keys = (*tokens(row.seqlen_k or row.seqlen), row.num_heads_k, row.head_dim)
    q, k, v, dout = (
        torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in (queries, keys, keys, queries)
    )
    return q, k, v, dout


def offsets_of(lengths: tuple[int, ...]) -> Any:
    """Where packed sequences begin and end."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


# --- command line -----------------------------------------------------------------------------------


def command_line(description: str | None, peers: dict[str, Peer]) -> argparse.Namespace:
    """Parse what every benchmark takes, and take the peers that are not wanted out of `peers`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for table, rows and plot")
    parser.add_argument("--ladder", action="store_true", help="nothing but the ladder")
    parser.add_argument("--quick", action="store_true", help="only the ladder's shorter rows")
    parser.add_argument("--without", default="", help="names of peers to leave out, separated by commas")
    parser.add_argument("--only", default="", help="regular expression that a row's name must contain")
    parser.add_argument(
        "--kernel",
        choices=("best", "sm80"),
        default="best",
        help=f"sm80: the kernel that serves every GPU, on the ladder, beside {BASELINE} alone",
    )
    parser.add_argument("--cliffs", action="store_true", help="nothing but the rows of shapes that are easily slow")
    arguments = parser.parse_args()
    check_colors(peers)
    unwanted = set(filter(None, arguments.without.split(",")))
    for name in unwanted:
        if name not in COLORS or name == "cufa":
            parser.error(f"{name!r} is no peer; there are {', '.join(COLORS)}")
    if arguments.kernel == "sm80":
        arguments.ladder = True
        unwanted |= peers.keys() - {"cufa", BASELINE}
        # It is what serves inputs of which no tensor map can be made.
        _problem.has_tensor_map = lambda *_: False
    for name in unwanted & peers.keys():
        del peers[name]
    return arguments


def selected(arguments: argparse.Namespace, seqlens: Iterable[int], beside: Iterable[Row]) -> list[Row]:
    """The rows that the command line asks for, of the ladder with these lengths and of those `beside` it."""
    rows = ladder([seqlen for seqlen in seqlens if seqlen <= 2048 or not arguments.quick])
    if not (arguments.ladder or arguments.quick):
        rows += beside
    return [row for row in rows if re.search(arguments.only, str(row))]


def compile_ahead(rows: list[Row], make: Peer, *, backward: bool = False) -> None:
    """Let cufa compile what `rows` take side by side: in turn it would take longer than the measurements."""

    def call(row: Row) -> None:
        with contextlib.suppress(Exception):  # what fails, fails again where it is told
            make(row, *inputs(row, 0)[: 4 if backward else 3])()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(call, rows))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


# --- clocks -----------------------------------------------------------------------------------------


def start() -> float:
    """Leave the default stream, which cannot be captured, for good, and measure and tell the GPU's ceiling.

    autograd computes gradients on the stream of their forward: they are captured only if that is the captured one.
    """
    torch.cuda.set_stream(torch.cuda.Stream())
    ceiling = matmul_ceiling()
    print(f"# {torch.cuda.get_device_name()}, {conditions(ceiling)}", flush=True)
    return ceiling


def matmul_ceiling() -> float:
    """TFLOP/s of an 8192³ bfloat16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    return 2 * 8192**3 / gpu_seconds({"matmul": lambda: a @ b}, flush)["matmul"] / 1e12


def conditions(ceiling: float) -> str:
    """When and with what a run was."""
    report = cufa.show_config("dicts")
    return (
        f"{datetime.date.today()}, driver {report['gpu']['driver']}, NVRTC {report['nvrtc']['version']}, torch "
        f"{torch.__version__}. bfloat16, TFLOP/s, medians of CUDA-graph replays with the L2 flushed before each. "
        f"An 8192³ bfloat16 matrix product in the same run: {ceiling:.0f} TFLOP/s."
    )


def captured(fn: Call) -> Call | None:
    """`fn` as a CUDA graph, or None where it cannot be captured."""
    for _ in range(3):
        fn()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept = fn()
    except Exception as reason:
        torch.cuda.synchronize()
        print(f"# not captured: {type(reason).__name__}: {str(reason)[:120]}", flush=True)
        return None

    def replay(_kept: Any = (fn, kept)) -> None:  # what fn holds, the graph has addresses of
        graph.replay()

    return replay


def gpu_seconds(calls: dict[str, Call], flush: Any, repeats: int = 30) -> dict[str, float]:
    """Median time of each call on the GPU.

    The calls take turns, in an order that moves on by one every time: what heats the GPU, or follows one that did, is
    then the same for all.
    """
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeats + 3):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            calls[name]()
            stop.record()
            events[name].append((start, stop))
        torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(stop) for start, stop in pairs[3:]) / 1e3
        for name, pairs in events.items()
    }


def back_to_back_seconds(fn: Call, calls: int = 20) -> float:
    """Least mean time of calls in a row: for a framework whose stream torch's events do not see."""
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(calls):
            out = fn()
        results_of(out)[-1].block_until_ready()
        best = min(best, (time.perf_counter() - began) / calls)
    return best


# --- measurements -----------------------------------------------------------------------------------


def results_of(returned: Any) -> tuple[Any, ...]:
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def difference(results: tuple[Any, ...], expected: tuple[Any, ...]) -> float:
    """Largest relative error, in the Frobenius norm, of any result."""
    return max(
        float((result - other).float().norm() / other.float().norm())
        for result, other in zip(results, expected, strict=True)
    )


def measure(
    rows: list[Row],
    peers: dict[str, Peer],
    *,
    backward: bool = False,
    check_alone: Callable[..., None] | None = None,
    repeats: int = 30,
) -> tuple[Results, set[tuple[Row, str]]]:
    """TFLOP/s of every peer on every row.

    Parameters
    ----------
    rows : list of Row
    peers : dict of str to Peer
        Each is given a row, q, k and v, for the backward dout too, and returns what is measured. What it returns in
        turn is compared. An ImportError leaves it out for good, a NotImplementedError on this row.
    backward : bool
        Whether the peers compute gradients.
    check_alone : callable, optional
        Given a row, its inputs and cufa's result where no peer has one to compare it with.
    repeats : int

    Returns
    -------
    results : dict
        Of each row, by peer.
    eager : set of (Row, str)
        What could not be captured.
    """
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    work = BACKWARD_WORK if backward else 1.0
    dead: set[str] = set()
    eager: set[tuple[Row, str]] = set()
    results: Results = {}
    for index, row in enumerate(rows):
        given = inputs(row, index)[: 4 if backward else 3]
        calls: dict[str, Call] = {}
        foreign: dict[str, Call] = {}
        expected: tuple[Any, ...] | None = None
        checked = ""
        # cufa last: what it computes is held to what a peer does.
        for name in sorted((name for name in peers if name not in dead), key="cufa".__eq__):
            try:
                fn = peers[name](row, *given)
                found = tuple(map(torch.from_dlpack, results_of(fn())))
                if not all(bool(each.isfinite().all()) for each in found):
                    raise ArithmeticError("the result is not finite")
                if expected is not None:
                    error = difference(found, expected)
                    if not error < MAX_ERROR:
                        raise ArithmeticError(f"differs by {error:.3g}")
                    if name == "cufa":
                        checked = f"  (cufa differs by {error:.1e})"
                elif name == "cufa":
                    checked = "  (no peer to check cufa with)"
                    if check_alone is not None:
                        check_alone(row, *given, *found)
                expected = found if expected is None else expected
                if hasattr(fn, "foreign"):
                    foreign[name] = fn
                    continue
                graph = captured(fn)
                calls[name] = graph or fn
                if graph is None:
                    eager.add((row, name))
            except ImportError as reason:
                print(f"# {name} left out: {reason}", flush=True)
                dead.add(name)
            except NotImplementedError:
                pass
            except Exception as reason:
                print(f"# {name} fails on {row}: {type(reason).__name__}: {str(reason)[:120]}", flush=True)
        times = gpu_seconds(calls, flush, repeats) if calls else {}
        times |= {name: back_to_back_seconds(fn) for name, fn in foreign.items()}
        results[row] = {name: work * row.flop / times[name] / 1e12 for name in peers if name in times}
        shown = "  ".join(f"{name} {value:.0f}" for name, value in results[row].items())
        print(f"[{index + 1}/{len(rows)}] {row}: {shown}{checked}", flush=True)
    return results, eager


def write(
    directory: Path, name: str, title: str, text: str, results: Results, peers: Collection[str], ceiling: float
) -> None:
    """Write a run's table, rows and plot, as ``<name>-<gpu>`` with the suffix of each."""
    directory.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name().lower().replace("nvidia", "")
    stem = directory / f"{name}-{re.sub(r'[^a-z0-9]+', '-', gpu).strip('-')}"
    stem.with_suffix(".md").write_text(text)
    write_rows(results, peers, stem.with_suffix(".csv"))
    plot(results, ceiling, title, stem.with_suffix(".png"))
    print(f"# wrote {stem}.md, .csv and .png")

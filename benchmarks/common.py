"""What the benchmarks on a GPU share: rows, clocks, measurements and reports."""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import cufa
from cufa import _problem

Call = Callable[[], Any]
Peer = Callable[..., Call]
BASELINE = "FA2 (torch)"
LADDER_HEAD_DIMS = (64, 128, 256)
BACKWARD_WORK = 2.5
"""Five matrix products to the forward's two."""

MAX_ERROR = 0.01
"""What peers may differ by, relatively: about three times what rounding to bfloat16 makes of it."""


class Row(NamedTuple):
    """One rung of the ladder.

    `window` keys before its own are seen by a row of q, beside causality; None is all of them. With `lengths` the
    sequences are packed, and batch and seqlen only tell how many there are and how long one is on average.
    """

    head_dim: int
    seqlen: int
    batch: int
    num_heads_q: int
    num_heads_k: int
    causal: bool
    window: int | None = None
    lengths: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    deterministic: bool = False

    @property
    def flop(self) -> float:
        """Floating-point operations of the forward."""
        lengths = self.lengths or (self.seqlen,) * self.batch
        pairs = sum(self._pairs(length) for length in lengths)
        return 4.0 * pairs * self.num_heads_q * self.head_dim

    def _pairs(self, length: int) -> float:
        """Pairs of a query and a key it sees; half of all under a causal mask."""
        if self.window is None:
            return length**2 / 2 if self.causal else length**2
        reach = min(length, self.window + 1)
        return reach * (reach + 1) / 2 + (length - reach) * reach

    @property
    def mask(self) -> str:
        if self.window is not None:
            return f"window {self.window}"
        return "causal" if self.causal else "full"

    @property
    def on_the_ladder(self) -> bool:
        return self in ladder((self.seqlen,))

    def __str__(self) -> str:
        packed = f" {self.batch} packed" if self.lengths else ""
        dtype = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        deterministic = " deterministic" if self.deterministic else ""
        heads = f"{self.num_heads_q}/{self.num_heads_k}"
        return f"hd{self.head_dim} {self.seqlen}{packed} {heads} {self.mask}{dtype}{deterministic}"


Results = dict[Row, dict[str, float]]


def ladder(seqlens: Iterable[int]) -> list[Row]:
    """16k tokens of hidden size 2048 at every length, and a grouped-head row."""
    rows = [
        Row(head_dim, seqlen, 16384 // seqlen, 2048 // head_dim, 2048 // head_dim, causal)
        for head_dim in LADDER_HEAD_DIMS
        for seqlen in seqlens
        for causal in (False, True)
    ]
    return rows + [Row(128, 4096, 4, 32, 8, causal) for causal in (False, True)]


def beside_the_ladder() -> list[Row]:
    """Other head_dims, a sliding window, and packed sequences of mixed lengths with, for comparison, equal ones."""
    rows = [
        Row(head_dim, seqlen, 16384 // seqlen, heads, heads, causal)
        for head_dim, heads in ((96, 20), (192, 10))
        for seqlen in (2048, 8192)
        for causal in (False, True)
    ]
    rows += [Row(head_dim, 16384, 1, 2048 // head_dim, 2048 // head_dim, True, 1024) for head_dim in LADDER_HEAD_DIMS]
    lengths = tuple(int(length) for length in np.random.default_rng(0).integers(100, 8000, 64))
    mean = sum(lengths) // 64
    for causal in (False, True):
        rows += [Row(128, mean, 64, 8, 8, causal, None, lengths), Row(128, mean, 64, 8, 8, causal)]
    return rows


def inputs(row: Row, seed: int) -> tuple[Any, Any, Any, Any]:
    """Random q, k, v and dout."""
    generator = torch.Generator("cuda").manual_seed(seed)
    tokens = (row.batch, row.seqlen) if row.lengths is None else (sum(row.lengths),)
    q, k, v, dout = (
        torch.randn((*tokens, heads, row.head_dim), generator=generator, device="cuda", dtype=getattr(torch, row.dtype))
        for heads in (row.num_heads_q, row.num_heads_k, row.num_heads_k, row.num_heads_q)
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
    arguments = parser.parse_args()
    unwanted = set(filter(None, arguments.without.split(",")))
    for name in unwanted:
        if name not in peers or name == "cufa":
            parser.error(f"{name!r} is no peer; there are {', '.join(peers)}")
    if arguments.kernel == "sm80":
        arguments.ladder = True
        unwanted |= peers.keys() - {"cufa", BASELINE}
        # It is what serves inputs of which no tensor map can be made.
        _problem.has_tensor_map = lambda *_: False
    for name in unwanted:
        del peers[name]
    return arguments


def selected(arguments: argparse.Namespace, seqlens: Iterable[int], beside: Iterable[Row]) -> list[Row]:
    """The rows that the command line asks for, of the ladder with these lengths and of those `beside` it."""
    rows = ladder([seqlen for seqlen in seqlens if seqlen <= 2048 or not arguments.quick])
    if not (arguments.ladder or arguments.quick):
        rows += beside
    return [row for row in rows if re.search(arguments.only, str(row))]


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


# --- reports ----------------------------------------------------------------------------------------

LABELS = ("head_dim", "seqlen", "batch", "heads q/kv", "mask")


def labels(row: Row) -> list[str]:
    """What a table's line begins with, as LABELS say."""
    packed = f"{row.batch}, packed" if row.lengths else str(row.batch)
    return [str(row.head_dim), str(row.seqlen), packed, f"{row.num_heads_q}/{row.num_heads_k}", row.mask]


def markdown(head: list[str], lines: list[list[str]]) -> list[str]:
    text = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    return [text[0], "|" + "---|" * len(head), *text[1:]]


def cell(row: Row, name: str, speeds: dict[str, float], eager: set[tuple[Row, str]]) -> str:
    """A peer's TFLOP/s on a row, marked if it could not be captured."""
    return f"{speeds[name]:.0f}{'†' * ((row, name) in eager)}" if name in speeds else "–"


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def names_in(results: Results, peers: Collection[str]) -> list[str]:
    """Those of `peers` that were measured on any row."""
    return [name for name in peers if any(name in speeds for speeds in results.values())]


def table(results: Results, peers: Collection[str], eager: set[tuple[Row, str]]) -> str:
    """The rows as Markdown, with cufa over the baseline and over the best peer."""
    names = names_in(results, peers)
    lines = []
    to_baseline: list[float] = []
    to_best: list[float] = []
    for row, speeds in results.items():
        others = [value for name, value in speeds.items() if name != "cufa"]
        cells = [*labels(row), *(cell(row, name, speeds, eager) for name in names)]
        for base, ratios in ((speeds.get(BASELINE), to_baseline), (max(others, default=None), to_best)):
            if base is None or "cufa" not in speeds:
                cells.append("–")
                continue
            ratios.append(speeds["cufa"] / base)
            cells.append(f"{ratios[-1]:.2f}×")
        lines.append(cells)
    text = markdown([*LABELS, *names, f"cufa / {BASELINE}", "cufa / best peer"], lines)
    if to_baseline:
        text += [
            "",
            f"cufa / {BASELINE}: geometric mean {geometric_mean(to_baseline):.3f}×, least {min(to_baseline):.2f}×. "
            f"cufa / best peer: geometric mean {geometric_mean(to_best):.3f}×, least {min(to_best):.2f}×.",
        ]
    return "\n".join(text) + "\n"


def plot(results: Results, peers: Collection[str], ceiling: float, title: str, path: Path) -> None:
    """TFLOP/s over seqlen on the ladder, one panel a head_dim and mask; grouped heads are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = {
        row: speeds for row, speeds in results.items() if row.on_the_ladder and row.num_heads_q == row.num_heads_k
    }
    head_dims = sorted({row.head_dim for row in results})
    if not head_dims:
        return
    figure, axes = pyplot.subplots(
        2,
        len(head_dims),
        figsize=(4 * len(head_dims), 6.5),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    colors = {name: f"C{index}" for index, name in enumerate(peers)}  # a peer's is the same in every panel
    for line, causal in enumerate((False, True)):
        for column, head_dim in enumerate(head_dims):
            axis = axes[line][column]
            for name, color in colors.items():
                points = [
                    (row.seqlen, speeds[name])
                    for row, speeds in results.items()
                    if row.head_dim == head_dim and row.causal == causal and name in speeds
                ]
                if points:
                    width = 3 if name == "cufa" else 1.5
                    axis.plot(*zip(*points, strict=True), marker="o", color=color, linewidth=width, label=name)
            axis.axhline(ceiling, color="grey", linestyle=":", label="8192³ matmul")
            axis.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}")
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if line:
                axis.set_xlabel("seqlen (16k tokens in all)")
            if not column:
                axis.set_ylabel("TFLOP/s")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    axes[0][0].legend(handles.values(), handles.keys(), fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_rows(results: Results, peers: Collection[str], path: Path) -> None:
    """Results as CSV, a line a row."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["packed" if field == "lengths" else field for field in Row._fields] + [*peers])
        for row, speeds in results.items():
            fields = row._asdict() | {"lengths": row.lengths is not None}
            writer.writerow([*fields.values(), *(f"{speeds[name]:.2f}" if name in speeds else "" for name in peers)])


def write(
    directory: Path, name: str, title: str, text: str, results: Results, peers: Collection[str], ceiling: float
) -> None:
    """Write a run's table, rows and plot, as ``<name>-<gpu>`` with the suffix of each."""
    directory.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name().lower().replace("nvidia", "")
    stem = directory / f"{name}-{re.sub(r'[^a-z0-9]+', '-', gpu).strip('-')}"
    stem.with_suffix(".md").write_text(text)
    write_rows(results, peers, stem.with_suffix(".csv"))
    plot(results, peers, ceiling, title, stem.with_suffix(".png"))
    print(f"# wrote {stem}.md, .csv and .png")

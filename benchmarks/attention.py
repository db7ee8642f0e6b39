"""cufa's forward beside every peer that can be imported, and what a call costs the host.

    python benchmarks/attention.py [--out DIR] [--quick] [--only REGEX]

Same inputs for all, in one run on one GPU: bfloat16, medians of CUDA-graph replays with the L2 flushed before each, so
that a slow host does not count against a kernel. Work is counted as 4 · batch · seqlen_q · seqlen_k · heads · head_dim
floating-point operations, half of it under a causal mask. Beside the kernels it measures the ceiling of a large matrix
product, the host's time a call, and the time from ``import cufa`` to the first result. ``--out`` receives a table
(Markdown), the rows (CSV) and a plot (PNG).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import cufa

Call = Callable[[], Any]
BASELINE = "FA2 (torch)"


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

    @property
    def flop(self) -> float:
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
        return self in ladder(False)

    def __str__(self) -> str:
        packed = f" {self.batch} packed" if self.lengths else ""
        return f"hd{self.head_dim} {self.seqlen}{packed} {self.num_heads_q}/{self.num_heads_k} {self.mask}"


LADDER_HEAD_DIMS = (64, 128, 256)


def ladder(quick: bool) -> list[Row]:
    """16k tokens of hidden size 2048 at every length, and a grouped-head row."""
    rows = []
    for head_dim in LADDER_HEAD_DIMS:
        for seqlen in (512, 2048) if quick else (512, 2048, 8192, 16384):
            heads = 2048 // head_dim
            rows += [Row(head_dim, seqlen, 16384 // seqlen, heads, heads, causal) for causal in (False, True)]
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


# --- peers ------------------------------------------------------------------------------------------


def _offsets(lengths: tuple[int, ...]) -> Any:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def _cufa(row: Row, q: Any, k: Any, v: Any) -> Call:
    options: dict[str, Any] = {"causal": row.causal}
    if row.window is not None:
        options["window_size"] = (row.window, None)
    if row.lengths is None:
        return lambda: cufa.attention(q, k, v, **options)
    offsets = _offsets(row.lengths)
    return lambda: cufa.attention_varlen(q, k, v, offsets, offsets, **options)


def _sdpa(backend: SDPBackend) -> Callable[..., Call]:
    def make(row: Row, q: Any, k: Any, v: Any) -> Call:
        if row.window is not None or row.lengths is not None:
            raise NotImplementedError("no windows and no packed sequences")
        transposed = [each.transpose(1, 2) for each in (q, k, v)]
        grouped = row.num_heads_q != row.num_heads_k

        def run() -> Any:
            with sdpa_kernel(backend):
                out = functional.scaled_dot_product_attention(*transposed, is_causal=row.causal, enable_gqa=grouped)
            return out.transpose(1, 2)

        return run

    return make


def _fa3(row: Row, q: Any, k: Any, v: Any) -> Call:
    import fa3_fwd_config

    sys.modules.setdefault("flash_attn_config", fa3_fwd_config)  # the name under which the package looks for it
    from fa3_fwd_interface import flash_attn_func, flash_attn_varlen_func

    if row.window is not None:
        raise NotImplementedError("the wheel is built without windows")
    if row.lengths is None:

        def run() -> Any:
            out = flash_attn_func(q, k, v, causal=row.causal)
            return out[0] if isinstance(out, tuple) else out

        return run
    offsets, longest = _offsets(row.lengths), max(row.lengths)

    def run_packed() -> Any:
        out = flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, causal=row.causal)
        return out[0] if isinstance(out, tuple) else out

    return run_packed


def _flex(row: Row, q: Any, k: Any, v: Any) -> Call:
    if row.head_dim != 128 or row.seqlen > 8192 or row.window is not None or row.lengths is not None:
        raise NotImplementedError("compiling it takes long: only head_dim 128 up to 8192, without windows and packing")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b: Any, h: Any, query: Any, key: Any) -> Any:
        return query >= key

    mask = create_block_mask(sees, None, None, row.seqlen, row.seqlen) if row.causal else None
    torch._dynamo.reset()  # it stops compiling after a few shapes
    compiled = torch.compile(flex_attention, dynamic=False)
    transposed = [each.transpose(1, 2) for each in (q, k, v)]
    grouped = row.num_heads_q != row.num_heads_k
    return lambda: compiled(*transposed, block_mask=mask, enable_gqa=grouped).transpose(1, 2)


def _jax(row: Row, q: Any, k: Any, v: Any) -> Call:
    if row.window is not None or row.lengths is not None or row.head_dim > 128:
        raise NotImplementedError("no windows, no packed sequences, head_dim up to 128")
    import jax

    arrays = [jax.dlpack.from_dlpack(each.contiguous()) for each in (q, k, v)]
    attend = jax.jit(lambda *given: jax.nn.dot_product_attention(*given, is_causal=row.causal, implementation="cudnn"))
    attend(*arrays).block_until_ready()

    def run() -> Any:
        return attend(*arrays)

    run.foreign = True  # type: ignore[attr-defined]
    return run


PEERS: dict[str, Callable[..., Call]] = {
    "cufa": _cufa,
    BASELINE: _sdpa(SDPBackend.FLASH_ATTENTION),
    "cuDNN (torch)": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "FA3": _fa3,
    "FlexAttention": _flex,
    "cuDNN (JAX)*": _jax,
}


# --- clocks -----------------------------------------------------------------------------------------


def captured(fn: Call) -> Call:
    """`fn` as a CUDA graph, or itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = fn()
    except Exception:
        torch.cuda.synchronize()
        return fn

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
        out.block_until_ready()
        best = min(best, (time.perf_counter() - began) / calls)
    return best


def host_seconds(fn: Call, synchronize: Call, calls: int = 200) -> float:
    """Least mean time, over several batches of calls, until a call returns."""
    for _ in range(50):
        fn()
    synchronize()
    best = math.inf
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(calls):
            fn()
        best = min(best, (time.perf_counter() - began) / calls)
        synchronize()
    return best


# --- measurements -----------------------------------------------------------------------------------


def measure(rows: list[Row]) -> dict[Row, dict[str, float]]:
    """TFLOP/s of every peer on every row."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    dead: set[str] = set()
    results: dict[Row, dict[str, float]] = {}
    for index, row in enumerate(rows):
        generator = torch.Generator("cuda").manual_seed(index)
        tokens = (row.batch, row.seqlen) if row.lengths is None else (sum(row.lengths),)
        q, k, v = (
            torch.randn((*tokens, heads, row.head_dim), generator=generator, device="cuda", dtype=torch.bfloat16)
            for heads in (row.num_heads_q, row.num_heads_k, row.num_heads_k)
        )
        calls: dict[str, Call] = {}
        foreign: dict[str, Call] = {}
        expected = None
        # cufa last: what it computes is held to what a peer does.
        for name in sorted((name for name in PEERS if name not in dead), key="cufa".__eq__):
            try:
                fn = PEERS[name](row, q, k, v)
                out = torch.from_dlpack(fn())
                if expected is not None:
                    error = (out - expected).float().norm() / expected.float().norm()
                    if not error < 0.01:
                        raise ArithmeticError(f"differs by {error:.3g}")
                elif name == "cufa":
                    check_last_rows(row, q, k, v, out)
                expected = out if expected is None else expected
                if hasattr(fn, "foreign"):
                    foreign[name] = fn
                else:
                    calls[name] = captured(fn)
            except ImportError as reason:
                print(f"# {name} left out: {reason}", flush=True)
                dead.add(name)
            except NotImplementedError:
                pass
            except Exception as reason:
                print(f"# {name} fails on {row}: {type(reason).__name__}: {str(reason)[:120]}", flush=True)
        times = gpu_seconds(calls, flush)
        times |= {name: back_to_back_seconds(fn) for name, fn in foreign.items()}
        results[row] = {name: row.flop / times[name] / 1e12 for name in PEERS if name in times}
        shown = "  ".join(f"{name} {value:.0f}" for name, value in results[row].items())
        print(f"[{index + 1}/{len(rows)}] {row}: {shown}", flush=True)
    return results


def check_last_rows(row: Row, q: Any, k: Any, v: Any, out: Any, rows: int = 256) -> None:
    """Hold the last rows of one head to the reference, under a window that no peer has."""
    assert row.window is not None and row.lengths is None
    keys = slice(-(rows + row.window), None)
    cufa.testing.assert_close(
        out[:1, -rows:, :1],
        q[:1, -rows:, :1],
        k[:1, keys, :1],
        v[:1, keys, :1],
        causal=row.causal,
        window_size=(row.window, None),
    )


def matmul_ceiling() -> float:
    """TFLOP/s of an 8192³ bfloat16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    return 2 * 8192**3 / gpu_seconds({"matmul": lambda: a @ b}, flush)["matmul"] / 1e12


def host_costs() -> dict[str, float]:
    """Microseconds that a call in steady state costs the host, outputs allocated."""
    costs = {}
    x = torch.randn(2, 128, 4, 128, device="cuda", dtype=torch.float16)
    costs["torch"] = host_seconds(lambda: cufa.attention(x, x, x, causal=True), torch.cuda.synchronize)
    out = torch.empty_like(x)
    costs["torch, out="] = host_seconds(lambda: cufa.attention(x, x, x, causal=True, out=out), torch.cuda.synchronize)
    transposed = x.transpose(1, 2)
    costs["torch's own scaled_dot_product_attention"] = host_seconds(
        lambda: functional.scaled_dot_product_attention(transposed, transposed, transposed, is_causal=True),
        torch.cuda.synchronize,
    )
    try:
        import cupy
    except ImportError:
        return {name: 1e6 * value for name, value in costs.items()}
    y = cupy.zeros((2, 128, 4, 128), cupy.float16)
    costs["CuPy"] = host_seconds(lambda: cufa.attention(y, y, y, causal=True), cupy.cuda.Device().synchronize)
    costs["CuPy, return_lse=True"] = host_seconds(
        lambda: cufa.attention(y, y, y, causal=True, return_lse=True), cupy.cuda.Device().synchronize
    )
    return {name: 1e6 * value for name, value in costs.items()}


STARTUP = """
import time
import cupy
q = cupy.zeros((1, 128, 4, 128), cupy.float16)
cupy.cuda.Device().synchronize()
began = time.perf_counter()
import cufa
cufa.attention(q, q, q, causal=True)
cupy.cuda.Device().synchronize()
print(time.perf_counter() - began)
"""


def startup() -> dict[str, float]:
    """Seconds from ``import cufa`` to the first result, CuPy and its context being there."""
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, "CUFA_CACHE_DIR": directory}

        def once() -> float:
            run = subprocess.run([sys.executable, "-c", STARTUP], env=environment, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"the first call failed:\n{run.stderr[-2000:]}")
            return float(run.stdout)

        once()  # bytecode and file caches
        for file in Path(directory).rglob("*.cufa"):
            file.unlink()
        cold = once()
        return {"cold cache": cold, "warm cache": statistics.median(once() for _ in range(5))}


# --- reports ----------------------------------------------------------------------------------------


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def table(results: dict[Row, dict[str, float]]) -> str:
    """The rows as Markdown, with cufa over the baseline and over the best peer."""
    names = [name for name in PEERS if any(name in each for each in results.values())]
    head = [
        "head_dim",
        "seqlen",
        "batch",
        "heads q/kv",
        "mask",
        *names,
        f"cufa / {BASELINE}",
        "cufa / best peer",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    to_baseline, to_best = [], []
    for row, speeds in results.items():
        peers = [value for name, value in speeds.items() if name != "cufa"]
        packed = f"{row.batch}, packed" if row.lengths else str(row.batch)
        cells = [str(row.head_dim), str(row.seqlen), packed, f"{row.num_heads_q}/{row.num_heads_k}", row.mask]
        cells += [f"{speeds[name]:.0f}" if name in speeds else "–" for name in names]
        for base, ratios in ((speeds.get(BASELINE), to_baseline), (max(peers, default=None), to_best)):
            if base is None or "cufa" not in speeds:
                cells.append("–")
                continue
            ratios.append(speeds["cufa"] / base)
            cells.append(f"{ratios[-1]:.2f}×")
        lines.append("| " + " | ".join(cells) + " |")
    if to_baseline:
        lines += [
            "",
            f"cufa / {BASELINE}: geometric mean {geometric_mean(to_baseline):.3f}×, least {min(to_baseline):.2f}×. "
            f"cufa / best peer: geometric mean {geometric_mean(to_best):.3f}×, least {min(to_best):.2f}×.",
        ]
    return "\n".join(lines) + "\n"


def plot(results: dict[Row, dict[str, float]], ceiling: float, title: str, path: Path) -> None:
    """TFLOP/s over seqlen, one panel a head_dim and mask."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    head_dims = sorted({row.head_dim for row in results if row.on_the_ladder})
    figure, axes = pyplot.subplots(
        2,
        len(head_dims),
        figsize=(4 * len(head_dims), 6.5),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line, causal in enumerate((False, True)):
        for column, head_dim in enumerate(head_dims):
            axis = axes[line][column]
            for name in PEERS:
                points = [
                    (row.seqlen, speeds[name])
                    for row, speeds in results.items()
                    if row.on_the_ladder
                    and row.head_dim == head_dim
                    and row.causal == causal
                    and row.num_heads_q == row.num_heads_k
                    and name in speeds
                ]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        marker="o",
                        linewidth=3 if name == "cufa" else 1.5,
                        label=name,
                    )
            axis.axhline(ceiling, color="grey", linestyle=":", label="8192³ matmul")
            axis.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}")
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if line:
                axis.set_xlabel("seqlen (16k tokens in all)")
            if not column:
                axis.set_ylabel("TFLOP/s")
    axes[0][0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for table, rows and plot")
    parser.add_argument("--quick", action="store_true", help="only the shorter rows")
    parser.add_argument("--without", default="", help="names of peers to leave out, separated by commas")
    parser.add_argument("--only", default="", help="regular expression that a row's name must contain")
    arguments = parser.parse_args()
    for name in filter(None, arguments.without.split(",")):
        if name not in PEERS or name == "cufa":
            parser.error(f"{name!r} is no peer; there are {', '.join(PEERS)}")
        del PEERS[name]
    device = torch.cuda.get_device_name()
    report = cufa.show_config("dicts")
    ceiling = matmul_ceiling()
    print(
        f"# {device}, torch {torch.__version__}, NVRTC {report['nvrtc']['version']}; 8192³ matmul {ceiling:.0f} TFLOP/s"
    )
    rows = ladder(arguments.quick) + ([] if arguments.quick else beside_the_ladder())
    results = measure([row for row in rows if re.search(arguments.only, str(row))])
    text = [
        f"# Forward on {device}",
        "",
        f"{datetime.date.today()}, driver {report['gpu']['driver']}, NVRTC {report['nvrtc']['version']}, torch "
        f"{torch.__version__}. bfloat16, TFLOP/s, medians of CUDA-graph replays with the L2 flushed before each. "
        f"An 8192³ bfloat16 matrix product in the same run: {ceiling:.0f} TFLOP/s.",
        "",
        "(*) JAX's stream cannot be captured: the mean of calls in a row, without the flush.",
        "",
        table({row: speeds for row, speeds in results.items() if row.on_the_ladder}),
        "## Beside the ladder",
        "",
        "Under a window only the pairs it leaves count as work. Packed: 64 sequences of 100 to 8000 tokens, and below "
        "them 64 of their mean length.",
        "",
        table({row: speeds for row, speeds in results.items() if not row.on_the_ladder}),
        "## What a call costs the host",
        "",
        "| caller | µs a call |",
        "|---|---|",
        *(f"| {name} | {value:.1f} |" for name, value in host_costs().items()),
        "",
        "## From `import cufa` to the first result",
        "",
        "| | seconds |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in startup().items()),
    ]
    print("\n".join(text[4:]))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        stem = arguments.out / (
            "forward-" + re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-")
        )
        stem.with_suffix(".md").write_text("\n".join(text) + "\n")
        with stem.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*Row._fields[:-1], "packed", *PEERS])
            for row, speeds in results.items():
                writer.writerow(
                    [
                        *row[:-1],
                        row.lengths is not None,
                        *(f"{speeds[name]:.2f}" if name in speeds else "" for name in PEERS),
                    ]
                )
        plot(results, ceiling, f"Forward, bfloat16, {device}", stem.with_suffix(".png"))
        print(f"# wrote {stem}.md, .csv and .png")


if __name__ == "__main__":
    main()

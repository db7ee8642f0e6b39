"""cufa's forward beside every peer that can be imported, and what a call costs the host.

    python benchmarks/attention.py [--out DIR] [--ladder] [--quick] [--cliffs] [--only REGEX]

Same inputs for all, in one run on one GPU: bfloat16, medians of CUDA-graph replays with the L2 flushed before each, so
that a slow host does not count against a kernel. Work is counted as 4 · batch · seqlen_q · seqlen_k · heads · head_dim
floating-point operations, half of it under a causal mask. Beside the kernels it measures the ceiling of a large matrix
product, the host's time a call, and the time from ``import cufa`` to the first result. ``--out`` receives a table
(Markdown), the rows (CSV) and a plot (PNG). ``--cliffs`` measures, within a minute, shapes that are easily slow beside
torch's backends instead.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from cliffs import FORWARD as CLIFFS
from cliffs import as_dense, run_cliffs
from common import Call, Peer, command_line, conditions, measure, offsets_of, selected, start, write
from reports import BASELINE, Row, beside_the_ladder, markdown, table
from torch.nn.attention import SDPBackend, sdpa_kernel

import cufa

# --- peers ------------------------------------------------------------------------------------------


def _cufa(row: Row, q: Any, k: Any, v: Any) -> Call:
    options: dict[str, Any] = {"causal": row.causal}
    if row.window is not None:
        options["window_size"] = (row.window, None)
    if row.lengths is None:
        return lambda: cufa.attention(q, k, v, **options)
    offsets = offsets_of(row.lengths)
    return lambda: cufa.attention_varlen(q, k, v, offsets, offsets, **options)


def _sdpa(backend: SDPBackend) -> Peer:
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
    offsets, longest = offsets_of(row.lengths), max(row.lengths)

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


PEERS: dict[str, Peer] = {
    "cufa": _cufa,
    BASELINE: _sdpa(SDPBackend.FLASH_ATTENTION),
    "cuDNN (torch)": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "FA3": _fa3,
    "FlexAttention": _flex,
    "cuDNN (JAX)*": _jax,
}


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


# --- what a call costs the host -----------------------------------------------------------------------


def host_seconds(fn: Call, calls: int = 200) -> float:
    """Least mean time, over several batches of calls, until a call returns."""
    for _ in range(50):
        fn()
    torch.cuda.synchronize()
    best = math.inf
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(calls):
            fn()
        best = min(best, (time.perf_counter() - began) / calls)
        torch.cuda.synchronize()
    return best


def host_costs(calls: dict[str, Call]) -> list[str]:
    """What calls in steady state cost the host, outputs allocated, as Markdown."""
    costs = [[name, f"{1e6 * host_seconds(call):.1f}"] for name, call in calls.items()]
    return ["## What a call costs the host", "", *markdown(["caller", "µs a call"], costs), ""]


def host_calls() -> dict[str, Call]:
    x = torch.randn(2, 128, 4, 128, device="cuda", dtype=torch.float16)
    out, transposed = torch.empty_like(x), x.transpose(1, 2)
    calls: dict[str, Call] = {
        "torch": lambda: cufa.attention(x, x, x, causal=True),
        "torch, out=": lambda: cufa.attention(x, x, x, causal=True, out=out),
        "torch's own scaled_dot_product_attention": lambda: functional.scaled_dot_product_attention(
            transposed, transposed, transposed, is_causal=True
        ),
    }
    with contextlib.suppress(ImportError):
        import cupy

        y = cupy.zeros((2, 128, 4, 128), cupy.float16)
        calls["CuPy"] = lambda: cufa.attention(y, y, y, causal=True)
        calls["CuPy, return_lse=True"] = lambda: cufa.attention(y, y, y, causal=True, return_lse=True)
    return calls


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


def main() -> None:
    arguments = command_line(__doc__, PEERS)
    if arguments.cliffs:
        run_cliffs(arguments, "forward", {"cufa": _cufa, "cufa, dense": as_dense(_cufa)} | CLIFFS, 1.0)
        return
    ceiling = start()
    rows = selected(arguments, (512, 2048, 8192, 16384), beside_the_ladder())
    results, eager = measure(rows, PEERS, check_alone=check_last_rows)
    generic = arguments.kernel == "sm80"
    beside = {row: speeds for row, speeds in results.items() if not row.on_the_ladder}
    title = f"Forward on {torch.cuda.get_device_name()}" + ", the kernel for every GPU" * generic
    text = [
        f"# {title}",
        "",
        conditions(ceiling),
        "",
        "(*) JAX's stream cannot be captured: the mean of calls in a row, without the flush.",
        "",
        *(["(†) Not captured: calls, of whose time on the host some may show.", ""] if eager else []),
        table({row: speeds for row, speeds in results.items() if row.on_the_ladder}, PEERS, eager),
    ]
    if beside:
        text += [
            "## Beside the ladder",
            "",
            "Under a window only the pairs it leaves count as work. Packed: 64 sequences of 100 to 8000 tokens, and "
            "below them 64 of their mean length.",
            "",
            table(beside, PEERS, eager),
        ]
    if not generic:
        text += [
            *host_costs(host_calls()),
            "## From `import cufa` to the first result",
            "",
            "| | seconds |",
            "|---|---|",
            *(f"| {name} | {value:.3f} |" for name, value in startup().items()),
            "",
        ]
    print("\n".join(text[4:]))
    if arguments.out:
        write(arguments.out, "forward-sm80" if generic else "forward", title, "\n".join(text), results, PEERS, ceiling)


if __name__ == "__main__":
    main()

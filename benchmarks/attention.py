"""cufa's forward beside every peer that can be imported, and what a call costs the host.

    python benchmarks/attention.py [--out DIR] [--ladder] [--quick] [--cliffs] [--only REGEX] [--kernel sm80]

Same inputs for all, in one run on one GPU: bfloat16, some rows in float32, medians of CUDA-graph replays with the L2
flushed before each, so that a slow host does not count against a kernel. Work is counted as
4 · batch · seqlen_q · seqlen_k · heads · head_dim floating-point operations, half of it under a causal mask. Beside the
kernels it measures what cufa takes for an operation of some rows beside others, the ceiling of a large matrix
product, the host's time a call, and the time from ``import cufa`` to the first result. ``--out`` receives a table
(Markdown), the rows (CSV) and a plot (PNG). ``--cliffs`` measures, within a minute, shapes that are easily slow beside
torch's backends instead.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as functional
from cliffs import FORWARD as CLIFFS
from cliffs import as_dense, run_cliffs
from common import BESIDE, command_line, notes, pairs, per_flop, selected, start, write

import cufa
from cufa._bench.frameworks import Torch
from cufa._bench.measure import check_last_rows, compile_ahead, conditions, host_seconds, measure
from cufa._bench.peers import FORWARD, Call
from cufa._bench.reports import FORWARD_SEQLENS, beside_the_ladder, markdown, single_precision, split, table

# --- what a call costs the host -----------------------------------------------------------------------


def host_costs(calls: dict[str, Call]) -> list[str]:
    """What calls in steady state cost the host, outputs allocated, as Markdown."""
    costs = [[name, f"{1e6 * host_seconds(call, torch.cuda.synchronize):.1f}"] for name, call in calls.items()]
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
    peers = dict(FORWARD)
    arguments = command_line(__doc__, peers)
    if arguments.cliffs:
        ours = FORWARD["cufa"]
        run_cliffs(arguments, "forward", {"cufa": ours, "cufa, dense": as_dense(ours)} | CLIFFS, 1.0)
        return
    framework = Torch()
    ceiling = start(framework)
    rows = selected(arguments, FORWARD_SEQLENS, beside_the_ladder() + single_precision())
    compile_ahead(rows, peers["cufa"], framework)
    results, eager = measure(rows, peers, framework, check_alone=check_last_rows)
    generic = arguments.kernel == "sm80"
    on_the_ladder, beside, _, singles = split(results)
    title = f"Forward on {framework.device_name()}" + ", the kernel for every GPU" * generic
    text = [
        f"# {title}",
        "",
        conditions(framework, ceiling),
        "",
        *notes(results, peers, eager),
        table(on_the_ladder, peers, eager),
    ]
    if beside:
        text += [
            "## Beside the ladder",
            "",
            BESIDE,
            "",
            table(beside, peers, eager),
        ]
    if singles:
        text += ["## float32", "", table(singles, peers, eager)]
    if not generic:
        text += [
            *per_flop(pairs(arguments), peers["cufa"], framework),
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
        write(arguments.out, "forward-sm80" if generic else "forward", title, "\n".join(text), results, peers, ceiling)


if __name__ == "__main__":
    main()

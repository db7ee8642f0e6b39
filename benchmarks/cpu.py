"""Attention on NumPy arrays beside plain NumPy: memory above the inputs and the output, and time.

    python benchmarks/cpu.py [--save PATH]

Plain NumPy is ``softmax(q kᵀ) v`` by `np.matmul`, as far as possible in place, and holds all scores at once.
"""

from __future__ import annotations

import argparse
import platform
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cufa._cpu import forward as _cpu
from cufa.testing import Case, assert_close, bench

HEADER = ("batch", "seqlen_q", "seqlen_k", "heads", "head_dim", "dtype", "causal")
COLUMNS = (*HEADER, "cufa MB", "NumPy MB", "cufa ms", "NumPy ms", "NumPy / cufa")
MAX_PLAIN_BYTES = 2 << 30  # more scores than this are not held

CASES = (
    {"seqlen_q": 512, "seqlen_k": 512, "batch": 4},
    {"seqlen_q": 1024, "seqlen_k": 1024},
    {"seqlen_q": 4096, "seqlen_k": 4096},
    {"seqlen_q": 4096, "seqlen_k": 4096, "causal": True},
    {"seqlen_q": 4096, "seqlen_k": 4096, "dtype": "float16"},
    {"seqlen_q": 2048, "seqlen_k": 2048, "num_heads_q": 32, "head_dim": 128, "head_dim_v": 128},
    {"seqlen_q": 1, "seqlen_k": 4096, "batch": 8},
    {"seqlen_q": 32768, "seqlen_k": 32768, "num_heads_q": 1, "num_heads_k": 1, "causal": True},
)


def blocked(case: Case) -> Callable[[], np.ndarray]:
    arrays, out = case.arrays(), case.output()

    def run() -> np.ndarray:
        _cpu.forward(
            *(arrays[name] for name in ("q", "k", "v")),
            out,
            None,
            softmax_scale=case.head_dim**-0.5,
            window_left=None,
            window_right=0 if case.causal else None,
            terms=(),
            sinks=None,
        )
        return out

    return run


def plain(case: Case) -> Callable[[], np.ndarray]:
    q, k, v = (case.arrays()[name] for name in ("q", "k", "v"))
    out = case.output()

    def run() -> np.ndarray:
        group = case.num_heads_q // case.num_heads_k
        q_heads, k_heads, v_heads = (
            np.repeat(x, 1 if x is q else group, axis=2).swapaxes(1, 2).astype(np.float32) for x in (q, k, v)
        )
        s = (q_heads * np.float32(case.head_dim**-0.5)) @ k_heads.swapaxes(2, 3)
        if case.causal:
            i, j = np.ogrid[: s.shape[2], : s.shape[3]]
            np.copyto(s, -np.inf, where=j > i + s.shape[3] - s.shape[2])
        s -= s.max(axis=-1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(axis=-1, keepdims=True)
        out[...] = (s @ v_heads).swapaxes(1, 2)
        return out

    return run


def megabytes(run: Callable[[], object]) -> float:
    """What a call allocates at its peak, in MiB."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] / (1 << 20)
    finally:
        tracemalloc.stop()


def measure(case: Case) -> tuple[str, ...]:
    """One row of the table; also checks the first and the last rows of the result."""
    run = blocked(case)
    out, arrays = run(), case.arrays()
    last = slice(-min(8, out.shape[1]), None)  # masks are aligned at the end: the last rows are a problem of their own
    assert_close(out[:, last], arrays["q"][:, last], arrays["k"], arrays["v"], causal=case.causal)
    cufa_mb, cufa_ms = megabytes(run), bench(run, seconds=2, max_repeats=50).median * 1e3
    numpy_mb, numpy_ms, ratio = "–", "–", "–"
    view = case.view("k")
    if 4 * case.batch * case.num_heads_q * out.shape[1] * view.shape[1] <= MAX_PLAIN_BYTES:
        other = plain(case)
        milliseconds = bench(other, seconds=2, max_repeats=50).median * 1e3
        numpy_mb, numpy_ms = f"{megabytes(other):.1f}", f"{milliseconds:.1f}"
        ratio = f"{milliseconds / cufa_ms:.2f}"
    heads = f"{case.num_heads_q}/{case.num_heads_k}"
    sizes = (case.batch, out.shape[1], view.shape[1], heads, case.head_dim, case.dtype, case.causal)
    return (*map(str, sizes), f"{cufa_mb:.1f}", numpy_mb, f"{cufa_ms:.1f}", numpy_ms, ratio)


def markdown(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in (COLUMNS, *rows)) for i in range(len(COLUMNS))]
    rule = tuple("-" * width for width in widths)
    return "\n".join(
        f"| {' | '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in (COLUMNS, rule, *rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="also write the table there, as Markdown")
    path = parser.parse_args().save
    defaults = {"num_heads_q": 8, "num_heads_k": 8, "head_dim": 64, "head_dim_v": 64}
    table = markdown([measure(Case(**{**defaults, **case})) for case in CASES])
    text = f"NumPy {np.__version__} on {platform.machine()}, float32 unless said. MB are MiB.\n\n{table}\n"
    print(text)
    if path is not None:
        path.write_text(f"# Attention on the CPU\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()

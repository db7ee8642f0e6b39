"""cufa's backward beside that of every peer that can be imported.

    python benchmarks/backward.py [--out DIR] [--ladder] [--quick] [--cliffs] [--only REGEX] [--kernel sm80]

As `attention.py` measures the forward, with 2.5 times its operations. A peer's time is that of its whole gradient, with
what comes before and after its kernel, such as the sum of dk and dv over the query heads that share a key head. Beside
the ladder stand other head_dims, windows, packed sequences, float16, what ``deterministic=True`` costs, and what a call
costs the host.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from attention import PEERS as FORWARD
from attention import host_costs
from cliffs import FORWARD as CLIFFS
from cliffs import as_dense, run_cliffs
from common import (
    BACKWARD_WORK,
    Call,
    Peer,
    command_line,
    compile_ahead,
    conditions,
    measure,
    offsets_of,
    selected,
    start,
    write,
)
from reports import (
    BASELINE,
    LABELS,
    Results,
    Row,
    beside_the_ladder,
    cell,
    labels,
    ladder,
    markdown,
    names_in,
    table,
)

import cufa

SEQLENS = (512, 2048, 8192)


def variants() -> list[Row]:
    """The ladder's rows at 8k in float16, and all of them with deterministic gradients."""
    halves = [row._replace(dtype="float16") for row in ladder((8192,)) if row.num_heads_q == row.num_heads_k]
    return halves + [row._replace(deterministic=True) for row in ladder(SEQLENS)]


# --- peers ------------------------------------------------------------------------------------------


def _cufa(row: Row, q: Any, k: Any, v: Any, dout: Any) -> Call:
    options: dict[str, Any] = {"causal": row.causal}
    if row.window is not None:
        options["window_size"] = (row.window, None)
    deterministic = row.deterministic
    if row.lengths is None:
        out, lse = cufa.attention(q, k, v, return_lse=True, **options)
        return lambda: cufa.attention_backward(dout, q, k, v, out, lse, deterministic=deterministic, **options)
    offsets = offsets_of(row.lengths)
    out, lse = cufa.attention_varlen(q, k, v, offsets, offsets, return_lse=True, **options)
    return lambda: cufa.attention_varlen_backward(
        dout, q, k, v, out, lse, offsets, offsets, deterministic=deterministic, **options
    )


def _autograd(forward: Peer) -> Peer:
    """What torch's autograd makes of a peer's forward, which itself is not measured."""

    def make(row: Row, q: Any, k: Any, v: Any, dout: Any) -> Call:
        if row.deterministic:
            raise NotImplementedError("not known to be deterministic")
        leaves = [each.detach().requires_grad_() for each in (q, k, v)]
        out = forward(row, *leaves)()
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return make


def _flash(row: Row, q: Any, k: Any, v: Any) -> Call:
    """The kernels behind torch's flash backend, which has neither windows nor packed sequences."""
    offsets = None if row.lengths is None else offsets_of(row.lengths)
    longest = max(row.lengths or (row.seqlen,))
    options = {} if row.window is None else {"window_size_left": row.window}
    return lambda: torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, 0.0, row.causal, False, **options
    )[0]


def _fa2(row: Row, q: Any, k: Any, v: Any, dout: Any) -> Call:
    dense = row.window is None and row.lengths is None
    make = _autograd(FORWARD[BASELINE] if dense else _flash)
    run = make(row._replace(deterministic=False), q, k, v, dout)
    if not row.deterministic:
        return run

    def run_deterministically() -> Any:
        torch.use_deterministic_algorithms(True)
        try:
            return run()
        finally:
            torch.use_deterministic_algorithms(False)

    return run_deterministically


def _flex(row: Row, q: Any, k: Any, v: Any, dout: Any) -> Call:
    if row.seqlen != 8192 or row.dtype != "bfloat16":
        raise NotImplementedError("compiling it takes long: only head_dim 128 at 8192")
    import torch._functorch.config as config

    config.donated_buffer = False  # the graph is kept for more than one gradient
    return _autograd(FORWARD["FlexAttention"])(row, q, k, v, dout)


def _jax(row: Row, q: Any, k: Any, v: Any, dout: Any) -> Call:
    if (row.head_dim, row.seqlen, row.dtype, row.deterministic) != (128, 8192, "bfloat16", False):
        raise NotImplementedError("compiling it takes long: only head_dim 128 at 8192")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
    import jax

    *arrays, gradient = (jax.dlpack.from_dlpack(each) for each in (q, k, v, dout))

    def attend(*given: Any) -> Any:
        return jax.nn.dot_product_attention(*given, is_causal=row.causal, implementation="cudnn")

    _, pullback = jax.jit(lambda *given: jax.vjp(attend, *given))(*arrays)
    backward = jax.jit(lambda pullback, gradient: pullback(gradient))

    def run() -> Any:
        return backward(pullback, gradient)

    run.foreign = True  # type: ignore[attr-defined]
    return run


PEERS: dict[str, Peer] = {
    "cufa": _cufa,
    BASELINE: _fa2,
    "cuDNN (torch)": _autograd(FORWARD["cuDNN (torch)"]),
    "FlexAttention": _flex,
    "cuDNN (JAX)*": _jax,
}

COMPILED = ("FlexAttention", "cuDNN (JAX)*")
"""Peers that are measured on few rows."""


# --- report -----------------------------------------------------------------------------------------


def determinism(results: Results, eager: set[tuple[Row, str]]) -> str:
    """Deterministic rows as Markdown, with the time over that of the same row without."""
    names = names_in({row: speeds for row, speeds in results.items() if row.deterministic}, PEERS)
    lines = []
    for row, speeds in results.items():
        if not row.deterministic:
            continue
        default = results.get(row._replace(deterministic=False), {})
        cells = labels(row)
        for name in names:
            cells.append(cell(row, name, speeds, eager))
            cells.append(f"{default[name] / speeds[name]:.2f}×" if name in speeds and name in default else "–")
        lines.append(cells)
    head = [title for name in names for title in (name, "time / default")]
    return "\n".join(markdown([*LABELS, *head], lines)) + "\n"


def report(title: str, ceiling: float, results: Results, eager: set[tuple[Row, str]]) -> str:
    """All tables, each where it has rows."""
    parts: list[Results] = [{}, {}, {}]
    for row, speeds in results.items():
        if not row.deterministic:
            parts[0 if row.on_the_ladder else 1 if row.dtype == "bfloat16" else 2][row] = speeds
    on_the_ladder, beside, halves = parts
    text = [
        f"# {title}",
        "",
        f"{conditions(ceiling)} 2.5 times the forward's operations count as work; what a peer does before and after "
        "its kernel counts as time.",
        "",
    ]
    if names_in(results, COMPILED):
        text += [
            "(*) JAX's stream cannot be captured: the mean of calls in a row, without the flush. FlexAttention and "
            "JAX, which compile for long, are measured at head_dim 128 and 8k alone.",
            "",
        ]
    if eager:
        text += ["(†) Not captured: calls, of whose time on the host some may show.", ""]
    text.append(table(on_the_ladder, PEERS, eager))
    if beside:
        text += [
            "## Beside the ladder",
            "",
            "Under a window only the pairs it leaves count as work. Packed: 64 sequences of 100 to 8000 tokens, and "
            "below them 64 of their mean length. There FA2 is called below torch's scaled_dot_product_attention, which "
            "has neither.",
            "",
            table(beside, PEERS, eager),
        ]
    if halves:
        text += ["## float16", "", table(halves, PEERS, eager)]
    if any(row.deterministic for row in results):
        text += ["## The same bits in every run", "", determinism(results, eager)]
    return "\n".join(text)


def host_calls() -> dict[str, Call]:
    x = torch.randn(2, 128, 4, 128, device="cuda", dtype=torch.float16)
    out, lse = cufa.attention(x, x, x, causal=True, return_lse=True)
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for _ in range(3))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    dout = torch.ones_like(attended)
    calls: dict[str, Call] = {
        "torch": lambda: cufa.attention_backward(x, x, x, x, out, lse, causal=True),
        "torch's autograd of scaled_dot_product_attention": lambda: torch.autograd.grad(
            attended, (q, k, v), dout, retain_graph=True
        ),
    }
    with contextlib.suppress(ImportError):
        import cupy

        y = cupy.zeros((2, 128, 4, 128), cupy.float16)
        cupy_out, cupy_lse = cufa.attention(y, y, y, causal=True, return_lse=True)
        calls["CuPy"] = lambda: cufa.attention_backward(y, y, y, y, cupy_out, cupy_lse, causal=True)
    return calls


def main() -> None:
    arguments = command_line(__doc__, PEERS)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would count against deterministic gradients
    if arguments.cliffs:
        peers = {"cufa": _cufa, "cufa, dense": as_dense(_cufa)} | {
            name: _autograd(make) for name, make in CLIFFS.items()
        }
        run_cliffs(arguments, "backward", peers, BACKWARD_WORK)
        return
    ceiling = start()
    rows = selected(arguments, SEQLENS, beside_the_ladder() + variants())
    compile_ahead(rows, _cufa, backward=True)
    results, eager = measure(rows, PEERS, backward=True, repeats=20)
    generic = arguments.kernel == "sm80"
    title = f"Backward on {torch.cuda.get_device_name()}" + ", the kernel for every GPU" * generic
    text = report(title, ceiling, results, eager)
    if not generic:
        text = "\n".join([text, *host_costs(host_calls())])
    print(text)
    if arguments.out:
        write(arguments.out, "backward-sm80" if generic else "backward", title, text, results, PEERS, ceiling)


if __name__ == "__main__":
    main()

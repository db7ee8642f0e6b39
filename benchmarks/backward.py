"""cufa's backward beside that of every peer that can be imported.

    python benchmarks/backward.py [--out DIR] [--ladder] [--quick] [--cliffs] [--only REGEX] [--kernel sm80]

As `attention.py` measures the forward, with 2.5 times its operations. A peer's time is that of its whole gradient, with
what comes before and after its kernel, such as the sum of dk and dv over the query heads that share a key head. Beside
the ladder stand other head_dims, windows, packed sequences, many heads and few, float16, float32, what
``deterministic=True`` costs, windows beside causal masks and mixed lengths beside equal ones, and what a call costs the
host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping

import torch
from attention import host_costs
from cliffs import FORWARD as CLIFFS
from cliffs import as_dense, run_cliffs
from common import BESIDE, command_line, notes, pairs, per_flop, selected, start, write

import cufa
from cufa._bench.frameworks import Framework, Torch
from cufa._bench.measure import BACKWARD_WORK, compile_ahead, conditions, measure
from cufa._bench.peers import BACKWARD, Call, Peer, autograd
from cufa._bench.reports import (
    BACKWARD_SEQLENS,
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
    single_precision,
    split,
    table,
)

DETERMINISTIC = ("cufa", BASELINE, "FA4")
"""Peers that can be."""

BY_DEFAULT = ", default"
"""What the name of a peer that is not asked to be has behind it."""


def variants() -> list[Row]:
    """The ladder's rows at 8k in float16, many heads, and all that is also measured with deterministic gradients."""
    halves = [row._replace(dtype="float16") for row in ladder((8192,)) if row.num_heads_q == row.num_heads_k]
    many = [Row(128, seqlen, 4, 48, 48, True) for seqlen in (1024, 2048, 4096)]
    few = [Row(128, 8192, 1, 4, 4, True)]
    few += [Row(64, 512, 32, 32, 32, causal, lengths=(512,) * 32) for causal in (False, True)]
    mixed = [row for row in beside_the_ladder() if row.lengths]
    ordered = ladder(BACKWARD_SEQLENS) + few + mixed
    return many + few + halves + single_precision() + [row._replace(deterministic=True) for row in ordered]


# --- report -----------------------------------------------------------------------------------------


def twice(peers: Mapping[str, Peer]) -> dict[str, Peer]:
    """Those of `peers` that can be deterministic, and each again as it is by default, for which rows need not ask."""

    def by_default(make: Peer) -> Peer:
        return lambda framework, row, *given: make(framework, row._replace(deterministic=False), *given)

    able = {name: peers[name] for name in DETERMINISTIC if name in peers}
    return able | {name + BY_DEFAULT: by_default(make) for name, make in able.items()}


def determinism(results: Results, eager: set[tuple[Row, str]]) -> str:
    """Deterministic rows as Markdown, with the time over that of the same call without, which took turns with it."""
    names = names_in(results, DETERMINISTIC)
    lines = []
    for row, speeds in results.items():
        cells = labels(row)
        for name in names:
            default = speeds.get(name + BY_DEFAULT)
            cells.append(cell(row, name, speeds, eager))
            cells.append(f"{default / speeds[name]:.2f}×" if default and name in speeds else "–")
        lines.append(cells)
    head = [title for name in names for title in (name, "time / default")]
    return "\n".join(markdown([*LABELS, *head], lines)) + "\n"


def report(
    title: str,
    framework: Framework,
    ceiling: float,
    results: Results,
    peers: Collection[str],
    eager: set[tuple[Row, str]],
) -> str:
    """All tables, each where it has rows."""
    ordered = {row: speeds for row, speeds in results.items() if row.deterministic}
    on_the_ladder, beside, halves, singles = split({row: results[row] for row in results if row not in ordered})
    text = [
        f"# {title}",
        "",
        f"{conditions(framework, ceiling)} 2.5 times the forward's operations count as work; what a peer does "
        "before and after its kernel counts as time.",
        "",
    ]
    text += notes(results, peers, eager)
    text.append(table(on_the_ladder, peers, eager))
    if beside:
        text += [
            "## Beside the ladder",
            "",
            f"{BESIDE} 32 packed: sequences of 512 tokens.",
            "",
            table(beside, peers, eager),
        ]
    if halves:
        text += ["## float16", "", table(halves, peers, eager)]
    if singles:
        text += ["## float32", "", table(singles, peers, eager)]
    if ordered:
        text += ["## The same bits in every run", "", determinism(ordered, eager)]
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
    peers = dict(BACKWARD)
    arguments = command_line(__doc__, peers)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would count against deterministic gradients
    if arguments.cliffs:
        ours = BACKWARD["cufa"]
        measured = {"cufa": ours, "cufa, dense": as_dense(ours)}
        run_cliffs(
            arguments, "backward", measured | {name: autograd(make) for name, make in CLIFFS.items()}, BACKWARD_WORK
        )
        return
    framework = Torch()
    ceiling = start(framework)
    rows = selected(arguments, BACKWARD_SEQLENS, beside_the_ladder() + variants())
    compile_ahead(rows, peers["cufa"], framework, backward=True)
    results: Results = {}
    eager: set[tuple[Row, str]] = set()
    for ordered in (False, True):
        able = twice(peers) if ordered else peers
        chosen = [row for row in rows if row.deterministic == ordered]
        found, uncaptured = measure(chosen, able, framework, backward=True, repeats=20)
        results |= found
        eager |= uncaptured
    generic = arguments.kernel == "sm80"
    title = f"Backward on {framework.device_name()}" + ", the kernel for every GPU" * generic
    text = report(title, framework, ceiling, results, peers, eager)
    if not generic:
        beside = per_flop(pairs(arguments), peers["cufa"], framework, backward=True)
        text = "\n".join([text, *beside, *host_costs(host_calls())])
    print(text)
    if arguments.out:
        write(arguments.out, "backward-sm80" if generic else "backward", title, text, results, peers, ceiling)


if __name__ == "__main__":
    main()

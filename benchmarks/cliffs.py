"""Shapes that are easily slow, beside every backend of torch: ``--cliffs`` of attention.py and backward.py.

Where torch has no packed form, its dense one stands beside packed sequences of one length. Its causal masks are aligned
at the top left, except those that are asked for below scaled_dot_product_attention.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import torch
import torch.nn.functional as functional
from common import start, write
from torch.nn.attention import SDPBackend, sdpa_kernel

from cufa._bench.frameworks import Framework, Torch
from cufa._bench.measure import compile_ahead, conditions, measure
from cufa._bench.peers import Call, Peer, refusing
from cufa._bench.reports import BASELINE, Row, cliffs, times

LIMIT = 1.3
"""What no shape may take of the time of the fastest backend."""

LOWER_RIGHT = 2
"""``custom_mask_type`` of the memory-efficient backend: causal, aligned at the last query and key."""


def dense_of(row: Row) -> Row:
    """The same sequences, of one length, as a batch."""
    if row.lengths is None or len(set(row.lengths)) != 1:
        raise NotImplementedError("not packed, or not of one length")
    return row._replace(lengths=None)


def as_dense(make: Peer) -> Peer:
    """A peer on the dense form of packed sequences of one length."""

    def made(framework: Framework, row: Row, *given: Any) -> Call:
        shape = row.batch, row.seqlen
        run = make(framework, dense_of(row), *(x.view(*shape, *x.shape[1:]) for x in given))

        def packed() -> Any:
            results = run()
            if isinstance(results, tuple):
                return tuple(x.reshape(-1, *x.shape[2:]) for x in results)
            return results.reshape(-1, *results.shape[2:])

        return packed

    return made


def _sdpa(backend: SDPBackend) -> Peer:
    def make(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
        def run() -> Any:
            with sdpa_kernel(backend):
                out = functional.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=row.causal
                )
            return out.transpose(1, 2)

        return refusing(run)

    return make


def _either(backend: SDPBackend, lower_right: Peer | None) -> Peer:
    """A backend by scaled_dot_product_attention, or below it where masks have to be aligned at the end."""
    plain = _sdpa(backend)

    def make(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
        if row.lengths is not None:
            return as_dense(plain)(framework, row, q, k, v)
        if row.seqlen_k is None or not row.causal:
            return plain(framework, row, q, k, v)
        if lower_right is None:
            raise NotImplementedError("no mask that is aligned at the last key")
        return lower_right(framework, row, q, k, v)

    return make


def _flash_lower_right(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
    def run() -> Any:
        transposed = (x.transpose(1, 2) for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(*transposed, 0.0, True)[0].transpose(1, 2)

    return run


def _efficient_lower_right(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
    return lambda: torch.ops.aten._efficient_attention_forward(
        q, k, v, None, None, None, None, None, 0.0, LOWER_RIGHT, True
    )[0]


def _flash_packed(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
    if row.lengths is None:
        raise NotImplementedError("not packed")
    offsets, longest = framework.offsets(row.lengths), max(row.lengths)
    return lambda: torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, 0.0, row.causal, False
    )[0]


FORWARD: dict[str, Peer] = {
    BASELINE: _either(SDPBackend.FLASH_ATTENTION, _flash_lower_right),
    "cuDNN (torch)": _either(SDPBackend.CUDNN_ATTENTION, None),
    "memory-efficient (torch)": _either(SDPBackend.EFFICIENT_ATTENTION, _efficient_lower_right),
    "FA2, packed": _flash_packed,
}
"""torch's backends, as peers."""


def run_cliffs(arguments: argparse.Namespace, direction: str, peers: dict[str, Peer], work: float) -> None:
    """Measure the rows, and tell times and what cufa takes of the fastest backend's."""
    unwanted = arguments.without.split(",")
    peers = {name: make for name, make in peers.items() if name not in unwanted}
    rows = [row for row in cliffs() if re.search(arguments.only, str(row))]
    framework = Torch()
    ceiling = start(framework)
    compile_ahead(rows, peers["cufa"], framework, backward=direction == "backward")
    results, eager = measure(rows, peers, framework, backward=direction == "backward", repeats=15)
    title = f"{direction.capitalize()} on {framework.device_name()}, shapes that are easily slow"
    text = "\n".join(
        [f"# {title}", "", conditions(framework, ceiling), "", "In µs:", "", times(results, peers, eager, work, LIMIT)]
    )
    print(text)
    if arguments.out:
        write(arguments.out, f"{direction}-cliffs", title, text, results, peers, ceiling)

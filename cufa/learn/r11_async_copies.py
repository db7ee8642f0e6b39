"""Rung 11: copies beside the products. While a tile is multiplied, the next one is on its way.

``cp.async`` copies 16 bytes from global to shared memory without a register in between, and does not wait. Copies are
counted in groups: ``commit_group`` closes one, and ``wait_group 1`` waits until at most the last one is unfinished.
With two tiles of k and two of v in shared memory (*double buffering*) a round is::

    begin the copies of the next tile
    wait for those of this one                  its own; a barrier then tells of those of other threads
    scores, softmax, output                     the copies run beside them
    barrier                                     all have read the tile: the next round may overwrite it

A copy takes some 500 to 1000 clocks to arrive, whatever is done about it. Rung 10 spends them waiting, for one copy
after the other, and hides them only as far as another block on the SM has something to do. Here all copies of a tile
are under way at a time, and their clocks pass during the products.

Bytes that are not there, as keys behind the end, are filled with zeros by the copy itself, which is told how many of
the 16 to read.

What is left: reading v from shared memory, two bytes at a time.
"""

from __future__ import annotations

from typing import Any

from .host import launch

TITLE = "copies beside the products (cp.async)"
ROWS = 64
"""Rows of q that share one reading of k and v."""


def shared_bytes(head_dim: int) -> int:
    """Two tiles of 64 keys and two of values, of which each row is padded."""
    return 4 * 64 * (head_dim + 8) * 2


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, softmax_scale: float | None = None) -> Any:
    """Attention of arrays on a GPU: float16 or bfloat16, (batch, seqlen, heads, 64 or 128), C-contiguous."""
    return launch(__name__, q, k, v, causal, softmax_scale, rows=ROWS, threads=128, shared_bytes=shared_bytes)

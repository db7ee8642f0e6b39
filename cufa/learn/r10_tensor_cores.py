"""Rung 10: products on the tensor cores. One instruction of a warp multiplies a matrix of 16 x 16 with one of 16 x 8.

``mma.sync.m16n8k16`` takes its operands from the registers of a warp, in which they are dealt out in a fixed way. With
g = lane / 4 and t = lane % 4:

- the left operand A (rows of q, or of P): rows g and g + 8, columns 2 t, 2 t + 1, and these + 8: four registers of two
  elements;
- the right one B (keys, or columns of v): column g, rows 2 t, 2 t + 1, and these + 8: two registers;
- the result, float32: rows g and g + 8, columns 2 t and 2 t + 1: four registers.

A result has the layout of half an A: two results side by side, packed to 16 bits, are the left operand of the next
product. So **P goes from the first product to the second without leaving the registers**, and a row's maximum and sum
are those of four lanes, two shuffles away.

A block has four warps with 16 rows each. q is read once, into registers. A pair of B of the scores lies side by side in
the tile of k (columns of one key). A pair of the output's does not (one column of two keys), so v takes two reads of
two bytes and an instruction to join them.

- **Padding**: a row of a tile is 16 bytes longer than it has to be. Else eight rows would begin in the same bank, and
  the eight values of g would queue for every pair.
- **Masks** are for tiles on an edge alone. All others take no comparison.
- **Keys behind the end are zeros**, and not whatever lies there: 0 · NaN is NaN.

What is left: copies and products wait for each other, at two barriers for each tile. And a copy is a load and a store
that waits for it. Whether a key is there is a branch between them, over which the compiler takes no load: a thread has
eight copies for each tile, or 16 of 128 columns, and each begins when the one before has arrived.
"""

from __future__ import annotations

from typing import Any

from .host import launch

TITLE = "products on the tensor cores (mma.sync)"
ROWS = 64
"""Rows of q that share one reading of k and v."""


def shared_bytes(head_dim: int) -> int:
    """A tile of 64 keys and one of values, of which each row is padded."""
    return 2 * 64 * (head_dim + 8) * 2


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, softmax_scale: float | None = None) -> Any:
    """Attention of arrays on a GPU: float16 or bfloat16, (batch, seqlen, heads, 64 or 128), C-contiguous."""
    return launch(__name__, q, k, v, causal, softmax_scale, rows=ROWS, threads=128, shared_bytes=shared_bytes)

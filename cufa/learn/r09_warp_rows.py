"""Rung 9: a warp shares its rows. Each of its lanes has a small tile of the products in registers.

A warp has 16 rows, and a tile 64 keys. The lanes are a matrix of 4 x 8, which divides the work twice:

- **For the scores a lane has four rows and eight keys.** Of eight columns these are 12 reads of 16 bytes, whose
  elements are unpacked once each, and 256 multiply-adds. In rung 8 a read of 16 bytes is good for eight of them.
- **For the output it has the same four rows and an eighth of the columns.** It needs the probabilities of all keys,
  which go from lane to lane through shared memory, four keys in a read of 16 bytes. An element of v is unpacked for
  four rows.

To use each number that is read several times over, and to hold it in registers meanwhile, is *register blocking*: what
is left is nearly the multiply-adds alone. The maximum of a row is that of eight lanes, three shuffles for 64 keys.

**Banks.** Shared memory has 32 banks of 4 bytes. Reads of 16 bytes go through in four parts of eight lanes; eight lanes
read the same chunk of eight keys, and if a row is 128 or 256 bytes long, all eight chunks are in the same four banks,
one after the other. With a chunk more per row (`chunks + 1` in the kernel) they lie in all 32.

A kernel declares up to 48 KB of shared memory. What is ``extern __shared__`` takes as much as the launch asks for, on
Hopper up to 227 KB.

A block has 64 rows here, so k and v are read from the L2 cache twice as often as in rung 8. That is not what it waits
for.

What is left: the floating-point units. An SM multiplies and adds 128 pairs of numbers in a clock with them, and the
tensor cores 1024 (A100) or 2048 (H100).
"""

from __future__ import annotations

from typing import Any

from .host import launch

TITLE = "a warp shares its rows, in registers"
ROWS = 64
"""Rows of q that share one reading of k and v."""


def shared_bytes(head_dim: int) -> int:
    """q and a tile of keys with a padded row each, one of values, and probabilities in float32, padded likewise."""
    return 2 * 64 * (2 * (head_dim + 8) + head_dim) + 4 * 64 * (64 + 8)


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, softmax_scale: float | None = None) -> Any:
    """Attention of arrays on a GPU: float16 or bfloat16, (batch, seqlen, heads, 64 or 128), C-contiguous."""
    return launch(__name__, q, k, v, causal, softmax_scale, rows=ROWS, threads=128, shared_bytes=shared_bytes)

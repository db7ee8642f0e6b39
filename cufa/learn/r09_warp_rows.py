"""Rung 9: a warp shares its rows. It has eight, whose work its lanes divide twice, each time anew.

- **For the scores a lane has a key.** It reads the key 16 bytes at a time, unpacks them once, and multiplies them with
  eight rows of q, which all lanes read at the same address. So an element is unpacked for eight rows, and not for one.
- **For the output a lane has columns**, head_dim / 32 of them, of all eight rows. It needs the probabilities of all
  keys, which go from lane to lane through shared memory: four keys in one read of 16 bytes.

Both keep 8 numbers in registers for each one that is read (*register blocking*): what is left is nearly the
multiply-adds alone. The maximum of a row takes five shuffles, but only once for 32 keys.

**Banks.** Shared memory has 32 banks of 4 bytes. Reads of 16 bytes go through in four parts of eight lanes; eight lanes
read the same chunk of eight rows, and if a row is 128 or 256 bytes long, all eight chunks are in the same four banks,
one after the other. With a chunk more per row (`chunks + 1` in the kernel) they lie in all 32.

A kernel declares up to 48 KB of shared memory. What is ``extern __shared__`` takes as much as the launch asks for, on
Hopper up to 227 KB.

A block has only 32 rows here, so k and v are read from the L2 cache as often as in rung 7; they are read well now.

What is left: the floating-point units. An SM multiplies and adds 128 pairs of numbers in a clock with them, and the
tensor cores 1024 (A100) or 2048 (H100).
"""

from __future__ import annotations

from typing import Any

from .host import launch

TITLE = "a warp shares its rows, 16 bytes at a time"
ROWS = 32
"""Rows of q that share one reading of k and v."""


def shared_bytes(head_dim: int) -> int:
    """q and probabilities in float32, a tile of 32 keys with a padded row each, and one of values."""
    return 4 * (32 * head_dim + 32 * 32) + 2 * 32 * (head_dim + 8 + head_dim)


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, softmax_scale: float | None = None) -> Any:
    """Attention of arrays on a GPU: float16 or bfloat16, (batch, seqlen, heads, 64 or 128), C-contiguous."""
    return launch(__name__, q, k, v, causal, softmax_scale, rows=ROWS, threads=128, shared_bytes=shared_bytes)

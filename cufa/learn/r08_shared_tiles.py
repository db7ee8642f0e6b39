"""Rung 8: tiles of keys and values in shared memory. The same thread per row, but its neighbours help it to read.

The 128 threads of a block copy 32 keys and values to shared memory together, then each goes over them for its own row.

- **Reading side by side**: neighbouring threads copy neighbouring words, so a warp reads 128 bytes in one piece. A tile
  is read once for 128 rows, where rung 7 reads it for 32.
- **q stays in registers**, two elements to a register, for all keys. A thread of 128 columns has 64 of them, beside 128
  for its output; the compiler has to be kept from unpacking q ahead of the loop, or registers spill to memory.
- **All threads read the same words of a tile** at a time, which shared memory hands to all of them at once. Other
  addresses in the same bank would have to queue: see rungs 9 and 12.
- **The output is rescaled only when the maximum grows**. Of keys in random order the n-th has the largest score by a
  chance of 1 in n, so that a row of 4096 keys does so nine times. All lanes of a warp wait while one does, which is for
  some 170 of the keys.

Two barriers surround a copy: one lest anybody overwrites what others still read, and one lest anybody reads what is not
there yet. Threads whose rows end earlier, under a causal mask, still come to both.

What is left: two multiply-adds for each column and key are what the products need. But to unpack the elements takes as
many instructions again, and each thread does it for the same keys.
"""

from __future__ import annotations

from typing import Any

from .host import launch

TITLE = "tiles of keys and values in shared memory"
ROWS = 128
"""Rows of q that share one reading of k and v."""


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, softmax_scale: float | None = None) -> Any:
    """Attention of arrays on a GPU: float16 or bfloat16, (batch, seqlen, heads, 64 or 128), C-contiguous."""
    return launch(__name__, q, k, v, causal, softmax_scale, rows=ROWS, threads=128)

"""Rung 7: one thread per row. The first kernel: the loop of rung 2, by as many threads as there are rows of q.

A thread has one row of one head. It goes over the keys that the row sees, and holds the state of the online softmax:
the largest score, the sum, and a row of out, a register for each column. So nothing of the scores is ever in memory,
and memory is what this kernel waits for all the same.

- **q is read again for every key**, an element at a time. Neighbouring threads have neighbouring rows, whose elements
  lie a whole row apart: one instruction of a warp reads 32 lines of the cache for 32 elements of two bytes.
- **k and v are read by all threads of a warp at once** at the same address. That is one access for 32 rows, but a warp
  is all that shares it: every warp of the GPU asks for every key.
- **Each key multiplies the whole output** by 2^(old maximum − new maximum), although this is seldom another number than
  1.

Exponentials are powers of 2, which is what the hardware has (``ex2``); so the scale of the scores has a factor log2(e).

What to look at: `cufa learn` says how many registers a thread has. They are what bounds how many threads an SM holds,
and with them how many loads are in flight while others wait.
"""

from __future__ import annotations

from typing import Any

from .host import launch

TITLE = "one thread per row"
ROWS = 32
"""Rows of q that share one reading of k and v."""


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, softmax_scale: float | None = None) -> Any:
    """Attention of arrays on a GPU: float16 or bfloat16, (batch, seqlen, heads, 64 or 128), C-contiguous."""
    return launch(__name__, q, k, v, causal, softmax_scale, rows=128, threads=128)

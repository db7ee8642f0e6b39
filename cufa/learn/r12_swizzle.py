"""Rung 12: swizzled tiles, read by ldmatrix. The right operands of two products arrive with one instruction.

``ldmatrix.x4`` reads four matrices of 8 x 8 elements. Each lane gives the address of a row, 16 bytes, and gets the pair
of elements that ``mma`` wants of it, from each of the four. ``.trans`` transposes them on the way, and that is how v is
read: no more reads of two bytes, and nothing to join. In the kernel of 128 columns one tile takes a warp 64 reads,
where rung 11 takes 384.

**The swizzle.** Eight rows of a matrix are the same chunk of eight rows of the tile. In a tile without padding these
lie in the same banks. So chunk c of row r is stored in the place c xor (r mod 8): the same chunk of eight rows is in
eight different places, which are all 32 banks, and a row is still written in one piece. In contrast to padding this
costs no memory, and rows stay aligned to 128 bytes, as the tensor copies of rung 13 want it. They have this very
swizzle built in.

What is left: mma.sync reads its operands through registers, and warps issue instructions for all of it: copies,
ldmatrix, mma, softmax. On Hopper, mma.sync does not reach two thirds of what the tensor cores do with wgmma.
"""

from __future__ import annotations

from typing import Any

from .host import launch

TITLE = "swizzled tiles, read by ldmatrix"
ROWS = 64
"""Rows of q that share one reading of k and v."""


def shared_bytes(head_dim: int) -> int:
    """Two tiles of 64 keys and two of values."""
    return 4 * 64 * head_dim * 2


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, softmax_scale: float | None = None) -> Any:
    """Attention of arrays on a GPU: float16 or bfloat16, (batch, seqlen, heads, 64 or 128), C-contiguous."""
    return launch(__name__, q, k, v, causal, softmax_scale, rows=ROWS, threads=128, shared_bytes=shared_bytes)

"""Rung 13: wgmma, tensor copies and specialised warps. A small kernel for Hopper, with what makes the large one fast.

- **wgmma** multiplies 64 rows by up to 256 columns, for the four warps of a *warpgroup* at once, and does not wait. Its
  right operand comes straight from shared memory, and the left one from there or from registers, so the warps issue
  next to nothing. A *descriptor* says where an operand lies and how it is swizzled. Accumulators stay in registers, in
  the layout that rung 10 has.
- **Tensor copies (TMA)**: one thread names a box of a tensor by its coordinates, and the hardware finds the addresses,
  fills what lies outside with zeros and swizzles the rows. What there is of the tensor says a *tensor map*, which the
  host makes (`cufa.tensor_map`).
- **mbarriers** count arrivals and bytes. A tile is *full* when its bytes have arrived, and *empty* when every warp has
  read it; who waits for a phase asks for its parity. They take the place of barriers for the block.
- **Specialised warps**: a warpgroup of *producers* does nothing but begin copies, and two of *consumers* nothing but
  compute, 64 rows each. ``setmaxnreg`` moves registers from those who load to those who compute: 240 for each thread of
  the latter.
- **Products beside the softmax**: a consumer begins the scores of a tile and then the output of the tile before. It
  waits for the scores alone; while it turns them into probabilities, the tensor cores are at work on the output.

The compiler needs watching here. It moves waits for wgmma up, above the softmax that should run beside them, unless
there is a branch between; and if it cannot tell the registers of an unfinished product from others, it makes all
products wait, and says so in its log (``C7510`` and what follows). `JitKernel.compile` returns the log.

What is left is in cufa's own kernel (``cuda_src/attention/mainloop_sm90.cuh``, and docs/forward_sm90.md): a softmax
that looks for no maxima, warpgroups that take turns on the tensor cores, blocks that go from tile to tile without a
seam, and an even division of work under a causal mask.
"""

from __future__ import annotations

from typing import Any

from .._jit.tensor_map import tensor_map
from .host import kernel, problem

TITLE = "Hopper: wgmma, TMA, specialised warps"
ROWS = 128
"""Rows of q that share one reading of k and v."""

TILE_KEYS, STAGES, THREADS = 128, 2, 384


def shared_bytes(head_dim: int) -> int:
    """q, tiles of keys and of values, and the barriers, of 8 bytes each."""
    return (ROWS + 2 * STAGES * TILE_KEYS) * head_dim * 2 + 8 * (1 + 4 * STAGES)


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, softmax_scale: float | None = None) -> Any:
    """Attention of arrays on a GPU: float16 or bfloat16, (batch, seqlen, heads, 64 or 128), C-contiguous."""
    x = problem(q, k, v, softmax_scale)
    maps = (tensor_map(each, (1, rows, 1, 64), swizzle=128) for each, rows in ((q, 64), (k, TILE_KEYS), (v, TILE_KEYS)))
    kernel("r13_hopper", x.dtype, x.head_dim)(
        *(*maps, x.out, x.seqlen_q, x.seqlen_k, x.heads, x.scale, causal),
        grid=(-(-x.seqlen_q // ROWS), x.batch * x.heads),
        block=THREADS,
        shared_bytes=shared_bytes(x.head_dim),
    )
    return x.out

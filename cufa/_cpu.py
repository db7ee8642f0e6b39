"""Attention on NumPy arrays: blocked online softmax over BLAS, never a whole matrix of scores.

The algorithm box of FlashAttention-2 with NumPy verbs: a block of queries keeps a running maximum, a running
sum and an accumulator while blocks of keys pass by. float64 is computed in float64, every other dtype in
float32. Arrays may have any strides, negative and zero ones included; they are validated by the caller.

A *slab* is the part of the problem worked on at once: some batch entries × some key heads × `block_m` queries
of each query head. The heads of a group are folded into the rows, so that k and v are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

BLOCK_M = 512
"""Rows of scores in a slab at most: queries × query heads of a group."""
BLOCK_N = 1024
"""Keys in a block, where there are enough rows; fewer rows take more keys, up to `MAX_BLOCK_N`."""
MAX_BLOCK_N = 4096
TILE_ELEMENTS = BLOCK_M * BLOCK_N
"""Scores held at once; 2 MiB in float32, so that the passes over them stay in the cache."""
OPERAND_ELEMENTS = 1 << 21
"""Elements of q, k, v and accumulator held at once, at most; 8 MiB in float32."""


class Blocks(NamedTuple):
    """The slab and key block of one problem: see `block_sizes`."""

    batch: int
    num_heads_k: int
    block_m: int
    block_n: int


def block_sizes(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    num_heads_q: int,
    num_heads_k: int,
    head_dim: int = 64,
    head_dim_v: int = 64,
) -> Blocks:
    """The blocking of a problem: batch entries, key heads and queries of a slab, and keys of a block.

    Examples
    --------
    >>> from cufa._cpu import block_sizes
    >>> block_sizes(2, 4096, 4096, 8, 8)
    Blocks(batch=1, num_heads_k=1, block_m=512, block_n=1024)
    >>> block_sizes(2, 1, 300, 8, 2)  # one query: all heads and batch entries at once
    Blocks(batch=2, num_heads_k=2, block_m=1, block_n=300)
    """
    qheads_per_khead = max(num_heads_q // max(num_heads_k, 1), 1)
    block_m = max(min(BLOCK_M // qheads_per_khead, seqlen_q), 1)
    rows = block_m * qheads_per_khead
    block_n = max(min(max(BLOCK_N, TILE_ELEMENTS // rows), MAX_BLOCK_N, seqlen_k), 1)
    operands = (rows + block_n) * (head_dim + head_dim_v)
    slabs = max(min(TILE_ELEMENTS // (rows * block_n), OPERAND_ELEMENTS // operands), 1)
    heads = max(min(slabs, num_heads_k), 1)
    return Blocks(max(min(slabs // heads, batch), 1), heads, block_m, block_n)


@dataclass(frozen=True)
class _Scoring:
    """What happens to a score; slopes are (1 or batch, num_heads_q) and sinks (num_heads_q,)."""

    softmax_scale: float
    window_left: int | None
    window_right: int | None
    softcap: float
    alibi_slopes: Array | None
    sinks: Array | None

    def slopes(self, entries: slice, heads: slice) -> Array | None:
        """The slopes of a slab, (1 or batch, heads)."""
        if self.alibi_slopes is None:
            return None
        return self.alibi_slopes[entries if len(self.alibi_slopes) > 1 else slice(None), heads]

    def keys(self, first: int, last: int, offset: int, seqlen_k: int) -> tuple[int, int]:
        """The range of keys that rows first to last, both inclusive, can see."""
        start = 0 if self.window_left is None else max(0, first + offset - self.window_left)
        stop = seqlen_k if self.window_right is None else min(seqlen_k, last + offset + self.window_right + 1)
        return start, stop


class _Workspace:
    """Buffers by name, allocated once and cut to size; a cut is always contiguous."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._buffers: dict[str, Array] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        size = int(np.prod(shape, dtype=np.int64))
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[name] = np.empty(size, self.dtype)
        return buffer[:size].reshape(shape)

    def operand(self, name: str, x: Array) -> Array:
        """x in the work dtype, in a layout that BLAS reads: x itself if it is, a copy if not."""
        rows, columns = x.strides[-2:]
        blas = columns == x.itemsize and rows >= x.shape[-1] * columns and rows % columns == 0
        if blas and x.dtype == self.dtype and x.flags.aligned:
            return x
        copy = self.take(name, x.shape)
        copy[...] = x
        return copy


def forward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array | None,
    *,
    softmax_scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    alibi_slopes: Array | None,
    sinks: Array | None,
) -> None:
    """Attention of a batch of equally long sequences, written into `out` and `lse`.

    Parameters
    ----------
    q, k, v, out : array, (batch, seqlen, num_heads, head_dim or head_dim_v)
        Any strides; float16, bfloat16, float32 or float64. `out` is in q's dtype.
    lse : array or None, (batch, num_heads_q, seqlen_q)
        Written in its own dtype.
    softmax_scale : float
        Multiplies q·kᵀ.
    window_left, window_right : int or None
        Keys before and after the bottom-right diagonal; None is unbounded. Causal is ``window_right=0``.
    softcap : float
        0.0 is off.
    alibi_slopes : array or None, (num_heads_q,) or (batch, num_heads_q)
    sinks : array or None, (num_heads_q,)

    Examples
    --------
    >>> import numpy as np
    >>> from cufa import _cpu
    >>> q = np.ones((1, 2, 1, 4), np.float32)
    >>> out = np.empty_like(q)
    >>> _cpu.forward(q, q, q, out, None, softmax_scale=0.5, window_left=None, window_right=0, softcap=0.0,
    ...              alibi_slopes=None, sinks=None)
    >>> out[0, :, 0, 0].tolist()
    [1.0, 1.0]
    """
    dtype = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    scoring = _Scoring(
        softmax_scale,
        window_left,
        window_right,
        softcap,
        None if alibi_slopes is None else np.atleast_2d(np.asarray(alibi_slopes, dtype=dtype)),
        None if sinks is None else np.asarray(sinks, dtype=dtype),
    )
    with np.errstate(all="ignore"):  # NaN and Inf are data, and exp underflows all the time
        _forward(q, k, v, out, lse, scoring, _Workspace(dtype))


def varlen_forward(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    seqused_k: Array | None,
    out: Array,
    lse: Array | None,
    *,
    softmax_scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    alibi_slopes: Array | None,
    sinks: Array | None,
) -> None:
    """`forward` for each of the sequences laid end to end in q, k and v.

    Parameters
    ----------
    q, k, v, out : array, (total, num_heads, head_dim or head_dim_v)
        Rows that belong to no sequence are neither read nor written.
    cu_seqlens_q, cu_seqlens_k : integer array, (batch + 1,)
    seqused_k : integer array or None, (batch,)
        Live keys of each sequence; what lies behind them is not read.
    lse : array or None, (num_heads_q, total_q)
    softmax_scale, window_left, window_right, softcap, alibi_slopes, sinks
        As in `forward`.
    """
    dtype = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    slopes = None if alibi_slopes is None else np.atleast_2d(np.asarray(alibi_slopes, dtype=dtype))
    scoring = _Scoring(
        softmax_scale,
        window_left,
        window_right,
        softcap,
        slopes,
        None if sinks is None else np.asarray(sinks, dtype=dtype),
    )
    workspace = _Workspace(dtype)
    starts_q, starts_k = np.asarray(cu_seqlens_q).tolist(), np.asarray(cu_seqlens_k).tolist()
    lengths_k = (np.diff(cu_seqlens_k) if seqused_k is None else np.asarray(seqused_k)).tolist()
    with np.errstate(all="ignore"):  # NaN and Inf are data, and exp underflows all the time
        for n, length_k in enumerate(lengths_k):
            rows, keys = slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n] + length_k)
            own = slopes[n : n + 1] if slopes is not None and len(slopes) > 1 else slopes
            lse_n = None if lse is None else lse[None, :, rows]
            qkv_out = q[None, rows], k[None, keys], v[None, keys], out[None, rows]
            _forward(*qkv_out, lse_n, replace(scoring, alibi_slopes=own), workspace)


def _forward(
    q: Array, k: Array, v: Array, out: Array, lse: Array | None, scoring: _Scoring, workspace: _Workspace
) -> None:
    batch, seqlen_q, num_heads_q, head_dim = q.shape
    seqlen_k, num_heads_k, head_dim_v = v.shape[1:]
    if out.size == 0 and (lse is None or lse.size == 0):
        return
    group = num_heads_q // num_heads_k
    blocks = block_sizes(batch, seqlen_q, seqlen_k, num_heads_q, num_heads_k, head_dim, head_dim_v)
    for entries in _cuts(batch, blocks.batch):
        for heads_k in _cuts(num_heads_k, blocks.num_heads_k):
            heads = slice(heads_k.start * group, heads_k.stop * group)
            # (batch, heads, rows, columns): what np.matmul takes a batch of
            keys, values = (x[entries, :, heads_k].swapaxes(1, 2) for x in (k, v))
            for rows in _cuts(seqlen_q, blocks.block_m):
                slab = _Slab(
                    scoring,
                    workspace,
                    scoring.slopes(entries, heads),
                    None if scoring.sinks is None else scoring.sinks[heads],
                    rows,
                    seqlen_k - seqlen_q,
                    group,
                )
                acc, row_lse = slab.attend(q[entries, rows, heads], keys, values, blocks.block_n)
                out[entries, rows, heads] = acc.swapaxes(1, 2)
                if lse is not None:
                    lse[entries, heads, rows] = row_lse


def _cuts(stop: int, step: int) -> Iterator[slice]:
    """[0, stop) in pieces of step."""
    return (slice(start, min(start + step, stop)) for start in range(0, stop, step))


@dataclass(frozen=True)
class _Slab:
    """Some rows of some heads of some batch entries, and their way through the keys."""

    scoring: _Scoring
    workspace: _Workspace
    slopes: Array | None
    sinks: Array | None
    rows: slice
    offset: int
    group: int

    def attend(self, q: Array, k: Array, v: Array, block_n: int) -> tuple[Array, Array]:
        """q (batch, rows, heads, head_dim), k and v (batch, key heads, seqlen_k, ·).

        Returns out (batch, heads, rows, head_dim_v) and lse (batch, heads, rows).
        """
        work, scoring = self.workspace, self.scoring
        batch, num_rows, heads, head_dim = q.shape
        # The heads of a group are rows of its key head.
        shape = (batch, heads // self.group, self.group * num_rows)
        scaled_q = work.take("q", (batch, heads, num_rows, head_dim))
        scaled_q[...] = q.swapaxes(1, 2)
        # Scaling q once is cheaper than scaling every score; so is dividing by the cap.
        scaled_q *= scoring.softmax_scale / (scoring.softcap if scoring.softcap > 0 else 1.0)
        scaled_q = scaled_q.reshape(*shape, head_dim)

        row_max, row_sum = work.take("row_max", (*shape, 1)), work.take("row_sum", (*shape, 1))
        acc, product = work.take("acc", (*shape, v.shape[-1])), work.take("product", (*shape, v.shape[-1]))
        self._begin(row_max.reshape(batch, heads, num_rows), row_sum.reshape(batch, heads, num_rows), acc)
        start, stop = scoring.keys(self.rows.start, self.rows.stop - 1, self.offset, k.shape[2])
        for first in range(start, stop, block_n):
            keys = slice(first, min(first + block_n, stop))
            k_block, v_block = work.operand("k", k[:, :, keys]), work.operand("v", v[:, :, keys])
            scores = work.take("scores", (*shape, keys.stop - keys.start))
            np.matmul(scaled_q, k_block.swapaxes(2, 3), out=scores)
            self._modify(scores.reshape(batch, heads, num_rows, -1), keys)
            decay = self._softmax(scores, row_max, row_sum)
            np.matmul(scores, v_block, out=product)
            acc *= decay
            acc += product
        # A row that kept no key has the sum 0; whatever a masked NaN left in its accumulator is no output.
        empty = row_sum == 0
        np.copyto(acc, 0, where=empty)
        acc /= np.where(empty, 1, row_sum)
        lse = np.where(np.isposinf(row_max), row_max, row_max + np.log(row_sum))
        return acc.reshape(batch, heads, num_rows, -1), lse.reshape(batch, heads, num_rows)

    def _begin(self, row_max: Array, row_sum: Array, acc: Array) -> None:
        """Nothing seen yet, or a sink: a key of score `sink` whose value is 0."""
        acc[...] = 0
        row_max[...] = -np.inf if self.sinks is None else self.sinks[:, None]
        np.not_equal(row_max, -np.inf, out=row_sum, casting="unsafe")

    def _modify(self, scores: Array, keys: slice) -> None:
        """Softcap, ALiBi and mask, in place; scores (batch, heads, rows, keys)."""
        scoring = self.scoring
        if scoring.softcap > 0:
            np.tanh(scores, out=scores)
            scores *= scoring.softcap
        diagonal = np.arange(self.rows.start + self.offset, self.rows.stop + self.offset)[:, None]
        j = np.arange(keys.start, keys.stop)
        if self.slopes is not None:
            bias = self.workspace.take("bias", scores.shape)
            distance = np.abs(diagonal - j).astype(scores.dtype)
            np.multiply(self.slopes[:, :, None, None], distance, out=bias)
            scores -= bias
        left, right = scoring.window_left, scoring.window_right
        if right is not None and keys.stop - 1 > self.rows.start + self.offset + right:
            np.copyto(scores, -np.inf, where=j > diagonal + right)
        if left is not None and keys.start < self.rows.stop - 1 + self.offset - left:
            np.copyto(scores, -np.inf, where=j < diagonal - left)

    def _softmax(self, scores: Array, row_max: Array, row_sum: Array) -> Array:
        """Turn scores into exponentials below the new running maximum; the factor for the old ones."""
        new_max = np.maximum(row_max, scores.max(axis=-1, keepdims=True))
        # Where nothing is kept yet, subtracting 0 makes every exponential 0; subtracting -inf would make NaN.
        shift = np.where(np.isneginf(new_max), scores.dtype.type(0), new_max)
        decay: Array = np.exp(row_max - shift)
        scores -= shift
        np.exp(scores, out=scores)
        row_sum *= decay
        row_sum += scores @ np.ones((scores.shape[-1], 1), scores.dtype)  # BLAS adds faster than sum()
        row_max[...] = new_max
        return decay

"""Attention on NumPy arrays: blocked online softmax over BLAS, never a whole matrix of scores.

The algorithm box of FlashAttention-2 with NumPy verbs: a block of queries keeps a running maximum, a running
sum and an accumulator while blocks of keys pass by. float64 is computed in float64, every other dtype in
float32. Arrays may have any strides, negative and zero ones included; they are validated by the caller.

A *slab* is the part of the problem worked on at once: some batch entries × some key heads × `block_m` queries
of each query head. The heads of a group are folded into the rows, so that k and v are never repeated.

Numbers too large for that show in the result: a score or an output that is not finite. Such a slab is computed once
more, *carefully*: in float64, which holds whatever float32 arrays can give, and with entries outside the mask left out
of sums, where NaN and Inf times 0 would count. So finite numbers cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, TypedDict, Unpack

import numpy as np

from .._terms.term import Array, Point, Term

Terms: TypeAlias = Sequence[tuple[Term, Mapping[str, Any]]]
"""Score terms in their order, each with its arrays and options by name."""

BLOCK_M = 512
"""Rows of scores in a slab at most: queries × query heads of a group."""
BLOCK_N = 1024
"""Keys in a block, where there are enough rows; fewer rows take more keys, up to `MAX_BLOCK_N`."""
MAX_BLOCK_N = 4096
TILE_ELEMENTS = BLOCK_M * BLOCK_N
"""Scores held at once; 2 MiB in float32, so that the passes over them stay in the cache."""
OPERAND_ELEMENTS = 1 << 21
"""Elements of q, k, v and accumulator held at once, at most; 8 MiB in float32."""
MAX_FOLDED = 2.0**40
"""Bound of what q may be multiplied by, or divided, first: then no denormal number costs bits that count."""


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
    >>> from cufa._cpu.forward import block_sizes
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


class Options(TypedDict):
    """What `forward` and its like take beside arrays; see there."""

    softmax_scale: float
    window_left: int | None
    window_right: int | None
    terms: Terms
    sinks: Array | None


@dataclass(frozen=True)
class _Scoring:
    """What happens to a score; sinks are (num_heads_q,).

    `unit` is that of the first term, by which q is divided; `bends` and `scales` are whether one of the terms does so.
    `sequence` is the number of the first batch entry.
    """

    softmax_scale: float
    window_left: int | None
    window_right: int | None
    terms: Terms
    sinks: Array | None
    unit: float
    bends: bool
    scales: bool
    careful: bool
    sequence: int = 0

    @classmethod
    def of(cls, q: Array, seqlen_k: int, **options: Unpack[Options]) -> _Scoring:
        """From what `forward` takes; careful from the start where the work dtype cannot hold the options."""
        sinks, terms = options["sinks"], options["terms"]
        largest = float(np.finfo(work_dtype(q)).max)
        share, farthest = largest / (4 * max(1, len(terms))), q.shape[-3] + seqlen_k
        sink = 0.0 if sinks is None else float(np.abs(sinks, dtype=np.float64).max(initial=0, where=~np.isinf(sinks)))
        fits = sink < largest / 4 and all(term.fits(given, farthest, share) for term, given in terms)
        unit = terms[0][0].unit(terms[0][1]) if terms else 1.0
        folds = unit < MAX_FOLDED and 1 / MAX_FOLDED < options["softmax_scale"] / unit < MAX_FOLDED
        return cls(
            **options,
            unit=unit,
            bends=any(term.bends for term, _ in terms),
            scales=any(term.scales for term, _ in terms),
            careful=not (fits and folds),
        )

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
    **options: Unpack[Options],
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
    terms : sequence of (Term, mapping)
        Score terms in the order in which they are applied, each with its arrays and options by name.
    sinks : array or None, (num_heads_q,)

    Examples
    --------
    >>> import numpy as np
    >>> from cufa._cpu.forward import forward
    >>> q = np.ones((1, 2, 1, 4), np.float32)
    >>> out = np.empty_like(q)
    >>> forward(q, q, q, out, None, softmax_scale=0.5, window_left=None, window_right=0, terms=(), sinks=None)
    >>> out[0, :, 0, 0].tolist()
    [1.0, 1.0]
    """
    with np.errstate(all="ignore"):  # NaN and Inf are data, and exp underflows all the time
        scoring = _Scoring.of(q, k.shape[-3], **options)
        _forward(q, k, v, out, lse, scoring, _workspaces(q))


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
    fresh: bool = False,
    **options: Unpack[Options],
) -> None:
    """`forward` for each of the sequences laid end to end in q, k and v.

    Parameters
    ----------
    q, k, v, out : array, (total, num_heads, head_dim or head_dim_v)
    cu_seqlens_q, cu_seqlens_k : integer array, (batch + 1,)
        Any numbers; read as `cufa.reference` says.
    seqused_k : integer array or None, (batch,)
        Live keys of each sequence; what lies behind them is not read.
    lse : array or None, (num_heads_q, total_q)
        -inf in rows that belong to no sequence.
    fresh : bool
        Rows of `out` that belong to no sequence become 0; without, they are not written.
    softmax_scale, window_left, window_right, terms, sinks
        As in `forward`.
    """
    with np.errstate(all="ignore"):  # NaN and Inf are data, and exp underflows all the time
        scoring = _Scoring.of(q, k.shape[-3], **options)
        workspaces, stop = _workspaces(q), 0
        for rows, keys, own in sequences(cu_seqlens_q, cu_seqlens_k, seqused_k, len(q), len(k), scoring):
            _clear(slice(stop, rows.start), out if fresh else None, lse)
            stop = rows.stop
            lse_n = None if lse is None else lse[None, :, rows]
            _forward(q[None, rows], k[None, keys], v[None, keys], out[None, rows], lse_n, own, workspaces)
        _clear(slice(stop, len(q)), out if fresh else None, lse)


def work_dtype(q: Array) -> np.dtype[Any]:
    """What is computed in, as long as its range is wide enough."""
    return np.dtype(np.float64 if q.dtype == np.float64 else np.float32)


def _workspaces(q: Array) -> tuple[_Workspace, _Workspace]:
    """Of the first attempt, and of the careful one."""
    return _Workspace(work_dtype(q)), _Workspace(np.dtype(np.float64))


def sequences(
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    seqused_k: Array | None,
    total_q: int,
    total_k: int,
    scoring: _Scoring,
) -> Iterator[tuple[slice, slice, _Scoring]]:
    """Rows, live keys and scoring of each sequence; offsets are clamped as `cufa.reference` says."""
    offsets_q, offsets_k = (
        np.clip(np.maximum.accumulate(np.asarray(given)), 0, total).tolist()
        for given, total in ((cu_seqlens_q, total_q), (cu_seqlens_k, total_k))
    )
    lengths = np.diff(offsets_k)
    lengths = (lengths if seqused_k is None else np.clip(seqused_k, 0, lengths)).tolist()
    for n, length in enumerate(lengths):
        rows, keys = slice(offsets_q[n], offsets_q[n + 1]), slice(offsets_k[n], offsets_k[n] + length)
        yield rows, keys, replace(scoring, sequence=n)


def _clear(rows: slice, out: Array | None, lse: Array | None) -> None:
    """Rows of no sequence."""
    if out is not None:
        out[rows] = 0
    if lse is not None:
        lse[:, rows] = -np.inf


def _forward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array | None,
    scoring: _Scoring,
    workspaces: tuple[_Workspace, _Workspace],
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
            for rows in _cuts(seqlen_q, blocks.block_m):
                slab = _Slab(scoring, workspaces[0], entries, heads, rows, seqlen_k - seqlen_q, group)
                found = None
                if not scoring.careful:
                    found = slab.attend(q[entries, rows, heads], k, v, blocks.block_n)
                if found is None:
                    slab = replace(slab, workspace=workspaces[1], careful=True)
                    found = slab.attend(q[entries, rows, heads], k, v, blocks.block_n)
                acc, row_lse = found  # type: ignore[misc]  # the careful one always finds
                out[entries, rows, heads] = acc.swapaxes(1, 2)
                if lse is not None:
                    lse[entries, heads, rows] = row_lse


def _cuts(stop: int, step: int) -> Iterator[slice]:
    """[0, stop) in pieces of step."""
    return (slice(start, min(start + step, stop)) for start in range(0, stop, step))


def select_matmul(a: Array, b: Array, keep: Array | None) -> Array:
    """a @ b, where entries of a outside `keep`, which are 0, do not count whatever their rows of b hold.

    None keeps all. Rows of b that hold NaN or Inf count as IEEE arithmetic has it elsewhere.
    """
    finite = np.isfinite(b)
    product: Array = a @ np.where(finite, b, 0)
    if finite.all():
        return product
    inside = np.ones(a.shape[-2:], dtype=bool) if keep is None else keep

    def met(chosen: Any, kind: Array) -> Any:
        """Whether a chosen entry of a's row meets that kind of number in b's column."""
        return np.matmul(np.asarray(chosen, dtype=a.dtype), kind.astype(a.dtype)) > 0

    plus, minus = np.isposinf(b), np.isneginf(b)
    up, down, zero = a > 0, a < 0, inside & (a == 0)
    product[met(up, plus) | met(down, minus)] += np.inf
    product[met(up, minus) | met(down, plus)] -= np.inf
    product[met(zero, plus | minus) | met(np.broadcast_to(inside, a.shape), np.isnan(b))] = np.nan
    return product


@dataclass(frozen=True)
class _Slab:
    """Some rows of some heads of some batch entries, and their way through the keys."""

    scoring: _Scoring
    workspace: _Workspace
    entries: slice
    heads: slice
    rows: slice
    offset: int
    group: int
    careful: bool = False

    @property
    def heads_k(self) -> slice:
        """Those that `heads` share."""
        return slice(self.heads.start // self.group, self.heads.stop // self.group)

    @property
    def sinks(self) -> Array | None:
        """(heads,)."""
        sinks = self.scoring.sinks
        return None if sinks is None else sinks[self.heads].astype(self.workspace.dtype)

    def attend(self, q: Array, k: Array, v: Array, block_n: int) -> tuple[Array, Array] | None:
        """q (batch, rows, heads, head_dim) of the slab; k and v, (batch, seqlen_k, key heads, ·), of the problem.

        Returns out (batch, heads, rows, head_dim_v) and lse (batch, heads, rows); None where care is needed.
        """
        work = self.workspace
        batch, num_rows, heads, _ = q.shape
        rows = self._scaled(q)
        shape = rows.shape[:-1]
        row_max, row_sum = work.take("row_max", (*shape, 1)), work.take("row_sum", (*shape, 1))
        acc, product = work.take("acc", (*shape, v.shape[-1])), work.take("product", (*shape, v.shape[-1]))
        self._begin(row_max.reshape(batch, heads, num_rows), row_sum.reshape(batch, heads, num_rows), acc)
        shrink = self._shrink(v)
        entries, heads_k = self.entries, self.heads_k
        start, stop = self.scoring.keys(self.rows.start, self.rows.stop - 1, self.offset, k.shape[1])
        for first in range(start, stop, block_n):
            keys = slice(first, min(first + block_n, stop))
            # (batch, heads, rows, columns): what np.matmul takes a batch of
            k_block, v_block = (
                work.operand(name, x[entries, keys, heads_k].swapaxes(1, 2)) for name, x in (("k", k), ("v", v))
            )
            scores = work.take("scores", (*shape, keys.stop - keys.start))
            np.matmul(rows, k_block.swapaxes(2, 3), out=scores)
            if not self._in_range(scores):
                return None
            at = self.at(keys)
            self._modify(scores.reshape(batch, heads, num_rows, -1), at, keys)
            decay = self._softmax(scores, row_max, row_sum)
            if self.scoring.scales:
                self._scale(scores.reshape(batch, heads, num_rows, -1), at)
            if self.careful:
                keep = self.keep(keys)
                p = scores if keep is None else np.where(keep, scores, 0)
                product = select_matmul(p, v_block * shrink, keep)
            else:
                np.matmul(scores, v_block, out=product)
            acc *= decay
            acc += product
        # A row that kept no key has the sum 0; what its keys' values left in its accumulator is no output.
        empty = row_sum == 0
        np.copyto(acc, 0, where=empty)
        acc /= np.where(empty, 1, row_sum)
        if shrink != 1.0:
            # No mean is larger than the largest value; what factors make of one may be.
            largest = np.inf if self.scoring.scales else np.finfo(work.dtype).max
            acc = np.where(np.isinf(acc), acc, np.clip(acc / shrink, -largest, largest))
        if not (self.careful or np.isfinite(acc).all()):
            return None
        lse = np.where(np.isposinf(row_max), row_max, row_max + np.log(row_sum))
        return acc.reshape(batch, heads, num_rows, -1), lse.reshape(batch, heads, num_rows)

    def _scaled(self, q: Array) -> Array:
        """q of a slab in the work dtype, (batch, key heads, rows, head_dim): a group's heads are rows of its key head.

        Scaling q once is cheaper than scaling every score, and so is dividing by the first term's unit; a careful slab
        does not, since what comes of it may be too large, or so small that bits are lost.
        """
        batch, num_rows, heads, head_dim = q.shape
        scaled = self.workspace.take("q", (batch, heads, num_rows, head_dim))
        scaled[...] = q.swapaxes(1, 2)
        if not self.careful:
            scaled *= self.scoring.softmax_scale / self.scoring.unit
        return scaled.reshape(batch, heads // self.group, self.group * num_rows, head_dim)

    def _in_range(self, products: Array) -> bool:
        """Whether no product overflowed; +inf is seen in the result, unless a term that bends hides it."""
        if self.careful:
            return True
        if self.scoring.bends and not products.max(initial=0) < np.inf:
            return False
        return bool(products.min(initial=0) > -np.inf)

    def _shrink(self, v: Array) -> float:
        """What v is multiplied by, lest its sums overflow; only float64 arrays can be so large."""
        if not self.careful or v.dtype != np.float64:
            return 1.0
        values = v[self.entries, :, self.heads_k]
        largest = np.abs(values).max(initial=0, where=np.isfinite(values))
        return 2.0**-64 if largest > 2.0**900 else 1.0

    def _begin(self, row_max: Array, row_sum: Array, acc: Array) -> None:
        """Nothing seen yet, or a sink: a key of score `sink` whose value is 0."""
        acc[...] = 0
        sinks = self.sinks
        row_max[...] = -np.inf if sinks is None else sinks[:, None]
        np.not_equal(row_max, -np.inf, out=row_sum, casting="unsafe")

    def keep(self, keys: slice) -> Array | None:
        """Which of these keys the rows keep, None if all do: (rows, keys), a group's heads folded.

        Where a term hides keys it is (batch, key heads, rows, keys).
        """
        diagonal = np.arange(self.rows.start + self.offset, self.rows.stop + self.offset)[:, None]
        j = np.arange(keys.start, keys.stop)
        left, right = self.scoring.window_left, self.scoring.window_right
        keep = np.ones((len(diagonal), len(j)), dtype=bool)
        if right is not None:
            keep &= j <= diagonal + right
        if left is not None:
            keep &= j >= diagonal - left
        hiding = [(term, given) for term, given in self.scoring.terms if term.hides]
        if hiding:
            at = self.at(keys)
            by_head = np.ones((len(at.batch), len(at.head), *keep.shape), dtype=bool) & keep
            for term, given in hiding:
                by_head &= term.keeps(at, given)
            return None if by_head.all() else by_head.reshape(len(by_head), -1, self.group * len(keep), len(j))
        return None if keep.all() else np.tile(keep, (self.group, 1))

    def at(self, keys: slice) -> Point:
        """Where the scores of these keys are."""
        entries, first = self.entries, self.scoring.sequence
        return Point(
            batch=np.arange(first + entries.start, first + entries.stop)[:, None, None, None],
            head=np.arange(self.heads.start, self.heads.stop)[:, None, None],
            query=np.arange(self.rows.start, self.rows.stop)[:, None],
            key=np.arange(keys.start, keys.stop),
            offset=self.offset,
        )

    def _modify(self, scores: Array, at: Point, keys: slice, slopes: list[Any] | None = None) -> None:
        """From products of rows of q and k to scores, in place; scores (batch, heads, rows, keys).

        The derivatives of terms that bend are appended to `slopes`, if it is given, with what the term was given; 1
        stands for the others'.
        """
        scoring = self.scoring
        if self.careful:
            scores *= scoring.softmax_scale
        for index, (term, given) in enumerate(scoring.terms):
            if index or self.careful:  # else it is in q
                unit = term.unit(given)
                if unit != 1.0:
                    scores /= unit
            if slopes is not None and (term.gives_slope or term.reads_score):
                given = {**given, "score": scores.copy()}
            scored = term.score(scores, at, given)
            if slopes is not None:
                slopes.append((term.dscore(scored, at, given) if term.bends else 1.0, given))
            if scored is not scores:
                scores[...] = scored
        diagonal, j = at.query + self.offset, at.key
        left, right = scoring.window_left, scoring.window_right
        if right is not None and keys.stop - 1 > self.rows.start + self.offset + right:
            np.copyto(scores, -np.inf, where=j > diagonal + right)
        if left is not None and keys.start < self.rows.stop - 1 + self.offset - left:
            np.copyto(scores, -np.inf, where=j < diagonal - left)
        for term, given in scoring.terms:
            if term.hides:
                np.copyto(scores, -np.inf, where=~np.asarray(term.keeps(at, given)))

    def _scale(self, p: Array, at: Point) -> None:
        """Multiply probabilities, or what they become by their sum, by the terms' factors, in place."""
        for term, given in self.scoring.terms:
            if term.scales:
                p *= term.factor(at, given)

    def _softmax(self, scores: Array, row_max: Array, row_sum: Array) -> Array:
        """Turn scores into exponentials below the new running maximum; the factor for the old ones."""
        new_max = np.maximum(row_max, scores.max(axis=-1, keepdims=True))
        # Where nothing is kept yet, subtracting 0 makes every exponential 0; subtracting -inf would make NaN.
        shift = np.where(np.isneginf(new_max), scores.dtype.type(0), new_max)
        # A sink of +inf stays the maximum; inf - inf would make NaN of it.
        decay: Array = np.exp(np.where(row_max == shift, 0, row_max - shift))
        scores -= shift
        np.exp(scores, out=scores)
        row_sum *= decay
        row_sum += scores @ np.ones((scores.shape[-1], 1), scores.dtype)  # BLAS adds faster than sum()
        row_max[...] = new_max
        return decay

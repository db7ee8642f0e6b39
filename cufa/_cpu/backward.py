"""Gradients of attention on NumPy arrays: blocks of scores computed again, never a whole matrix of them.

Blocked as `_cpu` is: for some key heads of some batch entries, a block of queries, the heads of a group folded into its
rows, meets one block of keys after the other. Probabilities come back from the scores and lse in one step,
``p = exp(s - lse)`` (Dao et al., *FlashAttention*, 2022, Algorithm 4). dk and dv of the slab add up in the work dtype.

Gradients that are not finite are computed once more, carefully, as `_cpu` does; so are those whose lse is so large that
its own rounding makes probabilities of more than 1. Of score terms' gradients, which parts of the problem may share,
nothing can be taken back: with such terms all of the problem is computed once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, Unpack

import numpy as np

from .._terms.term import Array, Point
from .forward import (
    Options,
    _cuts,
    _Scoring,
    _Slab,
    _Workspace,
    _workspaces,
    block_sizes,
    select_matmul,
    sequences,
)

MAX_LSE = 2.0**10
"""Beyond it, scores less a lse in float32 are far from what they should be."""
MAX_EXACT_LSE = 2.0**39
"""The same in float64."""

Gradients: TypeAlias = Mapping[str, Array]
"""Of score terms, by name."""
NO_GRADIENTS: Gradients = MappingProxyType({})


def backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dlse: Array | None,
    dq: Array,
    dk: Array,
    dv: Array,
    dsinks: Array | None,
    gradients: Gradients = NO_GRADIENTS,
    **options: Unpack[Options],
) -> None:
    """Gradients of a batch of equally long sequences, written into `dq`, `dk`, `dv`, `dsinks` and `gradients`.

    Parameters
    ----------
    dout, q, k, v, out, dq, dk, dv : array, (batch, seqlen, num_heads, head_dim or head_dim_v)
        Any strides; float16, bfloat16, float32 or float64.
    lse, dlse : array, (batch, num_heads_q, seqlen_q)
        `dlse` may be None.
    dsinks : array or None, (num_heads_q,)
        None without sinks.
    gradients : mapping of str to array
        Those of score terms, by name.
    softmax_scale, window_left, window_right, terms, sinks
        As in `_cpu.forward`.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa._cpu import backward, forward
    >>> options = dict(softmax_scale=1.0, window_left=None, window_right=0, terms=(), sinks=None)
    >>> x = np.ones((1, 2, 1, 1))
    >>> out, lse, dq, dk, dv = np.empty_like(x), np.empty((1, 1, 2)), *np.empty((3, 1, 2, 1, 1))
    >>> forward.forward(x, x, x, out, lse, **options)
    >>> backward.backward(x, x, x, x, out, lse, None, dq, dk, dv, None, **options)
    >>> dv.ravel().round(9).tolist()  # the first key gets all of the first row and half of the second
    [1.5, 0.5]
    """
    with np.errstate(all="ignore"):  # NaN and Inf are data, and exp underflows all the time
        given, workspaces = _Given(dout, q, k, v, out, lse, dlse), _workspaces(q)

        def attempt(scoring: _Scoring, sums: _Sums) -> bool:
            return _backward(given, dq, dk, dv, sums, scoring, workspaces)

        _sum_up(attempt, _Scoring.of(q, k.shape[-3], **options), q.shape[2], dsinks, gradients)


def varlen_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    seqused_k: Array | None,
    out: Array,
    lse: Array,
    dlse: Array | None,
    dq: Array,
    dk: Array,
    dv: Array,
    dsinks: Array | None,
    gradients: Gradients = NO_GRADIENTS,
    **options: Unpack[Options],
) -> None:
    """`backward` for each of the sequences laid end to end in q, k and v.

    Parameters
    ----------
    dout, q, k, v, out, dq, dk, dv : array, (total, num_heads, head_dim or head_dim_v)
        Gradients of rows that belong to no sequence, or are not live, become 0.
    cu_seqlens_q, cu_seqlens_k : integer array, (batch + 1,)
        Any numbers; read as `cufa.reference` says.
    seqused_k : integer array or None, (batch,)
    lse, dlse : array, (num_heads_q, total_q)
        `dlse` may be None.
    dsinks, gradients, softmax_scale, window_left, window_right, terms, sinks
        As in `backward`.
    """
    for gradient in (dq, dk, dv):
        gradient[...] = 0
    with np.errstate(all="ignore"):  # NaN and Inf are data, and exp underflows all the time
        workspaces = _workspaces(q)

        def attempt(scoring: _Scoring, sums: _Sums) -> bool:
            for rows, keys, own in sequences(cu_seqlens_q, cu_seqlens_k, seqused_k, len(q), len(k), scoring):
                given = _Given(
                    dout[None, rows],
                    q[None, rows],
                    k[None, keys],
                    v[None, keys],
                    out[None, rows],
                    lse[None, :, rows],
                    None if dlse is None else dlse[None, :, rows],
                )
                if not _backward(given, dq[None, rows], dk[None, keys], dv[None, keys], sums, own, workspaces):
                    return False
            return True

        _sum_up(attempt, _Scoring.of(q, k.shape[-3], **options), q.shape[1], dsinks, gradients)


class _Sums(NamedTuple):
    """What all parts of a problem add to, in float64."""

    dsinks: Array
    gradients: Gradients


def _sum_up(
    attempt: Callable[[_Scoring, _Sums], bool],
    scoring: _Scoring,
    heads: int,
    dsinks: Array | None,
    gradients: Gradients,
) -> None:
    """Write what an attempt has added up; it is False, and all is done carefully, if it added what may be wrong."""
    for own in (scoring, replace(scoring, careful=True)):
        sums = _Sums(np.zeros(heads), {name: np.zeros(x.shape) for name, x in gradients.items()})
        if attempt(own, sums):
            break
    if dsinks is not None:
        dsinks[...] = sums.dsinks
    for name, x in gradients.items():
        x[...] = sums.gradients[name]


class _Given(NamedTuple):
    """What the gradients of a dense problem are made of."""

    dout: Array
    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array
    dlse: Array | None


def _backward(
    given: _Given,
    dq: Array,
    dk: Array,
    dv: Array,
    sums: _Sums,
    scoring: _Scoring,
    workspaces: tuple[_Workspace, _Workspace],
) -> bool:
    """Gradients of a dense problem, written into dq, dk and dv, and added to sums; False if those may be wrong."""
    batch, seqlen_q, num_heads_q, head_dim = given.q.shape
    seqlen_k, num_heads_k, head_dim_v = given.v.shape[1:]
    if not num_heads_k:
        return True
    group = num_heads_q // num_heads_k
    blocks = block_sizes(batch, seqlen_q, seqlen_k, num_heads_q, num_heads_k, head_dim, head_dim_v)
    exact = given.lse.dtype == np.float64
    for entries in _cuts(batch, blocks.batch):
        for heads_k in _cuts(num_heads_k, blocks.num_heads_k):
            heads = slice(heads_k.start * group, heads_k.stop * group)
            lse = given.lse[entries, heads]
            largest = np.abs(lse).max(initial=0, where=~np.isneginf(lse))
            careful = scoring.careful or not largest <= (MAX_EXACT_LSE if exact else MAX_LSE)
            part = _Part(scoring, workspaces[careful], entries, heads_k, heads, blocks.block_m, blocks.block_n, careful)
            share = part.differentiate(given, dq, dk, dv, sums.gradients)
            if share is None and sums.gradients:
                return False
            if share is None:
                part = part._replace(workspace=workspaces[1], careful=True)
                share = part.differentiate(given, dq, dk, dv, sums.gradients)
            sums.dsinks[heads] += share
    return True


class _Part(NamedTuple):
    """Some key heads of some batch entries, whose dk and dv add up in the workspace."""

    scoring: _Scoring
    workspace: _Workspace
    entries: slice
    heads_k: slice
    heads: slice
    block_m: int
    block_n: int
    careful: bool

    def differentiate(self, given: _Given, dq: Array, dk: Array, dv: Array, gradients: Gradients) -> Array | None:
        """Write dq, dk and dv, add to gradients; the share of dsinks, by head, or None where care is needed."""
        dout, q, k, v, out, lse, dlse = given
        entries, heads_k, heads = self.entries, self.heads_k, self.heads
        # (batch, heads, rows, columns): what np.matmul takes a batch of
        keys, values = (x[entries, :, heads_k].swapaxes(1, 2) for x in (k, v))
        dkeys, dvalues = (self.workspace.take(f"d{name}", x.shape) for name, x in (("k", keys), ("v", values)))
        dkeys[...] = dvalues[...] = 0
        dsinks = np.zeros(heads.stop - heads.start)
        group = len(dsinks) // (heads_k.stop - heads_k.start)
        for rows in _cuts(q.shape[1], self.block_m):
            at, in_lse = (entries, rows, heads), (entries, heads, rows)
            offset = k.shape[1] - q.shape[1]
            slab = _SlabBackward(self.scoring, self.workspace, entries, heads, rows, offset, group, self.careful)
            delta = slab.delta(dout[at], out[at], None if dlse is None else dlse[in_lse], k.shape[1])
            own = dout[at], q[at], keys, values, lse[in_lse], delta
            found = slab.differentiate(*own, dkeys, dvalues, gradients, self.block_n)
            if found is None:
                return None
            dq[at] = found.swapaxes(1, 2)
            dsinks -= slab.sink_share(lse[in_lse], delta)
        if not self.careful and not all(np.isfinite(x).all() for x in (dkeys, dvalues, dsinks)):
            return None
        dk[entries, :, heads_k], dv[entries, :, heads_k] = dkeys.swapaxes(1, 2), dvalues.swapaxes(1, 2)
        return dsinks


class _SlabBackward(_Slab):
    """Some rows of some heads of some batch entries, and their way through the keys once more."""

    def delta(self, dout: Array, out: Array, dlse: Array | None, seqlen_k: int) -> Array:
        """What is subtracted from a row's dp: dout · out, less dlse; (batch, heads, rows)."""
        dtype = self.workspace.dtype
        delta: Array = np.einsum("bmhd,bmhd->bhm", dout.astype(dtype), out.astype(dtype))
        if self.careful:  # of a row that keeps no key dout does not count, whatever it holds
            delta = np.where(self._seeing(seqlen_k), delta, 0)
        return delta if dlse is None else delta - dlse.astype(dtype)

    def _seeing(self, seqlen_k: int) -> Array:
        """Whether each row keeps a key: (rows,), or, where a term hides keys, (batch, heads, rows)."""
        scoring = self.scoring
        if any(term.hides for term, _ in scoring.terms):
            keep = self.keep(slice(0, seqlen_k))
            shape = self.entries.stop - self.entries.start, self.heads.stop - self.heads.start, -1
            return np.ones(1, bool) if keep is None else keep.any(axis=-1).reshape(shape)
        diagonal = np.arange(self.rows.start + self.offset, self.rows.stop + self.offset)
        start = 0 if scoring.window_left is None else np.maximum(diagonal - scoring.window_left, 0)
        stop = seqlen_k
        if scoring.window_right is not None:
            stop = np.minimum(diagonal + scoring.window_right + 1, seqlen_k)
        seeing: Array = np.broadcast_to(start < stop, diagonal.shape)
        return seeing

    def sink_share(self, lse: Array, delta: Array) -> Array:
        """The sum, by head, of what the sink takes of each row times delta."""
        if self.sinks is None:
            return np.zeros(lse.shape[1])
        sinks = self.sinks[:, None]
        # A sink that alone makes up lse has probability 1, +inf included.
        share = np.where(np.isneginf(lse), 0, np.where(sinks == lse, 1, np.exp(sinks - lse)))
        taken: Array = np.where(share != 0, share * delta, 0).sum(axis=(0, 2), dtype=np.float64)
        return taken

    def differentiate(
        self,
        dout: Array,
        q: Array,
        k: Array,
        v: Array,
        lse: Array,
        delta: Array,
        dk: Array,
        dv: Array,
        gradients: Gradients,
        block_n: int,
    ) -> Array | None:
        """dq (batch, heads, rows, head_dim) of these rows; adds to dk, dv and gradients. None where care is needed.

        dout and q (batch, rows, heads, ·), k, v, dk and dv (batch, key heads, seqlen_k, ·), lse and delta (batch,
        heads, rows).
        """
        work, scoring = self.workspace, self.scoring
        batch, num_rows, heads, head_dim = q.shape
        rows = self._scaled(q)
        shape = rows.shape[:-1]
        d_rows = work.take("dout", (batch, heads, num_rows, dout.shape[-1]))
        d_rows[...] = dout.swapaxes(1, 2)
        if self.careful:
            np.copyto(d_rows, 0, where=~self._seeing(k.shape[2])[..., None])
        d_rows = d_rows.reshape(*shape, dout.shape[-1])
        # A row without keys has lse -inf; its probabilities are exp(s - inf), and its dout may be anything.
        empty = np.isneginf(lse).reshape(*shape, 1)
        subtracted = np.where(empty, np.inf, lse.reshape(*shape, 1)).astype(work.dtype)
        np.copyto(d_rows, 0, where=empty)
        delta = np.where(empty, 0, delta.reshape(*shape, 1))

        dq = work.take("dq", (*shape, head_dim))
        dq[...] = 0
        # What q was multiplied by, which is in dk twice otherwise.
        factor = work.dtype.type(scoring.softmax_scale if self.careful else scoring.unit)
        start, stop = scoring.keys(self.rows.start, self.rows.stop - 1, self.offset, k.shape[2])
        for first in range(start, stop, block_n):
            keys = slice(first, min(first + block_n, stop))
            k_block, v_block = work.operand("k", k[:, :, keys]), work.operand("v", v[:, :, keys])
            scores, ds = (work.take(name, (*shape, keys.stop - keys.start)) for name in ("scores", "ds"))
            np.matmul(rows, k_block.swapaxes(2, 3), out=scores)
            if not self._in_range(scores):
                return None
            at, slopes = self.at(keys), list[Any]()
            self._modify(scores.reshape(batch, heads, num_rows, -1), at, keys, slopes)
            scores -= subtracted
            if self.careful:  # a rounded lse may be less than a score
                np.minimum(scores, 0, out=scores)
            p = np.exp(scores, out=scores)
            np.matmul(d_rows, v_block.swapaxes(2, 3), out=ds)
            if scoring.scales:
                self._scale(ds.reshape(batch, heads, num_rows, -1), at)
            ds -= delta
            ds *= p
            keep = self.keep(keys) if self.careful else None
            self._through_terms(ds, (batch, heads, num_rows, -1), at, keep, slopes, gradients)
            if scoring.scales:
                self._scale(p.reshape(batch, heads, num_rows, -1), at)
            if not self.careful:
                dv[:, :, keys] += p.swapaxes(2, 3) @ d_rows
                dk[:, :, keys] += (ds.swapaxes(2, 3) @ rows) * factor
                dq += ds @ k_block
                continue
            if keep is not None:
                p, ds = np.where(keep, p, 0), np.where(keep, ds, 0)
            kept = None if keep is None else keep.swapaxes(-1, -2)
            dv[:, :, keys] += select_matmul(p.swapaxes(2, 3), d_rows, kept)
            dk[:, :, keys] += select_matmul(ds.swapaxes(2, 3), rows, kept) * factor
            dq += select_matmul(ds, k_block, keep)
        dq *= scoring.softmax_scale
        if not (self.careful or np.isfinite(dq).all()):
            return None
        return dq.reshape(batch, heads, num_rows, head_dim)

    def _through_terms(
        self,
        ds: Array,
        shape: tuple[int, ...],
        at: Point,
        keep: Array | None,
        slopes: list[Any],
        gradients: Gradients,
    ) -> None:
        """From the gradient by what the terms made of products to that by products, in place, last term first.

        `ds` is 0 outside `keep`, or where that is None outside the mask; `shape` has heads and rows apart.
        """
        by_head = ds.reshape(shape)
        for (term, _), (slope, given) in zip(reversed(self.scoring.terms), reversed(slopes), strict=True):
            if term.has_gradient:
                if keep is not None:
                    np.copyto(ds, 0, where=~keep)
                term.gradient(by_head, at, given, gradients)
            if term.bends:
                by_head *= slope

"""Gradients of attention on NumPy arrays: blocks of scores computed again, never a whole matrix of them.

Blocked as `_cpu` is: for some key heads of some batch entries, a block of queries, the heads of a group folded into its
rows, meets one block of keys after the other. Probabilities come back from the scores and lse in one step,
``p = exp(s - lse)`` (Dao et al., *FlashAttention*, 2022, Algorithm 4). dk and dv of the slab add up in the work dtype.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ._cpu import Array, _cuts, _Scoring, _Slab, _Workspace, block_sizes


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
    *,
    softmax_scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    alibi_slopes: Array | None,
    sinks: Array | None,
) -> None:
    """Gradients of a batch of equally long sequences, written into `dq`, `dk`, `dv` and `dsinks`.

    Parameters
    ----------
    dout, q, k, v, out, dq, dk, dv : array, (batch, seqlen, num_heads, head_dim or head_dim_v)
        Any strides; float16, bfloat16, float32 or float64.
    lse, dlse : array, (batch, num_heads_q, seqlen_q)
        `dlse` may be None.
    dsinks : array or None, (num_heads_q,)
        None without sinks.
    softmax_scale, window_left, window_right, softcap, alibi_slopes, sinks
        As in `_cpu.forward`.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa import _cpu, _cpu_backward
    >>> options = dict(softmax_scale=1.0, window_left=None, window_right=0, softcap=0.0, alibi_slopes=None, sinks=None)
    >>> x = np.ones((1, 2, 1, 1))
    >>> out, lse, dq, dk, dv = np.empty_like(x), np.empty((1, 1, 2)), *np.empty((3, 1, 2, 1, 1))
    >>> _cpu.forward(x, x, x, out, lse, **options)
    >>> _cpu_backward.backward(x, x, x, x, out, lse, None, dq, dk, dv, None, **options)
    >>> dv.ravel().round(9).tolist()  # the first key gets all of the first row and half of the second
    [1.5, 0.5]
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
    sums = np.zeros(q.shape[2], dtype)  # of the sinks' gradients
    with np.errstate(all="ignore"):  # NaN and Inf are data, and exp underflows all the time
        _backward(dout, q, k, v, out, lse, dlse, dq, dk, dv, sums, scoring, _Workspace(dtype))
    if dsinks is not None:
        dsinks[...] = sums


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
    *,
    softmax_scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    alibi_slopes: Array | None,
    sinks: Array | None,
) -> None:
    """`backward` for each of the sequences laid end to end in q, k and v.

    Parameters
    ----------
    dout, q, k, v, out, dq, dk, dv : array, (total, num_heads, head_dim or head_dim_v)
        Gradients of rows that belong to no sequence, or are not live, become 0.
    cu_seqlens_q, cu_seqlens_k : integer array, (batch + 1,)
    seqused_k : integer array or None, (batch,)
    lse, dlse : array, (num_heads_q, total_q)
        `dlse` may be None.
    dsinks, softmax_scale, window_left, window_right, softcap, alibi_slopes, sinks
        As in `backward`.
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
    sums = np.zeros(q.shape[1], dtype)  # of the sinks' gradients
    for gradient in (dq, dk, dv):
        gradient[...] = 0
    starts_q, starts_k = np.asarray(cu_seqlens_q).tolist(), np.asarray(cu_seqlens_k).tolist()
    lengths_k = (np.diff(cu_seqlens_k) if seqused_k is None else np.asarray(seqused_k)).tolist()
    with np.errstate(all="ignore"):  # NaN and Inf are data, and exp underflows all the time
        for n, length_k in enumerate(lengths_k):
            rows, keys = slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n] + length_k)
            own = slopes[n : n + 1] if slopes is not None and len(slopes) > 1 else slopes
            _backward(
                dout[None, rows],
                q[None, rows],
                k[None, keys],
                v[None, keys],
                out[None, rows],
                lse[None, :, rows],
                None if dlse is None else dlse[None, :, rows],
                dq[None, rows],
                dk[None, keys],
                dv[None, keys],
                sums,
                replace(scoring, alibi_slopes=own),
                workspace,
            )
    if dsinks is not None:
        dsinks[...] = sums


def _backward(
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
    dsinks: Array,
    scoring: _Scoring,
    workspace: _Workspace,
) -> None:
    batch, seqlen_q, num_heads_q, head_dim = q.shape
    seqlen_k, num_heads_k, head_dim_v = v.shape[1:]
    if not num_heads_k:
        return
    group = num_heads_q // num_heads_k
    blocks = block_sizes(batch, seqlen_q, seqlen_k, num_heads_q, num_heads_k, head_dim, head_dim_v)
    for entries in _cuts(batch, blocks.batch):
        for heads_k in _cuts(num_heads_k, blocks.num_heads_k):
            heads = slice(heads_k.start * group, heads_k.stop * group)
            # (batch, heads, rows, columns): what np.matmul takes a batch of
            keys, values = (x[entries, :, heads_k].swapaxes(1, 2) for x in (k, v))
            dkeys, dvalues = (workspace.take(f"d{name}", x.shape) for name, x in (("k", keys), ("v", values)))
            dkeys[...] = dvalues[...] = 0
            for rows in _cuts(seqlen_q, blocks.block_m):
                at = (entries, rows, heads)
                slab = _SlabBackward(
                    scoring,
                    workspace,
                    scoring.slopes(entries, heads),
                    None if scoring.sinks is None else scoring.sinks[heads],
                    rows,
                    seqlen_k - seqlen_q,
                    group,
                )
                row_lse = lse[entries, heads, rows]
                delta = slab.delta(dout[at], out[at], None if dlse is None else dlse[entries, heads, rows])
                dq[at] = slab.differentiate(
                    dout[at], q[at], keys, values, row_lse, delta, dkeys, dvalues, blocks.block_n
                ).swapaxes(1, 2)
                if scoring.sinks is not None:
                    dsinks[heads] -= slab.sink_share(row_lse, delta)
            dk[entries, :, heads_k] = dkeys.swapaxes(1, 2)
            dv[entries, :, heads_k] = dvalues.swapaxes(1, 2)


class _SlabBackward(_Slab):
    """Some rows of some heads of some batch entries, and their way through the keys once more."""

    def delta(self, dout: Array, out: Array, dlse: Array | None) -> Array:
        """What is subtracted from a row's dp: dout · out, less dlse; (batch, heads, rows)."""
        dtype = self.workspace.dtype
        delta: Array = np.einsum("bmhd,bmhd->bhm", dout.astype(dtype), out.astype(dtype))
        return delta if dlse is None else delta - dlse.astype(dtype)

    def sink_share(self, lse: Array, delta: Array) -> Array:
        """The sum, by head, of what the sink takes of each row times delta."""
        assert self.sinks is not None
        share = np.where(np.isneginf(lse), 0, np.exp(self.sinks[:, None] - lse))
        taken: Array = np.where(share != 0, share * delta, 0).sum(axis=(0, 2))
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
        block_n: int,
    ) -> Array:
        """dq (batch, heads, rows, head_dim) of these rows; adds their share to dk and dv.

        dout and q (batch, rows, heads, ·), k, v, dk and dv (batch, key heads, seqlen_k, ·), lse and delta (batch,
        heads, rows).
        """
        work, scoring = self.workspace, self.scoring
        batch, num_rows, heads, head_dim = q.shape
        # The heads of a group are rows of its key head.
        shape = (batch, heads // self.group, self.group * num_rows)
        cap = scoring.softcap if scoring.softcap > 0 else 1.0
        scaled_q = work.take("q", (batch, heads, num_rows, head_dim))
        scaled_q[...] = q.swapaxes(1, 2)
        scaled_q *= scoring.softmax_scale / cap
        scaled_q = scaled_q.reshape(*shape, head_dim)
        d_rows = work.take("dout", (batch, heads, num_rows, dout.shape[-1]))
        d_rows[...] = dout.swapaxes(1, 2)
        d_rows = d_rows.reshape(*shape, dout.shape[-1])
        # A row without keys has lse -inf; its probabilities are exp(s - inf), and its dout may be anything.
        empty = np.isneginf(lse).reshape(*shape, 1)
        subtracted = np.where(empty, np.inf, lse.reshape(*shape, 1)).astype(work.dtype)
        np.copyto(d_rows, 0, where=empty)
        delta = np.where(empty, 0, delta.reshape(*shape, 1))

        dq = work.take("dq", (*shape, head_dim))
        dq[...] = 0
        start, stop = scoring.keys(self.rows.start, self.rows.stop - 1, self.offset, k.shape[2])
        for first in range(start, stop, block_n):
            keys = slice(first, min(first + block_n, stop))
            k_block, v_block = work.operand("k", k[:, :, keys]), work.operand("v", v[:, :, keys])
            scores, ds = (work.take(name, (*shape, keys.stop - keys.start)) for name in ("scores", "ds"))
            np.matmul(scaled_q, k_block.swapaxes(2, 3), out=scores)
            slope: Any = 1.0
            if scoring.softcap > 0:
                slope = 1 - np.tanh(scores) ** 2
            self._modify(scores.reshape(batch, heads, num_rows, -1), keys)
            scores -= subtracted
            p = np.exp(scores, out=scores)
            np.matmul(d_rows, v_block.swapaxes(2, 3), out=ds)
            ds -= delta
            ds *= p
            ds *= slope
            dv[:, :, keys] += p.swapaxes(2, 3) @ d_rows
            dk[:, :, keys] += (ds.swapaxes(2, 3) @ scaled_q) * work.dtype.type(cap)
            dq += ds @ k_block
        dq *= scoring.softmax_scale
        return dq.reshape(batch, heads, num_rows, head_dim)

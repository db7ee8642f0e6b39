"""Attention, its gradients and the noise around them in float64, of whole score matrices: with NumPy or with CuPy.

The mathematics is that of `cufa.reference`, and the noise that of `cufa.testing`; test_soak.py holds them to each
other. Here everything is one padded problem: sequences of a batch beside each other, the query heads that share a key
head below each other, as (batch, key head, row, column). What is NaN or Inf on purpose is given as 0, with masks that
say where (`Poison`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cufa._call.problem import BASE_SHIFT
from cufa.testing._compare import alike, capped_size
from cufa.testing._gradients import COMPUTE_UNIT, in_step

HALF = 0.5
"""Root mean square of a rounding error, in units."""


@dataclass(frozen=True, kw_only=True)
class Padded:
    """A problem in the form that is computed.

    Attributes
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    q, k, v : array, (batch, num_heads_k, rows, ·)
        In float64; rows of q are ``group * seqlen_q``.
    seqlen_q : int
        Of the longest sequence.
    lengths_q, lengths_k : array of int, (batch, 1, 1, 1)
        Live rows of each sequence.
    left, right : int or None
        Sides of the window.
    softmax_scale, softcap : float
    slopes, sinks : array, (1 or batch, num_heads_k, rows, 1), optional
    dtype : str
        Storage of the result under test.
    """

    xp: Any
    q: Any
    k: Any
    v: Any
    seqlen_q: int
    lengths_q: Any
    lengths_k: Any
    left: int | None
    right: int | None
    softmax_scale: float
    softcap: float
    slopes: Any
    sinks: Any
    dtype: str

    @property
    def units(self) -> tuple[float, float]:
        """Rounding unit of the storage, and its smallest number."""
        info = ml_dtypes.finfo(np.dtype(self.dtype))
        return float(info.eps) / 2, float(info.smallest_subnormal)


class Poison(NamedTuple):
    """Where elements are NaN or Inf, which are 0 in `Padded` and in dout: shaped like q, k, v and dout; or None."""

    q: Any
    k: Any
    v: Any
    dout: Any


class Forward(NamedTuple):
    """What the forward computes, and root mean square errors to expect."""

    keep: Any
    raw: Any
    s: Any
    p: Any
    lse: Any
    out: Any
    out_noise: Any
    lse_noise: Any


class Backward(NamedTuple):
    """dq, dk, dv and, by key head and row, what adds up to dsinks; then the noise of each."""

    exact: tuple[Any, Any, Any, Any]
    noise: tuple[Any, Any, Any, Any]


def positions(problem: Padded) -> tuple[Any, Any]:
    """How far right of a row's own position each key lies, and which keys a row keeps."""
    xp = problem.xp
    rows, keys = problem.q.shape[2], problem.k.shape[2]
    row = (xp.arange(rows) % problem.seqlen_q)[:, None]
    key = xp.arange(keys)
    ahead = key - (row + (problem.lengths_k - problem.lengths_q))
    keep = (row < problem.lengths_q) & (key < problem.lengths_k)
    if problem.right is not None:
        keep = keep & (ahead <= problem.right)
    if problem.left is not None:
        keep = keep & (ahead >= -problem.left)
    return ahead, keep


def forward(problem: Padded) -> Forward:
    """Steps 1 to 6 of `cufa.reference`, and the noise of `cufa.testing`."""
    xp, q, k, v = problem.xp, problem.q, problem.k, problem.v
    softcap = problem.softcap
    compute = np.finfo(np.float64 if problem.dtype == "float64" else np.float32)
    compute_unit = float(compute.eps) / 2
    ahead, keep = positions(problem)

    raw = problem.softmax_scale * (q @ k.swapaxes(2, 3))
    size = problem.softmax_scale * (xp.abs(q) @ xp.abs(k).swapaxes(2, 3))
    size = size * (1 + q.shape[-1] / 128 + q.shape[-1] / 16 * alike(xp, raw, size))
    if softcap > 0:
        size = through_tanh(xp, raw, size, softcap, compute_unit)
        raw = softcap * xp.tanh(raw / softcap)
        size = size + capped_size(xp, raw, softcap, problem.dtype)
    s = raw
    if problem.slopes is not None:
        bias = problem.slopes * xp.abs(ahead)
        s, size = raw - bias, size + xp.abs(bias)
    kept = xp.where(keep, s, -np.inf)
    p, lse = softmax(xp, kept, problem.sinks)
    out = p @ v

    score_noise = xp.where(keep, compute_unit * (size + 1), 0)
    p_noise = xp.where(p > 0, p * (score_noise + compute_unit * xp.abs(s - lse)), 0)
    finite_lse = finite(xp, xp.abs(lse))
    sum_noise = p_noise.sum(axis=-1, keepdims=True) + compute_unit * (xp.sqrt(problem.lengths_k) + finite_lse)
    if problem.dtype == "bfloat16":
        sum_noise = sum_noise + BASE_SHIFT * np.log(2) * compute_unit * xp.sqrt((p**2).sum(axis=-1, keepdims=True))
    # Scores so large that their rounding exceeds 1 leave open which of several keys takes the probability.
    near = keep & (s + 6 * score_noise >= kept.max(axis=-1, keepdims=True) - 20)
    doubt = xp.where(near, score_noise, 0).max(axis=-1, keepdims=True)
    doubt = xp.where(doubt > 1 / 16, doubt, 0)
    sink_noise = xp.zeros_like(lse)
    if problem.sinks is not None:  # the exponential of the sink errs as those of keys do, and all of the row with it
        p_sink = xp.clip(1 - p.sum(axis=-1, keepdims=True), 0, 1)
        sink_noise = compute_unit * p_sink * finite(xp, xp.abs(problem.sinks))
    noise = _out_noise(problem, compute, keep, p, p_noise, near, xp.minimum(doubt, 1), sink_noise, out)
    return Forward(keep, raw, s, p, lse, out, noise, sum_noise + doubt + compute_unit * finite_lse)


def through_tanh(xp: Any, x: Any, size: Any, softcap: float, unit: float) -> Any:
    """What errors of `unit` times size of x become in softcap·tanh(x/softcap), in the same unit.

    Not only by its slope: where tanh is flat, an error as large as x may turn its sign, and the score go all the way.
    """
    slope = 1 - xp.tanh(x / softcap) ** 2
    wide = 4 * unit * finite(xp, size)
    across = xp.tanh((finite(xp, x) + wide) / softcap) - xp.tanh((finite(xp, x) - wide) / softcap)
    deviations = xp.where(xp.abs(x) < wide, 2, 4)
    return xp.maximum(xp.where(slope > 0, slope * size, 0), softcap / 2 * across / (deviations * unit))


def _out_noise(
    problem: Padded, compute: Any, keep: Any, p: Any, p_noise: Any, near: Any, doubt: Any, sink_noise: Any, out: Any
) -> Any:
    """Of the errors of p, of the roundings of p and out, and of what the sums have in common."""
    xp, v, compute_unit = problem.xp, problem.v, float(compute.eps) / 2
    unit, subnormal = problem.units
    tiny = max(subnormal, float(compute.tiny))
    out = finite(xp, out)
    walk = xp.sqrt(problem.lengths_k)
    largest = xp.maximum(p.max(axis=-1, keepdims=True), 1 - p.sum(axis=-1, keepdims=True))
    p_rounding = unit * p + xp.where(keep, tiny * largest, 0)

    def apart(weight: Any) -> Any:
        """Weighted squares of how far the rows of v are from out."""
        total = weight.sum(axis=-1, keepdims=True)
        return xp.maximum(weight @ v**2 - 2 * out * (weight @ v) + total * out**2, 0)

    variance = apart(p_noise**2) + doubt**2 * apart(near.astype(np.float64))
    added = (compute_unit * walk / 4 * p) ** 2 + (HALF * p_rounding) ** 2
    drift = (
        HALF * unit
        + compute_unit * walk
        + sink_noise
        + compute_unit * problem.lengths_k / 16 * alike(xp, out, p @ xp.abs(v))
    )
    # Keys whose exponentials are below the smallest number beside the sink's may have nothing. What they are relative
    # to may be 2^8 below the largest of them.
    flushed = xp.where(p.max(axis=-1, keepdims=True) < 2**9 * float(compute.tiny), xp.abs(out), 0)
    return xp.sqrt(variance + added @ v**2 + drift**2 * out**2) + flushed + HALF * tiny


def alike_heads(problem: Padded, dout: Any) -> Any:
    """How many query heads err as one where their errors add up for a key head: 1, or all if they are all the same."""
    group = problem.q.shape[2] // problem.seqlen_q
    same: Any = True
    for x in (problem.q, dout, problem.slopes, problem.sinks):
        if x is not None:
            heads = x.reshape(*x.shape[:2], group, -1)
            same = same & (heads == heads[:, :, :1]).all(axis=(2, 3))[..., None, None]
    return problem.xp.where(same, group, 1)


def finite(xp: Any, x: Any) -> Any:
    """x, with 0 in place of NaN and Inf."""
    return xp.where(xp.isfinite(x), x, 0)


def softmax(xp: Any, s: Any, sinks: Any) -> tuple[Any, Any]:
    """Step 5: p, and lse with a last axis of 1."""
    largest = s.max(axis=-1, keepdims=True)
    if sinks is not None:
        largest = xp.maximum(largest, sinks)
    shift = xp.where(xp.isfinite(largest), largest, 0)
    p = xp.exp(s - shift)
    total = p.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + xp.exp(sinks - shift)
    lse = shift + xp.log(total)
    # By the total where that can be, since lse has few bits behind the point if it is large.
    p = xp.where(xp.isfinite(largest), p / total, xp.exp(s - lse))
    return xp.where(lse == -np.inf, 0, p), lse


def backward(problem: Padded, found: Forward, dout: Any, dlse: Any) -> Backward:
    """Steps 7 to 11, and the noise of `cufa.testing`; dlse is (batch, num_heads_k, rows, 1) or None.

    The gradients under test are those of the out and lse under test, so the noise of lse counts too.
    """
    xp, q, k, v = problem.xp, problem.q, problem.k, problem.v
    softcap, scale = problem.softcap, problem.softmax_scale
    unit, subnormal = problem.units
    tiny = max(subnormal, float(np.finfo(np.float32).tiny))
    keep, raw, s, p, lse, out, out_noise, lse_noise = found
    empty = lse == -np.inf
    dout = xp.where(empty, 0, dout)
    dlse = xp.zeros_like(lse) if dlse is None else xp.where(empty, 0, dlse)  # which else counts for the sink
    delta = (dout * out).sum(axis=-1, keepdims=True) - dlse
    gap = xp.where(keep, dout @ v.swapaxes(2, 3) - delta, 0)
    weight = p * (1 - (raw / softcap) ** 2) if softcap > 0 else p
    ds = weight * gap
    p_sink = xp.zeros_like(lse)
    if problem.sinks is not None:
        # A sink that alone makes up lse has probability 1, +inf included.
        p_sink = xp.where(problem.sinks == lse, 1, xp.exp(problem.sinks - lse))
        p_sink = xp.where(empty, 0, p_sink)
    exact = scale * (ds @ k), scale * (ds.swapaxes(2, 3) @ q), p.swapaxes(2, 3) @ dout, -p_sink * delta

    walk_q, walk_k = (1 + xp.sqrt(lengths) / 4 for lengths in (problem.lengths_q, problem.lengths_k))
    lse_size = finite(xp, xp.abs(lse))
    s_size = (1 + q.shape[-1] / 128) * scale * (xp.abs(q) @ xp.abs(k).swapaxes(2, 3))
    s_size = 1 + capped_size(xp, raw, softcap, problem.dtype) + s_size + xp.abs(s - raw)
    s_size = s_size + xp.where(p > 0, xp.abs(s - lse), 0)
    dp_size = (1 + v.shape[-1] / 128) * (xp.abs(dout) @ xp.abs(v).swapaxes(2, 3)) + xp.abs(delta)
    p_noise = COMPUTE_UNIT * p * s_size
    ds_noise = COMPUTE_UNIT * p * (dp_size + xp.abs(gap) * s_size)
    least = keep.astype(np.float64) * max(tiny, 2 * float(np.finfo(np.float32).tiny))
    p_rounding = HALF * (unit * p + least)
    ds_rounding = HALF * (unit * xp.abs(ds) + least) + HALF * (unit * weight + least) * xp.abs(gap)
    row_noise = COMPUTE_UNIT * (walk_k + lse_size) + xp.where(empty, 0, lse_noise)
    delta_noise = xp.sqrt((out_noise**2 * dout**2).sum(axis=-1, keepdims=True))
    delta_noise = delta_noise + COMPUTE_UNIT * (xp.abs(dout * out).sum(axis=-1, keepdims=True) + xp.abs(dlse))

    common = (row_noise * (ds @ k)) ** 2 + (delta_noise * (weight @ k)) ** 2
    # Errors that follow the scores, of a row, and of a column by each head.
    heads = (*q.shape[:2], -1, problem.seqlen_q)
    log_p_heads, p_heads, ds_heads, q_heads = (x.reshape(*heads, x.shape[-1]) for x in (s - lse, p, ds, q))
    by_row = HALF * unit * in_step(xp, s - lse, p, 3, unit) * xp.abs(ds)
    by_column = HALF * unit * in_step(xp, log_p_heads, p_heads, 3, unit) * xp.abs(ds_heads)
    dq_variance = ((walk_k * ds_noise) ** 2 + ds_rounding**2) @ k**2 + common + (by_row @ xp.abs(k)) ** 2
    dk_variance = (walk_q * ds_noise) ** 2 + ds_rounding**2 + (row_noise * ds) ** 2 + (delta_noise * weight) ** 2
    together = ((by_column.swapaxes(3, 4) @ xp.abs(q_heads)) ** 2).sum(axis=2)
    dk_variance = dk_variance.swapaxes(2, 3) @ q**2 + together
    dv_variance = ((walk_q * p_noise) ** 2 + p_rounding**2 + (row_noise * p) ** 2).swapaxes(2, 3) @ dout**2
    times = alike_heads(problem, dout)
    variances = dq_variance, times * dk_variance, times * dv_variance
    sees, seen = keep.any(axis=3)[..., None], keep.any(axis=2)[..., None]

    def result(variance: Any, gradient: Any, counts: Any, factor: float) -> Any:
        # Sums are float32 before they are scaled.
        return xp.where(counts, factor * (xp.sqrt(variance) + HALF * tiny) + HALF * (unit * xp.abs(gradient) + tiny), 0)

    noise = tuple(map(result, variances, exact, (sees, seen, seen), (scale, scale, 1.0)))
    sink_size = 0 if problem.sinks is None else finite(xp, xp.abs(problem.sinks))
    sink_noise = p_sink * (delta_noise + xp.abs(delta) * (row_noise + COMPUTE_UNIT * sink_size))
    sink_noise = sink_noise + float(np.finfo(np.float32).tiny) * (1 + xp.abs(delta))
    return Backward(exact, (*noise, xp.where(p_sink > 0, sink_noise, 0)))


class Spread(NamedTuple):
    """Which results NaN or Inf reaches, and must: shaped like out, lse, dq, dk, dv and the rows of dsinks."""

    out: Any
    lse: Any
    dq: Any
    dk: Any
    dv: Any
    dsinks: Any


def spread(xp: Any, keep: Any, poison: Poison) -> Spread:
    """Follow NaN and Inf: from a key to the rows that keep it, from a row to the keys that it keeps, no further."""
    q, k = (x.any(axis=-1, keepdims=True) for x in (poison.q, poison.k))
    kept = xp.broadcast_to(keep, (*q.shape[:3], k.shape[2])).astype(np.float64)
    sees = kept.any(axis=-1, keepdims=True)

    def over_keys(x: Any) -> Any:
        return kept @ x.astype(np.float64) > 0

    def over_rows(x: Any) -> Any:
        return kept.swapaxes(2, 3) @ x.astype(np.float64) > 0

    lse = (q & sees) | over_keys(k)
    out = lse | over_keys(poison.v)
    dout = poison.dout & sees
    rows = out.any(axis=-1, keepdims=True) | dout.any(axis=-1, keepdims=True)
    return Spread(out, lse, rows, over_rows(rows), over_rows(lse | dout), rows)


def from_infinite_scores(problem: Padded, found: Forward) -> tuple[Padded, Forward, Spread]:
    """What `backward` makes the finite gradients of where q and k hold NaN and Inf, and which gradients are not finite.

    An entry whose score is -inf has probability 0, but 0 times an infinite element is NaN.
    """
    xp = problem.xp
    kept = xp.broadcast_to(found.keep, found.p.shape)
    strange_q, strange_k = (~xp.isfinite(x) for x in (problem.q, problem.k))
    rows = xp.isnan(found.out).any(axis=-1, keepdims=True)
    mixed, unknown = kept.astype(np.float64), (kept & xp.isnan(found.p)).astype(np.float64)
    dq = rows | (mixed @ strange_k.astype(np.float64) > 0)
    dk = mixed.swapaxes(2, 3) @ (rows | strange_q).astype(np.float64) > 0
    dv = unknown.any(axis=2)[..., None]
    spread = Spread(None, None, dq, dk, dv, rows)
    q, k, *numbers = (finite(xp, x) for x in (problem.q, problem.k, found.raw, found.s, found.p, found.out))
    lse = xp.where(found.lse == -np.inf, found.lse, finite(xp, found.lse))
    noise = finite(xp, found.out_noise), finite(xp, found.lse_noise)
    raw, s, p, out = numbers
    return replace(problem, q=q, k=k), Forward(found.keep, raw, s, p, lse, out, *noise), spread


def limit(count: Any) -> Any:
    """The largest root mean square error over so many elements, in units of the noise: `limit_of` of `cufa.testing`."""
    return 2 + 6 / count**0.5


def badness(
    xp: Any,
    got: Any,
    exact: Any,
    noise: Any,
    largest: float,
    live: Any = None,
    strange: Any = None,
    *,
    rows: bool = False,
    whole: bool = True,
) -> Any:
    """The largest of error over bound: of an element, and of the whole and of rows as asked for; an array of no axes.

    `live` are the elements that count, `strange` those that must not be finite. What is beyond `largest`, the largest
    number of the storage, or may be rounded to be, may be infinite.
    """
    z = xp.abs(got - exact) / noise
    z = xp.where(xp.isnan(z), np.inf, z)
    z = xp.where((got == exact) | (xp.isnan(got) & xp.isnan(exact)), 0, z)
    overflows = xp.isinf(got) & (xp.sign(got) * exact + limit(1) * noise > largest)
    z = xp.where(overflows, 0, z)
    if strange is not None:
        z = xp.where(strange, xp.where(xp.isfinite(got), np.inf, xp.zeros_like(z)), z)
    count: Any = z.size
    if live is not None:
        z, count = xp.where(live, z, 0), xp.maximum(xp.broadcast_to(live, z.shape).sum(), 1)
    squares = z**2
    worst = z.max() / limit(1)
    if whole:
        worst = xp.maximum(worst, xp.sqrt(squares.sum() / count) / limit(count))
    if rows:
        worst = xp.maximum(worst, xp.sqrt(squares.mean(axis=-1).max()) / limit(z.shape[-1]))
    return worst


def in_float64(x: Any) -> Any:
    """Without loss; by way of float32, which every array library converts bfloat16 to."""
    return x if x.dtype == np.float64 else x.astype(np.float32).astype(np.float64)

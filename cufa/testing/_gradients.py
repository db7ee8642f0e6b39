"""Gradients beside the float64 reference: the noise around them, and what is wrong with gradients under test."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias, Unpack

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from cufa.reference import At, FeaturedOptions, Options, Term

from .. import reference
from ._compare import Problem, capped_size, complain, complaint, forward_noise, limit_of, to_numpy

Array: TypeAlias = NDArray[Any]

NAMES = ("dq", "dk", "dv", "dsinks")

COMPUTE_UNIT = 2.0**-22
"""Of a float32 product by three of tf32, and of the exponential."""


def assert_gradients_close(
    found: tuple[Any, ...] | list[Any],
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    dlse: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    dtype: DTypeLike | None = None,
    **options: Unpack[FeaturedOptions],
) -> None:
    """Raise unless gradients are as close to the float64 reference as rounding allows.

    Errors are measured in units of the rounding error to expect for this very problem: of scores, probabilities and
    sums in float32, and of probabilities, their gradients, `out` and the results in `dtype`. Every element and each
    whole array must be within bounds, the latter closer. Rows that belong to no sequence, are not live or see nothing
    must be 0. Where the reference has NaN or Inf, either will do; and Inf where the right value exceeds the result's
    dtype.

    Parameters
    ----------
    found : (dq, dk, dv) or (dq, dk, dv, dsinks), and the gradients of further score terms
        The results under test, of any framework and on any device; with `dsinks` if there are `sinks`. One that is
        None is not checked.
    dout : array
        The gradient by `out` that they were computed from.
    q, k, v : array
        The inputs of the forward.
    dlse : array, optional
        The gradient by `lse`; 0 if None.
    cu_seqlens_q, cu_seqlens_k, seqused_k : array, optional
        As for `cufa.attention_varlen_backward`.
    dtype : dtype, optional
        What probabilities and gradients are stored in; q's dtype if None.
    **options
        As for `cufa.reference.attention`.

    Raises
    ------
    AssertionError
        With the worst element of each gradient that is wrong, its index, what it is and should be, and how many are
        bad.
    TypeError, ValueError
        If arguments do not belong together, in the words of `cufa.attention_backward`.

    See Also
    --------
    assert_close : The same of the forward.

    Notes
    -----
    The gradients may be those of an `out` and `lse` that were rounded as the forward rounds them. If scores exceed
    2^24, float32 has no bits left for the fraction of `lse`, so that nothing can be said of the gradients: cases of
    ``huge scores`` and ``constant`` values are such. float64 gradients are held to what float32 mathematics errs by.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> from cufa.testing import assert_gradients_close
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 64, 2, 32)).astype(np.float16)
    >>> out, lse = cufa.attention(q, k, v, causal=True, return_lse=True)
    >>> dq, dk, dv = cufa.attention_backward(dout, q, k, v, out, lse, causal=True)
    >>> assert_gradients_close((dq, dk, dv), dout, q, k, v, causal=True)
    >>> dk[0, 5, 1, 7] += 0.125
    >>> assert_gradients_close((dq, dk, dv), dout, q, k, v, causal=True)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: dk differs from the float64 reference in 1 of 4096 elements, and by ...
      worst element dk[0, 5, 1, 7]: got ...
    >>> assert_gradients_close((dq, None, dv), dout, q, k, v, causal=True)
    """
    if not isinstance(found, (tuple, list)):
        raise TypeError(f"found is a {type(found).__name__}; pass a tuple, as attention_backward returns it.")
    if options.get("score") is None:  # else only that tells how many there are
        _check_count(found, _names(options))
    offsets = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    expected = expect(dout, q, k, v, dlse=dlse, **offsets, dtype=dtype, **options)
    has_sinks = options.get("sinks") is not None
    exact, noise = (each if has_sinks else (*each[:3], *each[4:]) for each in expected)
    names = _names(options, len(exact))
    _check_count(found, names)
    compared = zip(names, found, exact, noise, strict=True)
    complain([gradient_complaint(name, *each) for name, *each in compared if each[0] is not None])


def _names(options: FeaturedOptions, count: int = 0) -> tuple[str, ...]:
    """Of the gradients, so many in all if a `score` function has some."""
    names = NAMES[:3] if options.get("sinks") is None else NAMES
    behind = tuple(f"d{name}" for name in ("bias", "rel_bias") if name in options and options[name] is not None)
    of_score = tuple(f"dscore {index}" for index in range(count - len(names) - len(behind)))
    return *names, *of_score, *behind


def _check_count(found: tuple[Any, ...] | list[Any], names: tuple[str, ...]) -> None:
    if len(found) != len(names):
        of_sinks = "with sinks" if "dsinks" in names else "without sinks"
        raise ValueError(f"found has {len(found)} results; {of_sinks} there are {len(names)}: {', '.join(names)}.")
    if all(result is None for result in found):
        raise ValueError("found holds nothing to check: every result is None.")


def gradient_complaint(name: str, found: Any, exact: Array, noise: Array) -> str | None:
    """What is wrong with elements and the whole; errors along a row have too much in common to tell anything."""
    # Sums of NaN and Inf are one or the other, depending on what they meet first, and on what was rounded to 0.
    return complaint(name, found, exact, noise, ~np.isfinite(exact), rows=False)


class Expected(NamedTuple):
    """dq, dk, dv, dsinks and those of terms, and the root mean square error to expect of each element; 0 where one is 0
    exactly."""

    exact: tuple[Array, ...]
    noise: tuple[Array, ...]


def expect(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    dlse: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    dtype: DTypeLike | None = None,
    **options: Unpack[FeaturedOptions],
) -> Expected:
    """What `assert_gradients_close` expects, of which these are arguments."""
    packed = cu_seqlens_q is not None
    if dout is None:
        function = "attention_varlen_backward" if packed else "attention_backward"
        raise TypeError(f"{function}: dout is None; pass the gradient by out.")
    dout, dlse = to_numpy(dout), None if dlse is None else to_numpy(dlse)
    given = {"dout": dout, "dlse": dlse}
    problem = Problem.of(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, options=options, gradients=given)
    q, k, v = problem.q, problem.k, problem.v
    storage = np.dtype(q.dtype if dtype is None else dtype)
    if packed:
        dout, q, k, v, dlse = (None if x is None else x[None] for x in (dout, q, k, v, dlse))
    nothing = At(*(np.zeros((0,) * 4, np.int64) for _ in At._fields))
    of_terms = [
        x.shape for term in problem.terms for x in term.gradient(np.zeros((0,) * 4), np.zeros((0,) * 4), nothing)
    ]
    shapes = (q.shape, k.shape, v.shape, q.shape[2:3], *of_terms)
    expected = Expected(*(tuple(np.zeros(shape) for shape in shapes) for _ in range(2)))
    dsinks, sinks_noise = expected.exact[3], expected.noise[3]
    for piece in problem.pieces():
        piece_dlse = None if dlse is None else dlse[piece.in_lse]
        own, terms = piece.problem, piece.problem.terms
        exact = reference._differentiate(dout[piece.in_q], *own[:3], piece_dlse, **own.options, terms=terms)
        with np.errstate(all="ignore"):  # NaN and Inf are data here
            noise = _noise(exact, own, dout[piece.in_q], piece_dlse, storage)
        for whole, part in zip(expected, (exact, noise), strict=True):
            for into, x, place in zip(whole, part, (piece.in_q, piece.in_k, piece.in_k), strict=False):
                into[place] = x
            for into, x in zip(whole[4:], part[4:], strict=True):  # of the noise, squares
                into += x
        dsinks[piece.heads] += exact[3]
        if packed:  # every sequence is summed up on its own
            sinks_noise[piece.heads] = np.hypot(sinks_noise[piece.heads], _sinks_noise(noise[3], exact[3]))
        else:
            sinks_noise[piece.heads] += noise[3]
    for variance in expected.noise[4:]:
        np.sqrt(variance, out=variance)
    if packed:
        return Expected(*((*(x[0] for x in each[:3]), *each[3:]) for each in expected))
    sinks_noise[...] = _sinks_noise(sinks_noise, dsinks)
    return expected


def _sinks_noise(variance: Array, dsinks: Array) -> Array:
    """Of dsinks, from that of its terms."""
    return np.sqrt(variance) + COMPUTE_UNIT * np.abs(dsinks) + np.finfo(np.float32).tiny


def finite(x: Array) -> Array:
    """x, with 0 in place of NaN and Inf."""
    return np.where(np.isfinite(x), x, 0)


def _noise(
    exact: tuple[Array, ...], problem: Problem, dout: Array, dlse: Array | None, storage: np.dtype[Any]
) -> tuple[Array, ...]:
    """Of the dq, dk and dv of a dense problem; for dsinks, and what score terms read, the squares of it."""
    q, k, v, *_, options, terms = problem
    unit = float(ml_dtypes.finfo(storage).eps) / 2
    # Numbers below this are spaced absolutely, or flushed to zero.
    tiny = max(float(ml_dtypes.finfo(storage).smallest_subnormal), float(np.finfo(np.float32).tiny))
    half = 0.5  # root mean square of a rounding error in units
    scale, softcap = options.get("softmax_scale"), options.get("softcap", 0.0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keep = reference._keep(q.shape[1], k.shape[1], options.get("causal", False), options.get("window_size"))

    # By (batch, head, row, key or column), in float64. Rows that see no key count for nothing; nor do NaN and Inf here,
    # since what they meet is not finite and has no noise.
    out, lse = reference._attend(q, k, v, terms=terms, **options)
    out_noise, _, _ = forward_noise(problem, out, storage)
    raw = reference._scores(q, k, scale, softcap, None)
    alibi = options.get("alibi_slopes")
    s = raw if alibi is None else reference._scores(q, k, scale, softcap, alibi)
    at, of_terms = reference._at(q, k, 0), list[_Applied]()
    for term in terms:
        scored = term.score(s, at)
        of_terms.append(_Applied(term, s, finite(np.broadcast_to(term.slope(s, at), s.shape)), finite(scored - s)))
        keep, s = keep & np.asarray(term.keep(at)), scored
    factor = reference._factor(terms, at)
    p, _ = reference._softmax(np.where(keep, s, -np.inf), options.get("sinks"))
    raw, s, p = (finite(x) for x in (raw, s, p))
    q, k, v, dout, out, out_noise = (finite(x.astype(np.float64)) for x in (q, k, v, dout, out, out_noise))
    q_, k_, v_, dout_, out_, out_noise_ = (x.swapaxes(1, 2) for x in (q, k, v, dout, out, out_noise))
    by = reference._by_heads
    lse = lse[..., None]
    empty = np.isneginf(lse)
    lse = np.where(empty, lse, finite(lse))
    dout_, lse_size = np.where(empty, 0, dout_), np.where(empty, 0, np.abs(lse))
    dlse_ = np.where(empty, 0, 0 if dlse is None else finite(dlse)[..., None])
    p = np.where(keep & ~empty, p, 0)
    delta = (dout_ * out_).sum(axis=-1, keepdims=True) - dlse_
    derivative = 1 - (raw / softcap) ** 2 if softcap > 0 else np.ones_like(raw)
    for applied in of_terms:
        derivative = derivative * applied.slope
    weight = p * derivative
    gap = np.where(keep, factor * by(dout_, v_.swapaxes(2, 3)) - delta, 0)
    ds = weight * gap

    # What an entry has for itself. Scores err, and so p and ds relatively; so does dp. Sums err like a random walk.
    walk_q, walk_k = (1 + np.sqrt(x.shape[1]) / 4 for x in (q, k))
    s_size = (1 + q.shape[-1] / 128) * reference._scores(np.abs(q), np.abs(k), scale, 0.0, None)
    biased = finite(reference._scores(q, k, scale, softcap, alibi)) if of_terms else s
    s_size = 1 + capped_size(np, raw, softcap, storage) + s_size + np.abs(biased - raw)
    for applied in of_terms:
        s_size = s_size * np.abs(applied.slope) + np.abs(applied.added)
    s_size = s_size + np.where(p > 0, np.abs(s - lse), 0)
    dp_size = (1 + v.shape[-1] / 128) * factor * by(np.abs(dout_), np.abs(v_).swapaxes(2, 3)) + np.abs(delta)
    p_noise = COMPUTE_UNIT * p * s_size
    ds_noise = COMPUTE_UNIT * p * (dp_size + np.abs(gap) * s_size)
    # Roundings to the storage dtype; ds may be made of a rounded weight.
    # Exponentials below float32's normal numbers are 0.
    least = np.where(keep, max(tiny, 2 * float(np.finfo(np.float32).tiny)), 0)
    p_rounding = half * factor * (unit * p + least)
    ds_rounding = half * (unit * np.abs(ds) + least) + half * (unit * weight + least) * np.abs(gap)
    if of_terms:  # before whose gradients derivatives may be held, rounded
        ds_rounding = ds_rounding + half * unit * np.abs(ds)
    # What the entries of a row have in common: the roundings of lse, and of out in delta.
    row_noise = COMPUTE_UNIT * (walk_k + lse_size)
    delta_noise = np.sqrt((out_noise_**2 * dout_**2).sum(axis=-1, keepdims=True))
    delta_noise = delta_noise + COMPUTE_UNIT * ((np.abs(dout_ * out_)).sum(axis=-1, keepdims=True) + np.abs(dlse_))

    def result(variance: Any, gradient: Any, seen: Any, factor: float) -> Array:
        # Sums are float32 before they are scaled.
        noise = factor * (np.sqrt(variance.swapaxes(1, 2)) + half * tiny) + half * (unit * np.abs(gradient) + tiny)
        return np.where(seen, noise, 0)

    # Whether rows see a key, and keys are seen by a row; (batch, seqlen, heads, 1).
    kept: Array = np.broadcast_to(keep, s.shape)
    seeing: Array = np.asarray(kept.any(axis=3)).swapaxes(1, 2)[..., None]
    seen_keys = reference._sum_groups(np.asarray(kept.any(axis=2)).swapaxes(1, 2)[..., None], k) > 0
    times = _alike_heads(q, k, dout, options)

    def by_keys(variance: Any, like: Any) -> Any:
        """Added up over the heads that share a key head."""
        return (times[:, None, :, None] * reference._sum_groups(variance.swapaxes(1, 2), like)).swapaxes(1, 2)

    common = (row_noise * by(ds, k_)) ** 2 + (delta_noise * by(weight, k_)) ** 2
    by_row, by_column = (half * unit * in_step(np, s - lse, p, axis, unit) * np.abs(ds) for axis in (3, 2))
    dq_variance = by((walk_k * ds_noise) ** 2 + ds_rounding**2, k_**2) + common + by(by_row, np.abs(k_)) ** 2
    dk_variance = (walk_q * ds_noise) ** 2 + ds_rounding**2 + (row_noise * ds) ** 2 + (delta_noise * weight) ** 2
    dk_variance = dk_variance.swapaxes(2, 3) @ q_**2 + (by_column.swapaxes(2, 3) @ np.abs(q_)) ** 2
    dv_variance = (walk_q * factor * p_noise) ** 2 + p_rounding**2 + (row_noise * factor * p) ** 2
    sinks = options.get("sinks")
    sink = np.full((q.shape[2], 1, 1), -np.inf) if sinks is None else np.asarray(sinks, np.float64)[:, None, None]
    p_sink = np.where(empty, 0, np.exp(sink - lse))
    lse_noise = row_noise + p_noise.sum(axis=-1, keepdims=True)
    sink_noise = p_sink * (delta_noise + np.abs(delta) * (lse_noise + COMPUTE_UNIT * np.abs(sink)))
    sink_noise = np.where(p_sink > 0, sink_noise + np.finfo(np.float32).tiny * (1 + np.abs(delta)), 0)

    def term_variances() -> list[Array]:
        """Squares of the noise of score terms' gradients, which kernels make of ds in float32."""
        after, found = np.ones_like(p), list[Array]()
        for term, before, slope, _ in reversed(of_terms):
            own = p * after
            alone = COMPUTE_UNIT * own * (dp_size + np.abs(gap) * s_size) + half * (unit * own + least) * np.abs(gap)
            shared = [np.where(keep, errors, 0) for errors in (row_noise * own * gap, delta_noise * own)]
            spreads = term.spread(np.where(keep, alone, 0) ** 2, shared, before, at)
            summed = term.gradient(np.abs(own * gap), before, at)  # in any order
            sums = [
                (walk_q * COMPUTE_UNIT * np.abs(x)) ** 2 + (np.finfo(np.float32).tiny * (x != 0)) ** 2 for x in summed
            ]
            parts = zip(spreads, sums, strict=True)
            found = [*(single + _wider(x.shape) ** 2 * common + x for (single, common), x in parts), *found]
            after = after * slope
        return found

    return (
        result(dq_variance, exact[0], seeing, scale),
        result(by_keys(dk_variance, k), exact[1], seen_keys, scale),
        result(by_keys(dv_variance.swapaxes(2, 3) @ dout_**2, v), exact[2], seen_keys, 1.0),
        (sink_noise**2).sum(axis=(0, 2, 3)),
        *term_variances(),
    )


def _wider(shape: tuple[int, ...]) -> float:
    """How much wider the bound of a whole result is where errors may be as few as its rows, and not its elements."""
    size = max(math.prod(shape), 1)
    return limit_of(size // max(*shape[-1:], 1)) / limit_of(size)


class _Applied(NamedTuple):
    """A score term, the scores before it, its derivative there, and what it adds to them."""

    term: Term
    before: Array
    slope: Array
    added: Array


def in_step(xp: Any, log_p: Any, p: Any, axis: int, unit: float) -> Any:
    """How much the roundings of p along an axis have in common: 1 where p hardly varies, 0 where they are random.

    Where all p lie about the middle between two numbers, the larger are rounded up and the smaller down. That follows
    the scores, and so the elements of k and q that ds meets: errors add up instead of cancelling each other. With the
    functions of NumPy or of CuPy, `xp`.
    """
    total = p.sum(axis=axis, keepdims=True)
    weight = p / xp.where(total > 0, total, 1)
    log_p = xp.where(weight > 0, log_p, 0)
    away = log_p - (weight * log_p).sum(axis=axis, keepdims=True)
    return xp.exp(-(weight * away**2).sum(axis=axis, keepdims=True) / unit**2)


def _alike_heads(q: Array, k: Array, dout: Array, options: Options) -> Array:
    """How many query heads err as one where errors add up, by batch and key head: 1, or all if all are the same."""
    batch, _, num_heads_q, _ = q.shape
    group = num_heads_q // max(k.shape[2], 1)
    per_head: tuple[Any, ...] = options.get("alibi_slopes"), options.get("sinks")
    same = np.ones((batch, k.shape[2]), bool)
    vectors = (np.broadcast_to(x, (batch, num_heads_q))[:, None, :, None] for x in per_head if x is not None)
    for x in (q, dout, *vectors):
        heads = x.reshape(*x.shape[:2], k.shape[2], group, x.shape[3])
        same &= (heads == heads[:, :, :, :1]).all(axis=(1, 3, 4))
    return np.where(same, max(group, 1), 1)

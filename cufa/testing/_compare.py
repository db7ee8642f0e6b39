"""Results beside the float64 reference: the noise around it, the bounds that follow, and what a result has wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, Unpack

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from cufa.reference import At, FeaturedOptions, Options, Term

from .. import reference
from .._call import problem as _problem
from .._terms.softcap import LOW

Array: TypeAlias = NDArray[Any]

PIECE = 1 << 22
"""Scores held at once, as far as one head of one sequence allows: 32 MiB of float64."""


def to_numpy(x: Any) -> Array:
    """Bring an array of any framework, on any device, to NumPy.

    No framework is imported for it. bfloat16 becomes ``ml_dtypes.bfloat16``.

    Parameters
    ----------
    x : array
        Of NumPy, CuPy, torch, JAX or Numba, an exporter of DLPack, or nested sequences of numbers.

    Returns
    -------
    array

    Examples
    --------
    >>> from cufa.testing import to_numpy
    >>> to_numpy([[1, 2], [3, 4]]).shape
    (2, 2)
    """
    if isinstance(x, np.ndarray):
        return x
    if hasattr(x, "copy_to_host"):  # Numba
        return np.asarray(x.copy_to_host())
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        if x.dtype in (torch.bfloat16, torch.float8_e4m3fn):  # NumPy itself knows neither: bits travel as integers
            bits = x.view(torch.int16 if x.dtype is torch.bfloat16 else torch.uint8)
            return np.asarray(bits).view(getattr(ml_dtypes, str(x.dtype).removeprefix("torch.")))
        return np.asarray(x)
    if hasattr(x, "__cuda_array_interface__") and hasattr(x, "get"):  # CuPy
        return np.asarray(x.get())
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        return np.from_dlpack(x, device="cpu")
    return np.asarray(x)


class Shifted(Term):
    """A score term of the reference for a part of a problem, of which it knows where that begins.

    Parameters
    ----------
    term : Term
        Of the whole problem.
    batch, head : int
        The first sequence and head.
    """

    def __init__(self, term: Term, batch: int, head: int) -> None:
        self._term = term
        self._first = batch, head

    def _at(self, at: At) -> At:
        batch, head = self._first
        return at._replace(batch=at.batch + batch, head=at.head + head)

    def score(self, s: Array, at: At) -> Array:
        return self._term.score(s, self._at(at))

    def slope(self, s: Array, at: At) -> Any:
        return self._term.slope(s, self._at(at))

    def keep(self, at: At) -> Any:
        return self._term.keep(self._at(at))

    def factor(self, at: At) -> Any:
        return self._term.factor(self._at(at))

    def gradient(self, ds: Array, s: Array, at: At) -> tuple[Array, ...]:
        return self._term.gradient(ds, s, self._at(at))

    def spread(self, alone: Array, shared: Sequence[Array], s: Array, at: At) -> tuple[tuple[Array, Array], ...]:
        return self._term.spread(alone, shared, s, self._at(at))


class Problem(NamedTuple):
    """The arrays and keywords of a call, on the host; `terms` are further score terms, as the reference has them."""

    q: Array
    k: Array
    v: Array
    cu_seqlens_q: Array | None
    cu_seqlens_k: Array | None
    seqused_k: Array | None
    options: Options
    terms: tuple[Term, ...] = ()

    @classmethod
    def of(cls, *arrays: Any, options: FeaturedOptions, gradients: dict[str, Array | None] | None = None) -> Problem:
        """Of the arrays in the order of the fields.

        `gradients` are dout and dlse on the host, if the problem is to differentiate: they are checked beside the rest.
        """
        slopes_and_sinks = (options.get("alibi_slopes"), options.get("sinks"))
        host: list[Any] = [None if x is None else to_numpy(x) for x in (*arrays, *slopes_and_sinks)]
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, slopes, sinks = host
        if (cu_seqlens_q is None) != (cu_seqlens_k is None):
            raise ValueError("cu_seqlens_q and cu_seqlens_k belong together: give both or neither.")
        function = "attention" if cu_seqlens_q is None else "attention_varlen"
        if gradients is not None:
            function += "_backward"
        unknown = sorted(set(options) - FeaturedOptions.__optional_keys__)
        if unknown:
            known = ", ".join(sorted(FeaturedOptions.__optional_keys__))
            raise TypeError(f"{function}: {unknown[0]} is no option of the reference, whose options are {known}.")
        names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "alibi_slopes", "sinks")
        asked = (options.get("causal", False), options.get("window_size"))
        asked_scales = (options.get("softmax_scale"), options.get("softcap", 0.0))
        given = dict(zip(names, host, strict=True)) | (gradients or {})
        further: dict[str, Any] = {name: x for name, x in options.items() if name not in Options.__optional_keys__}
        if "mask" in further:
            further["mask"] = reference.without_lists(further["mask"], q)
        for name in ("bias", "rel_bias", "mask"):
            given[name] = None
            if name in further and (name != "mask" or reference.is_array(further[name])):
                given[name] = further[name] = None if further[name] is None else to_numpy(further[name])
        causal, window_size, softmax_scale, softcap = _problem.check_host(
            function, given, (*asked, *asked_scales), reference.checked_terms()
        )
        host_options: Options = {
            "causal": causal,
            "window_size": window_size,
            "softmax_scale": softmax_scale,
            "softcap": softcap,
            "alibi_slopes": slopes,
            "sinks": sinks,
        }
        terms = tuple(reference.terms_of(**further))
        return cls(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, host_options, terms)

    def sequences(self) -> Iterator[tuple[slice, slice, slice, Array, Array, Array, Array | None]]:
        """Dense problems: where their batch entries, rows and keys lie, and q, k, v and slopes."""
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, options, _ = self
        slopes: Any = options["alibi_slopes"]
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            for each in reference._sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, slopes):
                yield slice(None), *each
            return
        step = max(PIECE // max(q.shape[2] * q.shape[1] * k.shape[1], 1), 1)
        for n in (slice(first, first + step) for first in range(0, len(q), step)):
            yield n, slice(None), slice(None), q[n], k[n], v[n], slopes[n] if np.ndim(slopes) == 2 else slopes

    def pieces(self) -> Iterator[Piece]:
        """Dense problems of whole sequences and heads, with at most `PIECE` scores as far as that goes."""
        num_heads_q, num_heads_k = self.q.shape[-2], self.k.shape[-2]
        group = num_heads_q // max(num_heads_k, 1)
        packed = self.cu_seqlens_q is not None
        for number, (entries, rows, keys, q, k, v, slopes) in enumerate(self.sequences()):
            step = max(PIECE // max(len(q) * group * q.shape[1] * k.shape[1], 1), 1)
            for first in range(0, num_heads_k, step):
                heads_k = slice(first, min(first + step, num_heads_k))
                heads = slice(heads_k.start * group, heads_k.stop * group)
                options = self.options.copy()
                options["alibi_slopes"] = None if slopes is None else slopes[..., heads]
                sinks: Any = options["sinks"]
                options["sinks"] = None if sinks is None else sinks[heads]
                qkv = q[:, :, heads], k[:, :, heads_k], v[:, :, heads_k]
                entry = number if packed else entries.start
                terms = tuple(Shifted(term, entry, heads.start) for term in self.terms)
                yield Piece(entries, rows, keys, heads, heads_k, Problem(*qkv, None, None, None, options, terms))


class Piece(NamedTuple):
    """A dense problem within another one, and where its batch entries, rows, keys and heads lie there.

    Arrays of the other problem that are indexed have a batch axis, of one entry if sequences are packed.
    """

    entries: slice
    rows: slice
    keys: slice
    heads: slice
    heads_k: slice
    problem: Problem

    @property
    def in_q(self) -> tuple[slice, slice, slice]:
        """Where it lies in q, and in out."""
        return self.entries, self.rows, self.heads

    @property
    def in_k(self) -> tuple[slice, slice, slice]:
        """Where it lies in k and v."""
        return self.entries, self.keys, self.heads_k

    @property
    def in_lse(self) -> tuple[slice, slice, slice]:
        return self.entries, self.heads, self.rows


class _Expected(NamedTuple):
    """The reference and the noise around it, in the shapes of out and lse.

    The noise of out is inf in rows that belong to no sequence, which a given `out` keeps as they are. `spread`
    marks the outputs where NaN or Inf meets a probability that is 0 or not, depending on the rounding.
    """

    out: Array
    lse: Array
    out_noise: Array
    lse_noise: Array
    spread: NDArray[np.bool_]


def expect(problem: Problem, dtype: DTypeLike | None) -> _Expected:
    q, v = problem.q, problem.v
    storage = np.dtype(q.dtype if dtype is None else dtype)
    varlen = problem.cu_seqlens_q is not None
    out_shape = (1 if varlen else len(q), *q.shape[-3:-1], v.shape[-1])
    lse_shape = (out_shape[0], out_shape[2], out_shape[1])
    expected = _Expected(
        np.zeros(out_shape),
        np.full(lse_shape, -np.inf),
        np.full(out_shape, np.inf),
        np.zeros(lse_shape),
        np.zeros(out_shape, dtype=np.bool_),
    )
    for piece in problem.pieces():
        q, k, v, *_, options, terms = piece.problem
        out, lse = reference._attend(q, k, v, terms=terms, **options)
        expected.out[piece.in_q], expected.lse[piece.in_lse] = out, lse
        with np.errstate(all="ignore"):  # NaN and Inf are data here
            noise = forward_noise(piece.problem, out, storage)
            expected.out_noise[piece.in_q], expected.lse_noise[piece.in_lse], expected.spread[piece.in_q] = noise
    return _Expected(*(x[0] for x in expected)) if varlen else expected


def forward_noise(
    problem: Problem, out: Array, storage: np.dtype[Any], q_error: Array | None = None, *, weights: Any = None
) -> tuple[Array, Array, Array]:
    """The root mean square error to expect of the out and lse of a dense problem, element by element, and `spread`.

    `q_error`, like q, is by how much q's elements may be others than they are. `weights` is a dtype beside `storage` in
    which probabilities may be rounded.
    """
    q, k, v, *_, options, terms = problem
    compute = np.dtype(np.float64 if storage == np.float64 else np.float32)
    unit, compute_unit = (float(ml_dtypes.finfo(x).eps) / 2 for x in (storage, compute))
    lse_unit = compute_unit
    # Numbers below this are spaced absolutely, or flushed to zero.
    tiny = max(float(ml_dtypes.finfo(storage).smallest_subnormal), float(ml_dtypes.finfo(compute).tiny))
    if weights is not None:
        tiny = max(tiny, float(ml_dtypes.finfo(weights).smallest_subnormal))
    rounding = 0.5  # root mean square of a rounding error in units: 0.29 to 0.58, depending on the mantissa

    softmax_scale, softcap = options.get("softmax_scale"), options.get("softcap", 0.0)
    s = reference._scores(q, k, softmax_scale, softcap, None)
    # A dot product errs in proportion to the magnitudes of its terms, and drifts where tensor cores truncate; of terms
    # that are alike, the roundings are alike too.
    raw = s if softcap == 0 else reference._scores(q, k, softmax_scale, 0.0, None)
    size = reference._scores(np.abs(q), np.abs(k), softmax_scale, 0.0, None)
    size = size * (1 + q.shape[-1] / 128 + q.shape[-1] / 16 * alike(np, raw, size))
    if q_error is not None:
        size = size + reference._scores(q_error, np.abs(k), softmax_scale, 0.0, None) / compute_unit
    if softcap > 0:
        slope = 1 - (s / softcap) ** 2
        # Where tanh is flat, an error as large as its argument may yet turn its sign, and the score go all the way.
        x, wide = (np.where(np.isfinite(e), e, 0) / softcap for e in (raw, 4 * compute_unit * size))
        deviations = np.where(np.abs(x) < wide, 2, 4)
        across = softcap / 2 * (np.tanh(x + wide) - np.tanh(x - wide)) / (deviations * compute_unit)
        size = np.maximum(np.where(slope > 0, slope * size, 0), across) + capped_size(np, s, softcap, storage)
    if options.get("alibi_slopes") is not None:
        biased = reference._scores(q, k, softmax_scale, softcap, options["alibi_slopes"])
        size, s = size + np.abs(biased - s), biased
    keep = reference._keep(q.shape[1], k.shape[1], options.get("causal", False), options.get("window_size"))
    at = reference._at(q, k, 0)
    for term in terms:
        before, s = s, term.score(s, at)
        size = np.abs(np.asarray(term.slope(before, at))) * size + np.abs(s) + np.abs(s - before)
        keep = keep & np.asarray(term.keep(at))
    if terms:
        size = np.where(np.isfinite(size), size, 0)
    factor = reference._factor(terms, at)
    p, lse = reference._softmax(np.where(keep, s, -np.inf), options.get("sinks"))

    # The roundings of a running sum add up like a random walk.
    walk = np.sqrt(k.shape[1])
    # The errors of p that come from its score, and from adding it up with v; before the division by the sum.
    score_noise = np.where(keep, compute_unit * (size + 1), 0)
    p_noise = np.where(p > 0, p * (score_noise + compute_unit * np.abs(np.where(p > 0, s - lse[..., None], 0))), 0)
    finite_lse = np.where(np.isfinite(lse), np.abs(lse), 0)
    sum_noise = p_noise.sum(axis=-1) + compute_unit * (walk + finite_lse)
    if storage == "bfloat16":  # whose exponents are lower than they need be, and err in proportion to their size
        sum_noise += _problem.BASE_SHIFT * np.log(2) * compute_unit * np.sqrt((p**2).sum(axis=-1))
    # p is rounded when its largest, the sink's perhaps, is 1; its small values may be subnormal in float16.
    largest = np.maximum(p.max(axis=-1, initial=0, keepdims=True), 1 - p.sum(axis=-1, keepdims=True))
    p_rounding = factor * (unit * p + np.where(keep, tiny * largest, 0))
    # Scores so large that their rounding exceeds 1 leave open which of several keys takes the probability.
    near = keep & (s + 6 * score_noise >= np.where(keep, s, -np.inf).max(axis=-1, initial=-np.inf, keepdims=True) - 20)
    doubt = np.where(near, score_noise, 0).max(axis=-1, initial=0)
    doubt = np.where(doubt > 1 / 16, doubt, 0)
    sum_noise += doubt

    v_heads, out_heads = (x.swapaxes(1, 2).astype(np.float64) for x in (v, out))
    strange, by = ~np.isfinite(v_heads), reference._by_heads
    spread = by((keep & (p <= 4 * tiny * largest)).astype(np.float64), strange.astype(np.float64)) > 0
    doubt_squared = np.minimum(doubt, 1)[..., None] ** 2
    added = (compute_unit * walk / 4 * factor * p) ** 2 + (rounding * p_rounding) ** 2
    row_noise: Any = rounding * unit + compute_unit * walk
    if options.get("sinks") is not None:  # whose exponential errs as those of keys do, and all of the row with it
        sinks = np.abs(np.asarray(options["sinks"], np.float64))[:, None, None]
        p_sink = np.clip(1 - p.sum(axis=-1, keepdims=True), 0, 1)
        row_noise = row_noise + compute_unit * p_sink * np.where(np.isfinite(sinks), sinks, 0)

    def of_part(chosen: Callable[[Any], Any], unit: float) -> Any:
        """Of the numbers of one magnitude, in a unit in which their squares do not overflow."""
        v_, out_ = (np.where(np.isfinite(x) & chosen(np.abs(x)), x / unit, 0) for x in (v_heads, out_heads))

        def apart(weight: Any) -> Any:
            """Weighted squares of how far the rows of v are from out: an error in a score draws out towards its row."""
            total, scaled = weight.sum(axis=-1, keepdims=True), factor * weight
            return np.maximum(by(factor * scaled, v_**2) - 2 * out_ * by(scaled, v_) + total * out_**2, 0)

        variance = apart(p_noise**2) + doubt_squared * apart(near.astype(np.float64))
        drift = row_noise + compute_unit * k.shape[1] / 16 * alike(np, out_, by(factor * p, np.abs(v_)))
        variance += by(added, v_**2) + drift**2 * out_**2
        return np.sqrt(variance) * unit

    noise = of_part(lambda size: size < 2.0**500, 1.0)
    if np.abs(v_heads).max(initial=0, where=~strange) >= 2.0**500:  # of float64 alone
        noise = noise + of_part(lambda size: size >= 2.0**500, 2.0**1000)
    # Keys whose exponentials are below the smallest number beside the sink's may have nothing. What they are relative
    # to may be 2^8 below the largest of them.
    least = float(ml_dtypes.finfo(compute).tiny)
    flushed = np.where(
        p.max(axis=-1, initial=0, keepdims=True) < 2**9 * least,
        np.where(np.isfinite(out_heads), np.abs(out_heads), 0),
        0,
    )
    noise = (noise + flushed).swapaxes(1, 2) + rounding * tiny
    return noise, sum_noise + lse_unit * finite_lse, spread.swapaxes(1, 2)


def alike(xp: Any, total: Any, size: Any) -> Any:
    """How much the terms of a sum have in common, by their total and that of their magnitudes: 0 to 1.

    With the functions of NumPy or of CuPy, `xp`.
    """
    known = (size > 0) & xp.isfinite(size)
    return xp.where(known, xp.abs(total) / xp.where(known, size, 1), 0) ** 4


def capped_size(xp: Any, s: Any, softcap: float, storage: Any) -> Any:
    """What capped scores err in proportion to, of results in a dtype; nothing if `softcap` is 0.

    That is the softcap, and for small scores they themselves. Where the softcap is so low that two scores share a
    reciprocal, the exponential's error is most of it, however small they are: 1.9 units by a model of the roundings.
    """
    if np.dtype(storage).itemsize == 2 and softcap <= LOW:
        return 2 * softcap
    return xp.minimum(softcap, 16 * xp.abs(s))


def limit_of(count: int) -> float:
    """The largest root mean square error over so many elements, in units of the noise."""
    return float(2 + 6 / np.sqrt(count))


def tolerance(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    dtype: DTypeLike | None = None,
    **options: Unpack[FeaturedOptions],
) -> Array:
    """The largest error that an element of `out` may have, for each element.

    The bound is eight times the root mean square error that the roundings of a flash-attention kernel let one
    expect for this very problem: of the scores, computed in float32 (float64 for float64), and of
    probabilities and output, stored in `dtype`. It does not depend on the blocking of the computation.

    Parameters
    ----------
    q, k, v : array
        Of any framework, as for `cufa.attention` or, with `cu_seqlens_q`, for `cufa.attention_varlen`.
    cu_seqlens_q, cu_seqlens_k, seqused_k : array, optional
        As for `cufa.attention_varlen`.
    dtype : dtype, optional
        What probabilities and output are stored in; q's dtype if None.
    **options
        As for `cufa.reference.attention`.

    Returns
    -------
    float64 array, of the shape of `out`
        Without meaning where the output is not finite; inf in rows that belong to no sequence.

    See Also
    --------
    assert_close : Also bounds the error of rows and of the whole array, more closely.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.testing import tolerance
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 64, 2, 32))
    >>> bound = tolerance(q, k, v, dtype=np.float16)
    >>> bound.shape, bool(bound.max() < 0.003)
    ((1, 64, 2, 32), True)
    """
    problem = Problem.of(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, options=options)
    return limit_of(1) * expect(problem, dtype).out_noise


def lse_tolerance(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    dtype: DTypeLike | None = None,
    **options: Unpack[FeaturedOptions],
) -> Array:
    """The largest error that an element of `lse` may have, for each element.

    `lse` is computed and stored in float32, for float64 in float64.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, dtype, **options
        As for `tolerance`.

    Returns
    -------
    float64 array, of the shape of `lse`
        Without meaning where `lse` is not finite; 0 in rows that belong to no sequence, where it is -inf.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.testing import lse_tolerance
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 64, 2, 32)).astype(np.float16)
    >>> bound = lse_tolerance(q, k, v)
    >>> bound.shape, bool(bound.max() < 1e-4)
    ((1, 2, 64), True)
    """
    problem = Problem.of(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, options=options)
    return limit_of(1) * expect(problem, dtype).lse_noise


def assert_close(
    out: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    lse: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    dtype: DTypeLike | None = None,
    **options: Unpack[FeaturedOptions],
) -> None:
    """Raise unless `out`, and `lse` if given, are as close to the float64 reference as rounding allows.

    Errors are measured in units of the rounding error to expect for this very problem, see `tolerance`. Every
    element, every row and the whole array must be within bounds, closer in this order. NaN and Inf must be
    where the reference has them, and Inf where the right value exceeds the result's dtype; which of the two an
    infinite row of v makes of a probability next to 0 is left open.

    Parameters
    ----------
    out : array
        The result under test.
    q, k, v : array
        The inputs it was computed from, of any framework and on any device.
    lse : array, optional
        The log-sum-exp under test.
    cu_seqlens_q, cu_seqlens_k, seqused_k : array, optional
        As for `cufa.attention_varlen`. Rows of `out` that belong to no sequence are not looked at.
    dtype : dtype, optional
        What probabilities and output are stored in; q's dtype if None.
    **options
        As for `cufa.reference.attention`.

    Raises
    ------
    AssertionError
        With the worst element, its index, what it is and should be, and how many are bad.

    See Also
    --------
    assert_gradients_close : The same of gradients.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa import reference
    >>> from cufa.testing import assert_close
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 64, 2, 32)).astype(np.float16)
    >>> out = reference.attention(q, k, v, causal=True).astype(np.float16)
    >>> assert_close(out, q, k, v, causal=True)
    >>> out[0, 5, 1, 7] += 0.125
    >>> assert_close(out, q, k, v, causal=True)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: out differs from the float64 reference in 1 of 4096 elements, 1 of 128 rows...
      worst element out[0, 5, 1, 7]: got ...
    """
    problem = Problem.of(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, options=options)
    expected = expect(problem, dtype)
    complaints = [complaint("out", out, expected.out, expected.out_noise, expected.spread)]
    if lse is not None:
        complaints.append(complaint("lse", lse, expected.lse, expected.lse_noise))
    complain(complaints)


def complain(complaints: list[str | None]) -> None:
    """Raise if there is anything to complain of."""
    if any(complaints):
        raise AssertionError("\n".join(filter(None, complaints)))


def complaint(
    name: str,
    result: Any,
    expected: Array,
    noise: Array,
    spread: NDArray[np.bool_] | None = None,
    *,
    rows: bool = True,
) -> str | None:
    """What is wrong with a result, or None; `rows` is whether rows are held to a bound of their own."""
    got = to_numpy(result)
    if got.dtype.kind != "f" and "float" not in got.dtype.name:  # those of ml_dtypes are of kind V
        return f"{name} has the dtype {got.dtype}, expected one of floating point."
    largest = float(ml_dtypes.finfo(got.dtype).max)
    got = got.astype(np.float64)
    if got.shape != expected.shape:
        return f"{name} has the shape {got.shape}, expected {expected.shape}."
    if got.size == 0:
        return None
    with np.errstate(all="ignore"):
        error = np.abs(got - expected)
        z = np.minimum(error / noise, 1e100)  # whose square is a number
    z[np.isnan(z)] = 1e100
    z[(got == expected) | (np.isnan(got) & np.isnan(expected)) | np.isposinf(noise)] = 0
    limit, whole_limit = limit_of(1), limit_of(z.size)
    overflows = np.isinf(got) & (np.sign(got) == np.sign(expected)) & (np.abs(expected) > largest - limit * noise)
    z[overflows] = 0
    if spread is not None:
        z[spread & ~np.isfinite(got)] = 0

    whole_z, bad, bad_rows = np.sqrt(np.mean(z**2)), int(np.count_nonzero(z > limit)), 0
    counts, worst_row = f"{bad} of {z.size} elements", ""
    if rows:
        row_z, row_limit = np.sqrt(np.mean(z**2, axis=-1)), limit_of(z.shape[-1])
        bad_rows, row = int(np.count_nonzero(row_z > row_limit)), np.unravel_index(np.argmax(row_z), row_z.shape)
        counts += f", {bad_rows} of {row_z.size} rows"
        worst_row = (
            f"\n  worst row {name}[{', '.join(map(str, row))}]: {row_z[row]:.3g} times the rounding noise "
            f"(at most {row_limit:.3g})"
        )
    if bad == bad_rows == 0 and whole_z <= whole_limit:
        return None
    at = np.unravel_index(np.argmax(z), z.shape)
    return (
        f"{name} differs from the float64 reference in {counts}, and by {whole_z:.3g} times the rounding noise overall "
        f"(at most {whole_limit:.3g})\n"
        f"  worst element {name}[{', '.join(map(str, at))}]: got {got[at]:.9g}, expected {expected[at]:.9g}, "
        f"error {error[at]:.3g}, tolerance {limit * noise[at]:.3g}{worst_row}"
    )

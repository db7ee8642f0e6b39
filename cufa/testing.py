"""Tools for testing and timing attention: tolerances, cases, and a clock.

- `assert_close` compares a result, of any framework and on any device, with the float64 reference;
- `tolerance` and `lse_tolerance` are the bounds that it holds an element to;
- `Case`, `dense_cases` and `varlen_cases` are problems over the whole space of features and memory layouts,
  the latter two as Hypothesis strategies (``pip install 'cufa[test]'``);
- `bench` measures how long a call takes.

**How close is close.** A flash-attention kernel rounds in few places, so the size of its error can be told
from the problem: scores carry the rounding of a float32 dot product, probabilities and output that of the
storage dtype. The root mean square of the error to expect, element by element, is the *noise*. In units of
the noise, the root mean square error over any n elements may be at most ``2 + 6 / sqrt(n)``: 8 for a single
element, 2 for a large array. Elements, rows and the whole array are held to that, so that a large error in
one place and a small one everywhere are both seen.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, Unpack

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from cufa import _problem, reference
from cufa.reference import Options, Window

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "DTYPES",
    "HEAD_DIMS",
    "LAYOUTS",
    "OFFSETS",
    "VALUES",
    "BenchResult",
    "Case",
    "View",
    "assert_close",
    "bench",
    "dense_cases",
    "lse_tolerance",
    "to_numpy",
    "tolerance",
    "varlen_cases",
]

Array: TypeAlias = NDArray[Any]

# --- comparing --------------------------------------------------------------------------------------

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
        if x.dtype is torch.bfloat16:  # NumPy itself does not know it, so the bits travel as integers
            return np.asarray(x.view(torch.int16)).view(ml_dtypes.bfloat16)
        return np.asarray(x)
    if hasattr(x, "__cuda_array_interface__") and hasattr(x, "get"):  # CuPy
        return np.asarray(x.get())
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        return np.from_dlpack(x, device="cpu")
    return np.asarray(x)


class _Problem(NamedTuple):
    """The arrays and keywords of a call, on the host."""

    q: Array
    k: Array
    v: Array
    cu_seqlens_q: Array | None
    cu_seqlens_k: Array | None
    seqused_k: Array | None
    options: Options

    @classmethod
    def of(cls, *arrays: Any, options: Options) -> _Problem:
        """Of the arrays in the order of the fields."""
        slopes_and_sinks = (options.get("alibi_slopes"), options.get("sinks"))
        host: list[Any] = [None if x is None else to_numpy(x) for x in (*arrays, *slopes_and_sinks)]
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, slopes, sinks = host
        if (cu_seqlens_q is None) != (cu_seqlens_k is None):
            raise ValueError("cu_seqlens_q and cu_seqlens_k belong together: give both or neither.")
        function = "attention" if cu_seqlens_q is None else "attention_varlen"
        names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "alibi_slopes", "sinks")
        asked = (options.get("causal", False), options.get("window_size"))
        asked_scales = (options.get("softmax_scale"), options.get("softcap", 0.0))
        causal, window_size, softmax_scale, softcap = _problem.check_host(
            function, dict(zip(names, host, strict=True)), (*asked, *asked_scales)
        )
        host_options = options | {
            "causal": causal,
            "window_size": window_size,
            "softmax_scale": softmax_scale,
            "softcap": softcap,
            "alibi_slopes": slopes,
            "sinks": sinks,
        }
        return cls(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, host_options)

    def sequences(self) -> Iterator[tuple[slice, slice, Array, Array, Array, Array | None]]:
        """Batch entries and rows in the output, and q, k, v and slopes of a dense problem."""
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, options = self
        slopes: Any = options["alibi_slopes"]
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            for each in reference._sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, slopes):
                yield slice(None), each.rows, each.q, each.k, each.v, each.alibi_slopes
            return
        step = max(PIECE // max(q.shape[2] * q.shape[1] * k.shape[1], 1), 1)
        for n in (slice(first, first + step) for first in range(0, len(q), step)):
            yield n, slice(None), q[n], k[n], v[n], slopes[n] if np.ndim(slopes) == 2 else slopes

    def pieces(self) -> Iterator[tuple[slice, slice, slice, _Problem]]:
        """Dense problems of whole sequences and heads, with at most `PIECE` scores as far as that goes.

        Each with its batch entries, rows and heads in the output.
        """
        num_heads_q, num_heads_k = self.q.shape[-2], self.k.shape[-2]
        group = num_heads_q // max(num_heads_k, 1)
        for entries, rows, q, k, v, slopes in self.sequences():
            step = max(PIECE // max(len(q) * group * q.shape[1] * k.shape[1], 1), 1)
            for first in range(0, num_heads_k, step):
                own = slice(first, min(first + step, num_heads_k))
                heads = slice(own.start * group, own.stop * group)
                options = self.options.copy()
                options["alibi_slopes"] = None if slopes is None else slopes[..., heads]
                sinks: Any = options["sinks"]
                options["sinks"] = None if sinks is None else sinks[heads]
                qkv = q[:, :, heads], k[:, :, own], v[:, :, own]
                yield entries, rows, heads, _Problem(*qkv, None, None, None, options)


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


def _expect(problem: _Problem, dtype: DTypeLike | None) -> _Expected:
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
    for entries, rows, heads, piece in problem.pieces():
        in_out, in_lse = (entries, rows, heads), (entries, heads, rows)
        out, lse = reference.attention(piece.q, piece.k, piece.v, return_lse=True, **piece.options)
        expected.out[in_out], expected.lse[in_lse] = out, lse
        with np.errstate(all="ignore"):  # NaN and Inf are data here
            noise = _noise(piece, out, storage)
            expected.out_noise[in_out], expected.lse_noise[in_lse], expected.spread[in_out] = noise
    return _Expected(*(x[0] for x in expected)) if varlen else expected


def _noise(piece: _Problem, out: Array, storage: np.dtype[Any]) -> tuple[Array, Array, Array]:
    """The root mean square error to expect of the out and lse of a dense problem, element by element, and `spread`."""
    q, k, v, *_, options = piece
    compute = np.dtype(np.float64 if storage == np.float64 else np.float32)
    unit, compute_unit = (float(ml_dtypes.finfo(x).eps) / 2 for x in (storage, compute))
    lse_unit = compute_unit
    # Numbers below this are spaced absolutely, or flushed to zero.
    tiny = max(float(ml_dtypes.finfo(storage).smallest_subnormal), float(ml_dtypes.finfo(compute).tiny))
    rounding = 0.5  # root mean square of a rounding error in units: 0.29 to 0.58, depending on the mantissa

    softmax_scale, softcap = options.get("softmax_scale"), options.get("softcap", 0.0)
    s = reference._scores(q, k, softmax_scale, softcap, None)
    # A dot product errs in proportion to the magnitudes of its terms, and drifts where tensor cores truncate; of terms
    # that are alike, the roundings are alike too.
    raw = reference._scores(q, k, softmax_scale, 0.0, None)
    size = reference._scores(np.abs(q), np.abs(k), softmax_scale, 0.0, None)
    size = size * (1 + q.shape[-1] / 128 + q.shape[-1] / 16 * _alike(raw, size))
    if softcap > 0:
        slope = 1 - (s / softcap) ** 2
        # Where tanh is flat, an error as large as its argument may yet turn its sign, and the score go all the way.
        x, wide = (np.where(np.isfinite(e), e, 0) / softcap for e in (raw, 4 * compute_unit * size))
        deviations = np.where(np.abs(x) < wide, 2, 4)
        across = softcap / 2 * (np.tanh(x + wide) - np.tanh(x - wide)) / (deviations * compute_unit)
        # tanh errs absolutely, but for small arguments relatively.
        size = np.maximum(np.where(slope > 0, slope * size, 0), across) + np.minimum(softcap, 16 * np.abs(s))
    if options.get("alibi_slopes") is not None:
        biased = reference._scores(q, k, softmax_scale, softcap, options["alibi_slopes"])
        size, s = size + np.abs(biased - s), biased
    keep = reference._keep(q.shape[1], k.shape[1], options.get("causal", False), options.get("window_size"))
    p, lse = reference._softmax(np.where(keep, s, -np.inf), options.get("sinks"))

    # The roundings of a running sum add up like a random walk.
    walk = np.sqrt(k.shape[1])
    # The errors of p that come from its score, and from adding it up with v; before the division by the sum.
    score_noise = np.where(keep, compute_unit * (size + 1), 0)
    p_noise = np.where(p > 0, p * (score_noise + compute_unit * np.abs(s - lse[..., None])), 0)
    finite_lse = np.where(np.isfinite(lse), np.abs(lse), 0)
    sum_noise = p_noise.sum(axis=-1) + compute_unit * (walk + finite_lse)
    if storage == "bfloat16":  # whose exponents are lower than they need be, and err in proportion to their size
        sum_noise += _problem.BASE_SHIFT * np.log(2) * compute_unit * np.sqrt((p**2).sum(axis=-1))
    # p is rounded when its largest, the sink's perhaps, is 1; its small values may be subnormal in float16.
    largest = np.maximum(p.max(axis=-1, initial=0, keepdims=True), 1 - p.sum(axis=-1, keepdims=True))
    p_rounding = unit * p + np.where(keep, tiny * largest, 0)
    # Scores so large that their rounding exceeds 1 leave open which of several keys takes the probability.
    near = keep & (s + 6 * score_noise >= np.where(keep, s, -np.inf).max(axis=-1, initial=-np.inf, keepdims=True) - 20)
    doubt = np.where(near, score_noise, 0).max(axis=-1, initial=0)
    doubt = np.where(doubt > 1 / 16, doubt, 0)
    sum_noise += doubt

    v_heads, out_heads = (x.swapaxes(1, 2).astype(np.float64) for x in (reference._match_heads(v, q), out))
    strange = ~np.isfinite(v_heads)
    spread = (keep & (p <= 4 * tiny * largest)).astype(np.float64) @ strange.astype(np.float64) > 0
    doubt_squared = np.minimum(doubt, 1)[..., None] ** 2
    added = (compute_unit * walk / 4 * p) ** 2 + (rounding * p_rounding) ** 2
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
            total = weight.sum(axis=-1, keepdims=True)
            return np.maximum(weight @ v_**2 - 2 * out_ * (weight @ v_) + total * out_**2, 0)

        variance = apart(p_noise**2) + doubt_squared * apart(near.astype(np.float64))
        drift = row_noise + compute_unit * k.shape[1] / 16 * _alike(out_, p @ np.abs(v_))
        variance += added @ v_**2 + drift**2 * out_**2
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


def _alike(total: Array, size: Array) -> Array:
    """How much the terms of a sum have in common, by their total and that of their magnitudes: 0 to 1."""
    return np.divide(np.abs(total), size, out=np.zeros_like(size), where=(size > 0) & np.isfinite(size)) ** 4


def _limit(count: int) -> float:
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
    **options: Unpack[Options],
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
    problem = _Problem.of(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, options=options)
    return _limit(1) * _expect(problem, dtype).out_noise


def lse_tolerance(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    dtype: DTypeLike | None = None,
    **options: Unpack[Options],
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
    problem = _Problem.of(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, options=options)
    return _limit(1) * _expect(problem, dtype).lse_noise


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
    **options: Unpack[Options],
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

    Examples
    --------
    >>> import numpy as np
    >>> from cufa import _problem, reference
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
    problem = _Problem.of(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, options=options)
    expected = _expect(problem, dtype)
    complaints = [_complaint("out", out, expected.out, expected.out_noise, expected.spread)]
    if lse is not None:
        complaints.append(_complaint("lse", lse, expected.lse, expected.lse_noise))
    if any(complaints):
        raise AssertionError("\n".join(filter(None, complaints)))


def _complaint(
    name: str, result: Any, expected: Array, noise: Array, spread: NDArray[np.bool_] | None = None
) -> str | None:
    """What is wrong with a result, or None."""
    got = to_numpy(result)
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
    limit, row_limit, whole_limit = _limit(1), _limit(z.shape[-1]), _limit(z.size)
    overflows = np.isinf(got) & (np.sign(got) == np.sign(expected)) & (np.abs(expected) > largest - limit * noise)
    z[overflows] = 0
    if spread is not None:
        z[spread & ~np.isfinite(got)] = 0

    row_z, whole_z = np.sqrt(np.mean(z**2, axis=-1)), np.sqrt(np.mean(z**2))
    bad, bad_rows = np.count_nonzero(z > limit), np.count_nonzero(row_z > row_limit)
    if bad == bad_rows == 0 and whole_z <= whole_limit:
        return None
    at = np.unravel_index(np.argmax(z), z.shape)
    row = np.unravel_index(np.argmax(row_z), row_z.shape)
    return (
        f"{name} differs from the float64 reference in {bad} of {z.size} elements, "
        f"{bad_rows} of {row_z.size} rows, and by {whole_z:.3g} times the rounding noise overall "
        f"(at most {whole_limit:.3g})\n"
        f"  worst element {name}[{', '.join(map(str, at))}]: got {got[at]:.9g}, expected {expected[at]:.9g}, "
        f"error {error[at]:.3g}, tolerance {limit * noise[at]:.3g}\n"
        f"  worst row {name}[{', '.join(map(str, row))}]: {row_z[row]:.3g} times the rounding noise "
        f"(at most {row_limit:.3g})"
    )


# --- cases ------------------------------------------------------------------------------------------

LAYOUTS = (
    "contiguous",
    "transposed",
    "fused",
    "fused heads",
    "fused batch",
    "fused transposed",
    "wide",
    "padded",
    "offset",
    "strided",
    "reversed",
    "broadcast",
)
"""Ways to lay an array out in memory, see `View.of`; torch knows no negative strides, so no ``reversed``."""

DTYPES = ("float16", "bfloat16", "float32")

VALUES = ("normal", "large rows", "huge", "huge scores", "tiny", "constant", "infinite", "garbage")
"""What the arrays of a `Case` hold: see there."""

OFFSETS = ("exact", "zeros", "totals", "short", "wild")
"""What the offsets of a packed `Case` hold: see there."""

HEAD_DIMS = (1, 2, 7, 8, 16, 31, 32, 40, 64, 65, 80, 96, 127, 128, 160, 192, 255, 256)

_TILES = (16, 32, 64, 128, 192, 256, 384, 512, 1024, 2048, 4096)
SEQLENS = (0, 1, 2, 3, 7, *(tile + d for tile in _TILES for d in (-1, 0, 1)), 80, 300, 1000)
"""Lengths around the edges of tiles."""


@dataclass(frozen=True)
class View:
    """Where the elements of an array lie in flat memory, in terms that every framework knows.

    Attributes
    ----------
    shape, strides : tuple of int
        Strides are in elements, and may be negative or 0.
    offset : int
        Of the first element.
    size : int
        Elements of the flat memory.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    size: int

    @classmethod
    def of(cls, shape: tuple[int, ...], layout: str = "contiguous") -> View:
        """The view of an array (…, seqlen, num_heads, head_dim) in one of the `LAYOUTS`.

        ``contiguous``, which serves any shape; ``transposed``, heads before seqlen in memory; ``fused``, the
        middle one of q, k and v side by side, in memory (…, seqlen, 3, num_heads, head_dim); ``fused heads``,
        (…, seqlen, num_heads, 3, head_dim); ``fused batch``, (…, 3, seqlen, num_heads, head_dim); ``fused
        transposed``, (…, 3, num_heads, seqlen, head_dim); ``wide``, rows of head_dim at the head of longer ones,
        a multiple of 64 elements, so that they are aligned whatever head_dim is; ``padded``, heads an odd
        number of elements apart, so that rows are not aligned; ``offset``, one element into the memory, so that
        the base is not aligned; ``strided``, every other element, so that the last stride is 2; ``reversed``,
        seqlen and heads backwards, with negative strides; ``broadcast``, one head in memory for all, with stride 0.

        Examples
        --------
        >>> from cufa.testing import View
        >>> View.of((2, 3, 4), "transposed")
        View(shape=(2, 3, 4), strides=(4, 8, 1), offset=0, size=24)
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}.")
        order, extents, step, offset = list(range(len(shape))), list(shape), 1, 0
        if layout in ("transposed", "fused transposed"):
            order[-3], order[-2] = order[-2], order[-3]
        if layout.startswith("fused"):
            # The axis outside of which the three lie: the one that is next to them, three times as long.
            axis = {"fused": -2, "fused heads": -1, "fused batch": -3, "fused transposed": -2}[layout]
            extents[axis] *= 3
            offset = math.prod(shape[axis] for axis in order[order.index(axis % len(shape)) :])
        elif layout == "wide":
            extents[-1] = (shape[-1] // 64 + 1) * 64
        elif layout == "padded":
            extents[-1] += 1 + shape[-1] % 2
        elif layout == "offset":
            offset = 1
        elif layout == "strided":
            step = 2
        elif layout == "broadcast":
            extents[-2] = 1
        strides, size = [0] * len(shape), step
        for axis in reversed(order):
            strides[axis] = size
            size *= extents[axis]
        if layout == "offset":
            size += 1
        elif layout == "broadcast":
            strides[-2] = 0
        elif layout == "reversed":
            for axis in (-3, -2):
                offset += max(shape[axis] - 1, 0) * strides[axis]
                strides[axis] *= -1
        return cls(shape, tuple(strides), offset, size)

    def on(self, flat: Array, xp: Any = np) -> Any:
        """The array of this shape and these strides over a copy of `flat`; for NumPy, over `flat` itself.

        Parameters
        ----------
        flat : NumPy array, (size,)
        xp : module or callable
            ``numpy``, ``cupy``, ``torch`` (on the GPU if there is one) or ``jax.numpy`` (which knows no views
            and gets a contiguous copy); or a function of `flat` and the view.

        Examples
        --------
        >>> import numpy as np
        >>> from cufa.testing import View
        >>> View.of((2, 1, 2), "reversed").on(np.arange(4)).ravel().tolist()
        [2, 3, 0, 1]
        """
        if not isinstance(xp, ModuleType):
            return xp(flat, self)
        if xp.__name__ == "torch":
            bfloat16 = flat.dtype == ml_dtypes.bfloat16
            memory = xp.as_tensor(flat.view(np.int16) if bfloat16 else flat)
            memory = memory.to("cuda" if xp.cuda.is_available() else "cpu", copy=True)
            memory = memory.view(xp.bfloat16) if bfloat16 else memory
            return memory.as_strided(self.shape, self.strides, self.offset)
        if xp.__name__ == "jax.numpy":
            return xp.array(self.on(flat))
        strides = [stride * flat.itemsize for stride in self.strides]
        return xp.lib.stride_tricks.as_strided(xp.asarray(flat)[self.offset :], self.shape, strides)

    def outside(self) -> NDArray[np.bool_]:
        """Which elements of the flat memory do not belong to the array."""
        mask = np.ones(self.size, dtype=np.bool_)
        self.on(mask)[...] = False
        return mask


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: its sizes, options and memory layouts, from which its arrays follow.

    Attributes
    ----------
    batch, num_heads_q, num_heads_k, head_dim, head_dim_v : int
    seqlen_q, seqlen_k : int or tuple of int
        A tuple makes the case varlen: the length of each sequence, `batch` of them.
    seqused_k : tuple of int, optional
        Varlen: live keys of each sequence. What lies behind them in k and v is NaN.
    dtype : str
    causal, window_size, softmax_scale, softcap
        As for `cufa.attention`.
    alibi_ndim : {0, 1, 2}
        No slopes, slopes (num_heads_q,), slopes (batch, num_heads_q).
    sinks, return_lse, use_out : bool
        Whether there are sinks, `lse` is asked for, and `out=` is given.
    layouts : (str, str, str, str)
        Of q, k, v and out, see `View.of`. Memory between the elements of q, k and v is NaN.
    values : str
        One of `VALUES`. ``normal``, a standard normal distribution; ``large rows``, some rows of q larger, so that
        a few keys take all their probability; ``huge``, v up to the largest number of the dtype; ``huge scores``, q
        and k whose products float32 just holds; ``tiny``, all close to the smallest; ``constant``, one large number
        everywhere; ``infinite``, a few NaN and Inf in k and v; ``garbage``, NaN, Inf and the largest numbers
        wherever a mask removes them, and in rows of q that keep no key.
    offsets : str
        Varlen, one of `OFFSETS`. ``exact``, the lengths as they are; ``zeros`` and ``totals``, padded at the end with
        these; ``short``, ending before the totals; ``wild``, numbers in any order, also outside the arrays, which
        NumPy and torch refuse on the CPU. Where no sequence lies, q, k and v are NaN.
    seed : int
        Of the values.

    Examples
    --------
    >>> import cufa.reference
    >>> from cufa.testing import Case, assert_close
    >>> case = Case(batch=2, seqlen_q=3, seqlen_k=40, causal=True, layouts=("transposed",) * 4)
    >>> arrays = case.arrays()
    >>> assert_close(cufa.reference.attention(**arrays, **case.options), **arrays, **case.options)
    """

    batch: int = 1
    seqlen_q: int | tuple[int, ...] = 16
    seqlen_k: int | tuple[int, ...] = 16
    num_heads_q: int = 1
    num_heads_k: int = 1
    head_dim: int = 16
    head_dim_v: int = 16
    seqused_k: tuple[int, ...] | None = None
    dtype: str = "float32"
    causal: bool = False
    window_size: Window = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi_ndim: Literal[0, 1, 2] = 0
    sinks: bool = False
    return_lse: bool = False
    use_out: bool = False
    layouts: tuple[str, str, str, str] = ("contiguous", "contiguous", "contiguous", "contiguous")
    values: str = "normal"
    offsets: str = "exact"
    seed: int = 0

    @property
    def options(self) -> Options:
        """The keywords that are not arrays."""
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
        }

    def view(self, name: str) -> View:
        """The view of q, k, v or out."""
        seqlen = self.seqlen_q if name in ("q", "out") else self.seqlen_k
        num_heads = self.num_heads_q if name in ("q", "out") else self.num_heads_k
        width = self.head_dim if name in ("q", "k") else self.head_dim_v
        leading = (sum(seqlen),) if isinstance(seqlen, tuple) else (self.batch, seqlen)
        return View.of((*leading, num_heads, width), self.layouts[("q", "k", "v", "out").index(name)])

    def flat(self, name: str) -> Array:
        """The flat memory under q, k, v or out: values in its view and NaN elsewhere; for out, only NaN."""
        view = self.view(name)
        flat: Array = np.full(view.size, np.nan, getattr(ml_dtypes, self.dtype, self.dtype))
        if name == "out":
            return flat
        array = view.on(flat)
        rng = np.random.default_rng([self.seed, *name.encode()])
        with np.errstate(all="ignore"):  # large numbers are rounded to the dtype, where they fit
            array[...] = self._values(name, rng)
        if self.values == "infinite" and name != "q" and array.size:
            for value in (np.inf, -np.inf, np.nan if name == "v" else np.inf):
                array[tuple(rng.integers(0, extent) for extent in array.shape)] = value
        if self.values == "garbage" and array.size:
            self._spoil(name, array, rng)
        if isinstance(self.seqlen_q, tuple) and (self.seqused_k is not None or self.offsets != "exact"):
            array[self.counts(name) < 0] = np.nan
        return flat

    def _values(self, name: str, rng: np.random.Generator) -> Array:
        """Of q, k or v, before they are rounded to the dtype."""
        shape, largest = self.view(name).shape, float(ml_dtypes.finfo(getattr(ml_dtypes, self.dtype, self.dtype)).max)
        narrow = self.dtype == "float16"
        if self.values == "constant":
            return np.full(shape, 6e4 if narrow else 133120.0)
        values: Array = rng.standard_normal(shape)
        if self.values == "large rows" and name == "q":
            values[rng.random(shape[:-1]) < 0.25] *= 16
        elif self.values == "huge" and name == "v" and values.size:
            values *= largest / np.abs(values).max()
            values = np.clip(values, -largest, largest)
        elif self.values == "huge scores" and name != "v":
            values *= 2.0**6 if narrow else 2.0**54
        elif self.values == "tiny":
            values *= 2.0**-18 if narrow else 2.0**-100
        return values

    def counts(self, name: str) -> NDArray[np.int64]:
        """How many keys each row of q keeps, or how many rows keep each row of k or v; -1 if no sequence has it.

        Of the shape (batch, seqlen), or (total,).
        """
        shape = self.view(name).shape[:-2]
        found = np.full(shape, -1, np.int64)
        if not isinstance(self.seqlen_q, tuple):
            keep = reference._keep(self.seqlen_q, int(self.view("k").shape[1]), self.causal, self.window_size)
            found[...] = keep.sum(axis=int(name == "q"))
            return found
        x = self.offset_arrays()
        q, k, v = (np.empty((self.view(each).shape[0], 0, 0)) for each in "qkv")
        for each in reference._sequences(q, k, v, x["cu_seqlens_q"], x["cu_seqlens_k"], x.get("seqused_k"), None):
            keep = reference._keep(each.q.shape[1], each.k.shape[1], self.causal, self.window_size)
            found[each.rows if name == "q" else each.keys] = keep.sum(axis=int(name == "q"))
        return found

    def _spoil(self, name: str, array: Array, rng: np.random.Generator) -> None:
        """Put NaN, Inf and the largest numbers where nothing keeps them, and where few rows do."""
        counts, largest = self.counts(name), float(ml_dtypes.finfo(array.dtype).max)
        unseen = counts == 0
        array[unseen] = rng.choice([np.nan, np.inf, -np.inf, largest, -largest], int(unseen.sum()))[:, None, None]
        seen = np.flatnonzero(counts > 0)
        if not len(seen):
            return
        fewest = seen[np.argmin(counts.flat[seen])]
        if counts.flat[fewest] < counts.max():
            # Products of the largest numbers would be more than float32 holds; those of v are only weighted.
            values = [np.nan, np.inf, -np.inf, *([largest, -largest] * 2 if name == "v" else [])]
            array[np.unravel_index(fewest, counts.shape)] = rng.choice(values)

    def offset_arrays(self) -> dict[str, Array]:
        """cu_seqlens_q, cu_seqlens_k and, if it is given, seqused_k; nothing if the case is not packed."""
        if not isinstance(self.seqlen_q, tuple) or not isinstance(self.seqlen_k, tuple):
            return {}
        rng = np.random.default_rng([self.seed, 1])
        found: dict[str, Array] = {}
        for name, lengths in (("cu_seqlens_q", self.seqlen_q), ("cu_seqlens_k", self.seqlen_k)):
            offsets = np.cumsum((0, *lengths))
            total = int(offsets[-1])
            if self.offsets in ("zeros", "totals"):
                offsets = np.append(offsets, [0 if self.offsets == "zeros" else total] * 3)
            elif self.offsets == "short":
                offsets = np.minimum(offsets, total - total // 4)
            elif self.offsets == "wild":
                strange = rng.random(len(offsets)) < 0.5
                offsets[strange] = rng.integers(-5, total + 6, int(strange.sum()))
                if rng.random() < 0.2:
                    offsets[rng.integers(0, len(offsets))] = rng.choice([-(2**31), 2**31 - 1])
            found[name] = offsets.astype(np.int32)
        if self.seqused_k is not None:
            used = np.zeros(len(found["cu_seqlens_k"]) - 1, np.int64)
            used[: len(self.seqused_k)] = self.seqused_k
            if self.offsets == "short":
                used = np.minimum(used, np.diff(found["cu_seqlens_k"]))
            elif self.offsets == "wild":
                used += rng.integers(-3, 4, len(used))
            found["seqused_k"] = used.astype(np.int32)
        return found

    def arrays(self, xp: Any = np) -> dict[str, Any]:
        """The arrays that a call takes, by keyword; those that are not given are left out.

        Parameters
        ----------
        xp : module or callable
            As for `View.on`.
        """
        rng = np.random.default_rng([self.seed, 0])
        small = self.offset_arrays()
        batch = len(small["cu_seqlens_q"]) - 1 if small else self.batch
        if self.alibi_ndim:
            shape = (batch, self.num_heads_q)[-self.alibi_ndim :]
            small["alibi_slopes"] = rng.uniform(0, 0.5, shape).astype(np.float32)
        if self.sinks:
            small["sinks"] = (2 * rng.standard_normal(self.num_heads_q)).astype(np.float32)
        arrays = {name: self.view(name).on(self.flat(name), xp) for name in ("q", "k", "v")}
        return arrays | {name: View.of(x.shape).on(x.ravel(), xp) for name, x in small.items()}

    def output(self, xp: Any = np) -> Any:
        """An array of NaN to pass as ``out=``."""
        return self.view("out").on(self.flat("out"), xp)


def dense_cases(
    *,
    max_seqlen: int = 300,
    dtypes: Sequence[str] = DTYPES,
    head_dims: Sequence[int] = HEAD_DIMS,
    layouts: Sequence[str] = LAYOUTS,
    values: Sequence[str] = VALUES,
) -> SearchStrategy[Case]:
    """Cases for `cufa.attention`, as a Hypothesis strategy.

    Sizes lie around the edges of tiles, 0 included; all features and layouts occur in all combinations.

    Parameters
    ----------
    max_seqlen : int
    dtypes : sequence of str
        Add ``float64`` for functions that take it.
    head_dims : sequence of int
        Also of `head_dim_v`. Few of them keep the number of kernels to compile small.
    layouts : sequence of str
        Leave ``reversed`` out for torch.
    values : sequence of str
        Of `VALUES`.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> import cufa.reference
    >>> from cufa.testing import assert_close, dense_cases
    >>> @settings(max_examples=5)
    ... @given(dense_cases(max_seqlen=17))
    ... def test_attention(case):
    ...     arrays, options = case.arrays(), case.options
    ...     assert_close(cufa.reference.attention(**arrays, **options), **arrays, **options)
    >>> test_attention()
    """
    st, features = _features("dense_cases", max_seqlen, dtypes, head_dims, layouts, values)
    seqlen = features.pop("seqlen")
    strategy: SearchStrategy[Case] = st.builds(
        _case, batch=st.sampled_from((1, 2, 3) * 3 + (0,)), seqlen_q=seqlen, seqlen_k=seqlen, **features
    )
    return strategy


def varlen_cases(
    *,
    max_seqlen: int = 300,
    dtypes: Sequence[str] = DTYPES,
    head_dims: Sequence[int] = HEAD_DIMS,
    layouts: Sequence[str] = LAYOUTS,
    values: Sequence[str] = VALUES,
    offsets: Sequence[str] = ("exact",),
) -> SearchStrategy[Case]:
    """Cases for `cufa.attention_varlen`, with and without `seqused_k`, as a Hypothesis strategy.

    Parameters
    ----------
    max_seqlen : int
        Of each sequence.
    dtypes, head_dims, layouts, values
        As for `dense_cases`.
    offsets : sequence of str
        Of `OFFSETS`.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> import cufa.reference
    >>> from cufa.testing import assert_close, varlen_cases
    >>> @settings(max_examples=5)
    ... @given(varlen_cases(max_seqlen=17))
    ... def test_attention_varlen(case):
    ...     arrays, options = case.arrays(), case.options
    ...     assert_close(cufa.reference.attention_varlen(**arrays, **options), **arrays, **options)
    >>> test_attention_varlen()
    """
    st, features = _features("varlen_cases", max_seqlen, dtypes, head_dims, layouts, values)
    seqlen = features.pop("seqlen")
    sequences = st.sampled_from((1, 2, 3, 4) * 3 + (0,)).flatmap(
        lambda batch: st.tuples(*[st.tuples(seqlen, seqlen, seqlen)] * batch)
    )
    strategy: SearchStrategy[Case] = st.builds(
        _varlen_case,
        sequences=sequences,
        use_seqused_k=st.booleans(),
        offsets=st.sampled_from(offsets),
        **features,
    )
    return strategy


def _features(
    function: str,
    max_seqlen: int,
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    layouts: Sequence[str],
    values: Sequence[str],
) -> tuple[Any, dict[str, Any]]:
    """Hypothesis' strategies, and one for each field that dense and varlen cases share.

    What is empty or off is weighted so that most cases compute something, and some compute something plain.
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise ImportError(f"cufa.testing.{function} needs Hypothesis: pip install 'cufa[test]'.") from error
    side = st.none() | st.sampled_from((0, 1, 5, 16, 31, 64, 65, -1, max_seqlen, max_seqlen + 100))
    layout = st.sampled_from(layouts)
    written = st.sampled_from([name for name in layouts if name != "broadcast"])
    return st, {
        "seqlen": st.sampled_from([n for n in SEQLENS if 0 < n <= max_seqlen] * 3 + [0]),
        "heads": st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (6, 2), (5, 1), (8, 1)] * 2 + [(0, 0)]),
        "head_dim": st.sampled_from(head_dims),
        "head_dim_v": st.sampled_from(head_dims),
        "dtype": st.sampled_from(dtypes),
        "causal": st.booleans(),
        "window_size": st.none() | st.tuples(side, side),
        "softmax_scale": st.sampled_from((None, 0.02, 0.25, 1.0)),
        "softcap": st.sampled_from((0.0, 0.0, 0.0, 0.5, 5.0, 30.0)),
        "alibi_ndim": st.sampled_from((0, 0, 1, 2)),
        "sinks": st.booleans(),
        "return_lse": st.booleans(),
        "use_out": st.booleans(),
        "layouts": st.tuples(layout, layout, layout, written),
        "values": st.sampled_from([name for name in values if name in ("normal", "large rows")] * 3 + list(values)),
        "seed": st.integers(0, 2**32 - 1),
    }


def _case(heads: tuple[int, int], **others: Any) -> Case:
    return Case(num_heads_q=heads[0], num_heads_k=heads[1], **others)


def _varlen_case(sequences: tuple[tuple[int, int, int], ...], use_seqused_k: bool, **others: Any) -> Case:
    return _case(
        batch=len(sequences),
        seqlen_q=tuple(seqlen_q for seqlen_q, _, _ in sequences),
        seqlen_k=tuple(seqlen_k for _, seqlen_k, _ in sequences),
        seqused_k=tuple(min(used, n) for _, n, used in sequences) if use_seqused_k else None,
        **others,
    )


# --- timing -----------------------------------------------------------------------------------------

FLUSH_BYTES = 256 << 20
"""Written between calls on a GPU, to push the arrays out of the L2 cache: more than any has."""


@dataclass(frozen=True)
class BenchResult:
    """Times of repeated calls, in seconds.

    Attributes
    ----------
    median, p10, p90 : float
        Percentiles of the time of one call.
    repeats : int
    """

    median: float
    p10: float
    p90: float
    repeats: int

    def __str__(self) -> str:
        scale, unit = (1, "s") if self.median >= 1 else (1e3, "ms") if self.median >= 1e-3 else (1e6, "µs")
        spread = f"p10 {self.p10 * scale:.4g}, p90 {self.p90 * scale:.4g}, {self.repeats} repeats"
        return f"{self.median * scale:.4g} {unit} ({spread})"


def bench(
    fn: Callable[[], object],
    *,
    like: Any = None,
    seconds: float = 0.5,
    min_repeats: int = 5,
    max_repeats: int = 500,
    flush_l2: bool = True,
    graph: bool = True,
) -> BenchResult:
    """Measure how long a call takes.

    Parameters
    ----------
    fn : callable
        Called without arguments. On a GPU it must use the framework's current stream.
    like : array, optional
        One of the arrays at work, which says what clock to look at: of CuPy or torch and on a GPU, the GPU's
        time between two events; of JAX, the host's until the result is ready; anything else, the host's.
    seconds : float
        How long to measure, about.
    min_repeats, max_repeats : int
        Bounds of the number of calls, whatever `seconds` says.
    flush_l2 : bool
        GPU: push the arrays out of the L2 cache before each call.
    graph : bool
        GPU: replay the call as a CUDA graph, without the host's share, if it can be captured.

    Returns
    -------
    BenchResult

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.testing import bench
    >>> x = np.ones((64, 64))
    >>> result = bench(lambda: x @ x, like=x, seconds=0.01)
    >>> result.p10 <= result.median <= result.p90
    True
    """
    gpu = _gpu_of(like)

    def repeats(one: float) -> int:
        return max(min(int(seconds / max(one, 1e-9)), max_repeats), min_repeats)

    times = _host_times(fn, like, repeats) if gpu is None else _gpu_times(fn, gpu, repeats, flush_l2, graph)
    p10, median, p90 = np.percentile(times, (10, 50, 90)).tolist()
    return BenchResult(median, p10, p90, len(times))


def _host_times(fn: Callable[[], object], like: Any, repeats: Callable[[float], int]) -> list[float]:
    jax = sys.modules.get("jax")
    wait = jax.block_until_ready if jax is not None and isinstance(like, jax.Array) else lambda result: None

    def once() -> float:
        start = time.perf_counter()
        wait(fn())
        return time.perf_counter() - start

    once()  # the first call compiles, fills caches and touches fresh memory
    return [once() for _ in range(repeats(once()))]


class _Gpu(NamedTuple):
    """What timing asks of a framework, on the stream that `stream` makes current."""

    stream: Any
    synchronize: Callable[[], object]
    flush: Callable[[], object]
    capture: Callable[[Callable[[], object]], Callable[[], object]]
    record: Callable[[], Any]
    milliseconds: Callable[[Any, Any], float]


def _gpu_times(
    fn: Callable[[], object], gpu: _Gpu, repeats: Callable[[float], int], flush: bool, graph: bool
) -> list[float]:
    def timed(call: Callable[[], object], count: int) -> list[float]:
        events = []
        for _ in range(count):
            if flush:
                gpu.flush()
            start = gpu.record()
            call()
            events.append((start, gpu.record()))
        gpu.synchronize()
        return [gpu.milliseconds(start, stop) / 1e3 for start, stop in events]

    with gpu.stream:
        fn()  # compiles, and fills the memory pool: neither may happen while a graph is captured
        fn()
        gpu.synchronize()
        call = gpu.capture(fn) if graph else fn
        return timed(call, repeats(float(np.median(timed(call, 3)))))


def _gpu_of(like: Any) -> _Gpu | None:
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy is not None and isinstance(like, cupy.ndarray):
        return _cupy_gpu(cupy, like)
    if torch is not None and isinstance(like, torch.Tensor) and like.is_cuda:
        return _torch_gpu(torch, like)
    return None


def _cupy_gpu(cupy: Any, like: Any) -> _Gpu:
    cupy.cuda.get_current_stream().synchronize()  # the arrays may still be in the making there
    with like.device:
        stream = cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be captured
        junk = cupy.empty(FLUSH_BYTES, dtype=np.uint8)

    def capture(fn: Callable[[], object]) -> Callable[[], object]:
        stream.begin_capture()
        try:
            fn()
            graph = stream.end_capture()
        except Exception:
            if stream.is_capturing():
                stream.end_capture()
            return fn
        return lambda: graph.launch(stream)

    return _Gpu(stream, stream.synchronize, lambda: junk.fill(0), capture, stream.record, cupy.cuda.get_elapsed_time)


def _torch_gpu(torch: Any, like: Any) -> _Gpu:
    stream = torch.cuda.Stream(like.device)
    stream.wait_stream(torch.cuda.current_stream(like.device))
    junk = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=like.device)

    def capture(fn: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                fn()
        except Exception:
            return fn
        return lambda: graph.replay()

    def record() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    return _Gpu(
        torch.cuda.stream(stream),
        stream.synchronize,
        lambda: junk.zero_(),
        capture,
        record,
        lambda start, stop: start.elapsed_time(stop),
    )

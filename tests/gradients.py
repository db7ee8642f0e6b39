"""How close gradients are to the float64 reference, in units of the noise: see `cufa.testing`.

The noise is about what the same mathematics errs by where it rounds p, ds, out and the gradients to the inputs' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from exact import in_step

import cufa
from cufa import reference, testing
from cufa.testing import Case, View

NAMES = ("dq", "dk", "dv", "dsinks")

VALUES = tuple(values for values in testing.VALUES if values not in ("huge scores", "constant"))
"""Of the cases whose gradients can be told from a lse in float32: scores that are not larger than 2^24 can."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of the gradients: a case, and what it has beside that.

    Attributes
    ----------
    case : Case
        Its `use_out` and `return_lse` do not matter: out and lse are those of the reference.
    deterministic : bool
    dlse : bool
        Whether there is one.
    dout : str
        Its layout.
    results : tuple of str, optional
        Layouts of dq, dk and dv, if they are given. Memory between their elements is NaN.
    """

    case: Case
    deterministic: bool = False
    dlse: bool = True
    dout: str = "contiguous"
    results: tuple[str, str, str] | None = None

    @property
    def packed(self) -> bool:
        return isinstance(self.case.seqlen_q, tuple)

    def arrays(self, xp: Any = np) -> dict[str, Any]:
        """All but the results, by keyword."""
        case, host = self.case, self.case.arrays()
        dtype, rng = host["q"].dtype, np.random.default_rng([case.seed, 1])
        forward = reference.attention_varlen if self.packed else reference.attention
        out, lse = forward(**host, **case.options, return_lse=True)
        lse_dtype = np.float64 if dtype == np.float64 else np.float32
        dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
        if case.values == "huge":  # v is; its products with dout are still to fit float32
            dout *= 2.0**-12 if case.dtype == "float16" else 2.0**-24
        if case.values == "garbage":  # where it counts nowhere
            dout[case.counts("q") == 0] = np.nan
        with np.errstate(all="ignore"):
            more = {
                "out": (out.astype(dtype), case.layouts[3]),
                "dout": (dout.astype(dtype), self.dout),
                "lse": (lse.astype(lse_dtype), "contiguous"),
                "dlse": (dlse.astype(lse_dtype), "strided"),
            }
        if not self.dlse:
            del more["dlse"]
        return case.arrays(xp) | {name: lay_out(array, layout, xp) for name, (array, layout) in more.items()}

    def into(self, xp: Any = np) -> dict[str, Any]:
        """Arrays of NaN to pass as dq, dk and dv; nothing if they are not given."""
        dtype = getattr(ml_dtypes, self.case.dtype, self.case.dtype)
        layouts = zip("qkv", self.results or (), strict=False)
        return {
            f"d{name}": lay_out(np.full(self.case.view(name).shape, np.nan, dtype), layout, xp)
            for name, layout in layouts
        }

    def run(self, xp: Any = np, **changed: Any) -> tuple[Any, ...]:
        """The gradients; `changed` are arrays by keyword."""
        function = cufa.attention_varlen_backward if self.packed else cufa.attention_backward
        into = self.into(xp)
        arrays = self.arrays(xp) | into | changed
        found: tuple[Any, ...] = function(**arrays, **self.case.options, deterministic=self.deterministic)
        assert all(array is other for array, other in zip(found, into.values(), strict=False))
        return found

    def right(self, xp: Any = np) -> tuple[Any, ...]:
        """The gradients, held to the reference."""
        found = self.run(xp)
        self.check(found)
        return found

    def check(self, found: tuple[Any, ...]) -> None:
        """Hold gradients to the reference, which reads the same arrays made by NumPy."""
        arrays = self.arrays()
        del arrays["out"], arrays["lse"]
        for name, array in zip("qkv", map(testing.to_numpy, found), strict=False):
            assert (array.shape, array.dtype) == (self.case.view(name).shape, arrays["q"].dtype)
        assert_gradients_close(found, **arrays, **self.case.options)


def lay_out(array: np.ndarray, layout: str, xp: Any = np) -> Any:
    """The array in one of `cufa.testing.LAYOUTS`, with NaN between its elements."""
    view = View.of(array.shape, layout)
    flat = np.full(view.size, np.nan, array.dtype)
    view.on(flat)[...] = array
    return view.on(flat, xp)


COMPUTE_UNIT = 2.0**-22
"""Of a float32 product by three of tf32, and of the exponential."""


class Expected(NamedTuple):
    """Gradients, and the root mean square error to expect of each element; 0 where a gradient is 0 exactly."""

    exact: tuple[np.ndarray, ...]
    noise: tuple[np.ndarray, ...]


def assert_gradients_close(
    found: tuple[Any, ...],
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    dlse: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    **options: Any,
) -> None:
    """Raise unless dq, dk, dv and, with sinks, dsinks are as close to the reference as rounding allows.

    As `cufa.testing.assert_close` for out. What belongs to no sequence, is not live, or sees nothing must be 0.
    """
    arrays = [dout, q, k, v, dlse, cu_seqlens_q, cu_seqlens_k, seqused_k]
    dout, q, k, v, dlse, *offsets = (None if x is None else testing.to_numpy(x) for x in arrays)
    for name in ("alibi_slopes", "sinks"):
        options[name] = None if options.get(name) is None else testing.to_numpy(options[name])
    if offsets[0] is None:
        expected = expect(dout, q, k, v, dlse, **options)
    else:
        expected = _expect_packed(dout, q, k, v, dlse, offsets, options)
    count = 3 if options["sinks"] is None else 4
    assert len(found) == count
    compared = zip(NAMES[:count], found, *(each[:count] for each in expected), strict=True)
    complaints = [complaint(*each) for each in compared]
    if any(complaints):
        raise AssertionError("\n".join(filter(None, complaints)))


def complaint(name: str, found: Any, exact: np.ndarray, noise: np.ndarray) -> str | None:
    """What is wrong with elements and the whole; errors along a row have too much in common to tell anything."""
    got, exact, noise = (testing.to_numpy(each)[..., None] for each in (found, exact, noise))
    # Sums of NaN and Inf are one or the other, depending on what they meet first, and on what was rounded to 0.
    return testing._complaint(name, got, exact, noise, ~np.isfinite(exact))


def _expect_packed(
    dout: Any, q: Any, k: Any, v: Any, dlse: Any, offsets: list[Any], options: dict[str, Any]
) -> Expected:
    shapes = (q.shape, k.shape, v.shape, q.shape[1:2])
    expected = Expected(*(tuple(np.zeros(shape) for shape in shapes) for _ in range(2)))
    options = options.copy()
    for each in reference._sequences(q, k, v, *offsets, options.pop("alibi_slopes")):
        own = None if dlse is None else dlse[None, :, each.rows]
        one = expect(dout[None, each.rows], each.q, each.k, each.v, own, **options, alibi_slopes=each.alibi_slopes)
        for whole, part in zip(expected, one, strict=True):
            for into, x, rows in zip(whole, part, (each.rows, each.keys, each.keys), strict=False):
                into[rows] = x[0]
        expected.exact[3][...] += one.exact[3]
        expected.noise[3][...] = np.hypot(expected.noise[3], one.noise[3])
    return expected


def finite(x: np.ndarray) -> np.ndarray:
    """x, with 0 in place of NaN and Inf."""
    return np.where(np.isfinite(x), x, 0)


def expect(dout: Any, q: Any, k: Any, v: Any, dlse: Any, **options: Any) -> Expected:
    """Of a dense problem."""
    exact = reference._differentiate(dout, q, k, v, dlse, **options)
    with np.errstate(all="ignore"):  # NaN and Inf are data here
        return Expected(exact, _noise(exact, dout, q, k, v, dlse, options))


def _noise(
    exact: tuple[Any, ...], dout: Any, q: Any, k: Any, v: Any, dlse: Any, options: dict[str, Any]
) -> tuple[np.ndarray, ...]:
    storage = q.dtype
    unit = float(ml_dtypes.finfo(storage).eps) / 2
    # Numbers below this are spaced absolutely, or flushed to zero.
    tiny = max(float(ml_dtypes.finfo(storage).smallest_subnormal), float(np.finfo(np.float32).tiny))
    half = 0.5  # root mean square of a rounding error in units
    scale, softcap = options.get("softmax_scale"), options.get("softcap", 0.0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keep = reference._keep(q.shape[1], k.shape[1], options.get("causal", False), options.get("window_size"))

    # By (batch, head, row, key or column), in float64. Rows that see no key count for nothing; nor do NaN and Inf here,
    # since what they meet is not finite and has no noise.
    out, lse = reference.attention(q, k, v, return_lse=True, **options)
    out_noise, _, _ = testing._noise(testing._Problem(q, k, v, None, None, None, options), out, storage)
    raw = reference._scores(q, k, scale, softcap, None)
    s = reference._scores(q, k, scale, softcap, options.get("alibi_slopes"))
    p, _ = reference._softmax(np.where(keep, s, -np.inf), options.get("sinks"))
    raw, s, p = (finite(x) for x in (raw, s, p))
    q, k, v, dout, out, out_noise = (finite(x.astype(np.float64)) for x in (q, k, v, dout, out, out_noise))
    k_heads, v_heads = (reference._match_heads(x, q) for x in (k, v))
    by_head = (x.swapaxes(1, 2) for x in (q, k_heads, v_heads, dout, out, out_noise))
    q_, k_, v_, dout_, out_, out_noise_ = by_head
    lse = lse[..., None]
    empty = np.isneginf(lse)
    lse = np.where(empty, lse, finite(lse))
    dout_, lse_size = np.where(empty, 0, dout_), np.where(empty, 0, np.abs(lse))
    dlse_ = np.where(empty, 0, 0 if dlse is None else finite(dlse)[..., None])
    p = np.where(keep & ~empty, p, 0)
    delta = (dout_ * out_).sum(axis=-1, keepdims=True) - dlse_
    derivative = 1 - (raw / softcap) ** 2 if softcap > 0 else np.ones_like(raw)
    weight = p * derivative
    gap = np.where(keep, dout_ @ v_.swapaxes(2, 3) - delta, 0)
    ds = weight * gap

    # What an entry has for itself. Scores err, and so p and ds relatively; so does dp. Sums err like a random walk.
    walk_q, walk_k = (1 + np.sqrt(x.shape[1]) / 4 for x in (q, k))
    s_size = (1 + q.shape[-1] / 128) * reference._scores(np.abs(q), np.abs(k), scale, 0.0, None)
    s_size = 1 + np.minimum(softcap, 16 * np.abs(raw)) + s_size + np.abs(s - raw) + np.where(p > 0, np.abs(s - lse), 0)
    dp_size = (1 + v.shape[-1] / 128) * (np.abs(dout_) @ np.abs(v_).swapaxes(2, 3)) + np.abs(delta)
    p_noise = COMPUTE_UNIT * p * s_size
    ds_noise = COMPUTE_UNIT * p * (dp_size + np.abs(gap) * s_size)
    # Roundings to the storage dtype; ds may be made of a rounded weight.
    # Exponentials below float32's normal numbers are 0.
    least = np.where(keep, max(tiny, 2 * float(np.finfo(np.float32).tiny)), 0)
    p_rounding = half * (unit * p + least)
    ds_rounding = half * (unit * np.abs(ds) + least) + half * (unit * weight + least) * np.abs(gap)
    # What the entries of a row have in common: the roundings of lse, and of out in delta.
    row_noise = COMPUTE_UNIT * (walk_k + lse_size)
    delta_noise = np.sqrt((out_noise_**2 * dout_**2).sum(axis=-1, keepdims=True))
    delta_noise = delta_noise + COMPUTE_UNIT * ((np.abs(dout_ * out_)).sum(axis=-1, keepdims=True) + np.abs(dlse_))

    def result(variance: Any, gradient: Any, seen: Any, factor: float) -> np.ndarray:
        # Sums are float32 before they are scaled.
        noise = factor * (np.sqrt(variance.swapaxes(1, 2)) + half * tiny) + half * (unit * np.abs(gradient) + tiny)
        return np.where(seen[:, None, None], noise, 0)

    times = _alike_heads(q, k, dout, options)

    def by_keys(variance: Any, like: Any) -> Any:
        """Added up over the heads that share a key head."""
        return (times[:, None, :, None] * reference._sum_groups(variance.swapaxes(1, 2), like)).swapaxes(1, 2)

    common = (row_noise * (ds @ k_)) ** 2 + (delta_noise * (weight @ k_)) ** 2
    by_row, by_column = (half * unit * in_step(np, s - lse, p, axis, unit) * np.abs(ds) for axis in (3, 2))
    dq_variance = ((walk_k * ds_noise) ** 2 + ds_rounding**2) @ k_**2 + common + (by_row @ np.abs(k_)) ** 2
    dk_variance = (walk_q * ds_noise) ** 2 + ds_rounding**2 + (row_noise * ds) ** 2 + (delta_noise * weight) ** 2
    dk_variance = dk_variance.swapaxes(2, 3) @ q_**2 + (by_column.swapaxes(2, 3) @ np.abs(q_)) ** 2
    dv_variance = (walk_q * p_noise) ** 2 + p_rounding**2 + (row_noise * p) ** 2
    sinks = options.get("sinks")
    sink = np.full((q.shape[2], 1, 1), -np.inf) if sinks is None else np.asarray(sinks, np.float64)[:, None, None]
    p_sink = np.where(empty, 0, np.exp(sink - lse))
    lse_noise = row_noise + p_noise.sum(axis=-1, keepdims=True)
    sink_noise = p_sink * (delta_noise + np.abs(delta) * (lse_noise + COMPUTE_UNIT * np.abs(sink)))
    sink_noise = np.where(p_sink > 0, sink_noise + np.finfo(np.float32).tiny * (1 + np.abs(delta)), 0)
    return (
        result(dq_variance, exact[0], keep.any(axis=1), scale),
        result(by_keys(dk_variance, k), exact[1], keep.any(axis=0), scale),
        result(by_keys(dv_variance.swapaxes(2, 3) @ dout_**2, v), exact[2], keep.any(axis=0), 1.0),
        np.sqrt((sink_noise**2).sum(axis=(0, 2, 3))) + COMPUTE_UNIT * np.abs(exact[3]) + np.finfo(np.float32).tiny,
    )


def _alike_heads(q: np.ndarray, k: np.ndarray, dout: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """How many query heads err as one where errors add up, by batch and key head: 1, or all if all are the same."""
    batch, _, num_heads_q, _ = q.shape
    group = num_heads_q // max(k.shape[2], 1)
    per_head = (options.get(name) for name in ("alibi_slopes", "sinks"))
    same = np.ones((batch, k.shape[2]), bool)
    vectors = (np.broadcast_to(x, (batch, num_heads_q))[:, None, :, None] for x in per_head if x is not None)
    for x in (q, dout, *vectors):
        heads = x.reshape(*x.shape[:2], k.shape[2], group, x.shape[3])
        same &= (heads == heads[:, :, :, :1]).all(axis=(1, 3, 4))
    return np.where(same, max(group, 1), 1)

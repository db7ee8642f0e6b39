"""The specification against brute force, SciPy and its own pictures."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from cufa import reference
from cufa.testing import Case, dense_cases, varlen_cases

INF, NAN = np.inf, np.nan
SMALL: dict[str, Any] = {"max_seqlen": 9, "head_dims": (1, 2, 7), "dtypes": ("float64",)}
FINITE = ("normal", "large rows")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def brute_force(q: Any, k: Any, v: Any, b: int, h: int, i: int, options: dict[str, Any]) -> tuple[Any, float]:
    """One row of out and its lse, from the definition and with Python's own arithmetic."""
    (seqlen_q, heads, head_dim), (seqlen_k, heads_k) = q.shape[1:], k.shape[1:3]
    scale = options["softmax_scale"] or 1 / math.sqrt(head_dim)
    left, right = options["window_size"] or (None, None)
    slopes, sinks = options.get("alibi_slopes"), options.get("sinks")
    diagonal = i + seqlen_k - seqlen_q
    weights, values = [], []
    for j in range(seqlen_k):
        if options["causal"] and j > diagonal:
            continue
        if left not in (None, -1) and j < diagonal - left:
            continue
        if right not in (None, -1) and j > diagonal + right:
            continue
        h_k = h // (heads // heads_k)
        s = scale * math.fsum(float(x) * float(y) for x, y in zip(q[b, i, h], k[b, j, h_k], strict=True))
        if options["softcap"]:
            s = options["softcap"] * math.tanh(s / options["softcap"])
        if slopes is not None:
            s -= float(slopes[b, h] if slopes.ndim == 2 else slopes[h]) * abs(diagonal - j)
        weights.append(math.exp(s))
        values.append(v[b, j, h_k].astype(np.float64))
    total = math.fsum(weights) + (0.0 if sinks is None else math.exp(sinks[h]))
    out = sum((w / total * x for w, x in zip(weights, values, strict=True)), np.zeros(v.shape[-1]))
    return out, math.log(total) if total else -INF


@settings(max_examples=60)
@given(dense_cases(max_seqlen=7, head_dims=(1, 2, 7, 16), dtypes=("float16", "bfloat16", "float64"), values=FINITE))
def test_every_feature_agrees_with_brute_force(case: Case) -> None:
    arrays = case.arrays()
    out, lse = reference.attention(**arrays, **case.options, return_lse=True)
    options = {**case.options, **{name: arrays.get(name) for name in ("alibi_slopes", "sinks")}}
    q, k, v = (arrays[name] for name in "qkv")
    assert out.shape == (*q.shape[:3], v.shape[3]) and out.dtype == np.float64
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.dtype == np.float64
    for b, h, i in np.ndindex(lse.shape):
        out_row, lse_row = brute_force(q, k, v, b, h, i, options)
        np.testing.assert_allclose(out[b, i, h], out_row, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(lse[b, h, i], lse_row, rtol=1e-11, atol=1e-12)


@settings(max_examples=40)
@given(varlen_cases(max_seqlen=33, head_dims=(1, 8), dtypes=("float32",)))
def test_varlen_is_a_loop_of_dense(case: Case) -> None:
    arrays = case.arrays()
    out, lse = reference.attention_varlen(**arrays, **case.options, return_lse=True)
    q, k, v, starts_q, starts_k = (arrays[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"))
    used = arrays.get("seqused_k", np.diff(starts_k))
    slopes = arrays.get("alibi_slopes")
    assert out.shape == (*q.shape[:2], v.shape[2]) and lse.shape == (q.shape[1], q.shape[0])
    for n in range(case.batch):
        rows, keys = slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n] + used[n])
        out_n, lse_n = reference.attention(
            q[None, rows],
            k[None, keys],
            v[None, keys],
            alibi_slopes=slopes[n] if slopes is not None and slopes.ndim == 2 else slopes,
            sinks=arrays.get("sinks"),
            **case.options,
            return_lse=True,
        )
        np.testing.assert_array_equal(out[rows], out_n[0])
        np.testing.assert_array_equal(lse[:, rows], lse_n[0])


def test_plain_attention_is_scipys_softmax() -> None:
    q, k, v = random(2, 9, 4, 8), random(2, 13, 4, 8, seed=1), random(2, 13, 4, 5, seed=2)
    out, lse = reference.attention(q, k, v, return_lse=True)
    s = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(8)
    np.testing.assert_allclose(lse, scipy.special.logsumexp(s, axis=-1), rtol=1e-13)
    expected = np.einsum("bhij,bjhd->bihd", scipy.special.softmax(s, axis=-1), v)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-15)


def kept(seqlen_q: int, seqlen_k: int, **options: Any) -> list[str]:
    """The mask, drawn: with the unit matrix for v, out is p."""
    v = np.eye(seqlen_k)[None, :, None, :]
    p = reference.attention(np.zeros((1, seqlen_q, 1, 1)), np.zeros((1, seqlen_k, 1, 1)), v, **options)
    return [" ".join("#" if x > 0 else "." for x in row) for row in p[0, :, 0]]


def test_masks_are_as_drawn_in_the_docstring() -> None:
    assert reference.__doc__ is not None
    lines = re.findall(r"^ +i \d   .*$", reference.__doc__, re.MULTILINE)
    pictures = [re.findall(r"[#.](?: [#.])*", line) for line in lines]
    assert [len(picture) for picture in pictures] == [4, 4, 4, 2, 2]
    wide, tall = [picture[:2] for picture in pictures[:3]], [picture[-2:] for picture in pictures]
    assert kept(3, 5, window_size=(2, 1)) == [window for window, _ in wide]
    assert kept(3, 5, causal=True) == [causal for _, causal in wide]
    assert kept(5, 3, window_size=(2, 1)) == [window for window, _ in tall]
    assert kept(5, 3, causal=True) == [causal for _, causal in tall]


def test_causal_is_a_window_without_a_right_side() -> None:
    assert kept(4, 6, causal=True) == kept(4, 6, window_size=(None, 0)) == kept(4, 6, window_size=(-1, 0))
    assert kept(4, 6, causal=True, window_size=(1, 3)) == kept(4, 6, window_size=(1, 0))
    assert kept(4, 6, window_size=(None, -1)) == kept(4, 6) == ["# # # # # #"] * 4
    assert kept(2, 4, window_size=(0, 0)) == [". . # .", ". . . #"]


def test_a_row_without_keys_is_zero() -> None:
    q, k, v = random(1, 5, 2, 4), random(1, 3, 2, 4, seed=1), random(1, 3, 2, 4, seed=2)
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :2] == 0).all() and (lse[..., :2] == -INF).all()
    assert (out[:, 2:] != 0).all() and np.isfinite(lse[..., 2:]).all()
    sinks = [0.5, -3.0]
    out, lse = reference.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert (out[:, :2] == 0).all()
    np.testing.assert_array_equal(lse[0, :, :2], [[0.5, 0.5], [-3.0, -3.0]])


def test_a_sink_is_a_key_whose_value_is_zero() -> None:
    q, k, v = random(1, 3, 1, 4), random(1, 6, 1, 4, seed=1), random(1, 6, 1, 4, seed=2)
    out, lse = reference.attention(q, k, v, sinks=[0.75], softmax_scale=1.0, return_lse=True)
    for i in range(3):  # the key that scores 0.75 with this row of q
        key = 0.75 * q[0, i, 0] / (q[0, i, 0] @ q[0, i, 0])
        k_sink, v_sink = np.append(k, key.reshape(1, 1, 1, 4), axis=1), np.append(v, 0 * v[:, :1], axis=1)
        out_i, lse_i = reference.attention(q, k_sink, v_sink, softmax_scale=1.0, return_lse=True)
        np.testing.assert_allclose(out[0, i], out_i[0, i], rtol=1e-12)
        np.testing.assert_allclose(lse[0, :, i], lse_i[0, :, i], rtol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2, 2), (2, 0, 3, 2, 2), (2, 3, 0, 2, 2), (2, 3, 3, 0, 0), (2, 3, 3, 0, 2)])
def test_any_size_may_be_zero(shape: tuple[int, ...]) -> None:
    batch, seqlen_q, seqlen_k, heads_q, heads_k = shape
    q, k = random(batch, seqlen_q, heads_q, 4), random(batch, seqlen_k, heads_k, 4)
    out, lse = reference.attention(q, k, k, return_lse=True)
    assert out.shape == q.shape and (out == 0).all()
    assert lse.shape == (batch, heads_q, seqlen_q) and (lse == -INF).all()


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_a_removed_key_contributes_nothing(poison: float) -> None:
    q, k, v = random(1, 4, 2, 4), random(1, 4, 2, 4, seed=1), random(1, 4, 2, 4, seed=2)
    clean = reference.attention(q, k, v, causal=True, return_lse=True)
    k[:, 2:], v[:, 2:] = poison, poison
    dirty = reference.attention(q, k, v, causal=True, return_lse=True)
    np.testing.assert_array_equal(clean[0][:, :2], dirty[0][:, :2])
    np.testing.assert_array_equal(clean[1][..., :2], dirty[1][..., :2])
    assert not np.isfinite(dirty[0][:, 3]).any()


def test_scores_that_are_not_finite() -> None:
    q, v = np.ones((1, 3, 1, 1)), np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    k = np.zeros((1, 3, 1, 1))

    def attend(*keys: float) -> tuple[float, float]:
        k[0, :, 0, 0] = keys
        out, lse = reference.attention(q, k, v, return_lse=True)
        return float(out[0, 0, 0, 0]), float(lse[0, 0, 0])

    assert attend(0, -INF, 0) == (2.0, math.log(2))
    assert attend(-INF, -INF, -INF) == (0.0, -INF)
    np.testing.assert_equal(attend(0, INF, 0), (NAN, INF))
    np.testing.assert_equal(attend(0, NAN, 0), (NAN, NAN))


def test_sinks_of_infinity_take_everything() -> None:
    q, k, v, dout = (random(1, rows, 2, 4, seed=rows) for rows in (3, 5, 5, 3))
    sinks, dlse = [INF, 0.0], np.ones((1, 2, 3))
    out, lse = reference.attention(q, k, v, sinks=sinks, return_lse=True)
    assert not out[:, :, 0].any() and (lse[:, 0] == INF).all() and np.isfinite(lse[:, 1]).all() and out[:, :, 1].all()
    *gradients, dsinks = reference.attention_backward(dout, q, k, v, sinks=sinks, dlse=dlse)
    assert all(not x[:, :, 0].any() and x[:, :, 1].all() for x in gradients)
    assert dsinks[0] == 3 and np.isfinite(dsinks[1])  # lse moves with the sink
    k[0, 1, 0] = INF  # a score of +-inf; beside one of +inf nothing is a number
    out, lse = reference.attention(np.abs(q), k, v, sinks=sinks, return_lse=True)
    assert np.isnan(out[:, :, 0]).all() and (lse[:, 0] == INF).all() and np.isfinite(out[:, :, 1]).all()
    *gradients, _ = reference.attention_backward(dout, np.abs(q), k, v, sinks=[-INF, 0.0])
    assert np.isnan(gradients[0][:, :, 0]).all() and np.isfinite(gradients[0][:, :, 1]).all()


def test_large_numbers_do_not_overflow_on_the_way() -> None:
    """The logarithm of a sum is lost in a score of 1e11, the sum is not; and no mean is larger than the largest."""
    x = np.full((1, 300, 1, 4), 133120.0)
    np.testing.assert_allclose(reference.attention(x, x, x), x, rtol=1e-14)
    q, v = random(1, 30, 1, 4), np.full((1, 30, 1, 2), np.finfo(np.float64).max)
    np.testing.assert_allclose(reference.attention(q, q, v), v, rtol=1e-14)
    np.testing.assert_allclose(reference.attention(q, q, -v, causal=True), -v, rtol=1e-14)
    for options in ({"softcap": 1.2e-38, "softmax_scale": 30.0}, {"softmax_scale": 2.0**-126}):
        np.testing.assert_allclose(reference.attention(q, q, q, **options)[0, 0], q.mean(axis=1)[0], atol=1e-14)


def test_a_row_adds_nothing_to_keys_that_it_does_not_keep() -> None:
    """Whatever its q and dout hold; and of a row without keys dout does not count even with a sink."""
    q, k, v, dout = (random(1, rows, 2, 4, seed=rows) for rows in (6, 4, 4, 6))
    clean = reference.attention_backward(dout, q, k, v, causal=True, sinks=[0.5, 0.0])
    q[:, :2] = dout[:, :2] = NAN  # see no key
    for x, other in zip(reference.attention_backward(dout, q, k, v, causal=True, sinks=[0.5, 0.0]), clean, strict=True):
        np.testing.assert_array_equal(x, other)
    q[:, 2] = dout[:, 2] = INF  # sees key 0 alone
    for x, other in zip(reference.attention_backward(dout, q, k, v, causal=True)[1:], clean[1:], strict=False):
        assert not np.isfinite(x[:, 0]).all()
        assert np.isfinite(x[:, 1:]).all() and x.shape == other.shape


def test_offsets_are_read_as_their_clamped_running_maximum() -> None:
    q, k = random(8, 2, 4), random(9, 2, 4, seed=1)
    dout = random(8, 2, 4, seed=2)

    def both(*offsets: Any, **options: Any) -> list[np.ndarray]:
        forward = reference.attention_varlen(q, k, k, *offsets, return_lse=True, causal=True, **options)
        return [*forward, *reference.attention_varlen_backward(dout, q, k, k, *offsets, causal=True, **options)]

    right = both([0, 3, 3, 8, 8], [0, 4, 7, 7, 9], seqused_k=[4, 0, 0, 2])
    wild = both([-5, 3, 1, 100, 2], [0, 4, 7, -9, 9], seqused_k=[9, -3, 5, 2])
    for x, other in zip(right, wild, strict=True):
        np.testing.assert_array_equal(x, other)
    padded = both([0, 3, 6, 0, 0], [0, 4, 9, 0, 0])
    for x, other in zip(padded, both([0, 3, 6], [0, 4, 9]), strict=True):
        np.testing.assert_array_equal(x, other)
    assert not padded[0][6:].any() and (padded[1][:, 6:] == -INF).all() and not padded[2][6:].any()


def test_what_lies_behind_the_live_length_has_no_effect() -> None:
    q, k, v = random(5, 2, 4), random(9, 2, 4, seed=1), random(9, 2, 4, seed=2)
    expected = reference.attention_varlen(q, k, v, [0, 3, 5], [0, 4, 9], seqused_k=[2, 5], return_lse=True)
    k[2:4], v[2:4] = NAN, INF
    result = reference.attention_varlen(q, k, v, [0, 3, 5], [0, 4, 9], seqused_k=[2, 5], return_lse=True)
    np.testing.assert_equal(result, expected)
    assert np.isfinite(result[0]).all() and (result[0] != 0).all()


def test_rows_of_no_sequence_are_zero() -> None:
    q = np.ones((6, 1, 2))
    out, lse = reference.attention_varlen(q, q, q, [1, 3, 4], [0, 3, 6], return_lse=True)
    assert out[:, 0, 0].tolist() == [0, 1, 1, 1, 0, 0]
    np.testing.assert_array_equal(np.isneginf(lse[0]), [True, False, False, False, True, True])


@pytest.mark.parametrize(
    ("k_shape", "v_shape", "words"),
    [
        ((1, 3, 2, 4), (1, 3, 2, 4), "batch sizes 2, 1 and 1"),
        ((2, 3, 2, 4), (2, 1, 2, 4), "v has seqlen 1 but k has 3"),
        ((2, 3, 2, 4), (2, 3, 1, 4), "v has 1 heads but k has 2"),
        ((3, 2, 4), (3, 2, 4), "4 dimensions"),
        ((2, 3, 2, 1), (2, 3, 2, 4), "k has head_dim 1 but q has 4"),
        ((2, 3, 3, 4), (2, 3, 3, 4), "q has 4 heads and k has 3"),
        ((2, 3, 0, 4), (2, 3, 0, 4), "q has 4 heads and k has 0"),
    ],
)
def test_shapes_that_do_not_agree(k_shape: tuple[int, ...], v_shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=f"^attention: .*{words}"):
        reference.attention(np.ones((2, 3, 4, 4)), np.ones(k_shape), np.ones(v_shape))


# --- gradients --------------------------------------------------------------------------------------


def weighted(arrays: dict[str, Any], options: dict[str, Any], dout: Any, dlse: Any) -> float:
    """What the gradients are of; rows without keys have no lse to weigh."""
    function = reference.attention_varlen if "cu_seqlens_q" in arrays else reference.attention
    out, lse = function(**arrays, **options, return_lse=True)
    return float((dout * out).sum() + (dlse * np.where(np.isneginf(lse), 0.0, lse)).sum())


@settings(max_examples=120)
@given(st.one_of(dense_cases(**SMALL, values=FINITE), varlen_cases(**SMALL, values=FINITE)))
def test_gradients_are_the_limits_of_differences(case: Case) -> None:
    arrays, rng = case.arrays(), np.random.default_rng(case.seed)
    varlen = "cu_seqlens_q" in arrays
    forward = reference.attention_varlen if varlen else reference.attention
    backward = reference.attention_varlen_backward if varlen else reference.attention_backward
    out, lse = forward(**arrays, **case.options, return_lse=True)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    gradients = backward(dout, **arrays, dlse=dlse, **case.options)
    names = ("q", "k", "v", *(("sinks",) if "sinks" in arrays else ()))
    assert len(gradients) == len(names)
    for name, gradient in zip(names, gradients, strict=True):
        x = np.asarray(arrays[name], np.float64)
        assert gradient.shape == x.shape and gradient.dtype == np.float64
        direction, step = rng.standard_normal(x.shape), 1e-5
        ahead, behind = (
            weighted(arrays | {name: x + sign * step * direction}, case.options, dout, dlse) for sign in (1, -1)
        )
        np.testing.assert_allclose((gradient * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


def test_rows_and_keys_that_see_nothing_have_no_gradient() -> None:
    q, k, v, dout = (random(1, rows, 2, 4, seed=rows) for rows in (5, 3, 3, 5))
    options: dict[str, Any] = {"window_size": (0, 0), "sinks": [0.0, -INF], "dlse": np.ones((1, 2, 5))}
    dq, _, _, dsinks = reference.attention_backward(dout, q, k, v, **options)  # row i + 2 sees key i
    assert not dq[0, :2].any() and dsinks[1] == 0
    k[0, 0] = v[0, 0] = NAN
    dq, dk, dv, _ = reference.attention_backward(dout, q, k, v, **options)
    assert not dq[0, :2].any() and np.isnan(dq[0, 2]).any() and np.isfinite(dq[0, 3:]).all()
    assert np.isfinite(dk[0, 1:]).all() and np.isfinite(dv[0, 1:]).all()
    _, dk, dv = reference.attention_backward(dout[:, 3:], q[:, 3:], k, v, window_size=(0, 0))
    assert not dk[0, 0].any() and not dv[0, 0].any()  # rows 3 and 4 do not see it
    assert np.isfinite(dk).all() and np.isfinite(dv).all()


def test_gradients_add_up_over_heads_that_share_a_key_head() -> None:
    q, k, v, dout = (
        random(2, 5, 6, 8),
        random(2, 7, 2, 8, seed=1),
        random(2, 7, 2, 3, seed=2),
        random(2, 5, 6, 3, seed=3),
    )
    dq, dk, dv = reference.attention_backward(dout, q, k, v, causal=True)
    repeated = reference.attention_backward(dout, q, k.repeat(3, axis=2), v.repeat(3, axis=2), causal=True)
    np.testing.assert_allclose(dq, repeated[0], atol=1e-13)
    np.testing.assert_allclose(dk, repeated[1].reshape(2, 7, 2, 3, 8).sum(axis=3), atol=1e-13)
    np.testing.assert_allclose(dv, repeated[2].reshape(2, 7, 2, 3, 3).sum(axis=3), atol=1e-13)


def test_gradients_of_other_shapes_are_refused() -> None:
    x = np.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match="dout"):
        reference.attention_backward(x[:, :1], x, x, x)
    with pytest.raises(ValueError, match="dlse"):
        reference.attention_backward(x, x, x, x, dlse=np.zeros((1, 2, 1)))

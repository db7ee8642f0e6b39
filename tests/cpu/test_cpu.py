"""Attention on NumPy arrays: against the reference, and its promises about memory and about edges."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import examples

from cufa._cpu import forward as _cpu
from cufa._terms import Term
from cufa._terms.alibi import Alibi
from cufa._terms.softcap import Softcap
from cufa.testing import DTYPES, OFFSETS, Case, assert_close, dense_cases, varlen_cases

ALL_DTYPES = (*DTYPES, "float64")
Result = tuple[np.ndarray, np.ndarray | None]


def scoring(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    """What happens to a case's scores, in the keywords of the functions under test."""
    left, right = (None if side == -1 else side for side in case.window_size or (None, None))
    if case.causal:
        right = 0 if right is None else min(right, 0)
    terms: list[tuple[Term, dict[str, Any]]] = [(Softcap(), {"softcap": case.softcap})] if case.softcap else []
    if "alibi_slopes" in arrays:
        terms.append((Alibi(), {"alibi_slopes": arrays["alibi_slopes"]}))
    return {
        "softmax_scale": case.softmax_scale or case.head_dim**-0.5,
        "window_left": left,
        "window_right": right,
        "terms": terms,
        "sinks": arrays.get("sinks"),
    }


def attend(case: Case, arrays: dict[str, Any], out: np.ndarray | None = None) -> Result:
    """Run a case, dense or varlen, the way the public functions do."""
    out = case.output() if out is None else out
    varlen = "cu_seqlens_q" in arrays
    lse_shape = (case.num_heads_q, sum(case.seqlen_q)) if isinstance(case.seqlen_q, tuple) else ()
    lse_shape = lse_shape or (case.batch, case.num_heads_q, case.seqlen_q)
    lse_dtype = np.float64 if case.dtype == "float64" else np.float32
    lse = np.full(lse_shape, np.nan, lse_dtype) if case.return_lse else None
    options = scoring(case, arrays)
    qkv = arrays["q"], arrays["k"], arrays["v"]
    if varlen:
        offsets = arrays["cu_seqlens_q"], arrays["cu_seqlens_k"], arrays.get("seqused_k")
        _cpu.varlen_forward(*qkv, *offsets, out, lse, **options)
    else:
        _cpu.forward(*qkv, out, lse, **options)
    return out, lse


def check(case: Case, arrays: dict[str, Any] | None = None) -> Result:
    arrays = case.arrays() if arrays is None else arrays
    out, lse = attend(case, arrays)
    assert_close(out, lse=lse, **arrays, **case.options)
    return out, lse


# Blocks larger than every problem here, and blocks so small that most problems have several of each kind.
blockings = st.sampled_from([(512, 512, 4096, 1 << 18, 1 << 21), (16, 16, 32, 256, 2048), (7, 5, 11, 64, 1)])
BLOCKING = ("BLOCK_M", "BLOCK_N", "MAX_BLOCK_N", "TILE_ELEMENTS", "OPERAND_ELEMENTS")


@settings(max_examples=examples(250, 500))
@given(dense_cases(max_seqlen=80, dtypes=ALL_DTYPES), blockings)
def test_dense_cases_agree_with_the_reference(case: Case, blocking: tuple[int, ...]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(BLOCKING, blocking, strict=True):
            patch.setattr(_cpu, name, value)
        check(case)


@settings(max_examples=examples(150, 300))
@given(varlen_cases(max_seqlen=65, dtypes=ALL_DTYPES, offsets=OFFSETS), blockings)
def test_varlen_cases_agree_with_the_reference(case: Case, blocking: tuple[int, ...]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(BLOCKING, blocking, strict=True):
            patch.setattr(_cpu, name, value)
        check(case)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_sizes_beyond_a_block_agree_with_the_reference(dtype: str, causal: bool) -> None:
    sizes = {"seqlen_q": 700, "seqlen_k": 1100, "num_heads_q": 4, "num_heads_k": 2, "head_dim": 64}
    check(Case(**sizes, dtype=dtype, causal=causal, window_size=(600, 200), return_lse=True))


@settings(max_examples=40)
@given(dense_cases(max_seqlen=33, head_dims=(1, 7, 16)))
def test_only_the_output_is_written(case: Case) -> None:
    arrays, flat = case.arrays(), case.flat("out")
    flat[...] = 7
    before = {name: x.copy() for name, x in arrays.items()}
    view = case.view("out")
    out, _ = attend(case, arrays, view.on(flat))
    assert_close(out, **arrays, **case.options)
    assert (flat[view.outside()] == 7).all()
    for name, x in arrays.items():
        np.testing.assert_array_equal(x, before[name])


@settings(max_examples=30)
@given(varlen_cases(max_seqlen=65, head_dims=(8, 40)))
def test_varlen_is_a_loop_of_dense(case: Case) -> None:
    arrays = case.arrays()
    out, lse = check(case, arrays)
    used = case.seqused_k or case.seqlen_k
    slopes = arrays.get("alibi_slopes")
    for n in range(case.batch):
        rows = slice(*arrays["cu_seqlens_q"][n : n + 2])
        keys = slice(arrays["cu_seqlens_k"][n], arrays["cu_seqlens_k"][n] + used[n])
        one = {"q": arrays["q"][None, rows], "k": arrays["k"][None, keys], "v": arrays["v"][None, keys]}
        if slopes is not None:
            one["alibi_slopes"] = slopes[n] if slopes.ndim == 2 else slopes
        if "sinks" in arrays:
            one["sinks"] = arrays["sinks"]
        dense = Case(**{**vars(case), "batch": 1, "seqlen_q": case.seqlen_q[n], "seqlen_k": used[n]})
        out_n, lse_n = attend(dense, one)
        np.testing.assert_array_equal(out[rows], out_n[0])
        if lse is not None and lse_n is not None:
            np.testing.assert_array_equal(lse[:, rows], lse_n[0])


def test_rows_of_no_sequence_are_not_read_and_only_lse_is_written() -> None:
    case = Case(seqlen_q=(3, 1, 6), seqlen_k=(3, 5, 2), batch=3, num_heads_q=2, num_heads_k=2, return_lse=True)
    arrays = case.arrays()
    arrays["cu_seqlens_q"], arrays["cu_seqlens_k"] = np.array([1, 4, 8]), np.array([2, 7, 9])
    for name, alive in (("q", slice(1, 8)), ("k", slice(2, 9)), ("v", slice(2, 9))):
        dead = np.ones(10, dtype=bool)
        dead[alive] = False
        arrays[name][dead] = np.nan
    out, lse = check(case, arrays)
    assert lse is not None
    assert np.isnan(out[[0, 8, 9]]).all() and np.isneginf(lse[:, [0, 8, 9]]).all()
    assert np.isfinite(out[1:8]).all() and np.isfinite(lse[:, 1:8]).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nothing_leaks_from_behind_the_live_length(poison: float) -> None:
    case = Case(seqlen_q=(4, 4), seqlen_k=(8, 8), batch=2, seqused_k=(5, 0), causal=True, return_lse=True)
    arrays = case.arrays()
    clean = check(case, arrays)
    for name in ("k", "v"):
        arrays[name][5:] = poison
    np.testing.assert_equal(attend(case, arrays), clean)
    assert (clean[0][:4] != 0).all() and (clean[0][4:] == 0).all()


CASE = Case(batch=3, seqlen_q=60, seqlen_k=75, num_heads_q=6, num_heads_k=3, head_dim=24, head_dim_v=10, causal=True)


def test_batch_entries_and_heads_are_alike() -> None:
    arrays = CASE.arrays()
    out, _ = check(CASE, arrays)
    entries, groups = [2, 0, 1], [1, 2, 0]
    heads = [2 * group + member for group in groups for member in (1, 0)]
    mixed = {"q": arrays["q"][entries][:, :, heads]}
    mixed |= {name: arrays[name][entries][:, :, groups] for name in ("k", "v")}
    np.testing.assert_allclose(attend(CASE, mixed)[0], out[entries][:, :, heads], rtol=1e-5, atol=1e-6)
    assert np.abs(out - out[entries]).max() > 0.1


def test_the_order_of_the_keys_does_not_matter() -> None:
    case = Case(**{**vars(CASE), "causal": False})
    arrays = case.arrays()
    out, _ = check(case, arrays)
    order = np.random.default_rng(0).permutation(75)
    shuffled = arrays | {name: arrays[name][:, order] for name in ("k", "v")}
    np.testing.assert_allclose(attend(case, shuffled)[0], out, rtol=1e-5, atol=1e-6)


def test_grouped_heads_are_repeated_heads() -> None:
    arrays = CASE.arrays()
    out, _ = check(CASE, arrays)
    repeated = arrays | {name: np.repeat(arrays[name], 2, axis=2) for name in ("k", "v")}
    full = Case(**{**vars(CASE), "num_heads_k": 6})
    np.testing.assert_allclose(attend(full, repeated)[0], out, rtol=1e-5, atol=1e-6)


def test_out_is_linear_in_v() -> None:
    arrays = CASE.arrays()
    other = np.random.default_rng(1).standard_normal(arrays["v"].shape).astype(np.float32)
    outs = [check(CASE, arrays | {"v": v})[0] for v in (arrays["v"], other, 2 * arrays["v"] - other)]
    np.testing.assert_allclose(outs[2], 2 * outs[0] - outs[1], rtol=1e-4, atol=1e-5)


def test_the_future_does_not_change_the_past() -> None:
    arrays = CASE.arrays()
    past, _ = check(CASE, arrays)
    arrays["k"][:, 70:], arrays["v"][:, 70:] = 100, -100
    future, _ = attend(CASE, arrays)
    np.testing.assert_array_equal(past[:, :55], future[:, :55])
    assert np.abs(past[:, 55:] - future[:, 55:]).max() > 1


def test_results_are_repeatable() -> None:
    first, second = (check(CASE)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 2.0, "alibi_ndim": 1}])
def test_nan_and_inf_spread_as_the_reference_has_it(name: str, value: float, options: dict[str, Any]) -> None:
    sizes = {"batch": 2, "seqlen_q": 20, "seqlen_k": 24, "num_heads_q": 4, "num_heads_k": 2}
    case = Case(**sizes, **options, sinks=name == "sinks", return_lse=True)
    arrays = case.arrays()
    arrays[name][(1,) if name == "sinks" else (1, 11, 1, 3)] = value
    out, _ = check(case, arrays)
    assert np.isfinite(out[0]).all() or name == "sinks"


def test_numbers_that_float32_does_not_hold() -> None:
    """Slopes and sinks of float64 beyond float32, and sums of products whose parts overflow while they do not."""
    case = Case(seqlen_q=20, seqlen_k=24, num_heads_q=2, num_heads_k=2, return_lse=True, causal=True)
    arrays = case.arrays()
    check(case, arrays | {"alibi_slopes": np.array([1e300, 1.0]), "sinks": np.array([0.0, -1e300])})
    out, lse = check(case, arrays | {"sinks": np.array([1e300, 0.0])})
    assert lse is not None and np.isposinf(lse[:, 0]).all() and not out[:, :, 0].any()
    for factor in (1e19, -1e19):  # terms of 1e38, which cancel
        wide = {name: arrays[name] * np.float32(1e-3) for name in "qk"}
        wide["q"][..., :8] = np.float32(1e19)
        wide["k"][..., :8] = np.float32(factor) * np.array([8, 8, 8, 8, -8, -8, -8, -8], np.float32)
        check(case, arrays | wide)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1.0, 2.0**60], ids=["usual", "careful"])
def test_terms_are_applied_in_the_order_given(dtype: str, size: float) -> None:
    """A softcap behind ALiBi caps both; q then is not divided by it."""
    case = Case(seqlen_q=20, seqlen_k=30, num_heads_q=2, num_heads_k=1, alibi_ndim=2, dtype=dtype)
    arrays = case.arrays()
    q, k, v, slopes = (arrays[name] for name in ("q", "k", "v", "alibi_slopes"))
    options = scoring(case, arrays)
    options["terms"] = [*options["terms"], (Softcap(), {"softcap": 1.5})]
    s = case.head_dim**-0.5 * np.einsum("bihd,bjd->bhij", q, k[:, :, 0], dtype=np.float64)
    s -= slopes[:, :, None, None] * np.abs(np.arange(20)[:, None] + 10 - np.arange(30))
    p = np.exp(1.5 * np.tanh(s / 1.5))
    out = np.empty_like(v, shape=(*q.shape[:3], v.shape[-1]))
    options["softmax_scale"] /= size
    _cpu.forward(q * q.dtype.type(size), k, v, out, None, **options)
    expected = np.einsum("bhij,bjd->bihd", p / p.sum(axis=-1, keepdims=True), v[:, :, 0])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_scores_far_apart() -> None:
    """Scores of thousands, in ascending and in descending order, so that the maximum moves in every block."""
    k = np.linspace(-3000, 3000, 1200, dtype=np.float32).reshape(1, -1, 1, 1)
    for keys in (k, k[:, ::-1]):
        arrays = {"q": np.ones((1, 3, 1, 1), np.float32), "k": keys, "v": np.cos(keys)}
        case = Case(seqlen_q=3, seqlen_k=1200, head_dim=1, head_dim_v=1, return_lse=True)
        out, _ = check(case, arrays)
        np.testing.assert_allclose(out, np.cos(3000), rtol=1e-2)


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        ({"seqlen_q": 4096, "seqlen_k": 4096, "num_heads_q": 8, "num_heads_k": 8}, "contiguous"),
        (
            {"seqlen_q": 4096, "seqlen_k": 4096, "num_heads_q": 8, "num_heads_k": 1, "alibi_ndim": 1},
            "strided",
        ),
        ({"seqlen_q": 32768, "seqlen_k": 32768, "causal": True}, "contiguous"),
        ({"seqlen_q": 1, "seqlen_k": 50_000, "num_heads_q": 8, "num_heads_k": 8}, "transposed"),
    ],
)
def test_memory_is_bounded(sizes: dict[str, Any], layout: str) -> None:
    options = {"head_dim": 64, "head_dim_v": 64, "layouts": (layout,) * 4, "return_lse": True}
    case = Case(**sizes, **options)
    arrays, out = case.arrays(), case.output()
    tracemalloc.start()
    try:
        attend(case, arrays, out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    assert np.isfinite(out[:, -1]).all() and np.abs(out[:, -1]).max() > 0
    rows = slice(-2, None)  # masks are aligned at the end, so the last rows are a problem of their own
    assert_close(out[:, rows], **arrays | {"q": arrays["q"][:, rows]}, **case.options)

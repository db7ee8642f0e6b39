"""Gradients of attention on NumPy arrays: against the reference's, and their promises about memory and about edges."""

from __future__ import annotations

import tracemalloc
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from sampling import examples
from test_cpu import ALL_DTYPES, BLOCKING, blockings, scoring

import cufa
from cufa import reference
from cufa._cpu import backward as _cpu_backward
from cufa._cpu import forward as _cpu
from cufa.testing import OFFSETS, Case, dense_cases, varlen_cases

SMOOTH = ("normal", "large rows")
"""Values of cases whose gradients change little where dout does; the others are tried with the noise of gradients."""


class Call(NamedTuple):
    """A case, run: its arrays with dout and dlse, and the gradients."""

    arrays: dict[str, Any]
    dout: np.ndarray
    dlse: np.ndarray
    gradients: tuple[np.ndarray, ...]


def differentiate(case: Case) -> Call:
    """Run a case forward and backward, dense or varlen, the way the public functions do."""
    arrays, rng = case.arrays(), np.random.default_rng(case.seed)
    out = case.output()
    varlen = "cu_seqlens_q" in arrays
    lse_shape = (out.shape[1], out.shape[0]) if varlen else (out.shape[0], out.shape[2], out.shape[1])
    lse = np.full(lse_shape, -np.inf, np.float64 if case.dtype == "float64" else np.float32)
    dout, dlse = rng.standard_normal(out.shape).astype(out.dtype), rng.standard_normal(lse_shape).astype(lse.dtype)
    options = scoring(case, arrays)
    qkv = arrays["q"], arrays["k"], arrays["v"]
    gradients = tuple(np.full(x.shape, np.nan, x.dtype) for x in qkv)
    dsinks = np.full(arrays["sinks"].shape, np.nan, lse.dtype) if "sinks" in arrays else None
    if varlen:
        offsets = arrays["cu_seqlens_q"], arrays["cu_seqlens_k"], arrays.get("seqused_k")
        out[...] = 0
        _cpu.varlen_forward(*qkv, *offsets, out, lse, **options)
        _cpu_backward.varlen_backward(dout, *qkv, *offsets, out, lse, dlse, *gradients, dsinks, **options)
    else:
        _cpu.forward(*qkv, out, lse, **options)
        _cpu_backward.backward(dout, *qkv, out, lse, dlse, *gradients, dsinks, **options)
    return Call(arrays, dout, dlse, gradients if dsinks is None else (*gradients, dsinks))


def check(case: Case) -> None:
    """Hold the gradients to the reference's, within a few times what a rounding of dout and out changes those.

    An error of out is one of delta, and so the same as one of dlse.
    """
    arrays, dout, dlse, gradients = differentiate(case)
    varlen = "cu_seqlens_q" in arrays
    backward = reference.attention_varlen_backward if varlen else reference.attention_backward
    expected = backward(dout, **arrays, dlse=dlse, **case.options)
    out = (reference.attention_varlen if varlen else reference.attention)(**arrays, **case.options)
    delta_size = np.sqrt(np.einsum("...d,...d->...", dout.astype(np.float64) ** 2, out**2)).swapaxes(-1, -2)
    compute = np.float64 if case.dtype == "float64" else np.float32
    unit = max(float(ml_dtypes.finfo(dout.dtype).eps), 64 * float(ml_dtypes.finfo(compute).eps))
    rng = np.random.default_rng(0)
    changes = [0.0] * len(expected)
    for _ in range(4):
        jittered = backward(
            dout * (1 + unit * rng.standard_normal(dout.shape)),
            **arrays,
            dlse=dlse + unit * delta_size * rng.standard_normal(dlse.shape),
            **case.options,
        )
        changes = [
            change + np.square(other - exact).sum() / 4
            for change, other, exact in zip(changes, jittered, expected, strict=True)
        ]
    for gradient, exact, change in zip(gradients, expected, changes, strict=True):
        own_unit = max(unit, float(ml_dtypes.finfo(gradient.dtype).eps))  # dsinks is float32 always
        error, size = np.linalg.norm((gradient - exact).ravel()), np.linalg.norm(exact.ravel())
        assert error <= 8 * np.sqrt(change) + own_unit * size + 1e-7 * own_unit * exact.size


@settings(max_examples=examples(200, 400))
@given(dense_cases(max_seqlen=80, dtypes=ALL_DTYPES, values=SMOOTH), blockings)
def test_dense_cases_agree_with_the_reference(case: Case, blocking: tuple[int, ...]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(BLOCKING, blocking, strict=True):
            patch.setattr(_cpu, name, value)
        check(case)


@settings(max_examples=examples(125, 250))
@given(varlen_cases(max_seqlen=65, dtypes=ALL_DTYPES, values=SMOOTH, offsets=OFFSETS), blockings)
def test_varlen_cases_agree_with_the_reference(case: Case, blocking: tuple[int, ...]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(BLOCKING, blocking, strict=True):
            patch.setattr(_cpu, name, value)
        check(case)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_sizes_beyond_a_block_agree_with_the_reference(dtype: str, causal: bool) -> None:
    sizes = {"seqlen_q": 700, "seqlen_k": 1100, "num_heads_q": 4, "num_heads_k": 2, "head_dim": 64}
    check(Case(**sizes, dtype=dtype, causal=causal))


@pytest.mark.parametrize("score", [1.0, 1e4, 1e6])
def test_gradients_of_float64_are_of_float64(score: float) -> None:
    """With scores in which float32 leaves little of a lse; one in float32 is taken, and does."""
    q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 60, 2, 16))
    q[..., 0], k[..., 0] = 4.0, score
    options: dict[str, Any] = {"causal": True, "sinks": np.array([0.5, -1.0])}
    out, lse = cufa.attention(q, k, v, return_lse=True, **options)
    assert out.dtype == lse.dtype == np.float64
    expected = reference.attention_backward(dout, q, k, v, **options)
    found = cufa.attention_backward(dout, q, k, v, out, lse, **options)
    for gradient, exact in zip(found, expected, strict=True):
        assert gradient.dtype == np.float64
        assert np.linalg.norm(gradient - exact) <= 1e-13 * (100 + score) * np.linalg.norm(exact)
    coarse = cufa.attention_backward(dout, q, k, v, out, lse.astype(np.float32), **options)
    error = np.linalg.norm(coarse[0] - expected[0]) / np.linalg.norm(expected[0])
    assert 1e-9 < error < 1e-6 + 1e-7 * score


def test_gradients_hold_no_score_matrix() -> None:
    q = np.random.default_rng(0).standard_normal((1, 4096, 2, 64), dtype=np.float32)
    out, lse, gradients = np.empty_like(q), np.empty((1, 2, 4096), np.float32), np.empty((3, *q.shape), np.float32)
    options: dict[str, Any] = {"softmax_scale": 0.125, "window_left": None, "window_right": 0, "terms": ()}
    options |= {"sinks": None}
    _cpu.forward(q, q, q, out, lse, **options)
    tracemalloc.start()
    _cpu_backward.backward(q, q, q, q, out, lse, None, *gradients, None, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20  # the matrix of one head takes 64 MB


def test_a_row_without_keys_gives_no_gradient() -> None:
    q, k, dout = (np.random.default_rng(seed).standard_normal((1, rows, 1, 8)) for seed, rows in enumerate((5, 3, 5)))
    out, lse = np.empty_like(q), np.empty((1, 1, 5))
    options: dict[str, Any] = {"softmax_scale": 1.0, "window_left": None, "window_right": 0, "terms": ()}
    options |= {"sinks": None}
    _cpu.forward(q, k, k, out, lse, **options)
    dout[:, :2] = np.nan  # rows 0 and 1 see no key
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(k)
    dlse = np.array([[[np.inf, np.nan, 0.0, 0.0, 0.0]]])
    _cpu_backward.backward(dout, q, k, k, out, lse, dlse, dq, dk, dv, None, **options)
    assert not dq[0, :2].any() and all(np.isfinite(gradient).all() for gradient in (dq, dk, dv))

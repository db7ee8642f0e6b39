"""The public gradients: what they return, and what they refuse before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gradients import Call
from hypothesis import given, settings
from hypothesis import strategies as st

import cufa
from cufa import reference
from cufa.testing import Case, dense_cases, varlen_cases

F64: dict[str, Any] = {"max_seqlen": 20, "head_dims": (1, 8), "dtypes": ("float64",)}
F64["values"] = ("normal", "large rows", "tiny")


def close(gradients: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    """float64 is computed in float64, lse included."""
    assert len(gradients) == len(expected)
    for gradient, exact in zip(gradients, expected, strict=True):
        scale = np.abs(exact).max(initial=0)
        assert gradient.dtype == np.float64
        np.testing.assert_allclose(gradient, exact, rtol=1e-9, atol=1e-10 * (1 + scale))


@settings(max_examples=60)
@given(dense_cases(**F64))
def test_dense_gradients(case: Case) -> None:
    arrays = case.arrays()
    out, lse = cufa.attention(**arrays, **case.options, return_lse=True)
    rng = np.random.default_rng(case.seed)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    found = cufa.attention_backward(dout, **arrays, out=out, lse=lse, dlse=dlse, **case.options)
    close(found, reference.attention_backward(dout, **arrays, dlse=dlse, **case.options))


@settings(max_examples=60)
@given(varlen_cases(**F64))
def test_packed_gradients(case: Case) -> None:
    arrays = case.arrays()
    out, lse = cufa.attention_varlen(**arrays, **case.options, return_lse=True)
    dout = np.random.default_rng(case.seed).standard_normal(out.shape)
    found = cufa.attention_varlen_backward(dout, **arrays, out=out, lse=lse, **case.options)
    close(found, reference.attention_varlen_backward(dout, **arrays, **case.options))


@pytest.fixture
def call() -> dict[str, Any]:
    """A call that is right."""
    rng = np.random.default_rng(0)
    q, dout = rng.standard_normal((2, 2, 5, 4, 8), dtype=np.float32)
    k, v = rng.standard_normal((2, 2, 7, 2, 8), dtype=np.float32)
    out, lse = cufa.attention(q, k, v, return_lse=True)
    return {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}


def test_gradients_are_written_where_asked(call: dict[str, Any]) -> None:
    into = {f"d{name}": np.empty_like(call[name]) for name in "qkv"}
    found = cufa.attention_backward(**call, **into)
    assert all(one is other for one, other in zip(found, into.values(), strict=True))
    again = cufa.attention_backward(**call, deterministic=True)
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))


def test_gradients_are_linear_in_dout(call: dict[str, Any]) -> None:
    once = cufa.attention_backward(**call)
    twice = cufa.attention_backward(**{**call, "dout": 2 * call["dout"]})
    for one, two in zip(once, twice, strict=True):
        np.testing.assert_allclose(2 * one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dout": np.zeros((2, 5, 4, 7), np.float32)}, ValueError, "dout has shape"),
        ({"dout": np.zeros((2, 5, 4, 8), np.float64)}, ValueError, "dout has dtype float64"),
        ({"out": np.zeros((2, 5, 2, 8), np.float32)}, ValueError, "out has shape"),
        ({"out": None}, TypeError, "out is None"),
        ({"lse": np.zeros((2, 5, 4), np.float32)}, ValueError, r"lse has shape \(2, 5, 4\); \(2, 4, 5\) is expected"),
        ({"lse": np.zeros((2, 4, 5))}, ValueError, "lse has dtype float64"),
        ({"lse": None}, TypeError, "lse is None"),
        ({"dlse": np.zeros((2, 4, 7), np.float32)}, ValueError, "dlse has shape"),
        ({"dk": np.zeros((2, 7, 4, 8), np.float32)}, ValueError, "dk has shape"),
        ({"dv": np.zeros((2, 7, 2, 8), np.float16)}, ValueError, "dv has dtype float16"),
        ({"deterministic": 1}, TypeError, "deterministic is a int"),
        ({"q": np.zeros((2, 5, 0, 8), np.float32)}, ValueError, "q has no heads but k has 2"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    call: dict[str, Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"attention_backward: {message}"):
        cufa.attention_backward(**{**call, **change})


@pytest.mark.parametrize(("result", "other"), [("dq", "dout"), ("dq", "q"), ("dk", "v"), ("dv", "dk")])
def test_results_that_overlap_are_refused(call: dict[str, Any], result: str, other: str) -> None:
    into = {"dk": np.zeros_like(call["k"])}
    shared = into[other] if other in into else call[other]
    before = {name: array.copy() for name, array in call.items()}
    with pytest.raises(ValueError, match=f"attention_backward: d[kv] overlaps|attention_backward: dq overlaps {other}"):
        cufa.attention_backward(**call, **{**into, result: shared})
    assert all(np.array_equal(call[name], before[name]) for name in call)


def test_a_read_only_result_is_refused(call: dict[str, Any]) -> None:
    dq = np.zeros_like(call["q"])
    dq.flags.writeable = False
    with pytest.raises(ValueError, match="dq is read-only"):
        cufa.attention_backward(**call, dq=dq)


# --- JAX --------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.one_of(*(cases(max_seqlen=33, layouts=("contiguous",)) for cases in (dense_cases, varlen_cases))))
def test_jax_gradients_equal_the_reference(case: Case) -> None:
    jnp = pytest.importorskip("jax.numpy")
    Call(case=case).right(jnp)


def test_jax_gradients_under_jit_and_vmap(call: dict[str, Any]) -> None:
    jax = pytest.importorskip("jax")
    expected = cufa.attention_backward(**call, causal=True)
    arrays = {name: jax.numpy.asarray(array) for name, array in call.items()}

    def differentiate(arrays: dict[str, Any]) -> Any:
        return cufa.attention_backward(**arrays, causal=True)

    mapped = jax.vmap(lambda each: differentiate({name: array[None] for name, array in each.items()}))
    for found in (jax.jit(differentiate)(arrays), [gradient[:, 0] for gradient in mapped(arrays)]):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_jax_refuses(call: dict[str, Any]) -> None:
    jax = pytest.importorskip("jax")
    arrays = {name: jax.numpy.asarray(array) for name, array in call.items()}
    with pytest.raises(cufa.UnsupportedError, match=r"^attention_backward: dk is not supported for JAX arrays"):
        cufa.attention_backward(**arrays, dk=arrays["k"])
    with pytest.raises(TypeError, match=r"^attention_backward: dout is a ndarray but q is a jax array"):
        cufa.attention_backward(**{**arrays, "dout": call["dout"]})
    with pytest.raises(ValueError, match=r"^attention_backward: lse has shape"):
        cufa.attention_backward(**{**arrays, "lse": arrays["lse"][:, :2]})
    with pytest.raises(cufa.UnsupportedError, match=r"^attention_backward: JAX asks for the derivative of a"):
        jax.grad(lambda q: cufa.attention_backward(**{**arrays, "q": q})[0].sum())(arrays["q"])

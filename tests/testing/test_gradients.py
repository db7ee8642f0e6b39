"""The yardstick of gradients accepts what is right and rejects what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradients
import numpy as np
import pytest
from gradients import Call
from hypothesis import given, settings
from hypothesis import strategies as st

from cufa import reference
from cufa.reference import Precision
from cufa.testing import DTYPES, Case, _compare, _gradients, assert_gradients_close, dense_cases, varlen_cases

Gradients = tuple[np.ndarray, ...]


def rounded(arrays: dict[str, Any], options: Any) -> Gradients:
    """What a perfect implementation gives: float32 mathematics, rounded to the inputs' dtype where one must."""
    found = reference._differentiate(**arrays, **options, precision=Precision(np.float32, arrays["q"].dtype))
    return found[: 4 if arrays.get("sinks") is not None else 3]


def arrays_of(case: Case) -> dict[str, Any]:
    """What the reference takes."""
    arrays = Call(case=case).arrays()
    del arrays["out"], arrays["lse"]
    return arrays


@settings(max_examples=100)
@given(dense_cases(max_seqlen=80, values=gradients.VALUES))
def test_rounded_mathematics_is_accepted(case: Case) -> None:
    arrays = arrays_of(case)
    assert_gradients_close(rounded(arrays, case.options), **arrays, **case.options)


@settings(max_examples=60)
@given(varlen_cases(max_seqlen=65, values=gradients.VALUES, offsets=("exact", "zeros", "totals", "short")))
def test_gradients_of_packed_numpy_arrays_are_accepted(case: Case) -> None:
    call = Call(case=case, results=("padded", "offset", "contiguous"))
    call.check(call.run())


SIZES: dict[str, Any] = {"seqlen_q": 90, "seqlen_k": 120, "num_heads_q": 4, "num_heads_k": 2}
SIZES |= {"head_dim": 64, "head_dim_v": 64}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 5.0}], ids=["none", "causal", "softcap"])
def test_the_noise_is_the_error_of_rounded_mathematics(dtype: str, options: dict[str, Any]) -> None:
    arrays = arrays_of(Case(**SIZES, dtype=dtype))
    expected = _gradients.expect(**arrays, **options)
    for found, exact, noise in zip(rounded(arrays, options), *expected, strict=False):
        ratio = np.sqrt(np.mean((found - exact)[noise > 0] ** 2 / noise[noise > 0] ** 2))
        # Three tf32 products are not as exact as one in float32.
        assert (0.01 if dtype == "float32" else 0.4) < ratio < 1.1


def gated(s: Any, batch: Any, head: Any, query: Any, key: Any, gate: Any) -> Any:
    return s * gate[head, key // 60]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("axes", ["xxxx", "1xx1"])
def test_the_noise_of_terms_tells_two_per_cent(dtype: str, axes: str) -> None:
    """Of a rounded out and of rounded probabilities; gradients that are two per cent off, or 0, are far beyond it."""
    case = Case(**SIZES | {"seqlen_q": 60}, dtype=dtype, bias=axes, rel_bias=20, causal=True)
    gate = np.random.default_rng(0).uniform(0.5, 2, (4, 2)).astype(np.float32)
    arrays = arrays_of(case) | {"score": (gated, gate)}
    given = {name: x for name, x in arrays.items() if name not in ("score", "bias", "rel_bias")}
    terms = reference.terms_of(*(arrays[name] for name in ("score", "bias", "rel_bias")))
    precision = Precision(np.float32, arrays["q"].dtype)
    dq, dk, dv, _, *found = reference._differentiate(**given, **case.options, terms=terms, precision=precision)
    exact, noise = _gradients.expect(**arrays, **case.options)
    assert_gradients_close([dq, dk, dv, *found], **arrays, **case.options)
    for name, one, *beside in zip(("dscore 0", "dbias", "drel_bias"), found, exact[4:], noise[4:], strict=True):
        right, error = (x[beside[1] > 0] for x in beside)
        assert 0.15 < np.sqrt(np.mean((one[beside[1] > 0] - right) ** 2 / error**2)) < 1.1
        for factor in (0.0, 1.02)[: 1 if (name, dtype) == ("dscore 0", "bfloat16") else 2]:  # a sum that cancels
            wrong = _gradients.gradient_complaint(name, factor * one, *beside)
            assert wrong is not None and wrong.startswith(f"{name} differs")


def test_query_heads_that_are_the_same_err_as_one() -> None:
    case = Case(**SIZES | {"num_heads_q": 32}, dtype="bfloat16", layouts=("broadcast", *["contiguous"] * 3))
    arrays = Call(case=case, dlse=False, dout="broadcast").arrays() | {"dlse": None}
    del arrays["out"], arrays["lse"]
    for found, exact, noise in zip(rounded(arrays, {}), *_gradients.expect(**arrays), strict=False):
        assert 0.4 < np.sqrt(np.mean((found - exact) ** 2 / noise**2)) < 1.1


def test_weights_rounded_in_step_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """1/510 is about the middle between two numbers of bfloat16: scores as small as these decide on the rounding."""
    arrays = arrays_of(Case(seqlen_q=3, seqlen_k=510, head_dim=1, head_dim_v=1, dtype="bfloat16"))
    arrays["dlse"] = np.ones_like(arrays["dlse"])
    q, k, v, dout = (arrays[name].astype(np.float64).swapaxes(1, 2) for name in ("q", "k", "v", "dout"))
    scale = 1e-3
    p = np.exp(scale * q @ k.swapaxes(2, 3))
    p /= p.sum(axis=-1, keepdims=True)
    delta = (dout * (p @ v)).sum(axis=-1, keepdims=True) - 1
    ds = p.astype(arrays["q"].dtype).astype(np.float64) * (dout @ v.swapaxes(2, 3) - delta)
    dq = scale * (ds @ k).swapaxes(1, 2)
    _, *others = rounded(arrays, {"softmax_scale": scale})
    assert_gradients_close((dq, *others), **arrays, softmax_scale=scale)
    monkeypatch.setattr(_gradients, "in_step", lambda *_: 0)
    with pytest.raises(AssertionError, match="dq differs"):
        assert_gradients_close((dq, *others), **arrays, softmax_scale=scale)


Mistake = Callable[[dict[str, Any], Any], Gradients]
PLAIN: dict[str, Any] = {}
CAUSAL = {"causal": True}
WINDOW = {"window_size": (50, 20)}


def with_options(**wrong: Any) -> Mistake:
    return lambda arrays, options: rounded(arrays, {**options, **wrong})


def with_arrays(**wrong: Any) -> Mistake:
    return lambda arrays, options: rounded({**arrays, **wrong}, options)


def with_change(change: Callable[[Gradients], Any]) -> Mistake:
    def mistake(arrays: dict[str, Any], options: Any) -> Gradients:
        found = tuple(np.array(each) for each in rounded(arrays, options))
        change(found)
        return found

    return mistake


def one_head_forgotten(arrays: dict[str, Any], options: Any) -> Gradients:
    """Of those that share a key head."""
    dout, dlse = arrays["dout"].copy(), arrays["dlse"].copy()
    dout[:, :, 1], dlse[:, 1] = 0, 0
    dq = rounded(arrays, options)[0]
    return dq, *rounded({**arrays, "dout": dout, "dlse": dlse}, options)[1:]


MISTAKES: dict[str, tuple[dict[str, Any], Any, Mistake]] = {
    "dq is zero": ({}, PLAIN, with_change(lambda found: found[0].fill(0))),
    "dk is zero": ({}, PLAIN, with_change(lambda found: found[1].fill(0))),
    "dv is zero": ({}, PLAIN, with_change(lambda found: found[2].fill(0))),
    "dsinks is zero": ({"sinks": True}, PLAIN, with_change(lambda found: found[3].fill(0))),
    "causal forgotten": ({}, CAUSAL, with_options(causal=False)),
    "causal one too far": ({}, CAUSAL, with_options(causal=False, window_size=(None, 1))),
    "causal one too short": ({}, CAUSAL, with_options(causal=False, window_size=(1000, -2))),
    "window one too far left": ({}, WINDOW, with_options(window_size=(51, 20))),
    "window one too short right": ({}, WINDOW, with_options(window_size=(50, 19))),
    "scale of dq two per cent off": ({}, PLAIN, with_change(lambda found: np.multiply(found[0], 1.02, out=found[0]))),
    "scale of dk forgotten": ({}, PLAIN, with_change(lambda found: np.multiply(found[1], 8, out=found[1]))),
    "softcap forgotten": ({}, {"softcap": 5.0}, with_options(softcap=0.0)),
    "slopes forgotten": ({"alibi_ndim": 1}, PLAIN, with_arrays(alibi_slopes=None)),
    "dlse forgotten": ({}, PLAIN, with_arrays(dlse=None)),
    "heads swapped": ({}, PLAIN, with_change(lambda found: found[1].__setitem__(..., found[1][:, :, ::-1].copy()))),
    "a head forgotten": ({}, PLAIN, one_head_forgotten),
    "the last row forgotten": ({}, CAUSAL, with_change(lambda found: found[0][0, -1, 1].fill(0))),
    "the last key forgotten": ({}, CAUSAL, with_change(lambda found: found[1][0, -1, 1].fill(0))),
    "one element": ({}, CAUSAL, with_change(lambda found: found[2][0, 70, 1].__setitem__(5, 0))),
    "a row that sees nothing": ({"seqlen_q": 121}, CAUSAL, with_change(lambda found: found[0][0, 0].fill(1e-4))),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_rejected(name: str) -> None:
    changed, options, mistake = MISTAKES[name]
    arrays = arrays_of(Case(**SIZES | changed, dtype="bfloat16"))  # whose noise is the loudest
    assert_gradients_close(rounded(arrays, options), **arrays, **options)
    with pytest.raises(AssertionError, match="differs from the float64 reference"):
        assert_gradients_close(mistake(arrays, options), **arrays, **options)


# --- what it is given -------------------------------------------------------------------------------


def small(**changed: Any) -> tuple[dict[str, Any], Gradients]:
    """Arrays of a case, and gradients that are right."""
    sizes = {"seqlen_q": 5, "seqlen_k": 7, "num_heads_q": 4, "num_heads_k": 2, "head_dim": 8, "head_dim_v": 6}
    arrays = arrays_of(Case(**sizes | changed))
    return arrays, rounded(arrays, {})


def test_a_gradient_that_is_not_given_is_not_checked() -> None:
    arrays, (dq, dk, dv, dsinks) = small(sinks=True)
    assert_gradients_close([dq, dk, dv, dsinks], **arrays)
    wrong = dk + 1
    with pytest.raises(AssertionError, match=r"^dk differs"):
        assert_gradients_close((dq, wrong, dv, dsinks), **arrays)
    assert_gradients_close((dq, None, dv, None), **arrays)
    with pytest.raises(AssertionError, match=r"^dsinks differs"):
        assert_gradients_close((None, None, None, dsinks + 1), **arrays)
    with pytest.raises(ValueError, match=r"^found holds nothing to check: every result is None\.$"):
        assert_gradients_close((None,) * 4, **arrays)


def test_results_of_another_number_or_kind_are_refused() -> None:
    arrays, (dq, dk, dv) = small()
    with pytest.raises(TypeError, match=r"^found is a ndarray; pass a tuple, as attention_backward returns it\.$"):
        assert_gradients_close(dq, **arrays)
    with pytest.raises(ValueError, match=r"^found has 2 results; without sinks there are 3: dq, dk, dv\.$"):
        assert_gradients_close((dq, dk), **arrays)
    with pytest.raises(ValueError, match=r"^found has 3 results; with sinks there are 4: dq, dk, dv, dsinks\.$"):
        assert_gradients_close((dq, dk, dv), **arrays, sinks=np.zeros(4, np.float32))
    with pytest.raises(AssertionError) as caught:
        assert_gradients_close((dq[:, 1:], dk.astype(np.int32), dv), **arrays)
    assert str(caught.value) == (
        "dq has the shape (1, 4, 4, 8), expected (1, 5, 4, 8).\ndk has the dtype int32, expected one of floating point."
    )


def test_the_message_names_the_worst_element_and_no_row() -> None:
    arrays, (dq, dk, dv) = small()
    dv = dv.copy()
    dv[0, 3, 1, 2] += 1
    with pytest.raises(AssertionError) as caught:
        assert_gradients_close((dq, dk, dv), **arrays)
    first, second = str(caught.value).splitlines()
    assert first.startswith("dv differs from the float64 reference in 1 of 84 elements, and by ")
    assert second.startswith("  worst element dv[0, 3, 1, 2]: got ")


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dout of another shape": (
        {"dout": np.zeros((1, 5, 4, 8))},
        ValueError,
        r"dout has shape \(1, 5, 4, 8\); \(1, 5, 4, 6\) is expected",
    ),
    "no dout": ({"dout": None}, TypeError, "dout is None"),
    "dlse as out is laid out": (
        {"dlse": np.zeros((1, 5, 4))},
        ValueError,
        r"dlse has shape \(1, 5, 4\); \(1, 4, 5\) is expected",
    ),
    "dlse of strings": ({"dlse": np.full((1, 4, 5), "0")}, ValueError, "dlse has dtype str"),
    "k of another width": ({"k": np.zeros((1, 7, 2, 9))}, ValueError, "k has head_dim 9 but q has 8"),
    "an option of the call": ({"deterministic": True}, TypeError, "deterministic is no option of the reference"),
    "a result of the forward": ({"lse": np.zeros((1, 4, 5))}, TypeError, "lse is no option of the reference"),
    "a window of numbers": ({"window_size": 3}, TypeError, "window_size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_belong_together_are_refused(name: str) -> None:
    arrays, found = small()
    changed, error, message = WRONG[name]
    with pytest.raises(error, match=f"^attention_backward: {message}"):
        assert_gradients_close(found, **arrays | changed)


def test_arguments_of_packed_sequences_are_checked() -> None:
    sizes = {"num_heads_q": 4, "num_heads_k": 2, "head_dim": 8, "head_dim_v": 6}
    arrays = arrays_of(Case(batch=2, seqlen_q=(3, 2), seqlen_k=(4, 5), **sizes))
    found = None, None, np.zeros((9, 2, 6))
    with pytest.raises(ValueError, match=r"^cu_seqlens_q and cu_seqlens_k belong together"):
        assert_gradients_close(found, **arrays | {"cu_seqlens_k": None})
    with pytest.raises(TypeError, match=r"^attention_varlen_backward: dout is None"):
        assert_gradients_close(found, **arrays | {"dout": None})
    with pytest.raises(ValueError, match=r"^attention_varlen_backward: dout has shape"):
        assert_gradients_close(found, **arrays | {"dout": arrays["dout"][1:]})


def test_arrays_of_other_frameworks_are_compared() -> None:
    jnp = pytest.importorskip("jax.numpy")
    arrays, found = small(dtype="bfloat16", sinks=True)
    given = {name: jnp.asarray(array) for name, array in arrays.items()}
    assert_gradients_close([jnp.asarray(each) for each in found], **given)
    with pytest.raises(AssertionError, match=r"^dq differs"):
        assert_gradients_close((2 * jnp.asarray(found[0]), None, None, None), **given)


def test_the_dtype_says_what_is_rounded() -> None:
    arrays, found = small()
    coarse = tuple(each.astype(np.float16) for each in found)
    assert_gradients_close(coarse, **arrays, dtype=np.float16)
    with pytest.raises(AssertionError, match=r"^dq differs"):
        assert_gradients_close(coarse, **arrays)


@settings(max_examples=40)
@given(case=st.one_of(dense_cases(max_seqlen=17), varlen_cases(max_seqlen=17)))
def test_cutting_a_problem_into_pieces_changes_nothing(case: Case) -> None:
    arrays = arrays_of(case)
    whole = _gradients.expect(**arrays, **case.options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compare, "PIECE", 1)
        pieces = _gradients.expect(**arrays, **case.options)
    for left, right in zip((*pieces.exact, *pieces.noise), (*whole.exact, *whole.noise), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-14)

"""Merging states of attention on the CPU: the specification, and what it is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from states import NAMES, Call, calls

import cufa
from cufa import reference
from cufa.testing import Case, assert_close, assert_gradients_close, dense_cases

ALL_DTYPES = ("float16", "bfloat16", "float32", "float64")


@settings(max_examples=150)
@given(call=calls(ALL_DTYPES, layouts=("contiguous", "transposed", "padded", "strided", "reversed")))
def test_merged_states_equal_reference(call: Call) -> None:
    call.check_merged(*call.merged())


@settings(max_examples=150)
@given(call=calls(ALL_DTYPES, layouts=("contiguous", "transposed", "padded", "strided", "reversed")))
def test_gradients_equal_reference(call: Call) -> None:
    call.check_gradients(call.gradients())


def parts_of(case: Case, bounds: list[int]) -> list[tuple[Any, Any]]:
    """The states of a case's keys between bounds."""
    arrays = case.arrays()
    return [
        cufa.attention(arrays["q"], arrays["k"][:, begin:end], arrays["v"][:, begin:end], return_lse=True)
        for begin, end in zip([0, *bounds], [*bounds, case.seqlen_k], strict=True)
    ]


@settings(max_examples=60)
@given(
    case=dense_cases(max_seqlen=60, dtypes=("float32", "float64"), values=("normal",)),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_states_of_parts_of_the_keys_are_attention_over_all(case: Case, cuts: list[int]) -> None:
    plain = Case(**{name: getattr(case, name) for name in SIZES})
    parts = parts_of(plain, sorted(min(cut, case.seqlen_k) for cut in cuts))
    out, lse = (np.stack(each) for each in zip(*parts, strict=True))
    out, lse = cufa.merge_states(out, lse)
    assert_close(out, lse=lse, **plain.arrays())


SIZES = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_k", "head_dim", "head_dim_v", "dtype", "seed")


@settings(max_examples=60)
@given(call=calls(("float64",), values=("normal", "apart")))
def test_order_and_grouping_matter_by_rounding_alone(call: Call) -> None:
    call = Call(shape=call.shape, states=3, dtype="float64", values=call.values, seed=call.seed)
    (a, b, c), (x, y, z) = (call.host()[name] for name in ("out_a", "lse_a"))
    left = cufa.merge_states(*cufa.merge_states(a, x, b, y), c, z)
    right = cufa.merge_states(a, x, *cufa.merge_states(b, y, c, z))
    other = cufa.merge_states(np.stack([c, a, b]), np.stack([z, x, y]))
    for found in (right, other):
        for one, another in zip(left, found, strict=True):
            np.testing.assert_allclose(one, another, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_row_depends_on_its_own_states_alone(dtype: str) -> None:
    call = Call(shape=(3, 9, 4, 20), states=5, dtype=dtype, values="apart")
    (out, lse), host = call.merged(), call.host()
    one = cufa.merge_states(host["out_a"][:, 1:2, 4:5, 2:3], host["lse_a"][:, 1:2, 2:3, 4:5])
    assert (one[0] == out[1:2, 4:5, 2:3]).all() and (one[1] == lse[1:2, 2:3, 4:5]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_single_state_with_keys_is_kept_as_it_is(dtype: str) -> None:
    call = Call(shape=(2, 9, 4, 20), dtype=dtype)
    out, lse, nothing = *(call.host()[name] for name in ("out_a", "lse_a")), np.full((2, 4, 9), -np.inf, np.float32)
    garbage = np.full_like(out, np.nan)
    for found in (cufa.merge_states(out, lse, garbage, nothing), cufa.merge_states(garbage, nothing, out, lse)):
        assert found[0].tobytes() == out.tobytes() and (found[1] == lse).all()
    assert cufa.merge_states(garbage, nothing, garbage, nothing)[0].tobytes() == np.zeros_like(out).tobytes()


def test_gradients_reach_through_to_the_keys() -> None:
    """The gradients of attention over parts, behind those of merging, are those of attention over all keys."""
    case = Case(batch=2, seqlen_q=7, seqlen_k=20, num_heads_q=4, num_heads_k=2, head_dim=24, dtype="float64")
    arrays, rng = case.arrays(), np.random.default_rng(3)
    q, k, v = (arrays[name] for name in "qkv")
    parts = parts_of(case, [13])
    out, lse = cufa.merge_states(*parts[0], *parts[1])
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    found = cufa.merge_states_backward(dout, *parts[0], *parts[1], dlse=dlse)
    keys = slice(13), slice(13, 20)
    each = [
        cufa.attention_backward(found[2 * i], q, k[:, keys[i]], v[:, keys[i]], *parts[i], dlse=found[2 * i + 1])
        for i in range(2)
    ]
    dq = each[0][0] + each[1][0]
    dk, dv = (np.concatenate([each[0][i], each[1][i]], axis=1) for i in (1, 2))
    assert_gradients_close((dq, dk, dv), dout, q, k, v, dlse=dlse)


def test_the_reference_is_differentiated_by_differences() -> None:
    host = Call(shape=(3, 2, 4), states=3, values="normal", dtype="float64").host()
    arrays, dout, dlse = [host["out_a"], host["lse_a"]], host["dout"], host["dlse"]

    def value() -> float:
        out, lse = reference.merge_states(*arrays)
        return float((out * dout).sum() + (lse * dlse).sum())

    for array, gradient in zip(arrays, reference.merge_states_backward(dout, *arrays, dlse=dlse), strict=True):
        for index in list(np.ndindex(array.shape))[::7]:
            before = array[index]
            sides = []
            for step in (1e-6, -1e-6):
                array[index] = before + step
                sides.append(value())
            array[index] = before
            assert abs((sides[0] - sides[1]) / 2e-6 - gradient[index]) < 1e-7


GIVEN = Call(shape=(2, 9, 4, 20)).host()
WRONG: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"lse_b": None}, TypeError, "lse_b is None, but out_b is given; pass both, or neither"),
    ({"out_b": None}, TypeError, "out_b is None, but lse_b is given"),
    ({"lse_a": None}, TypeError, "lse_a is None; pass an array"),
    ({"out_a": None}, TypeError, "out_a is a NoneType, not an array"),
    ({"out_b": GIVEN["out_b"][:1]}, ValueError, r"out_b has shape \(1, 9, 4, 20\); \(2, 9, 4, 20\) is expected"),
    ({"lse_a": GIVEN["lse_a"][0]}, ValueError, r"lse_a has shape \(4, 9\); \(2, 4, 9\) is expected"),
    ({"lse_b": GIVEN["lse_b"].astype(np.float64)}, ValueError, "lse_b has dtype float64; pass float32"),
    ({"out_b": GIVEN["out_b"].astype(np.float16)}, ValueError, "out_b has dtype float16 but out_a has float32"),
    ({"out_a": GIVEN["out_a"].astype(np.int32)}, ValueError, "out_a has dtype int32"),
    ({"out_a": GIVEN["out_a"][0, 0]}, ValueError, r"out_a has shape \(4, 20\); \(batch, seqlen_q"),
    ({"out_b": None, "lse_b": None, "lse_a": GIVEN["lse_a"][:1]}, ValueError, "lse_a has shape"),
    (
        {"out_a": np.stack([GIVEN["out_a"]] * 3)},
        ValueError,
        r"lse_a has shape \(2, 4, 9\); \(3, 2, 4, 9\) is expected",
    ),
    (
        {"out_a": np.stack([GIVEN["out_a"][:1]] * 3)},
        ValueError,
        r"out_a has shape \(3, 1, 9, 4, 20\); \(3, 2, 9, 4, 20\) is expected",
    ),
    ({"out": GIVEN["out_a"]}, ValueError, "out overlaps out_a"),
    ({"out": np.empty((2, 9, 4, 21), np.float32)}, ValueError, "out has shape"),
    ({"out": np.empty((2, 9, 4, 20))}, ValueError, "out has dtype float64 but out_a has float32"),
)


@pytest.mark.parametrize(("changed", "kind", "message"), WRONG, ids=[each[2][:30] for each in WRONG])
def test_what_is_wrong_is_said(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    arrays = {name: GIVEN[name] for name in NAMES} | changed
    with pytest.raises(kind, match=rf"^merge_states: {message}"):
        cufa.merge_states(**arrays)


def test_what_is_wrong_with_gradients_is_said() -> None:
    with pytest.raises(TypeError, match=r"^merge_states_backward: dout is None"):
        cufa.merge_states_backward(None, *(GIVEN[name] for name in NAMES))
    with pytest.raises(ValueError, match=r"^merge_states_backward: dout has shape \(9, 4, 20\); \(2, 9, 4, 20\) is"):
        cufa.merge_states_backward(GIVEN["dout"][0], *(GIVEN[name] for name in NAMES))
    with pytest.raises(cufa.UnsupportedError, match="head_dim 257 is not supported"):
        cufa.merge_states(np.zeros((1, 2, 3, 257), np.float32), np.zeros((1, 3, 2), np.float32), *[None] * 2)

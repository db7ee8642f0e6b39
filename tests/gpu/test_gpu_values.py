"""Values that users meet and normal distributions do not draw: huge, tiny, constant, infinite, garbage behind masks.

The same code runs on the CPU with NumPy and on a GPU with CuPy, so that the tests themselves are tried everywhere.
"""

from __future__ import annotations

from typing import Any

import gradients
import ml_dtypes
import numpy as np
import pytest
from gradients import Call
from hypothesis import given, settings
from hypothesis import strategies as st

import cufa
from cufa.testing import DTYPES, OFFSETS, VALUES, Case, assert_close, assert_gradients_close, to_numpy

FRAMEWORKS = [pytest.param("numpy"), pytest.param("cupy", marks=pytest.mark.gpu)]
everywhere = pytest.mark.parametrize("name", FRAMEWORKS)
MASKS: dict[str, dict[str, Any]] = {"none": {}, "causal": {"causal": True}, "window": {"window_size": (70, 9)}}
of_every_mask = pytest.mark.parametrize("mask", MASKS)
of_every_dtype = pytest.mark.parametrize("dtype", DTYPES)
of_every_head_dim = pytest.mark.parametrize("head_dim", [64, 128])
LENGTHS = (1, 7, 64, 100, 129, 200)


def framework(name: str) -> Any:
    return pytest.importorskip(name)


HEADS = ((1, 1), (4, 2), (2, 1))

SHORT = 64
"""Sequences of no more rows have tiles, and so kernels, of their own."""


def chosen(dtype: str, head_dim: int, mask: str) -> tuple[tuple[int, int], bool, bool]:
    """Heads, whether sequences are short, and whether gradients are deterministic, which all make other kernels.

    One of each kind for a dtype, a head_dim and a mask: each dtype has all heads in short and in long sequences.
    """
    i, j, k = DTYPES.index(dtype), head_dim // 64 - 1, [*MASKS].index(mask)
    return HEADS[(i + k) % 3], bool((i + j) % 2), bool((i + j + k) % 2)


@st.composite
def cases(draw: st.DrawFn, dtype: str, head_dim: int, mask: str, values: tuple[str, ...], wild: bool) -> Case:
    """Dense and packed problems of few kernels; `wild` offsets are such as the CPU refuses."""
    (heads_q, heads_k), short, _ = chosen(dtype, head_dim, mask)
    lengths_q = [n for n in LENGTHS if (n <= SHORT) == short]
    length, rows, packed = st.sampled_from(LENGTHS), st.sampled_from(lengths_q), draw(st.booleans())
    sizes: dict[str, Any] = {"batch": draw(st.sampled_from((1, 2)))}
    if packed:
        lengths_of = [st.tuples(*[each] * sizes["batch"]) for each in (rows, length)]
        sizes |= dict(zip(("seqlen_q", "seqlen_k"), map(draw, lengths_of), strict=True))
        sizes["offsets"] = draw(st.sampled_from([each for each in OFFSETS if wild or each != "wild"]))
        if draw(st.booleans()):
            sizes["seqused_k"] = tuple(max(n - draw(st.sampled_from((0, 1, 64))), 0) for n in sizes["seqlen_k"])
    else:  # of a single query a causal mask removes nothing, which makes another kernel
        rows = rows.filter(lambda n: n > 1 or mask != "causal")
        sizes |= {"seqlen_q": draw(rows), "seqlen_k": draw(length)}
    return Case(
        **sizes,
        **MASKS[mask],
        num_heads_q=heads_q,
        num_heads_k=heads_k,
        head_dim=head_dim,
        head_dim_v=head_dim,
        dtype=dtype,
        return_lse=True,
        values=draw(st.sampled_from(values)),
        seed=draw(st.integers(0, 99)),
    )


def attend(case: Case, xp: Any) -> tuple[Any, Any]:
    function = cufa.attention_varlen if isinstance(case.seqlen_q, tuple) else cufa.attention
    found: tuple[Any, Any] = function(**case.arrays(xp), **case.options, return_lse=True)
    return found


@everywhere
@of_every_dtype
@of_every_head_dim
@of_every_mask
def test_any_values_and_offsets(name: str, dtype: str, head_dim: int, mask: str) -> None:
    xp = framework(name)

    @settings(max_examples=4 if name == "numpy" else 20)
    @given(cases(dtype, head_dim, mask, VALUES, wild=name != "numpy"))
    def check(case: Case) -> None:
        out, lse = attend(case, xp)
        assert_close(out, lse=lse, **case.arrays(), **case.options)
        if isinstance(case.seqlen_q, tuple):
            assert not to_numpy(out)[case.counts("q") < 0].astype(np.float32).any()

    check()


@everywhere
@of_every_dtype
@of_every_head_dim
@of_every_mask
def test_gradients_of_any_values(name: str, dtype: str, head_dim: int, mask: str) -> None:
    xp = framework(name)

    *_, deterministic = chosen(dtype, head_dim, mask)

    @settings(max_examples=3 if name == "numpy" else 12)
    @given(cases(dtype, head_dim, mask, gradients.VALUES, wild=name != "numpy"), st.booleans())
    def check(case: Case, dlse: bool) -> None:
        Call(case=case, dlse=dlse, deterministic=deterministic).right(xp)

    check()


def filled(case: Case, xp: Any, value: float) -> dict[str, Any]:
    """q, k and v that hold `value` everywhere."""
    return {
        name: xp.asarray(np.full(case.view(name).shape, value, getattr(ml_dtypes, case.dtype, case.dtype)))
        for name in "qkv"
    }


@everywhere
@of_every_mask
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [("bfloat16", 133120.0), ("float16", 6e4), ("float32", 133120.0), ("bfloat16", 2.0**58), ("float32", 1.1e17)],
)
def test_the_mean_of_one_number_is_that_number(name: str, dtype: str, value: float, head_dim: int, mask: str) -> None:
    xp = framework(name)
    case = Case(seqlen_q=200, seqlen_k=300, dtype=dtype, head_dim=head_dim, head_dim_v=head_dim)
    arrays = filled(case, xp, value)
    out, lse = cufa.attention(**arrays, **MASKS[mask], return_lse=True)
    unit = 2e-5 if dtype == "float32" else 0
    np.testing.assert_allclose(to_numpy(out).astype(np.float64), float(to_numpy(arrays["v"]).flat[0]), rtol=unit)
    product = float(to_numpy(arrays["q"]).flat[0]) ** 2 * head_dim**0.5
    np.testing.assert_allclose(to_numpy(lse), product, rtol=1e-5)


@everywhere
@of_every_dtype
@of_every_mask
@pytest.mark.parametrize(("batch", "rows"), [(1, 150), (100, 1)], ids=["rows", "row"])
def test_the_mean_of_the_largest_number_is_finite(name: str, dtype: str, mask: str, batch: int, rows: int) -> None:
    """Although probabilities are rounded. Of one row there is no other that tells; and gradients are finite, too."""
    xp = framework(name)
    case = Case(batch=batch, seqlen_q=rows, seqlen_k=300, dtype=dtype, head_dim=64, head_dim_v=64, **MASKS[mask])
    arrays = case.arrays()
    for sign in (1, -1):
        arrays["v"][...] = sign * ml_dtypes.finfo(arrays["v"].dtype).max
        given = {each: xp.asarray(x) for each, x in arrays.items()}
        out, lse = cufa.attention(**given, **MASKS[mask], return_lse=True)
        expected = arrays["v"][:, :rows].astype(np.float64)
        np.testing.assert_allclose(to_numpy(out).astype(np.float64), expected, rtol=2e-6)
        dout = xp.asarray(np.full(expected.shape, 2.0**-10).astype(arrays["v"].dtype))
        found = cufa.attention_backward(dout, **given, out=out, lse=lse, **MASKS[mask])
        assert all(np.isfinite(to_numpy(each).astype(np.float64)).all() for each in found)


POISONS = (np.nan, np.inf, -np.inf, "largest", "smallest")


@everywhere
@of_every_dtype
@pytest.mark.parametrize("poison", POISONS)
def test_what_a_row_does_not_see_does_not_count(name: str, dtype: str, poison: Any) -> None:
    """Neither in out and lse nor in the gradients, whatever lies there; but it may be rounded at other moments."""
    xp = framework(name)
    case = Case(seqlen_q=200, seqlen_k=200, num_heads_q=2, num_heads_k=2, dtype=dtype, head_dim=64, head_dim_v=64)
    host = case.arrays()
    largest = ml_dtypes.finfo(host["q"].dtype).max
    value = {"largest": largest, "smallest": -largest}.get(poison, poison)
    dout = np.random.default_rng(9).standard_normal(host["q"].shape).astype(host["q"].dtype)

    def run(**changed: np.ndarray) -> list[np.ndarray]:
        q, k, v, d = (xp.asarray(changed.get(each, x)) for each, x in (*host.items(), ("dout", dout)))
        out, lse = cufa.attention(q, k, v, causal=True, return_lse=True)
        found = cufa.attention_backward(d, q, k, v, out, lse, causal=True, deterministic=True)
        return [to_numpy(each).astype(np.float64) for each in (out, lse, *found)]

    def same(some: np.ndarray, other: np.ndarray) -> None:
        unit = max(4 * float(ml_dtypes.finfo(dtype).eps), 1e-5)
        np.testing.assert_allclose(some, other, rtol=unit, atol=unit)

    def spoiled(x: np.ndarray, rows: slice) -> np.ndarray:
        x = x.copy()
        x[:, rows] = value
        return x

    clean, last, first = run(), slice(150, 200), slice(0, 50)
    out, lse, dq, _, _ = run(k=spoiled(host["k"], last), v=spoiled(host["v"], last))
    same(out[:, :150], clean[0][:, :150])
    same(lse[..., :150], clean[1][..., :150])
    same(dq[:, :150], clean[2][:, :150])
    _, _, dq, dk, dv = run(q=spoiled(host["q"], first), dout=spoiled(dout, first))
    same(dq[:, 50:], clean[2][:, 50:])
    same(dk[:, 50:], clean[3][:, 50:])
    same(dv[:, 50:], clean[4][:, 50:])


@everywhere
@of_every_dtype
def test_scores_of_minus_infinity_are_of_no_key(name: str, dtype: str) -> None:
    """Not even where all are: such a row is empty."""
    xp = framework(name)
    case = Case(seqlen_q=100, seqlen_k=130, dtype=dtype, head_dim=64, head_dim_v=64)
    arrays = case.arrays()
    arrays["q"][...] = np.abs(arrays["q"])
    arrays["k"][:, :70] = -np.inf
    for keys in (slice(0, 130), slice(0, 70)):
        each = {"q": arrays["q"], "k": arrays["k"][:, keys], "v": arrays["v"][:, keys]}
        out, lse = cufa.attention(**{name: xp.asarray(x) for name, x in each.items()}, return_lse=True)
        assert_close(out, lse=lse, **each)
    assert not to_numpy(out).astype(np.float32).any() and np.isneginf(to_numpy(lse)).all()


@everywhere
@of_every_dtype
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_sinks_of_infinity_take_everything(name: str, dtype: str, mask: str) -> None:
    xp = framework(name)
    case = Case(seqlen_q=100, seqlen_k=80, num_heads_q=2, num_heads_k=1, dtype=dtype, head_dim=64, head_dim_v=64)
    host = case.arrays() | {"sinks": np.array([np.inf, 0.5], np.float32)}
    arrays = {each: xp.asarray(x) for each, x in host.items()}
    out, lse = cufa.attention(**arrays, **MASKS[mask], return_lse=True)
    assert_close(out, lse=lse, **host, **MASKS[mask])
    assert not to_numpy(out)[:, :, 0].astype(np.float32).any() and np.isposinf(to_numpy(lse)[:, 0]).all()
    found = cufa.attention_backward(
        out, *(arrays[each] for each in "qkv"), out, lse, sinks=arrays["sinks"], **MASKS[mask]
    )
    assert_gradients_close(found, to_numpy(out), **host, **MASKS[mask])
    assert not to_numpy(found[0])[:, :, 0].astype(np.float32).any()


@everywhere
@pytest.mark.parametrize("options", [{"softmax_scale": 2.0**-126}, {"softmax_scale": 30.0, "softcap": 1.2e-38}])
def test_the_smallest_options(name: str, options: dict[str, float]) -> None:
    xp = framework(name)
    case = Case(seqlen_q=100, seqlen_k=130, head_dim=64, head_dim_v=64)
    out, lse = cufa.attention(**case.arrays(xp), **options, return_lse=True)
    assert_close(out, lse=lse, **case.arrays(), **options)
    mean = case.arrays()["v"].astype(np.float64).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(to_numpy(out), np.broadcast_to(mean, out.shape), atol=1e-6)

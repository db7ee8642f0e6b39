"""The tools for testing: they accept what is right, reject what is wrong and need nothing they do not use."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cufa._cpu.forward
import cufa.reference
import cufa.testing
from cufa import reference
from cufa.reference import Precision
from cufa.testing import (
    DTYPES,
    LAYOUTS,
    BenchResult,
    Case,
    View,
    _compare,
    _timing,
    assert_close,
    bench,
    dense_cases,
    lse_tolerance,
    to_numpy,
    tolerance,
    varlen_cases,
)

ALL_DTYPES = (*DTYPES, "float64")


def test_the_readme_tests_a_pipeline() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## Testing your own pipeline\n")[2].partition("\n## ")[0]
    found: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)[0], found)
    for name in ("test_attention", "test_gradients"):
        found[name]()


# --- comparing --------------------------------------------------------------------------------------


def rounded(arrays: dict[str, Any], options: Any) -> tuple[np.ndarray, np.ndarray]:
    """What a perfect implementation gives: float32 mathematics, p and out rounded to the inputs' dtype."""
    storage = arrays["q"].dtype
    compute = np.float64 if storage == np.float64 else np.float32
    out, lse = reference._attend(**arrays, **options, precision=Precision(compute, storage))
    return out.astype(storage), lse.astype(compute)


@settings(max_examples=200)
@given(dense_cases(max_seqlen=129, dtypes=ALL_DTYPES))
def test_rounded_mathematics_is_accepted(case: Case) -> None:
    arrays = case.arrays()
    out, lse = rounded(arrays, case.options)
    assert_close(out, lse=lse, **arrays, **case.options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_is_a_few_times_the_error_of_rounded_mathematics(dtype: str) -> None:
    case = Case(seqlen_q=256, seqlen_k=512, num_heads_q=4, num_heads_k=2, head_dim=64, head_dim_v=64, dtype=dtype)
    arrays = case.arrays()
    out, lse = rounded(arrays, {})
    expected = reference.attention(**arrays, return_lse=True)
    for result, exact, bound, times in (
        (out, expected[0], tolerance(**arrays), 50 if dtype == "float32" else 12),
        (lse, expected[1], lse_tolerance(**arrays), 150),
    ):
        error = np.abs(result.astype(np.float64) - exact)
        assert bound.shape == error.shape and (error <= bound).all()
        assert bound.mean() < times * np.sqrt(np.mean(error**2))


Mistake = Callable[[dict[str, Any], Any], tuple[np.ndarray, np.ndarray]]

PLAIN: dict[str, Any] = {}
CAUSAL = {"causal": True}
WINDOW = {"window_size": (70, 30)}


def with_options(**wrong: Any) -> Mistake:
    return lambda arrays, options: rounded(arrays, {**options, **wrong})


def with_arrays(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Mistake:
    return lambda arrays, options: rounded(arrays | change(arrays), options)


def zeros(arrays: dict[str, Any], options: Any) -> tuple[np.ndarray, np.ndarray]:
    out, lse = rounded(arrays, options)
    return np.zeros_like(out), lse


def one_row_sees_one_key_more(arrays: dict[str, Any], options: Any) -> tuple[np.ndarray, np.ndarray]:
    out, lse = rounded(arrays, options)
    wide = rounded(arrays, {"window_size": (None, 1)})[0]
    row = out.shape[1] - 2
    out[0, row, 1] = wide[0, row, 1]
    return out, lse


def swapped_heads(arrays: dict[str, Any], options: Any) -> tuple[np.ndarray, np.ndarray]:
    out, lse = rounded(arrays, options)
    return out[:, :, [0, 2, 1, 3]], lse[:, [0, 2, 1, 3]]


MISTAKES: dict[str, tuple[dict[str, Any], Any, Mistake]] = {
    "zeros": ({}, PLAIN, zeros),
    "causal forgotten": ({}, CAUSAL, with_options(causal=False)),
    "causal one too far": ({}, CAUSAL, with_options(causal=False, window_size=(None, 1))),
    "causal one too short": ({}, CAUSAL, with_options(causal=False, window_size=(1000, -2))),
    "causal aligned top left": ({}, CAUSAL, with_options(causal=False, window_size=(None, -100))),
    "one row sees one key more": ({}, CAUSAL, one_row_sees_one_key_more),
    "window one too far left": ({}, WINDOW, with_options(window_size=(71, 30))),
    "window one too short right": ({}, WINDOW, with_options(window_size=(70, 29))),
    "last key forgotten": ({}, PLAIN, with_arrays(lambda a: {n: a[n][:, :-1] for n in ("k", "v")})),
    "heads swapped": ({}, PLAIN, swapped_heads),
    "heads interleaved": (
        {},
        PLAIN,
        with_arrays(lambda a: {n: np.tile(a[n], (1, 1, 2, 1)) for n in ("k", "v")}),
    ),
    "scale forgotten": ({}, PLAIN, with_options(softmax_scale=1.0)),
    "scale two per cent off": ({}, PLAIN, with_options(softmax_scale=1.02 / 8)),
    "softcap forgotten": ({}, {"softcap": 5.0}, with_options(softcap=0.0)),
    "sinks forgotten": ({"sinks": True}, PLAIN, with_arrays(lambda a: {"sinks": None})),
    "slopes forgotten": ({"alibi_ndim": 1}, PLAIN, with_arrays(lambda a: {"alibi_slopes": None})),
    "slopes of the first entry": (
        {"alibi_ndim": 2},
        PLAIN,
        with_arrays(lambda a: {"alibi_slopes": a["alibi_slopes"][0]}),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_rejected(mistake: str, dtype: str) -> None:
    fields, options, wrong = MISTAKES[mistake]
    sizes = {"batch": 2, "seqlen_q": 150, "seqlen_k": 250, "num_heads_q": 4, "num_heads_k": 2}
    case = Case(**sizes, **fields, head_dim=64, head_dim_v=64, dtype=dtype)
    arrays = case.arrays()
    out, lse = rounded(arrays, options)
    assert_close(out, lse=lse, **arrays, **options)
    out, lse = wrong(arrays, options)
    with pytest.raises(AssertionError, match=r"^out differs from the float64 reference in "):
        assert_close(out, **arrays, **options)
    if mistake not in ("zeros", "one row sees one key more"):
        with pytest.raises(AssertionError, match=r"^lse differs from the float64 reference in "):
            assert_close(rounded(arrays, options)[0], lse=lse, **arrays, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_too_many_is_rejected_among_thousands(dtype: str) -> None:
    case = Case(seqlen_q=64, seqlen_k=4096, head_dim=128, head_dim_v=128, causal=True, dtype=dtype)
    arrays = case.arrays()
    out, lse = rounded(arrays, case.options)
    assert_close(out, lse=lse, **arrays, **case.options)
    out[:, 40] = rounded(arrays, {"window_size": (None, 1)})[0][:, 40]
    with pytest.raises(AssertionError, match=r"1 of 64 rows.*\n.*\n  worst row out\[0, 40, 0\]"):
        assert_close(out, **arrays, **case.options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_error_everywhere_is_rejected(dtype: str) -> None:
    case = Case(seqlen_q=100, seqlen_k=200, num_heads_q=4, num_heads_k=4, head_dim=64, head_dim_v=64, dtype=dtype)
    arrays = case.arrays()
    bound = tolerance(**arrays)
    error = np.random.default_rng(0).choice([-0.4, 0.4], bound.shape) * bound
    with pytest.raises(AssertionError, match=r"in 0 of 25600 elements, 400 of 400 rows, and by 3\.\d+ times"):
        assert_close(reference.attention(**arrays) + error, **arrays)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_one_wrong_element_is_rejected(value: float, dtype: str) -> None:
    case = Case(batch=2, seqlen_q=33, seqlen_k=65, num_heads_q=2, num_heads_k=1, dtype=dtype, causal=True)
    arrays = case.arrays()
    out, lse = rounded(arrays, case.options)
    lse[1, 1, 7] = value
    with pytest.raises(AssertionError, match=r"^lse .* in 1 of 132 elements(.|\n)*worst element lse\[1, 1, 7\]: got"):
        assert_close(out, lse=lse, **arrays, **case.options)
    out[1, 7, 1, 5] = value
    with pytest.raises(AssertionError, match=r"^out .* in 1 of 2112 elements(.|\n)*worst element out\[1, 7, 1, 5\]"):
        assert_close(out, **arrays, **case.options)


def test_lse_in_base_two_is_rejected() -> None:
    case = Case(seqlen_q=5, seqlen_k=9)
    arrays = case.arrays()
    out, lse = rounded(arrays, {})
    with pytest.raises(AssertionError, match=r"^lse differs"):
        assert_close(out, lse=lse / np.log(2), **arrays)


def test_an_empty_row_must_be_exactly_empty() -> None:
    case = Case(seqlen_q=4, seqlen_k=2, causal=True)
    arrays = case.arrays()
    out, lse = rounded(arrays, case.options)
    assert (out[:, :2] == 0).all() and np.isneginf(lse[..., :2]).all()
    assert_close(out, lse=lse, **arrays, **case.options)
    lse[0, 0, 1] = -1e30
    with pytest.raises(AssertionError, match=r"worst element lse\[0, 0, 1\]: got -1\.0\d*e\+30, expected -inf"):
        assert_close(out, lse=lse, **arrays, **case.options)
    out[0, 1, 0, 3] = 1e-30
    with pytest.raises(AssertionError, match=r"worst element out\[0, 1, 0, 3\]: got 1e-30, expected 0"):
        assert_close(out, **arrays, **case.options)


def test_the_whole_message() -> None:
    q = np.zeros((1, 2, 1, 4), np.float32)
    v = np.array([1, 3], np.float32).reshape(1, 2, 1, 1)
    with pytest.raises(AssertionError) as caught:
        assert_close(np.array([2, 2.5]).reshape(1, 2, 1, 1), q, q, v, lse=np.zeros((1, 1, 3)))
    text = re.sub(r"\d\.\d+e[+-]\d\d|\d\.\d\de[+-]\d\d", "<number>", str(caught.value))
    assert text == (
        "out differs from the float64 reference in 1 of 2 elements, 1 of 2 rows, "
        "and by <number> times the rounding noise overall (at most 6.24)\n"
        "  worst element out[0, 1, 0, 0]: got 2.5, expected 2, error 0.5, tolerance <number>\n"
        "  worst row out[0, 1, 0]: <number> times the rounding noise (at most 8)\n"
        "lse has the shape (1, 1, 3), expected (1, 1, 2)."
    )


def test_arguments_that_do_not_belong_together() -> None:
    x = np.ones((4, 2, 8), np.float32)
    with pytest.raises(AssertionError, match=r"^out has the dtype int64, expected one of floating point\.$"):
        assert_close(np.zeros((1, 4, 2, 8), np.int64), x[None], x[None], x[None])
    with pytest.raises(TypeError, match=r"^attention: scale is no option of the reference, whose options are alibi_sl"):
        assert_close(x[None], x[None], x[None], x[None], scale=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_k belong together"):
        assert_close(x, x, x, x, cu_seqlens_q=[0, 4])
    with pytest.raises(ValueError, match=r"^attention: q has 2 heads and k has 3; the heads of q must be a multiple"):
        tolerance(x[None], np.ones((1, 4, 3, 8)), np.ones((1, 4, 3, 8)))


def test_a_score_about_0_may_have_either_sign() -> None:
    """Where tanh is flat all around 0, the rounding of a dot product decides between -softcap and softcap."""
    q = np.array([[1, 1, 2.0**-24]], np.float32)[None, :, None]
    k = np.array([[1, -1, 1], [1, -1, -1], [1, 0, 0], [-1, 0, 0]], np.float32)[None, :, None]
    v = np.arange(4, dtype=np.float32)[None, :, None, None]
    options: Any = {"softmax_scale": 2.0**60, "softcap": 5.0}
    for sign in (-1, 1):
        other = k.copy()
        other[0, :2, 0, 2] = sign
        out, lse = reference.attention(q, other, v, return_lse=True, **options)
        assert_close(out, q, k, v, lse=lse, **options)
    k[0, :2, 0, 2] = 1 << 10, -1 << 10  # ±2^-14, which is beyond what may round away
    out, lse = reference.attention(q, k, v, return_lse=True, **options)
    wrong = k.copy()
    wrong[0, 1, 0, 2] = 1 << 10
    with pytest.raises(AssertionError, match="lse differs"):
        assert_close(out, q, wrong, v, lse=lse, **options)


def test_what_is_nothing_beside_a_sink_may_be_0() -> None:
    q, k = np.ones((1, 1, 1, 1), np.float32), np.full((1, 3, 1, 1), -4, np.float32)
    v = np.array([1, 2, 3], np.float32)[None, :, None, None]
    for sink, may in ((80.0, True), (60.0, False)):
        options: Any = {"softmax_scale": 1.0, "sinks": np.array([sink], np.float32)}
        out, lse = reference.attention(q, k, v, return_lse=True, **options)
        assert 0 < out[0, 0, 0, 0] < 1e-26
        with contextlib.nullcontext() if may else pytest.raises(AssertionError, match="out differs"):
            assert_close(np.zeros_like(out), q, k, v, lse=lse, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_a_masked_value_may_not_spread(value: float) -> None:
    case = Case(batch=2, seqlen_q=6, seqlen_k=6, num_heads_q=4, num_heads_k=2, causal=True)
    arrays = case.arrays()
    arrays["v"][1, 4, 1, 2] = value
    out, lse = rounded(arrays, case.options)
    assert np.isfinite(out[1, :4]).all() and not np.isfinite(out[1, 4:, 2:, 2]).any()
    assert_close(out, lse=lse, **arrays, **case.options)
    for stranger in ((0, 0, 3, 2), (1, 0, 1, 2), (1, 0, 3, 2), (1, 5, 3, 1)):
        leaked = out.copy()
        leaked[stranger] = np.nan
        with pytest.raises(AssertionError, match=rf"in 1 of 768 elements(.|\n)*out\[{', '.join(map(str, stranger))}"):
            assert_close(leaked, **arrays, **case.options)
    hidden = out.copy()
    hidden[1, 5, 3, 2] = 0
    with pytest.raises(AssertionError, match=r"worst element out\[1, 5, 3, 2\]: got 0"):
        assert_close(hidden, **arrays, **case.options)


def test_varlen_rows_of_no_sequence_are_not_looked_at() -> None:
    case = Case(batch=2, seqlen_q=(3, 4), seqlen_k=(5, 6), seqused_k=(2, 6), num_heads_q=2, alibi_ndim=2, sinks=True)
    arrays = case.arrays()
    arrays["cu_seqlens_q"] = np.array([1, 3, 6])
    out, lse = reference.attention_varlen(**arrays, return_lse=True)
    assert tolerance(**arrays).shape == out.shape and lse_tolerance(**arrays).shape == lse.shape
    assert np.isposinf(tolerance(**arrays)[[0, 6]]).all() and np.isfinite(tolerance(**arrays)[1:6]).all()
    out[[0, 6]] = np.nan
    assert_close(out, lse=lse, **arrays)
    lse[0, 6] = 0
    with pytest.raises(AssertionError, match=r"worst element lse\[0, 6\]: got 0, expected -inf"):
        assert_close(out, lse=lse, **arrays)
    out[3, 1, 0] += 1e-3
    with pytest.raises(AssertionError, match=r"worst element out\[3, 1, 0\]"):
        assert_close(out, **arrays)


@settings(max_examples=40)
@given(case=st.one_of(dense_cases(max_seqlen=17), varlen_cases(max_seqlen=17)))
def test_cutting_a_problem_into_pieces_changes_nothing(case: Case) -> None:
    problem = _compare.Problem.of(
        *(case.arrays().get(name) for name in _compare.Problem._fields[:6]),
        options={
            **case.options,
            **{n: x for n, x in case.arrays().items() if n in ("alibi_slopes", "sinks")},
        },
    )
    whole = _compare.expect(problem, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compare, "PIECE", 1)
        for left, right in zip(_compare.expect(problem, None), whole, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-14)


# --- frameworks -------------------------------------------------------------------------------------


def test_import_needs_no_framework_and_no_hypothesis() -> None:
    code = (
        "import sys, cufa.reference, cufa.testing as t, numpy as np; "
        "c = t.Case(); t.assert_close(cufa.reference.attention(**c.arrays()), **c.arrays()); "
        "t.bench(int, seconds=0); t.assert_gradients_close; "
        "print(sorted({'cupy', 'torch', 'jax', 'numba', 'hypothesis', 'pytest'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_every_public_name_is_found() -> None:
    assert all(getattr(cufa.testing, name) is not None for name in cufa.testing.__all__)
    assert set(cufa.testing.__all__) <= set(dir(cufa.testing))
    with pytest.raises(AttributeError, match=r"^module 'cufa\.testing' has no attribute 'assert_near'$"):
        cufa.testing.assert_near  # noqa: B018


@pytest.mark.parametrize("function", [dense_cases, varlen_cases])
def test_strategies_say_that_they_need_hypothesis(function: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    message = f"cufa.testing.{function.__name__} needs Hypothesis: pip install 'cufa[test]'."
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        function()


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def fake_cupy() -> Any:
    return types.SimpleNamespace(get=lambda: X, __cuda_array_interface__={})


def fake_numba() -> Any:
    return types.SimpleNamespace(copy_to_host=lambda: X, __cuda_array_interface__={})


def fake_jax() -> Any:
    class Array:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return X

        def __dlpack__(self) -> Any:
            raise AssertionError("np.asarray is enough")

    return Array()


def fake_exporter() -> Any:
    class Exporter:
        def __dlpack__(self, **keywords: Any) -> Any:
            return X.__dlpack__(**keywords)

        def __dlpack_device__(self) -> tuple[int, int]:
            return X.__dlpack_device__()

    return Exporter()


@pytest.mark.parametrize("make", [lambda: X, X.tolist, fake_cupy, fake_numba, fake_jax, fake_exporter])
def test_arrays_of_every_framework_come_to_numpy(make: Callable[[], Any]) -> None:
    host = to_numpy(make())
    assert isinstance(host, np.ndarray)
    np.testing.assert_array_equal(host, X)


def test_torch_tensors_come_to_numpy_bfloat16_included(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensor:
        def __init__(self, data: np.ndarray, dtype: str) -> None:
            self.data, self.dtype = data, dtype

        def detach(self) -> Tensor:
            return self

        cpu = detach

        def view(self, dtype: str) -> Tensor:
            return Tensor(self.data.view(dtype), dtype)

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            assert self.dtype != "bfloat16", "NumPy cannot take it"
            return self.data

    torch = types.SimpleNamespace(
        Tensor=Tensor, bfloat16="bfloat16", int16="int16", float8_e4m3fn="float8_e4m3fn", uint8="uint8"
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    np.testing.assert_array_equal(to_numpy(Tensor(X, "float32")), X)
    host = to_numpy(Tensor(X.astype(ml_dtypes.bfloat16), "bfloat16"))
    assert host.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(host.astype(np.float32), X)


# --- cases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (7, 2, 3), (2, 0, 3, 4), (0, 5, 3, 4), (2, 5, 0, 4), (1, 1, 1, 1)])
def test_every_layout_holds_its_elements(layout: str, shape: tuple[int, ...]) -> None:
    view = View.of(shape, layout)
    x = view.on(np.full(view.size, -1.0))
    assert x.shape == shape and tuple(s // 8 for s in x.strides) == view.strides
    values = np.random.default_rng(0).random(shape)
    if layout == "broadcast" and shape[-2]:
        values[...] = values[..., :1, :]
    x[...] = values
    np.testing.assert_array_equal(x, values)
    distinct = values.size if layout != "broadcast" else values.size // max(shape[-2], 1)
    assert np.count_nonzero(~view.outside()) == distinct


def test_layouts_are_what_they_are_called() -> None:
    batch, seqlen, heads, width = shape = (2, 5, 3, 4)
    views = {layout: View.of(shape, layout) for layout in LAYOUTS}
    assert {layout: (view.strides[1:], view.offset) for layout, view in views.items()} == {
        "contiguous": ((heads * width, width, 1), 0),
        "transposed": ((width, seqlen * width, 1), 0),
        "fused": ((3 * heads * width, width, 1), heads * width),
        "fused heads": ((heads * 3 * width, 3 * width, 1), width),
        "fused batch": ((heads * width, width, 1), seqlen * heads * width),
        "fused transposed": ((width, seqlen * width, 1), heads * seqlen * width),
        "wide": ((heads * 64, 64, 1), 0),
        "padded": ((heads * 5, 5, 1), 0),
        "offset": ((heads * width, width, 1), 1),
        "strided": ((2 * heads * width, 2 * width, 2), 0),
        "reversed": ((-heads * width, -width, 1), 4 * heads * width + 2 * width),
        "broadcast": ((width, 0, 1), 0),
    }
    assert [view.size for view in views.values()] == [120, 120, *[360] * 4, 1920, 150, 121, 240, 120, 40]
    assert views["fused batch"].strides[0] == views["fused transposed"].strides[0] == 3 * 60
    assert View.of((2, 60), "wide").strides == (64, 1) and View.of((2, 64), "wide").strides == (128, 1)
    assert batch == 2
    with pytest.raises(ValueError, match="layout is 'diagonal', expected one of contiguous, "):
        View.of(shape, "diagonal")


def test_views_can_be_rebuilt_elsewhere() -> None:
    case = Case(layouts=("strided", "reversed", "broadcast", "padded"), num_heads_q=2, num_heads_k=2, dtype="bfloat16")
    mine, uploads = case.arrays(), []

    def upload(flat: np.ndarray, view: View) -> np.ndarray:
        uploads.append(view.shape)
        index = view.offset + sum(
            np.arange(n).reshape(-1, *[1] * (len(view.shape) - axis - 1)) * stride
            for axis, (n, stride) in enumerate(zip(view.shape, view.strides, strict=True))
        )
        return flat[index]

    for name, x in case.arrays(upload).items():
        np.testing.assert_array_equal(x, mine[name])
        assert x.dtype == mine[name].dtype
    assert uploads == [(1, 16, 2, 16)] * 3
    assert case.output(upload).shape == (1, 16, 2, 16)


def test_a_case_is_what_it_says() -> None:
    sizes = {"num_heads_q": 4, "num_heads_k": 2, "head_dim": 8, "head_dim_v": 6, "layouts": ("padded",) * 4}
    seqlens = {"seqlen_q": (2, 0, 4), "seqlen_k": (3, 5, 1), "seqused_k": (3, 2, 0)}
    case = Case(batch=3, **sizes, **seqlens, dtype="bfloat16", alibi_ndim=2, sinks=True, values="large rows")
    arrays = case.arrays()
    shapes = {name: (x.shape, x.dtype.name) for name, x in arrays.items()}
    assert shapes == {
        "q": ((6, 4, 8), "bfloat16"),
        "k": ((9, 2, 8), "bfloat16"),
        "v": ((9, 2, 6), "bfloat16"),
        "cu_seqlens_q": ((4,), "int32"),
        "cu_seqlens_k": ((4,), "int32"),
        "seqused_k": ((3,), "int32"),
        "alibi_slopes": ((3, 4), "float32"),
        "sinks": ((4,), "float32"),
    }
    assert arrays["cu_seqlens_k"].tolist() == [0, 3, 8, 9]
    dead = [5, 6, 7, 8]
    for name in ("k", "v"):
        assert np.flatnonzero(np.isnan(arrays[name].astype(np.float32)).all(axis=(1, 2))).tolist() == dead
        assert np.isfinite(np.delete(arrays[name], dead, axis=0).astype(np.float32)).all()
    view = case.view("q")
    assert np.isnan(case.flat("q")[view.outside()].astype(np.float32)).all() and view.outside().any()
    assert np.isnan(case.output().astype(np.float32)).all() and case.output().shape == (6, 4, 6)
    assert np.abs(arrays["q"].astype(np.float32)).max() > 10
    for name, x in eval(repr(case)).arrays().items():
        np.testing.assert_array_equal(x.astype(np.float64), arrays[name].astype(np.float64))
    other = Case(**{**vars(case), "seed": 1}).arrays()
    assert not np.array_equal(other["q"], arrays["q"]) and not np.array_equal(other["sinks"], arrays["sinks"])


def length(seqlen: int | tuple[int, ...]) -> int:
    return sum(seqlen) if isinstance(seqlen, tuple) else seqlen


WANTED: dict[str, Callable[[Case], bool]] = {
    "no batch": lambda c: c.batch == 0,
    "no queries": lambda c: c.batch > 0 and length(c.seqlen_q) == 0 < length(c.seqlen_k),
    "no keys": lambda c: c.batch > 0 and length(c.seqlen_k) == 0 < length(c.seqlen_q),
    "no heads": lambda c: c.num_heads_q == 0,
    "more queries": lambda c: length(c.seqlen_q) > length(c.seqlen_k) > 0,
    "more keys": lambda c: length(c.seqlen_k) > length(c.seqlen_q) > 0,
    "GQA": lambda c: 1 < c.num_heads_k < c.num_heads_q,
    "MQA": lambda c: 1 == c.num_heads_k < c.num_heads_q,
    "widths differ": lambda c: c.head_dim == 256 != c.head_dim_v,
    "everything on": lambda c: (
        bool(c.causal and c.window_size and c.softcap and c.sinks) and c.alibi_ndim == 2 and c.softmax_scale is not None
    ),
    "everything off": lambda c: not (c.causal or c.window_size or c.softcap or c.alibi_ndim or c.sinks),
    "one side open": lambda c: c.window_size is not None and c.window_size[0] is None is not c.window_size[1],
    "window of nothing": lambda c: c.window_size is not None and 0 in c.window_size,
    "window of everything": lambda c: c.window_size is not None and 165 in c.window_size,
    "minus one": lambda c: c.window_size is not None and -1 in c.window_size,
    "lse and out": lambda c: c.return_lse and c.use_out and c.values == "large rows",
    "bfloat16": lambda c: c.dtype == "bfloat16",
    "float16": lambda c: c.dtype == "float16",
    "backwards": lambda c: c.layouts[0] == "reversed",
    "out backwards": lambda c: c.layouts[3] == "reversed",
    "broadcast": lambda c: c.layouts[1] == c.layouts[2] == "broadcast",
}


@pytest.mark.parametrize("strategy", [dense_cases, varlen_cases])
def test_the_strategies_reach_every_feature(strategy: Callable[..., Any]) -> None:
    reached = set()

    @settings(max_examples=1500)
    @given(strategy(max_seqlen=65))
    def look(case: Case) -> None:
        assert isinstance(case.seqlen_q, tuple) == isinstance(case.seqlen_k, tuple) == (strategy is varlen_cases)
        reached.update(name for name, wanted in WANTED.items() if wanted(case))

    look()
    assert reached == set(WANTED)


@settings(max_examples=60)
@given(dense_cases(max_seqlen=20, dtypes=["float64"], head_dims=[3], layouts=["padded", "broadcast"]))
def test_the_strategies_keep_to_what_they_are_told(case: Case) -> None:
    assert isinstance(case.seqlen_q, int) and isinstance(case.seqlen_k, int)
    assert max(case.seqlen_q, case.seqlen_k) <= 20
    assert (case.dtype, case.head_dim, case.head_dim_v, case.layouts[3]) == ("float64", 3, 3, "padded")
    assert set(case.layouts) <= {"padded", "broadcast"}


# --- timing -----------------------------------------------------------------------------------------


def test_bench_counts_and_orders() -> None:
    calls = []
    result = bench(lambda: calls.append(1), seconds=0, min_repeats=7)
    assert result.repeats == 7 and len(calls) == 7 + 2  # two calls to warm up and to estimate
    assert 0 < result.p10 <= result.median <= result.p90
    assert bench(int, seconds=1, max_repeats=30).repeats == 30


@pytest.mark.parametrize(
    ("median", "text"),
    [
        (2.5, "2.5 s (p10 2.25, p90 3.125, 9 repeats)"),
        (2.5e-3, "2.5 ms (p10 2.25, p90 3.125, 9 repeats)"),
        (2.5e-6, "2.5 µs (p10 2.25, p90 3.125, 9 repeats)"),
    ],
)
def test_times_are_printed_in_their_unit(median: float, text: str) -> None:
    assert str(BenchResult(median, 0.9 * median, 1.25 * median, 9)) == text


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = [0.0], []

    class Stream:
        def __enter__(self) -> None:
            log.append("enter")

        def __exit__(self, *error: object) -> None:
            log.append("exit")

    def work(name: str, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            log.append(name)
            clock[0] += milliseconds

        return run

    gpu = _timing.Gpu(
        stream=Stream(),
        synchronize=lambda: log.append("synchronize"),
        flush=work("flush", 100),
        capture=lambda fn: work("replay", 2),
        record=lambda: clock[0],
        seconds=lambda start, stop: (stop - start) / 1e3,
    )
    monkeypatch.setattr(_timing, "gpu_of", lambda like: gpu)
    assert bench(work("call", 3), like=X, seconds=0.01, min_repeats=1) == BenchResult(0.002, 0.002, 0.002, 5)
    assert log[:4] == ["enter", "call", "call", "synchronize"] and log[-2:] == ["synchronize", "exit"]
    assert log.count("replay") == log.count("flush") == 3 + 5 and log.count("call") == 2
    result = bench(work("call", 4), like=X, seconds=0, min_repeats=2, graph=False, flush_l2=False)
    assert result == BenchResult(0.004, 0.004, 0.004, 2)

    def refuse(fn: Callable[[], object]) -> Callable[[], object]:
        raise RuntimeError("not in a capture")

    gpu = gpu._replace(capture=refuse)
    assert bench(work("call", 4), like=X, seconds=0, min_repeats=2) == BenchResult(0.004, 0.004, 0.004, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_cupy_is_timed_and_compared(graph: bool) -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.ones(1 << 26, dtype=cupy.float32)
    result = bench(lambda: x + x, like=x, graph=graph)
    assert 1e-5 < result.median < 1e-1 and result.repeats >= 5
    for layout in LAYOUTS:
        case = Case(num_heads_q=2, num_heads_k=2, layouts=(layout,) * 4, alibi_ndim=2, sinks=True, dtype="float16")
        arrays = case.arrays(cupy)
        assert arrays["q"].strides == case.arrays()["q"].strides
        assert_close(cupy.asarray(reference.attention(**case.arrays())), **arrays)

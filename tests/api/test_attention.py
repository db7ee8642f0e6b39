"""The public functions on a machine without a GPU: NumPy, JAX and foreign arrays, explain and show_config."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import cufa
from cufa import reference
from cufa._call import problem as _problem
from cufa._compile import env as _env
from cufa._driver import driver as _driver
from cufa.errors import CudaError
from cufa.testing import LAYOUTS, Case, assert_close, dense_cases, varlen_cases

ALL_DTYPES = ("float16", "bfloat16", "float32", "float64")


def attend(case: Case, arrays: dict[str, Any], **options: Any) -> Any:
    function = cufa.attention_varlen if isinstance(case.seqlen_q, tuple) else cufa.attention
    return function(**arrays, **case.options, **options)


@settings(max_examples=200)
@given(case=dense_cases(max_seqlen=80, dtypes=ALL_DTYPES))
def test_dense_equals_reference(case: Case) -> None:
    check(case)


@settings(max_examples=200)
@given(case=varlen_cases(max_seqlen=80, dtypes=ALL_DTYPES))
def test_varlen_equals_reference(case: Case) -> None:
    check(case)


def check(case: Case) -> None:
    arrays = case.arrays()
    given_out = case.output() if case.use_out else None
    result = attend(case, arrays, return_lse=case.return_lse, out=given_out)
    out, lse = result if case.return_lse else (result, None)
    assert given_out is None or out is given_out
    assert out.dtype == arrays["q"].dtype
    assert_close(out, lse=lse, **arrays, **case.options)


class Foreign:
    """A NumPy array that shows nothing but DLPack and a namespace."""

    device = "cpu"

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        class Namespace:
            float32 = np.float32

            @staticmethod
            def empty(shape: tuple[int, ...], dtype: Any, device: str) -> Foreign:
                assert device == "cpu"
                return Foreign(np.empty(shape, dtype))

        return Namespace


class OlderForeign(Foreign):
    """The same from before DLPack 1.0, and without a namespace."""

    __array_namespace__ = None  # type: ignore[assignment]

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.array.__dlpack__()


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each != "broadcast"])
def test_foreign_arrays(layout: str) -> None:
    case = Case(batch=2, seqlen_q=9, seqlen_k=20, num_heads_q=4, num_heads_k=2, layouts=(layout,) * 4, causal=True)
    arrays = case.arrays()
    out, lse = attend(case, {name: Foreign(array) for name, array in arrays.items()}, return_lse=True)
    assert type(out) is Foreign
    assert_close(out.array, lse=lse.array, **arrays, **case.options)


def test_foreign_arrays_of_old_need_out() -> None:
    case = Case(seqlen_q=5, seqlen_k=7)
    arrays, result = case.arrays(), case.output()
    old = {name: OlderForeign(array) for name, array in arrays.items()}
    out = OlderForeign(result)
    assert cufa.attention(**old, out=out) is out
    assert_close(result, **arrays)


def test_mixed_frameworks_are_refused() -> None:
    array = np.zeros((1, 4, 2, 8), np.float32)
    with pytest.raises(TypeError, match="k is a test_attention array but q is a numpy one"):
        cufa.attention(array, Foreign(array), array)


def test_oddities_of_numpy() -> None:
    array = np.ones((1, 4, 2, 8), np.float32)
    with pytest.raises(cufa.UnsupportedError, match="q: byte-swapped arrays"):
        cufa.attention(array.astype(">f4"), array, array)
    record = np.zeros((1, 4, 2, 8), np.dtype([("x", np.float32), ("y", np.int8)]))["x"]
    with pytest.raises(cufa.UnsupportedError, match="v: strides"):
        cufa.attention(array, array, record)
    array.flags.writeable = False
    assert np.allclose(cufa.attention(array, array, array), 1)
    assert type(cufa.attention(array.view(Subclass), array, array)) is np.ndarray


class Subclass(np.ndarray):
    pass


# --- JAX --------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(case=dense_cases(max_seqlen=65, layouts=("contiguous",)))
def test_jax_equals_reference(case: Case) -> None:
    jnp = pytest.importorskip("jax.numpy")
    result = attend(case, case.arrays(jnp), return_lse=True)
    assert_close(result[0], lse=result[1], **case.arrays(), **case.options)


def test_jax_under_jit_scan_and_vmap() -> None:
    jax = pytest.importorskip("jax")
    case = Case(batch=2, seqlen_q=12, seqlen_k=12, num_heads_q=2, num_heads_k=2)
    q, k, v = (case.arrays()[name] for name in "qkv")
    expected = cufa.attention(q, k, v, causal=True)
    jitted = jax.jit(lambda q, k, v: cufa.attention(q, k, v, causal=True) * 2)
    assert np.allclose(jitted(q, k, v), 2 * expected, atol=1e-5)
    mapped = jax.vmap(lambda q, k, v: cufa.attention(q[None], k[None], v[None], causal=True)[0])
    assert np.allclose(mapped(q, k, v), expected, atol=1e-5)
    carried, _ = jax.lax.scan(lambda x, _: (cufa.attention(x, x, x), None), jax.numpy.asarray(q), None, length=2)
    once = cufa.attention(q, q, q)
    assert np.allclose(carried, cufa.attention(once, once, once), atol=1e-5)


def test_jax_reads_offsets_as_a_gpu_does() -> None:
    """In a program no value can be refused: the running maximum, clamped; what belongs to no sequence is 0."""
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(0)
    q, k, dout = (rng.standard_normal((8, 2, 16), dtype=np.float32) for _ in range(3))
    for offsets, used in (([0, 3, 5], None), ([0, 4, 8], [8, 5]), ([-1, 6, 2, 90], [-4, 3, 9]), ([0, 5, 0, 0], None)):
        packed = {"cu_seqlens_q": np.array(offsets, np.int32), "cu_seqlens_k": np.array(offsets, np.int32)}
        if used is not None:
            packed["seqused_k"] = np.array(used, np.int32)
        ours = {name: jax.numpy.asarray(x) for name, x in packed.items()}
        program = jax.jit(lambda q, k, ours: cufa.attention_varlen(q, k, k, return_lse=True, **ours))
        out, lse = program(q, k, ours)
        expected, expected_lse = reference.attention_varlen(q, k, k, **packed, return_lse=True)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-5)
        dout_, q_, k_ = map(jax.numpy.asarray, (dout, q, k))
        found = cufa.attention_varlen_backward(dout_, q_, k_, k_, out, lse, **ours)
        for x, right in zip(found, reference.attention_varlen_backward(dout, q, k, k, **packed), strict=True):
            np.testing.assert_allclose(x, right, atol=2e-5)


def test_jax_programs_are_compiled_once_for_each_layout() -> None:
    jax = pytest.importorskip("jax")
    from cufa.interop import jax as interop

    q = jax.numpy.ones((1, 8, 2, 16))
    cufa.attention(q, q, q, window_size=(2, 1), softmax_scale=0.5)
    before = interop._program.cache_info().misses
    for window, scale in (([2, 1], 0.5), ((np.int64(2), 1), np.float32(0.5)), ([2, 1], jax.numpy.float32(0.5))):
        _problem._checked.cache_clear()  # what is remembered of problems is no part of it
        cufa.attention(q, q, q, window_size=window, softmax_scale=scale)
    assert interop._program.cache_info().misses == before


def test_jax_arrays_that_cannot_be_read() -> None:
    jax = pytest.importorskip("jax")
    q = jax.numpy.ones((1, 4, 2, 8))
    gone = jax.numpy.ones((1, 4, 2, 8))
    gone.delete()
    with pytest.raises(ValueError, match=r"^attention: k was deleted"):
        cufa.attention(q, gone, q)
    with pytest.raises(ValueError, match=r"^attention: q has dtype key<fry>, which is no number"):
        cufa.attention(*[jax.random.split(jax.random.key(0), (1, 4, 2, 8))] * 3)
    with pytest.raises(TypeError, match=r"^attention: softmax_scale is traced by JAX"):
        jax.jit(lambda scale: cufa.attention(q, q, q, softmax_scale=scale))(0.5)


def test_jax_refusals() -> None:
    jnp = pytest.importorskip("jax.numpy")
    array = jnp.zeros((1, 4, 2, 8))
    host = np.zeros((1, 4, 2, 8), np.float32)
    with pytest.raises(ValueError, match="k has head_dim 4 but q has 8"):
        cufa.attention(array, array[..., :4], array)
    with pytest.raises(cufa.UnsupportedError, match="out is not supported for JAX arrays"):
        cufa.attention(array, array, array, out=array)
    with pytest.raises(TypeError, match="k is a ndarray but q is a jax array"):
        cufa.attention(array, host, array)
    with pytest.raises(TypeError, match="k is a jax array but q is not one"):
        cufa.attention(host, array, host)


# --- what is said -----------------------------------------------------------------------------------


def test_explain_on_the_cpu() -> None:
    array = np.zeros((5, 2, 8), np.float32)
    offsets = np.array([0, 5], np.int32)
    told = cufa.explain(array, array, array, offsets, offsets)
    assert (told.function, told.kernel, told.state) == ("attention_varlen", "cpu", "not needed")
    with pytest.raises(ValueError, match="4 dimensions"):
        cufa.explain(array, array, array)


def test_show_config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise CudaError("no driver here")

    monkeypatch.setattr(_driver, "call", broken)
    monkeypatch.setenv("CUFA_CACHE_MAX_SIZE", "plenty")
    report = cufa.show_config("dicts")
    assert report["gpu"] == {"driver": "CudaError: no driver here", "gpus": "none"}
    assert report["cache"]["state"].startswith("ValueError: CUFA_CACHE_MAX_SIZE: expected")
    assert report["versions"]["cufa"] == cufa.__version__
    assert set(report["environment"]) >= {variable.name for variable in _env.VARIABLES}
    assert cufa.show_config() is None
    printed = capsys.readouterr().out
    assert "no driver here" in printed and "plenty" in printed
    assert not cufa.is_available()
    with pytest.raises(ValueError, match="mode is 'yaml'"):
        cufa.show_config("yaml")  # type: ignore[call-overload]


def test_public_names() -> None:
    assert set(cufa.__all__) <= set(dir(cufa))
    for name in cufa.__all__:
        assert getattr(cufa, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        cufa.atention  # noqa: B018


def test_import_is_light_and_silent() -> None:
    code = """
import sys, numpy as np
before = set(sys.modules)
import cufa
assert {name for name in set(sys.modules) - before if not name.startswith("cufa")} <= {"__future__"}
q = np.ones((1, 4, 2, 8), np.float32)
cufa.attention(q, q, q)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"cupy", "torch", "jax", "numba", "cuda", "scipy", "hypothesis"}, loaded
compiling = {name for name in sys.modules if name.startswith("cufa._compile")}
assert not compiling, compiling
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("missing", ["k", "v", "cu_seqlens_q", "cu_seqlens_k"])
def test_an_array_that_is_none_is_named(missing: str) -> None:
    x, offsets = np.zeros((3, 1, 4), np.float32), np.array([0, 3], np.int32)
    arrays: dict[str, Any] = {"q": x, "k": x, "v": x, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    with pytest.raises(TypeError, match=f"attention_varlen: {missing} is None"):
        cufa.attention_varlen(**{**arrays, missing: None})

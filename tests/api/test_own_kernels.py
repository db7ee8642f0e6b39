"""`cufa.jit`: what a declaration says of arguments, what is refused before anything runs, and what runs."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import pytest

import cufa
from cufa._compile import jit as _compiler
from cufa._jit import signature as _signature

needs_emulator = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

SOURCE = """
#include "ptx/convert.cuh"

// __global__ void scaled(int old) of long ago
extern "C" __global__ __launch_bounds__(64 * (1 + 1)) void scaled(float* __restrict__ y, const ELEMENT* const x,
    double by,  /* of any size, */ bool negate, u8 plus, const long long n) {
  const long long i = blockIdx.y * gridDim.x * blockDim.x + blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = (negate ? -1 : 1) * float(by) * ptx::cvt_f32(x[i]) + plus;
}
"""


@pytest.fixture
def scaled() -> cufa.JitKernel:
    return cufa.jit(SOURCE, "scaled", defines={"ELEMENT": "f16"})


def test_parameters_are_those_of_the_declaration(scaled: cufa.JitKernel) -> None:
    found = [(each.name, each.kind, each.form, each.dtype, each.written) for each in scaled._parameters]
    assert found == [
        ("y", "array", "Q", "float32", True),
        ("x", "array", "Q", "float16", False),
        ("by", "number", "d", None, False),
        ("negate", "number", "?", None, False),
        ("plus", "number", "B", None, False),
        ("n", "number", "q", None, False),
    ]
    assert scaled._offsets == (0, 8, 16, 24, 25, 32) and scaled._size == 40


def test_parameters_of_other_kinds() -> None:
    parsed = _signature.parse("void* a, const Pair* b, const __grid_constant__ ptx::TensorMap c, unsigned int d", {})
    assert [each.kind for each in parsed] == ["array", "array", "map", "number"]
    words = "long long unsigned int a, short int* b, signed c, size_t d, volatile i64 const* e"
    assert [each.spelled for each in _signature.parse(words, {})] == [
        *("unsigned long long", "short*", "int", "size_t", "const volatile long long*"),
    ]
    assert [each.dtype for each in parsed[:2]] == [None, None] and [each.written for each in parsed[:2]] == [
        True,
        False,
    ]
    assert _signature.offsets(parsed) == ((0, 8, 64, 192), 196)
    assert _signature.parse("void", {}) == _signature.parse("", {}) == ()
    for text in ("long n", "Pair p", "float** x", "float& x", "int", "int n, float n"):
        with pytest.raises(TypeError):
            _signature.parse(text, {})


@pytest.mark.parametrize(
    ("source", "options", "kind", "text"),
    [
        ("", {}, ValueError, "no declaration of"),
        ("__global__ void f(int n) {}", {}, ValueError, 'mangled name; declare it extern "C"'),
        (
            'extern "C" { __global__ void f(int n); __global__ void f(float x) {} }',
            {},
            ValueError,
            "several declarations",
        ),
        ('extern "C" __global__ void f(size n) {}', {}, TypeError, "'size n' is no pointer"),
        ('extern "C" __global__ void f(int n) {}', {"options": ["-arch=sm_80"]}, ValueError, "-arch=sm_80 is refused"),
        ('extern "C" __global__ void f(int n) {}', {"options": ["-Iinclude"]}, ValueError, "-Iinclude is refused"),
        ('extern "C" __global__ void f(int n) {}', {"options": "-G"}, TypeError, "pass a list of texts"),
        ('extern "C" __global__ void f(int n) {}', {"options": ["-Uint"]}, ValueError, "-Uint is refused"),
        ('extern "C" __global__ void f(int n = 1) {}', {}, TypeError, "'int n = 1' has a default"),
        ('extern "C" __global__ void f(const CUtensorMap m) {}', {}, TypeError, "__grid_constant__ CUtensorMap m"),
        ("\0", {}, ValueError, "source has characters that a compiler does not read"),
        ("// \ud800", {}, ValueError, "source has characters that a compiler does not read"),
        ('  # include "/home/mine.h"', {}, ValueError, "includes the file /home/mine.h; pass its text"),
        ("#include MINE", {"defines": {"MINE": "<C:mine.h>"}}, ValueError, "includes the file C:mine.h"),
        ("", {"headers": {"a.h": '#include "/b.h"'}}, ValueError, "includes the file /b.h"),
        ("", {"headers": {"a.h": b""}}, TypeError, "headers has 'a.h', a bytes"),
        ("", {"headers": ["a.h"]}, TypeError, "headers is a list"),
        ("", {"defines": {"A=3": 1}}, ValueError, "defines has 'A=3'"),
        ("", {"defines": {"A": None}}, TypeError, "A is defined as a NoneType"),
        ("", {"defines": {"A": float("nan")}}, ValueError, "A is defined as nan"),
        ("", {"defines": "A"}, TypeError, "defines is a str"),
        (b"", {}, TypeError, "source is a bytes"),
    ],
)
def test_sources_that_are_refused(source: Any, options: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match="jit: ") as raised:
        cufa.jit(source, "f", **options)
    assert text in str(raised.value)


@needs_emulator
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_launches_compute(dtype: str) -> None:
    kernel = cufa.jit(SOURCE, "scaled", defines={"ELEMENT": {"float16": "f16", "bfloat16": "bf16"}.get(dtype, "f32")})
    x = np.arange(1000).astype(_compiler_dtype(dtype))
    with emulated.Gpu() as gpu:
        y = gpu.empty((1000,), "float32")
        kernel(y, gpu.array(x), np.float32(2), np.True_, np.uint8(255), 999, grid=(2, 4), block=(128,))
        np.testing.assert_array_equal(y.numpy()[:999], 255 - 2 * x.astype(np.float32)[:999])
        assert np.isnan(y.numpy()[999])
        kernel._loaded[7] = threading.Lock()  # type: ignore[assignment]  # is the process's own, like all that is loaded
        again = pickle.loads(pickle.dumps(kernel))
        again(y, gpu.array(x), 1, False, 0, 1000, grid=8, block=128)
        np.testing.assert_array_equal(y.numpy(), x.astype(np.float32))


def _compiler_dtype(name: str) -> Any:
    from cufa._call.arrays import numpy_dtype

    return numpy_dtype(name)


@needs_emulator
def test_a_tensor_map_is_an_argument() -> None:
    source = """
    #include "ptx/mbarrier.cuh"
    #include "ptx/shared.cuh"
    #include "ptx/tma.cuh"
    extern "C" __global__ void box(u16* y, const __grid_constant__ ptx::TensorMap map, int row) {
      extern __shared__ __align__(1024) char memory[];
      const u32 tile = ptx::shared_address(memory), barrier = tile + 8 * 128;
      if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(barrier, 8 * 128);
        ptx::cp_async_bulk_tensor_4d(tile, map, barrier, 0, row, 0, 0);
      }
      __syncthreads();
      while (!ptx::mbarrier_try_wait_parity(barrier, 0)) {
      }
      for (int i = 0; i < 8; ++i) y[64 * i + threadIdx.x] = reinterpret_cast<u16*>(memory)[64 * i + threadIdx.x];
    }
    """
    box = cufa.jit(source, "box")
    assert box.compile("sm_90").arch == "sm_90a"
    x = np.arange(20 * 64).reshape(1, 1, 20, 64).astype(np.float16)
    with emulated.Gpu(arch=90) as gpu:
        y = gpu.empty((8, 64), "uint16")
        box(
            y, cufa.tensor_map(gpu.array(x), (1, 1, 8, 64), swizzle=128), 15, grid=1, block=64, shared_bytes=8 * 128 + 8
        )
        found = y.numpy().view(np.float16)
        given = gpu.array(x)
        with pytest.raises(TypeError, match="a tensor map has an address"):
            copy.deepcopy(cufa.tensor_map(given, (1, 1, 8, 64), swizzle=128))
        for wrong, text in (
            (((1, 1, 8), 128), "box is (1, 1, 8)"),
            (((1, 1, 8, 65), 128), "box is (1, 1, 8, 65)"),
            (((1, 1, 8, 64), 64), "swizzle is 64, and rows of a box have 128 bytes"),
        ):
            with pytest.raises(ValueError, match=re.escape(text)):
                cufa.tensor_map(given, wrong[0], swizzle=wrong[1])
        with pytest.raises(ValueError, match="does not begin at a multiple of 16 bytes"):
            cufa.tensor_map(gpu.array(np.arange(66).astype(np.float16)[2:]), (64,))
        with pytest.raises(TypeError, match="array is int64"):
            cufa.tensor_map(gpu.array(np.arange(8)), (8,))
    expected = np.zeros((8, 64), np.float16)
    for row in range(5):  # rows behind the end are zeros
        chunks = x[0, 0, 15 + row].reshape(8, 8)
        expected[row] = chunks[np.arange(8) ^ row].reshape(64)
    np.testing.assert_array_equal(found, expected)


@needs_emulator
def test_what_is_wrong_with_a_launch_is_said_before_it(scaled: cufa.JitKernel) -> None:
    x = np.zeros(128, np.float16)
    with emulated.Gpu() as gpu:
        y, x_there = gpu.empty((128,), "float32"), gpu.array(x)
        right = {"y": y, "x": x_there, "by": 2.0, "negate": False, "plus": 0, "n": 128}
        shape = {"grid": 1, "block": 128}
        for wrong, kind, text in (
            ({"y": x_there}, TypeError, "y is float16, but is declared 'float* __restrict__ y', which is float32"),
            ({"x": x}, ValueError, "x is in host memory"),
            ({"x": 7}, TypeError, "x is a int, not an array"),
            ({"by": "2"}, TypeError, "by is a str"),
            ({"by": 10**400}, ValueError, "which 'double by' does not hold"),
            ({"negate": 1}, TypeError, "negate is a int, but is declared 'bool negate'"),
            ({"plus": 256}, ValueError, "plus is 256, which 'u8 plus' does not hold"),
            ({"plus": 1.0}, TypeError, "plus is a float"),
            ({"n": True}, TypeError, "n is a bool"),
            ({"y": None, "x": None}, TypeError, "no argument is an array"),
            ({"grid": 0}, ValueError, "grid is 0"),
            ({"grid": (1, 65536)}, ValueError, "grid is (1, 65536)"),
            ({"grid": 1.5}, TypeError, "grid has to be made of integers"),
            ({"block": (512, 4)}, ValueError, "2048 threads"),
            ({"block": (1, 1, 65)}, ValueError, "block is (1, 1, 65)"),
            ({"shared_bytes": -1}, ValueError, "shared_bytes is -1"),
            ({"shared_bytes": 1 << 20}, ValueError, "shared_bytes is 1048576"),
        ):
            given = right | shape | wrong
            arguments = [given.pop(name) for name in right]
            with pytest.raises(kind, match="scaled: ") as raised:
                scaled(*arguments, **given)
            assert text in str(raised.value)
        single = cufa.jit('extern "C" __global__ void f(float* y, float a) { *y = a; }', "f")
        with pytest.raises(ValueError, match=r"a is 1e\+39, which 'float a' does not hold"):
            single(y, 1e39, **shape)
        with pytest.raises(TypeError, match="5 arguments are given, and the kernel has 6"):
            scaled(*[*right.values()][:5], **shape)
        assert gpu.launches == []


def test_compiling_says_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_CACHE_DIR", str(tmp_path))
    source = """extern "C" __global__ void reversed(const float* x, float* y) {
      __shared__ float held[100];
      held[threadIdx.x] = x[threadIdx.x];
      __syncthreads();
      y[threadIdx.x] = held[99 - threadIdx.x];
    }"""
    kernel = cufa.jit(source, "reversed")
    found = kernel.compile("sm_80")
    assert (found.arch, found.shared_bytes, found.spill_bytes) == ("sm_80", 400, 0) and 4 <= found.registers <= 32
    if found.sass is not None:
        assert found.instructions is not None and 8 <= found.instructions <= 40
        assert "BAR.SYNC" in found.sass
    compiled = cufa.stats().kernels["compiled"]
    again = cufa.jit(source, "reversed")
    assert again.compile(80).cubin == found.cubin and cufa.stats().kernels["compiled"] == compiled
    assert again.compile("sm_90").arch == "sm_90a" and cufa.stats().kernels["compiled"] == compiled + 1
    fewer = cufa.jit(source, "reversed", options=["--maxrregcount=16"], headers={"unused.h": ""})
    assert fewer.compile(80).log and cufa.stats().kernels["compiled"] == compiled + 2
    monkeypatch.setenv("CUFA_DISABLE_JIT", "1")
    assert again.compile(80).cubin == found.cubin
    with pytest.raises(cufa.MissingKernelError, match="the kernel reversed for sm_86 is not in the cache"):
        again.compile("8.6")
    with pytest.raises(ValueError, match="arch is 'volta'"):
        again.compile("volta")

    def no_gpu() -> int:
        raise cufa.CudaError("cufa: there is no GPU.")

    monkeypatch.setattr("cufa._driver.driver.current_ordinal", no_gpu)
    with pytest.raises(cufa.CudaError, match=r"there is no GPU. Without a GPU say .* compile\('sm_90'\)"):
        again.compile()


def test_errors_of_the_compiler_show_the_line() -> None:
    kernel = cufa.jit(
        '#include "mine.h"\nextern "C" __global__ void f(int n) {\n  wrong(n);\n}', "f", headers={"mine.h": ""}
    )
    with pytest.raises(cufa.CompileError, match=r"compiling the kernel f for sm_80 failed") as raised:
        kernel.compile("sm_80")
    assert 'kernel.cu(3): error: identifier "wrong" is undefined' in str(raised.value)
    other = cufa.jit('extern "C" __global__ void f(int n) {}', "f", signature="float n")
    with pytest.raises(cufa.CompileError, match="overloaded function"):
        other.compile("sm_80")
    hidden = cufa.jit('#define KERNEL extern "C" __global__\nKERNEL void f(int n) {}', "f", signature="int n")
    assert hidden.compile("sm_80").registers > 0
    absent = cufa.jit('extern "C" __global__ void f(int n) {}', "g", signature="int n")
    with pytest.raises(cufa.CompileError, match="the kernel g for sm_80 is not in what was compiled"):
        absent.compile("sm_80")


@pytest.mark.parametrize(
    "source",
    [
        'typedef long long i32; extern "C" __global__ void f(float* y, i32 n) { *y = n; }',
        '#define float double\nextern "C" __global__ void f(float* y, float n) { *y = n; }',
        '#if 0\nextern "C" __global__ void f(float* y)\n#endif\n#define KERNEL(name) extern "C" __global__ void name\n'
        "KERNEL(f)(float* y, int n) { *y = n; }",
    ],
)
def test_types_that_are_not_what_they_are_called_are_found(source: str) -> None:
    with pytest.raises(cufa.CompileError, match=r'signature\(1\): error: .*"C" linkage') as raised:
        cufa.jit(source, "f").compile("sm_80")
    assert re.search(r"void f\(.*\);  // what cufa.jit reads; else say signature=", str(raised.value))


def test_declarations_of_all_kinds_compile() -> None:
    """Comments, lines of Windows, and names that the source alone knows are no reason for an error."""
    source = (
        '// käse\r\nconstexpr char quote = \'"\'; // extern "C" __global__ void f(int old)\r\n'
        "namespace own {\r\nstruct Pair { int a; };\r\n"
        'extern "C" __global__ void f(volatile float* y, \\\r\n  const Pair* x /* ) */, size_t n) '
        "{ y[n] = x->a + ONE; }\r\n}"
    )
    assert cufa.jit(source, "f", defines={"ONE": True}).compile("sm_80").registers > 0
    source = (
        '%:  include NAMED\nextern "C" { __global__ void f(const u32* x, float const* const y, u32* z) { *z = *x; } }'
    )
    kernel = cufa.jit(
        source, "f", defines={"NAMED": "<core/types.cuh>"}, signature="const u32* x, const f32* y, u32* z"
    )
    assert kernel.compile("sm_80").registers > 0
    assert cufa.jit(source, "f", defines={"NAMED": "<core/types.cuh>"}).compile("sm_80").registers > 0


def test_files_of_the_working_directory_are_not_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache would not notice when they change."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.h").write_text("")
    with pytest.raises(cufa.CompileError, match="could not open source file"):
        cufa.jit('#include "mine.h"\nextern "C" __global__ void f(int n) {}', "f").compile("sm_80")


def test_headers_of_the_callers_come_first() -> None:
    source = '#include "core/types.cuh"\nextern "C" __global__ void f(u32* x) { *x = answer; }'
    own = cufa.jit(source, "f", headers={"core/types.cuh": "using u32 = unsigned; constexpr u32 answer = 42;"})
    assert own.compile("sm_80").registers > 0
    assert len(_compiler.headers()) > len([path for path in own._headers if path == "core/types.cuh"]) == 1


def test_arrays_that_no_kernel_may_have(scaled: cufa.JitKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    from cufa._call import arrays as _arrays

    x = np.zeros(8, np.float16)

    def recorded(*_: Any) -> None:
        raise _arrays.Recorded

    calls = (
        lambda: scaled(x, x, 1.0, True, 0, 8, grid=1, block=8),
        lambda: cufa.tensor_map(x, (8,)),
    )
    for name, replacement, text in (("view", recorded, "torch records"), ("is_jax", lambda _: True, "is a jax array")):
        monkeypatch.setattr(_arrays, name, replacement)
        for call in calls:
            with pytest.raises(cufa.UnsupportedError, match=text):
                call()

"""``cufa doctor``: every step that can fail does, by injection, and the report is made all the same."""

from __future__ import annotations

import ctypes
import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import cufa
from cufa import reference
from cufa._cli import checks as _checks
from cufa._cli import device_array as _device_array
from cufa._cli import doctor as _doctor
from cufa._cli.main import cufa as command
from cufa._compile import jit as _jit
from cufa._compile import nvrtc as _nvrtc
from cufa._compile.cache import CubinCache
from cufa._driver import driver as _driver
from cufa.errors import CompileError, CudaError, MissingKernelError


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CUFA_CACHE", "CUFA_DISABLE_JIT", "CUFA_BUNDLE_PATH", "CUFA_CACHE_MAX_SIZE", "CUFA_BUNDLE_KEYS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUFA_CACHE_DIR", str(tmp_path / "store"))
    _checks._kernel.cache_clear()
    yield
    _checks._kernel.cache_clear()


def fails(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def outcome(name: str) -> tuple[str, str, str]:
    result = _checks.result_of(name)
    assert result["name"] == name and result["seconds"] >= 0
    return result["status"], result["says"], result["do"]


class FakeGpu:
    """The driver's bindings where there are GPUs: memory is the host's, and goes when its context does."""

    def __init__(self, archs: tuple[int, ...] = (90,), version: int = 13000) -> None:
        self.archs, self.version = archs, version
        self.memory: dict[int, Any] = {}
        self.refuses: dict[str, str] = {}
        self.current: list[int] = []
        self.holds: Counter[int] = Counter()
        """How often each primary context is retained. Nothing but cufa holds any."""

    def __getattr__(self, name: str) -> Any:
        from cuda.bindings import driver as real

        if not name.startswith("cu"):
            return getattr(real, name)
        answer = getattr(FakeGpu, f"_{name}", None)

        def function(*arguments: Any) -> tuple[Any, ...]:
            if name in self.refuses:
                return getattr(real.CUresult, self.refuses[name]), None
            if name.startswith(("cuMem", "cuLibrary", "cuCtxGetDevice", "cuCtxSynchronize")) and not self.current:
                return real.CUresult.CUDA_ERROR_INVALID_CONTEXT, None
            try:
                value = answer(self, *arguments) if answer else None
            except LookupError:
                return real.CUresult.CUDA_ERROR_INVALID_VALUE, None
            return (0,) if value is None else (0, value)

        return function

    def _cuGetErrorString(self, status: Any) -> bytes:
        return b""

    def _cuDriverGetVersion(self) -> int:
        return self.version

    def _cuDeviceGetCount(self) -> int:
        return len(self.archs)

    def _cuDeviceGet(self, ordinal: int) -> int:
        return ordinal

    def _cuThreadExchangeStreamCaptureMode(self, mode: Any) -> Any:
        return mode

    def _cuDevicePrimaryCtxRetain(self, device: int) -> int:
        self.holds[device] += 1
        return device

    def _cuDevicePrimaryCtxRelease(self, device: int) -> None:
        self.holds[device] -= 1
        if not self.holds[device]:
            self.memory.clear()

    def _cuCtxGetDevice(self) -> int:
        return self.current[-1]

    def _cuCtxPushCurrent(self, context: int) -> None:
        self.current.append(context)

    def _cuCtxPopCurrent(self) -> int:
        return self.current.pop()

    def _cuLibraryLoadData(self, cubin: bytes, *_: object) -> int:
        assert cubin.startswith(b"\x7fELF")
        return 1

    def _cuMemAlloc(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def _cuMemFree(self, address: int) -> None:
        del self.memory[address]

    def _cuMemcpyHtoD(self, to: int, source: int, size: int) -> None:
        ctypes.memmove(self.memory[to], source, size)

    def _cuMemcpyDtoH(self, to: int, source: int, size: int) -> None:
        ctypes.memmove(to, self.memory[source], size)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake = FakeGpu()
    monkeypatch.setattr(_driver, "driver", lambda: fake)
    monkeypatch.setattr(_driver, "device", lambda ordinal: _driver.Device(fake.archs[ordinal], 132))
    _driver.primary_context.cache_clear()
    yield fake
    _driver.primary_context.cache_clear()


# The steps


def test_steps_that_need_no_gpu() -> None:
    assert outcome("cpu") == ("ok", f"NumPy {np.__version__}: results are right", "")
    assert outcome("headers")[0] == "ok" and outcome("headers")[1].endswith(" CUDA headers")
    assert outcome("nvrtc")[:1] == ("ok",) and _jit.nvrtc().path in outcome("nvrtc")[1]
    status, says, do = outcome("compile")
    assert (status, do) == ("ok", "") and says.startswith("attention_align for sm_80 in ")
    assert outcome("bundles") == ("skipped", "there are none", "")
    status, says, _ = outcome("cache")
    assert status == "ok" and "store: ok, 0 entries" in says


def test_a_wrong_result_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cufa, "attention", lambda q, *_, **__: 0 * q)
    status, says, do = outcome("cpu")
    assert status == "failed" and says.startswith("attention on the CPU is wrong by ") and "report it" in do
    monkeypatch.setattr(cufa, "attention", lambda q, *_, **__: np.nan * q)
    assert outcome("cpu")[0] == "failed"


def test_a_broken_library() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cufa, "attention", fails(ImportError("libscipy is broken")))
        assert outcome("cpu") == ("failed", "ImportError: libscipy is broken", _checks._INSTALL_AGAIN)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_driver, "call", fails(CudaError("cufa: the CUDA driver cannot be loaded: nowhere")))
    status, says, do = outcome("driver")
    assert (status, says) == ("failed", "the CUDA driver cannot be loaded: nowhere") and "--gpus all" in do
    assert outcome("nvrtc")[0] == "ok"
    assert outcome("compile")[0] == "ok"


def test_gpus(gpu: FakeGpu) -> None:
    assert outcome("driver") == ("ok", "CUDA 13.0", "")
    assert outcome("gpu") == ("ok", "cuda:0 has compute capability 9.0", "")
    gpu.archs = (75, 80)
    assert outcome("gpu")[0] == "ok"
    assert _checks._first_gpu() == 1
    gpu.archs = (75,)
    assert outcome("gpu")[:2] == ("failed", "cuda:0 has compute capability 7.5")
    assert "cufa needs 8.0 or newer" in outcome("gpu")[2]
    gpu.archs = ()
    assert outcome("gpu")[:2] == ("failed", "the driver finds no GPU")
    assert "CUDA_VISIBLE_DEVICES" in outcome("gpu")[2]


def test_an_nvrtc_newer_than_the_driver(gpu: FakeGpu) -> None:
    gpu.version = 12080
    status, says, do = outcome("nvrtc")
    assert status == "failed" and "compiles for CUDA 13, which a driver for CUDA 12 cannot load" in says
    assert "pip install 'cufa[cuda12]'" in do


def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvrtc, "settle", fails(CompileError("cufa: NVRTC cannot be loaded: nowhere.")))
    assert outcome("nvrtc")[:2] == ("failed", "NVRTC cannot be loaded: nowhere.")
    assert "pip install" in outcome("nvrtc")[2]


def test_no_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jit, "headers", fails(CompileError("cufa: the CUDA sources are missing; install cufa again.")))
    assert outcome("headers")[:2] == ("failed", "the CUDA sources are missing; install cufa again.")


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jit, "compiled_entry", fails(CompileError("cufa: compiling a kernel failed.\nthe log")))
    assert outcome("compile")[:2] == ("failed", "compiling a kernel failed. the log")


@pytest.mark.parametrize("name", ["nvrtc", "compile", "load"])
def test_where_compiling_is_forbidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_DISABLE_JIT", "1")
    assert outcome(name) == ("skipped", "CUFA_DISABLE_JIT is 1, so nothing is compiled", "")


def test_a_cache_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_CACHE", "0")
    assert outcome("cache") == ("skipped", "CUFA_CACHE is 0, so every process compiles anew", "")


def test_a_cache_that_others_can_write(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o777)
    status, says, do = outcome("cache")
    assert status == "failed" and "can be written by other users" in says and "Set CUFA_CACHE_DIR" in do


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    assert outcome("cache")[0] == "failed"


def test_a_cache_that_does_not_keep_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CubinCache, "note", lambda *_: {"other": 1})
    assert outcome("cache")[0] == "failed"


def test_a_variable_with_a_wrong_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_CACHE_MAX_SIZE", "much")
    status, says, _ = outcome("cache")
    assert status == "failed" and "CUFA_CACHE_MAX_SIZE: expected a number of bytes" in says


def test_bundles_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.cufabundle"
    bad.write_bytes(b"no bundle")
    monkeypatch.setenv("CUFA_BUNDLE_PATH", str(bad))
    status, says, do = outcome("bundles")
    assert status == "failed" and str(bad) in says and "CUFA_BUNDLE_PATH" in do


def test_a_kernel_that_does_not_load(gpu: FakeGpu) -> None:
    assert outcome("load") == ("ok", "the compiled kernel, on cuda:0", "")
    gpu.refuses["cuLibraryLoadData"] = "CUDA_ERROR_NO_BINARY_FOR_GPU"
    assert outcome("load")[:2] == ("failed", "cuLibraryLoadData failed: CUDA_ERROR_NO_BINARY_FOR_GPU.")


def on_fake_gpu(factor: float) -> Callable[..., Any]:
    """`cufa.attention` of arrays in the fake's memory."""

    def attention(*arrays: _device_array.DeviceArray, causal: bool) -> _device_array.DeviceArray:
        return _device_array.DeviceArray.of(
            factor * reference.attention(*(a.numpy() for a in arrays), causal=causal), 0
        )

    return attention


def test_a_launch(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cufa, "attention", on_fake_gpu(1.0))
    status, says, _ = outcome("launch")
    assert status == "ok" and says.endswith("on cuda:0: results are right")
    assert not gpu.memory
    monkeypatch.setattr(cufa, "attention", on_fake_gpu(1.01))
    status, says, _ = outcome("launch")
    assert status == "failed" and says.startswith("attention on cuda:0 is wrong by ")
    monkeypatch.setattr(cufa, "attention", fails(MissingKernelError("cufa: it is not in the cache.")))
    assert outcome("launch")[:2] == ("failed", "it is not in the cache.")
    assert not gpu.memory


def test_arrays_of_the_driver_are_arrays_to_cufa(gpu: FakeGpu) -> None:
    """As far as a launch: views, checks and the result's allocation."""
    from cufa._call import arrays as _arrays
    from cufa._call import options as _options
    from cufa._call import problem as _problem
    from cufa._operations.call import allocate
    from cufa._operations.forward import ATTENTION

    q, k, v = (_device_array.DeviceArray.of(array, 0) for array in _checks._inputs())
    arrays = _arrays.view("attention", ATTENTION.arrays, (q, k, v, None, None, None), ATTENTION.written_indices)
    options = _options.of("attention", (True, None, None, 0.0, False, False))
    problem = _problem.checked(ATTENTION, arrays, options)
    assert problem.device == 0 and arrays.stream(0) == 0
    (out,), addresses = allocate(arrays, problem)
    assert (out.shape, out.dtype, out.pointer) == (q.shape, "float32", addresses[-1])
    assert (q.numpy() == _checks._inputs()[0]).all()


# The report


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["doctor", *arguments])


def replace_worker(monkeypatch: pytest.MonkeyPatch, script: str, seconds: float = 5) -> None:
    """Let the steps be tried by a script that knows `name`, and answers by ``say(status)``."""
    prologue = f"""
        import json, os, sys, time
        def say(status):
            text = json.dumps({{"name": name, "status": status, "says": "s", "do": "d", "seconds": 0}})
            print({_checks.MARK!r} + text, flush=True)
        for line in sys.stdin:
            name = line.strip()
    """
    text = textwrap.dedent(prologue) + textwrap.indent(textwrap.dedent(script), "    ")
    monkeypatch.setattr(_doctor, "COMMAND", (sys.executable, "-c", text))
    checks = {name: check._replace(seconds=seconds) for name, check in _checks.CHECKS.items()}
    monkeypatch.setattr(_doctor, "CHECKS", checks)


def steps(result: Result) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in json.loads(result.output)["steps"]}


def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_worker(monkeypatch, "say('ok')")
    result = run("--json")
    assert result.exit_code == 0 and json.loads(result.output)["ok"] is True
    assert list(steps(result)) == list(_checks.CHECKS)
    assert run().output.endswith("All is well.\n")


def test_what_needs_a_failed_step_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_worker(monkeypatch, "say('failed' if name in ('driver', 'headers') else 'ok')")
    result = run("--json")
    assert result.exit_code == 1
    told = steps(result)
    assert {name: step["says"] for name, step in told.items() if step["status"] == "skipped"} == {
        "gpu": "needs driver",
        "compile": "needs headers",
        "load": "needs gpu and compile",
        "launch": "needs gpu",
    }
    assert run().output.endswith("driver, headers: mend that first.\n")


def test_a_step_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_worker(monkeypatch, "if name in ('driver', 'compile'): time.sleep(60)\nsay('ok')", seconds=0.7)
    began = time.monotonic()
    result = run("--json")
    assert time.monotonic() - began < 20
    told = steps(result)
    assert told["driver"]["says"] == told["compile"]["says"] == "it did not end within 0.7 s"
    assert told["cache"]["status"] == "ok"  # a new process tried it
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("crash", "says"),
    [
        ("os.kill(os.getpid(), 11)", "the process was ended by SIGSEGV"),
        ("os._exit(3)", "the process ended with status 3"),
        ("print('free(): invalid pointer', flush=True); os.abort()", "SIGABRT; it said: free(): invalid pointer"),
        ("os.write(2, b'caf\\xe9\\n'); os._exit(1)", "the process ended with status 1; it said: caf\ufffd"),
    ],
)
def test_a_step_that_crashes_does_not_take_the_others_along(
    crash: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_worker(monkeypatch, f"if name == 'nvrtc': {crash}\nprint('chatter')\nsay('ok')")
    result = run("--json")
    told = steps(result)
    assert told["nvrtc"]["status"] == "failed" and told["nvrtc"]["says"].endswith(says)
    assert told["cache"]["status"] == "ok" and told["compile"]["status"] == "skipped"


def test_a_process_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor, "COMMAND", (sys.executable, "-c", "raise SystemExit('no')"))
    result = run("--json")
    assert result.exit_code == 1
    assert steps(result)["cpu"]["says"] == "the process ended with status 1; it said: no"


def test_the_whole_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("--json")
    told = steps(result)
    assert {told[name]["status"] for name in ("cpu", "nvrtc", "headers", "compile", "cache")} == {"ok"}
    assert result.exit_code == (0 if cufa.is_available() else 1)

"""First calls in threads without a context, with another GPU's, and while another thread captures a CUDA graph."""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from gradients import Call, lay_out
from sampling import paired
from test_problem import OnGpu, OnGpuAdapter

import cufa
from cufa._call import arrays as _arrays
from cufa._call import problem as _problem
from cufa._compile import jit as _jit
from cufa._compile.cache import Entry
from cufa._driver import driver as _driver
from cufa._kernels import tensor_map
from cufa.testing import Case, assert_close, to_numpy

LENGTHS: dict[str, dict[str, Any]] = {
    "dense": {"batch": 2, "seqlen_q": 150, "seqlen_k": 170},
    "packed": {"batch": 3, "seqlen_q": (40, 0, 130), "seqlen_k": (70, 20, 129)},
}
# On Hopper: its forward, and both of its ways to the gradients; the kernel for every GPU.
KINDS: tuple[dict[str, Any], ...] = (
    {"dtype": "bfloat16", "head_dim": 64},
    {"dtype": "bfloat16", "head_dim": 192, "window_size": (60, 0)},
    {"dtype": "float32", "head_dim": 64, "causal": True},
)
CALLS = {
    f"{layout}-{kind['dtype']}-{kind['head_dim']}": Call(
        case=Case(num_heads_q=2, num_heads_k=1, head_dim_v=kind["head_dim"], **lengths, **kind)
    )
    for layout, lengths in LENGTHS.items()
    for kind in KINDS
}


CAPTURED = Call(
    case=Case(
        batch=2, seqlen_q=150, seqlen_k=170, num_heads_q=2, num_heads_k=1, head_dim=64, head_dim_v=64, dtype="float16"
    )
)
"""Of another kernel than all of those."""


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process: no problem, kernel or map is remembered, before and after."""
    memos = (_problem._checked, tensor_map._driver_encode, _driver.device, _driver.primary_context)
    monkeypatch.setattr(_jit, "_kernels", {})
    monkeypatch.setattr(_jit, "_libraries", {})
    for memo in memos:
        memo.cache_clear()
    yield
    for memo in memos:
        memo.cache_clear()


# Without a GPU: a driver that asks of every call what the real one does.


class FakeDriver:
    """CUDA's driver while some other thread captures in global mode."""

    RETURN_NOTHING = (
        "cuCtxPushCurrent",
        "cuCtxSetCurrent",
        "cuDevicePrimaryCtxRelease",
        "cuKernelSetAttribute",
        "cuLaunchKernelEx",
    )

    def __init__(self, *current: int) -> None:
        from cuda.bindings import driver

        self._real = driver
        self.current = list(current)
        self.mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        self.retained = 0
        self.refused = ""
        """Function that fails in any case."""
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if not name.startswith("cu") or isinstance(found, type):
            return found

        def checked(*arguments: Any) -> tuple[Any, ...]:
            self.called.append(name)
            status = self._trouble(name)
            if status:
                return (status,) if name in self.RETURN_NOTHING else (status, None)
            return (0, *self._answer(name, arguments))

        return checked

    def _trouble(self, name: str) -> Any:
        errors = self._real.CUresult
        relaxed = self.mode == self._real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        if name == self.refused:
            return errors.CUDA_ERROR_OUT_OF_MEMORY
        loads = name.startswith(("cuLibrary", "cuKernel"))
        if loads and not relaxed:
            return errors.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        needs_context = loads or name.startswith(("cuCtx", "cuTensorMap", "cuLaunch", "cuStream"))
        free = ("cuCtxPushCurrent", "cuCtxSetCurrent", "cuCtxGetCurrent")
        if needs_context and name not in free and not self.current:
            return errors.CUDA_ERROR_INVALID_CONTEXT
        # Maps are the same for every GPU, but nothing else may happen on another one.
        if name.startswith(("cuKernel", "cuLaunch")) and self.current[-1] != 0:
            return errors.CUDA_ERROR_INVALID_HANDLE
        return None

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        attributes = self._real.CUdevice_attribute
        if name == "cuThreadExchangeStreamCaptureMode":
            before, self.mode = self.mode, arguments[0]
            return (before,)
        if name in ("cuDeviceGet", "cuDevicePrimaryCtxRetain"):
            self.retained += name != "cuDeviceGet"
            return arguments
        if name == "cuDevicePrimaryCtxRelease":
            self.retained -= 1
        elif name == "cuCtxPushCurrent":
            self.current.append(arguments[0])
        elif name == "cuCtxSetCurrent":
            self.current[-1:] = [arguments[0]]
        elif name == "cuCtxGetCurrent":
            return (self.current[-1] + 1 if self.current else 0,)  # 0 is no context
        elif name == "cuCtxPopCurrent":
            return (self.current.pop(),)
        elif name == "cuDriverGetVersion":
            return (13000,)
        elif name == "cuDeviceGetAttribute":
            known = {
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: 9,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: 0,
            }
            return (known.get(arguments[0], 132),)
        elif name == "cuTensorMapEncodeTiled":
            return (FakeMap(arguments[2]),)
        answers = {
            "cuCtxGetDevice": self.current[-1:],
            "cuStreamIsCapturing": [self._real.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE],
            "cuLibraryLoadData": ["library"],
            "cuLibraryGetKernel": [1],
            "cuKernelGetFunction": [1],
            "cuGetErrorString": [b"as the test wants"],
        }
        return tuple(answers.get(name, ()))


class FakeMap:
    def __init__(self, address: int) -> None:
        import ctypes

        self._memory = ctypes.create_string_buffer(address.to_bytes(8, "little"), 128)
        self._address = ctypes.addressof(self._memory)

    def getPtr(self) -> int:
        return self._address


class Pretended(OnGpu):
    """An array of a framework that knows its GPU and its stream."""


class PretendedAdapter(OnGpuAdapter):
    addresses = itertools.count(1 << 40, 1 << 30)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> tuple[Any, int]:
        array = Pretended(*shape, dtype=dtype, pointer=next(self.addresses))
        return array, array.pointer

    def stream(self, array: Any, device: int) -> int:
        return 7

    def current_device(self) -> int:
        return 0


_arrays.register(Pretended, PretendedAdapter())


def pretend(call: Call) -> dict[str, Any]:
    """The arrays of a call, on a GPU that is not there."""
    adapter = PretendedAdapter()
    return {name: adapter.empty(array.shape, array.dtype.name, None)[0] for name, array in call.arrays().items()}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, cold: None) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setattr(_driver, "driver", lambda: driver)
    monkeypatch.setattr(_jit, "entry_of", lambda plan: Entry(b"", {}))
    return driver


def operations(call: Call, arrays: dict[str, Any], into: dict[str, Any] | None = None) -> list[Callable[[], Any]]:
    """Forward and gradients; both write into what is given."""
    forward = cufa.attention_varlen if call.packed else cufa.attention
    backward = cufa.attention_varlen_backward if call.packed else cufa.attention_backward
    given = {name: array for name, array in arrays.items() if name not in ("out", "dout", "lse", "dlse")}
    outputs = {} if into is None else {"out": into["out"]}
    results = {} if into is None else {name: into[name] for name in ("dq", "dk", "dv")}
    return [
        lambda: forward(**given, **call.case.options, **outputs),
        lambda: backward(**arrays, **call.case.options, **results),
    ]


@pytest.mark.parametrize(("current", "name"), paired([(), (0,), (1,)], CALLS), ids=str)
def test_a_first_call_brings_what_the_driver_asks_for(name: str, current: tuple[int, ...], fake: FakeDriver) -> None:
    fake.current = list(current)
    mode = fake.mode
    for operation in operations(CALLS[name], pretend(CALLS[name])):
        fake.called.clear()
        operation()
        assert {"cuLibraryLoadData", "cuKernelGetFunction", "cuLaunchKernelEx"} <= set(fake.called)
        assert ("cuTensorMapEncodeTiled" in fake.called) == ("float32" not in name)
        # What has no context gets this GPU's, for good; all else is as it was.
        assert (tuple(fake.current), fake.mode, fake.retained) == (current or (0,), mode, not current)
        fake.called.clear()
        operation()
        assert not any("Load" in function or "Exchange" in function for function in fake.called)
        assert ("cuCtxPushCurrent" in fake.called) == (current == (1,))


@pytest.mark.parametrize(
    "refused", ["cuCtxPushCurrent", "cuLibraryLoadData", "cuKernelGetFunction", "cuTensorMapEncodeTiled"]
)
def test_a_first_call_that_fails_leaves_the_thread_as_it_was(
    refused: str, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_jit, "_compile", lambda plan, key: Entry(b"", {}))
    mode, fake.refused = fake.mode, refused
    for operation in operations(CALLS["dense-bfloat16-64"], pretend(CALLS["dense-bfloat16-64"])):
        with pytest.raises(cufa.CudaError, match=f"^cufa: {refused} failed: CUDA_ERROR_OUT_OF_MEMORY"):
            operation()
        assert (fake.current, fake.mode, fake.retained) == ([], mode, 0)


def test_a_forked_child_is_told_why_cuda_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    initialised = os.getpid()
    status = driver.CUresult
    monkeypatch.setattr(
        driver, "cuInit", lambda _: (status(0) if os.getpid() == initialised else status.CUDA_ERROR_NOT_INITIALIZED,)
    )
    monkeypatch.setattr(driver, "cuGetErrorString", lambda _: (0, b"initialization error"))
    _driver.driver.cache_clear()
    assert _driver.driver() is driver
    pid = fork()
    if not pid:
        try:
            _driver.call("cuDeviceGetCount")
        except cufa.CudaError as error:
            right = "initialization error. A process that is forked" in str(error) and "'spawn'" in str(error)
            os._exit(0 if right and not cufa.is_available() else 1)
        finally:
            os._exit(2)
    _driver.driver.cache_clear()
    assert os.waitpid(pid, 0)[1] == 0


def fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the fork of a process with threads
        return os.fork()


# On a GPU


def in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns in a new thread, which has no context."""
    found: list[Any] = []

    def run() -> None:
        try:
            assert int(_driver.call("cuCtxGetCurrent")) == 0
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def with_context_popped(work: Callable[[], Any]) -> Any:
    """What `work` returns in this thread without its context."""
    popped = []
    try:
        while int(_driver.call("cuCtxGetCurrent")):
            popped.append(_driver.call("cuCtxPopCurrent"))
        assert popped
        return work()
    finally:
        for context in reversed(popped):
            _driver.call("cuCtxPushCurrent", context)


def check(call: Call, found: Any) -> None:
    """Hold what a call returned to the reference."""
    if isinstance(found, tuple):
        call.check(found)
    else:
        assert_close(found, **call.case.arrays(), **call.case.options)


def results(call: Call, xp: Any) -> dict[str, Any]:
    """Arrays to write into, made beforehand so that the framework has no reason to make its context current."""
    dtype = call.case.arrays()["q"].dtype
    shapes = {"out": "out", "dq": "q", "dk": "k", "dv": "v"}
    nothing = {name: np.full(call.case.view(like).shape, np.nan, dtype) for name, like in shapes.items()}
    return {name: lay_out(array, "contiguous", xp) for name, array in nothing.items()}


@pytest.fixture
def cupy() -> Any:
    module = pytest.importorskip("cupy")
    module.cuda.Device(0).use()
    module.zeros(1)  # makes its context current
    return module


@pytest.mark.gpu
@pytest.mark.parametrize("where", [in_thread, with_context_popped])
@pytest.mark.parametrize("name", CALLS)
def test_a_first_call_without_a_context(
    name: str, where: Callable[[Callable[[], Any]], Any], cold: None, cupy: Any
) -> None:
    call = CALLS[name]
    arrays, into = call.arrays(cupy), results(call, cupy)
    cupy.empty(1 << 22)  # memory in the pool for the next
    cupy.cuda.Device().synchronize()
    for operation in operations(call, arrays, into):
        found = where(operation)
        cupy.cuda.Device().synchronize()
        check(call, found)


@pytest.mark.gpu
def test_a_first_call_with_another_gpu_current(cold: None, cupy: Any) -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    for call in CALLS.values():
        arrays, into = call.arrays(cupy), results(call, cupy)
        cupy.cuda.Device().synchronize()
        for operation in operations(call, arrays, into):
            with cupy.cuda.Device(1):
                found = operation()
            cupy.cuda.Device().synchronize()
            check(call, found)


@pytest.mark.gpu
def test_gradients_in_the_thread_of_torchs_autograd(cold: None) -> None:
    torch = pytest.importorskip("torch")
    call = CALLS["dense-bfloat16-192"]
    arrays = call.arrays(torch)
    inputs = [arrays[name].requires_grad_() for name in "qkv"]
    threads = []

    class Attention(torch.autograd.Function):  # type: ignore[name-defined, misc]
        @staticmethod
        def forward(context: Any, *inputs: Any) -> Any:
            context.save_for_backward(*inputs)
            return arrays["out"].clone()

        @staticmethod
        def backward(context: Any, dout: Any) -> Any:
            threads.append(threading.get_ident())
            given = dict(zip("qkv", context.saved_tensors, strict=True))
            return cufa.attention_backward(**{**arrays, "dout": dout, **given}, **call.case.options)

    Attention.apply(*inputs).backward(arrays["dout"])
    torch.cuda.synchronize()
    assert threads and threads[0] != threading.get_ident()
    call.check(tuple(each.grad for each in inputs))


def warmed(cupy: Any) -> tuple[Callable[[], Any], Any]:
    """A call that has been made, to be captured, and the array that it writes, which holds zeros again."""
    into = results(CAPTURED, cupy)
    call = operations(CAPTURED, CAPTURED.arrays(cupy), into)[0]
    call()
    cupy.cuda.Device().synchronize()
    into["out"][...] = 0
    return call, into["out"]


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("name", CALLS)
def test_a_first_call_while_another_thread_captures(name: str, gradients: bool, cold: None, cupy: Any) -> None:
    """In global mode, the usual one, where anything that the capture does not know breaks it from any thread."""
    call = CALLS[name]
    arrays, into = call.arrays(cupy), results(call, cupy)
    warm, warm_out = warmed(cupy)
    side, stream = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    with side:
        cupy.empty(1 << 22)  # memory in the pool for the gradients' workspace
    cupy.cuda.Device().synchronize()

    def first() -> Any:
        with side:
            return operations(call, arrays, into)[gradients]()

    with stream:
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
        try:
            warm()
            found = in_thread(first)
        finally:
            graph = stream.end_capture()
        graph.launch(stream)
    cupy.cuda.Device().synchronize()
    check(call, found)
    check(CAPTURED, warm_out)


@pytest.mark.gpu
def test_the_default_stream_while_one_that_it_waits_for_is_captured(cold: None, cupy: Any) -> None:
    call = CALLS["dense-bfloat16-64"]
    arrays, into = call.arrays(cupy), results(call, cupy)
    warm, warm_out = warmed(cupy)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=False)
    with stream:
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
        try:
            warm()
            with pytest.raises(cufa.CudaError, match="default stream cannot be used while"):
                in_thread(operations(call, arrays, into)[0])
        finally:
            graph = stream.end_capture()
        graph.launch(stream)
    cupy.cuda.Device().synchronize()
    check(CAPTURED, warm_out)
    assert np.isnan(to_numpy(into["out"]).astype(np.float32)).all()


@pytest.mark.gpu
def test_streams_tell_their_gpu() -> None:
    """Whichever is current, which stays so."""
    cupy = pytest.importorskip("cupy")
    for ordinal in range(_driver.count()):
        with cupy.cuda.Device(ordinal):
            stream = cupy.cuda.Stream(non_blocking=True)
        for other in range(_driver.count()):
            with cupy.cuda.Device(other):
                cupy.zeros(1)
                assert _driver.device_of_stream(stream.ptr) == ordinal
                assert _driver.current_ordinal() == other
                assert _driver.device_of_stream(0) == other

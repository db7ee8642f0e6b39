"""The CUDA driver: its errors, GPUs, and contexts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import CudaError
from . import forks as _forks


class Device(NamedTuple):
    """A GPU: compute capability (80 for 8.0) and number of SMs."""

    arch: int
    num_sms: int


@lru_cache(maxsize=1)
def driver() -> Any:
    """The initialised bindings of the CUDA driver.

    Raises
    ------
    CudaError
        If there is no driver, or it finds no GPU.
    """
    try:
        with _forks.section():
            from cuda.bindings import driver as bindings

            (status,) = bindings.cuInit(0)
    except Exception as error:  # the bindings raise classes of their own where the library is missing
        raise CudaError(f"cufa: the CUDA driver cannot be loaded: {error}") from error
    if status == bindings.CUresult.CUDA_ERROR_NOT_INITIALIZED:  # all that it says to a forked child
        raise CudaError(
            f"cufa: the CUDA driver does not start: {describe(bindings, status)}. A process that is forked from one "
            "that has used CUDA cannot use it; start it by multiprocessing's 'spawn' or 'forkserver'."
        )
    if status != 0:
        raise CudaError(f"cufa: the CUDA driver does not start: {describe(bindings, status)}.")
    return bindings


# A child asks anew, and is told why the driver does not work for it.
_forks.after_in_child(driver.cache_clear)


def call(function: str, *arguments: Any) -> Any:
    """Call a driver function; return what it returns beside the status."""
    bindings = driver()
    status, *values = getattr(bindings, function)(*arguments)
    if status != 0:
        raise CudaError(f"cufa: {function} failed: {describe(bindings, status)}.")
    return values[0] if len(values) == 1 else tuple(values)


def describe(bindings: Any, status: Any) -> str:
    failed, text = bindings.cuGetErrorString(status)
    name = getattr(status, "name", str(status))
    return name if failed != 0 or not text else f"{name}, {text.decode()}"


@lru_cache(maxsize=64)
def device(ordinal: int) -> Device:
    """What plans need to know of a GPU."""
    attribute = driver().CUdevice_attribute
    handle = call("cuDeviceGet", ordinal)
    major, minor, num_sms = (
        int(call("cuDeviceGetAttribute", getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), handle))
        for name in ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT")
    )
    return Device(10 * major + minor, num_sms)


@lru_cache(maxsize=64)
def primary_context(ordinal: int) -> Any:
    """The primary context of a GPU, of which this process keeps hold from now on."""
    return call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", ordinal))


_forks.after_in_child(primary_context.cache_clear)


def enter(ordinal: int) -> bool:
    """Make a GPU current in a thread where none is, and say whether there was none.

    It stays so, as CUDA's runtime leaves it after the first call in a thread that launches anything. Frameworks call
    threads their GPU's before they do so: those of torch's autograd would meet a driver without a context each time.
    """
    bindings = driver()
    status, active = bindings.cuCtxGetCurrent()
    if status != 0 or int(active):
        return False
    call("cuCtxSetCurrent", primary_context(ordinal))
    return True


@lru_cache(maxsize=1)
def count() -> int:
    """How many GPUs this process sees."""
    return int(call("cuDeviceGetCount"))


def current_ordinal() -> int | None:
    """The GPU that is current in this thread; None if none is."""
    status, active = driver().cuCtxGetDevice()
    return int(active) if status == 0 else None


def device_of_stream(stream: int) -> int:
    """The GPU of a stream, or, of CUDA's default one, that which is current."""
    context = call("cuStreamGetCtx", stream)
    call("cuCtxPushCurrent", context)
    try:
        return int(call("cuCtxGetDevice"))
    finally:
        call("cuCtxPopCurrent")


@contextmanager
def current(ordinal: int) -> Iterator[None]:
    """Make the primary context of a GPU current, if that of another is or none."""
    bindings = driver()
    status, active = bindings.cuCtxGetDevice()
    if status == 0 and int(active) == ordinal:
        yield
        return
    handle = call("cuDeviceGet", ordinal)
    context = call("cuDevicePrimaryCtxRetain", handle)
    try:
        call("cuCtxPushCurrent", context)
        try:
            yield
        finally:
            call("cuCtxPopCurrent")
    finally:
        call("cuDevicePrimaryCtxRelease", handle)


@contextmanager
def loading(ordinal: int) -> Iterator[None]:
    """`current`, for calls that may break a capture that another thread has under way: loading a library, waiting.

    A capture in global mode, the usual one, does not stand them from any thread but one in relaxed mode. They are no
    part of what is captured, so that it loses nothing by them.
    """
    relaxed = driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = call("cuThreadExchangeStreamCaptureMode", relaxed)
    try:
        with current(ordinal):
            yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", before)


def is_capturing(stream: int) -> bool:
    """Whether `stream` is being captured into a CUDA graph.

    Raises
    ------
    CudaError
        If it is the default stream, and another one that waits for it is being captured.
    """
    bindings = driver()
    status, found = bindings.cuStreamIsCapturing(stream)
    if status == bindings.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
        raise CudaError(
            "cufa: CUDA's default stream cannot be used while a stream that waits for it is captured into a CUDA "
            "graph; make the call on another stream, or capture one that does not wait (non_blocking=True)."
        )
    if status != 0:
        raise CudaError(f"cufa: cuStreamIsCapturing failed: {describe(bindings, status)}.")
    return bool(found != bindings.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)


def download(ordinal: int, host: int, address: int, size: int, stream: int) -> None:
    """Copy so many bytes of a GPU's memory to `host`, and wait until that and all of `stream` before it are done."""
    with loading(ordinal):
        call("cuMemcpyDtoHAsync", host, address, size, stream)
        call("cuStreamSynchronize", stream)


@lru_cache(maxsize=64)
def overlaps(ordinal: int) -> bool:
    """Whether a GPU begins a grid while the one before it ends, in CUDA graphs too."""
    return device(ordinal).arch >= 90 and int(call("cuDriverGetVersion")) >= 12030

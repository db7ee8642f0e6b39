"""The driver: devices, loaded kernels, and launches on the caller's stream."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from . import _forks
from ._align import Copies
from ._params import (
    BACKWARD_MAPS_BYTES,
    BACKWARD_POINTERS,
    BACKWARD_SIZE,
    COPIED_ARRAYS,
    LAYOUT,
    MAP_BYTES,
    MAPS_BYTES,
    POINTER_LAYOUT,
    TMA_SIZE,
)
from ._plan import Device
from .errors import CudaError


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
            f"cufa: the CUDA driver does not start: {_describe(bindings, status)}. A process that is forked from one "
            "that has used CUDA cannot use it; start it by multiprocessing's 'spawn' or 'forkserver'."
        )
    if status != 0:
        raise CudaError(f"cufa: the CUDA driver does not start: {_describe(bindings, status)}.")
    return bindings


# A child asks anew, and is told why the driver does not work for it.
os.register_at_fork(after_in_child=driver.cache_clear)


def call(function: str, *arguments: Any) -> Any:
    """Call a driver function; return what it returns beside the status."""
    bindings = driver()
    status, *values = getattr(bindings, function)(*arguments)
    if status != 0:
        raise CudaError(f"cufa: {function} failed: {_describe(bindings, status)}.")
    return values[0] if len(values) == 1 else tuple(values)


def _describe(bindings: Any, status: Any) -> str:
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
    """`current`, for calls such as loading a library, which break a capture that another thread has under way.

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
        raise CudaError(f"cufa: cuStreamIsCapturing failed: {_describe(bindings, status)}.")
    return bool(found != bindings.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)


ADDRESS = struct.Struct("@Q")
"""What leads a tensor map."""


class _Scratch(threading.local):
    """A thread's kernel arguments: the driver has copied them when the launch returns."""

    def __init__(self) -> None:
        self.params = ctypes.create_string_buffer(max(TMA_SIZE, BACKWARD_SIZE))
        self._array = (ctypes.c_void_p * 1)(ctypes.addressof(self.params))
        self.arguments = ctypes.addressof(self._array)


_scratch = _Scratch()


class Launch:
    """A loaded kernel with the shape of its launch and the part of its argument that every launch shares.

    `what` names it in messages. `params` are Params, or all of TmaParams; with its maps come their `shifts`, what the
    addresses of q, k and v differ by in them. Another argument leads with addresses in a `layout` of its own.
    """

    __slots__ = (
        "_blocks",
        "_configs",
        "_enqueue",
        "_function",
        "_offset",
        "_pack_into",
        "_params",
        "_shifts",
        "_smem_bytes",
        "_threads",
        "device",
        "what",
    )

    MAX_STREAMS = 64

    def __init__(
        self,
        what: str,
        function: Any,
        device: int,
        blocks: int,
        threads: int,
        smem_bytes: int,
        params: bytes,
        shifts: tuple[int, ...] = (),
        layout: struct.Struct = POINTER_LAYOUT,
    ) -> None:
        self.what = what
        self.device = device
        self._function = function
        self._blocks = blocks
        self._threads = threads
        self._smem_bytes = smem_bytes
        self._params = params
        self._shifts = shifts
        self._pack_into = layout.pack_into
        self._offset = MAPS_BYTES if shifts else 0
        self._enqueue = driver().cuLaunchKernelEx
        self._configs: dict[int, Any] = {}

    def __call__(self, pointers: list[int], stream: int, current_device: int) -> None:
        """Enqueue on `stream` with the leading members of Params set to `pointers`.

        `current_device` is the framework's current GPU, or -1 if that is not known.
        """
        if self._blocks == 0:
            return
        scratch = _scratch
        ctypes.memmove(scratch.params, self._params, len(self._params))
        self._pack_into(scratch.params, self._offset, *pointers)
        if self._shifts:
            q, k, v = self._shifts
            ADDRESS.pack_into(scratch.params, 0, pointers[0] + q)
            ADDRESS.pack_into(scratch.params, MAP_BYTES, pointers[1] + k)
            ADDRESS.pack_into(scratch.params, 2 * MAP_BYTES, pointers[2] + v)
        config = self._configs.get(stream) or self._config(stream)
        if current_device == self.device:
            (status,) = self._enqueue(config, self._function, scratch.arguments, 0)
            if status == 0:
                return
        # Another GPU is current, or, in a new thread, none.
        with current(self.device):
            (status,) = self._enqueue(config, self._function, scratch.arguments, 0)
        if status != 0:
            raise CudaError(f"cufa: launching {self.what} failed: {_describe(driver(), status)}.")

    def _config(self, stream: int) -> Any:
        """What the driver is told of the shape; kept, because making it costs microseconds."""
        config = _config((self._blocks, self._threads, self._smem_bytes), stream)
        if len(self._configs) >= self.MAX_STREAMS:
            self._configs.clear()
        self._configs[stream] = config
        return config


class Copying:
    """The loaded kernel that copies arrays; it is given addresses of arrays whose names are `order`."""

    __slots__ = ("_launch", "_missing", "_places", "floats")

    def __init__(self, launch: Launch, copies: Copies, order: tuple[str, ...]) -> None:
        self.floats = copies.floats
        self._launch = launch
        self._places = [(order.index(each.name), 4 * each.offset) for each in copies.made]
        self._missing = [0] * (COPIED_ARRAYS - len(copies.made))

    def __call__(self, addresses: list[int], memory: int, stream: int, current_device: int) -> list[int]:
        """Enqueue on `stream`, with copies in the memory at `memory`; the addresses, the copies' in place of theirs."""
        replaced = [*addresses]
        for index, offset in self._places:
            replaced[index] = memory + offset
        arrays, copies = ([each[index] for index, _ in self._places] for each in (addresses, replaced))
        self._launch([*arrays, *self._missing, *copies, *self._missing], stream, current_device)
        return replaced


class BackwardLaunch:
    """The loaded kernels of the gradients, launched one after the other with the same argument.

    Where the GPU can, each begins while the one before it ends: see ptx/grid.cuh.

    `argument` is BackwardArgument with null addresses; `shifts`, if it has maps, are what the addresses of q, k, v and
    dout differ by in them. `shapes` are (blocks, threads, bytes of shared memory) of each kernel.
    """

    __slots__ = ("_argument", "_configs", "_functions", "_shapes", "_shifts", "device", "what")

    def __init__(
        self,
        what: str,
        functions: tuple[Any, ...],
        device: int,
        shapes: list[tuple[int, int, int]],
        argument: bytes,
        shifts: tuple[int, ...],
    ) -> None:
        self.what = what
        self.device = device
        self._functions = functions
        self._shapes = shapes
        self._argument = argument
        self._shifts = shifts
        self._configs: dict[int, list[Any]] = {}

    def __call__(self, forward: list[int], backward: list[int], stream: int) -> None:
        """Enqueue on `stream`, with the addresses that lead Params and those that follow it in BackwardParams."""
        scratch = _scratch
        ctypes.memmove(scratch.params, self._argument, len(self._argument))
        POINTER_LAYOUT.pack_into(scratch.params, BACKWARD_MAPS_BYTES, *forward)
        BACKWARD_POINTER_LAYOUT.pack_into(scratch.params, BACKWARD_MAPS_BYTES + LAYOUT.size, *backward)
        for index, (address, shift) in enumerate(zip((*forward[:3], backward[0]), self._shifts, strict=False)):
            ADDRESS.pack_into(scratch.params, index * MAP_BYTES, address + shift)
        configs = self._configs.get(stream)
        if configs is None:
            if len(self._configs) >= Launch.MAX_STREAMS:
                self._configs.clear()
            configs = self._configs[stream] = self._make_configs(stream)
        with current(self.device):
            for config, function in configs:
                (status,) = driver().cuLaunchKernelEx(config, function, scratch.arguments, 0)
                if status != 0:
                    raise CudaError(f"cufa: launching {self.what} failed: {_describe(driver(), status)}.")

    def _make_configs(self, stream: int) -> list[Any]:
        """What the driver is told of each kernel that has blocks, and the kernel."""
        shapes = [(shape, each) for shape, each in zip(self._shapes, self._functions, strict=True) if shape[0] > 0]
        overlap = overlaps(self.device)
        return [(_config(shape, stream, overlap and i > 0), each) for i, (shape, each) in enumerate(shapes)]


BACKWARD_POINTER_LAYOUT = struct.Struct(f"@{BACKWARD_POINTERS}Q")


@lru_cache(maxsize=64)
def overlaps(ordinal: int) -> bool:
    """Whether a GPU begins a grid while the one before it ends, in CUDA graphs too."""
    return device(ordinal).arch >= 90 and int(call("cuDriverGetVersion")) >= 12030


def _config(shape: tuple[int, int, int], stream: int, overlap: bool = False) -> Any:
    """What the driver is told of the shape of a launch, and whether it may `overlap` with the one before it."""
    config = driver().CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = shape[0], 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = shape[1], 1, 1
    config.sharedMemBytes = shape[2]
    config.hStream = stream
    if overlap:
        attribute = driver().CUlaunchAttribute()
        attribute.id = driver().CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs = [attribute]
        config.numAttrs = 1
    return config

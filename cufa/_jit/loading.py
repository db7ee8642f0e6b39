"""Kernels of the caller's own, loaded for a GPU."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from .._compile import jit as _jit
from .._compile import listing as _listing
from .._driver import driver as _driver
from .._kernels.unit import Unit
from ..errors import CompileError, CudaError, MissingKernelError


class Loaded(NamedTuple):
    """A kernel on a GPU: the function, the threads a block may have, and bytes of dynamic shared memory likewise."""

    function: Any
    max_threads: int
    max_shared_bytes: int


def log_of(unit: Unit, log: str) -> str:
    """What ptxas has logged of the kernel of a unit.

    Raises
    ------
    CompileError
        If what was compiled has none of that name.
    """
    found = _listing.by_function(log).get(unit.entries[0])
    if found is None:
        raise CompileError(f"cufa: {not_there(unit)}")
    return found


def not_there(unit: Unit) -> str:
    return f'{unit.words} is not in what was compiled; declare it extern "C" __global__ void {unit.entries[0]}(...).'


def static_shared_bytes(log: str) -> int:
    """Bytes of shared memory that a kernel itself declares, from what ptxas logs of it."""
    found = re.search(r"(\d+) bytes smem", log)
    return int(found[1]) if found else 0


def load(unit: Unit, device: int, stream: int) -> Loaded:
    """A kernel, compiled if it has to be, and ready to launch.

    Raises
    ------
    CompileError
        If it cannot be compiled.
    MissingKernelError
        If `stream` is being captured, or compiling is forbidden.
    """
    with _driver.current(device):
        if _driver.is_capturing(stream):
            raise MissingKernelError(
                f"cufa: {unit.words} is not loaded, and the stream is being captured into a CUDA graph, where it "
                "cannot be; launch it once before the capture."
            )
    with _driver.loading(device):
        library = _jit.own_library_of(unit)
        try:
            kernel = _driver.call("cuLibraryGetKernel", library, unit.entries[0].encode())
        except CudaError as error:
            raise CompileError(f"{error} {not_there(unit)}") from None
        attribute, handle = _driver.driver().CUfunction_attribute, _driver.call("cuDeviceGet", device)
        most = _driver.driver().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        threads, static = (
            int(_driver.call("cuKernelGetAttribute", which, kernel, handle))
            for which in (
                attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK,
                attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            )
        )
        dynamic = int(_driver.call("cuDeviceGetAttribute", most, handle)) - static
        which = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _driver.call("cuKernelSetAttribute", which, dynamic, kernel, handle)
        _driver.call("cuKernelGetFunction", kernel)  # loads it into the context now, not within a later capture
    _jit.LOADED.add()
    return Loaded(_driver.driver().CUfunction(int(kernel)), threads, dynamic)

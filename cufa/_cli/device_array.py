"""Arrays in a GPU's memory by the driver alone, for a call where no framework is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._call import arrays as _arrays
from .._call.arrays import ALIGNMENT, Adapter, Layout, Spec, contiguous
from .._driver import driver as _driver


class DeviceArray:
    """A dense array in memory of its own, which `free` gives back.

    Parameters
    ----------
    shape : tuple of int
    dtype : str
    device : int
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, device: int) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._size = int(np.prod(shape)) * _arrays.numpy_dtype(dtype).itemsize
        _driver.primary_context(device)  # held from now on: where nothing else holds it, memory would go with it
        with _driver.current(device):
            self._memory = _driver.call("cuMemAlloc", self._size)
        self.pointer = int(self._memory)

    @classmethod
    def of(cls, array: NDArray[Any], device: int) -> DeviceArray:
        """A copy of an array in host memory."""
        made = cls(array.shape, array.dtype.name, device)
        dense = np.ascontiguousarray(array)
        with _driver.current(device):
            _driver.call("cuMemcpyHtoD", made._memory, dense.ctypes.data, made._size)
        return made

    def numpy(self) -> NDArray[Any]:
        """A copy in host memory, of what is there when all that was launched has ended."""
        out = np.empty(self.shape, _arrays.numpy_dtype(self.dtype))
        with _driver.current(self.device):
            _driver.call("cuCtxSynchronize")
            _driver.call("cuMemcpyDtoH", out.ctypes.data, self._memory, self._size)
        return out

    def free(self) -> None:
        with _driver.current(self.device):
            _driver.call("cuMemFree", self._memory)


class _DeviceAdapter(Adapter):
    name = "driver"

    def view(self, array: DeviceArray) -> tuple[int, Layout]:
        misalignment = array.pointer % ALIGNMENT
        return array.pointer, (self, array.shape, None, array.dtype, array.device, misalignment, True)

    def spec(self, layout: Layout) -> Spec:
        _, shape, _, dtype, device, misalignment, writable = layout
        return Spec(self.name, shape, contiguous(shape), dtype, device, misalignment, writable)

    def empty(self, shape: tuple[int, ...], dtype: str, like: DeviceArray) -> tuple[DeviceArray, int]:
        array = DeviceArray(shape, dtype, like.device)
        return array, array.pointer

    def stream(self, array: DeviceArray, device: int) -> int:
        return 0


_arrays.register(DeviceArray, _DeviceAdapter())

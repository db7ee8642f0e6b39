"""Tensor maps of the caller's own: how the tensor memory accelerator is told of an array."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from .._call.arrays import CPU
from .._driver import driver as _driver
from ..errors import ArgumentError
from . import viewing as _viewing
from .signature import MAP_BYTES

TYPES = {
    "float16": ("FLOAT16", 2),
    "bfloat16": ("BFLOAT16", 2),
    "float32": ("FLOAT32", 4),
    "float64": ("FLOAT64", 8),
    "int8": ("UINT8", 1),
    "uint8": ("UINT8", 1),
    "float8_e4m3fn": ("UINT8", 1),
    "int32": ("INT32", 4),
    "uint32": ("UINT32", 4),
}
"""Dtypes, the driver's names of their elements, and bytes of these."""

MAX_BOX = 256
"""Elements of a box along an axis."""

SWIZZLES = (0, 32, 64, 128)


class TensorMap:
    """A tensor map, for a kernel's parameter ``const __grid_constant__ ptx::TensorMap``; `tensor_map` makes it.

    Attributes
    ----------
    array : array
        What it maps, which it keeps alive.
    content : bytes
    """

    __slots__ = ("array", "content")

    def __init__(self, array: Any, content: bytes) -> None:
        self.array = array
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a tensor map has an address, and cannot be copied or pickled; make one of the array's copy.")


def tensor_map(array: Any, box: Sequence[int], *, swizzle: int = 0) -> TensorMap:
    """Describe an array to the tensor memory accelerator (TMA) of sm_90 and newer.

    A kernel of `cufa.jit` takes what this returns as a ``const __grid_constant__ ptx::TensorMap`` and copies boxes of
    the array with it (``ptx/tma.cuh``). Coordinates in the kernel are innermost first, the other way round than `box`.
    Elements of a box that lie outside the array become 0, and count as bytes.

    Parameters
    ----------
    array : array, (...)
        On a GPU, of 1 to 5 axes, not empty: float16, bfloat16, float32, float64, float8_e4m3fn, or integers of 8 or
        32 bits. Its address and all strides but the last are multiples of 16 bytes, and the last is one element.
    box : sequence of int
        Extents of a box, in the order of the array's axes: 1 to 256 each, and a multiple of 16 bytes along the last.
    swizzle : {0, 32, 64, 128}
        Bytes of the rows in shared memory whose chunks of 16 bytes change places, so that columns are read without
        conflicts of banks, too; a box is no wider. With 0 boxes lie as they are.

    Returns
    -------
    TensorMap
        It keeps the array alive.

    Raises
    ------
    TypeError
        If `array` is no array, or of another dtype; or if `box` or `swizzle` are not integers.
    ValueError
        If the array is not on a GPU, or the map cannot describe it or such boxes.
    CudaError
        If the driver refuses the map.

    See Also
    --------
    jit : Makes kernels.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> cufa.tensor_map(np.zeros((64, 64), np.float16), (64, 64), swizzle=128)
    Traceback (most recent call last):
        ...
    cufa.errors.ArgumentError: tensor_map: array is in host memory; pass one on a GPU.
    """
    box, swizzle = _integers("box", box), _integers("swizzle", (swizzle,))[0]
    view, (spec,) = _viewing.view("tensor_map", ("array",), (array,))
    if spec.dtype not in TYPES:
        raise TypeError(f"tensor_map: array is {spec.dtype}; there are maps of {', '.join(TYPES)}.")
    element, size = TYPES[spec.dtype]
    steps = tuple(
        stride * size if extent > 1 else 0 for stride, extent in zip(spec.strides[:-1], spec.shape[:-1], strict=True)
    )
    for wrong, text in (
        (spec.device == CPU, "is in host memory; pass one on a GPU"),
        (not 1 <= len(spec.shape) <= 5, f"has {len(spec.shape)} axes; a map has 1 to 5"),
        (0 in spec.shape, f"has shape {spec.shape}; a map has elements"),
        (spec.misalignment != 0, "does not begin at a multiple of 16 bytes"),
        (spec.shape[-1:] != (1,) and spec.strides[-1:] != (1,), "is not contiguous along its last axis"),
        (
            any(step % 16 or step < 0 for step in steps),
            f"has strides {steps} in bytes; they have to be multiples of 16",
        ),
    ):
        if wrong:
            raise ArgumentError(f"tensor_map: array {text}.")
    if len(box) != len(spec.shape) or not all(1 <= extent <= MAX_BOX for extent in box) or box[-1] * size % 16:
        raise ArgumentError(
            f"tensor_map: box is {box}, for an array of shape {spec.shape}; it has an extent of 1 to {MAX_BOX} for "
            "each axis, and along the last a multiple of 16 bytes."
        )
    if swizzle not in SWIZZLES or 0 < swizzle < box[-1] * size:
        raise ArgumentError(
            f"tensor_map: swizzle is {swizzle}, and rows of a box have {box[-1] * size} bytes; it is 0, or 32, 64 or "
            "128 and no less than that."
        )
    with _driver.current(spec.device):  # no map is made without a context, and the thread may have none
        return TensorMap(array, _encode(element, view.pointers[0], spec.shape[::-1], steps[::-1], box[::-1], swizzle))


def _encode(
    element: str,
    address: int,
    extents: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> bytes:
    """The 128 bytes of a map, of which the axes are innermost first, and strides in bytes without the first."""
    driver = _driver.driver()
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    made = _driver.call(
        "cuTensorMapEncodeTiled",
        getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{element}"),
        len(extents),
        address,
        [u64(extent) for extent in extents],
        [u64(stride) for stride in strides],
        [u32(extent) for extent in box],
        [u32(1)] * len(box),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{f'{swizzle}B' if swizzle else 'NONE'}"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return ctypes.string_at(int(made.getPtr()), MAP_BYTES)


def _integers(name: str, values: Any) -> tuple[int, ...]:
    import operator

    try:
        return tuple(map(operator.index, values))
    except TypeError:
        raise TypeError(f"tensor_map: {name} has to be made of integers.") from None

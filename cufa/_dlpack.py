"""Arrays of any other library, read through DLPack (https://dmlc.github.io/dlpack) with nothing but ctypes."""

from __future__ import annotations

import ctypes
from typing import Any

from ._arrays import ALIGNMENT, CPU, Adapter, Layout, Spec, contiguous
from .errors import UnsupportedError


class DLPackAdapter(Adapter):
    """Any other array, through ``__dlpack__``: its kernels must be in order with CUDA's default stream."""

    name = "dlpack"

    def view(self, array: Any) -> tuple[int, Layout]:
        tensor, capsule, read_only = _dlpack_tensor(array)
        pointer = (tensor.data or 0) + tensor.byte_offset
        ndim = tensor.ndim
        shape = tuple(tensor.shape[:ndim])
        strides = tuple(tensor.strides[:ndim]) if tensor.strides else contiguous(shape)
        dtype = (tensor.code, tensor.bits, tensor.lanes)
        device = (tensor.device_type, tensor.device_id)
        module = type(array).__module__.partition(".")[0]
        del capsule  # the caller holds the array for as long as the address is used
        return pointer, (self, (module, shape), strides, dtype, device, pointer % ALIGNMENT, not read_only)

    def spec(self, layout: Layout) -> Spec:
        _, named_shape, strides, dtype, device, misalignment, writable = layout
        module, shape = named_shape
        kind, ordinal = device
        if kind not in (_DL_CPU, _DL_CUDA, _DL_CUDA_HOST):
            raise UnsupportedError(
                f"{module} arrays of DLPack device type {kind} are not supported; cufa takes CPU (1) and CUDA (2)."
            )
        code, bits, lanes = dtype
        name = f"{_DL_CODES.get(code, f'code{code}_')}{bits}" + (f"x{lanes}" if lanes != 1 else "")
        return Spec(
            module,
            shape,
            strides,
            name,
            ordinal if kind == _DL_CUDA else CPU,
            misalignment,
            writable,
        )

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> tuple[Any, int]:
        if not hasattr(like, "__array_namespace__"):
            raise TypeError(
                f"{type(like).__name__} has no __array_namespace__, so cufa cannot make an array of its kind for "
                "the result; pass out=."
            )
        namespace = like.__array_namespace__()
        array = namespace.empty(shape, dtype=getattr(namespace, dtype), device=like.device)
        return array, self.view(array)[0]

    def stream(self, array: Any, device: int) -> int:
        return 0


_DL_CPU, _DL_CUDA, _DL_CUDA_HOST = 1, 2, 3
_DL_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_DL_READ_ONLY = 1


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _dlpack_tensor(array: Any) -> tuple[_DLTensor, Any, bool]:
    """Borrow `array` by DLPack: its tensor, the capsule that owns it, and whether it is read-only.

    The capsule is not renamed and its deleter not called: when it is dropped, its own destructor does so.
    """
    on_cuda = array.__dlpack_device__()[0] == _DL_CUDA
    # Stream 1 is the default stream: the producer makes it wait for what is still being written.
    options: dict[str, Any] = {"stream": 1} if on_cuda else {}
    try:
        capsule = array.__dlpack__(max_version=(1, 0), **options)
    except TypeError:  # a producer from before DLPack 1.0
        capsule = array.__dlpack__(**options)
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        pointer = _capsule_pointer(capsule, b"dltensor_versioned")
        versioned = ctypes.cast(pointer, ctypes.POINTER(_DLManagedTensorVersioned)).contents
        if versioned.major != 1:
            raise BufferError(f"DLPack version {versioned.major} is not supported; cufa reads version 1.")
        return versioned.tensor, capsule, bool(versioned.flags & _DL_READ_ONLY)
    pointer = _capsule_pointer(capsule, b"dltensor")
    return ctypes.cast(pointer, ctypes.POINTER(_DLManagedTensor)).contents.tensor, capsule, False

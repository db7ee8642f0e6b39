"""Arrays of any other library, read through DLPack (https://dmlc.github.io/dlpack) with nothing but ctypes."""

from __future__ import annotations

import ctypes
from typing import Any

from ..errors import UnsupportedError
from .arrays import ALIGNMENT, CPU, Adapter, Address, Layout, Refused, Spec, contiguous


class DLPackAdapter(Adapter):
    """Any other array, through ``__dlpack__``: its kernels must be in order with CUDA's default stream."""

    name = "dlpack"

    def view(self, array: Any) -> tuple[int, Layout]:
        return self._view(array, {})

    def view_written(self, array: Any) -> tuple[int, Layout]:
        return self._view(array, {"copy": False})

    def _view(self, array: Any, wish: dict[str, Any]) -> tuple[int, Layout]:
        tensor, capsule, flags = _dlpack_tensor(array, wish)
        pointer = Address(tensor.data + tensor.byte_offset if tensor.data else 0)
        # What is exported may be a copy, which the capsule alone keeps alive. Its deleter frees it in the order of the
        # stream that was named to the exporter, on which cufa's kernels run; so after the launch it may go.
        pointer.owner = capsule
        ndim = tensor.ndim
        shape = tuple(tensor.shape[:ndim])
        strides = tuple(tensor.strides[:ndim]) if tensor.strides else contiguous(shape)
        dtype = (tensor.code, tensor.bits, tensor.lanes)
        device = (tensor.device_type, tensor.device_id)
        module = type(array).__module__.partition(".")[0]
        return pointer, (self, (module, shape), strides, dtype, device, pointer % ALIGNMENT, flags)

    def spec(self, layout: Layout) -> Spec:
        _, named_shape, strides, dtype, device, misalignment, flags = layout
        module, shape = named_shape
        kind, ordinal = device
        if kind not in (_DL_CPU, _DL_CUDA, _DL_CUDA_HOST):
            raise UnsupportedError(
                f"{module} arrays of DLPack device type {kind} are not supported; cufa takes CPU (1) and CUDA (2)."
            )
        code, bits, lanes = dtype
        name = f"{_DL_CODES.get(code, f'code{code}_')}{bits}" + (f"x{lanes}" if lanes != 1 else "")
        name = "float8_e4m3fn" if dtype == _DL_E4M3 else name
        return Spec(
            module,
            shape,
            strides,
            name,
            ordinal if kind == _DL_CUDA else CPU,
            misalignment,
            not flags & _DL_READ_ONLY,
            bool(flags & _DL_COPIED),
        )

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> tuple[Any, int]:
        if getattr(like, "__array_namespace__", None) is None:
            raise TypeError(
                f"{type(like).__name__} has no __array_namespace__, so cufa cannot make an array of its kind for "
                "the result; pass out=."
            )
        namespace = like.__array_namespace__()
        array = namespace.empty(shape, dtype=getattr(namespace, dtype), device=like.device)
        try:
            pointer, layout = self.view_written(array)
            spec = self.spec(layout)
        except Refused as refused:
            raise refused.of("cufa", "the result that __array_namespace__ made") from refused.__cause__
        dense = all(a == b or n < 2 for a, b, n in zip(spec.strides, contiguous(shape), shape, strict=True))
        if not spec.writable or spec.copied or not dense or spec.shape != shape:
            raise TypeError(
                f"cufa: {type(like).__name__} has an __array_namespace__ whose empty() makes no array that can be "
                "written row after row; pass out=."
            )
        return array, pointer

    def stream(self, array: Any, device: int) -> int:
        return 0


_DL_CPU, _DL_CUDA, _DL_CUDA_HOST = 1, 2, 3
_DL_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_DL_E4M3 = 10, 8, 1
_DL_READ_ONLY, _DL_COPIED = 1, 2


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


def _dlpack_tensor(array: Any, wish: dict[str, Any]) -> tuple[_DLTensor, Any, int]:
    """Borrow `array` by DLPack: its tensor, the capsule that owns it, and its flags.

    The capsule is not renamed and its deleter not called: when it is dropped, its own destructor does so.
    """
    on_cuda = array.__dlpack_device__()[0] == _DL_CUDA
    # Stream 1 is the default stream: the producer makes it wait for what is still being written.
    stream: dict[str, Any] = {"stream": 1} if on_cuda else {}
    version: dict[str, Any] = {"max_version": (1, 0)}
    capsule = None
    for options in (version | stream | wish, version | stream, stream):
        try:
            capsule = array.__dlpack__(**options)
            break
        except TypeError:  # a producer from before DLPack 1.0, which does not know all of them
            if options is stream:
                raise
        except BufferError as error:  # its word for what it cannot export
            raise Refused(UnsupportedError, f"is not exported by its __dlpack__ ({error}); pass a copy.") from error
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        pointer = _capsule_pointer(capsule, b"dltensor_versioned")
        versioned = ctypes.cast(pointer, ctypes.POINTER(_DLManagedTensorVersioned)).contents
        if versioned.major != 1:
            raise Refused(
                UnsupportedError, f"is exported by DLPack version {versioned.major}; cufa reads version 1 and before."
            )
        return versioned.tensor, capsule, versioned.flags
    if not _capsule_is_valid(capsule, b"dltensor"):
        raise Refused(
            TypeError, f"has a __dlpack__ that returned a {type(capsule).__name__}, and not a capsule that is unused."
        )
    pointer = _capsule_pointer(capsule, b"dltensor")
    return ctypes.cast(pointer, ctypes.POINTER(_DLManagedTensor)).contents.tensor, capsule, 0

"""A view of any array: pointer, shape, strides, dtype, device, stream; and outputs in the caller's framework.

Nothing is imported for a framework: an array of it can only exist where its module is in ``sys.modules``. The
adapter of a type is found once and then looked up by the type itself. What an adapter reads of an array on
every call is left as the framework states it (a *layout*, cheap and hashable); only a layout that was not seen
before is turned into a `Spec`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Hashable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import UnsupportedError

CPU = -1
"""The device of arrays in host memory; GPUs are their CUDA ordinals."""

ALIGNMENT = 16
"""Bytes of the widest copy. A layout says how far from a multiple of it the array begins."""


class Spec(NamedTuple):
    """An array but for its address.

    Attributes
    ----------
    framework : str
        As messages name it: ``cupy``, ``torch``, ``jax``, ``numba``, ``numpy`` or the array's module.
    shape, strides : tuple of int
        Strides in elements.
    dtype : str
        NumPy's name of the dtype, ``bfloat16`` included.
    device : int
        CUDA ordinal, or `CPU`.
    misalignment : int
        Address modulo `ALIGNMENT`.
    writable : bool
    """

    framework: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int
    misalignment: int
    writable: bool


Layout: TypeAlias = tuple["Adapter", Hashable, Hashable, Hashable, Hashable, int, bool]
"""(adapter, shape, strides, dtype, device, misalignment, writable), the middle four in the framework's own terms."""


class Adapter:
    """How cufa reads and makes arrays of one framework."""

    name: str

    def view(self, array: Any) -> tuple[int, Layout]:
        """Address and layout of `array`."""
        raise NotImplementedError

    def spec(self, layout: Layout) -> Spec:
        """`layout` in cufa's terms."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """New C-contiguous array on the device of `like`."""
        raise NotImplementedError

    def stream(self, array: Any, device: int) -> int:
        """Handle of the caller's current stream on `device`; 0 is CUDA's default stream."""
        raise NotImplementedError


class Arrays:
    """The arrays of one call.

    Attributes
    ----------
    pointers : list of int
        Addresses, in the order given; 0 for an array that is None.
    layouts : tuple of (Layout or None)
        The rest, hashable.
    given : tuple
        The arrays themselves.
    """

    __slots__ = ("adapter", "given", "layouts", "pointers")

    def __init__(self, given: tuple[Any, ...], pointers: list[int], layouts: tuple[Layout | None, ...]) -> None:
        self.given = given
        self.pointers = pointers
        self.layouts = layouts
        self.adapter = layouts[0][0]  # type: ignore[index]  # the first array is never optional

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        """New array like the first, and its address."""
        array = self.adapter.empty(shape, dtype, self.given[0])
        return array, self.adapter.view(array)[0]

    def stream(self, device: int) -> int:
        """The caller's current stream on `device`."""
        return self.adapter.stream(self.given[0], device)

    def numpy(self, index: int) -> NDArray[Any] | None:
        """The array at `index`, which is in host memory, as a NumPy array that shares it."""
        array = self.given[index]
        return None if array is None else as_numpy(array)


def view(function: str, names: tuple[str, ...], given: tuple[Any, ...]) -> Arrays:
    """View the arguments `names` of `function`; those that are None stay out. `given[0]` must not be None."""
    pointers, layouts = [], []
    for index, array in enumerate(given):
        if array is None and index:
            pointers.append(0)
            layouts.append(None)
            continue
        adapter = _ADAPTERS.get(type(array)) or _find_adapter(function, names[index], array)
        pointer, layout = adapter.view(array)
        pointers.append(pointer)
        layouts.append(layout)
    return Arrays(given, pointers, tuple(layouts))


def as_numpy(array: Any) -> NDArray[Any]:
    """An array in host memory as a NumPy array that shares it."""
    if isinstance(array, np.ndarray):
        return array
    adapter = _ADAPTERS[type(array)]
    pointer, layout = adapter.view(array)
    return borrow(pointer, adapter.spec(layout), array)


def borrow(pointer: int, spec: Spec, owner: Any) -> NDArray[Any]:
    """NumPy array of the host memory at `pointer`, which keeps `owner` alive."""
    dtype = numpy_dtype(spec.dtype)
    if 0 in spec.shape:
        return np.empty(spec.shape, dtype)
    memory = _HostMemory()
    memory.owner = owner
    memory.__array_interface__ = {
        "data": (pointer, not spec.writable),
        "shape": spec.shape,
        "strides": tuple(stride * dtype.itemsize for stride in spec.strides),
        "typestr": f"|V{dtype.itemsize}",
        "version": 3,
    }
    return np.asarray(memory).view(dtype)


class _HostMemory:
    owner: Any
    __array_interface__: dict[str, Any]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name; bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def element_strides(strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """`strides` in elements; a stride that is no multiple of the element is NumPy's oddity and refused."""
    if any(stride % itemsize for stride in strides):
        raise UnsupportedError(
            f"strides {strides} are not multiples of the {itemsize}-byte element; pass a copy of the array."
        )
    return tuple(stride // itemsize for stride in strides)


class NumpyAdapter(Adapter):
    name = "numpy"

    def view(self, array: Any) -> tuple[int, Layout]:
        pointer, read_only = array.__array_interface__["data"]
        return pointer, (self, array.shape, array.strides, array.dtype, CPU, pointer % ALIGNMENT, not read_only)

    def spec(self, layout: Layout) -> Spec:
        _, shape, strides, dtype, device, misalignment, writable = layout
        assert isinstance(dtype, np.dtype) and isinstance(shape, tuple) and isinstance(strides, tuple)
        if not dtype.isnative:
            raise UnsupportedError(f"byte-swapped arrays ({dtype.str}) are not supported; pass array.astype({dtype.name!r}).")
        strides = element_strides(strides, dtype.itemsize) if dtype.itemsize else strides
        return Spec(self.name, shape, strides, dtype.name, CPU, misalignment, writable)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        return np.empty(shape, numpy_dtype(dtype))


class CupyAdapter(Adapter):
    name = "cupy"

    def __init__(self) -> None:
        cupy = sys.modules["cupy"]
        self._empty = cupy.empty
        self._current_stream = cupy.cuda.get_current_stream
        self._device = cupy.cuda.Device

    def view(self, array: Any) -> tuple[int, Layout]:
        data = array.data
        pointer = data.ptr
        return pointer, (self, array.shape, array.strides, array.dtype, data.device_id, pointer & 15, True)

    def spec(self, layout: Layout) -> Spec:
        _, shape, strides, dtype, device, misalignment, writable = layout
        return Spec(
            self.name,
            shape,  # type: ignore[arg-type]
            element_strides(strides, dtype.itemsize),  # type: ignore[arg-type, attr-defined]
            dtype.name,  # type: ignore[attr-defined]
            device,  # type: ignore[arg-type]
            misalignment,
            writable,
        )

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        device = like.data.device_id
        if device == self._device().id:
            return self._empty(shape, like.dtype if like.dtype.name == dtype else numpy_dtype(dtype))
        with self._device(device):
            return self._empty(shape, numpy_dtype(dtype))

    def stream(self, array: Any, device: int) -> int:
        return self._current_stream(device).ptr  # type: ignore[no-any-return]


class TorchAdapter(Adapter):
    name = "torch"

    def __init__(self) -> None:
        torch = sys.modules["torch"]
        self._torch = torch
        self._empty = torch.empty
        self._stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or self._public_stream

    def _public_stream(self, device: int) -> int:
        return self._torch.cuda.current_stream(device).cuda_stream  # type: ignore[no-any-return]

    def view(self, array: Any) -> tuple[int, Layout]:
        if array.requires_grad and self._torch.is_grad_enabled():
            raise UnsupportedError(
                "cufa: a torch tensor requires grad, and cufa has no backward yet; call under torch.no_grad() or "
                "pass tensor.detach()."
            )
        if array.is_neg():
            raise UnsupportedError("cufa: a torch tensor has its negative bit set; pass tensor.resolve_neg().")
        pointer = array.data_ptr()
        return pointer, (self, array.shape, array.stride(), array.dtype, array.device, pointer & 15, True)

    def spec(self, layout: Layout) -> Spec:
        _, shape, strides, dtype, device, misalignment, writable = layout
        assert isinstance(shape, tuple) and isinstance(strides, tuple)
        kind = device.type  # type: ignore[attr-defined]
        if kind not in ("cuda", "cpu") or self._torch.version.hip:
            raise UnsupportedError(f"torch tensors on {device} are not supported; cufa takes those on cuda and cpu.")
        ordinal = device.index if kind == "cuda" else CPU  # type: ignore[attr-defined]
        name = str(dtype).removeprefix("torch.")
        return Spec(self.name, tuple(shape), tuple(strides), name, ordinal, misalignment, writable)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        return self._empty(shape, dtype=getattr(self._torch, dtype), device=like.device)

    def stream(self, array: Any, device: int) -> int:
        return self._stream(device)  # type: ignore[no-any-return]


class NumbaAdapter(Adapter):
    name = "numba"

    def view(self, array: Any) -> tuple[int, Layout]:
        pointer = array.__cuda_array_interface__["data"][0]
        ordinal = array.gpu_data.context.device.id
        return pointer, (self, array.shape, array.strides, array.dtype, ordinal, pointer % ALIGNMENT, True)

    spec = CupyAdapter.spec

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        cuda = sys.modules["numba.cuda"]
        return cuda.device_array(shape, np.dtype(dtype))

    def stream(self, array: Any, device: int) -> int:
        # An array made on a stream is used on it; else Numba launches on the default stream.
        handle = getattr(array.stream, "handle", 0) if array.stream else 0
        return int(getattr(handle, "value", handle) or 0)


class DLPackAdapter(Adapter):
    """Any other array, through ``__dlpack__``: its kernels must be in order with CUDA's default stream."""

    name = "dlpack"

    def view(self, array: Any) -> tuple[int, Layout]:
        tensor, capsule, read_only = _dlpack_tensor(array)
        pointer = (tensor.data or 0) + tensor.byte_offset
        ndim = tensor.ndim
        shape = tuple(tensor.shape[:ndim])
        strides = tuple(tensor.strides[:ndim]) if tensor.strides else _contiguous(shape)
        dtype = (tensor.code, tensor.bits, tensor.lanes)
        device = (tensor.device_type, tensor.device_id)
        module = type(array).__module__.partition(".")[0]
        del capsule  # the caller holds the array for as long as the address is used
        return pointer, (self, (module, shape), strides, dtype, device, pointer % ALIGNMENT, not read_only)

    def spec(self, layout: Layout) -> Spec:
        _, named_shape, strides, dtype, device, misalignment, writable = layout
        module, shape = named_shape  # type: ignore[misc]
        kind, ordinal = device  # type: ignore[misc]
        if kind not in (_DL_CPU, _DL_CUDA, _DL_CUDA_HOST):
            raise UnsupportedError(
                f"{module} arrays of DLPack device type {kind} are not supported; cufa takes CPU (1) and CUDA (2)."
            )
        code, bits, lanes = dtype  # type: ignore[misc]
        name = f"{_DL_CODES.get(code, f'code{code}_')}{bits}" + (f"x{lanes}" if lanes != 1 else "")
        return Spec(
            module,
            shape,
            strides,  # type: ignore[arg-type]
            name,
            ordinal if kind == _DL_CUDA else CPU,
            misalignment,
            writable,
        )

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        if not hasattr(like, "__array_namespace__"):
            raise TypeError(
                f"{type(like).__name__} has no __array_namespace__, so cufa cannot make an array of its kind for "
                "the result; pass out=."
            )
        namespace = like.__array_namespace__()
        return namespace.empty(shape, dtype=getattr(namespace, dtype), device=like.device)

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


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


_ADAPTERS: dict[type, Adapter] = {}
"""Adapter of every array type seen so far."""

_KNOWN: tuple[tuple[str, str, type[Adapter]], ...] = (
    ("numpy", "ndarray", NumpyAdapter),
    ("cupy", "ndarray", CupyAdapter),
    ("torch", "Tensor", TorchAdapter),
    ("numba.cuda.cudadrv.devicearray", "DeviceNDArray", NumbaAdapter),
)
_INSTANCES: dict[type[Adapter], Adapter] = {}


def is_jax(array: Any) -> bool:
    """Whether `array` is a JAX array or a tracer of one."""
    jax = sys.modules.get("jax")
    return jax is not None and type(array) not in _ADAPTERS and isinstance(array, jax.Array)


def adapter_of(array: Any) -> Adapter | None:
    """The adapter for `array`, or None if it is no array that cufa knows how to read."""
    for module, name, kind in _KNOWN:
        found = getattr(sys.modules.get(module), name, None)
        if found is not None and isinstance(array, found):
            return _INSTANCES.setdefault(kind, kind())
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _INSTANCES.setdefault(DLPackAdapter, DLPackAdapter())
    return None


def register(array_type: type, adapter: Adapter) -> None:
    """Read arrays of `array_type` through `adapter`."""
    _ADAPTERS[array_type] = adapter


def _find_adapter(function: str, name: str, array: Any) -> Adapter:
    if is_jax(array):
        raise TypeError(f"{function}: {name} is a jax array but q is not one; pass arrays of one framework.")
    adapter = adapter_of(array)
    if adapter is None:
        raise TypeError(
            f"{function}: {name} is a {type(array).__name__}, not an array; pass a CuPy, torch, JAX, Numba or NumPy "
            "array, or one with __dlpack__."
        )
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{function}: {name} is a masked array, whose mask would be ignored; pass its .filled(...).")
    _ADAPTERS[type(array)] = adapter
    return adapter

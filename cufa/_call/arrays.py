"""A view of any array: pointer, shape, strides, dtype, device, stream; and outputs in the caller's framework.

Nothing is imported for a framework: an array of it can only exist where its module is in ``sys.modules``. The
adapter of a type is found once and then looked up by the type itself. What an adapter reads of an array on
every call is left as the framework states it (a *layout*, cheap and hashable); only a layout that was not seen
before is turned into a `Spec`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from itertools import islice
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from .._driver import driver as _driver
from ..errors import UnsupportedError

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
    copied : bool
        Whether what is viewed is but a copy of the array, made to be read.
    """

    framework: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int
    misalignment: int
    writable: bool
    copied: bool = False


Layout: TypeAlias = tuple["Adapter", Any, Any, Any, Any, int, Any]
"""(adapter, shape, strides, dtype, device, misalignment, writable), all but the sixth in the framework's own terms."""


Key: TypeAlias = tuple[Any, ...]
"""A Layout or None for each array; or an adapter that all have in common, and what else is in a layout, one array's
behind the other's, without `writable`, which is True, and with a single None for an array that is None."""


def layouts_of(key: Key) -> tuple[Layout | None, ...]:
    """What a key says of each array."""
    if type(key[0]) is tuple:
        return key
    adapter, *others = key
    facts = iter(others)
    return tuple(None if shape is None else (adapter, shape, *islice(facts, 4), True) for shape in facts)


class Refused(Exception):
    """What is wrong with an array: an error of class `kind` as soon as its name is known."""

    def __init__(self, kind: type[Exception], text: str) -> None:
        super().__init__(text)
        self.kind = kind

    def of(self, function: str, name: str) -> Exception:
        """The error to raise of an argument."""
        return self.kind(f"{function}: {name} {self}")


class Recorded(Exception):
    """The framework has to be told of a call: it records, differentiates or transforms it."""


class Address(int):
    """An address that keeps alive what lies there, for as long as it is itself."""

    owner: Any


class Adapter:
    """How cufa reads and makes arrays of one framework."""

    name: str

    current_device: Callable[[], int] = staticmethod(lambda: -1)
    """The framework's current GPU; -1 if only the driver knows."""

    current_stream: Callable[[int], int]
    """`stream` where it does not depend on an array."""

    likens: ClassVar[bool] = False
    """Whether arrays may have a `likeness`."""

    maker: Maker | None = None
    """For the calls of a problem with arrays of which no likeness tells, but a view of all at once; None where it would
    save nothing."""

    def view_plain(self, given: tuple[Any, ...]) -> Arrays | None:
        """View arrays of which none is unusual, as they are; None if one is.

        An adapter may have it for speed: `view` and `view_written` do the same for one array, whatever it is.
        """
        return None

    def view(self, array: Any) -> tuple[int, Layout]:
        """Address and layout of `array`."""
        raise NotImplementedError

    def view_written(self, array: Any) -> tuple[int, Layout]:
        """The same of an array that will be written."""
        return self.view(array)

    def spec(self, layout: Layout) -> Spec:
        """`layout` in cufa's terms."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> tuple[Any, int]:
        """New C-contiguous array on the device of `like`, and its address."""
        raise NotImplementedError

    def empty_like(self, array: Any, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        """`empty` of the shape and dtype of an array that `view_plain` takes and that is C-contiguous.

        An adapter may have it for speed.
        """
        return self.empty(shape, dtype, array)

    def scratch(self, floats: int, like: Any) -> tuple[Any, int]:
        """Memory of so many float32 numbers on the device of `like`, as `empty` makes it, and its address.

        An adapter may have it for speed: it need be no array.
        """
        return self.empty((floats,), "float32", like)

    def stream(self, array: Any, device: int) -> int:
        """Handle of the caller's current stream on `device`; 0 is CUDA's default stream."""
        return self.current_stream(device)

    def likeness(self, arrays: Arrays) -> Likeness | None:
        """What tells arrays like these at once; None where the framework has no such thing, or these are unusual."""
        return None

    def check_memory(self, array: Any) -> None:
        """Raise `Recorded` if an array has no address because it stands for others."""

    def check_call(self) -> None:
        """Raise `Recorded` if the framework has to be told of a call, whatever its arrays are."""


class Maker(Protocol):
    """A framework's own functions by which calls of which all else is known make results on the current GPU.

    What each of them takes is a large part of such a call.
    """

    @property
    def empty(self) -> Callable[..., Any]:
        """New array, from its `arguments`."""

    @property
    def address(self) -> Callable[[Any], int]:
        """That of a new array."""

    @property
    def stream(self) -> Callable[[int], int]:
        """Handle of the caller's current stream on a GPU."""

    @property
    def current_device(self) -> Callable[[], int]:
        """The framework's current GPU."""

    def arguments(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, ...]:
        """What `empty` takes for a C-contiguous array."""

    def scratch(self, floats: int) -> tuple[Any, int]:
        """Memory of so many float32 numbers, and its address."""


class Likeness(Maker, Protocol):
    """Tells arrays of whose call everything is known: those with the layouts of others, in the framework's same state.

    Attributes
    ----------
    recorded : bool
        Whether the framework's autograd has to be told of such a call. Nothing else has to be.
    places : tuple of int
        Those of the arrays that are not None.
    """

    recorded: bool
    places: tuple[int, ...]

    def addresses(self, given: tuple[Any, ...]) -> list[int] | None:
        """Those of arrays that are like these, but for those that are None; None if they are not like these."""


class Arrays:
    """The arrays of one call.

    Attributes
    ----------
    pointers : list of int
        Addresses, in the order given; 0 for an array that is None. What is borrowed is given back when they go, which
        must be after the work is enqueued, and on the CPU after it is done.
    key : tuple
        The rest, hashable: the `layouts`, or the same written flat, which is faster made and looked up.
    given : tuple
        The arrays themselves.
    recorded : bool
        Whether the framework's autograd has to be told of the call.
    """

    __slots__ = ("adapter", "given", "key", "pointers")
    recorded: ClassVar[bool] = False

    def __init__(self, given: tuple[Any, ...], pointers: list[int], key: Key) -> None:
        self.given = given
        self.pointers = pointers
        self.key = key
        first = key[0]  # the first array is never optional
        self.adapter: Adapter = first[0] if type(first) is tuple else first

    @property
    def layouts(self) -> tuple[Layout | None, ...]:
        """Those of the arrays, or None."""
        return layouts_of(self.key)

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        """New array like the first, and its address."""
        return self.adapter.empty(shape, dtype, self.given[0])

    def stream(self, device: int) -> int:
        """The caller's current stream on `device`."""
        return self.adapter.stream(self.given[0], device)

    def numpy(self, index: int) -> NDArray[Any] | None:
        """The array at `index` as a NumPy array, which shares its memory or, for one on a GPU, is a copy.

        The copy is made in the order of the caller's stream, for which this waits.
        """
        array, layout = self.given[index], self.layouts[index]
        if array is None or layout is None:
            return None
        if isinstance(array, np.ndarray):
            return np.asarray(array)  # without the arithmetic of a subclass
        pointer, spec = self.pointers[index], layout[0].spec(layout)
        return borrow(pointer, spec, (array, pointer)) if spec.device == CPU else self._downloaded(pointer, spec)

    def _downloaded(self, pointer: int, spec: Spec) -> NDArray[Any]:
        """The array from its first byte in memory to its last, of which strides then choose the elements."""
        dtype = numpy_dtype(spec.dtype)
        if 0 in spec.shape:
            return np.empty(spec.shape, dtype)
        reach = [(extent - 1) * stride for extent, stride in zip(spec.shape, spec.strides, strict=True)]
        before = -sum(min(0, each) for each in reach)
        flat = np.empty(before + sum(max(0, each) for each in reach) + 1, dtype)
        address = pointer - before * dtype.itemsize
        _driver.download(spec.device, flat.ctypes.data, address, flat.nbytes, self.stream(spec.device))
        strides = tuple(stride * dtype.itemsize for stride in spec.strides)
        return np.ndarray(spec.shape, dtype, flat, before * dtype.itemsize, strides)


class RecordedArrays(Arrays):
    """Those of a call of which autograd has to be told."""

    __slots__ = ()
    recorded = True


def view(function: str, names: tuple[str, ...], given: tuple[Any, ...], written: tuple[int, ...] = ()) -> Arrays:
    """View the arguments `names` of `function`; those that are None stay out. `given[0]` must not be None.

    `written` are the indices of results. If autograd has to be told of the call, `Recorded` is raised.
    """
    arrays = view_recorded(function, names, given, written)
    if arrays.recorded:
        raise Recorded
    return arrays


def view_recorded(
    function: str, names: tuple[str, ...], given: tuple[Any, ...], written: tuple[int, ...] = ()
) -> Arrays:
    """`view` also where nothing but autograd has to be told of the call, and all arrays are plain ones."""
    index = 0
    try:
        first = _ADAPTERS.get(type(given[0])) or _find_adapter(function, names[0], given[0], names[0])
        plain = first.view_plain(given)
        if plain is not None:
            return plain
        pointers = [0] * len(given)
        layouts: list[Layout | None] = [None] * len(given)
        for index, array in enumerate(given):
            if array is None and index:
                continue
            adapter = _ADAPTERS.get(type(array)) or _find_adapter(function, names[index], array, names[0])
            pointer, layout = adapter.view_written(array) if index in written else adapter.view(array)
            if not pointer:
                adapter.check_memory(array)
                _check_empty(layout)
            pointers[index], layouts[index] = pointer, layout
    except Refused as refused:
        raise refused.of(function, names[index]) from refused.__cause__
    return Arrays(given, pointers, tuple(layouts))


def _check_empty(layout: Layout) -> None:
    """Refuse an array that has elements, but no address."""
    try:
        shape = layout[0].spec(layout).shape
    except UnsupportedError as error:
        raise Refused(UnsupportedError, f"cannot be used: {error}") from None
    if 0 not in shape:
        raise Refused(ValueError, f"has shape {shape} but no memory (its address is 0); pass an array that has.")


def compiling(array: Any) -> bool:
    """Whether torch.compile is tracing this very statement, in place of running it, for a call with an array.

    A tensor tells that torch is there. Asking `sys.modules` lets some versions of torch trace all of them, and
    fail if one is imported meanwhile; so only other arrays do, which seldom are in what is compiled.
    """
    if hasattr(array, "requires_grad"):
        import torch

        return bool(torch.compiler.is_dynamo_compiling())
    return "torch._dynamo" in sys.modules and bool(sys.modules["torch"].compiler.is_dynamo_compiling())


def uncompiled(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call `function` where torch.compile traces neither it nor what it calls: a break in its graph."""
    return sys.modules["torch"].compiler.disable(function)(*arguments, **options)


def unscriptable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tell torch.jit.script, which translates sources, that those of `function` cannot be."""

    def refuse() -> NoReturn:
        raise UnsupportedError(
            f"{function.__name__}: torch.jit.script translates Python, and cufa is more than that; use torch.compile "
            "or torch.export."
        )

    function.__prepare_scriptable__ = refuse  # type: ignore[attr-defined]
    return function


def as_numpy(array: Any) -> NDArray[Any]:
    """An array in host memory, which will be written, as a NumPy array that shares it."""
    if isinstance(array, np.ndarray):
        return np.asarray(array)
    # That a framework's own empty() makes may be of a type that was not seen before.
    adapter = _ADAPTERS.get(type(array)) or _find_adapter("cufa", "a result", array)
    pointer, layout = adapter.view_written(array)
    return borrow(pointer, adapter.spec(layout), (array, pointer))


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


@cache  # NumPy looks a name up for a tenth of a microsecond, and bfloat16 takes an import
def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name; bfloat16 and float8_e4m3fn come from ml_dtypes."""
    if name in ("bfloat16", "float8_e4m3fn"):
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found
    return np.dtype(name)


def element_strides(strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """`strides` in elements; a stride that is no multiple of the element is NumPy's oddity and refused."""
    if any(stride % itemsize for stride in strides):
        raise UnsupportedError(
            f"strides {strides} are not multiples of the {itemsize}-byte element; pass a copy of the array."
        )
    return tuple(stride // itemsize for stride in strides)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


class NumpyAdapter(Adapter):
    name = "numpy"

    def view(self, array: Any) -> tuple[int, Layout]:
        if type(array) is not np.ndarray:
            array = np.asarray(array)  # a subclass may state anything
        pointer, read_only = array.__array_interface__["data"]
        return pointer, (
            self,
            array.shape,
            array.strides,
            array.dtype,
            CPU,
            pointer % ALIGNMENT,
            not read_only,
        )

    def spec(self, layout: Layout) -> Spec:
        _, shape, strides, dtype, _, misalignment, writable = layout
        if not dtype.isnative:
            raise UnsupportedError(
                f"byte-swapped arrays ({dtype.str}) are not supported; pass array.astype({dtype.name!r})."
            )
        strides = element_strides(strides, dtype.itemsize) if dtype.itemsize else strides
        return Spec(self.name, shape, strides, dtype.name, CPU, misalignment, writable)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> tuple[Any, int]:
        return np.empty(shape, numpy_dtype(dtype)), 0  # no kernel will ask where it lies


class CupyAdapter(Adapter):
    name = "cupy"

    def __init__(self) -> None:
        cupy = sys.modules["cupy"]
        self._array = cupy.ndarray
        self._current_stream = cupy.cuda.get_current_stream
        self._device = cupy.cuda.Device
        self.current_device = cupy.cuda.runtime.getDevice
        self._alloc = cupy.cuda.alloc
        self.maker = CupyMaker(self)

    def view_plain(self, given: tuple[Any, ...]) -> Arrays | None:
        own = self._array
        pointers: list[int] = []
        key: list[Any] = [self]
        for array in given:
            if array is None:
                pointers.append(0)
                key.append(None)
                continue
            if type(array) is not own:
                return None
            data = array.data
            pointer = data.ptr
            if not pointer:
                return None
            pointers.append(pointer)
            key += array.shape, array.strides, array.dtype, data.device_id, pointer & 15
        return Arrays(given, pointers, tuple(key))

    def view(self, array: Any) -> tuple[int, Layout]:
        data = array.data
        pointer = data.ptr
        return pointer, (self, array.shape, array.strides, array.dtype, data.device_id, pointer & 15, True)

    def spec(self, layout: Layout) -> Spec:
        _, shape, strides, dtype, device, misalignment, writable = layout
        strides = element_strides(strides, dtype.itemsize)
        return Spec(self.name, shape, strides, dtype.name, device, misalignment, writable)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> tuple[Any, int]:
        device = like.data.device_id
        if device == self.current_device():
            array = self._array(shape, numpy_dtype(dtype))  # as empty() does, a frame later
        else:
            with self._device(device):
                array = self._array(shape, numpy_dtype(dtype))
        return array, array.data.ptr

    def scratch(self, floats: int, like: Any) -> tuple[Any, int]:
        device = like.data.device_id
        if device == self.current_device():
            memory = self._alloc(4 * floats)
        else:
            with self._device(device):
                memory = self._alloc(4 * floats)
        return memory, memory.ptr

    def current_stream(self, device: int) -> int:
        return self._current_stream(device).ptr  # type: ignore[no-any-return]


class CupyMaker:
    """The `Maker` of CuPy's arrays."""

    __slots__ = "_alloc", "address", "current_device", "empty", "stream"

    def __init__(self, adapter: CupyAdapter) -> None:
        self.empty, self._alloc = adapter._array, adapter._alloc
        self.address = attrgetter("data.ptr")
        self.current_device, self.stream = adapter.current_device, adapter.current_stream

    def arguments(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, ...]:
        return tuple(shape), numpy_dtype(dtype)

    def scratch(self, floats: int) -> tuple[Any, int]:
        memory = self._alloc(4 * floats)
        return memory, memory.ptr


class TorchAdapter(Adapter):
    name = "torch"
    likens = True

    def __init__(self) -> None:
        torch = sys.modules["torch"]
        self._torch = torch
        self._types = {torch.Tensor, torch.nn.Parameter}
        self._empty, self._empty_like = torch.empty, torch.empty_like
        self._records = torch.is_grad_enabled
        self._dtypes = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "int32")}
        self.current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or self._public_stream
        self.current_device = getattr(torch._C, "_cuda_getDevice", None) or torch.cuda.current_device
        self._forward_ad = torch.autograd.forward_ad
        self._tracing_state = torch._C._get_tracing_state
        self._dispatch_modes = torch._C._len_torch_dispatch_stack
        self._function_modes = torch._C._len_torch_function_stack
        self._autocast = getattr(torch._C, "_is_any_autocast_enabled", torch.is_autocast_enabled)
        self._dispatch_key_included = torch._C._dispatch_tls_is_dispatch_key_included

    def _public_stream(self, device: int) -> int:
        return self._torch.cuda.current_stream(device).cuda_stream  # type: ignore[no-any-return]

    def view_plain(self, given: tuple[Any, ...]) -> Arrays | None:
        types = self._types
        requires_grad = False
        pointers: list[int] = []
        key: list[Any] = [self]
        try:
            for array in given:
                if array is None:
                    pointers.append(0)
                    key.append(None)
                    continue
                if type(array) not in types:
                    return None
                pointer = array.data_ptr()
                if not pointer or array.is_neg():
                    return None
                if array.requires_grad:
                    requires_grad = True
                pointers.append(pointer)
                key += array.shape, array.stride(), array.dtype, array.device, pointer & 15
        except RuntimeError:  # torch's word for a tensor that is not a strided one in memory
            return None
        kind = RecordedArrays if requires_grad and self._records() else Arrays
        return kind(given, pointers, tuple(key))

    def view(self, array: Any) -> tuple[int, Layout]:
        if array.requires_grad and self._records():
            raise Recorded
        if array.is_neg():
            raise UnsupportedError("cufa: a torch tensor has its negative bit set; pass tensor.resolve_neg().")
        try:
            pointer = array.data_ptr()
            return pointer, (self, array.shape, array.stride(), array.dtype, array.device, pointer & 15, True)
        except RuntimeError as error:  # torch's word for a tensor that is not a strided one in memory
            self.check_memory(array)
            self._refuse(array, error)

    def check_memory(self, array: Any) -> None:
        if self._torch._C._functorch.is_functorch_wrapped_tensor(array):
            raise Recorded

    def check_call(self) -> None:
        if (
            self._forward_ad._current_level >= 0
            or self._tracing_state() is not None
            or self._dispatch_modes()
            or self._autocast()
            or (self._function_modes() and self._dispatch_key_included("PreDispatch"))
        ):
            raise Recorded

    def likeness(self, arrays: Arrays) -> Likeness | None:
        from .likeness import of_tensors  # nothing that is called once needs it

        return of_tensors(self._torch, arrays)

    def _refuse(self, array: Any, error: RuntimeError) -> NoReturn:
        """Say what kind of tensor it is that has no address or no strides."""
        torch = self._torch
        if array.is_nested:
            raise Refused(
                UnsupportedError,
                "is a nested torch tensor; pass its values() and offsets() to cufa.attention_varlen.",
            ) from error
        if array.layout is not torch.strided:
            name = str(array.layout).removeprefix("torch.")
            raise Refused(
                UnsupportedError, f"is a torch tensor of layout {name}; pass a strided one, as to_dense() makes."
            ) from error
        raise Refused(
            UnsupportedError,
            f"is a torch tensor without memory of its own ({str(error).splitlines()[0]}); pass one that has.",
        ) from error

    def spec(self, layout: Layout) -> Spec:
        _, shape, strides, dtype, device, misalignment, writable = layout
        kind = device.type
        if kind not in ("cuda", "cpu") or self._torch.version.hip:
            raise UnsupportedError(f"torch tensors on {device} are not supported; cufa takes those on cuda and cpu.")
        ordinal = device.index if kind == "cuda" else CPU
        name = str(dtype).removeprefix("torch.")
        return Spec(self.name, tuple(shape), tuple(strides), name, ordinal, misalignment, writable)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> tuple[Any, int]:
        # Numbers take torch two thirds of the time of a tuple; none would be a call without arguments.
        array = self._empty(*shape or ((),), dtype=self._dtypes[dtype], device=like.device)
        return array, array.data_ptr()

    def empty_like(self, array: Any, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        found = self._empty_like(array)  # three quarters of the time of empty(), which is told more
        return found, found.data_ptr()


class NumbaAdapter(Adapter):
    name = "numba"

    def view(self, array: Any) -> tuple[int, Layout]:
        pointer = array.__cuda_array_interface__["data"][0]
        ordinal = array.gpu_data.context.device.id
        return pointer, (self, array.shape, array.strides, array.dtype, ordinal, pointer % ALIGNMENT, True)

    spec = CupyAdapter.spec

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> tuple[Any, int]:
        array = sys.modules["numba.cuda"].device_array(shape, np.dtype(dtype))
        return array, self.view(array)[0]

    def stream(self, array: Any, device: int) -> int:
        # An array made on a stream is used on it; else Numba launches on the default stream.
        handle = getattr(array.stream, "handle", 0) if array.stream else 0
        return int(getattr(handle, "value", handle) or 0)


_ADAPTERS: dict[type, Adapter] = {}
"""Adapters of the array types themselves, which live as long as their modules, and of those that were registered."""

_OTHERS: WeakKeyDictionary[type, Adapter] = WeakKeyDictionary()
"""Of their subclasses and of whatever has ``__dlpack__``, which may be made in a function and then be forgotten."""

_KNOWN: tuple[tuple[str, str, type[Adapter]], ...] = (
    ("numpy", "ndarray", NumpyAdapter),
    ("cupy", "ndarray", CupyAdapter),
    ("torch.nn", "Parameter", TorchAdapter),
    ("torch", "Tensor", TorchAdapter),
    ("numba.cuda.cudadrv.devicearray", "DeviceNDArray", NumbaAdapter),
)
_INSTANCES: dict[type[Adapter], Adapter] = {}


def is_jax(array: Any) -> bool:
    """Whether `array` is a JAX array or a tracer of one."""
    jax = sys.modules.get("jax")
    return jax is not None and type(array) not in _ADAPTERS and isinstance(array, jax.Array)


def register(array_type: type, adapter: Adapter) -> None:
    """Read arrays of `array_type` through `adapter`."""
    _ADAPTERS[array_type] = adapter


def _find_adapter(function: str, name: str, array: Any, leading: str = "") -> Adapter:
    """The adapter of an array whose type is not in `_ADAPTERS`; it is remembered. `leading` is a call's first array."""
    array_type = type(array)
    known = _OTHERS.get(array_type)
    if known is not None:
        return known
    if is_jax(array):
        raise TypeError(f"{function}: {name} is a jax array but {leading} is not one; pass arrays of one framework.")
    for module, attribute, kind in _KNOWN:
        found = getattr(sys.modules.get(module), attribute, None)
        if found is not None and isinstance(array, found):
            check_subclass(array_type)
            adapter = _INSTANCES.setdefault(kind, kind())
            (_ADAPTERS if array_type is found else _OTHERS)[array_type] = adapter
            return adapter
    if isinstance(array, type):
        raise Refused(TypeError, f"is the class {array.__name__}, not an array; pass an array of it.")
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        from .dlpack import DLPackAdapter

        adapter = _OTHERS[array_type] = _INSTANCES.setdefault(DLPackAdapter, DLPackAdapter())
        return adapter
    raise TypeError(
        f"{function}: {name} is a {array_type.__name__}, not an array; pass a CuPy, torch, JAX, Numba or NumPy "
        "array, or one with __dlpack__."
    )


def check_subclass(array_type: type) -> None:
    """Refuse those subclasses of known arrays whose elements are not simply what lies in memory."""
    masked = sys.modules.get("numpy.ma")  # which NumPy imports late, for it takes 30 ms
    if masked is not None and issubclass(array_type, masked.MaskedArray):
        raise Refused(TypeError, "is a masked array, whose mask would be ignored; pass its .filled(...).")
    torch = sys.modules.get("torch")
    if torch is None or not issubclass(array_type, torch.Tensor) or not wraps(array_type):
        return
    if any(base.__name__ in _NOT_SEEN_THROUGH for base in array_type.__mro__):
        raise Refused(
            UnsupportedError,
            f"is a {array_type.__name__}, whose elements are not simply what lies in memory; pass a plain torch "
            "tensor, as to_local() of a DTensor is one.",
        )
    raise Recorded


_NOT_SEEN_THROUGH = {"DTensor", "NestedTensor"}
"""Classes of torch's that wrap tensors, and whose own dispatch knows nothing of cufa."""


def wraps(array_type: Any) -> bool:
    """Whether tensors of the type wrap others, and are told of what is done with them: FakeTensor, FunctionalTensor."""
    torch = sys.modules["torch"]
    return bool(array_type.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__)

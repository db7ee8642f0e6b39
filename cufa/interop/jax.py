"""JAX: cufa inside a program that XLA compiles.

XLA owns the streams and the memory of JAX arrays, so nothing may be launched behind its back. A call becomes a foreign
function of XLA's (see interop/xla.py): at its place in the program, XLA hands over the buffers, those for the results
included, and its stream. Around it stand what vmap does with it (see interop/folding.py) and its derivative, both made
from the records of operations alone.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np

from .._call import problem as _problem
from .._call.arrays import CPU, Arrays, Layout
from .._call.options import Options
from .._operations.call import compute_on_cpu, planned, prepare
from .._operations.features import wanting
from .._operations.operation import Operation, gradients_of
from ..errors import UnsupportedError
from . import dividing as _dividing
from . import folding as _folding
from . import xla as _xla
from .xla import Call, layout_of

TARGET = "cufa"
"""The name of the foreign function."""


def call(operation: Operation, given: tuple[Any, ...], options: Options) -> Any:
    """Call an operation with JAX arrays or tracers, in its order."""
    check_given(operation, given)
    # Checked here, where the user's call is; values of offsets, which have none in a program, are not.
    arrays = view(operation, given)
    _problem.check(operation, arrays, options)
    if not FOREIGN:
        _callback()  # or the lack of it, told where the user's call is
    deterministic = options.deterministic or _deterministic()
    program = _program(_call_of(operation, arrays.layouts, options), _device(given[0]), deterministic)
    results = program(*(array for array in given if array is not None))
    return results[0] if len(results) == 1 else results


def check_given(operation: Operation, given: tuple[Any, ...]) -> None:
    """Refuse what would be written."""
    if operation.changed:
        raise UnsupportedError(
            f"{operation.name}: JAX arrays cannot change in place, and {operation.changed[0]} may have to; pass NumPy, "
            "CuPy or torch arrays."
        )
    for index in operation.written_indices:
        if given[index] is not None:
            name = operation.arrays[index]
            raise UnsupportedError(
                f"{operation.name}: {name} is not supported for JAX arrays, which cannot be written."
            )


def view(operation: Operation, given: tuple[Any, ...]) -> Arrays:
    """The arguments without their addresses, which JAX shows only inside a program."""
    layouts: list[Layout | None] = []
    for name, array in zip(operation.arrays, given, strict=True):
        if array is not None:
            _check_readable(operation.name, operation.arrays[0], name, array)
        layouts.append(None if array is None else layout_of(tuple(array.shape), np.dtype(array.dtype), _device(array)))
    return Arrays(given, [0] * len(given), tuple(layouts))


def _check_readable(function: str, leading: str, name: str, array: Any) -> None:
    if not isinstance(array, jax.Array):
        raise TypeError(
            f"{function}: {name} is a {type(array).__name__} but {leading} is a jax array; pass arrays of one "
            "framework."
        )
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        raise ValueError(f"{function}: {name} has dtype {array.dtype}, which is no number; pass an array of numbers.")
    if not all(type(extent) is int for extent in array.shape):
        raise UnsupportedError(
            f"{function}: {name} has the symbolic shape {array.shape}, and a kernel is chosen by its numbers; export "
            "with those."
        )
    if isinstance(array, jax.core.Tracer):
        return
    if array.is_deleted():
        raise ValueError(f"{function}: {name} was deleted, or donated to a program; pass an array that still is.")
    devices = 1 if FOREIGN else len(array.sharding.device_set)
    if devices > 1:
        raise UnsupportedError(
            f"{function}: {name} lies on {devices} devices; call under jax.shard_map, which passes each device its own "
            "part, or move it to one with jax.device_put."
        )


def _device(array: Any) -> int:
    """The GPU, or `CPU`; a tracer's is not known, and likely JAX's default."""
    if isinstance(array, jax.core.Tracer):
        chosen = jax.config.jax_default_device  # a device, the name of a platform, or None
        return CPU if (getattr(chosen, "platform", chosen) or jax.default_backend()) == "cpu" else 0
    return CPU if next(iter(array.devices())).platform == "cpu" else 0


def _call_of(operation: Operation, layouts: tuple[Layout | None, ...], options: Options) -> Call:
    return Call(operation, tuple(index for index, layout in enumerate(layouts) if layout is not None), options)


# --- Derivatives ------------------------------------------------------------------------------------


def _deterministic() -> bool:
    """Whether XLA is told to give the same bits in every run: then gradients do so, too."""
    words = [word.partition("=") for word in os.environ.get("XLA_FLAGS", "").split()]
    asked = [value for name, _, value in words if name == "--xla_gpu_deterministic_ops"]
    return bool(asked) and asked[-1].lower() in ("", "1", "true", "t", "yes", "y")


@lru_cache(maxsize=256)
def _program(call: Call, device: int, deterministic: bool) -> Any:
    """The jitted, differentiable call: compiled once for arrays of one shape, however the options were written."""
    differentiable = _differentiable(call, device, deterministic)

    def program(*arrays: Any) -> Any:
        return differentiable(*_alike(arrays))

    program.__name__ = call.operation.name  # which profiles show
    return jax.jit(program)


def _differentiable(call: Call, device: int, deterministic: bool) -> Any:
    all_gradients = gradients_of(call.operation)
    if all_gradients is None:
        return _once(call, device)
    gives, reads_lse = call.operation.gives, "lse" in all_gradients.arrays
    whole_options = call.options._replace(return_lse=call.options.return_lse or reads_lse)
    whole = _once(call._replace(options=whole_options), device)
    options = call.options._replace(return_lse=False, deterministic=deterministic)

    def forward(*primals: Any) -> tuple[Any, Any]:
        arrays = tuple(primal.value for primal in primals)
        results = whole(*arrays)
        asked_for = results if whole_options == call.options else results[:-1]
        # What is differentiated is told by the structure of what is kept, since that is no number of the program.
        differentiated = tuple(() if primal.perturbed else None for primal in primals)
        return asked_for, (arrays, results, differentiated)

    def backward(saved: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
        arrays, results, differentiated = saved
        wanted = (f"d{name}" for name, each in zip(call.names, differentiated, strict=True) if each is not None)
        gradients = wanting(all_gradients, [*wanted])
        named = dict(zip(call.names, arrays, strict=True)) | dict(zip(gives, results, strict=False))
        for name, result, cotangent in zip(gives, results, map(_known, cotangents), strict=False):
            named[f"d{name}"] = jax.numpy.zeros_like(result) if cotangent is None and name != "lse" else cotangent
        present = tuple(index for index, name in enumerate(gradients.arrays) if named.get(name) is not None)
        asked = Call(gradients, present, options)
        given = [named[name] for name in asked.names]
        gradient_names = (each.name for each in asked.problem(_layouts(device, *given)).results)
        found = dict(zip(gradient_names, _once(asked, device)(*given), strict=True))
        return tuple(_like(array, found.get(f"d{name}")) for name, array in zip(call.names, arrays, strict=True))

    raw = _raw(call, device)
    program = jax.custom_vjp(lambda *arrays: raw(*arrays))
    program.defvjp(forward, backward, symbolic_zeros=True)
    return lambda *arrays: program(*_guarded(call, all_gradients, device, arrays))


def _guarded(call: Call, gradients: Operation, device: int, arrays: tuple[Any, ...]) -> list[Any]:
    """The arrays, of which those that have no gradient refuse to be differentiated, for JAX would take it for 0.

    What is not differentiated is not refused, under any transformation. But JAX differentiates by all results of a
    `jax.custom_vjp`, or of a `jax.lax.optimization_barrier`, if by one of its arguments.
    """
    problem = call.problem(_layouts(device, *arrays))
    known = {each.name for each in gradients.results(replace(problem, operation=gradients, memo={}))}
    return [
        _without_gradient(call.operation.name, name)(array)
        if f"d{name}" not in known and jax.numpy.issubdtype(array.dtype, jax.numpy.inexact)
        else array
        for name, array in zip(call.names, arrays, strict=True)
    ]


@cache
def _without_gradient(function: str, name: str) -> Any:
    """The identity, which refuses to be differentiated.

    The forward rule of a call, which JAX tells the same, must not raise: JAX keeps what the rule gave for derivatives
    by other arrays, and loses the structure of it by the exception.
    """
    return _refusing(
        lambda array: array,
        f"{function}: {name} is differentiated, but has no gradient; pass jax.lax.stop_gradient({name}).",
    )


def _like(array: Any, gradient: Any) -> Any:
    """A gradient of the type that JAX expects; None where there is none."""
    if gradient is None:
        return None
    gradient = gradient.astype(array.dtype)
    typed = next(filter(_dividing.explicit, (array, gradient)), None)
    if typed is None:
        return gradient
    mesh, spec = jax.typeof(typed).sharding.mesh, jax.typeof(array).sharding.spec
    return jax.sharding.reshard(gradient, jax.sharding.NamedSharding(mesh, spec))


def _known(cotangent: Any) -> Any:
    """A cotangent; None for one that is 0 as nothing depends on the result."""
    return None if isinstance(cotangent, jax.custom_derivatives.SymbolicZero) else cotangent


@lru_cache(maxsize=512)
def _once(call: Call, device: int) -> Any:
    """The call, which refuses to be differentiated in words of cufa's."""
    return _refusing(
        _raw(call, device),
        f"{call.operation.name}: JAX asks for the derivative of a gradient, or of what one is made of, and cufa "
        "computes first derivatives only, in reverse mode; differentiate once, or pass jax.lax.stop_gradient of the "
        "arrays.",
    )


def _refusing(function: Any, sentence: str) -> Any:
    """A function of arrays that refuses to be differentiated."""

    def refuse(*_: Any) -> NoReturn:
        raise UnsupportedError(sentence)

    program = jax.custom_jvp(lambda *arrays: function(*arrays))
    program.defjvp(refuse)
    return program


# --- Under shard_map --------------------------------------------------------------------------------


def _varying(arrays: tuple[Any, ...]) -> frozenset[str]:
    """The axes of shard_map's mesh along which some of the arrays vary."""
    if not hasattr(jax, "typeof"):
        return frozenset()
    types = [jax.typeof(array) for array in arrays]
    return frozenset().union(
        *(getattr(getattr(each, "mat", each), "varying", getattr(each, "vma", ())) for each in types)
    )


def _alike(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """All arrays varying along the same axes, so that gradients of those that did not are added up along them."""
    axes = _varying(arrays)
    if not axes:
        return arrays
    missing = [tuple(axes - _varying((array,))) for array in arrays]
    cast = partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary
    return tuple(cast(array, names) if names else array for array, names in zip(arrays, missing, strict=True))


def _struct(shape: tuple[int, ...], dtype: Any, arrays: tuple[Any, ...]) -> Any:
    """What JAX is told of a result; versions of it name the axes along which it varies differently."""
    varying = _varying(arrays)
    if not varying:
        return jax.ShapeDtypeStruct(shape, dtype)
    kind = getattr(jax.sharding, "ManualAxisType", None)
    if kind is None:
        return jax.ShapeDtypeStruct(shape, dtype, vma=varying)
    sharding = jax.sharding.NamedSharding(jax.typeof(arrays[0]).sharding.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, manual_axis_type=kind(varying=varying))


# --- What stands in the program ---------------------------------------------------------------------


@lru_cache(maxsize=512)
def _raw(call: Call, device: int) -> Any:
    """The call as one primitive, which vmap folds into one of a larger problem."""
    return _folding.folding(call, device, partial(_divide, call, device))


def _divide(call: Call, device: int, *arrays: Any) -> tuple[Any, ...]:
    """Put the call into the program that is being traced, which may be one for several devices."""
    place: Any = partial(_place, call, device)
    if FOREIGN and jax.device_count() > 1 and not _dividing.within_one():
        place = _dividing.divided(call, _layouts(device, *arrays), place)
    return tuple(place(*arrays))


def _layouts(device: int, *arrays: Any) -> tuple[Layout, ...]:
    return tuple(layout_of(tuple(array.shape), np.dtype(array.dtype), device) for array in arrays)


def _place(call: Call, device: int, *arrays: Any) -> tuple[Any, ...]:
    """Put the call into the program that is being traced.

    Memory that the call takes while it runs, if it takes any, is one more result.
    """
    layouts = _layouts(device, *arrays)
    problem = call.problem(layouts)
    floats = 0 if problem.device == CPU else planned(problem).floats
    results = [(each.shape, jax.numpy.dtype(each.dtype)) for each in problem.results]
    if floats:
        results.append(((floats,), np.dtype(np.float32)))
    shapes = tuple(_struct(shape, dtype, arrays) for shape, dtype in results)
    if FOREIGN:
        found = jax.ffi.ffi_call(TARGET, shapes)(*arrays, call=_xla.description_of(call, layouts))
    else:
        found = _callback()(partial(_compute, call), shapes)(*arrays)
    return tuple(found[: len(problem.results)])


def _version() -> tuple[int, int]:
    """The version of XLA's interface for foreign functions, as its header tells it.

    XLA looks at functions no sooner than JAX makes a backend, which a refused one makes fail; and up to JAX 0.7 at
    least, it refuses all minor versions but its own, and does not say which that is.
    """
    try:
        text = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    except (OSError, RuntimeError):  # JAX was installed without headers
        return _xla.VERSION
    major, minor = (re.search(rf"^#define XLA_FFI_API_{part} (\d+)", text, re.MULTILINE) for part in ("MAJOR", "MINOR"))
    return (int(major[1]), int(minor[1])) if major and minor else _xla.VERSION


def _registered() -> bool:
    """Whether XLA has taken cufa's foreign functions; not where its interface is another, and all else is an error."""
    if not hasattr(jax, "ffi"):
        return False
    version = _version()
    if version[0] != _xla.VERSION[0]:
        return False
    for platform, stages in _handlers(version).items():
        capsules = {stage: jax.ffi.pycapsule(_address(handler)) for stage, handler in stages.items()}
        whole = capsules if len(capsules) > 1 else capsules["execute"]
        try:
            jax.ffi.register_ffi_target(TARGET, whole, platform=platform)
        except Exception as error:
            told = re.search(r"incompatible with the framework's API version \((\d+)\.", str(error))
            if told is None or int(told[1]) == _xla.VERSION[0]:
                raise
            return False
    return True


def _address(handler: Any) -> Any:
    import ctypes

    return ctypes.cast(handler, ctypes.c_void_p)


@cache  # for as long as the process lives, as XLA keeps their addresses
def _handlers(version: tuple[int, int]) -> dict[str, dict[str, Any]]:
    on_cpu = _xla.handler(lambda frame: _xla.run_on_cpu(frame), version)
    on_gpu = _xla.handler(lambda frame: _xla.run_on_gpu(frame), version)
    return {"cpu": {"execute": on_cpu}, "CUDA": {"instantiate": on_gpu, "execute": on_gpu}}


FOREIGN = _registered()


# --- Where XLA's interface for foreign functions is not known -----------------------------------------


def _frames_of_cufa() -> int:
    """How many frames, from the caller's on, are of this package."""
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "cufa":
        frame, count = frame.f_back, count + 1
    return count


@lru_cache(maxsize=1)
def _callback() -> Any:
    """JAX's own foreign function that calls Python. That it is used is said once."""
    major = _xla.VERSION[0]
    try:
        from jax.experimental.buffer_callback import buffer_callback
    except ImportError:
        raise UnsupportedError(
            f"cufa: JAX {jax.__version__} has neither XLA's interface for foreign functions in a version {major}.x nor "
            "jax.experimental.buffer_callback; install a JAX that has one, as all from 0.6 to 0.11 do."
        ) from None
    warnings.warn(
        f"cufa: JAX {jax.__version__} does not have XLA's interface for foreign functions in a version {major}.x, so "
        "calls are buffer_callbacks: programs with them cannot be exported, and are divided among devices by "
        "jax.shard_map alone.",
        stacklevel=_frames_of_cufa() + 1,  # who called cufa's function
    )
    return partial(buffer_callback, vmap_method="sequential")


def _compute(call: Call, context: Any, written: Any, *buffers: Any) -> None:
    """What runs within the program, on XLA's stream."""
    pointers = [_pointer_of(buffer) for buffer in (*buffers, *written)]
    first = next((pointer for pointer in pointers if pointer[0]), (0, CPU))
    device = CPU if first[1] == CPU else _xla.device_of(context.stream)
    layouts = [
        layout_of(tuple(buffer.shape), np.dtype(buffer.dtype), device, pointer)
        for buffer, (pointer, _) in zip(buffers, pointers, strict=False)
    ]
    problem = call.problem(tuple(layouts))
    addresses = [pointer for pointer, _ in pointers]
    inputs = call.given(addresses[: len(buffers)], 0)
    if device == CPU:
        arrays = Arrays(tuple(call.given(buffers)), inputs, tuple(call.given(layouts)))
        found = [np.asarray(result) for result in written[: len(problem.results)]]
        compute_on_cpu(arrays, problem, found, call.options.late)
        return
    there = written[len(problem.results) :]
    floats = int(np.prod(there[0].shape)) if there else 0
    prepared = prepare(problem, context.stream)
    if prepared.floats > floats:  # traced for another device than it runs on
        prepared = prepare(problem, context.stream, copied=False)
    if prepared.floats > floats:
        raise UnsupportedError(
            f"{call.operation.name}: traced for another device than it runs on; make the GPU JAX's default backend."
        )
    results = addresses[len(buffers) : len(buffers) + len(problem.results)]
    prepared([*inputs, *results, *call.late_members], addresses[-1] if there else 0, context.stream, -1)


def _pointer_of(buffer: Any) -> tuple[int, int]:
    """The address of a buffer, and whether it is the CPU's."""
    try:
        return buffer.__cuda_array_interface__["data"][0], 0
    except (jax.errors.JaxRuntimeError, AttributeError):  # a buffer in host memory
        return np.asarray(buffer).__array_interface__["data"][0], CPU

"""JAX: cufa inside a program that XLA compiles.

XLA owns the streams and the memory of JAX arrays, so nothing may be launched behind its back. The call becomes a
``jax.experimental.buffer_callback``: at its place in the program, XLA hands over the buffers, those for the results
included, and its stream. It works under jit, scan, remat and shard_map; vmap loops.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental.buffer_callback import Buffer, buffer_callback

from .._call import problem as _problem
from .._call.arrays import ALIGNMENT, CPU, Adapter, Arrays, Layout, Spec, contiguous, register
from .._call.options import Options
from .._driver import driver as _driver
from .._operations.call import compute_on_cpu, planned, prepare
from .._operations.operation import Operation
from ..errors import UnsupportedError


class JaxAdapter(Adapter):
    """The buffers of a callback, and arrays or tracers as far as their shape and dtype go."""

    name = "jax"

    def view(self, array: Any) -> tuple[int, Layout]:
        pointer, device = (0, _default_device())
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
            device = CPU if next(iter(array.devices())).platform == "cpu" else 0
        if isinstance(array, Buffer):
            try:
                pointer = array.__cuda_array_interface__["data"][0]
                device = _device_of(pointer) if pointer else 0
            except (jax.errors.JaxRuntimeError, AttributeError):  # a buffer in host memory
                pointer, device = np.asarray(array).__array_interface__["data"][0], CPU
        return pointer, (
            self,
            tuple(array.shape),
            None,
            np.dtype(array.dtype),
            device,
            pointer % ALIGNMENT,
            True,
        )

    def spec(self, layout: Layout) -> Spec:
        _, shape, _, dtype, device, misalignment, writable = layout
        return Spec(self.name, shape, contiguous(shape), dtype.name, device, misalignment, writable)


ADAPTER = JaxAdapter()


def call(operation: Operation, given: tuple[Any, ...], options: Options) -> Any:
    """Call an operation with JAX arrays or tracers, in its order."""
    for index in operation.written_indices:
        if given[index] is not None:
            name = operation.arrays[index]
            raise UnsupportedError(
                f"{operation.name}: {name} is not supported for JAX arrays, which cannot be written."
            )
    arrays = view(operation, given)
    # Checked here, where the user's call is; values of offsets, which have none in a program, are not.
    _problem.check(operation, arrays, options)
    results = _program(operation, arrays.layouts, options)(*(array for array in given if array is not None))
    return results[0] if len(results) == 1 else tuple(results)


def view(operation: Operation, given: tuple[Any, ...]) -> Arrays:
    """The arguments without their addresses, which JAX shows only inside a callback."""
    for name, array in zip(operation.arrays, given, strict=True):
        if array is not None and not isinstance(array, jax.Array):
            raise TypeError(
                f"{operation.name}: {name} is a {type(array).__name__} but q is a jax array; pass arrays of one "
                "framework."
            )
        if array is not None:
            _check_readable(operation.name, name, array)
    return _view(given)


def _check_readable(function: str, name: str, array: jax.Array) -> None:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        raise ValueError(f"{function}: {name} has dtype {array.dtype}, which is no number; pass an array of numbers.")
    if isinstance(array, jax.core.Tracer):
        return
    if array.is_deleted():
        raise ValueError(f"{function}: {name} was deleted, or donated to a program; pass an array that still is.")
    devices = len(array.sharding.device_set)
    if devices > 1:
        raise UnsupportedError(
            f"{function}: {name} lies on {devices} devices; call under jax.shard_map, which passes each device its own "
            "part, or move it to one with jax.device_put."
        )


def _view(given: tuple[Any, ...]) -> Arrays:
    views = [(0, None) if array is None else ADAPTER.view(array) for array in given]
    return Arrays(given, [pointer for pointer, _ in views], tuple(layout for _, layout in views))


Layouts = tuple[Layout | None, ...]


def _present(layouts: Layouts) -> tuple[int, ...]:
    """Which arguments there are."""
    return tuple(index for index, layout in enumerate(layouts) if layout is not None)


@lru_cache(maxsize=256)
def _program(operation: Operation, layouts: Layouts, options: Options) -> Any:
    """The jitted callback for arrays of these layouts: compiled once, however the options were written.

    Memory that the call takes while it runs, if it takes any, is one more result.
    """
    problem = _problem.check(operation, Arrays((), [], layouts), options)
    floats = 0 if problem.device == CPU else planned(problem).floats
    shapes = (
        *(jax.ShapeDtypeStruct(each.shape, jax.numpy.dtype(each.dtype)) for each in problem.results),
        jax.ShapeDtypeStruct((floats,), np.float32) if floats else None,
    )
    callback = partial(_compute, operation, _present(layouts), options)
    program = _differentiable(operation.name, callback, shapes)
    return jax.jit(lambda *arrays: program(*arrays)[:-1])


def _differentiable(function: str, callback: Any, shapes: Any) -> Any:
    """The callback, which refuses to be differentiated in words of cufa's."""
    program = jax.custom_vjp(buffer_callback(callback, shapes, vmap_method="sequential"))
    program.defvjp(partial(_refuse_gradient, function), partial(_refuse_gradient, function))
    return program


def _refuse_gradient(function: str, *_: Any) -> NoReturn:
    raise UnsupportedError(
        f"{function}: JAX asks for a gradient, and cufa does not answer it yet; call cufa.attention_backward, or pass "
        "jax.lax.stop_gradient(q), and k and v alike."
    )


def _compute(
    operation: Operation, present: tuple[int, ...], options: Options, context: Any, written: Any, *buffers: Any
) -> None:
    """What runs within the program, on XLA's stream."""
    *results, memory = written
    given: list[Any] = [None] * len(operation.arrays)
    for index, buffer in zip(present, buffers, strict=True):
        given[index] = buffer
    arrays = _view(tuple(given))  # without the results, which are new
    problem = _problem.check(operation, arrays, options)
    if problem.device == CPU:
        compute_on_cpu(arrays, problem, results)
        return
    address, floats = (0, 0) if memory is None else (ADAPTER.view(memory)[0], memory.shape[0])
    prepared = prepare(problem, context.stream)
    if prepared.floats > floats:  # traced for another device than it runs on
        prepared = prepare(problem, context.stream, copied=False)
    if prepared.floats > floats:
        raise UnsupportedError(
            f"{operation.name}: traced for another device than it runs on; make the GPU JAX's default backend."
        )
    addresses = [*arrays.pointers, *(ADAPTER.view(result)[0] for result in results)]
    prepared(addresses, address, context.stream, -1)


def _default_device() -> int:
    return CPU if jax.default_backend() == "cpu" else 0


def _device_of(pointer: int) -> int:
    attribute = _driver.driver().CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(_driver.call("cuPointerGetAttribute", attribute, pointer))


register(Buffer, ADAPTER)

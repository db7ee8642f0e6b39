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

from .. import _arrays, _attention, _backward, _launch, _problem
from .._arrays import ALIGNMENT, CPU, Adapter, Arrays, Layout, Spec, contiguous, register
from .._problem import NAMES, OUT
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


def attention(given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    """`cufa.attention` of JAX arrays or tracers; arguments in the order of `_problem.DENSE_NAMES`."""
    return _attend("attention", given, options, return_lse)


def attention_varlen(given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    """`cufa.attention_varlen` of JAX arrays or tracers; arguments in the order of `_problem.VARLEN_NAMES`."""
    return _attend("attention_varlen", given, options, return_lse)


def view(function: str, given: tuple[Any, ...]) -> Arrays:
    """The arguments without their addresses, which JAX shows only inside a callback."""
    for name, array in zip(NAMES[function], given, strict=True):
        if array is not None and not isinstance(array, jax.Array):
            raise TypeError(
                f"{function}: {name} is a {type(array).__name__} but q is a jax array; pass arrays of one framework."
            )
        if array is not None:
            _check_readable(function, name, array)
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


def _attend(function: str, given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    if given[OUT] is not None:
        raise UnsupportedError(f"{function}: out is not supported for JAX arrays, which cannot be written.")
    arrays = view(function, given)
    # Checked here, where the user's call is; values of offsets, which have none in a program, are not.
    _problem.check(function, arrays, options)
    program = _program(function, arrays.layouts, options, return_lse)
    out, lse = program(*(array for array in given if array is not None))
    return (out, lse) if return_lse else out


def gradients(function: str, given: tuple[Any, ...], options: tuple[Any, ...], deterministic: bool) -> Any:
    """The gradients of JAX arrays or tracers; arguments in the order of `_problem.NAMES`."""
    for name, array in zip(NAMES[function][-3:], given[-3:], strict=True):
        if array is not None:
            raise UnsupportedError(f"{function}: {name} is not supported for JAX arrays, which cannot be written.")
    arrays = view(function, given)
    _problem.check(function, arrays, options)
    program = _gradients_program(function, arrays.layouts, options, deterministic)
    *results, dsinks = program(*(array for array in given if array is not None))
    return (*results,) if dsinks is None else (*results, dsinks)


Layouts = tuple[Layout | None, ...]


def _present(layouts: Layouts) -> tuple[int, ...]:
    """Which arguments there are."""
    return tuple(index for index, layout in enumerate(layouts) if layout is not None)


@lru_cache(maxsize=256)
def _program(function: str, layouts: Layouts, options: _problem.Plain, return_lse: bool) -> Any:
    """The jitted callback for arrays of these layouts: compiled once, however the options were written.

    Memory for copies, if there will be any, is one more result.
    """
    problem = _problem.check(function, Arrays((), [], layouts), options)
    copies = None if problem.device == CPU else _attention.copies_of(problem)
    shapes = (
        jax.ShapeDtypeStruct(problem.out_shape, jax.numpy.dtype(problem.dtype)),
        jax.ShapeDtypeStruct(problem.lse_shape, problem.lse_dtype) if return_lse else None,
        None if copies is None else jax.ShapeDtypeStruct((copies.floats,), np.float32),
    )
    program = _differentiable(function, partial(_compute, function, _present(layouts), options), shapes)
    return jax.jit(lambda *arrays: program(*arrays)[:-1])


@lru_cache(maxsize=256)
def _gradients_program(function: str, layouts: Layouts, options: _problem.Plain, deterministic: bool) -> Any:
    """The same of the gradients, whose workspace is one more result."""
    problem, present = _problem.check(function, Arrays((), [], layouts), options), _present(layouts)
    floats = 0 if problem.device == CPU else _backward.workspace_of(problem, deterministic).floats
    dsinks = jax.ShapeDtypeStruct((problem.num_heads_q,), problem.lse_dtype)
    shapes = (
        *(jax.ShapeDtypeStruct(problem.shape(name), jax.numpy.dtype(problem.dtype)) for name in "qkv"),
        dsinks if NAMES[function].index("sinks") in present else None,
        jax.ShapeDtypeStruct((floats,), np.float32),
    )
    callback = partial(_compute_gradients, function, present, options, deterministic)
    program = _differentiable(function, callback, shapes)
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
    function: str,
    present: tuple[int, ...],
    options: tuple[Any, ...],
    context: Any,
    results: Any,
    *buffers: Any,
) -> None:
    """What runs within the program, on XLA's stream."""
    out, lse, memory = results
    arrays = _view(tuple(_given(function, present, buffers)))  # without `out`, which is new
    problem = _problem.check(function, arrays, options)
    lse_pointer = 0 if lse is None else ADAPTER.view(lse)[0]
    pointers = _attention.pointers_of(arrays, ADAPTER.view(out)[0], lse_pointer)
    if problem.device == CPU and problem.varlen:
        _arrays.as_numpy(out)[...] = 0  # a new array's rows that belong to no sequence
    # Traced for another device than it runs on, there may be no memory for copies; then there are none.
    workspace = (0, 0) if memory is None else (ADAPTER.view(memory)[0], memory.shape[0])
    _attention.run(arrays, problem, out, lse, pointers, context.stream if problem.device != CPU else 0, workspace)


def _compute_gradients(
    function: str,
    present: tuple[int, ...],
    options: tuple[Any, ...],
    deterministic: bool,
    context: Any,
    results: Any,
    *buffers: Any,
) -> None:
    """The same of the gradients."""
    *gradients, dsinks, memory = results
    given = _given(function, present, buffers)
    given[-3:] = gradients
    arrays = _view(tuple(given))
    problem = _problem.check(function, arrays, options)
    if problem.device == CPU:
        _backward.run_on_cpu(arrays, problem, gradients, dsinks)
        return
    kernels, workspace = _backward.prepare(problem, deterministic, context.stream)
    if workspace.floats > memory.shape[0]:
        raise UnsupportedError(
            f"{function}: traced for another device than it runs on; make the GPU JAX's default backend."
        )
    pointers = [*arrays.pointers[-3:], 0 if dsinks is None else ADAPTER.view(dsinks)[0]]
    _backward.enqueue(kernels, arrays, pointers, workspace, ADAPTER.view(memory)[0], context.stream)


def _given(function: str, present: tuple[int, ...], buffers: tuple[Any, ...]) -> list[Any]:
    given: list[Any] = [None] * len(NAMES[function])
    for index, buffer in zip(present, buffers, strict=True):
        given[index] = buffer
    return given


def _default_device() -> int:
    return CPU if jax.default_backend() == "cpu" else 0


def _device_of(pointer: int) -> int:
    attribute = _launch.driver().CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(_launch.call("cuPointerGetAttribute", attribute, pointer))


register(Buffer, ADAPTER)

"""What the functions for both generations of flash_attn share, for arrays of any framework."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from .._call import arrays as _arrays
from ..errors import ArgumentError, UnsupportedError

Array = Any
"""An array of CuPy, torch, JAX or NumPy, or any that `cufa.attention` takes."""

INTEGERS = int, np.integer

compiling = _arrays.compiling


def is_torch(array: Array) -> bool:
    """Whether an array is a torch tensor; without asking `sys.modules`, which torch.compile would trace."""
    return hasattr(array, "requires_grad")


def outside(what: str, function: Callable[..., Any], operation: Any, *arguments: Any) -> Any:
    """Call `function` where torch.compile does not trace it."""
    from ..interop import torch

    return torch.outside(what, function, operation, *arguments)


def shape_of(array: Array) -> tuple[int, ...]:
    """The shape; empty for what is no array, as the checks of a call will say."""
    return tuple(getattr(array, "shape", ()))


def check_packed(function: str, name: str, array: Array, rank: int, count: int) -> None:
    """Check that an array holds `count` arrays along its third axis from the end."""
    shape = shape_of(array)
    if len(shape) != rank or shape[-3] != count:
        axes = "batch_size, seqlen" if rank == 5 else "total"
        raise ArgumentError(f"{function}: {name} has shape {shape}; ({axes}, {count}, nheads, headdim) is expected.")


def parts(packed: Array) -> tuple[Array, ...]:
    """Views of the arrays that a packed one holds."""
    if is_torch(packed):
        return tuple(packed.unbind(-3))  # whose gradient is one array, where that of slices would be a sum of arrays
    count = packed.shape[-3]
    return tuple(packed[:, :, n] if packed.ndim == 5 else packed[:, n] for n in range(count))


def records(packed: Array, *others: Array) -> bool:
    """Whether autograd records a call with a packed tensor, and nothing else of torch's is to see it."""
    return is_torch(packed) and not compiling(packed) and _records()(packed, others)


@cache  # a statement that imports takes a microsecond each time
def _records() -> Callable[[Any, tuple[Any, ...]], bool]:
    from ._torch import records

    return records


def nothing(like: Array) -> Array:
    """An array without elements, of the dtype and device of another."""
    return like.detach()[..., :0].flatten() if is_torch(like) else like[..., :0].reshape(-1)


def replaced(array: Array, old: float, new: float) -> Array:
    """A result with `new` where it is `old`; of JAX and of what torch records it is another array."""
    if is_torch(array):
        return array.masked_fill(array == old, new)
    if _arrays.is_jax(array):
        return sys.modules["jax"].numpy.where(array == old, new, array)
    places = array == old
    if not hasattr(places, "shape"):
        raise UnsupportedError(
            f"flash_attn: softmax_lse is not made for arrays of type {type(array).__name__}, which cannot be compared; "
            "call cufa.attention with return_lse=True."
        )
    array[places] = new
    return array


def first_caches(q: Array, *caches: Array) -> tuple[Array, ...]:
    """Views of as many caches as there are sequences."""
    rows = shape_of(q)[:1]
    return tuple(cache[: rows[0]] if rows and shape_of(cache)[:1] > rows else cache for cache in caches)


def window(given: Any) -> Any:
    """A window whose negative sides are -1: flash_attn takes any for unbounded, where cufa asks for that one."""
    if isinstance(given, (tuple, list)):
        for side in given:
            if isinstance(side, INTEGERS) and side < -1:
                return tuple([-1 if isinstance(each, INTEGERS) and each < 0 else each for each in given])
    return given  # what is no window, the checks of the call refuse


def lengths(given: Array | int | None, q: Array, like: Array) -> Array | None:
    """The lengths of caches as an array; a number is that of each."""
    number = isinstance(given, INTEGERS) and not isinstance(given, bool)
    if not number or _arrays.is_jax(like):  # both are as the checks of the call want them, or refused there
        return given
    made, _ = _arrays.view("flash_attn_with_kvcache", ("k_cache",), (like,)).empty(shape_of(q)[:1], "int32")
    made[:] = given
    return made


def without_far_sides(window_size: Any, k_cache: Array, block_table: Array | None) -> Any:
    """A window without the sides that no cache is long enough for, which flash_attn does not take for any.

    Whether there is a window decides for which positions q is rotated.
    """
    rows = shape_of(k_cache)[1:2] if block_table is None else (*shape_of(k_cache)[1:2], *shape_of(block_table)[1:2])
    if not rows or type(window_size) not in (tuple, list):
        return window_size
    capacity = math.prod(rows)
    return tuple(-1 if isinstance(side, int) and side >= capacity else side for side in window_size)


def split(packed: Array, heads: tuple[int, int]) -> tuple[Array, Array, Array]:
    """Views of q, k and v that lie side by side as heads: so many of q, and so many of k and of v."""
    first, second = heads[0], heads[0] + heads[1]
    return packed[..., :first, :], packed[..., first:second, :], packed[..., second:, :]

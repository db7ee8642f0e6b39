"""What the rungs in CUDA do on the host: check arrays, allocate the output, and compile and launch a kernel.

The kernel of rung ``r07_thread_per_row`` is ``r07_thread_per_row.cu`` beside it. Two macros specialise it, ``ELEMENT``
(``f16`` or ``bf16``, see core/types.cuh) and ``HEAD_DIM``; everything else is an argument.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from .._call.arrays import contiguous
from .._jit import viewing as _viewing
from .._jit.kernel import JitKernel, jit

ELEMENTS = {"float16": "f16", "bfloat16": "bf16"}
HEAD_DIMS = (64, 128)


class Problem(NamedTuple):
    """A call of a rung: its output, its sizes, and the scale of scores of which a kernel takes powers of 2."""

    out: Any
    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    head_dim: int
    scale: float


def problem(q: Any, k: Any, v: Any, softmax_scale: float | None) -> Problem:
    """Check the arrays of a call, and allocate its output.

    Parameters
    ----------
    q : array, (batch, seqlen_q, heads, head_dim)
    k, v : array, (batch, seqlen_k, heads, head_dim)
        Like q C-contiguous, not empty, float16 or bfloat16, and of head_dim 64 or 128.
    softmax_scale : float or None
        ``1 / sqrt(head_dim)`` by default.

    Raises
    ------
    TypeError, ValueError
        If they are not like that.
    """
    view, specs = _viewing.view("attention", ("q", "k", "v"), (q, k, v))
    for name, spec in zip("qkv", specs, strict=True):
        if spec.dtype not in ELEMENTS or spec.dtype != specs[0].dtype:
            raise TypeError(f"attention: {name} is {spec.dtype}; a rung takes three arrays of {' or '.join(ELEMENTS)}.")
        if len(spec.shape) != 4 or spec.shape[3] not in HEAD_DIMS or 0 in spec.shape:
            expected = "(batch, seqlen, heads, 64 or 128), not empty"
            raise ValueError(f"attention: {name} has shape {spec.shape}; a rung takes {expected}.")
        if spec.strides != contiguous(spec.shape):
            raise ValueError(f"attention: {name} is not C-contiguous; pass a copy.")
    (batch, seqlen_q, heads, head_dim), of_keys = specs[0].shape, specs[1].shape
    if specs[2].shape != of_keys or (of_keys[0], *of_keys[2:]) != (batch, heads, head_dim):
        raise ValueError(f"attention: q, k and v have shapes {', '.join(str(each.shape) for each in specs)}.")
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    if not 0 < scale < math.inf:  # the largest score times a negative scale is the smallest
        raise ValueError(f"attention: softmax_scale is {softmax_scale}; the rungs take a positive number.")
    out, _ = view.empty(specs[0].shape, specs[0].dtype)
    return Problem(out, specs[0].dtype, batch, seqlen_q, of_keys[1], heads, head_dim, scale * math.log2(math.e))


def source_of(rung: str) -> str:
    """The kernel of a rung, in CUDA C++."""
    return importlib.resources.files(__package__).joinpath(f"{rung}.cu").read_text()


def kernel(rung: str, dtype: str, head_dim: int) -> JitKernel:
    """The kernel of a rung, as its file is now, for arrays of such a dtype and head_dim."""
    return _kernel(source_of(rung), dtype, head_dim)


@lru_cache(maxsize=64)
def _kernel(source: str, dtype: str, head_dim: int) -> JitKernel:
    return jit(source, "attention", defines={"ELEMENT": ELEMENTS[dtype], "HEAD_DIM": head_dim})


def launch(
    module: str,
    q: Any,
    k: Any,
    v: Any,
    causal: bool,
    softmax_scale: float | None,
    *,
    rows: int,
    threads: int,
    shared_bytes: Callable[[int], int] = lambda head_dim: 0,
) -> Any:
    """The output of a rung whose thread blocks have so many rows of q each.

    The grid has a block for each tile of rows, along x, and each head of each sequence, along y. The dynamic shared
    memory of a block follows from head_dim.
    """
    x = problem(q, k, v, softmax_scale)
    kernel(module.rpartition(".")[2], x.dtype, x.head_dim)(
        *(q, k, v, x.out, x.seqlen_q, x.seqlen_k, x.heads, x.scale, causal),
        grid=(-(-x.seqlen_q // rows), x.batch * x.heads),
        block=threads,
        shared_bytes=shared_bytes(x.head_dim),
    )
    return x.out

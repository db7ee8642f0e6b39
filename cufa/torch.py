"""torch's own attention, computed by cufa: what programs call that know nothing of it.

After `activate`, ``torch.nn.functional.scaled_dot_product_attention``, ``torch.nn.MultiheadAttention`` and
``torch.nn.attention.varlen.varlen_attn`` of CUDA tensors run on cufa, with their gradients, compiled or not. What cufa
does not serve, such as masks given as tensors, is handed on to torch's kernel, and `cufa.stats` counts it by reason.

Examples
--------
>>> import torch  # doctest: +SKIP
>>> import cufa.torch  # doctest: +SKIP
>>> with cufa.torch.activate():  # doctest: +SKIP
...     out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
"""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.attention

from ._call import arrays as _arrays
from ._call import options as _options
from ._call import problem as _problem
from ._call.arrays import CPU, Arrays, Layout, Recorded, Refused
from ._call.options import Options
from ._call.problem import Problem
from ._driver import counts as _counts
from ._driver import driver as _driver
from ._kernels import OLDEST_ARCH
from ._operations.backward import ATTENTION_BACKWARD, ATTENTION_VARLEN_BACKWARD
from ._operations.call import allocate, compute
from ._operations.forward import ATTENTION, ATTENTION_VARLEN
from ._operations.operation import Operation
from .errors import ArgumentError, UnsupportedError

__all__ = ["NAME", "Activation", "activate", "deactivate"]

NAME = "CUFA"
"""By which ``torch.nn.attention.activate_flash_attention_impl`` knows cufa, as soon as this module is imported."""

Tensor = Any
View = tuple[Tensor, int, Layout]
"""A tensor, its address, and its layout as cufa reads it, heads behind rows."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NO_MEMORY = "tensors that have no memory of their own"
NO_GRADIENT = "no gradient by the result"

_adapter = _arrays.view("cufa.torch", ("a tensor",), (torch.empty(0, device="cpu"),)).adapter
_grad_enabled, _set_grad_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled
_deterministic = torch.are_deterministic_algorithms_enabled
_empty, _empty_like = torch.empty, torch.empty_like


class NotServed(Exception):
    """A call that is left to torch; its text is the reason, as it is counted."""


# --- What is served ---------------------------------------------------------------------------------


class Axes(NamedTuple):
    """Where the shapes of query, key and value have what."""

    rank: int
    heads: int
    rows: int


SWAPPED, DENSE, PACKED = Axes(4, -3, -2), Axes(4, -2, -3), Axes(3, -2, -3)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    scale: float | None,
    more: Any,
    axes: Axes = SWAPPED,
) -> None:
    """Refuse what cufa does not serve, before anything is made for it.

    It asks for nothing that a forward and its backward are not both told, so that both run on cufa, or neither does.
    Where a forward is handed on for what it alone is told, such as num_splits, its gradients are cufa's all the same:
    torch's out and lse say what cufa's do.
    """
    if dropout_p != 0.0:
        raise NotServed("dropout")
    for name, given in more.items():  # of other versions of torch; what is not given has its default
        if given is not None:
            raise NotServed(f"argument {name}")
    if scale is not None and not _options.SCALE_RANGE[0] <= scale <= _options.SCALE_RANGE[1]:
        raise NotServed("scale out of range")
    reason = _misfit(query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype, axes)
    if reason:
        raise NotServed(reason)
    if query.is_cuda and _driver.device(query.device.index).arch < OLDEST_ARCH:
        raise NotServed(f"GPU older than compute capability {OLDEST_ARCH // 10}.{OLDEST_ARCH % 10}")


@lru_cache(maxsize=1024)  # looking the answer up takes half as long as finding it
def _misfit(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    dtype: Any,
    key_dtype: Any,
    value_dtype: Any,
    axes: Axes,
) -> str:
    """Why cufa does not serve tensors of these shapes and dtypes; empty if it does."""
    rank, heads, rows = axes
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')}"
    if not dtype is key_dtype is value_dtype:
        return "dtypes of query, key and value differ"
    if not len(query) == len(key) == len(value) == rank:
        return f"query, key or value not of {rank} dimensions"
    if 0 in (*query, *key, *value):
        return "no elements"
    if max(query[-1], value[-1]) > _problem.MAX_HEAD_DIM:
        return f"head_dim above {_problem.MAX_HEAD_DIM}"
    if query[-1] != key[-1]:
        return "head dims of query and key differ"
    if rank == 4 and not query[0] == key[0] == value[0]:
        return "batch sizes differ"
    if key[rows] != value[rows]:
        return "lengths of key and value differ"
    if key[heads] != value[heads]:
        return "numbers of heads of key and value differ"
    if query[heads] % key[heads]:
        return "heads of query not a multiple of those of key"
    if max(query[rows], key[rows]) > _problem.MAX_SEQLEN:
        return f"more than {_problem.MAX_SEQLEN} rows"
    return ""


@lru_cache(maxsize=1024)
def _problem_of(operation: Operation, layouts: tuple[Layout | None, ...], options: Options) -> Problem:
    """The problem of a call whose query, key and value `_check` lets through, if the other tensors fit them.

    That is asked once for all calls whose tensors lie alike. Beyond it cufa's own checks may raise errors of theirs.
    """
    given = {name: layout for name, layout in zip(operation.arrays, layouts, strict=True) if layout is not None}
    if len({layout[4] for layout in given.values()}) > 1:
        raise NotServed("tensors on several devices")
    shapes = {name: layout[1] for name, layout in given.items()}
    dtypes = {name: layout[3] for name, layout in given.items()}
    batch = shapes["q"][0]
    if operation.packed:
        offsets = [name for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k") if name in given]
        if any(dtypes[name] is not torch.int32 for name in offsets):
            raise NotServed("offsets or seqused_k not int32")
        ends = shapes["cu_seqlens_q"]
        if len(ends) != 1 or not ends[0] or shapes["cu_seqlens_k"] != ends:
            raise NotServed("shapes of the offsets")
        batch = ends[0] - 1
        if shapes.get("seqused_k", (batch,)) != (batch,):
            raise NotServed("shape of seqused_k")
    if "alibi_slopes" in given:
        heads = shapes["q"][-2]
        if dtypes["alibi_slopes"] is not torch.float32:
            raise NotServed("alibi_slopes not float32")
        if shapes["alibi_slopes"] not in ((heads,), (batch, heads)):
            raise NotServed("shape of alibi_slopes")
    if "out" in given and (shapes["out"] != (*shapes["q"][:-1], shapes["v"][-1]) or dtypes["out"] is not dtypes["q"]):
        raise NotServed("out of another shape or dtype")
    return _problem.check(operation, Arrays((), [], layouts), options)


def _refuse(**given: Any) -> None:
    """Refuse arguments that no operation of cufa takes, if they are given."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise NotServed(name)


# --- How it is computed -----------------------------------------------------------------------------


def _view(tensor: Tensor) -> View:
    """A tensor as it lies: rows before heads."""
    pointer, layout = _adapter.view(tensor)
    if not pointer:  # there are elements, so their memory was freed, or never was
        raise NotServed(NO_MEMORY)
    return tensor, pointer, layout


def _swapped(tensor: Tensor, rows: int | None = None) -> View:
    """A tensor of heads before rows, read with rows before heads; of its `rows` the first, if that many are given."""
    pointer, (adapter, shape, strides, *rest) = _adapter.view(tensor)
    if not pointer:
        raise NotServed(NO_MEMORY)
    batch, heads, length, columns = shape
    outer, head, row, column = strides
    shape = (batch, length if rows is None else rows, heads, columns)
    return tensor, pointer, (adapter, shape, (outer, row, head, column), *rest)


def _compute(
    operation: Operation, views: dict[str, View], asked: tuple[Any, ...], given: bool = False
) -> tuple[Tensor, ...]:
    """The results, new or among the views; options as `Options` has them. `given` is whether a caller gave `out`."""
    nothing: tuple[None, int, None] = (None, 0, None)
    tensors, pointers, layouts = zip(*(views.get(name, nothing) for name in operation.arrays), strict=True)
    arrays = Arrays(tensors, list(pointers), layouts)
    options = _options.of(operation.name, asked, operation.owned)
    problem = _problem_of(operation, layouts, options)
    # Results that are new share no memory; if values of offsets on a GPU are looked at, `compute` does so.
    if given or problem.device == CPU:
        _problem.checked(operation, arrays, options)
    results, addresses = allocate(arrays, problem)
    if problem.device == CPU:  # where results are found by their own strides
        for index, (_, _, _, place) in enumerate(problem.results):
            layout = None if place is None else layouts[place]
            if layout is not None:
                results[index] = results[index].as_strided(layout[1], layout[2])
    compute(arrays, problem, results, addresses, options.late)
    return tuple(results)


Window = tuple[int | None, int | None]


def _top_left(query: Tensor, key: Tensor, is_causal: bool) -> tuple[bool, Window | None, int | None]:
    """Causality by which query i sees the keys up to the i-th, as cufa's: causal, window_size, and keys to be read.

    cufa's lets the last query see the last key, which is the same where there are as many of both. Keys that no query
    sees are left out; queries behind the last key see them all.
    """
    rows, keys = query.shape[-2], key.shape[-2]
    if not is_causal or rows == keys:
        return is_causal, None, None
    if rows < keys:
        return True, None, rows
    return False, (None, rows - keys), None


def _forward_swapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    mask: tuple[bool, Window | None, int | None],
    scale: float | None,
    lse: bool,
) -> tuple[Tensor, ...]:
    """`out`, or a new one with rows before heads, and lse if that is asked for."""
    causal, window, keys = mask
    views = {"q": _swapped(query), "k": _swapped(key, keys), "v": _swapped(value, keys)}
    if out is not None:
        views["out"] = _swapped(out)
    return _compute(ATTENTION, views, (causal, window, scale, 0.0, lse, False))


def _backward_swapped(
    forward: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grad_out: Tensor,
    mask: tuple[bool, Window | None, int | None],
    scale: float | None,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of what was computed of `forward`: query, key, value, out and lse."""
    if grad_out is None:
        raise NotServed(NO_GRADIENT)
    causal, window, keys = mask
    query, key, value, out, lse = forward
    dq, dk, dv = gradients
    views = {"q": _swapped(query), "k": _swapped(key, keys), "v": _swapped(value, keys), "out": _swapped(out)}
    views |= {"dout": _swapped(grad_out), "lse": _view(lse)}
    views |= {"dq": _swapped(dq), "dk": _swapped(dk, keys), "dv": _swapped(dv, keys)}
    if keys is not None:
        for gradient in (dk, dv):
            gradient[:, :, keys:].zero_()
    _compute(ATTENTION_BACKWARD, views, (causal, window, scale, 0.0, False, _deterministic()))


def _random_state(query: Tensor) -> tuple[Tensor, Tensor]:
    """What the flash operations return of a dropout that there is none of: nobody reads it."""
    device = query.device
    return _empty((2,), dtype=torch.uint64, device=device), _empty((), dtype=torch.uint64, device=device)


# --- torch's operations -----------------------------------------------------------------------------
# Each takes what its schema says, by the same names, and returns what torch's documentation of its shapes (the
# functions for the meta device) says. What torch does not pass on, because it has the default, has it here.


def _sdpa_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    **more: Any,
) -> Any:
    _check(query, key, value, dropout_p, scale, more)
    _refuse(return_debug_mask=return_debug_mask)
    _same_width(query, value)
    out = _empty_like(query)
    # Alone among the three, this operation aligns causality as cufa does.
    _, lse = _forward_swapped(query, key, value, out, (is_causal, None, None), scale, True)
    empty = _empty(0, dtype=query.dtype, device=query.device)
    return out, lse, None, None, query.shape[2], key.shape[2], *_random_state(query), empty


def _sdpa_flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
    **more: Any,
) -> Any:
    _check(query, key, value, dropout_p, scale, more)
    _same_width(query, value)
    gradients = _empty_like(query), _empty_like(key), _empty_like(value)
    forward = query, key, value, out, logsumexp.contiguous()
    _backward_swapped(forward, grad_out, (is_causal, None, None), scale, gradients)
    return gradients


def _sdpa_cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    **more: Any,
) -> Any:
    _refuse(attn_mask=attn_bias, return_debug_mask=return_debug_mask)
    _check(query, key, value, dropout_p, scale, more)
    out = _empty_like(query) if query.shape[-1] == value.shape[-1] else _strided_as(query, value.shape[-1])
    mask = _top_left(query, key, is_causal)
    lse = _forward_swapped(query, key, value, out, mask, scale, compute_log_sumexp)[1:]
    statistics = lse[0].unsqueeze(-1) if lse else None
    seed, offset = (_empty((), dtype=torch.int64, device=query.device) for _ in range(2))
    return out, statistics, None, None, query.shape[2], key.shape[2], seed, offset, None


def _sdpa_cudnn_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    attn_bias: Tensor | None,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
    **more: Any,
) -> Any:
    _refuse(attn_mask=attn_bias)
    _check(query, key, value, dropout_p, scale, more)
    gradients = _empty_like(query), _empty_like(key), _empty_like(value)
    forward = query, key, value, out, logsumexp.squeeze(-1).contiguous()
    _backward_swapped(forward, grad_out, _top_left(query, key, is_causal), scale, gradients)
    return gradients


LSE_ALIGNMENT = 32
"""Rows of the efficient operation's lse are padded to a multiple of it."""


def _sdpa_efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    **more: Any,
) -> Any:
    _refuse(attn_mask=attn_bias)
    _check(query, key, value, dropout_p, scale, more)
    mask = _top_left(query, key, is_causal)
    results = _forward_swapped(query, key, value, None, mask, scale, compute_log_sumexp)
    batch, heads, rows, _ = query.shape
    device = query.device
    if not compute_log_sumexp:
        lse = _empty((batch, heads, 0), dtype=torch.float32, device=device)
    elif rows % LSE_ALIGNMENT == 0:
        lse = results[1]
    else:
        lse = torch.nn.functional.pad(results[1], (0, -rows % LSE_ALIGNMENT), value=float("inf"))
    seed, offset = (_empty((), dtype=torch.int64, device=device) for _ in range(2))
    return results[0].transpose(1, 2), lse, seed, offset


def _sdpa_efficient_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
    **more: Any,
) -> Any:
    _refuse(attn_mask=attn_bias)
    _check(query, key, value, dropout_p, scale, more)
    # Of grad_input_mask torch's kernel heeds the last alone, which is about the bias.
    gradients = tuple(_swapped_empty(each) for each in (query, key, value))
    forward = query, key, value, out, logsumexp[..., : query.shape[2]].contiguous()
    _backward_swapped(forward, grad_out_, _top_left(query, key, is_causal), scale, gradients)
    return *gradients, None


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **options: Any,
) -> Any:
    given = query, key, value, cum_seq_q, cum_seq_k
    out, lse = _flash_out(None, given, dropout_p, is_causal, return_debug_mask, **options)
    return out, lse, *_random_state(query), _empty(0, dtype=query.dtype, device=query.device)


def _flash_forward_inplace(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **options: Any,
) -> Any:
    given = query, key, value, cum_seq_q, cum_seq_k
    return _flash_out(out, given, dropout_p, is_causal, return_debug_mask, **options)[1]


def _flash_out(
    out: Tensor | None,
    given: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """out, new if a caller gave none, and lse of the flash operations."""
    query, key, value, cum_seq_q, cum_seq_k = given
    _refuse(return_debug_mask=return_debug_mask, block_table=block_table)
    packed = _packed(cum_seq_q, cum_seq_k)
    _check(query, key, value, dropout_p, scale, more, PACKED if packed else DENSE)
    _same_width(query, value)
    if packed and num_splits == 1:  # asks for rows that do not depend on others; cufa's do, by average lengths
        raise NotServed("num_splits of packed sequences")
    views = {"q": _view(query), "k": _view(key), "v": _view(value)}
    if packed:
        views["cu_seqlens_q"], views["cu_seqlens_k"] = _view(cum_seq_q), _view(cum_seq_k)
    if seqused_k is not None:
        _refuse(seqused_k=not packed)
        views["seqused_k"] = _view(seqused_k)
    if alibi_slopes is not None:
        views["alibi_slopes"] = _view(alibi_slopes)
    written = out is not None
    if out is not None:
        views["out"] = _view(out)
    elif not query.is_contiguous():  # a new result is as the query's layout, which else it has by itself
        views["out"] = _view(_empty_like(query))
    operation = ATTENTION_VARLEN if packed else ATTENTION
    window = _window(window_size_left, window_size_right)
    out, lse = _compute(operation, views, (is_causal, window, scale, 0.0, True, False), written)
    return out, lse


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **more: Any,
) -> Any:
    packed = _packed(cum_seq_q, cum_seq_k)
    _check(query, key, value, dropout_p, scale, more, PACKED if packed else DENSE)
    _same_width(query, value)
    if grad_out is None:
        raise NotServed(NO_GRADIENT)
    gradients = _empty_like(query), _empty_like(key), _empty_like(value)
    views = {"q": _view(query), "k": _view(key), "v": _view(value), "out": _view(out), "dout": _view(grad_out)}
    views["lse"] = _view(logsumexp.contiguous())
    views |= zip(("dq", "dk", "dv"), map(_view, gradients), strict=True)
    if packed:
        views["cu_seqlens_q"], views["cu_seqlens_k"] = _view(cum_seq_q), _view(cum_seq_k)
    operation = ATTENTION_VARLEN_BACKWARD if packed else ATTENTION_BACKWARD
    window = _window(window_size_left, window_size_right)
    _compute(operation, views, (is_causal, window, scale, 0.0, False, _deterministic()))
    return gradients


def _packed(cum_seq_q: Tensor | None, cum_seq_k: Tensor | None) -> bool:
    """Whether sequences are packed, of which offsets tell."""
    if (cum_seq_q is None) != (cum_seq_k is None):
        raise NotServed("offsets of queries or of keys alone")
    return cum_seq_q is not None


def _window(left: int | None, right: int | None) -> Window | None:
    """A window of torch's, where negative numbers are unbounded."""
    sides = None if left is None or left < 0 else left, None if right is None or right < 0 else right
    return None if sides == (None, None) else sides


def _same_width(query: Tensor, value: Tensor) -> None:
    """Refuse what the flash operations cannot tell the shape of their results of."""
    if query.shape[-1] != value.shape[-1]:
        raise NotServed("head dims of query and value differ")


def _swapped_empty(like: Tensor) -> Tensor:
    """New tensor of the same shape, with rows before heads in memory."""
    batch, heads, rows, columns = like.shape
    return _empty((batch, rows, heads, columns), dtype=like.dtype, device=like.device).transpose(1, 2)


def _strided_as(query: Tensor, columns: int) -> Tensor:
    """New tensor of the query's shape but for its columns, whose axes are in the same order in memory."""
    shape = (*query.shape[:-1], columns)
    order = sorted(range(len(shape)), key=lambda axis: query.stride(axis), reverse=True)
    return torch.empty_permuted(shape, order, dtype=query.dtype, device=query.device)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_forward_inplace,
    "_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_flash_attention": _sdpa_flash,
    "_scaled_dot_product_flash_attention_backward": _sdpa_flash_backward,
    "_scaled_dot_product_cudnn_attention": _sdpa_cudnn,
    "_scaled_dot_product_cudnn_attention_backward": _sdpa_cudnn_backward,
    "_scaled_dot_product_efficient_attention": _sdpa_efficient,
    "_scaled_dot_product_efficient_attention_backward": _sdpa_efficient_backward,
}
"""What is overridden; on Hopper cuDNN's comes first of what torch chooses from, so flash alone would not do."""


# --- In torch's place -------------------------------------------------------------------------------


class _State(threading.local):
    handing_on = False
    """Whether one of torch's kernels runs that a call was handed on to: what it calls itself is its own affair."""


_state = _State()


class Override:
    """A function in the place of one of torch's kernels, which is kept for what is handed on.

    Parameters
    ----------
    name : str
        Of the operation, as torch names it.
    function : callable
        Serves a call, or raises `NotServed`.
    key : str
        Of torch's dispatcher: ``CUDA``, and ``CPU`` for tests.
    """

    def __init__(self, name: str, function: Callable[..., Any], key: str) -> None:
        self.name = name
        overload = getattr(torch.ops.aten, name).default
        self.function = _by_schema(function, overload._schema)
        try:
            self.original = torch.library.get_kernel(overload, key)
        except RuntimeError:  # torch is built without it
            self.original = None

    def __call__(self, keyset: Any, *arguments: Any, **options: Any) -> Any:
        reason = "" if _state.handing_on else self.serve(arguments, options)
        if type(reason) is not str:
            return reason
        if self.original is None:
            raise NotImplementedError(
                f"cufa.torch: {self.name} is not served ({reason}), and torch has no kernel of it."
            )
        before, _state.handing_on = _state.handing_on, True
        try:
            return self.original.call_boxed(keyset, *arguments, **options)
        finally:
            _state.handing_on = before

    def serve(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The results; or the reason why the call is handed on, which is counted."""
        # torch differentiates what is around this, and would have it refused for tensors that require grad.
        grad = _grad_enabled()
        if grad:
            _set_grad_enabled(False)
        try:
            return self.function(*arguments, **options)
        except NotServed as error:
            reason = str(error)
        except (Refused, Recorded):
            reason = NO_MEMORY
        except (ArgumentError, UnsupportedError) as error:
            # These come before anything is launched, and torch may well serve the call. All else is a fault.
            reason = _refusal(error)
        finally:
            if grad:
                _set_grad_enabled(True)
        _counts.tally("handed on", reason).add()
        return reason


_NUMBER = re.compile(r"(?<![\w.])\d+(\.\d+)?(e[+-]?\d+)?")


def _refusal(error: Exception) -> str:
    """An error of cufa's own checks as a reason: what it says is wrong, without what to do about it.

    Numbers are left out, lest every shape be a reason of its own.
    """
    return f"refused: {_NUMBER.sub('N', str(error).partition(';')[0].rstrip('.'))}"


def _by_schema(function: Callable[..., Any], schema: Any) -> Callable[..., Any]:
    """`function`, which takes the arguments in the order of the schema, and by the names there.

    Where torch's order is another one than the function's, they are passed by name: what is new there then is refused
    when it is given, and what is gone has its default, or makes a `TypeError` at once.
    """
    names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    parameters = inspect.signature(function).parameters.values()
    own = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    if names == own:
        return function
    needed = {each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD}
    missing = needed - {argument.name for argument in schema.arguments}
    if missing:
        raise UnsupportedError(
            f"cufa.torch: torch {torch.__version__} has an {schema.name} without {', '.join(sorted(missing))}, which "
            "this version of cufa does not know; use another version of one of them."
        )
    return lambda *arguments, **options: function(**dict(zip(names, arguments, strict=False)), **options)


class Handle:
    """The overrides while they are in place; torch's registry calls `remove`."""

    def __init__(self, key: str = "CUDA") -> None:
        if torch.version.hip or not hasattr(torch.library, "get_kernel"):
            raise UnsupportedError(
                f"cufa.torch: torch {torch.__version__} is not supported; a version for CUDA, 2.11 or newer, is."
            )
        known = {name: function for name, function in OPERATIONS.items() if hasattr(torch.ops.aten, name)}
        self.overrides = [Override(name, function, key) for name, function in known.items()]
        self._library: Any = torch.library.Library("aten", "IMPL", key)
        try:
            with warnings.catch_warnings():  # of overriding, which is what was asked for
                warnings.filterwarnings("ignore", "Warning only once for all operators")
                for override in self.overrides:
                    self._library.impl(override.name, override, key, with_keyset=True)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put torch's kernels in their place again."""
        library, self._library = self._library, None
        if library is not None:
            library._destroy()


class Activation:
    """As a context manager, it restores at its end what was active before it began."""

    def __init__(self, before: str | None) -> None:
        self._before = before

    def __enter__(self) -> Activation:
        return self

    def __exit__(self, *_: object) -> None:
        _switch(self._before)


def activate() -> Activation:
    """Have torch's attention of CUDA tensors computed by cufa, in all threads, until `deactivate`.

    Returns
    -------
    Activation
        For a ``with`` statement, at whose end whatever was active before is active again.

    Raises
    ------
    UnsupportedError
        If this torch is too old, or too new to be known.

    Notes
    -----
    Functions that were compiled, and graphs of autograd that were recorded before, follow: torch looks for the kernel
    at every call. A captured CUDA graph replays the kernels that it holds.

    Examples
    --------
    >>> import cufa.torch  # doctest: +SKIP
    >>> with cufa.torch.activate():  # doctest: +SKIP
    ...     loss = model(tokens)
    """
    before = _current()
    try:
        _switch(NAME)
    except BaseException:
        _switch(before)
        raise
    return Activation(before)


def deactivate() -> None:
    """Have torch's attention computed by torch again, if it is by cufa.

    Examples
    --------
    >>> cufa.torch.activate()  # doctest: +SKIP
    >>> cufa.torch.deactivate()  # doctest: +SKIP
    """
    if _current() == NAME:
        _switch(None)


# --- torch's registry of implementations ------------------------------------------------------------

_registry: Any = torch.nn.attention if hasattr(torch.nn.attention, "register_flash_attention_impl") else None
_own: Handle | None = None
"""The overrides, with a torch that has no registry."""


def _current() -> str | None:
    """The implementation that is active."""
    if _registry is not None:
        return _registry.current_flash_attention_impl()  # type: ignore[no-any-return]
    return None if _own is None else NAME


def _switch(name: str | None) -> None:
    """Make an implementation active; None is torch's own."""
    global _own
    if name == _current():
        return
    if _registry is None:
        if _own is not None:
            _own.remove()
        _own = None if name is None else Handle()
    elif name is None:
        _registry.restore_flash_attention_impl()
    else:
        _registry.activate_flash_attention_impl(name)


if _registry is not None:
    _registry.register_flash_attention_impl(NAME, register_fn=Handle)

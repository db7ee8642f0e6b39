"""Attention with key-value caches on NumPy arrays: new rows are appended, then each sequence attends to its own keys.

Contiguous caches are read where they lie, and pages block by block, so that no cache is copied whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from .._call.arrays import numpy_dtype
from .._call.kvcache import CACHES, KVCacheProblem
from .._call.problem import CACHE_DTYPES
from .._terms.term import Array
from .forward import _clear, _forward, _Scoring, _workspaces, work_dtype


def forward(problem: KVCacheProblem, arrays: Mapping[str, Any], out: Array, lse: Array | None) -> None:
    """Attention of a checked problem, whose values are checked too, written into `out` and `lse`, and caches.

    Parameters
    ----------
    problem : KVCacheProblem
    arrays : mapping of str to (array or None)
        Those of the operation, by name.
    out : array, like q
    lse : array or None, (batch, num_heads_q, seqlen_q) or (num_heads_q, total_q)
    """
    arrays = {**arrays, **{name: _typed(arrays[name], problem.cache_dtype) for name in CACHES}}
    sequences = [*_sequences(problem, arrays)]
    if problem.changes:
        for number, each in enumerate(sequences):
            _append(problem, arrays, each, number)
    q = arrays["q"]
    with np.errstate(all="ignore"):  # NaN and Inf are data, and exp underflows all the time
        scoring, workspaces = _Scoring.of(q, problem.seqlen_k, **problem.scoring(arrays)), _workspaces(q)
        stop = 0
        for number, each in enumerate(sequences):
            k, v = (_keys(problem, arrays, name, each, number) for name in "kv")
            rows = _rotated(problem, arrays, q[each.rows], each.first, problem.rotary_advances)
            own = replace(scoring, sequence=number)
            if problem.varlen:
                _clear(slice(stop, each.rows.start), None if "out" in problem.specs else out, lse)
                stop = each.rows.stop
            at = each.rows if problem.varlen else number
            lse_n = None if lse is None else lse[:, at] if problem.varlen else lse[at]
            _forward(rows[None], k, v, out[at][None], None if lse_n is None else lse_n[None], own, workspaces)
        if problem.varlen:
            _clear(slice(stop, len(q)), None if "out" in problem.specs else out, lse)


class _Sequence(NamedTuple):
    """A sequence: where its rows of q lie, its cache or pages, and which rows of those are keys.

    Attributes
    ----------
    rows : slice or int
        Packed arrays' rows, or the batch entry.
    place : int or array
        The cache, or the numbers of pages.
    start, first, last : int
        Live keys are [start, last) once those from `first` on are appended.
    """

    rows: Any
    place: Any
    start: int
    first: int
    last: int

    def keys(self, cache: Array, page_size: int) -> Any:
        """Its live keys or values, (1, keys, heads, columns)."""
        if page_size:
            return _Paged(cache, self.place, self.start, self.last)
        return cache[None, self.place, self.start : self.last]


def _sequences(problem: KVCacheProblem, arrays: Mapping[str, Any]) -> Iterator[_Sequence]:
    offsets, lengths, leftpad = (arrays[name] for name in ("cu_seqlens_q", "cache_seqlens", "cache_leftpad"))
    places = arrays["block_table"] if problem.page_size else arrays["cache_batch_idx"]
    starts = None if offsets is None else np.maximum.accumulate(offsets).tolist()
    for b in range(problem.batch):
        rows: Any = b if starts is None else slice(starts[b], starts[b + 1])
        new = 0 if not problem.changes else problem.seqlen_new if starts is None else starts[b + 1] - starts[b]
        first = problem.seqlen_k if lengths is None else int(lengths[b])
        place = b if places is None else places[b]
        yield _Sequence(rows, place, 0 if leftpad is None else int(leftpad[b]), first, first + new)


def _typed(cache: Array, dtype: str) -> Array:
    """A cache, of which bytes become what they are."""
    return cache.view(numpy_dtype(dtype)) if cache.dtype == np.uint8 else cache


def _descale(arrays: Mapping[str, Any], name: str, number: int) -> Array:
    """What keys or values of a sequence are to be multiplied by, 1 or (heads,)."""
    given = arrays[f"{name}_descale"]
    if given is None:
        return np.ones((), np.float32)
    return np.asarray(given[number] if given.ndim == 2 else given)


def _keys(problem: KVCacheProblem, arrays: Mapping[str, Any], name: str, sequence: _Sequence, number: int) -> Any:
    """The live keys or values of a sequence, (1, keys, heads, columns)."""
    found = sequence.keys(arrays[f"{name}_cache"], problem.page_size)
    if problem.cache_dtype not in CACHE_DTYPES:
        return found
    descale = np.broadcast_to(_descale(arrays, name, number), problem.num_heads_k)
    return _Scaled(found, descale.astype(work_dtype(arrays["q"])))


def round_to(dtype: np.dtype[Any], x: Array, descale: Array) -> Array:
    """Rows of (heads, columns), divided by the descale of each head in float32, and rounded, at most to the largest.

    Examples
    --------
    >>> import ml_dtypes
    >>> import numpy as np
    >>> from cufa._cpu.kvcache import round_to
    >>> x = np.array([[[1.0, 17.0, 1000.0]]], np.float32)
    >>> round_to(np.dtype(ml_dtypes.float8_e4m3fn), x, np.array([2.0])).ravel().tolist()
    [0.5, 8.0, 448.0]
    """
    import ml_dtypes

    with np.errstate(all="ignore"):  # NaN and Inf are data here
        quotients = x.astype(np.float32) / descale.astype(np.float32)[..., None]
        largest = np.float32(ml_dtypes.finfo(dtype).max)
        rounded: Array = np.clip(quotients, -largest, largest).astype(dtype)
        return rounded


def _append(problem: KVCacheProblem, arrays: Mapping[str, Any], sequence: _Sequence, number: int) -> None:
    """Write new rows of k, rotated, and of v into a sequence's cache."""
    k, v = arrays["k"][sequence.rows], arrays["v"][sequence.rows]
    if problem.cache_dtype in CACHE_DTYPES:
        k, v = k.astype(work_dtype(k)), v.astype(work_dtype(v))  # which are rounded once
    k = _rotated(problem, arrays, k, sequence.first, advances=True)
    if problem.cache_dtype in CACHE_DTYPES:
        dtype = arrays["k_cache"].dtype
        k, v = (round_to(dtype, x, _descale(arrays, name, number)) for name, x in (("k", k), ("v", v)))
    at: Any = np.arange(sequence.first, sequence.last)
    if problem.page_size:
        at = sequence.place[at // problem.page_size], at % problem.page_size
    else:
        at = sequence.place, at
    arrays["k_cache"][at], arrays["v_cache"][at] = k, v


def _rotated(problem: KVCacheProblem, arrays: Mapping[str, Any], x: Array, first: int, advances: bool) -> Array:
    """Rows of q or new k, (rows, heads, columns), rotated for positions from `first` on, or all of them for it."""
    if not problem.rotary_dim:
        return x
    positions = first + np.arange(len(x)) * int(advances)
    return rotate(x, arrays["rotary_cos"][positions], arrays["rotary_sin"][positions], problem.rotary_interleaved)


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Rows rotated by angles of their own, in x's dtype, rounded once.

    Parameters
    ----------
    x : array, (rows, heads, head_dim)
    cos, sin : array, (rows, rotary_dim / 2)
    interleaved : bool
        Whether pairs of columns are (2i, 2i + 1); else (i, i + rotary_dim / 2).

    Examples
    --------
    >>> import numpy as np
    >>> from cufa._cpu.kvcache import rotate
    >>> x = np.arange(4.0).reshape(1, 1, 4)
    >>> rotate(x, np.zeros((1, 2)), np.ones((1, 2)), interleaved=True).ravel().tolist()  # a quarter turn
    [-1.0, 0.0, -3.0, 2.0]
    """
    half = cos.shape[-1]
    first, second = slice(0, half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    work = work_dtype(x)
    a, b, c, s = (each.astype(work) for each in (x[..., first], x[..., second], cos[:, None], sin[:, None]))
    rotated = x.copy()
    with np.errstate(all="ignore"):  # NaN and Inf are data here
        rotated[..., first] = a * c - b * s
        rotated[..., second] = a * s + b * c
    return rotated


@dataclass(frozen=True)
class _Scaled:
    """Keys of a sequence that are stored divided by a number, read like an array: what is asked for is multiplied.

    Attributes
    ----------
    stored : array or _Paged, (1, keys, heads, columns)
    descale : array, (heads,)
    """

    stored: Any
    descale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.stored.shape
        return shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.descale.dtype

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Array:
        scaled: Array = self.stored[index].astype(self.dtype) * self.descale[index[2], None]
        return scaled


@dataclass(frozen=True)
class _Paged:
    """Keys of a sequence in pages, read like an array (1, keys, heads, columns): what is asked for is gathered.

    Attributes
    ----------
    pages : array, (num_pages, page_size, heads, columns)
    table : integer array, (max_pages,)
    start, stop : int
        Which rows are its keys.
    """

    pages: Array
    table: Array
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, self.stop - self.start, *self.pages.shape[2:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.pages.dtype

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Array:
        _, keys, heads = index
        first, last, _ = keys.indices(self.stop - self.start)
        first, last, size = first + self.start, last + self.start, self.pages.shape[1]
        page = first // size
        found = self.pages[self.table[page : -(-last // size)], :, heads]
        found = found.reshape(-1, *found.shape[2:])
        return found[None, first - page * size : last - page * size]

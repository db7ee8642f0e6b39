"""`cufa.attention_shared_prefix`, which is made of other public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .._call import arrays as _arrays
from .._call import options as _options
from .._call.arrays import CPU, unscriptable
from .._call.kvcache import DecodePlan
from .._call.problem import FEW_ROWS, FEW_TILE_ROWS, FEW_TILES
from ..errors import ArgumentError, UnsupportedError
from .attention import Array, attention, attention_varlen
from .kvcache import attention_with_kvcache
from .states import merge_states

FUNCTION = "attention_shared_prefix"

PART_TILES = 128
"""Tiles of queries and parts of a prefix that a GPU computes at a time, each on an SM of its own."""

LEAST_PART_KEYS, MOST_PARTS = 512, 16
"""Keys of a part, and parts, beside which it does not count that parts are put together. Reckoned, not measured."""

Level = tuple[Array, Array, Array, Array]
"""k and v of prefixes end to end, which rows of q read each of them, and where each of them lies."""


@unscriptable
def attention_shared_prefix(
    q: Array,
    k_prefix: Array | None,
    v_prefix: Array | None,
    k: Array,
    v: Array,
    *,
    levels: Sequence[Level] = (),
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seqused_k: Array | None = None,
    cache_seqlens: Array | None = None,
    block_table: Array | None = None,
    cache_batch_idx: Array | None = None,
    k_new: Array | None = None,
    v_new: Array | None = None,
    num_splits: int = 0,
    plan: DecodePlan | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Attention of many sequences that begin with the same keys, which are read once for all of them.

    As samples of one prompt have it, or conversations behind one system prompt. The result is that of `attention` over
    the prefix and then a sequence's own keys. The prefix is attended to by the rows of all sequences together, a
    sequence's own keys as ever, and `merge_states` puts both together. A long prefix is cut into parts, where otherwise
    most SMs would have nothing to do.

    Parameters
    ----------
    q : array, (batch, seqlen_q, num_heads_q, head_dim) or, with `cu_seqlens_q`, (total_q, num_heads_q, head_dim)
        CuPy, torch, JAX or NumPy; dtypes as for `attention`.
    k_prefix : array, (seqlen_prefix, num_heads_k, head_dim), or None
        Keys that all sequences begin with. None, if there are but those of `levels`.
    v_prefix : array, (seqlen_prefix, num_heads_k, head_dim_v), or None
    k : array, (batch, seqlen_k, num_heads_k, head_dim); packed or caches
        Every sequence's own keys, behind the prefix: with `cu_seqlens_k` packed, as `attention_varlen` takes them; and
        caches, as `attention_with_kvcache` takes them, if one of its arrays is given.
    v : array, (batch, seqlen_k, num_heads_k, head_dim_v); packed or caches
    levels : sequence of (k, v, cu_seqlens_q, cu_seqlens_k)
        Further prefixes, between the common one and a sequence's own keys: a tree, level by level. Those of a level lie
        end to end, number i in rows ``cu_seqlens_k[i]`` to ``cu_seqlens_k[i + 1]`` of k (total, num_heads_k, head_dim)
        and v. Rows ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]`` of q read it, where sequences lie end to end.
    cu_seqlens_q, cu_seqlens_k, seqused_k : int32 array, optional
        Of packed sequences, as for `attention_varlen`.
    cache_seqlens, block_table, cache_batch_idx, num_splits, plan
        Of own keys in caches, as for `attention_with_kvcache`; they tell of the caches alone, not of the prefix.
    k_new, v_new : array, optional
        New rows, which `attention_with_kvcache` appends to the caches first.
    causal : bool
        As for `attention`. The prefix lies before all own keys, and is seen whole: of those each sequence has to have
        as many as it has queries, or one less. That is checked where lengths are known without waiting for a GPU.
    window_size : (None, int), optional
        As for `attention`; a bound to the left would leave out part of the prefix, and is not supported.
    softmax_scale, softcap
        As for `attention`.
    alibi_slopes : None
        Not supported: distances to the prefix differ from sequence to sequence.
    sinks, return_lse, out
        As for `attention`.

    Returns
    -------
    out : array, (batch, seqlen_q, num_heads_q, head_dim_v) or (total_q, num_heads_q, head_dim_v)
    lse : float32 array, (batch, num_heads_q, seqlen_q) or (num_heads_q, total_q)
        Only if `return_lse`.

    Raises
    ------
    TypeError, ValueError, CompileError, MissingKernelError, CudaError
        As for the functions that it is made of.
    UnsupportedError
        Also for `alibi_slopes`, and for a window that is bounded to the left.

    See Also
    --------
    merge_states : What puts the parts together.
    attention_with_kvcache : Caches of own keys.

    Notes
    -----
    Juravsky et al., *Hydragen: High-Throughput LLM Inference with Shared Prefixes*, 2024. Each part is rounded to q's
    dtype before it is merged. Gradients go through to all arrays, in torch and JAX, but for own keys in caches. Rotary
    embeddings are applied before, by positions that count the prefix.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((16, 1, 8, 64), dtype=np.float32)  # 16 samples of a prompt of 500 tokens
    >>> k_prefix, v_prefix = rng.standard_normal((2, 500, 2, 64), dtype=np.float32)
    >>> k, v = rng.standard_normal((2, 16, 20, 2, 64), dtype=np.float32)  # and 20 tokens of each so far
    >>> out = cufa.attention_shared_prefix(q, k_prefix, v_prefix, k, v, causal=True)
    >>> whole = [np.concatenate([[prefix] * 16, own], axis=1) for prefix, own in ((k_prefix, k), (v_prefix, v))]
    >>> np.allclose(out, cufa.attention(q, *whole, causal=True), atol=1e-5)
    True
    """
    caches = {"cache_seqlens": cache_seqlens, "block_table": block_table, "cache_batch_idx": cache_batch_idx}
    in_caches = any(x is not None for x in (*caches.values(), k_new, v_new, plan))
    packed = cu_seqlens_q is not None
    if in_caches and not (cu_seqlens_k is None and seqused_k is None):
        _type_error("cu_seqlens_k or seqused_k is given, but own keys are in caches; cache_seqlens says how many.")
    if not in_caches and packed != (cu_seqlens_k is not None):
        _type_error("cu_seqlens_q and cu_seqlens_k belong together; pass both or neither.")
    _check_shapes(q, k_prefix, v_prefix, levels, k, v, packed, out)
    if alibi_slopes is not None:
        raise UnsupportedError(
            f"{FUNCTION}: alibi_slopes are not supported, since distances to the prefix differ from sequence to "
            "sequence; pass the whole keys of each to cufa.attention."
        )
    causal, window, *_ = _options.plain(FUNCTION, causal, window_size, softmax_scale, softcap)
    left, right, _, _ = _options.check(FUNCTION, (causal, window, softmax_scale, 0.0), q.shape[-1])
    if left is not None:
        raise UnsupportedError(
            f"{FUNCTION}: a window that is bounded to the left is not supported, since it leaves out part of the "
            "prefix; pass None for its left side, or the whole keys of each sequence to cufa.attention."
        )
    if right is not None and not _arrays.compiling(q):
        _check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, cache_seqlens, k_new, in_caches, right)

    scoring: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": softcap, "return_lse": True}
    parts = []
    if k_prefix is not None:
        parts += _attend_together(q, k_prefix, v_prefix, scoring)
    for level_k, level_v, cu_rows, cu_prefixes in levels:
        rows = q if packed else q.reshape(q.shape[0] * q.shape[1], *q.shape[2:])
        state = attention_varlen(rows, level_k, level_v, cu_rows, cu_prefixes, **scoring)
        parts.append(state if packed else _as_batch(q, *state))
    scoring |= {"causal": causal, "window_size": window, "sinks": sinks}
    if in_caches:
        own = {"k": k_new, "v": v_new, "cu_seqlens_q": cu_seqlens_q, "num_splits": num_splits, "plan": plan}
        parts.append(attention_with_kvcache(q, k, v, **caches, **own, **scoring))
    elif packed:
        parts.append(attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k=seqused_k, **scoring))
    else:
        parts.append(attention(q, k, v, **scoring))

    merged = parts[0]  # of which there may be several, that are merged with the next
    for state in parts[1:-1]:
        merged = merge_states(*merged, *state)
    merged = merge_states(*merged, *parts[-1], out=out)
    return tuple(merged) if return_lse else merged[0]


def _attend_together(q: Array, k_prefix: Array, v_prefix: Array, scoring: dict[str, Any]) -> list[tuple[Array, Array]]:
    """The states of a prefix that all rows of q read, as those of one sequence.

    Parts of the prefix are sequences that have the same rows, and their states lie along a first axis. Where some keys
    are left, their state is another.
    """
    packed = len(q.shape) == 3
    rows = q[None] if packed else q.reshape(1, q.shape[0] * q.shape[1], *q.shape[2:])
    length = k_prefix.shape[0]
    count = _count_parts(rows.shape[1], rows.shape[2], k_prefix.shape[1], length)
    states = []
    if count > 1:
        keys, values = (x[: length // count * count].reshape(count, -1, *x.shape[1:]) for x in (k_prefix, v_prefix))
        states.append(attention(_repeated(rows, count), keys, values, **scoring))
        k_prefix, v_prefix = (x[length // count * count :] for x in (k_prefix, v_prefix))
    if count == 1 or k_prefix.shape[0] > 0:
        out, lse = attention(rows, k_prefix[None], v_prefix[None], **scoring)
        states.append((out[0], lse[0]))
    return states if packed else [_as_batch(q, *state) for state in states]


def _count_parts(queries: int, heads_q: int, heads_k: int, keys: int) -> int:
    """How many parts of equally many keys a prefix is cut into, at best such that none are left."""
    rows = queries * heads_q // max(1, heads_k)
    tiles = heads_k * -(-rows // FEW_TILE_ROWS)
    if rows <= FEW_ROWS[-1] or tiles == 0:
        return 1  # keys are shared by all SMs as they are
    most, least = min(PART_TILES // tiles, keys // LEAST_PART_KEYS, MOST_PARTS), FEW_TILES // tiles + 1
    if most < max(2, least):
        return 1
    for count in range(most, max(2, least, most // 2) - 1, -1):
        if keys % count == 0:
            return count
    return most


def _repeated(rows: Array, count: int) -> Array:
    """A view of the rows of one sequence as those of several."""
    if hasattr(rows, "expand"):
        return rows.expand(count, *rows.shape[1:])
    shape = (count, *rows.shape[1:])
    if _arrays.is_jax(rows):
        import jax.numpy

        return jax.numpy.broadcast_to(rows, shape)
    return np.broadcast_to(rows, shape)


def _as_batch(q: Array, out: Array, lse: Array) -> tuple[Array, Array]:
    """What belongs to rows of sequences end to end, by sequence; of several parts, by part and sequence."""
    (batch, length, heads), parts = q.shape[:3], out.shape[:-3]
    out = out.reshape(*parts, batch, length, heads, out.shape[-1])
    return out, lse.reshape(*parts, heads, batch, length).swapaxes(-3, -2)


def _check_shapes(
    q: Array,
    k_prefix: Array | None,
    v_prefix: Array | None,
    levels: Sequence[Level],
    k: Array,
    v: Array,
    packed: bool,
    out: Array | None,
) -> None:
    """What is not told by the parts' own checks, or too late."""
    if (k_prefix is None) != (v_prefix is None):
        _type_error("k_prefix and v_prefix belong together; pass both or neither.")
    if k_prefix is None and not levels:
        _type_error("there is no prefix; pass k_prefix and v_prefix or levels, or call cufa.attention.")
    given = {"q": q, "k": k, "v": v} | ({} if k_prefix is None else {"k_prefix": k_prefix, "v_prefix": v_prefix})
    for number, level in enumerate(levels):
        if not isinstance(level, Sequence) or len(level) != 4:
            _type_error(f"levels[{number}] is no (k, v, cu_seqlens_q, cu_seqlens_k).")
        given |= {f"k of levels[{number}]": level[0], f"v of levels[{number}]": level[1]}
    for name, x in given.items():
        if not hasattr(x, "shape") or not hasattr(x, "reshape"):
            _type_error(f"{name} is a {type(x).__name__}; pass a CuPy, torch, JAX or NumPy array.")
    rank = 3 if packed else 4
    if len(q.shape) != rank:
        meaning = "(total, num_heads, head_dim)" if packed else "(batch, seqlen, num_heads, head_dim)"
        _value_error(f"q has shape {tuple(q.shape)}; {rank} dimensions {meaning} are expected.")
    for name, x in given.items():
        if name not in ("q", "k", "v") and len(x.shape) != 3:
            _value_error(f"{name} has shape {tuple(x.shape)}; (seqlen, num_heads, head_dim) is expected.")
        like = k if name[0] == "k" else v
        if name != "q" and tuple(x.shape[-2:]) != tuple(like.shape[-2:]):
            _value_error(
                f"{name} has shape {tuple(x.shape)} but {name[0]} has {tuple(like.shape)}; num_heads and head_dim must "
                "agree."
            )
    shape = (*q.shape[:-1], v.shape[-1])
    if out is not None and tuple(out.shape) != shape:
        _value_error(f"out has shape {tuple(out.shape)}; {shape} is expected.")
    if out is not None and out.dtype != q.dtype:  # caches may be appended to before it is merged into
        _value_error(f"out has dtype {out.dtype} but q has {q.dtype}; they must agree.")


def _check_lengths(
    q: Array,
    k: Array,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
    seqused_k: Array | None,
    cache_seqlens: Array | None,
    k_new: Array | None,
    in_caches: bool,
    right: int,
) -> None:
    """Refuse sequences whose first queries would lie within the prefix, as far as lengths are in host memory."""
    queries: Any = q.shape[1] if cu_seqlens_q is None else _differences(cu_seqlens_q)
    keys: Any
    if in_caches:
        if cache_seqlens is None:
            return  # caches are full, and longer than any queries that are appended to them
        keys = _in_host_memory(cache_seqlens)
        if k_new is not None and keys is not None and queries is not None:
            keys = keys + (k_new.shape[1] if cu_seqlens_q is None else queries)
    else:
        keys = k.shape[1] if cu_seqlens_k is None else _differences(cu_seqlens_k)
        keys = keys if seqused_k is None else _in_host_memory(seqused_k)
    if queries is None or keys is None:
        return  # they are on a GPU
    if np.ndim(queries) and np.ndim(keys) and len(queries) != len(keys):
        return  # of which the parts' own checks tell
    short = np.atleast_1d(np.asarray(queries) > np.asarray(keys) + right + 1)
    if short.any():
        _value_error(
            f"sequence {int(np.argmax(short))} has more queries than own keys, so that the first of them would lie "
            "within the prefix; move the last keys of the prefix to those of the sequences."
        )


def _differences(offsets: Array) -> NDArray[Any] | None:
    known = _in_host_memory(offsets)
    return None if known is None else np.maximum(np.diff(known.astype(np.int64)), 0)


def _in_host_memory(array: Array) -> NDArray[Any] | None:
    """An array of integers, if its values can be had without waiting for a GPU."""
    if _arrays.is_jax(array):
        import jax

        if isinstance(array, jax.core.Tracer) or next(iter(array.devices())).platform != "cpu":
            return None
        return np.asarray(array)
    try:
        view = _arrays.view(FUNCTION, ("lengths",), (array,))
        layout = view.layouts[0]
        assert layout is not None
        return view.numpy(0) if layout[0].spec(layout).device == CPU else None
    except _arrays.Recorded:
        return None


def _type_error(text: str) -> NoReturn:
    raise TypeError(f"{FUNCTION}: {text}")


def _value_error(text: str) -> NoReturn:
    raise ArgumentError(f"{FUNCTION}: {text}")

"""The specification of cufa: exact attention in plain NumPy float64.

Every other implementation in the project is tested against the functions of this module. They hold whole
score matrices and take no short cut, so they are for reading and for checking, not for speed.

For query row ``i`` and key ``j``, with ``offset = seqlen_k - seqlen_q``, query head ``h`` and its key head
``h // qheads_per_khead``:

1. ``s = softmax_scale * (q_i · k_j)``
2. ``s = softcap * tanh(s / softcap)`` if ``softcap > 0``
3. ``s = s - alibi_slope_h * |i + offset - j|`` if slopes are given
4. key ``j`` is kept if ``j <= i + offset`` (causal) and ``i + offset - left <= j <= i + offset + right``
   (window); a key that is not kept is *removed*
5. ``lse_i = ln(sum over kept j of exp(s_ij) + exp(sink_h))`` and ``p_ij = exp(s_ij - lse_i)``
6. ``out_i = sum over kept j of p_ij v_j``

**The gradients**, given ``dout`` and, if `lse` is used further on, ``dlse``:

7. ``dv_j = sum over i of p_ij dout_i``
8. ``dp_ij = dout_i · v_j`` and ``delta_i = sum over kept j of p_ij dp_ij``, which is ``dout_i · out_i``
9. ``ds_ij = p_ij (dp_ij - delta_i + dlse_i)``, and for a sink ``dsink_h = sum over i of exp(sink_h - lse_i)
   (dlse_i - delta_i)``
10. ``ds = ds * (1 - tanh(s / softcap)^2)``, of the score of step 1, if ``softcap > 0``; ALiBi's term is a constant
11. ``dq_i = softmax_scale * sum over j of ds_ij k_j`` and ``dk_j = softmax_scale * sum over i of ds_ij q_i``; dk and
    dv add up over the query heads that share a key head

**Score terms.** Steps 2 and 3 are *score terms*, and there may be more (`Term`): in this order `score`, `bias`,
`rel_bias`, `mask` and dropout. A term is
applied between steps 3 and 4, in its order, to every score with its sequence, query head, query,
key and distance ``i + offset - j``, and so changes none that the mask removes from the sums. With ``t`` a term and
``s'`` the score that it is applied to:

- between 3 and 4: ``s = t(s')``
- in 4: key ``j`` is kept if all terms keep it, too
- in 6 and 7, with ``k_ij`` the product of all factors: ``out_i = sum over kept j of p_ij k_ij v_j`` and ``dv_j = sum
  over i of p_ij k_ij dout_i``. The sum of step 5 counts probabilities as they were.
- in 8 and 9: ``ds_ij = p_ij (k_ij dp_ij - delta_i + dlse_i)`` and ``delta_i = sum over kept j of p_ij k_ij dp_ij``,
  which still is ``dout_i · out_i``
- between 9 and 10, last term first: what the term reads has the gradient that ``ds``, the gradient by ``t(s')``, gives
  it; then ``ds = ds * t'(s')``

With ``d = i + offset - j``, and with an axis of 1 serving all:

- `score`: ``s = score(s, b, h, i, j)``, and ``ds = ds * dscore/ds``; arrays that the function reads have the gradients
  that follow
- `bias`: ``s = s + bias[b, h, i, j]``, and ``dbias`` is ds, summed over axes of 1
- `rel_bias`: ``s = s + rel_bias[h, reach + clip(d, -reach, reach)]``, and ``drel_bias[h, c]`` is the sum of ds over the
  scores of column c
- `mask`: key j is kept if ``mask[b, h, i, j]``
- dropout: ``k_ij`` is 0 or ``1 / (1 - dropout_p)``, as `cufa.dropout_mask` says

Of packed sequences b is the number of the sequence, and i and j are its own. A bias is 0, and a mask keeps nothing,
beyond the ends of the array; on the CPU such arrays are refused.

**The mask.** Causal masks and windows are aligned at the bottom right: the last query sees the last key.
Drawn is ``window_size=(2, 1)`` and, to its right, ``causal=True`` (``#`` kept, ``.`` removed)::

    seqlen_q = 3, seqlen_k = 5, offset = 2        seqlen_q = 5, seqlen_k = 3, offset = -2

           j 0 1 2 3 4     j 0 1 2 3 4                   j 0 1 2     j 0 1 2
       i 0   # # # # .       # # # . .               i 0   . . .       . . .
       i 1   . # # # #       # # # # .               i 1   # . .       . . .
       i 2   . . # # #       # # # # #               i 2   # # .       # . .
                                                     i 3   # # #       # # .
                                                     i 4   # # #       # # #

**The edge rules.**

- A row that keeps no key has ``out = 0`` and ``lse = -inf``; with a sink, ``lse = sink``. So has a row whose
  kept scores are all ``-inf``. NaN never arises from emptiness.
- ``batch``, sequence lengths and numbers of heads may be 0.
- A removed key contributes nothing to out, lse, dq, dk and dv, whatever its rows of k and v hold, NaN and Inf
  included. Nor does a row i add anything to dk_j and dv_j of a key that it does not keep, whatever q_i and
  dout_i hold.
- A row that keeps no key gives no gradient to q, k and v, whatever its dout and dlse; its dout counts nowhere, and
  its dlse only for its sink. A key that no row keeps has rows of 0 in dk and dv.

**NaN and Inf** in kept entries spread as IEEE arithmetic has it:

- A NaN score makes its row NaN, out and lse. A score of ``+inf`` makes the row's out NaN and its lse ``+inf``
  (NaN beside a NaN score), and its gradients NaN. A score of ``-inf`` has probability 0.
- A sink of ``+inf`` takes all probability: lse is ``+inf``, and out, dq, dk and dv are 0 where the scores are finite.
- ``+inf`` in a kept row of v gives ``+inf`` in its column where its probability is greater than 0, and 0 times it is
  NaN where that is 0. (In float32, whose exponentials reach down to about exp(-87) or exp(-103), a probability is 0
  sooner than in float64.)

**Ranges.** Any finite q, k and v are served whose products, scores and, for the gradients, products dout · v stay
within ±2^127, as float32 holds them (for float64 arrays, within float64's range), partial sums, ALiBi's term and sinks
included. Results are finite wherever the exact result fits the dtype, the mean of v near its largest number included.
softmax_scale is from 2^-126 to 2^127, softcap a normal float32 number or 0. An implementation in float32 errs in a
score by its rounding, that is by about 2^-24 of the sum of its products' magnitudes, and relatively by as much in its
probability; gradients made from a float32 lse err relatively by 2^-24 of that lse besides, and are not determined where
it is beyond about 2^20. In a row whose sink is more than 2^117 times as probable as any key, out may be 0.

**Packed sequences.** Offsets are read as their running maximum, clamped to [0, total], and ``seqused_k`` is clamped to
[0, length of its slot]: what static shapes are padded with, zeros or the total, makes empty sequences. Rows of q that
belong to no sequence have ``out = 0``, ``lse = -inf`` and no gradient.

**Caches.** A sequence's keys and values may lie in a cache, which has room for `capacity` of them. Key ``j`` of
sequence b is row ``j`` of cache ``cache_batch_idx[b]`` (b by default) or, of a cache in pages, row ``j % page_size`` of
page ``block_table[b, j // page_size]``. With ``n`` rows of q, ``m`` new rows of k and v and ``length =
cache_seqlens[b] + m``:

1. new row ``i``, of k rotated, is written to where key ``cache_seqlens[b] + i`` lies, for all sequences
2. keys ``cache_leftpad[b] <= j < length`` are live; steps 1 to 6 are those of attention over live keys alone. So row i
   of q is at position ``length - n + i``, wherever the first live key is

**Rotary embedding.** Of the first `rotary_dim` columns, the pairs ``(2i, 2i + 1)``, or ``(i, i + rotary_dim / 2)`` if
not interleaved, are turned by the angle whose cosine and sine `rotary_cos` and `rotary_sin` hold in column i of a
position's row: ``(a, b)`` becomes ``(a cos - b sin, a sin + b cos)``, rounded to the dtype. New row i of k has the
position ``cache_seqlens[b] + i``. So has row i of q under a causal mask or in a window; else all rows of q have the
position ``cache_seqlens[b]``.

Numbers outside of what there is are refused on the CPU. On a GPU they are read as if they were in range, since the
host does not wait to see them: ``cache_seqlens`` is clamped to [0, capacity], ``cache_leftpad`` to [0, length], and
caches, pages and positions to those that there are; ``length`` is at most the capacity, and new rows beyond it, or in a
cache or page that is not there, are dropped. The function of this module does the same.

**States.** A state is what attention over some of a row's keys gives, out and lse. That over all of them is merged from
states ``s`` of disjoint parts of the keys:

- ``lse = ln(sum over s of exp(lse_s))``, ``w_s = exp(lse_s - lse)`` and ``out = sum over s of w_s out_s``
- ``dout_s = w_s dout`` and ``dlse_s = w_s (dout · out_s - dout · out + dlse)``

A state without keys, whose lse is ``-inf``, counts nowhere, whatever its out holds, and has no gradient. One whose lse
is ``+inf``, as a score or a sink of ``+inf`` makes it, takes all weight; several share it.

Source: Dao et al., *FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness*, 2022; ALiBi
after Press et al., *Train Short, Test Long*, 2022; softcap after *Gemma 2*, 2024; sinks are the learned
denominators of Xiao et al., *Efficient Streaming Language Models with Attention Sinks*, 2024.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, SupportsInt, TypeAlias, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from scipy.special import logsumexp

from ._call import kvcache as _kvcache
from ._call import options as _options
from ._call import problem as _problem
from ._call.problem import CACHE_DTYPES
from ._specification.term import At as At
from ._specification.term import Term as Term
from ._terms import TERMS

__all__ = [
    "Attended",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_with_kvcache",
    "merge_states",
    "merge_states_backward",
    "rotary",
]

Array: TypeAlias = NDArray[Any]
Window: TypeAlias = tuple[int | None, int | None] | None


class Options(TypedDict, total=False):
    """The keywords shared by `attention` and `attention_varlen`."""

    causal: bool
    window_size: Window
    softmax_scale: float | None
    softcap: float
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None


class FeaturedOptions(Options, total=False):
    """Those, and the keywords of further score terms."""

    score: Any
    bias: ArrayLike | None
    rel_bias: ArrayLike | None
    mask: Any
    dropout_p: float
    seed: SupportsInt | None


class Precision(NamedTuple):
    """Where the mathematics is rounded: it runs in `compute`; p and the output are rounded to `storage`."""

    compute: DTypeLike
    storage: DTypeLike


EXACT = Precision(np.float64, np.float64)


@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[FeaturedOptions],
) -> Array: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[FeaturedOptions],
) -> tuple[Array, Array]: ...
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    causal: bool = False,
    window_size: Window = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    score: Any = None,
    bias: ArrayLike | None = None,
    rel_bias: ArrayLike | None = None,
    mask: Any = None,
    dropout_p: float = 0.0,
    seed: SupportsInt | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention of a batch of equally long sequences.

    Parameters
    ----------
    q : array_like, (batch, seqlen_q, num_heads_q, head_dim)
        Queries, of any real dtype; computed in float64.
    k : array_like, (batch, seqlen_k, num_heads_k, head_dim)
        Keys; ``num_heads_q`` is a multiple of ``num_heads_k``.
    v : array_like, (batch, seqlen_k, num_heads_k, head_dim_v)
        Values.
    causal : bool
        Row i sees keys ``j <= i + seqlen_k - seqlen_q``. The same as ``window_size=(left, 0)``.
    window_size : (left, right) or None
        Keys seen before and after the diagonal, both inclusive; None or -1 is unbounded.
    softmax_scale : float, optional
        Multiplies q·kᵀ; ``head_dim ** -0.5`` if None.
    softcap : float
        ``softcap * tanh(s / softcap)``; 0.0 is off.
    alibi_slopes : array_like, (num_heads_q,) or (batch, num_heads_q), optional
        ``-slope * |i + seqlen_k - seqlen_q - j|`` is added to the scores.
    sinks : array_like, (num_heads_q,), optional
        A further score a head, which takes probability and gives no value.
    score, bias, rel_bias, mask, dropout_p, seed
        As of the function of that name in cufa; what they do is told above, under *score terms*.
    return_lse : bool
        Also return `lse`.

    Returns
    -------
    out : float64 array, (batch, seqlen_q, num_heads_q, head_dim_v)
    lse : float64 array, (batch, num_heads_q, seqlen_q)
        Natural logarithm of the sum of exponentials; only if `return_lse`.

    Raises
    ------
    TypeError, ValueError
        As the function of that name in cufa.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.reference import attention
    >>> q = np.zeros((1, 2, 1, 4))
    >>> k = np.zeros((1, 2, 1, 4))
    >>> v = np.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> attention(q, k, v, causal=True).ravel().tolist()  # the first row sees one key, the second both
    [1.0, 2.0]
    """
    given = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes, "sinks": sinks, "bias": bias, "rel_bias": rel_bias}
    options = causal, window_size, softmax_scale, softcap
    mask = without_lists(mask, q)
    causal, window_size, softmax_scale, softcap = _check("attention", given, options, mask, return_lse)
    out, lse = _attend(
        np.asarray(q),
        np.asarray(k),
        np.asarray(v),
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        terms=terms_of(score, bias, rel_bias, mask, dropout_p, seed),
    )
    return (out, lse) if return_lse else out


def attention_backward(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    dlse: ArrayLike | None = None,
    **options: Unpack[FeaturedOptions],
) -> tuple[Array, ...]:
    """Gradients of `attention`: of ``sum(dout * out) + sum(dlse * lse)`` by q, k, v, the sinks and what terms read.

    Parameters
    ----------
    dout : array_like, (batch, seqlen_q, num_heads_q, head_dim_v)
    q, k, v : array_like
        As for `attention`, from which out and lse are computed again.
    dlse : array_like, (batch, num_heads_q, seqlen_q), optional
        0 if None.
    **options
        The keywords of `attention`.

    Returns
    -------
    dq, dk, dv : float64 array
        Shaped like q, k and v.
    dsinks : float64 array, (num_heads_q,)
        Only if sinks are given.
    dscore_arrays, dbias, drel_bias : float64 array
        Of the arrays that a `score` function reads, in their order, of `bias` and of `rel_bias`, as far as they are
        given.

    Raises
    ------
    TypeError, ValueError
        As the function of that name in cufa.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.reference import attention_backward
    >>> x = np.ones((1, 2, 1, 1))
    >>> dq, dk, dv = attention_backward(x, x, x, x, causal=True)
    >>> dv.ravel().round(9).tolist()  # the first key gets all of the first row and half of the second
    [1.5, 0.5]
    """
    given = {"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse}
    scoring = _check_gradients("attention_backward", given, options)
    dlse = None if dlse is None else np.asarray(dlse)
    found = _differentiate(np.asarray(dout), np.asarray(q), np.asarray(k), np.asarray(v), dlse, **scoring)
    return found if scoring["sinks"] is not None else (*found[:3], *found[4:])


@overload
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    seqused_k: ArrayLike | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[FeaturedOptions],
) -> Array: ...
@overload
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    seqused_k: ArrayLike | None = ...,
    return_lse: Literal[True],
    **options: Unpack[FeaturedOptions],
) -> tuple[Array, Array]: ...
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    seqused_k: ArrayLike | None = None,
    causal: bool = False,
    window_size: Window = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    score: Any = None,
    bias: ArrayLike | None = None,
    rel_bias: ArrayLike | None = None,
    mask: Any = None,
    dropout_p: float = 0.0,
    seed: SupportsInt | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention of sequences of different lengths, laid end to end: a loop over `attention`.

    Sequence n has the queries ``q[cu_seqlens_q[n]:cu_seqlens_q[n + 1]]`` and, likewise by `cu_seqlens_k`, a
    slot of rows in k and v. `seqused_k` gives the live length inside each slot; masks are aligned to the live
    length, and what lies behind it, NaN and Inf included, has no effect.

    Parameters
    ----------
    q : array_like, (total_q, num_heads_q, head_dim)
    k : array_like, (total_k, num_heads_k, head_dim)
    v : array_like, (total_k, num_heads_k, head_dim_v)
    cu_seqlens_q, cu_seqlens_k : array_like of int, (batch + 1,)
        Offsets of the sequences, read as their running maximum, clamped to [0, total].
    seqused_k : array_like of int, (batch,), optional
        Live keys of each sequence, clamped to [0, length of its slot]; all of it if None.
    causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, return_lse
        As in `attention`.
    score, bias, rel_bias, mask, dropout_p, seed
        As in `attention`, by the numbers of sequences, and by queries and keys as they are numbered in these.

    Returns
    -------
    out : float64 array, (total_q, num_heads_q, head_dim_v)
        Rows that belong to no sequence are 0.
    lse : float64 array, (num_heads_q, total_q)
        Only if `return_lse`; -inf for rows that belong to no sequence.

    Raises
    ------
    TypeError, ValueError
        As the function of that name in cufa.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.reference import attention_varlen
    >>> q = np.zeros((2, 1, 4))
    >>> k = np.zeros((3, 1, 4))
    >>> v = np.array([1.0, 5.0, 9.0]).reshape(3, 1, 1)
    >>> attention_varlen(q, k, v, [0, 1, 2], [0, 1, 3]).ravel().tolist()  # keys {1} and {5, 9}
    [1.0, 7.0]
    """
    given = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes, "sinks": sinks}
    given |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    given |= {"bias": bias, "rel_bias": rel_bias}
    options = causal, window_size, softmax_scale, softcap
    mask = without_lists(mask, q)
    causal, window_size, softmax_scale, softcap = _check("attention_varlen", given, options, mask, return_lse)
    out, lse = _attend_packed(
        np.asarray(q),
        np.asarray(k),
        np.asarray(v),
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        terms=terms_of(score, bias, rel_bias, mask, dropout_p, seed, function="attention_varlen"),
    )
    return (out, lse) if return_lse else out


def attention_varlen_backward(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    seqused_k: ArrayLike | None = None,
    dlse: ArrayLike | None = None,
    **options: Unpack[FeaturedOptions],
) -> tuple[Array, ...]:
    """Gradients of `attention_varlen`: a loop over `attention_backward`.

    Parameters
    ----------
    dout : array_like, (total_q, num_heads_q, head_dim_v)
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k
        As for `attention_varlen`.
    dlse : array_like, (num_heads_q, total_q), optional
        0 if None.
    **options
        The keywords of `attention_varlen`.

    Returns
    -------
    dq, dk, dv : float64 array
        Shaped like q, k and v; 0 for rows that belong to no sequence or are not live.
    dsinks : float64 array, (num_heads_q,)
        Only if sinks are given.
    dscore_arrays, dbias, drel_bias : float64 array
        Of the arrays that a `score` function reads, in their order, of `bias` and of `rel_bias`, as far as they are
        given.

    Raises
    ------
    TypeError, ValueError
        As the function of that name in cufa.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.reference import attention_varlen_backward
    >>> x = np.ones((3, 1, 1))
    >>> dq, dk, dv = attention_varlen_backward(x, x, x, x, [0, 1, 3], [0, 1, 3], causal=True)
    >>> dv.ravel().round(9).tolist()
    [1.0, 1.5, 0.5]
    """
    given = {"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse}
    given |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    scoring = _check_gradients("attention_varlen_backward", given, options)
    dlse = None if dlse is None else np.asarray(dlse)
    arrays = np.asarray(dout), np.asarray(q), np.asarray(k), np.asarray(v)
    found = _differentiate_packed(*arrays, cu_seqlens_q, cu_seqlens_k, seqused_k, dlse, **scoring)
    return found if scoring["sinks"] is not None else (*found[:3], *found[4:])


class Attended(NamedTuple):
    """What attention with caches gives, and what it leaves in them.

    Attributes
    ----------
    out, lse : float64 array
        As of `attention` or, if sequences are packed, of `attention_varlen`.
    k_cache, v_cache : array
        Copies of the caches, in their dtypes, with new rows appended.
    """

    out: Array
    lse: Array
    k_cache: Array
    v_cache: Array


def attention_with_kvcache(
    q: ArrayLike,
    k_cache: ArrayLike,
    v_cache: ArrayLike,
    *,
    k: ArrayLike | None = None,
    v: ArrayLike | None = None,
    cache_seqlens: ArrayLike | None = None,
    block_table: ArrayLike | None = None,
    cache_batch_idx: ArrayLike | None = None,
    cache_leftpad: ArrayLike | None = None,
    cu_seqlens_q: ArrayLike | None = None,
    rotary_cos: ArrayLike | None = None,
    rotary_sin: ArrayLike | None = None,
    rotary_interleaved: bool = True,
    k_descale: ArrayLike | None = None,
    v_descale: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Attended:
    """Attention over caches of keys and values, to which new ones are appended first: a loop over `attention`.

    Parameters
    ----------
    q : array_like, (batch, seqlen_q, num_heads_q, head_dim) or (total_q, num_heads_q, head_dim)
    k_cache : array_like, (num_caches, capacity, num_heads_k, head_dim) or (num_pages, page_size, num_heads_k, head_dim)
    v_cache : array_like, (num_caches, capacity, num_heads_k, head_dim_v) or (num_pages, page_size, ...)
        They are not changed.
    k, v : array_like, (batch, seqlen_new, num_heads_k, head_dim or head_dim_v) or (total_q, ...), optional
        New rows.
    cache_seqlens : array_like of int, (batch,), optional
        Live keys before new ones are appended; the capacity if None.
    block_table : array_like of int, (batch, max_pages), optional
        Makes the caches pages.
    cache_batch_idx, cache_leftpad : array_like of int, (batch,), optional
    cu_seqlens_q : array_like of int, (batch + 1,), optional
        Makes q, and k and v, packed; read as by `attention_varlen`.
    rotary_cos, rotary_sin : array_like, (max_position, rotary_dim / 2), optional
    rotary_interleaved : bool
    k_descale, v_descale : array_like, () or (num_heads_k,) or (batch, num_heads_k), optional
        What is stored in caches of float8_e4m3fn is multiplied by them. New rows are divided by them in float32, and
        then rounded to the nearest number, those beyond the largest to that.
    **options
        The keywords of `attention`.

    Returns
    -------
    Attended

    Raises
    ------
    TypeError, ValueError
        As the function of that name in cufa, but not because of what arrays of integers hold.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.reference import attention_with_kvcache
    >>> q, caches = np.zeros((1, 1, 1, 4)), np.ones((2, 1, 3, 1, 4))
    >>> new = np.full((2, 1, 1, 1, 4), 4.0)
    >>> found = attention_with_kvcache(q, *caches, k=new[0], v=new[1], cache_seqlens=[1])
    >>> found.out.ravel().tolist(), found.v_cache[0, :, 0, 0].tolist()
    ([2.5, 2.5, 2.5, 2.5], [1.0, 4.0, 1.0])
    """
    given: dict[str, Any] = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    given |= {"cache_seqlens": cache_seqlens}
    given |= {"block_table": block_table, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    given |= {"cu_seqlens_q": cu_seqlens_q, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
    given |= {"k_descale": k_descale, "v_descale": v_descale}
    given |= {"alibi_slopes": options.get("alibi_slopes"), "sinks": options.get("sinks")}
    arrays: dict[str, Any] = {name: None if x is None else np.asarray(x) for name, x in given.items()}
    asked: dict[str, Any] = {"causal": False, "window_size": None, "softmax_scale": None, "softcap": 0.0}
    asked |= {**options, "rotary_interleaved": rotary_interleaved}
    plain = _kvcache.check_host("attention_with_kvcache", arrays, asked, TERMS)
    scoring = {name: getattr(plain, name) for name in ("causal", "window_size", "softmax_scale", "softcap")}
    slopes, sinks = arrays.pop("alibi_slopes"), arrays.pop("sinks")
    advances = _advances(scoring["causal"], scoring["window_size"])
    sequences, k_cache, v_cache = _appended(arrays, plain.own("rotary_interleaved"), advances)

    q_shape, columns = arrays["q"].shape, v_cache.shape[-1]
    out = np.zeros((*q_shape[:-1], columns))
    lse = np.full((*q_shape[:-3], q_shape[-2], q_shape[-3]), -np.inf)
    for number, each in enumerate(sequences):
        slopes_n = slopes[number] if slopes is not None and slopes.ndim == 2 else slopes
        keys, values = (
            _descaled(x[each.keys][None], each, arrays, name) for name, x in (("k", k_cache), ("v", v_cache))
        )
        found = _attend(each.q[None], keys, values, alibi_slopes=slopes_n, sinks=sinks, **scoring)
        out[each.rows], lse[(slice(None), each.rows) if lse.ndim == 2 else each.rows] = (x[0] for x in found)
    return Attended(out, lse, k_cache, v_cache)


def _advances(causal: bool, window_size: Window) -> bool:
    """Whether each row of q has a position of its own for the rotary embedding."""
    return causal or any(side not in (None, -1) for side in window_size or ())


class _Cached(NamedTuple):
    """A sequence of a problem with caches: where its rows are, those of q rotated, and where its live keys lie.

    `number` is its own, `rows` indexes q, and `keys` the caches.
    """

    number: int
    rows: Any
    q: Array
    keys: tuple[Array, Array]


def _descale(arrays: dict[str, Any], name: str, number: int) -> Array:
    """What keys or values of a sequence are to be multiplied by, of each head and column."""
    given = arrays[f"{name}_descale"]
    of_heads = np.ones(()) if given is None else given[number] if given.ndim == 2 else given
    return np.asarray(of_heads, np.float64)[..., None]


def _descaled(stored: Array, sequence: _Cached, arrays: dict[str, Any], name: str) -> Array:
    """Keys or values as they are meant."""
    if arrays[f"{name}_descale"] is None:
        return stored
    return stored.astype(np.float64) * _descale(arrays, name, sequence.number)


def _stored(x: Array, descale: Array, dtype: np.dtype[Any]) -> Array:
    """New rows as caches of another dtype hold them."""
    import ml_dtypes

    largest = float(ml_dtypes.finfo(dtype).max)
    with np.errstate(all="ignore"):  # NaN and Inf are data here
        return np.clip(x.astype(np.float32) / descale.astype(np.float32), -largest, largest).astype(dtype)


def _appended(
    arrays: dict[str, Any], interleaved: bool, advances: bool, error: float = 0.0
) -> tuple[list[_Cached], Array, Array]:
    """The sequences of a problem with caches, and copies of these with new rows.

    `arrays` are those of `attention_with_kvcache`, by name; `advances` is whether each row of q has a position of its
    own. Rotated numbers get an `error` before they are rounded, relative to the magnitudes of their products.
    """
    scaled = arrays["k_cache"].dtype.name in CACHE_DTYPES
    q, offsets, table = arrays["q"], arrays["cu_seqlens_q"], arrays["block_table"]
    k_cache, v_cache = np.array(arrays["k_cache"]), np.array(arrays["v_cache"])
    if offsets is None:
        rows: list[Any] = [*range(len(q))]
    else:
        starts = _offsets(offsets, len(q))
        rows = [slice(int(first), int(last)) for first, last in itertools.pairwise(starts)]
    size = k_cache.shape[1]
    capacity = size if table is None else size * table.shape[1]

    def places(b: int, keys: Array) -> tuple[Array, Array]:
        """The caches or pages in which keys of sequence b lie, which may not be there, and the rows of those."""
        if table is not None:
            return table[b, keys // size], keys % size
        numbers = arrays["cache_batch_idx"]
        return np.full(len(keys), b if numbers is None else numbers[b]), keys

    def rotated(x: Array, positions: Array, dtype: Any) -> Array:
        if arrays["rotary_cos"] is None:
            return x
        cos, sin = (arrays[name][np.clip(positions, 0, len(arrays[name]) - 1)] for name in ("rotary_cos", "rotary_sin"))
        exact = _rotate(x, cos, sin, interleaved)
        if error:
            sizes = [_rotate(np.abs(x), np.abs(cos), sign * np.abs(sin), interleaved) for sign in (1, -1)]
            exact[..., : 2 * cos.shape[-1]] += error * np.maximum(*sizes)[..., : 2 * cos.shape[-1]]
        return exact.astype(dtype)

    found = []
    for b, own in enumerate(rows):
        first = capacity if arrays["cache_seqlens"] is None else int(np.clip(arrays["cache_seqlens"][b], 0, capacity))
        new = 0 if arrays["k"] is None else len(arrays["k"][own])
        numbers, there = places(b, np.arange(first, min(first + new, capacity)))
        kept = (numbers >= 0) & (numbers < len(k_cache))
        if new:
            k, v = arrays["k"][own], arrays["v"][own]
            k = rotated(k, first + np.arange(new), np.float64 if scaled else k.dtype)
            if scaled:
                k, v = (_stored(x, _descale(arrays, name, b), k_cache.dtype) for name, x in (("k", k), ("v", v)))
            k_cache[numbers[kept], there[kept]] = k[: len(kept)][kept]
            v_cache[numbers[kept], there[kept]] = v[: len(kept)][kept]
        last = min(first + new, capacity)
        leftpad = 0 if arrays["cache_leftpad"] is None else int(np.clip(arrays["cache_leftpad"][b], 0, last))
        numbers, there = places(b, np.arange(leftpad, last))
        q_rotated = rotated(q[own], first + np.arange(len(q[own])) * int(advances), q.dtype)
        found.append(_Cached(b, own, q_rotated, (np.clip(numbers, 0, len(k_cache) - 1), there)))
    return found, k_cache, v_cache


def _rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Rotary embedding in float64: x (rows, heads, head_dim) by the angles of each row, (rows, rotary_dim / 2)."""
    half = cos.shape[-1]
    rotated = x.astype(np.float64)
    first, second = np.arange(half), np.arange(half) + half
    if interleaved:
        first, second = 2 * np.arange(half), 2 * np.arange(half) + 1
    a, b = rotated[..., first], rotated[..., second]
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    with np.errstate(all="ignore"):  # NaN and Inf are data here
        rotated[..., first], rotated[..., second] = a * cos - b * sin, a * sin + b * cos
    return rotated


def terms_of(
    score: Any = None,
    bias: ArrayLike | None = None,
    rel_bias: ArrayLike | None = None,
    mask: Any = None,
    dropout_p: float = 0.0,
    seed: SupportsInt | None = None,
    *,
    function: str = "attention",
) -> list[Term]:
    """The further score terms that the keywords of these names ask for, in their order.

    Rates and seeds are refused as `function` in cufa refuses them.
    """
    terms: list[Term] = []
    if score is not None:
        from ._specification.function import Function

        terms.append(Function.of(score, "score"))
    if bias is not None:
        from ._specification.bias import Bias

        terms.append(Bias(bias))
    if rel_bias is not None:
        from ._specification.rel_bias import RelBias

        terms.append(RelBias(rel_bias))
    if callable(mask) or isinstance(mask, tuple):
        from ._specification.function import Function

        terms.append(Function.of(mask, "mask"))
    elif mask is not None:
        from ._specification.mask import Mask

        terms.append(Mask(mask))
    if dropout_p != 0 or seed is not None:
        from ._specification.dropout import Dropout
        from ._terms.dropout import plain

        dropout_p, seed = plain(function, dropout_p, seed)
        if dropout_p != 0:
            terms.append(Dropout(dropout_p, seed))
    return terms


def checked_terms() -> tuple[Any, ...]:
    """The score terms of cufa whose arrays are checked."""
    from ._terms.bias import BIAS
    from ._terms.mask_array import MASK_ARRAY
    from ._terms.rel_bias import REL_BIAS

    return *TERMS, BIAS, REL_BIAS, MASK_ARRAY


def without_lists(mask: Any, q: Any) -> Any:
    """A mask or, of a `cufa.BlockMask`, whose lists are of key heads, the array of what q's heads see."""
    if not hasattr(mask, "block_size"):
        return mask
    seen = mask.dense()
    return seen if seen.shape[1] == 1 else seen.repeat(np.shape(q)[-2] // seen.shape[1], axis=1)


def is_array(mask: Any) -> bool:
    """Whether a mask is an array of booleans, and no function or object."""
    return mask is not None and not (callable(mask) or hasattr(mask, "dense") or isinstance(mask, tuple))


def _check(
    function: str, given: dict[str, Any], options: tuple[Any, ...], mask: Any = None, return_lse: bool = False
) -> tuple[bool, Window, float | None, float]:
    """Refuse what the function of that name in cufa refuses, in its words; the options as plain values."""
    _options.flag(function, "return_lse", return_lse)
    arrays = {name: None if x is None else np.asarray(x) for name, x in given.items()}
    if is_array(mask):
        seen = np.asarray(mask)
        arrays["mask"] = seen != 0 if seen.dtype == np.uint8 else seen
    return _problem.check_host(function, arrays, options, checked_terms())


def _check_gradients(function: str, given: dict[str, Any], options: FeaturedOptions) -> dict[str, Any]:
    """What the gradients are told beside arrays, once it is checked."""
    given |= {name: options.get(name) for name in ("alibi_slopes", "sinks", "bias", "rel_bias")}
    window_size, softmax_scale = options.get("window_size"), options.get("softmax_scale")
    asked = options.get("causal", False), window_size, softmax_scale, options.get("softcap", 0.0)
    mask = without_lists(options.get("mask"), given["q"])
    causal, window_size, softmax_scale, softcap = _check(function, given, asked, mask)
    further = {name: value for name, value in options.items() if name not in Options.__optional_keys__} | {"mask": mask}
    return {
        "causal": causal,
        "window_size": window_size,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "alibi_slopes": options.get("alibi_slopes"),
        "sinks": options.get("sinks"),
        "terms": terms_of(**further, function=function),  # type: ignore[arg-type]
    }


def _attend_packed(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    seqused_k: ArrayLike | None,
    *,
    alibi_slopes: ArrayLike | None = None,
    terms: Sequence[Term] = (),
    **options: Any,
) -> tuple[Array, Array]:
    """`_attend` for each sequence: out (total_q, num_heads_q, head_dim_v) and lse (num_heads_q, total_q)."""
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    lse = np.full((q.shape[1], q.shape[0]), -np.inf)
    sequences = _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes)
    for number, each in enumerate(sequences):
        own: dict[str, Any] = {"alibi_slopes": each.alibi_slopes, "terms": terms, "sequence": number}
        out_n, lse_n = _attend(each.q, each.k, each.v, **own, **options)
        out[each.rows], lse[:, each.rows] = out_n[0], lse_n[0]
    return out, lse


def _differentiate_packed(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    seqused_k: ArrayLike | None,
    dlse: Array | None,
    *,
    alibi_slopes: ArrayLike | None = None,
    terms: Sequence[Term] = (),
    **options: Any,
) -> tuple[Array, ...]:
    """`_differentiate` for each sequence; what all of them read has the sum of their gradients."""
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    shared: list[Any] = []  # dsinks and the terms' gradients, of each sequence
    sequences = _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes)
    for number, each in enumerate(sequences):
        own: dict[str, Any] = {"alibi_slopes": each.alibi_slopes, "terms": terms, "sequence": number}
        dout_n, dlse_n = dout[None, each.rows], None if dlse is None else dlse[None, :, each.rows]
        found = _differentiate(dout_n, each.q, each.k, each.v, dlse_n, **own, **options)
        dq[each.rows], dk[each.keys], dv[each.keys] = (gradient[0] for gradient in found[:3])
        shared.append(found[3:])
    if not shared:  # of no sequence, the gradients are those of one without rows
        none = [x[None, :0] for x in (dout, q, k, v)]
        shared.append(_differentiate(none[0], none[1], none[2], none[3], None, terms=terms, **options)[3:])
    return dq, dk, dv, *(np.sum(each, axis=0) for each in zip(*shared, strict=True))


class _Sequence(NamedTuple):
    """A sequence of a varlen problem as a dense problem of batch 1, and where its rows and live keys lie."""

    rows: slice
    keys: slice
    q: Array
    k: Array
    v: Array
    alibi_slopes: Array | None


def _sequences(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    seqused_k: ArrayLike | None,
    alibi_slopes: ArrayLike | None,
) -> Iterator[_Sequence]:
    """The sequences of a varlen problem."""
    starts_q, starts_k = _offsets(cu_seqlens_q, len(q)), _offsets(cu_seqlens_k, len(k))
    lengths_k = np.diff(starts_k)
    if seqused_k is not None:
        lengths_k = np.clip(np.asarray(seqused_k), 0, lengths_k)
    slopes = None if alibi_slopes is None else np.asarray(alibi_slopes)
    for n in range(len(starts_q) - 1):
        rows = slice(int(starts_q[n]), int(starts_q[n + 1]))
        keys = slice(int(starts_k[n]), int(starts_k[n]) + int(lengths_k[n]))
        slopes_n = slopes[n] if slopes is not None and slopes.ndim == 2 else slopes
        yield _Sequence(rows, keys, q[None, rows], k[None, keys], v[None, keys], slopes_n)


def _offsets(given: ArrayLike, total: int) -> Array:
    """Offsets as they are read: not decreasing, and within the packed array."""
    offsets: Array = np.clip(np.maximum.accumulate(np.asarray(given)), 0, total)
    return offsets


def _attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window_size: Window = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    terms: Sequence[Term] = (),
    sequence: int = 0,
    precision: Precision = EXACT,
) -> tuple[Array, Array]:
    """Steps 1 to 6 in the given precision: out (batch, seqlen_q, num_heads_q, head_dim_v) and lse.

    `sequence` is what `terms` take for the number of the first batch entry.
    """
    _check_shapes(q, k, v)
    keep = _keep(q.shape[1], k.shape[1], causal, window_size)
    with np.errstate(all="ignore"):  # NaN and Inf are data here
        at = _at(q, k, sequence)
        s = _scores(q, k, softmax_scale, softcap, alibi_slopes, precision)
        for term in terms:
            s = term.score(s, at)
            keep = keep & np.asarray(term.keep(at))
        p, lse = _softmax(np.where(keep, s, -np.inf), sinks)
        p = (p * _factor(terms, at)).astype(precision.storage).astype(precision.compute)
        out = _mean(p, v.astype(precision.compute), keep)
        out = np.where(np.isneginf(lse).swapaxes(1, 2)[..., None], 0, out)
        return out.astype(precision.storage).astype(precision.compute), lse


def _differentiate(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    dlse: Array | None,
    *,
    causal: bool = False,
    window_size: Window = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    terms: Sequence[Term] = (),
    sequence: int = 0,
    precision: Precision = EXACT,
) -> tuple[Array, ...]:
    """Steps 7 to 11 in the given precision: dq, dk, dv, dsinks and the gradients of `terms`, in their order.

    p and ds are rounded before they are multiplied. `sequence` is as in `_attend`.
    """
    _check_shapes(q, k, v)
    if dout.shape != (*q.shape[:3], v.shape[3]):
        raise ValueError(f"attention_backward: dout {dout.shape} does not belong to q {q.shape} and v {v.shape}.")
    if dlse is not None and dlse.shape != (q.shape[0], q.shape[2], q.shape[1]):
        raise ValueError(f"attention_backward: dlse {dlse.shape} does not belong to q {q.shape}.")
    compute: Any = np.dtype(precision.compute).type

    def rounded(x: Array) -> Array:
        return x.astype(precision.storage).astype(precision.compute)

    keep = _keep(q.shape[1], k.shape[1], causal, window_size)
    with np.errstate(all="ignore"):  # NaN and Inf are data here
        raw = _scores(q, k, softmax_scale, softcap, None, precision)
        s = raw if alibi_slopes is None else _scores(q, k, softmax_scale, softcap, alibi_slopes, precision)
        at, before = _at(q, k, sequence), []
        for term in terms:
            before.append(s)
            s = term.score(s, at)
            keep = keep & np.asarray(term.keep(at))
        p, lse = _softmax(np.where(keep, s, -np.inf), sinks)
        p = np.where(keep, p, 0)  # also in a row that is NaN
        factor = _factor(terms, at)
        scaled = np.where(keep, p * factor, 0)
        empty = np.isneginf(lse)
        dlse = np.where(empty, 0, 0 if dlse is None else dlse).astype(compute)
        unseen = empty | ~keep.any(axis=-1)
        dout = np.where(unseen.swapaxes(1, 2)[..., None], 0, dout).astype(compute)
        q, k, v = (x.astype(compute) for x in (q, k, v))
        dp = _by_heads(dout.swapaxes(1, 2), v.transpose(0, 2, 3, 1))
        out = np.where(unseen.swapaxes(1, 2)[..., None], 0, rounded(_mean(rounded(scaled), v, keep)))
        delta = (dout * out).sum(axis=-1).swapaxes(1, 2)
        ds = np.where(keep, p * (factor * dp - delta[..., None] + dlse[..., None]), 0)
        of_terms: list[Array] = []
        for term, s_before in zip(reversed(terms), reversed(before), strict=True):
            of_terms = [*term.gradient(ds, s_before, at), *of_terms]
            ds = np.where(keep, ds * term.slope(s_before, at), 0)
        if softcap > 0:
            ds = np.where(keep, ds * (1 - (raw / compute(softcap)) ** 2), 0)
        sink = np.full(q.shape[2], -np.inf) if sinks is None else np.asarray(sinks)
        sink = sink.astype(compute)[:, None]
        # A sink that alone makes up lse has probability 1, +inf included.
        p_sink = np.where(empty, 0, np.where(sink == lse, 1, np.exp(sink - lse)))
        dsinks = np.where(p_sink != 0, p_sink * (dlse - delta), 0).sum(axis=(0, 2))
        scaled, ds = rounded(scaled), rounded(ds)
        scale = compute(q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        dq = scale * _weighted_sum(ds, k, keep)
        dk = scale * _sum_groups(_weighted_sum(ds.swapaxes(2, 3), q, keep.swapaxes(-1, -2)), k)
        dv = _sum_groups(_weighted_sum(scaled.swapaxes(2, 3), dout, keep.swapaxes(-1, -2)), v)
        return rounded(dq), rounded(dk), rounded(dv), dsinks, *of_terms


def _at(q: Array, k: Array, sequence: int) -> At:
    """Where the scores of a dense problem are."""
    batch = sequence + np.arange(q.shape[0])[:, None, None, None]
    head, query, key = np.arange(q.shape[2])[:, None, None], np.arange(q.shape[1])[:, None], np.arange(k.shape[1])
    return At(batch, head, query, key, query + k.shape[1] - q.shape[1] - key)


def _factor(terms: Sequence[Term], at: At) -> Any:
    """The product of all factors."""
    product: Any = 1
    for term in terms:
        product = product * np.asarray(term.factor(at))
    return product


def _sum_groups(x: Array, like: Array) -> Array:
    """Gradients of k or v, from (batch, seqlen_k, num_heads_q, ·): summed over the heads that share a key head."""
    batch, seqlen_k, heads, _ = like.shape
    group = x.shape[2] // max(heads, 1)
    summed: Array = x.reshape(batch, seqlen_k, heads, group, x.shape[-1]).sum(axis=3)
    return summed


def _check_shapes(q: Array, k: Array, v: Array) -> None:
    """Raise where broadcasting would go on: dimensions of 1 are not special in attention."""
    shapes = f"q {q.shape}, k {k.shape} and v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"attention: {shapes} do not agree in batch, seqlen_k and num_heads_k.")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: {shapes} do not agree in head_dim.")
    if q.shape[2] % max(k.shape[2], 1) or (q.shape[2] and not k.shape[2]):
        raise ValueError(f"attention: {shapes}: num_heads_q is not a multiple of num_heads_k.")


def _keep(seqlen_q: int, seqlen_k: int, causal: bool, window_size: Window) -> NDArray[np.bool_]:
    """Step 4: which keys each row keeps, (seqlen_q, seqlen_k)."""
    left, right = (None, None) if window_size is None else window_size
    diagonal = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    j = np.arange(seqlen_k)[None, :]
    keep = np.ones((seqlen_q, seqlen_k), dtype=np.bool_)
    if causal:
        keep &= j <= diagonal
    if left is not None and left != -1:
        keep &= j >= diagonal - left
    if right is not None and right != -1:
        keep &= j <= diagonal + right
    return keep


def _by_heads(x: Array, y: Array) -> Array:
    """x @ y, (batch, num_heads_q, ·, ·) by (batch, num_heads_k, ·, ·), where heads in a row of x share one of y.

    Their rows are rows of one product, so that y need not be repeated for each of them.
    """
    batch, heads, rows, _ = x.shape
    if heads == y.shape[1]:
        return np.asarray(x @ y)
    joined = x.reshape(batch, y.shape[1], heads // y.shape[1] * rows, x.shape[3])
    return (joined @ y).reshape(batch, heads, rows, y.shape[3])


def _scores(
    q: Array,
    k: Array,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: ArrayLike | None,
    precision: Precision = EXACT,
) -> Array:
    """Steps 1 to 3: every score before the mask, (batch, num_heads_q, seqlen_q, seqlen_k)."""
    compute: Any = np.dtype(precision.compute).type
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    s: Array = compute(scale) * _by_heads(q.swapaxes(1, 2).astype(compute), k.transpose(0, 2, 3, 1).astype(compute))
    if softcap > 0:
        s = compute(softcap) * np.tanh(s / compute(softcap))
    if alibi_slopes is not None:
        slopes = np.atleast_2d(np.asarray(alibi_slopes, dtype=compute))[:, :, None, None]
        seqlen_q, seqlen_k = s.shape[2:]
        distance = np.abs(np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - np.arange(seqlen_k)[None, :])
        s = s - slopes * distance.astype(compute)
    return s


def _softmax(s: Array, sinks: ArrayLike | None) -> tuple[Array, Array]:
    """Step 5: p like s, and lse (batch, num_heads_q, seqlen_q)."""
    # No sink is a sink of -inf: one more column, which also spares the sum over no keys at all.
    sink = np.full(s.shape[1], -np.inf) if sinks is None else np.asarray(sinks)
    column = np.broadcast_to(sink.astype(s.dtype)[:, None, None], (*s.shape[:3], 1))
    s_and_sink = np.concatenate([s, column], axis=-1)
    largest = s_and_sink.max(axis=-1)  # NaN if there is one
    lse: Array = np.asarray(logsumexp(s_and_sink, axis=-1), dtype=s.dtype)
    lse = np.where(np.isfinite(largest), lse, largest)
    # exp(s - lse), but exact where lse is so large that the logarithm of a sum of ones is lost in it.
    total = np.exp(s_and_sink - largest[..., None]).sum(axis=-1, keepdims=True)
    p = np.where(np.isfinite(largest)[..., None], np.exp(s - largest[..., None]) / total, np.exp(s - lse[..., None]))
    return np.where(np.isneginf(lse)[..., None], 0, p).astype(s.dtype), lse


def _mean(p: Array, v: Array, keep: NDArray[np.bool_]) -> Array:
    """Step 6, which cannot overflow: no weighted mean is larger than the largest of v."""
    largest = np.finfo(v.dtype).max / 2
    half = _weighted_sum(p, v / 2, keep)
    return 2 * np.where(np.isinf(half), half, np.clip(half, -largest, largest))


def _weighted_sum(p: Array, v: Array, keep: NDArray[np.bool_]) -> Array:
    """p (batch, num_heads_q, seqlen_q, seqlen_k) by v (batch, seqlen_k, num_heads_k, ·), over kept entries alone."""
    v_heads = v.swapaxes(1, 2)
    finite = np.isfinite(v).all(axis=(0, 2, 3))
    if finite.all():
        return _by_heads(p, v_heads).swapaxes(1, 2)
    out = _by_heads(p[..., finite], v_heads[:, :, finite])
    for j in np.flatnonzero(~finite):  # 0 · NaN is NaN, but a removed key must contribute nothing
        row = np.repeat(v_heads[:, :, j, None], p.shape[1] // v.shape[2], axis=1)
        out = out + np.where(keep[..., j, None], p[..., j, None] * row, 0)
    return out.swapaxes(1, 2)


def merge_states(
    out_a: ArrayLike, lse_a: ArrayLike, out_b: ArrayLike | None = None, lse_b: ArrayLike | None = None
) -> tuple[Array, Array]:
    """The state of all keys from those of two parts of them, or of several along the first axis.

    Parameters
    ----------
    out_a, out_b : array_like, (batch, seqlen_q, num_heads, head_dim) or (total_q, num_heads, head_dim)
        Of two parts; or `out_a` and `lse_a` of several, behind a first axis, with one more behind them or without.
    lse_a, lse_b : array_like, (batch, num_heads, seqlen_q) or (num_heads, total_q)

    Returns
    -------
    out, lse : array

    Examples
    --------
    >>> import numpy as np
    >>> from cufa import reference
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 8, 2, 16))
    >>> parts = [reference.attention(q, k[:, i], v[:, i], return_lse=True) for i in (slice(3), slice(3, 8))]
    >>> out, lse = reference.merge_states(*parts[0], *parts[1])
    >>> np.allclose(out, reference.attention(q, k, v))
    True
    """
    outs, lses = _states(out_a, lse_a, out_b, lse_b)
    weights, lse = _weights(lses)
    return np.sum(_along(weights) * _live(outs, lses), axis=0), lse


def merge_states_backward(
    dout: ArrayLike,
    out_a: ArrayLike,
    lse_a: ArrayLike,
    out_b: ArrayLike | None = None,
    lse_b: ArrayLike | None = None,
    *,
    dlse: ArrayLike | None = None,
) -> tuple[Array, ...]:
    """The gradients of `merge_states`.

    Parameters
    ----------
    dout, dlse : array_like
        By what it returned; dlse is 0 if None.
    out_a, lse_a, out_b, lse_b : array_like
        What it was called with.

    Returns
    -------
    dout_a, dlse_a : array
    dout_b, dlse_b : array
        Only with `out_b`.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa import reference
    >>> outs, lses, dout = np.ones((3, 5, 2, 16)), np.zeros((3, 2, 5)), np.ones((5, 2, 16))  # three alike
    >>> douts, dlses = reference.merge_states_backward(dout, outs, lses)
    >>> np.allclose(douts, dout / 3) and np.allclose(dlses, 0)
    True
    """
    outs, lses = _states(out_a, lse_a, out_b, lse_b)
    weights, _ = _weights(lses)
    gradient = np.asarray(dout, np.float64)
    deltas = np.sum(gradient * _live(outs, lses), axis=-1).swapaxes(-1, -2)
    mean = np.sum(weights * deltas, axis=0)
    dlses = weights * (deltas - mean + (0.0 if dlse is None else np.asarray(dlse, np.float64)))
    douts, dlses = _live(_along(weights) * gradient, lses), np.where(np.isneginf(lses), 0.0, dlses)
    if out_b is None:
        return douts, dlses
    several = np.ndim(out_a) > np.ndim(out_b)
    first = (douts[:-1], dlses[:-1]) if several else (douts[0], dlses[0])
    return *first, douts[-1], dlses[-1]


def _states(
    out_a: ArrayLike, lse_a: ArrayLike, out_b: ArrayLike | None, lse_b: ArrayLike | None
) -> tuple[Array, Array]:
    """out and lse of all states behind each other."""
    outs, lses = np.asarray(out_a, np.float64), np.asarray(lse_a, np.float64)
    if out_b is None or lse_b is None:
        return outs, lses
    if outs.ndim == np.ndim(out_b):
        outs, lses = outs[None], lses[None]
    return np.concatenate([outs, np.asarray([out_b], np.float64)]), np.concatenate(
        [lses, np.asarray([lse_b], np.float64)]
    )


def _weights(lses: Array) -> tuple[Array, Array]:
    """What states of such lse count in the merged one, and its lse."""
    with np.errstate(invalid="ignore", divide="ignore"):
        largest = np.fmax.reduce(lses, axis=0, initial=-np.inf)
        counts = np.where(lses == largest, 1.0, np.exp(lses - largest))  # +inf beside +inf, too
        counts[np.isneginf(lses)] = 0.0
        total = np.sum(counts, axis=0)
        weights = np.where(np.isneginf(lses), 0.0, counts / total)
        return weights, np.where(total == 0.0, -np.inf, largest + np.log(total))


def _along(x: Array) -> Array:
    """What belongs to (heads, rows), for (rows, heads, columns)."""
    return x.swapaxes(-1, -2)[..., None]


def _live(outs: Array, lses: Array) -> Array:
    """out of states, with zeros where they have no keys."""
    return np.where(_along(np.isneginf(lses)), 0.0, outs)


def rotary(
    q: ArrayLike,
    k: ArrayLike | None,
    cos: ArrayLike,
    sin: ArrayLike,
    *,
    positions: ArrayLike | None = None,
    offsets: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    interleaved: bool = True,
    inverse: bool = False,
) -> Array | tuple[Array, Array]:
    """Rotary embedding of q and k.

    Parameters
    ----------
    q, k : array_like, (batch, seqlen, num_heads, head_dim) or (total, num_heads, head_dim)
        k may be None.
    cos, sin : array_like, (max_position, rotary_dim / 2)
    positions : array_like of int, (batch, seqlen) or (total,), optional
    offsets : array_like of int, (batch,), optional
    cu_seqlens : array_like of int, (batch + 1,), optional
    interleaved, inverse : bool
        As for `cufa.rotary`.

    Returns
    -------
    q_out : array
    k_out : array
        Only with `k`.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa import reference
    >>> x, angles = np.ones((1, 3, 1, 4)), np.arange(3)[:, None] * np.array([1.0, 0.1])
    >>> turned = reference.rotary(x, None, np.cos(angles), np.sin(angles))
    >>> np.allclose(reference.rotary(turned, None, np.cos(angles), np.sin(angles), inverse=True), x)
    True
    """
    cosines, sines = (np.asarray(each, np.float64) for each in (cos, sin))
    sines = -sines if inverse else sines
    given = [np.asarray(x, np.float64) for x in (q, k) if x is not None]
    shape = given[0].shape[:-2]
    rows = np.broadcast_to(np.arange(shape[-1]), shape)
    turned, where = np.ones(shape, bool), rows
    if positions is not None:
        where = np.asarray(positions)
    elif cu_seqlens is not None:
        ends = np.maximum.accumulate(np.clip(np.asarray(cu_seqlens), 0, shape[-1]))
        turned, where = np.zeros(shape, bool), np.zeros(shape, int)
        for b, (begin, end) in enumerate(pairwise(ends)):
            turned[begin:end] = True
            where[begin:end] = np.arange(end - begin) + (0 if offsets is None else np.asarray(offsets)[b])
    elif offsets is not None:
        where = rows + np.asarray(offsets).reshape(-1, *[1] * (len(shape) - 1))
    results = []
    for x in given:
        flat = x.reshape(where.size, *x.shape[-2:])
        found = _rotate(flat, cosines[where.ravel()], sines[where.ravel()], interleaved)
        results.append(np.where(turned[..., None, None], found.reshape(x.shape), x))
    return results[0] if k is None else (results[0], results[1])

"""Problems with key-value caches, a Hypothesis strategy that draws them, and their results beside the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cufa.reference import Window

from .. import reference
from .._call import kvcache as _kvcache
from .._call.problem import CACHE_DTYPES
from .._terms import TERMS
from ._cases import DTYPES, HEAD_DIMS, LAYOUTS, SEQLENS, View, drawn, features_of
from ._compare import Problem, complain, complaint, forward_noise, to_numpy

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Array: TypeAlias = NDArray[Any]

KVCACHE_VALUES = ("normal", "large rows", "huge", "huge scores", "tiny")
PAGE_SIZES = (0, 0, 0, 0, 1, 2, 7, 16, 24, 64, 256)


@dataclass(frozen=True, kw_only=True)
class KVCacheCase:
    """One problem with caches: its sizes, options and memory layouts, from which its arrays follow.

    What is not live in caches, rows that new ones replace included, is NaN, Inf and the largest numbers.

    Attributes
    ----------
    batch, num_heads_q, num_heads_k, head_dim, head_dim_v : int
    seqlen_q : int or tuple of int
        A tuple packs the queries: the length of each sequence, `batch` of them.
    seqlen_new : int or None
        New rows of each sequence, of packed ones as many as queries; None if none are given.
    lengths : tuple of int or None
        `cache_seqlens`, which with the new rows are at most the capacity.
    capacity : int
        Of each cache; in pages it is rounded up to whole ones.
    page_size : int
        0 makes caches contiguous.
    shares_pages : bool
        Whether whole pages of the first sequence, to which nothing is appended, are others' too.
    use_cache_batch_idx : bool
        Contiguous: whether there are more caches than sequences, in another order.
    leftpad : tuple of int or None
        `cache_leftpad`.
    rotary_dim : int
        0 if nothing is rotated.
    rotary_interleaved : bool
    rotary_dtype : str
    dtype, causal, window_size, softmax_scale, softcap, alibi_ndim, sinks, return_lse, use_out
        As of `Case`.
    cache_dtype : str
        Of the caches; empty makes it that of the others.
    descale_ndim : {None, 0, 1, 2}
        Of `k_descale` and `v_descale`; None if there are none.
    num_splits : int
    layouts : (str, str, str, str)
        Of q, both caches, new rows and out, see `View.of`. Memory between the elements is NaN.
    values : str
        As of `Case`: ``normal``, ``large rows``, ``huge``, ``huge scores`` or ``tiny``.
    wild : bool
        Whether lengths, caches, pages and offsets hold some numbers that are not there, which NumPy and torch refuse on
        the CPU. Everything in caches is finite then.
    seed : int
        Of the values.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa import reference
    >>> from cufa.testing import KVCacheCase, assert_kvcache_close
    >>> case = KVCacheCase(batch=2, lengths=(5, 0), seqlen_new=1, capacity=32, page_size=8)
    >>> arrays = case.arrays()
    >>> found = reference.attention_with_kvcache(**arrays, **case.options)
    >>> assert_kvcache_close(found.out, caches=(found.k_cache, found.v_cache), **arrays, **case.options)
    """

    batch: int = 1
    seqlen_q: int | tuple[int, ...] = 1
    seqlen_new: int | None = None
    lengths: tuple[int, ...] | None = None
    capacity: int = 16
    page_size: int = 0
    shares_pages: bool = False
    use_cache_batch_idx: bool = False
    leftpad: tuple[int, ...] | None = None
    num_heads_q: int = 1
    num_heads_k: int = 1
    head_dim: int = 16
    head_dim_v: int = 16
    rotary_dim: int = 0
    rotary_interleaved: bool = True
    rotary_dtype: str = "float32"
    dtype: str = "float32"
    cache_dtype: str = ""
    descale_ndim: Literal[0, 1, 2] | None = None
    causal: bool = False
    window_size: Window = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi_ndim: Literal[0, 1, 2] = 0
    sinks: bool = False
    num_splits: int = 0
    return_lse: bool = False
    use_out: bool = False
    layouts: tuple[str, str, str, str] = ("contiguous", "contiguous", "contiguous", "contiguous")
    values: str = "normal"
    wild: bool = False
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The keywords that are not arrays, but for `num_splits`, which the reference does not know."""
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
            "rotary_interleaved": self.rotary_interleaved,
        }

    @property
    def max_pages(self) -> int:
        """Pages for each sequence."""
        return -(-self.capacity // self.page_size) if self.page_size else 0

    @property
    def num_caches(self) -> int:
        """Caches, or pages, some of them no sequence's."""
        if self.page_size:
            return self.batch * self.max_pages + 2
        return self.batch + (3 if self.use_cache_batch_idx else 0)

    def ranges(self) -> list[tuple[int, int, int]]:
        """Of each sequence, the first key, that which is appended first, and how many there are in the end."""
        capacity, found = self.max_pages * self.page_size or self.capacity, []
        for b in range(self.batch):
            first = capacity if self.lengths is None else self.lengths[b]
            new = self.seqlen_q[b] if isinstance(self.seqlen_q, tuple) else self.seqlen_new or 0
            last = first + (0 if self.seqlen_new is None else new)
            found.append((0 if self.leftpad is None else self.leftpad[b], first, last))
        return found

    def view(self, name: str) -> View:
        """The view of q, k, v, k_cache, v_cache or out."""
        layout = self.layouts[{"q": 0, "k_cache": 1, "v_cache": 1, "k": 2, "v": 2, "out": 3}[name]]
        width = self.head_dim_v if name in ("v", "v_cache", "out") else self.head_dim
        heads = self.num_heads_q if name in ("q", "out") else self.num_heads_k
        if name.endswith("_cache"):
            leading: tuple[int, ...] = (self.num_caches, self.page_size or self.capacity)
        elif isinstance(self.seqlen_q, tuple):
            leading = (sum(self.seqlen_q),)
        else:
            leading = (self.batch, self.seqlen_q if name in ("q", "out") else self.seqlen_new or 0)
        return View.of((*leading, heads, width), layout)

    def flat(self, name: str) -> Array:
        """The flat memory under such an array: values in its view and NaN elsewhere; for out, only NaN."""
        view, named = self.view(name), self.cache_dtype or self.dtype if name.endswith("_cache") else self.dtype
        dtype = np.dtype(getattr(ml_dtypes, named, named))
        largest = float(ml_dtypes.finfo(dtype).max)
        flat: Array = np.full(view.size, np.nan, dtype)
        if name == "out":
            return flat
        array, rng = view.on(flat), np.random.default_rng([self.seed, *name.encode()])
        with np.errstate(all="ignore"):  # large numbers are rounded to the dtype, where they fit
            values = drawn(self.values, name[0], view.shape, self.dtype, rng)
            array[...] = np.clip(values, -largest, largest)
        if name.endswith("_cache") and not self.wild:
            live, small = np.zeros(view.shape[:2], np.bool_), self.integers()
            for b, (leftpad, first, _) in enumerate(self.ranges()):
                keys = np.arange(leftpad, max(leftpad, first))
                if self.page_size:
                    live[small["block_table"][b, keys // self.page_size], keys % self.page_size] = True
                else:
                    live[small["cache_batch_idx"][b] if self.use_cache_batch_idx else b, keys] = True
            dead = [np.nan, np.inf, -np.inf, largest, -largest]
            with np.errstate(all="ignore"):  # where there is no infinity, that is NaN too
                array[~live] = rng.choice(dead, int((~live).sum()))[:, None, None].astype(dtype)
        return flat

    def integers(self) -> dict[str, Array]:
        """cache_seqlens, block_table, cache_batch_idx, cache_leftpad and cu_seqlens_q, as far as they are given."""
        rng, found = np.random.default_rng([self.seed, 1]), dict[str, Array]()
        if self.lengths is not None:
            found["cache_seqlens"] = np.array(self.lengths, np.int64)
        if self.leftpad is not None:
            found["cache_leftpad"] = np.array(self.leftpad, np.int64)
        if isinstance(self.seqlen_q, tuple):
            found["cu_seqlens_q"] = np.cumsum((0, *self.seqlen_q))
        if self.page_size:
            found["block_table"] = self._table(rng)
        elif self.use_cache_batch_idx:
            found["cache_batch_idx"] = rng.permutation(self.num_caches)[: self.batch]
        for name, array in found.items() if self.wild else ():
            strange = rng.random(array.shape) < (0.1 if name == "block_table" else 0.3)
            strange &= name != "cu_seqlens_q" or self.seqlen_new is None  # else sequences might write the same rows
            array[strange] += rng.integers(-5, 6, int(strange.sum())) if name.startswith("c") else 0
            far = strange & (rng.random(array.shape) < 0.3)
            array[far] = rng.choice([-(2**31), -1, self.num_caches, 2**31 - 1], int(far.sum()))
        if self.wild and "cache_batch_idx" in found:
            numbers = found["cache_batch_idx"]
            repeated = (numbers >= 0) & (numbers < self.num_caches)
            repeated[np.unique(numbers, return_index=True)[1]] = False
            numbers[repeated] = -1
        return {name: array.astype(np.int32) for name, array in found.items()}

    def _table(self, rng: np.random.Generator) -> Array:
        """Pages in any order; where no key lies, any number."""
        count = self.num_caches
        table = rng.permutation(count)[: self.batch * self.max_pages].reshape(self.batch, self.max_pages)
        table = table.astype(np.int64)
        ranges = self.ranges()
        for b, (_, first, last) in enumerate(ranges):
            if self.shares_pages and not self.wild:
                whole = min(first, ranges[0][1]) // self.page_size
                table[b, :whole] = table[0, :whole]
            dead = table[b, -(-last // self.page_size) :]
            # A number that is another's page would let two write the same rows, where lengths are wild.
            dead[...] = rng.choice([-(2**31), -1, count, 2**31 - 1, *([] if self.wild else [0])], len(dead))
        return table

    def rotary(self) -> dict[str, Array]:
        """rotary_cos and rotary_sin, if anything is rotated."""
        if not self.rotary_dim:
            return {}
        longest = max((*self.seqlen_q, 1) if isinstance(self.seqlen_q, tuple) else (self.seqlen_q, 1))
        positions = max((max(first + longest, last) for _, first, last in self.ranges()), default=1)
        angles = np.random.default_rng([self.seed, 2]).uniform(-np.pi, np.pi, (positions, self.rotary_dim // 2))
        dtype = getattr(ml_dtypes, self.rotary_dtype, self.rotary_dtype)
        return {"rotary_cos": np.cos(angles).astype(dtype), "rotary_sin": np.sin(angles).astype(dtype)}

    def arrays(self, xp: Any = np) -> dict[str, Any]:
        """The arrays that a call takes, by keyword; those that are not given are left out.

        Parameters
        ----------
        xp : module or callable
            As for `View.on`.
        """
        rng = np.random.default_rng([self.seed, 0])
        small = self.integers() | self.rotary()
        if self.alibi_ndim:
            shape = (self.batch, self.num_heads_q)[-self.alibi_ndim :]
            small["alibi_slopes"] = rng.uniform(0, 0.5, shape).astype(np.float32)
        if self.sinks:
            small["sinks"] = (2 * rng.standard_normal(self.num_heads_q)).astype(np.float32)
        if self.descale_ndim is not None:
            scaled = (self.batch, self.num_heads_k)[2 - self.descale_ndim :]
            small |= {name: np.asarray(rng.uniform(0.25, 4, scaled), np.float32) for name in ("k_descale", "v_descale")}
        names = ("q", "k_cache", "v_cache", *(() if self.seqlen_new is None else ("k", "v")))
        arrays = {name: self.view(name).on(self.flat(name), xp) for name in names}
        return arrays | {name: View.of(x.shape).on(x.ravel(), xp) for name, x in small.items()}

    def output(self, xp: Any = np) -> Any:
        """An array of NaN to pass as ``out=``."""
        return self.view("out").on(self.flat("out"), xp)


def kvcache_cases(
    *,
    max_seqlen: int = 300,
    dtypes: Sequence[str] = DTYPES,
    cache_dtypes: Sequence[str] = ("",),
    head_dims: Sequence[int] = HEAD_DIMS,
    layouts: Sequence[str] = LAYOUTS,
    values: Sequence[str] = KVCACHE_VALUES,
    page_sizes: Sequence[int] = PAGE_SIZES,
    max_queries: int = 20,
    wild: bool = False,
) -> SearchStrategy[KVCacheCase]:
    """Cases for `cufa.attention_with_kvcache`, as a Hypothesis strategy.

    Parameters
    ----------
    max_seqlen : int
        Of each cache.
    dtypes, head_dims, layouts
        As for `dense_cases`.
    cache_dtypes : sequence of str
        As of `KVCacheCase`: ``float8_e4m3fn``, or empty.
    values : sequence of str
        As of `KVCacheCase`.
    page_sizes : sequence of int
        0 are contiguous caches.
    max_queries : int
        Rows of q, and new ones of k, of each sequence.
    wild : bool
        Whether some cases hold numbers that are not there.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> import cufa
    >>> from cufa.testing import assert_kvcache_close, kvcache_cases
    >>> @settings(max_examples=5)
    ... @given(kvcache_cases(max_seqlen=17))
    ... def test_attention_with_kvcache(case):
    ...     before, after = case.arrays(), case.arrays()
    ...     out = cufa.attention_with_kvcache(**after, **case.options)
    ...     caches = after["k_cache"], after["v_cache"]
    ...     assert_kvcache_close(out, caches=caches, **before, **case.options)
    >>> test_attention_with_kvcache()
    """
    st, features = features_of("kvcache_cases", max_seqlen, dtypes, head_dims, layouts, values)
    features.pop("seqlen")
    length = st.sampled_from([n for n in SEQLENS if n <= max_seqlen])
    queries = st.sampled_from([n for n in (*([1] * 6), 0, 2, 3, 5, 8, 17, 33, 64, 100) if n <= max_queries])
    sequences = st.sampled_from((1, 2, 3, 4) * 3 + (0,)).flatmap(
        lambda batch: st.tuples(*[st.tuples(length, queries, length)] * batch)
    )
    strategy: SearchStrategy[KVCacheCase] = st.builds(
        _case,
        sequences=sequences,
        queries=queries,
        seqlen_new=st.none() | queries,
        full=st.booleans(),
        varlen=st.booleans(),
        spare=st.sampled_from((0, 1, 30)),
        page_size=st.sampled_from(page_sizes),
        shares_pages=st.booleans(),
        use_cache_batch_idx=st.booleans(),
        use_leftpad=st.sampled_from((False, False, True)),
        rotary_share=st.sampled_from((0.0, 0.5, 1.0)),
        rotary_interleaved=st.booleans(),
        rotary_float32=st.booleans(),
        num_splits=st.sampled_from((0, 0, 1, 3)),
        cache_dtype=st.sampled_from(cache_dtypes),
        descale_ndim=st.sampled_from((None, 0, 1, 2)),
        wild=st.booleans() if wild else st.just(False),
        **features,
    )
    return strategy


def _case(
    sequences: tuple[tuple[int, int, int], ...],
    queries: int,
    seqlen_new: int | None,
    full: bool,
    varlen: bool,
    spare: int,
    use_leftpad: bool,
    use_cache_batch_idx: bool,
    rotary_share: float,
    rotary_float32: bool,
    descale_ndim: Literal[0, 1, 2] | None,
    heads: tuple[int, int],
    **others: Any,
) -> KVCacheCase:
    """A case in which new rows fit and what needs another array has it."""
    page_size, head_dim, layouts = others["page_size"], others["head_dim"], others.pop("layouts")
    new = [0 if seqlen_new is None else rows if varlen else seqlen_new for _, rows, _ in sequences]
    lengths: tuple[int, ...] | None = tuple(length for length, _, _ in sequences)
    capacity = max((length + rows for (length, _, _), rows in zip(sequences, new, strict=True)), default=0) + spare
    if full and seqlen_new is None:
        lengths = None
    leftpad = tuple(min(pad, length) for length, _, pad in sequences) if use_leftpad else None
    rotary_dim = 0 if seqlen_new is None else 2 * int(rotary_share * head_dim / 2)
    cache = "contiguous" if layouts[1] == "broadcast" and seqlen_new is not None else layouts[1]
    return KVCacheCase(
        batch=len(sequences),
        seqlen_q=tuple(rows for _, rows, _ in sequences) if varlen else queries,
        seqlen_new=seqlen_new,
        lengths=lengths,
        capacity=capacity,
        leftpad=leftpad,
        use_cache_batch_idx=use_cache_batch_idx and not page_size,
        descale_ndim=descale_ndim if others["cache_dtype"] else None,
        rotary_dim=rotary_dim,
        rotary_dtype="float32" if rotary_float32 else others["dtype"],
        num_heads_q=heads[0],
        num_heads_k=heads[1],
        layouts=(layouts[0], cache, layouts[2], layouts[3]),
        **others,
    )


def assert_kvcache_close(
    out: Any,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    *,
    caches: tuple[Any, Any],
    lse: Any = None,
    **call: Any,
) -> None:
    """Assert that results of attention with caches, and the caches, are what the float64 reference has.

    Caches must hold the same bits as before but for new rows, and those of v the bits of v. Numbers that were rotated
    may be whatever products in float32 round to. Out and lse are held to the noise as by `assert_close`, given the
    caches as they are.

    Parameters
    ----------
    out : array
        The output under test, of any framework and on any device.
    q, k_cache, v_cache : array
        As before the call.
    caches : (array, array)
        k_cache and v_cache as the call has left them.
    lse : array, optional
        The log-sum-exp under test.
    **call
        The other keywords of `cufa.reference.attention_with_kvcache`.

    Raises
    ------
    AssertionError

    See Also
    --------
    assert_close : The same without caches.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> from cufa.testing import assert_kvcache_close
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 1, 8)).astype(np.float16)
    >>> call = {"q": q, "k": k, "v": v, "cache_seqlens": np.zeros(1, np.int32), "causal": True}
    >>> before, after = np.ones((2, 2, 1, 4, 1, 8), np.float16)
    >>> out = cufa.attention_with_kvcache(k_cache=after[0], v_cache=after[1], **call)
    >>> assert_kvcache_close(out, k_cache=before[0], v_cache=before[1], caches=(after[0], after[1]), **call)
    >>> after[1, 0, 3] = 2
    >>> assert_kvcache_close(out, k_cache=before[0], v_cache=before[1], caches=(after[0], after[1]), **call)
    Traceback (most recent call last):
        ...
    AssertionError: v_cache is wrong in 8 of 32 elements
      first v_cache[0, 3, 0, 0]: got 2.0, expected 1.0 to 1.0
    """
    call = {name: to_numpy(x) if hasattr(x, "shape") else x for name, x in call.items()}
    arrays: dict[str, Any] = dict.fromkeys(_ARRAYS) | {name: x for name, x in call.items() if name in _ARRAYS}
    arrays |= {"q": to_numpy(q), "k_cache": to_numpy(k_cache), "v_cache": to_numpy(v_cache)}
    options: dict[str, Any] = _OPTIONS | {name: x for name, x in call.items() if name not in _ARRAYS}
    plain = _kvcache.check_host("attention_with_kvcache", arrays, options, TERMS)
    storage = arrays["q"].dtype
    scaled = arrays["k_cache"].dtype.name in CACHE_DTYPES
    unit = 2.0**-52 if storage == np.float64 else 2.0**-23  # of the roundings of two products and of their sum
    advances = reference._advances(plain.causal, plain.window_size)
    asked = arrays, plain.own("rotary_interleaved"), advances
    (sequences, k_low, v_after), (higher, k_high, _) = (reference._appended(*asked, error) for error in (-unit, unit))
    exact, _, _ = reference._appended(*asked)
    stored = to_numpy(caches[0]), to_numpy(caches[1])
    after = tuple(x.view(arrays["k_cache"].dtype) if scaled and x.dtype == np.uint8 else x for x in stored)
    new = _new_rows(arrays, plain.own("rotary_interleaved"), advances)
    complaints = [
        _cache_complaint("k_cache", after[0], k_low, k_high, new if arrays["rotary_cos"] is not None else None)
    ]
    complaints.append(_cache_complaint("v_cache", after[1], v_after, v_after, None))

    q_shape = arrays["q"].shape
    expected, noise = (
        np.zeros((*q_shape[:-1], after[1].shape[-1])),
        np.full((*q_shape[:-1], after[1].shape[-1]), np.inf),
    )
    lse_shape = (*q_shape[:-3], q_shape[-2], q_shape[-3])
    expected_lse, lse_noise, spread = (
        np.full(lse_shape, -np.inf),
        np.zeros(lse_shape),
        np.zeros(expected.shape, np.bool_),
    )
    scoring: Any = {name: getattr(plain, name) for name in ("causal", "window_size", "softmax_scale", "softcap")}
    for number, (each, low, high) in enumerate(zip(exact, sequences, higher, strict=True)):
        slopes = arrays["alibi_slopes"]
        own = scoring | {"alibi_slopes": slopes[number] if np.ndim(slopes) == 2 else slopes, "sinks": arrays["sinks"]}
        k_own, v_own = (
            reference._descaled(x[each.keys][None], each, arrays, name) for name, x in zip("kv", after, strict=True)
        )
        problem = Problem(each.q[None], k_own, v_own, None, None, None, own)
        rows, lse_rows = each.rows, (slice(None), each.rows) if len(lse_shape) == 2 else each.rows
        with np.errstate(all="ignore"):  # NaN and Inf are data here
            q_error = np.abs(high.q.astype(np.float64) - low.q.astype(np.float64))[None]
        for piece in problem.pieces():
            part, heads = piece.problem, piece.heads
            found, found_lse = reference._attend(*part[:3], **part.options)
            with np.errstate(all="ignore"):
                weights = "float16" if scaled else None
                own_noise = forward_noise(part, found, storage, q_error[piece.in_q], weights=weights)
            expected[rows][:, heads], expected_lse[lse_rows][heads] = found[0], found_lse[0]
            noise[rows][:, heads], lse_noise[lse_rows][heads], spread[rows][:, heads] = (x[0] for x in own_noise)
    complaints.append(complaint("out", out, expected, noise, spread))
    if lse is not None:
        complaints.append(complaint("lse", lse, expected_lse, lse_noise))
    complain(complaints)


_ARRAYS = (
    *("q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "block_table", "cache_batch_idx", "cache_leftpad"),
    *("cu_seqlens_q", "rotary_cos", "rotary_sin", "k_descale", "v_descale", "alibi_slopes", "sinks"),
)
_OPTIONS = {"causal": False, "window_size": None, "softmax_scale": None, "softcap": 0.0, "rotary_interleaved": True}


def _new_rows(arrays: dict[str, Any], interleaved: bool, advances: bool) -> NDArray[np.bool_]:
    """Which rows of caches are new, (num_caches, capacity) or (num_pages, page_size)."""
    marks = {f"{name}_cache": np.zeros((*arrays["k_cache"].shape[:2], 1, 1), np.bool_) for name in "kv"}
    if arrays["k"] is not None:
        marks |= {name: np.ones((*arrays["k"].shape[:-2], 1, 1), np.bool_) for name in "kv"}
    _, marked, _ = reference._appended(arrays | marks | {"rotary_cos": None}, interleaved, advances)
    return marked[..., 0, 0]


def _cache_complaint(name: str, got: Array, low: Array, high: Array, near: NDArray[np.bool_] | None) -> str | None:
    """What is wrong with a cache, whose rows in `near` may lie between two, and all others must have the same bits."""
    if got.shape != low.shape or got.dtype != low.dtype:
        return f"{name} has become {got.dtype} {got.shape}, and was {low.dtype} {low.shape}."
    bits = np.dtype(f"u{got.dtype.itemsize}")
    right = np.ascontiguousarray(got).view(bits) == np.ascontiguousarray(low).view(bits)
    if near is not None:
        with np.errstate(all="ignore"):  # NaN is data here
            between = ((low <= got) & (got <= high)) | (np.isnan(low) & np.isnan(got))
        right |= between & near[..., None, None]
    if right.all():
        return None
    at = np.unravel_index(np.argmin(right), right.shape)
    return (
        f"{name} is wrong in {int((~right).sum())} of {right.size} elements\n"
        f"  first {name}[{', '.join(map(str, at))}]: got {got[at]}, expected {low[at]} to {high[at]}"
    )

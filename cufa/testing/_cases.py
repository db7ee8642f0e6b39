"""Problems over the whole space of features and memory layouts, and Hypothesis strategies that draw them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cufa.reference import FeaturedOptions, Window

from .. import reference

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Array: TypeAlias = NDArray[Any]

LAYOUTS = (
    "contiguous",
    "transposed",
    "fused",
    "fused heads",
    "fused batch",
    "fused transposed",
    "wide",
    "padded",
    "offset",
    "strided",
    "reversed",
    "broadcast",
)
"""Ways to lay an array out in memory, see `View.of`; torch knows no negative strides, so no ``reversed``."""

DTYPES = ("float16", "bfloat16", "float32")

VALUES = ("normal", "large rows", "huge", "huge scores", "tiny", "constant", "infinite", "garbage")
"""What the arrays of a `Case` hold: see there."""

OFFSETS = ("exact", "zeros", "totals", "short", "wild")
"""What the offsets of a packed `Case` hold: see there."""

HEAD_DIMS = (1, 2, 7, 8, 16, 31, 32, 40, 64, 65, 80, 96, 127, 128, 160, 192, 255, 256)

_TILES = (16, 32, 64, 128, 192, 256, 384, 512, 1024, 2048, 4096)
SEQLENS = (0, 1, 2, 3, 7, *(tile + d for tile in _TILES for d in (-1, 0, 1)), 80, 300, 1000)
"""Lengths around the edges of tiles."""


@dataclass(frozen=True)
class View:
    """Where the elements of an array lie in flat memory, in terms that every framework knows.

    Attributes
    ----------
    shape, strides : tuple of int
        Strides are in elements, and may be negative or 0.
    offset : int
        Of the first element.
    size : int
        Elements of the flat memory.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    size: int

    @classmethod
    def of(cls, shape: tuple[int, ...], layout: str = "contiguous") -> View:
        """The view of an array (…, seqlen, num_heads, head_dim) in one of the `LAYOUTS`.

        ``contiguous``, which serves any shape; ``transposed``, heads before seqlen in memory; ``fused``, the
        middle one of q, k and v side by side, in memory (…, seqlen, 3, num_heads, head_dim); ``fused heads``,
        (…, seqlen, num_heads, 3, head_dim); ``fused batch``, (…, 3, seqlen, num_heads, head_dim); ``fused
        transposed``, (…, 3, num_heads, seqlen, head_dim); ``wide``, rows of head_dim at the head of longer ones,
        a multiple of 64 elements, so that they are aligned whatever head_dim is; ``padded``, heads an odd
        number of elements apart, so that rows are not aligned; ``offset``, one element into the memory, so that
        the base is not aligned; ``strided``, every other element, so that the last stride is 2; ``reversed``,
        seqlen and heads backwards, with negative strides; ``broadcast``, one head in memory for all, with stride 0.

        Examples
        --------
        >>> from cufa.testing import View
        >>> View.of((2, 3, 4), "transposed")
        View(shape=(2, 3, 4), strides=(4, 8, 1), offset=0, size=24)
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}.")
        order, extents, step, offset = list(range(len(shape))), list(shape), 1, 0
        if layout in ("transposed", "fused transposed"):
            order[-3], order[-2] = order[-2], order[-3]
        if layout.startswith("fused"):
            # The axis outside of which the three lie: the one that is next to them, three times as long.
            axis = {"fused": -2, "fused heads": -1, "fused batch": -3, "fused transposed": -2}[layout]
            extents[axis] *= 3
            offset = math.prod(shape[axis] for axis in order[order.index(axis % len(shape)) :])
        elif layout == "wide":
            extents[-1] = (shape[-1] // 64 + 1) * 64
        elif layout == "padded":
            extents[-1] += 1 + shape[-1] % 2
        elif layout == "offset":
            offset = 1
        elif layout == "strided":
            step = 2
        elif layout == "broadcast":
            extents[-2] = 1
        strides, size = [0] * len(shape), step
        for axis in reversed(order):
            strides[axis] = size
            size *= extents[axis]
        if layout == "offset":
            size += 1
        elif layout == "broadcast":
            strides[-2] = 0
        elif layout == "reversed":
            for axis in (-3, -2):
                offset += max(shape[axis] - 1, 0) * strides[axis]
                strides[axis] *= -1
        return cls(shape, tuple(strides), offset, size)

    def on(self, flat: Array, xp: Any = np) -> Any:
        """The array of this shape and these strides over a copy of `flat`; for NumPy, over `flat` itself.

        Parameters
        ----------
        flat : NumPy array, (size,)
        xp : module or callable
            ``numpy``, ``cupy`` (which gets bytes for float8), ``torch`` (on the GPU if there is one) or ``jax.numpy``
            (which knows no views and gets a contiguous copy); or a function of `flat` and the view.

        Examples
        --------
        >>> import numpy as np
        >>> from cufa.testing import View
        >>> View.of((2, 1, 2), "reversed").on(np.arange(4)).ravel().tolist()
        [2, 3, 0, 1]
        """
        if not isinstance(xp, ModuleType):
            return xp(flat, self)
        if xp.__name__ == "torch":
            foreign = flat.dtype.name in ("bfloat16", "float8_e4m3fn")  # which NumPy itself does not know
            memory = xp.as_tensor(flat.view(f"i{flat.itemsize}") if foreign else flat)
            memory = memory.to("cuda" if xp.cuda.is_available() else "cpu", copy=True)
            memory = memory.view(getattr(xp, flat.dtype.name)) if foreign else memory
            return memory.as_strided(self.shape, self.strides, self.offset)
        if xp.__name__ == "jax.numpy":
            return xp.array(self.on(flat))
        strides = [stride * flat.itemsize for stride in self.strides]
        if xp.__name__ == "cupy" and flat.dtype.name == "float8_e4m3fn":
            flat = flat.view(np.uint8)
        return xp.lib.stride_tricks.as_strided(xp.asarray(flat)[self.offset :], self.shape, strides)

    def outside(self) -> NDArray[np.bool_]:
        """Which elements of the flat memory do not belong to the array."""
        mask = np.ones(self.size, dtype=np.bool_)
        self.on(mask)[...] = False
        return mask


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: its sizes, options and memory layouts, from which its arrays follow.

    Attributes
    ----------
    batch, num_heads_q, num_heads_k, head_dim, head_dim_v : int
    seqlen_q, seqlen_k : int or tuple of int
        A tuple makes the case varlen: the length of each sequence, `batch` of them.
    seqused_k : tuple of int, optional
        Varlen: live keys of each sequence. What lies behind them in k and v is NaN.
    dtype : str
    causal, window_size, softmax_scale, softcap
        As for `cufa.attention`.
    alibi_ndim : {0, 1, 2}
        No slopes, slopes (num_heads_q,), slopes (batch, num_heads_q).
    bias, mask : str or None
        The array of that name: for each of its axes, batch, heads, queries and keys, ``x`` if it has all of them and
        ``1`` if one is for all, as in ``1x1x``.
    rel_bias : int or None
        The reach of one.
    dropout_p : float
        Whose seed is that of the case.
    sinks, return_lse, use_out : bool
        Whether there are sinks, `lse` is asked for, and `out=` is given.
    layouts : (str, str, str, str)
        Of q, k, v and out, see `View.of`. Memory between the elements of q, k and v is NaN.
    values : str
        One of `VALUES`. ``normal``, a standard normal distribution; ``large rows``, some rows of q larger, so that
        a few keys take all their probability; ``huge``, v up to the largest number of the dtype; ``huge scores``, q
        and k whose products float32 just holds; ``tiny``, all close to the smallest; ``constant``, one large number
        everywhere; ``infinite``, a few NaN and Inf in k and v; ``garbage``, NaN, Inf and the largest numbers
        wherever a mask removes them, and in rows of q that keep no key.
    offsets : str
        Varlen, one of `OFFSETS`. ``exact``, the lengths as they are; ``zeros`` and ``totals``, padded at the end with
        these; ``short``, ending before the totals; ``wild``, numbers in any order, also outside the arrays, which
        NumPy and torch refuse on the CPU. Where no sequence lies, q, k and v are NaN.
    seed : int
        Of the values.

    Examples
    --------
    >>> import cufa.reference
    >>> from cufa.testing import Case, assert_close
    >>> case = Case(batch=2, seqlen_q=3, seqlen_k=40, causal=True, layouts=("transposed",) * 4)
    >>> arrays = case.arrays()
    >>> assert_close(cufa.reference.attention(**arrays, **case.options), **arrays, **case.options)
    """

    batch: int = 1
    seqlen_q: int | tuple[int, ...] = 16
    seqlen_k: int | tuple[int, ...] = 16
    num_heads_q: int = 1
    num_heads_k: int = 1
    head_dim: int = 16
    head_dim_v: int = 16
    seqused_k: tuple[int, ...] | None = None
    dtype: str = "float32"
    causal: bool = False
    window_size: Window = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi_ndim: Literal[0, 1, 2] = 0
    sinks: bool = False
    bias: str | None = None
    rel_bias: int | None = None
    mask: str | None = None
    dropout_p: float = 0.0
    return_lse: bool = False
    use_out: bool = False
    layouts: tuple[str, str, str, str] = ("contiguous", "contiguous", "contiguous", "contiguous")
    values: str = "normal"
    offsets: str = "exact"
    seed: int = 0

    @property
    def options(self) -> FeaturedOptions:
        """The keywords that are not arrays."""
        options: FeaturedOptions = {
            "causal": self.causal,
            "window_size": self.window_size,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
        }
        if self.dropout_p:
            options |= {"dropout_p": self.dropout_p, "seed": self.seed}
        return options

    def view(self, name: str) -> View:
        """The view of q, k, v or out."""
        seqlen = self.seqlen_q if name in ("q", "out") else self.seqlen_k
        num_heads = self.num_heads_q if name in ("q", "out") else self.num_heads_k
        width = self.head_dim if name in ("q", "k") else self.head_dim_v
        leading = (sum(seqlen),) if isinstance(seqlen, tuple) else (self.batch, seqlen)
        return View.of((*leading, num_heads, width), self.layouts[("q", "k", "v", "out").index(name)])

    def flat(self, name: str) -> Array:
        """The flat memory under q, k, v or out: values in its view and NaN elsewhere; for out, only NaN."""
        view = self.view(name)
        flat: Array = np.full(view.size, np.nan, getattr(ml_dtypes, self.dtype, self.dtype))
        if name == "out":
            return flat
        array = view.on(flat)
        rng = np.random.default_rng([self.seed, *name.encode()])
        with np.errstate(all="ignore"):  # large numbers are rounded to the dtype, where they fit
            array[...] = drawn(self.values, name, self.view(name).shape, self.dtype, rng)
        if self.values == "infinite" and name != "q" and array.size:
            for value in (np.inf, -np.inf, np.nan if name == "v" else np.inf):
                array[tuple(rng.integers(0, extent) for extent in array.shape)] = value
        if self.values == "garbage" and array.size:
            self._spoil(name, array, rng)
        if isinstance(self.seqlen_q, tuple) and (self.seqused_k is not None or self.offsets != "exact"):
            array[self.counts(name) < 0] = np.nan
        return flat

    def counts(self, name: str) -> NDArray[np.int64]:
        """How many keys each row of q keeps, or how many rows keep each row of k or v; -1 if no sequence has it.

        Of the shape (batch, seqlen), or (total,).
        """
        shape = self.view(name).shape[:-2]
        found = np.full(shape, -1, np.int64)
        if not isinstance(self.seqlen_q, tuple):
            keep = reference._keep(self.seqlen_q, int(self.view("k").shape[1]), self.causal, self.window_size)
            found[...] = keep.sum(axis=int(name == "q"))
            return found
        x = self.offset_arrays()
        q, k, v = (np.empty((self.view(each).shape[0], 0, 0)) for each in "qkv")
        for each in reference._sequences(q, k, v, x["cu_seqlens_q"], x["cu_seqlens_k"], x.get("seqused_k"), None):
            keep = reference._keep(each.q.shape[1], each.k.shape[1], self.causal, self.window_size)
            found[each.rows if name == "q" else each.keys] = keep.sum(axis=int(name == "q"))
        return found

    def _spoil(self, name: str, array: Array, rng: np.random.Generator) -> None:
        """Put NaN, Inf and the largest numbers where nothing keeps them, and where few rows do."""
        counts, largest = self.counts(name), float(ml_dtypes.finfo(array.dtype).max)
        unseen = counts == 0
        array[unseen] = rng.choice([np.nan, np.inf, -np.inf, largest, -largest], int(unseen.sum()))[:, None, None]
        seen = np.flatnonzero(counts > 0)
        if not len(seen):
            return
        fewest = seen[np.argmin(counts.flat[seen])]
        if counts.flat[fewest] < counts.max():
            # Products of the largest numbers would be more than float32 holds; those of v are only weighted.
            values = [np.nan, np.inf, -np.inf, *([largest, -largest] * 2 if name == "v" else [])]
            array[np.unravel_index(fewest, counts.shape)] = rng.choice(values)

    def offset_arrays(self) -> dict[str, Array]:
        """cu_seqlens_q, cu_seqlens_k and, if it is given, seqused_k; nothing if the case is not packed."""
        if not isinstance(self.seqlen_q, tuple) or not isinstance(self.seqlen_k, tuple):
            return {}
        rng = np.random.default_rng([self.seed, 1])
        found: dict[str, Array] = {}
        for name, lengths in (("cu_seqlens_q", self.seqlen_q), ("cu_seqlens_k", self.seqlen_k)):
            offsets = np.cumsum((0, *lengths))
            total = int(offsets[-1])
            if self.offsets in ("zeros", "totals"):
                offsets = np.append(offsets, [0 if self.offsets == "zeros" else total] * 3)
            elif self.offsets == "short":
                offsets = np.minimum(offsets, total - total // 4)
            elif self.offsets == "wild":
                strange = rng.random(len(offsets)) < 0.5
                offsets[strange] = rng.integers(-5, total + 6, int(strange.sum()))
                if rng.random() < 0.2:
                    offsets[rng.integers(0, len(offsets))] = rng.choice([-(2**31), 2**31 - 1])
            found[name] = offsets.astype(np.int32)
        if self.seqused_k is not None:
            used = np.zeros(len(found["cu_seqlens_k"]) - 1, np.int64)
            used[: len(self.seqused_k)] = self.seqused_k
            if self.offsets == "short":
                used = np.minimum(used, np.diff(found["cu_seqlens_k"]))
            elif self.offsets == "wild":
                used += rng.integers(-3, 4, len(used))
            found["seqused_k"] = used.astype(np.int32)
        return found

    def arrays(self, xp: Any = np) -> dict[str, Any]:
        """The arrays that a call takes, by keyword; those that are not given are left out.

        Parameters
        ----------
        xp : module or callable
            As for `View.on`.
        """
        rng = np.random.default_rng([self.seed, 0])
        small = self.offset_arrays()
        batch = len(small["cu_seqlens_q"]) - 1 if small else self.batch
        if self.alibi_ndim:
            shape = (batch, self.num_heads_q)[-self.alibi_ndim :]
            small["alibi_slopes"] = rng.uniform(0, 0.5, shape).astype(np.float32)
        if self.sinks:
            small["sinks"] = (2 * rng.standard_normal(self.num_heads_q)).astype(np.float32)
        small |= self.score_arrays(batch)
        arrays = {name: self.view(name).on(self.flat(name), xp) for name in ("q", "k", "v")}
        return arrays | {name: View.of(x.shape).on(x.ravel(), xp) for name, x in small.items()}

    def score_arrays(self, batch: int) -> dict[str, Array]:
        """Those of score terms; half of the biases are in float32."""
        rng = np.random.default_rng([self.seed, 2])
        lengths = [max(n, default=0) if isinstance(n, tuple) else n for n in (self.seqlen_q, self.seqlen_k)]
        if self.offsets in ("short", "wild") and isinstance(self.seqlen_q, tuple):  # sequences may be any part
            lengths = [int(self.view(name).shape[0]) for name in "qk"]
        found: dict[str, Array] = {}
        for name, axes in (("bias", self.bias), ("mask", self.mask)):
            if axes is None:
                continue
            extents = (batch, self.num_heads_q, *lengths)
            shape = tuple(n if axis == "x" else 1 for axis, n in zip(axes, extents, strict=True))
            dtype = getattr(ml_dtypes, self.dtype, self.dtype) if rng.random() < 0.5 else np.float32
            numbers = rng.standard_normal(shape)
            found[name] = numbers.astype(dtype) if name == "bias" else numbers > -1
        if self.rel_bias is not None:
            found["rel_bias"] = rng.standard_normal((self.num_heads_q, 2 * self.rel_bias + 1)).astype(np.float32)
        return found

    def output(self, xp: Any = np) -> Any:
        """An array of NaN to pass as ``out=``."""
        return self.view("out").on(self.flat("out"), xp)


def drawn(kind: str, name: str, shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Array:
    """Numbers of one of `VALUES` for q, k or v, before they are rounded to the dtype."""
    narrow, largest = dtype == "float16", float(ml_dtypes.finfo(getattr(ml_dtypes, dtype, dtype)).max)
    if kind == "constant":
        return np.full(shape, 6e4 if narrow else 133120.0)
    values: Array = rng.standard_normal(shape)
    if kind == "large rows" and name == "q":
        values[rng.random(shape[:-1]) < 0.25] *= 16
    elif kind == "huge" and name == "v" and values.size:
        values *= largest / np.abs(values).max()
        values = np.clip(values, -largest, largest)
    elif kind == "huge scores" and name != "v":
        values *= 2.0**6 if narrow else 2.0**54
    elif kind == "tiny":
        values *= 2.0**-18 if narrow else 2.0**-100
    return values


def dense_cases(
    *,
    max_seqlen: int = 300,
    dtypes: Sequence[str] = DTYPES,
    head_dims: Sequence[int] = HEAD_DIMS,
    layouts: Sequence[str] = LAYOUTS,
    values: Sequence[str] = VALUES,
    features: Sequence[str] = (),
) -> SearchStrategy[Case]:
    """Cases for `cufa.attention`, as a Hypothesis strategy.

    Sizes lie around the edges of tiles, 0 included; all features and layouts occur in all combinations.

    Parameters
    ----------
    max_seqlen : int
    dtypes : sequence of str
        Add ``float64`` for functions that take it.
    head_dims : sequence of int
        Also of `head_dim_v`. Few of them keep the number of kernels to compile small.
    layouts : sequence of str
        Leave ``reversed`` out for torch.
    values : sequence of str
        Of `VALUES`.
    features : sequence of str
        Of ``bias``, ``rel_bias``, ``mask`` and ``dropout_p``: what cases may have, too.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> import cufa.reference
    >>> from cufa.testing import assert_close, dense_cases
    >>> @settings(max_examples=5)
    ... @given(dense_cases(max_seqlen=17))
    ... def test_attention(case):
    ...     arrays, options = case.arrays(), case.options
    ...     assert_close(cufa.reference.attention(**arrays, **options), **arrays, **options)
    >>> test_attention()
    """
    st, fields = features_of("dense_cases", max_seqlen, dtypes, head_dims, layouts, values, features)
    seqlen = fields.pop("seqlen")
    strategy: SearchStrategy[Case] = st.builds(
        _case, batch=st.sampled_from((1, 2, 3) * 3 + (0,)), seqlen_q=seqlen, seqlen_k=seqlen, **fields
    )
    return strategy


def varlen_cases(
    *,
    max_seqlen: int = 300,
    dtypes: Sequence[str] = DTYPES,
    head_dims: Sequence[int] = HEAD_DIMS,
    layouts: Sequence[str] = LAYOUTS,
    values: Sequence[str] = VALUES,
    offsets: Sequence[str] = ("exact",),
    features: Sequence[str] = (),
) -> SearchStrategy[Case]:
    """Cases for `cufa.attention_varlen`, with and without `seqused_k`, as a Hypothesis strategy.

    Parameters
    ----------
    max_seqlen : int
        Of each sequence.
    dtypes, head_dims, layouts, values
        As for `dense_cases`.
    offsets : sequence of str
        Of `OFFSETS`.
    features : sequence of str
        As for `dense_cases`.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> import cufa.reference
    >>> from cufa.testing import assert_close, varlen_cases
    >>> @settings(max_examples=5)
    ... @given(varlen_cases(max_seqlen=17))
    ... def test_attention_varlen(case):
    ...     arrays, options = case.arrays(), case.options
    ...     assert_close(cufa.reference.attention_varlen(**arrays, **options), **arrays, **options)
    >>> test_attention_varlen()
    """
    st, fields = features_of("varlen_cases", max_seqlen, dtypes, head_dims, layouts, values, features)
    seqlen = fields.pop("seqlen")
    sequences = st.sampled_from((1, 2, 3, 4) * 3 + (0,)).flatmap(
        lambda batch: st.tuples(*[st.tuples(seqlen, seqlen, seqlen)] * batch)
    )
    strategy: SearchStrategy[Case] = st.builds(
        _varlen_case,
        sequences=sequences,
        use_seqused_k=st.booleans(),
        offsets=st.sampled_from(offsets),
        **fields,
    )
    return strategy


def features_of(
    function: str,
    max_seqlen: int,
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    layouts: Sequence[str],
    values: Sequence[str],
    features: Sequence[str] = (),
) -> tuple[Any, dict[str, Any]]:
    """Hypothesis' strategies, and one for each field that dense and varlen cases share.

    What is empty or off is weighted so that most cases compute something, and some compute something plain.
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise ImportError(f"cufa.testing.{function} needs Hypothesis: pip install 'cufa[test]'.") from error
    side = st.none() | st.sampled_from((0, 1, 5, 16, 31, 64, 65, -1, max_seqlen, max_seqlen + 100))
    layout = st.sampled_from(layouts)
    written = st.sampled_from([name for name in layouts if name != "broadcast"])
    axes = st.none() | st.sampled_from([*map("".join, itertools.product("1x", repeat=4))])
    further = {"bias": axes, "mask": axes, "rel_bias": st.none() | st.sampled_from((0, 1, 7, 40, 400))}
    further["dropout_p"] = st.sampled_from((0.0, 0.1, 0.75))
    return st, {name: further[name] for name in features} | {
        "seqlen": st.sampled_from([n for n in SEQLENS if 0 < n <= max_seqlen] * 3 + [0]),
        "heads": st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (6, 2), (5, 1), (8, 1)] * 2 + [(0, 0)]),
        "head_dim": st.sampled_from(head_dims),
        "head_dim_v": st.sampled_from(head_dims),
        "dtype": st.sampled_from(dtypes),
        "causal": st.booleans(),
        "window_size": st.none() | st.tuples(side, side),
        "softmax_scale": st.sampled_from((None, 0.02, 0.25, 1.0)),
        "softcap": st.sampled_from((0.0, 0.0, 0.0, 0.5, 5.0, 30.0, 1e4)),
        "alibi_ndim": st.sampled_from((0, 0, 1, 2)),
        "sinks": st.booleans(),
        "return_lse": st.booleans(),
        "use_out": st.booleans(),
        "layouts": st.tuples(layout, layout, layout, written),
        "values": st.sampled_from([name for name in values if name in ("normal", "large rows")] * 3 + list(values)),
        "seed": st.integers(0, 2**32 - 1),
    }


def _case(heads: tuple[int, int], **others: Any) -> Case:
    return Case(num_heads_q=heads[0], num_heads_k=heads[1], **others)


def _varlen_case(sequences: tuple[tuple[int, int, int], ...], use_seqused_k: bool, **others: Any) -> Case:
    return _case(
        batch=len(sequences),
        seqlen_q=tuple(seqlen_q for seqlen_q, _, _ in sequences),
        seqlen_k=tuple(seqlen_k for _, seqlen_k, _ in sequences),
        seqused_k=tuple(min(used, n) for _, n, used in sequences) if use_seqused_k else None,
        **others,
    )

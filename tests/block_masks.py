"""Calls with block masks that are drawn at random, and how results are held to the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import cufa
from cufa import masks, reference
from cufa._specification.mask import Mask
from cufa.testing import to_numpy

ELEMENTS = {
    "float16": (np.float16, 2.0**-10),
    "bfloat16": (ml_dtypes.bfloat16, 2.0**-7),
    "float32": (np.float32, 2.0**-18),
    "float64": (np.float64, 2.0**-46),
}
"""NumPy's dtypes, and how far results may be from the reference's, by the norm."""

WINDOWS: tuple[dict[str, Any], ...] = ({}, {"causal": True}, {"window_size": (90, 30)}, {"window_size": (None, 5)})


class Kind(NamedTuple):
    """What makes another kernel."""

    dtype: str = "float32"
    head_dim: int = 32
    head_dim_v: int = 32
    window: Any = ()
    terms: bool = False


class Problem(NamedTuple):
    """A call: its arrays by name, its options, and the mask."""

    arrays: dict[str, Any]
    options: dict[str, Any]
    mask: Any
    unit: float

    def __repr__(self) -> str:
        shapes = {name: array.shape for name, array in self.arrays.items()}
        return f"Problem({shapes}, {self.options}, {self.mask})"

    def seen(self) -> Any:
        batch, heads = self.arrays["q"].shape[0], self.arrays["k"].shape[2]
        return self.mask.dense(batch, heads).repeat(self.arrays["q"].shape[2] // heads, axis=1)

    def run(self, copy: Callable[[Any], Any] = lambda array: array, deterministic: bool = False) -> list[Any]:
        """Out, lse, dq, dk and dv, and dsinks if there are sinks, where `copy` puts arrays."""
        arrays = {name: copy(array) for name, array in self.arrays.items()}
        mask = self.mask._copied(copy)
        q, k, v, dout, dlse = (arrays.pop(name) for name in ("q", "k", "v", "dout", "dlse"))
        given = arrays | self.options | {"mask": mask}
        out, lse = cufa.attention(q, k, v, **given, return_lse=True)
        gradients = cufa.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **given, deterministic=deterministic)
        return [out, lse, *gradients]

    def right(self) -> list[Any]:
        """The same by the reference."""
        beside = self.options | {name: self.arrays[name] for name in ("alibi_slopes", "sinks") if name in self.arrays}
        q, k, v, dout, dlse = (self.arrays[name] for name in ("q", "k", "v", "dout", "dlse"))
        terms = [Mask(self.seen())]
        found = [*reference._attend(q, k, v, terms=terms, **beside)]
        found += [*reference._differentiate(dout, q, k, v, dlse, terms=terms, **beside)]
        return [each for each in found if each is not None]

    def check(self, found: list[Any]) -> None:
        for name, each, exact in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), found, self.right(), strict=False):
            result = to_numpy(each).astype(np.float64)
            finite = np.isfinite(exact)
            assert result.shape == exact.shape
            assert np.array_equal(np.isfinite(result), finite), f"{name} is not finite elsewhere"
            error, size = np.linalg.norm(result[finite] - exact[finite]), np.linalg.norm(exact[finite])
            assert error <= 4 * self.unit * size + 1e-30, f"{name} is off by {error} of {size}"
            assert (result[exact == 0] == 0).all(), f"{name} is not 0 where nothing is seen"


@st.composite
def some_masks(draw: st.DrawFn, seqlen_q: int, seqlen_k: int, batch: int, heads: int, sizes: Any) -> Any:
    """A `BlockMask` by lists, by an array, or by one of `cufa.masks`."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    size = draw(st.sampled_from(sizes))
    sides = (size, size) if isinstance(size, int) else size
    blocks = -(-seqlen_q // sides[0]), -(-seqlen_k // sides[1])
    lists = draw(st.sampled_from(((1, 1), (batch, 1), (1, heads), (batch, heads))))
    kind = draw(st.sampled_from(("lists", "pairs", "array", "mask", "nothing")))
    seen = rng.random((*lists, *blocks)) < draw(st.sampled_from((0.3, 0.7)))
    if kind == "lists":
        offsets = np.concatenate([[0], np.cumsum(seen.sum(-1))])
        rows = np.arange(seen[..., 0].size).reshape(*lists, blocks[0])
        begins = np.concatenate([offsets[rows], offsets[rows[..., -1:] + 1]], axis=-1)
        return cufa.BlockMask.from_csr(begins, np.nonzero(seen)[3], seqlen_q, seqlen_k, size)
    if kind == "pairs":
        query_blocks, key_blocks = np.nonzero(seen[0, 0])
        return cufa.BlockMask.from_coo(query_blocks, key_blocks, seqlen_q, seqlen_k, size, mask=masks.dilated(3))
    if kind == "array":
        entries = seen.repeat(sides[0], 2).repeat(sides[1], 3)[:, :, :seqlen_q, :seqlen_k]
        entries &= (rng.random(entries.shape) < 0.8) | (rng.random((*lists, seqlen_q, 1)) < 0.5)
        return cufa.BlockMask.of(masks.from_array(entries), *lists, seqlen_q, seqlen_k, size)
    some = (masks.causal() & masks.chunked(100)) | masks.global_tokens(3)
    if kind == "nothing":
        some &= masks.from_function(lambda batch, head, query, key: query < seqlen_q // 2)
    return cufa.BlockMask.of(some, *lists, seqlen_q, seqlen_k, size)


@st.composite
def problems(draw: st.DrawFn, kind: Kind, lengths: tuple[int, ...], sizes: Any) -> Problem:
    batch, heads = draw(st.integers(1, 2)), draw(st.sampled_from(((4, 2), (1, 1), (2, 2))))
    seqlen_q, seqlen_k = draw(st.sampled_from(lengths)), draw(st.sampled_from(lengths))
    mask = draw(some_masks(seqlen_q, seqlen_k, batch, heads[1], sizes))
    element, unit = ELEMENTS[kind.dtype]
    single = np.float64 if kind.dtype == "float64" else np.float32
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    q, k = (batch, seqlen_q, heads[0], kind.head_dim), (batch, seqlen_k, heads[1], kind.head_dim)
    v, dout = (*k[:3], kind.head_dim_v), (*q[:3], kind.head_dim_v)
    shapes = {"q": q, "k": k, "v": v, "dout": dout}
    arrays = {name: rng.standard_normal(shape).astype(element) for name, shape in shapes.items()}
    arrays["dlse"] = rng.standard_normal((batch, heads[0], seqlen_q)).astype(single)
    options: dict[str, Any] = dict(kind.window)
    if kind.terms:
        options["softcap"] = 5.0
        arrays["alibi_slopes"] = rng.uniform(0, 0.1, heads[0]).astype(single)
        arrays["sinks"] = rng.standard_normal(heads[0]).astype(single)
    made = Problem(arrays, options, mask, unit)
    if draw(st.booleans()):  # what nobody sees may be anything
        unseen = ~made.seen().any((0, 1, 2))
        arrays["k"][:, unseen] = np.nan
        arrays["v"][:, unseen] = np.inf
    return made

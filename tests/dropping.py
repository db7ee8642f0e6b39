"""Calls with dropout, and what the reference makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import cufa
from cufa import reference
from cufa._specification.dropout import Dropout
from cufa.testing import to_numpy

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
UNITS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-20, "float64": 2.0**-44}
"""About what results err by, relative to the norm of each."""

OFFSETS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")


class Problem(NamedTuple):
    """Arrays by name, dense or packed, of a dtype; options of a call, and what is dropped."""

    arrays: dict[str, Any]
    dtype: str
    options: dict[str, Any]
    dropout_p: float
    seed: Any  # an array of NumPy's is put where the others are

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.arrays

    def run(self, to: Callable[[Any], Any] = lambda x: x) -> tuple[Any, ...]:
        """Forward, and from what that gives backward, of arrays put somewhere: out, lse, dq, dk, dv and dsinks."""
        arrays = {name: to(x) for name, x in self.arrays.items()}
        seed = to(self.seed) if isinstance(self.seed, np.ndarray) else self.seed
        options: dict[str, Any] = {**self.options, "dropout_p": self.dropout_p, "seed": seed}
        options |= {name: arrays[name] for name in ("alibi_slopes", "sinks") if name in arrays}
        qkv = [arrays[name] for name in "qkv"]
        offsets = [arrays[name] for name in OFFSETS] if self.packed else []
        dout, dlse = arrays["dout"], arrays["dlse"]
        if self.packed:
            used = {"seqused_k": offsets.pop()}
            out, lse = cufa.attention_varlen(*qkv, *offsets, **used, return_lse=True, **options)
            more = used | {"dlse": dlse}
            return out, lse, *cufa.attention_varlen_backward(dout, *qkv, out, lse, *offsets, **more, **options)
        out, lse = cufa.attention(*qkv, return_lse=True, **options)
        return out, lse, *cufa.attention_backward(dout, *qkv, out, lse, dlse=dlse, **options)

    def right(self, given_out: Any) -> tuple[Any, ...]:
        """The same by the reference, with the gradients of the rounded out that they are given.

        They subtract dlse from out · dout, so what rounding makes of that is a part of dlse.
        """
        options: dict[str, Any] = {**self.options, "terms": [Dropout(self.dropout_p, self.seed)]}
        options |= {name: self.arrays[name] for name in ("alibi_slopes", "sinks") if name in self.arrays}
        dout, dlse, *qkv = (self.arrays[name] for name in ("dout", "dlse", "q", "k", "v"))
        offsets = [self.arrays[name] for name in OFFSETS] if self.packed else []
        attend, differentiate = reference._attend, reference._differentiate
        if self.packed:
            attend, differentiate = reference._attend_packed, reference._differentiate_packed
        out, lse = attend(*qkv, *offsets, **options)
        rounded = (to_numpy(given_out).astype(np.float64) - out) * dout.astype(np.float64)
        dlse = dlse - rounded.sum(axis=-1).swapaxes(-1, -2)
        return out, lse, *differentiate(dout, *qkv, *offsets, dlse, **options)

    def check(self, found: tuple[Any, ...]) -> None:
        """Hold results to the reference."""
        names = ("out", "lse", "dq", "dk", "dv", "dsinks")
        for name, each, exact in zip(names, found, self.right(found[0]), strict=False):
            each = to_numpy(each).astype(np.float64)
            seen = np.isfinite(exact)  # lse is -inf where no key is seen
            np.testing.assert_array_equal(each[~seen], exact[~seen], err_msg=name)
            error, size = np.linalg.norm(each[seen] - exact[seen]), np.linalg.norm(exact[seen])
            assert error <= 4 * UNITS[self.dtype] * max(size, 1), f"{name} differs by {error} of {size}"


def problem(
    dtype: str,
    batch: int = 2,
    rows: int = 50,
    keys: int = 70,
    heads: tuple[int, int] = (4, 2),
    head_dims: tuple[int, int] = (24, 24),
    packed: bool = False,
    dropout_p: float = 0.3,
    seed: int = 11,
    sinks: bool = False,
    alibi: bool = False,
    **options: Any,
) -> Problem:
    """Sequences of normal numbers; packed ones have different lengths, of at most `rows` and `keys` on average."""
    rng, wide = np.random.default_rng(seed % 2**32), np.float64 if dtype == "float64" else np.float32
    lengths_q, lengths_k = (batch, rows), (batch, keys)
    shape_lse: tuple[int, ...] = (batch, heads[0], rows)
    arrays: dict[str, Any] = {}
    if packed:
        lengths_q, lengths_k, shape_lse = (batch * rows,), (batch * keys,), (heads[0], batch * rows)
        for name, total in (("cu_seqlens_q", batch * rows), ("cu_seqlens_k", batch * keys)):
            arrays[name] = np.array([0, *np.sort(rng.integers(0, total + 1, batch - 1)), total], np.int32)
        arrays["seqused_k"] = np.maximum(np.diff(arrays["cu_seqlens_k"]) - 3, 0).astype(np.int32)
    shapes = {"q": (*lengths_q, heads[0], head_dims[0]), "k": (*lengths_k, heads[1], head_dims[0])}
    shapes |= {"v": (*lengths_k, heads[1], head_dims[1]), "dout": (*lengths_q, heads[0], head_dims[1])}
    arrays |= {name: rng.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}
    arrays["dlse"] = rng.standard_normal(shape_lse).astype(wide)
    if sinks:
        arrays["sinks"] = rng.standard_normal(heads[0]).astype(wide)
    if alibi:
        arrays["alibi_slopes"] = rng.uniform(0, 0.1, heads[0]).astype(wide)
    return Problem(arrays, dtype, options, dropout_p, seed)


def telling(dtype: str, rows: int, keys: int, head_dims: tuple[int, int], heads: int = 2) -> Problem:
    """A problem whose out and dv tell which entries are kept: all probabilities are the same, and v and dout have a
    column for each key and query."""
    given = problem(dtype, rows=rows, keys=keys, heads=(heads, heads), head_dims=head_dims)
    arrays = given.arrays | {name: np.zeros_like(given.arrays[name]) for name in ("q", "k", "v", "dout")}
    assert max(rows, keys) <= head_dims[1]
    for name, extent in (("v", keys), ("dout", rows)):
        arrays[name][:, range(extent), :, range(extent)] = 1
    return given._replace(arrays=arrays)


def told(given: Problem, found: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which entries out and dv of such a problem say are kept, both (batch, heads, queries, keys)."""
    rows, keys = given.arrays["q"].shape[1], given.arrays["k"].shape[1]
    out, dv = to_numpy(found[0]) > 0, to_numpy(found[4]) > 0
    return out.swapaxes(1, 2)[..., :keys], dv.transpose(0, 2, 3, 1)[..., :rows, :]

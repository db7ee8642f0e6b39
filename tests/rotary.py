"""Calls of rotary embeddings: drawn, run and held to the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from gradients import lay_out
from hypothesis import strategies as st
from states import EPS, TINY

import cufa
from cufa import reference
from cufa.testing import View, to_numpy

LAYOUTS = ("contiguous", "transposed", "fused", "wide", "padded", "offset", "strided")
PLACES = ("default", "positions", "offsets", "cu_seqlens", "cu_seqlens and offsets")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of `rotary`.

    Attributes
    ----------
    batch : int
    seqlen : int
        Packed, of all sequences.
    num_heads_q : int
    num_heads_k : int or None
        None: there is no k.
    head_dim, rotary_dim : int
    dtype : str
    floats : bool
        Whether cos and sin are float32, whatever q is.
    packed : bool
    places : str
        What says where rows are: one of `PLACES`, the last two of packed sequences.
    interleaved, inverse, use_out : bool
    layouts : (str, str, str)
        Of q, k and what is given to be written.
    seed : int
    """

    batch: int = 2
    seqlen: int = 9
    num_heads_q: int = 4
    num_heads_k: int | None = 2
    head_dim: int = 16
    rotary_dim: int = 16
    dtype: str = "float32"
    floats: bool = True
    packed: bool = False
    places: str = "default"
    interleaved: bool = True
    inverse: bool = False
    use_out: bool = False
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    seed: int = 0

    @property
    def element(self) -> Any:
        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))

    def shape(self, heads: int) -> tuple[int, ...]:
        return (*(() if self.packed else (self.batch,)), self.seqlen, heads, self.head_dim)

    def host(self) -> dict[str, Any]:
        """All arrays that are read, by name."""
        rng = np.random.default_rng(self.seed)
        count = self.seqlen + 7
        angles = rng.uniform(-10, 10, (count, self.rotary_dim // 2))
        table = np.float32 if self.floats and self.dtype != "float64" else self.element
        found = {"q": rng.standard_normal(self.shape(self.num_heads_q)).astype(self.element)}
        if self.num_heads_k is not None:
            found["k"] = rng.standard_normal(self.shape(self.num_heads_k)).astype(self.element)
        found |= {"cos": np.cos(angles).astype(table), "sin": np.sin(angles).astype(table)}
        if self.places == "positions":
            found["positions"] = rng.integers(0, count, found["q"].shape[:-2], np.int32)
        sequences = 1 if self.packed else self.batch
        if self.places.startswith("cu_seqlens"):
            inner = np.sort(rng.integers(0, self.seqlen + 1, self.batch))
            found["cu_seqlens"] = np.concatenate([[0], inner, [0] * (self.seed % 2)]).astype(np.int32)
            sequences = len(found["cu_seqlens"]) - 1
        if "offsets" in self.places:
            found["offsets"] = rng.integers(0, 8, sequences, np.int32)
        return found

    def run(self, xp: Any = np) -> tuple[Any, ...]:
        """What `rotary` gives."""
        host = self.host()
        q, k, out = self.layouts
        layouts = {"q": q, "k": k, "cos": "contiguous", "sin": "padded", "positions": "contiguous"}
        arrays = {name: lay_out(x, layouts[name], xp) if x.dtype.kind != "i" else x for name, x in host.items()}
        arrays |= {name: place(x, xp) for name, x in host.items() if x.dtype.kind == "i"}
        if self.use_out:
            arrays |= {
                f"{name}_out": lay_out(np.full(host[name].shape, np.nan, self.element), out, xp)
                for name in "qk"
                if name in host
            }
        arrays.setdefault("k", None)
        found = cufa.rotary(**arrays, interleaved=self.interleaved, inverse=self.inverse)
        found = found if isinstance(found, tuple) else (found,)
        assert not self.use_out or found[0] is arrays["q_out"]
        return found

    def check(self, found: tuple[Any, ...]) -> None:
        """Within half a unit in the last place of the dtype, and two roundings of what is computed in."""
        host = {name: x if x.dtype.kind == "i" else x.astype(np.float64) for name, x in self.host().items()}
        host.setdefault("k", None)
        right = reference.rotary(**host, interleaved=self.interleaved, inverse=self.inverse)
        right = right if isinstance(right, tuple) else (right,)
        assert len(found) == len(right)
        single = EPS["float64" if self.dtype == "float64" else "float32"]
        for one, wanted, name in zip(map(to_numpy, found), right, "qk", strict=False):
            assert one.dtype == self.element and one.shape == wanted.shape
            scale = abs(host[name]).max(initial=0.0)
            bound = EPS[self.dtype] * abs(wanted) * 1.001 + 4 * single * scale + TINY[self.dtype]
            assert (abs(one.astype(np.float64) - wanted) <= bound).all()
            same = one[..., self.rotary_dim :], self.host()[name][..., self.rotary_dim :]
            assert same[0].tobytes() == same[1].tobytes()


def place(x: np.ndarray, xp: Any) -> Any:
    """An array of integers in a framework's memory: every other number of a larger array."""
    view = View.of(x.shape, "strided")
    flat = np.full(view.size, -5, x.dtype)
    view.on(flat)[...] = x
    return view.on(flat, xp)


@st.composite
def calls(
    draw: st.DrawFn,
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32"),
    dims: tuple[tuple[int, int], ...] = ((1 << 7, 1 << 7), (64, 32), (80, 16), (65, 20), (2, 2), (7, 6), (256, 256)),
    layouts: tuple[str, ...] = LAYOUTS,
) -> Call:
    packed, layout = draw(st.booleans()), st.sampled_from(layouts)
    head_dim, rotary_dim = draw(st.sampled_from(dims))
    return Call(
        batch=draw(st.sampled_from((0, 1, 3))),
        seqlen=draw(st.sampled_from((0, 1, 9, 40))),
        num_heads_q=draw(st.sampled_from((0, 1, 5))),
        num_heads_k=draw(st.sampled_from((None, 0, 1, 3))),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        dtype=draw(st.sampled_from(dtypes)),
        floats=draw(st.booleans()),
        packed=packed,
        places=draw(st.sampled_from(PLACES[: 5 if packed else 3])),
        interleaved=draw(st.booleans()),
        inverse=draw(st.booleans()),
        use_out=draw(st.booleans()),
        layouts=(draw(layout), draw(layout), draw(layout)),
        seed=draw(st.integers(0, 99)),
    )

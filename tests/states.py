"""Calls that merge states, and their gradients: drawn, run and held to the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from gradients import lay_out
from hypothesis import strategies as st

import cufa
from cufa import reference
from cufa.testing import to_numpy

EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
"""Half the distance of numbers around 1."""

TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}

NAMES = ("out_a", "lse_a", "out_b", "lse_b")
LAYOUTS = ("contiguous", "transposed", "wide", "padded", "offset", "strided")
VALUES = ("normal", "apart", "far", "infinite", "none")
"""What lse are: alike, far enough apart that some states hardly count, ±10^4, ±inf and NaN among them, or all empty."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of `merge_states`.

    Attributes
    ----------
    shape : tuple of int
        Of the merged out; packed if there are three extents.
    states : int or None
        Along a first axis; None for two that are given one by one.
    more : bool
        Whether the last of those along a first axis is given by itself.
    dtype : str
    layouts : tuple of str
        Of outs, lses, dout and out.
    values : str
        One of `VALUES`. Where a state is empty, its out holds NaN, and dout and dlse do where all are.
    use_out, dlse : bool
    seed : int
    """

    shape: tuple[int, ...]
    states: int | None = None
    more: bool = False
    dtype: str = "float32"
    layouts: tuple[str, str, str, str] = ("contiguous",) * 4
    values: str = "normal"
    use_out: bool = False
    dlse: bool = True
    seed: int = 0

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-3], self.shape[-2], self.shape[-3])

    def host(self) -> dict[str, Any]:
        """All arrays, by name."""
        rng = np.random.default_rng(self.seed)
        count = 2 if self.states is None else self.states
        outs, lses = rng.standard_normal((count, *self.shape)), rng.standard_normal((count, *self.lse_shape))
        if self.values == "none":
            lses[...] = -np.inf
        elif self.values != "normal":
            lses *= {"apart": 20.0, "far": 1e4, "infinite": 1.0}[self.values]
            odd = (-np.inf, -np.inf, np.inf, np.nan) if self.values == "infinite" else (-np.inf,)
            lses = np.where(rng.random(lses.shape) < 0.3, rng.choice(odd, lses.shape), lses)
        outs[np.isneginf(lses).swapaxes(-1, -2)] = np.nan
        dtype = np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))
        single = np.float64 if self.dtype == "float64" else np.float32
        outs, lses = outs.astype(dtype), lses.astype(single)
        if self.states is None:
            given = [outs[0], lses[0], outs[1], lses[1]]
        else:
            given = [outs[:-1], lses[:-1], outs[-1], lses[-1]] if self.more else [outs, lses]
        dout, dlse = rng.standard_normal(self.shape).astype(dtype), rng.standard_normal(self.lse_shape).astype(single)
        nothing = np.isneginf(lses).all(axis=0)  # what these rows have there counts nowhere
        dout[nothing.swapaxes(-1, -2)], dlse[nothing] = np.nan, np.nan
        return dict(zip(NAMES, given, strict=False)) | {"dout": dout} | ({"dlse": dlse} if self.dlse else {})

    def arrays(self, xp: Any = np) -> dict[str, Any]:
        """Those of `host`, as they are laid out in a framework's memory."""
        outs, lses, dout, _ = self.layouts
        layouts = {"out": outs, "lse": lses, "dou": dout, "dls": lses}
        return {name: lay_out(array, layouts[name[:3]], xp) for name, array in self.host().items()}

    def merged(self, xp: Any = np) -> tuple[Any, Any]:
        """What `merge_states` gives."""
        arrays = self.arrays(xp)
        given = {name: arrays[name] for name in NAMES if name in arrays}
        if not self.use_out:
            return cufa.merge_states(**given)  # type: ignore[no-any-return]
        dtype = getattr(ml_dtypes, self.dtype, self.dtype)
        out = lay_out(np.full(self.shape, np.nan, dtype), self.layouts[3], xp)
        found = cufa.merge_states(**given, out=out)
        assert found[0] is out
        return found  # type: ignore[no-any-return]

    def gradients(self, xp: Any = np) -> tuple[Any, ...]:
        """What `merge_states_backward` gives."""
        return cufa.merge_states_backward(**self.arrays(xp))  # type: ignore[no-any-return]

    def check_merged(self, out: Any, lse: Any) -> None:
        """Hold results to the reference."""
        arrays = {name: array.astype(np.float64) for name, array in self.host().items() if name in NAMES}
        weighed = {name: abs(array) if name[0] == "o" else array for name, array in arrays.items()}
        right, right_lse = reference.merge_states(**arrays)
        largest, _ = reference.merge_states(**weighed)
        self.check("lse", lse, right_lse, 4 + 2 * abs(right_lse))
        # Weights err by the rounding of lse - max(lse), times their distance, of which x exp(-x) is at most 1/e.
        self.check("out", out, right, 8 * self.count * largest[np.isfinite(largest)].max(initial=0.0))

    def check_gradients(self, found: tuple[Any, ...]) -> None:
        """The same of gradients."""
        host = self.host()
        right = reference.merge_states_backward(**{name: array.astype(np.float64) for name, array in host.items()})
        given = [name for name in NAMES if name in host]
        outs = [host["out_a"][None] if self.states is None else host["out_a"]]
        outs = np.concatenate([*outs, host["out_b"][None]] if "out_b" in host else outs)
        dout, outs = (np.nan_to_num(abs(x.astype(np.float64))) for x in (host["dout"], outs))
        # Of delta, which is a sum over columns, and of the mean of all of them.
        sums = np.max((dout * outs).sum(axis=-1), axis=0, initial=0.0).swapaxes(-1, -2)
        sums += np.nan_to_num(abs(host["dlse"])) if self.dlse else 0.0
        scales = {"o": 8 * self.count * dout, "l": (16 + 4 * self.count) * sums}
        for name, array, wanted in zip(given, found, right, strict=True):
            self.check(f"d{name}", array, wanted, scales[name[0]])

    @property
    def count(self) -> int:
        return max(1, 2 if self.states is None else self.states)

    def check(self, name: str, found: Any, right: Any, scale: Any) -> None:
        """Within half a unit in the last place of the dtype, and `scale` times that of what is computed in."""
        found, dtype = to_numpy(found), self.dtype
        single = "float64" if dtype == "float64" else "float32"
        if "lse" in name:
            dtype = single
        assert found.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype)) and found.shape == right.shape
        found = found.astype(np.float64)
        odd = ~np.isfinite(right)
        np.testing.assert_array_equal(found[odd], right[odd], name)
        with np.errstate(invalid="ignore"):
            bound = EPS[dtype] * abs(right) * 1.001 + TINY[dtype] + EPS[single] * scale
            worst = np.where(odd, 0, abs(found - right) / bound)
        assert worst.max(initial=0.0) <= 1, f"{name} errs by {worst.max():.3g} times the bound"


@st.composite
def calls(
    draw: st.DrawFn,
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32"),
    dims: tuple[int, ...] = (1, 3, 8, 20, 64, 65, 96, 128, 256),
    layouts: tuple[str, ...] = LAYOUTS,
    values: tuple[str, ...] = VALUES,
) -> Call:
    layout = st.sampled_from(layouts)
    flat = st.sampled_from([each for each in layouts if each in ("contiguous", "padded", "offset", "strided")])
    batch = draw(st.sampled_from(((), (0,), (1,), (3,))))
    rows, heads = draw(st.sampled_from((0, 1, 7, 33))), draw(st.sampled_from((0, 1, 2, 5)))
    states, more = draw(st.sampled_from((None, None, 0, 1, 2, 5, 40))), draw(st.booleans())
    return Call(
        shape=(*batch, rows, heads, draw(st.sampled_from(dims))),
        states=states,
        more=more and bool(states),
        dtype=draw(st.sampled_from(dtypes)),
        layouts=(draw(layout), draw(flat), draw(layout), draw(layout)),
        values=draw(st.sampled_from(values)),
        use_out=draw(st.booleans()),
        dlse=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )

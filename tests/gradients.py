"""Calls of the gradients, made of the cases of `cufa.testing`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import exact
import ml_dtypes
import numpy as np

import cufa
from cufa import reference, testing
from cufa.testing import Case, View, assert_gradients_close

VALUES = tuple(values for values in testing.VALUES if values not in ("huge scores", "constant"))
"""Of the cases whose gradients can be told from a lse in float32: scores that are not larger than 2^24 can."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of the gradients: a case, and what it has beside that.

    Attributes
    ----------
    case : Case
        Its `use_out` and `return_lse` do not matter: out and lse are those of the reference.
    deterministic : bool
    dlse : bool
        Whether there is one.
    dout : str
        Its layout.
    results : tuple of str, optional
        Layouts of dq, dk and dv, if they are given. Memory between their elements is NaN.
    """

    case: Case
    deterministic: bool = False
    dlse: bool = True
    dout: str = "contiguous"
    results: tuple[str, str, str] | None = None

    @property
    def packed(self) -> bool:
        return isinstance(self.case.seqlen_q, tuple)

    def given(self, xp: Any = np) -> dict[str, Any]:
        """All but the results of both directions, by keyword."""
        case, rng = self.case, np.random.default_rng([self.case.seed, 1])
        dtype, shape = getattr(ml_dtypes, case.dtype, np.dtype(case.dtype)), case.view("out").shape
        *batch, rows, heads, _ = (1, *shape)[-4:]
        dout, dlse = rng.standard_normal(shape), rng.standard_normal((*batch[self.packed :], heads, rows))
        if case.values == "huge":  # v is; its products with dout are still to fit float32
            dout *= 2.0**-12 if case.dtype == "float16" else 2.0**-24
        if case.values == "garbage":  # where it counts nowhere
            dout[case.counts("q") == 0] = np.nan
        with np.errstate(all="ignore"):
            more = {"dout": (dout.astype(dtype), self.dout), "dlse": (dlse.astype(self.lse_dtype), "strided")}
        if not self.dlse:
            del more["dlse"]
        return case.arrays(xp) | {name: lay_out(array, layout, xp) for name, (array, layout) in more.items()}

    def arrays(self, xp: Any = np) -> dict[str, Any]:
        """All but the results, by keyword: also out and lse, of the reference."""
        case, host = self.case, self.case.arrays()
        forward = reference.attention_varlen if self.packed else reference.attention
        out, lse = forward(**host, **case.options, return_lse=True)
        with np.errstate(all="ignore"):
            out, lse = out.astype(host["q"].dtype), lse.astype(self.lse_dtype)
        return self.given(xp) | {"out": lay_out(out, case.layouts[3], xp), "lse": lay_out(lse, "contiguous", xp)}

    @property
    def lse_dtype(self) -> type:
        return np.float64 if self.case.dtype == "float64" else np.float32

    def into(self, xp: Any = np) -> dict[str, Any]:
        """Arrays of NaN to pass as dq, dk and dv; nothing if they are not given."""
        dtype = getattr(ml_dtypes, self.case.dtype, self.case.dtype)
        layouts = zip("qkv", self.results or (), strict=False)
        return {
            f"d{name}": lay_out(np.full(self.case.view(name).shape, np.nan, dtype), layout, xp)
            for name, layout in layouts
        }

    def run(self, xp: Any = np, **changed: Any) -> tuple[Any, ...]:
        """The gradients; `changed` are arrays by keyword."""
        function = cufa.attention_varlen_backward if self.packed else cufa.attention_backward
        into = self.into(xp)
        whole = self.given if {"out", "lse"} <= changed.keys() else self.arrays
        arrays = whole(xp) | into | changed
        found: tuple[Any, ...] = function(**arrays, **self.case.options, deterministic=self.deterministic)
        assert all(array is other for array, other in zip(found, into.values(), strict=False))
        return found

    def right(self, xp: Any = np) -> tuple[Any, ...]:
        """The gradients, held to the reference."""
        found = self.run(xp)
        self.check(found)
        return found

    def check(self, found: tuple[Any, ...]) -> None:
        """Hold gradients to the reference, which reads the same arrays made by NumPy."""
        arrays = self.given()
        for name, array in zip("qkv", map(testing.to_numpy, found), strict=False):
            assert (array.shape, array.dtype) == (self.case.view(name).shape, arrays["q"].dtype)
        assert_gradients_close(found, **arrays, **self.case.options)

    def check_there(self, found: tuple[Any, ...], xp: Any) -> None:
        """The same where the arrays are, and so in a moment on a GPU: of a dense case whose only feature is a mask."""
        case, arrays = self.case, self.given(xp)
        assert arrays.keys() <= {"q", "k", "v", "dout", "dlse"} and not case.softcap and not case.dropout_p
        batch, rows, _, width = arrays["q"].shape
        keys, heads_k = arrays["k"].shape[1:3]

        def by_head(x: Any) -> Any:
            """Rows of the query heads that share a key head are below each other."""
            own = exact.in_float64(x).reshape(batch, x.shape[1], heads_k, -1, x.shape[3])
            return own.transpose(0, 2, 3, 1, 4).reshape(batch, heads_k, -1, x.shape[3])

        left, right = case.window_size or (None, None)
        scale = case.softmax_scale
        problem = exact.Padded(
            xp=xp,
            q=by_head(arrays["q"]),
            k=by_head(arrays["k"]),
            v=by_head(arrays["v"]),
            seqlen_q=rows,
            lengths_q=xp.full((batch, 1, 1, 1), rows),
            lengths_k=xp.full((batch, 1, 1, 1), keys),
            left=left,
            right=0 if case.causal else right,
            softmax_scale=width**-0.5 if scale is None else scale,
            softcap=0.0,
            slopes=None,
            sinks=None,
            dtype=case.dtype,
        )
        dlse = exact.in_float64(arrays["dlse"]).reshape(batch, heads_k, -1, 1) if self.dlse else None
        with np.errstate(all="ignore"):
            forward = exact.forward(problem)
            forward = forward._replace(lse_noise=xp.zeros_like(forward.lse_noise))  # as in `assert_gradients_close`
            right_ones = exact.backward(problem, forward, by_head(arrays["dout"]), dlse)
            largest = float(ml_dtypes.finfo(arrays["q"].dtype).max)
            bad = {
                name: float(exact.badness(xp, by_head(array), *expected, largest))
                for name, array, *expected in zip(("dq", "dk", "dv"), found, *right_ones, strict=False)
            }
        assert max(bad.values()) <= 1, f"times what is allowed: {bad}"


def lay_out(array: np.ndarray, layout: str, xp: Any = np) -> Any:
    """The array in one of `cufa.testing.LAYOUTS`, with NaN between its elements."""
    view = View.of(array.shape, layout)
    flat = np.full(view.size, np.nan, array.dtype)
    view.on(flat)[...] = array
    return view.on(flat, xp)

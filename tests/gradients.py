"""Calls of the gradients, made of the cases of `cufa.testing`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    def arrays(self, xp: Any = np) -> dict[str, Any]:
        """All but the results, by keyword."""
        case, host = self.case, self.case.arrays()
        dtype, rng = host["q"].dtype, np.random.default_rng([case.seed, 1])
        forward = reference.attention_varlen if self.packed else reference.attention
        out, lse = forward(**host, **case.options, return_lse=True)
        lse_dtype = np.float64 if dtype == np.float64 else np.float32
        dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
        if case.values == "huge":  # v is; its products with dout are still to fit float32
            dout *= 2.0**-12 if case.dtype == "float16" else 2.0**-24
        if case.values == "garbage":  # where it counts nowhere
            dout[case.counts("q") == 0] = np.nan
        with np.errstate(all="ignore"):
            more = {
                "out": (out.astype(dtype), case.layouts[3]),
                "dout": (dout.astype(dtype), self.dout),
                "lse": (lse.astype(lse_dtype), "contiguous"),
                "dlse": (dlse.astype(lse_dtype), "strided"),
            }
        if not self.dlse:
            del more["dlse"]
        return case.arrays(xp) | {name: lay_out(array, layout, xp) for name, (array, layout) in more.items()}

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
        arrays = self.arrays(xp) | into | changed
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
        arrays = self.arrays()
        del arrays["out"], arrays["lse"]
        for name, array in zip("qkv", map(testing.to_numpy, found), strict=False):
            assert (array.shape, array.dtype) == (self.case.view(name).shape, arrays["q"].dtype)
        assert_gradients_close(found, **arrays, **self.case.options)


def lay_out(array: np.ndarray, layout: str, xp: Any = np) -> Any:
    """The array in one of `cufa.testing.LAYOUTS`, with NaN between its elements."""
    view = View.of(array.shape, layout)
    flat = np.full(view.size, np.nan, array.dtype)
    view.on(flat)[...] = array
    return view.on(flat, xp)

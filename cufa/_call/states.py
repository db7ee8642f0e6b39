"""Checks of calls that merge states: results of attention over some of the keys each, and their gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .arrays import ALIGNMENT, CPU, Spec
from .options import Options
from .problem import GPU_DTYPES, ITEMSIZE, MAX_HEAD_DIM, MAX_SEQLEN, Check, Problem, Static, widest_copy

if TYPE_CHECKING:
    from .._operations.operation import Operation


def of_states(operation: Operation, specs: dict[str, Spec], options: Options) -> Problem:
    """The checked problem of an operation that merges states, or of its gradients."""
    return StatesCheck(operation.name, specs, options, (), packed=False).problem(operation, options)


class StatesCheck(Check):
    """The checks of states a, one or several along a first axis, and of state b."""

    def together(self) -> list[str]:
        return [name for name in ("out_a", "out_b", "dout") if name in self.specs]

    def problem(self, operation: Operation, options: Options) -> Problem:
        self.check_given(("out_a", "lse_a", *(("dout",) if operation.gradient else ())))
        self.check_together()
        out = self.merged_shape()
        *batch, rows, heads, columns = out
        lse = (*batch, heads, rows)
        self.check_states(out, lse)
        self.check_extents(out)
        dtype = self.specs["out_a"].dtype
        if operation.gradient:
            self.check_like("dout", out, dtype)
            if "dlse" in self.specs:
                self.check_like("dlse", lse, *self.lse_dtypes())
        else:
            self.check_written("out", out, dtype)
        device = self.specs["out_a"].device
        return Problem(
            operation=operation,
            options=options,
            static=None if device == CPU else self.static(columns),
            device=device,
            dtype=dtype,
            batch=math.prod(batch),
            seqlen_q=rows,
            seqlen_k=0,
            num_heads_q=heads,
            num_heads_k=heads,
            head_dim=columns,
            head_dim_v=columns,
            specs=self.specs,
            softmax_scale=1.0,
            softcap=0.0,
            window_left=None,
            window_right=None,
            out_shape=out,
            lse_shape=lse,
        )

    def merged_shape(self) -> tuple[int, ...]:
        """Of the merged out."""
        out_a = self.specs["out_a"].shape
        if ("out_b" in self.specs) != ("lse_b" in self.specs):
            missing, there = ("lse_b", "out_b") if "out_b" in self.specs else ("out_b", "lse_b")
            self.type_error(f"{missing} is None, but {there} is given; pass both, or neither to merge states in out_a.")
        alone = "out_b" not in self.specs
        several = alone or len(out_a) == len(self.specs["out_b"].shape) + 1
        shape = out_a if not several else out_a[1:] if alone else self.specs["out_b"].shape
        if len(shape) not in (3, 4):
            before = "(states, " if several else "("
            self.value_error(
                f"out_a has shape {out_a}; {before}batch, seqlen_q, num_heads, head_dim) or {before}total_q, "
                f"num_heads, head_dim) is expected{' without out_b' if alone else ''}."
            )
        return shape

    def check_states(self, out: tuple[int, ...], lse: tuple[int, ...]) -> None:
        a = self.specs["out_a"]
        several = a.shape[: len(a.shape) - len(out)]
        self.check_like("out_a", (*several, *out), a.dtype)
        self.check_like("lse_a", (*several, *lse), *self.lse_dtypes())
        if "out_b" in self.specs:
            self.check_like("out_b", out, a.dtype)
            self.check_like("lse_b", lse, *self.lse_dtypes())

    def check_extents(self, out: tuple[int, ...]) -> None:
        if out[-1] < 1:
            self.value_error("head_dim is 0; it must be at least 1.")
        if all(type(extent) is int for extent in out):  # symbols are not bounded
            if out[-1] > MAX_HEAD_DIM:
                self.unsupported(f"head_dim {out[-1]} is not supported; it may be 1 to {MAX_HEAD_DIM}.")
            if out[-3] > MAX_SEQLEN:
                self.unsupported(f"out_a has {out[-3]} rows; sequences of at most {MAX_SEQLEN} are supported.")

    def static(self, columns: int) -> Static:
        specs = [self.specs[name] for name in ("out_a", "out_b", "dout", "out") if name in self.specs]
        width = widest_chunk(specs, columns)
        element = GPU_DTYPES[specs[0].dtype]
        return Static(element, columns, columns, "none", (), False, False, width, width, tma=False, short=False)


def widest_chunk(specs: list[Spec], columns: int) -> int:
    """Bytes of the chunks that rows of so many elements of all arrays consist of: those of one element at least."""
    itemsize = ITEMSIZE[specs[0].dtype]
    width = math.gcd(columns * itemsize, ALIGNMENT, *(widest_copy(spec, itemsize) for spec in specs))
    return width if width >= 4 else itemsize

"""Calls of rotary embeddings, and their gradients: checks, and the facts that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArgumentError
from .arrays import CPU, Arrays, Spec
from .options import Options
from .problem import GPU_DTYPES, MAX_SEQLEN, Check, Problem, Static, check_offsets_of
from .states import widest_chunk

if TYPE_CHECKING:
    from .._operations.operation import Operation

HEADS = ("q", "k")
GRADIENTS = ("dq_out", "dk_out")


@dataclass(frozen=True, eq=False, kw_only=True)
class RotaryProblem(Problem):
    """A checked call.

    Attributes
    ----------
    rotary_dim : int
        Columns that are turned; those behind them are not.
    interleaved : bool
        Whether the columns of a pair lie side by side; else halfway apart.
    inverse : bool
        Whether a call turns back. Its gradients turn the other way.
    packed : bool
        Whether there is no axis of the batch.
    sequences : int
        That `cu_seqlens` tell of; 0 without.
    """

    rotary_dim: int
    interleaved: bool
    inverse: bool
    packed: bool
    sequences: int

    @property
    def varlen(self) -> bool:
        return "cu_seqlens" in self.specs

    def heads_shape(self, name: str) -> tuple[int, ...]:
        """Of q or k, and of what becomes of it."""
        heads = self.num_heads_q if name == "q" else self.num_heads_k
        rows = (self.seqlen_q,) if self.packed else (self.batch, self.seqlen_q)
        return (*rows, heads, self.head_dim)

    @property
    def has_k(self) -> bool:
        return "k" in self.specs or "dk_out" in self.specs


def of_rotary(operation: Operation, specs: dict[str, Spec], options: Options) -> Problem:
    """The checked problem of a call."""
    return _RotaryCheck(operation, specs, options).problem()


class _RotaryCheck(Check):
    options: Options

    def __init__(self, operation: Operation, specs: dict[str, Spec], options: Options) -> None:
        super().__init__(operation.name, specs, options, (), packed=False)
        self.operation = operation

    def together(self) -> list[str]:
        return [name for name in (GRADIENTS if self.operation.gradient else HEADS) if name in self.specs]

    def problem(self) -> RotaryProblem:
        self.check_given((*self.operation.arrays[:1], "cos", "sin"))
        self.check_together()
        q, *rest = (self.specs[name] for name in self.together())
        self.check_heads_shapes()
        rotary_dim = self.check_table(q)
        self.check_places(q)
        packed = len(q.shape) == 3
        for name, spec in zip(("q_out", "k_out"), (q, *rest), strict=False):
            if name in self.operation.written:
                self.check_written(name, spec.shape, q.dtype)
        if "k_out" in self.specs and not rest and not self.operation.gradient:
            self.type_error("k_out is given, but no k.")
        interleaved: bool = self.options.own("interleaved")
        return RotaryProblem(
            operation=self.operation,
            options=self.options,
            static=None if q.device == CPU else self.static(rotary_dim, interleaved),
            device=q.device,
            dtype=q.dtype,
            batch=1 if packed else q.shape[0],
            seqlen_q=q.shape[-3],
            seqlen_k=0,
            num_heads_q=q.shape[-2],
            num_heads_k=rest[0].shape[-2] if rest else 0,
            head_dim=q.shape[-1],
            head_dim_v=q.shape[-1],
            specs=self.specs,
            softmax_scale=1.0,
            softcap=0.0,
            window_left=None,
            window_right=None,
            out_shape=q.shape,
            lse_shape=(),
            rotary_dim=rotary_dim,
            interleaved=interleaved,
            inverse=self.options.own("inverse"),
            packed=packed,
            sequences=self.specs["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in self.specs else 0,
        )

    def check_heads_shapes(self) -> None:
        leading, *others = self.together()
        shape = self.specs[leading].shape
        if len(shape) not in (3, 4):
            self.value_error(
                f"{leading} has shape {shape}; (batch, seqlen, num_heads, head_dim) or (total, num_heads, head_dim) is "
                "expected."
            )
        for name in others:
            other = self.specs[name].shape
            if len(other) != len(shape) or (*other[:-2], other[-1]) != (*shape[:-2], shape[-1]):
                self.value_error(f"{name} has shape {other} but {leading} has {shape}; all but num_heads must agree.")
        if all(type(extent) is int for extent in shape) and shape[-3] > MAX_SEQLEN:
            self.unsupported(f"{leading} has {shape[-3]} rows; sequences of at most {MAX_SEQLEN} are supported.")

    def check_table(self, q: Spec) -> int:
        cos, sin = self.specs["cos"], self.specs["sin"]
        for name, spec in (("cos", cos), ("sin", sin)):
            if spec.dtype not in (q.dtype, "float32"):
                self.value_error(
                    f"{name} has dtype {spec.dtype}; pass {q.dtype}, as {self.together()[0]} has, or float32."
                )
            if len(spec.shape) != 2 or not 1 <= spec.shape[1] <= q.shape[-1] // 2:
                self.value_error(
                    f"{name} has shape {spec.shape}; (max_position, rotary_dim / 2) is expected, with a rotary_dim "
                    f"from 2 to head_dim, which is {q.shape[-1]}."
                )
        if (cos.shape, cos.dtype) != (sin.shape, sin.dtype):
            self.value_error(f"cos is {cos.dtype} {cos.shape} but sin is {sin.dtype} {sin.shape}; they must agree.")
        if cos.shape[0] < 1:
            self.value_error("cos has no positions; pass one row for each.")
        return 2 * cos.shape[1]

    def check_places(self, q: Spec) -> None:
        """What says where rows are."""
        packed = len(q.shape) == 3
        for name in ("offsets", "cu_seqlens"):
            if name in self.specs and "positions" in self.specs:
                self.type_error(f"positions and {name} are given; positions alone say where every row is.")
        if "cu_seqlens" in self.specs and not packed:
            self.type_error("cu_seqlens is given, but sequences lie along an axis; leave it out.")
        rows = q.shape[:-2]
        positions = self.specs.get("positions")
        if positions is not None:
            meaning = "(total,)" if packed else "(batch, seqlen)"
            self.check_int32("positions", meaning, rank=len(rows))
            if positions.shape != rows:
                self.value_error(f"positions has shape {positions.shape}; {rows}, that is {meaning}, is expected.")
        lengths = self.check_int32("cu_seqlens", "(batch + 1,)", least=1)
        batch = lengths.shape[0] - 1 if lengths is not None else 1 if packed else q.shape[0]
        offsets = self.check_int32("offsets", "(batch,)")
        if offsets is not None and offsets.shape != (batch,):
            self.value_error(f"offsets has shape {offsets.shape}; ({batch},), that is (batch,), is expected.")
        if positions is None and lengths is None and rows[-1] > self.specs["cos"].shape[0]:
            self.value_error(f"cos has {self.specs['cos'].shape[0]} positions, and sequences {rows[-1]} rows.")

    def static(self, rotary_dim: int, interleaved: bool) -> Static:
        columns = self.specs[self.together()[0]].shape[-1]
        names = [*self.together(), *(name for name in ("q_out", "k_out") if name in self.specs)]
        # Chunks end where columns are no longer turned and, if those of a pair are apart, halfway to there.
        parts = columns, rotary_dim if interleaved else rotary_dim // 2
        width = min(widest_chunk([self.specs[name] for name in names], part) for part in parts)
        element = GPU_DTYPES[self.specs[names[0]].dtype]
        rotary = "interleaved" if interleaved else "halves"
        return Static(
            element, columns, columns, "none", (), False, False, width, width, tma=False, short=False, rotary=rotary
        )


def check_values(problem: Problem, arrays: Arrays) -> None:
    """Refuse positions that the table does not have, and offsets of sequences that are none."""
    assert isinstance(problem, RotaryProblem)
    operation, count = problem.operation, problem.specs["cos"].shape[0]
    positions, offsets, cu_seqlens = (
        arrays.numpy(operation.arrays.index(name)) for name in ("positions", "offsets", "cu_seqlens")
    )
    if cu_seqlens is not None:
        check_offsets_of(operation.name, "q", problem.seqlen_q, cu_seqlens, argument="cu_seqlens")
    if positions is None:
        lengths = np.asarray(problem.seqlen_q)
        if cu_seqlens is not None:
            lengths = np.diff(np.maximum.accumulate(cu_seqlens.astype(np.int64)))
        first = np.zeros_like(lengths) if offsets is None else offsets.astype(np.int64)
        first, last = (each.ravel() for each in np.broadcast_arrays(first, first + lengths - 1))
        live = last >= first
        asked = np.concatenate([first[live], last[live]])
        what = "rows have positions" if offsets is None else "rows have positions from offsets on"
    else:
        asked, what = positions.ravel(), "positions"
    if asked.size and not 0 <= asked.min() <= asked.max() < count:
        raise ArgumentError(
            f"{operation.name}: {what} from {asked.min()} to {asked.max()}, but cos has those from 0 to {count - 1}."
        )

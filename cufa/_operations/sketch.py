"""Problems of arrays that are not there: what a call would be, told by shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .._call.arrays import ALIGNMENT, Spec, contiguous
from .._call.kvcache import CACHES
from .._call.options import Options
from .._call.problem import GPU_DTYPES, ITEMSIZE, Problem
from ..errors import UnsupportedError
from .backward import ATTENTION_BACKWARD, ATTENTION_VARLEN_BACKWARD
from .forward import ATTENTION, ATTENTION_VARLEN
from .kvcache import ATTENTION_WITH_KVCACHE, DECODE_PLAN
from .operation import Operation
from .operation import gradients_of as of_operation
from .rotary import ROTARY
from .states import MERGE_STATES, MERGE_STATES_BACKWARD

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        *(ATTENTION, ATTENTION_VARLEN, ATTENTION_BACKWARD, ATTENTION_VARLEN_BACKWARD),
        *(ATTENTION_WITH_KVCACHE, DECODE_PLAN, MERGE_STATES, MERGE_STATES_BACKWARD, ROTARY),
    )
}
"""Those of cufa's functions, by name."""

INTEGERS: tuple[str, ...] = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_k",
    "cache_seqlens",
    "block_table",
    "cache_batch_idx",
)
INTEGERS += ("cache_leftpad", "positions", "offsets", "cu_seqlens", "plan")
FLOATS: tuple[str, ...] = ("lse", "dlse", "lse_a", "lse_b", "sinks", "alibi_slopes", "rotary_cos", "rotary_sin")
FLOATS += ("cos", "sin", "k_descale", "v_descale")
"""Arrays of int32 and of float32, whatever the dtype of a call is."""

Shape = Sequence[int]


def sketch(
    operation: Operation,
    shapes: Mapping[str, Shape],
    dtype: str,
    options: Options,
    *,
    inputs: Layout | None = None,
    results: Layout | None = None,
    device: int = 0,
) -> Problem:
    """The problem of a call with new arrays of these shapes, by name, on a GPU that need not be there.

    What gradients take beside the arrays of the forward need not be named. `inputs` is how arrays of rows lie in
    memory, as q, k, v and dout, and `results` how out and gradients do that are given: contiguous and new by default.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        As the call would.
    """
    if dtype not in GPU_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of a GPU's; there are {', '.join(GPU_DTYPES)}.")
    known = {name: tuple(shape) for name, shape in shapes.items()}
    written = operation.written
    if operation.gradient and operation.tiles:
        known |= _of_the_forward(known)
        written = ("out", "dq", "dk", "dv")
        if results is not None:
            known |= {f"d{name}": known[name] for name in "qkv" if name in known}
    elif operation.gradient:
        known["dout"] = _out(known)
    elif results is not None:
        known |= {name: shape for name, shape in _written(known).items() if name in written}
    rows = {*operation.tiles, *operation.rows, "dout"}
    bytes_of = CACHES if dict(options.more).get("cache_dtype") else ()
    specs = {}
    for name in filter(known.__contains__, operation.arrays):
        layout = inputs if name in rows else results if name in written else None
        specs[name] = (layout or CONTIGUOUS).spec(
            known[name], "uint8" if name in bytes_of else _dtype_of(name, dtype), device
        )
    return operation.check(operation, specs, options)


def gradients_of(problem: Problem, deterministic: bool = False) -> Problem:
    """The problem of the gradients of a call, whose results and theirs are new arrays."""
    operation = of_operation(problem.operation)
    if operation is None or not operation.tiles:
        raise UnsupportedError(f"{problem.function}: there are no gradients of it, or they are a call of their own.")
    q = problem.specs["q"]
    results = {"out": (problem.out_shape, problem.dtype), "dout": (problem.out_shape, problem.dtype)}
    results["lse"] = (problem.lse_shape, problem.lse_dtype)
    specs = dict(problem.specs)
    for name, (shape, dtype) in results.items():
        specs[name] = q._replace(shape=shape, strides=contiguous(shape), dtype=dtype, misalignment=0, writable=True)
    return operation.check(operation, specs, problem.options._replace(return_lse=False, deterministic=deterministic))


class Layout:
    """How the rows of an array lie in memory: whole chunks of `ALIGNMENT` bytes each, the first so far from one."""

    def __init__(self, misalignment: int, *, backwards: bool = False) -> None:
        self.misalignment = misalignment
        self.backwards = backwards

    def spec(self, shape: tuple[int, ...], dtype: str, device: int) -> Spec:
        chunk = ALIGNMENT // ITEMSIZE[dtype]
        rows = contiguous((*shape[:-1], -(-shape[-1] // chunk) * chunk))
        strides = (*(-step if self.backwards else step for step in rows[:-1]), 1)
        return Spec("array", shape, strides, dtype, device, self.misalignment, True)


class _Contiguous(Layout):
    def spec(self, shape: tuple[int, ...], dtype: str, device: int) -> Spec:
        return Spec("array", shape, contiguous(shape), dtype, device, self.misalignment, True)


CONTIGUOUS = _Contiguous(0)


def _dtype_of(name: str, dtype: str) -> str:
    return "int32" if name in INTEGERS else "float32" if name in FLOATS else dtype


def _out(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if "out_a" in shapes:
        return shapes["out_b"] if "out_b" in shapes else shapes["out_a"][1:]
    columns = next((shapes[name][-1:] for name in ("v_cache", "v", "q") if name in shapes), ())
    return (*shapes["q"][:-1], *columns)


def _written(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of what may be given to be written, whatever the operation is."""
    return {"out": _out(shapes)} | {f"{name}_out": shapes[name] for name in "qk" if name in shapes}


def _of_the_forward(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of its results, and of the gradients by them, where q has as many dimensions as it should."""
    *batch, rows, heads, _ = shapes["q"]
    return {"out": _out(shapes), "dout": _out(shapes), "lse": (*batch, heads, rows)}

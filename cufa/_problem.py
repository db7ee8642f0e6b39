"""What is asked for: every argument checked, every message about it, and the facts that follow.

A `Problem` depends on the layouts of the arrays and on the options, never on addresses or values, so one that was
checked is remembered. Its `static` part is what decides the kernel; the rest are run-time facts of the launch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from ._arrays import ALIGNMENT, CPU, Arrays, Layout, Spec
from .errors import UnsupportedError

MAX_HEAD_DIM = 256
MAX_SEQLEN = (1 << 30) - 1
"""Longest sequence, and widest window; positions and their differences then fit 32 bits."""

LONG = 8192
"""Rows of q from which on a sequence counts as long."""

MAX_MAP_STRIDE = 1 << 40
"""Bound of a stride in a tensor map, in bytes."""

GPU_DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
"""Storage dtypes on a GPU, and their names in CUDA."""
CPU_DTYPES = (*GPU_DTYPES, "float64")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int32": 4}

DENSE_NAMES = ("q", "k", "v", "alibi_slopes", "sinks", "out")
VARLEN_NAMES = (*DENSE_NAMES, "cu_seqlens_q", "cu_seqlens_k", "seqused_k")
BACKWARD_NAMES = ("dout", "lse", "dlse", "dq", "dk", "dv")
"""What the gradients take after the arrays of the forward."""
NAMES = {
    "attention": DENSE_NAMES,
    "attention_varlen": VARLEN_NAMES,
    "attention_backward": (*DENSE_NAMES, *BACKWARD_NAMES),
    "attention_varlen_backward": (*VARLEN_NAMES, *BACKWARD_NAMES),
}
OUT = DENSE_NAMES.index("out")

FLOAT32_RANGE = 2.0**-126, 2.0**128 - 2.0**104
"""Of the normal numbers."""


class Static(NamedTuple):
    """What decides which kernel runs.

    Attributes
    ----------
    element : {'f16', 'bf16', 'f32'}
    head_dim, head_dim_v : int
    mask : {'none', 'causal', 'window'}
    softcap, alibi, sinks, varlen : bool
    copy_bytes : {16, 8, 4, 2}
        Widest copy that the alignment of all that is read allows; the size of an element copies them singly.
    store_bytes : {16, 8, 4, 2}
        The same for what is written.
    tma : bool
        Whether tensor maps can describe q, k and v, and dout.
    pack : int
        Query heads that share a key head and should share tiles, for want of rows; 1 if none.
    short : bool
        Whether sequences may be so short that what tiles waste along a causal mask's diagonal counts.
    """

    element: str
    head_dim: int
    head_dim_v: int
    mask: str
    softcap: bool
    alibi: bool
    sinks: bool
    varlen: bool
    copy_bytes: int
    store_bytes: int
    tma: bool
    short: bool
    pack: int = 1


@dataclass(frozen=True, eq=False)
class Problem:
    """A checked call.

    Attributes
    ----------
    function : str
        Name of the public function, for messages.
    static : Static or None
        None on the CPU.
    device : int
        CUDA ordinal, or `CPU`.
    dtype : str
    batch, seqlen_q, seqlen_k, num_heads_q, num_heads_k, head_dim, head_dim_v : int
        Of packed arrays, the lengths are the totals.
    strides : dict
        Of every array, by name, in elements.
    softmax_scale, softcap : float
    window_left, window_right : int or None
        None is unbounded; causal is ``window_right = 0``.
    out_shape, lse_shape : tuple of int
    memo : dict
        What later steps derive from the problem and keep with it.
    """

    function: str
    static: Static | None
    device: int
    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int
    strides: dict[str, tuple[int, ...]]
    softmax_scale: float
    softcap: float
    window_left: int | None
    window_right: int | None
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def varlen(self) -> bool:
        return self.function.startswith("attention_varlen")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of q, k or v."""
        rows, heads = (self.seqlen_q, self.num_heads_q) if name == "q" else (self.seqlen_k, self.num_heads_k)
        columns = self.head_dim_v if name == "v" else self.head_dim
        return (rows, heads, columns) if self.varlen else (self.batch, rows, heads, columns)

    @property
    def backward(self) -> bool:
        return self.function.endswith("_backward")


class Options(NamedTuple):
    """The keywords that are not arrays, as given."""

    causal: Any
    window_size: Any
    softmax_scale: Any
    softcap: Any


def dense_problem(arrays: Arrays, *options: Any) -> Problem:
    """The problem of ``attention``; arrays in the order of `DENSE_NAMES`, options in that of `Options`."""
    return _problem("attention", arrays, options)


def varlen_problem(arrays: Arrays, *options: Any) -> Problem:
    """The problem of ``attention_varlen``; arrays in the order of `VARLEN_NAMES`, options in that of `Options`."""
    return _problem("attention_varlen", arrays, options)


def backward_problem(function: str, arrays: Arrays, options: tuple[Any, ...]) -> Problem:
    """The problem of ``attention_backward`` or ``attention_varlen_backward``; arrays in the order of `NAMES`."""
    return _problem(function, arrays, options)


def check(function: str, arrays: Arrays, options: tuple[Any, ...]) -> Problem:
    """Check all of a call but what depends on addresses or values."""
    try:
        return _checked(function, arrays.layouts, options)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        # A list as window_size, or a number in an array: right or wrong, it is checked like any other.
        return _checked.__wrapped__(function, arrays.layouts, options)


def _problem(function: str, arrays: Arrays, options: tuple[Any, ...]) -> Problem:
    problem = check(function, arrays, options)
    written = ("dq", "dk", "dv") if problem.backward else ("out",)
    for index in map(NAMES[function].index, written):
        if arrays.layouts[index] is not None:
            _check_overlap(function, arrays, problem, index)
    if problem.device == CPU and problem.varlen:
        _check_offsets(function, arrays)
    return problem


@lru_cache(maxsize=1024)
def _checked(function: str, layouts: tuple[Layout | None, ...], options: tuple[Hashable, ...]) -> Problem:
    return _Check(function, layouts, Options(*options)).problem()


class _Check:
    """The checks of one call, in the order in which a user would want to hear of them."""

    def __init__(self, function: str, layouts: tuple[Layout | None, ...], options: Options) -> None:
        self.function = function
        self.varlen = function.startswith("attention_varlen")
        self.options = options
        self.specs: dict[str, Spec] = {}
        for name, layout in zip(NAMES[function], layouts, strict=True):
            if layout is not None:
                try:
                    self.specs[name] = layout[0].spec(layout)
                except UnsupportedError as error:
                    raise UnsupportedError(f"{function}: {name}: {error}") from None

    def problem(self) -> Problem:
        for name in ("q", "k", "v", *(("cu_seqlens_q", "cu_seqlens_k") if self.varlen else ())):
            if name not in self.specs:
                self.type_error(f"{name} is None; pass an array.")
        q, k, v = (self.specs[name] for name in "qkv")
        self.check_together()
        self.check_shapes(q, k, v)
        left, right = self.window()
        self.check_heads_arrays(q)
        if self.varlen:
            self.check_offsets_arrays()
        out_shape = (*q.shape[:-1], v.shape[-1])
        batch = self.specs["cu_seqlens_q"].shape[0] - 1 if self.varlen else q.shape[0]
        seqlen_q, num_heads_q, head_dim = q.shape[-3:]
        lse_shape = (num_heads_q, seqlen_q) if self.varlen else (batch, num_heads_q, seqlen_q)
        if self.function.endswith("_backward"):
            for name in ("out", "dout"):
                self.check_given(name, out_shape, q.dtype)
            self.check_given("lse", lse_shape, "float32")
            if "dlse" in self.specs:
                self.check_given("dlse", lse_shape, "float32")
            for name in "qkv":
                self.check_written(f"d{name}", self.specs[name].shape, q.dtype)
        else:
            self.check_written("out", out_shape, q.dtype)
        if left is None and right == 0 and seqlen_q == 1 and not self.varlen:
            right = None  # the only query is the last one, which sees every key
        softcap = self.softcap()
        return Problem(
            self.function,
            None if q.device == CPU else self.static(q, v, left, right, softcap),
            q.device,
            q.dtype,
            batch,
            seqlen_q,
            k.shape[-3],
            num_heads_q,
            k.shape[-2],
            head_dim,
            v.shape[-1],
            {name: spec.strides for name, spec in self.specs.items()},
            self.softmax_scale(head_dim),
            softcap,
            left,
            right,
            out_shape,
            lse_shape,
        )

    def check_together(self) -> None:
        """One framework, one device, one dtype."""
        q = self.specs["q"]
        for name, spec in self.specs.items():
            if spec.framework != q.framework:
                self.type_error(
                    f"{name} is a {spec.framework} array but q is a {q.framework} one; pass arrays of one framework."
                )
        for name, spec in self.specs.items():
            if spec.device != q.device:
                self.value_error(
                    f"{name} is on {device_name(spec.device)} but q is on {device_name(q.device)}; pass arrays on one "
                    "device."
                )
        supported = CPU_DTYPES if q.device == CPU else tuple(GPU_DTYPES)
        for name in "qkv":
            spec = self.specs[name]
            if spec.dtype not in CPU_DTYPES:
                self.value_error(f"{name} has dtype {spec.dtype}; pass {listed(supported)}.")
            if spec.dtype != q.dtype:
                self.value_error(f"{name} has dtype {spec.dtype} but q has {q.dtype}; q, k and v must agree.")
        if q.dtype not in supported:
            self.unsupported(
                f"{q.dtype} on a GPU is not supported; pass {listed(supported)}, or NumPy arrays to compute on the CPU."
            )

    def check_shapes(self, q: Spec, k: Spec, v: Spec) -> None:
        rank, meaning = (
            (3, "(total, num_heads, head_dim)") if self.varlen else (4, "(batch, seqlen, num_heads, head_dim)")
        )
        for name in "qkv":
            shape = self.specs[name].shape
            if len(shape) != rank:
                self.value_error(f"{name} has shape {shape}; {rank} dimensions {meaning} are expected.")
        if not self.varlen and not q.shape[0] == k.shape[0] == v.shape[0]:
            self.value_error(
                f"q, k and v have batch sizes {q.shape[0]}, {k.shape[0]} and {v.shape[0]}; they must agree."
            )
        if k.shape[-3] != v.shape[-3]:
            self.value_error(f"v has seqlen {v.shape[-3]} but k has {k.shape[-3]}; k and v must agree.")
        if k.shape[-2] != v.shape[-2]:
            self.value_error(f"v has {v.shape[-2]} heads but k has {k.shape[-2]}; k and v must agree.")
        if k.shape[-1] != q.shape[-1]:
            self.value_error(f"k has head_dim {k.shape[-1]} but q has {q.shape[-1]}; q and k must agree.")
        num_heads_q, num_heads_k = q.shape[-2], k.shape[-2]
        if num_heads_q % num_heads_k if num_heads_k else num_heads_q:
            self.value_error(
                f"q has {num_heads_q} heads and k has {num_heads_k}; the heads of q must be a multiple of those of k."
            )
        if self.function.endswith("_backward") and num_heads_k and not num_heads_q:
            self.value_error(f"q has no heads but k has {num_heads_k}; there is nothing to differentiate.")
        for name, dim in (("head_dim", q.shape[-1]), ("head_dim_v", v.shape[-1])):
            if dim < 1:
                self.value_error(f"{name} is 0; it must be at least 1.")
            if dim > MAX_HEAD_DIM:
                self.unsupported(f"{name} {dim} is not supported; it may be 1 to {MAX_HEAD_DIM}.")
        for name, length in (("q", q.shape[-3]), ("k", k.shape[-3])):
            if length > MAX_SEQLEN:
                self.unsupported(f"{name} has {length} rows; sequences of at most {MAX_SEQLEN} are supported.")

    def softmax_scale(self, head_dim: int) -> float:
        given = self.options.softmax_scale
        if given is None:
            return float(head_dim**-0.5)
        scale = self.number("softmax_scale", given)
        if not (math.isfinite(scale) and scale > 0.0):
            self.value_error(f"softmax_scale is {scale}; it must be finite and greater than 0.")
        if scale > FLOAT32_RANGE[1]:
            self.value_error(f"softmax_scale is {scale}; it must be a float32 number.")
        return scale

    def softcap(self) -> float:
        softcap = self.number("softcap", self.options.softcap)
        if not (math.isfinite(softcap) and softcap >= 0.0):
            self.value_error(f"softcap is {softcap}; it must be finite and not negative (0.0 is off).")
        if softcap != 0.0 and not FLOAT32_RANGE[0] <= softcap <= FLOAT32_RANGE[1]:
            self.value_error(f"softcap is {softcap}; it must be a normal float32 number, or 0.0, which is off.")
        return softcap

    def number(self, name: str, given: Any) -> float:
        if isinstance(given, (str, bytes)) or getattr(given, "ndim", 0) != 0:
            self.type_error(f"{name} is a {type(given).__name__}; pass a number.")
        try:
            return float(given)
        except (TypeError, ValueError):
            self.type_error(f"{name} is a {type(given).__name__}; pass a number.")

    def window(self) -> tuple[int | None, int | None]:
        causal, given = self.options.causal, self.options.window_size
        if type(causal).__name__ not in ("bool", "bool_"):  # bool_: NumPy's
            self.type_error(f"causal is a {type(causal).__name__}; pass True or False.")
        sides = (None, None) if given is None else given
        if isinstance(sides, str) or not isinstance(sides, Sequence) or len(sides) != 2:
            self.type_error(f"window_size is {given!r}; pass a pair (left, right), each a number of keys or None.")
        left, right = (self.side(name, side) for name, side in zip(("left", "right"), sides, strict=True))
        if causal:
            right = 0 if right is None else min(right, 0)
        return left, right

    def side(self, name: str, given: Any) -> int | None:
        if given is None:
            return None
        try:
            side = operator.index(given)
        except TypeError:
            self.type_error(f"the {name} side of window_size is a {type(given).__name__}; pass an integer or None.")
        if side < -1:
            self.value_error(
                f"the {name} side of window_size is {side}; pass at least 0, or None (or -1) for unbounded."
            )
        return None if side == -1 else min(side, MAX_SEQLEN)

    def check_heads_arrays(self, q: Spec) -> None:
        batch, num_heads_q = self.specs["q"].shape[0], q.shape[-2]
        if self.varlen:
            batch = max(0, self.specs["cu_seqlens_q"].shape[0] - 1) if self.specs["cu_seqlens_q"].shape else 0
        slopes, sinks = self.specs.get("alibi_slopes"), self.specs.get("sinks")
        if slopes is not None:
            self.check_float32("alibi_slopes", slopes)
            if slopes.shape not in ((num_heads_q,), (batch, num_heads_q)):
                self.value_error(
                    f"alibi_slopes has shape {slopes.shape}; ({num_heads_q},) or ({batch}, {num_heads_q}), that is "
                    "(num_heads_q,) or (batch, num_heads_q), is expected."
                )
        if sinks is not None:
            self.check_float32("sinks", sinks)
            if sinks.shape != (num_heads_q,):
                self.value_error(
                    f"sinks has shape {sinks.shape}; ({num_heads_q},), that is (num_heads_q,), is expected."
                )

    def check_float32(self, name: str, spec: Spec) -> None:
        if spec.dtype != "float32" and not (spec.device == CPU and spec.dtype == "float64"):
            self.value_error(f"{name} has dtype {spec.dtype}; pass float32.")

    def check_offsets_arrays(self) -> None:
        for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
            spec = self.specs.get(name)
            if spec is None:
                continue
            if spec.dtype != "int32":
                self.value_error(f"{name} has dtype {spec.dtype}; pass int32.")
            if len(spec.shape) != 1 or (name != "seqused_k" and spec.shape[0] < 1):
                expected = "(batch,)" if name == "seqused_k" else "(batch + 1,)"
                self.value_error(f"{name} has shape {spec.shape}; {expected} is expected.")
        rows = self.specs["cu_seqlens_q"].shape[0]
        if self.specs["cu_seqlens_k"].shape[0] != rows:
            self.value_error(
                f"cu_seqlens_k has {self.specs['cu_seqlens_k'].shape[0]} entries but cu_seqlens_q has {rows}; both "
                "need one more than there are sequences."
            )
        seqused = self.specs.get("seqused_k")
        if seqused is not None and seqused.shape[0] != rows - 1:
            self.value_error(
                f"seqused_k has {seqused.shape[0]} entries; one for each of the {rows - 1} sequences is expected."
            )

    def check_given(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """A result of the forward, or the gradient by one."""
        spec = self.specs.get(name)
        if spec is None:
            self.type_error(f"{name} is None; pass what belongs to the forward's results.")
        if spec.shape != shape:
            self.value_error(f"{name} has shape {spec.shape}; {shape} is expected.")
        if spec.dtype != dtype:
            self.value_error(f"{name} has dtype {spec.dtype}; pass {dtype}.")

    def check_written(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        spec = self.specs.get(name)
        if spec is None:
            return
        if spec.shape != shape:
            self.value_error(f"{name} has shape {spec.shape}; {shape} is expected.")
        if spec.dtype != dtype:
            self.value_error(f"{name} has dtype {spec.dtype} but q has {dtype}; they must agree.")
        if not spec.writable:
            self.value_error(f"{name} is read-only; pass an array that can be written.")
        if not _distinct(spec):
            self.value_error(
                f"{name} has strides {spec.strides}, by which its elements share memory; pass one without."
            )

    def static(
        self,
        q: Spec,
        v: Spec,
        left: int | None,
        right: int | None,
        softcap: float,
    ) -> Static:
        itemsize = ITEMSIZE[q.dtype]
        backward = self.function.endswith("_backward")
        mapped = ["q", "k", "v", *(["dout"] if backward else [])]
        read = [*mapped, *(["out"] if backward else [])]
        written = ["dq", "dk", "dv"] if backward else ["out"]
        row_bytes = math.gcd(v.shape[-1], q.shape[-1] if backward else 0) * itemsize
        # Lengths of packed sequences are not known; and no row's result may depend on its neighbours'.
        short = not backward and mask_kind(left, right) == "causal" and (self.varlen or q.shape[1] < LONG)
        stores = [widest_copy(self.specs[name], itemsize) for name in written if name in self.specs]
        return Static(
            element=GPU_DTYPES[q.dtype],
            head_dim=q.shape[-1],
            head_dim_v=v.shape[-1],
            mask=mask_kind(left, right),
            softcap=softcap > 0.0,
            alibi="alibi_slopes" in self.specs,
            sinks="sinks" in self.specs,
            varlen=self.varlen,
            copy_bytes=min(widest_copy(self.specs[name], itemsize) for name in read),
            tma=all(has_tensor_map(self.specs[name], itemsize) for name in mapped),
            store_bytes=max(itemsize, min([*stores, math.gcd(row_bytes, ALIGNMENT)])),
            pack=1 if backward else self.pack(q),
            short=short,
        )

    def pack(self, q: Spec) -> int:
        """Packing pays where it leaves at most three quarters of the tiles of 128 rows."""
        heads_k = self.specs["k"].shape[-2]
        ratio = q.shape[-2] // heads_k if heads_k else 1
        if self.varlen or ratio not in (2, 4, 8, 16, 32, 64) or "alibi_slopes" in self.specs or "sinks" in self.specs:
            return 1
        rows = q.shape[1]
        return ratio if -(-rows * ratio // 128) <= 0.75 * ratio * -(-rows // 128) else 1

    def value_error(self, text: str) -> NoReturn:
        raise ValueError(f"{self.function}: {text}")

    def type_error(self, text: str) -> NoReturn:
        raise TypeError(f"{self.function}: {text}")

    def unsupported(self, text: str) -> NoReturn:
        raise UnsupportedError(f"{self.function}: {text}")


def mask_kind(left: int | None, right: int | None) -> str:
    """Which mask a window asks for: none, causal, or window."""
    if left is not None or right not in (None, 0):
        return "window"
    return "causal" if right == 0 else "none"


def widest_copy(spec: Spec, itemsize: int) -> int:
    """Bytes that can be copied at once from every row of the array: a power of 2 up to `ALIGNMENT`."""
    if 0 in spec.shape:
        return ALIGNMENT
    if spec.shape[-1] > 1 and spec.strides[-1] != 1:
        return itemsize
    steps = [stride for extent, stride in zip(spec.shape[:-1], spec.strides[:-1], strict=True) if extent > 1]
    width = math.gcd(ALIGNMENT, spec.misalignment, *(stride * itemsize for stride in steps))
    return width if width >= 4 else itemsize


def has_tensor_map(spec: Spec, itemsize: int) -> bool:
    """Whether a tensor map can describe the array: 16-byte aligned rows, and strides from 0 to 2^40 bytes."""
    steps = (stride for extent, stride in zip(spec.shape[:-1], spec.strides[:-1], strict=True) if extent > 1)
    return widest_copy(spec, itemsize) == ALIGNMENT and all(0 <= step * itemsize < MAX_MAP_STRIDE for step in steps)


def device_name(device: int) -> str:
    """How messages name a device."""
    return "the CPU" if device == CPU else f"cuda:{device}"


def listed(words: Sequence[str]) -> str:
    """Words joined as in a sentence."""
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _distinct(spec: Spec) -> bool:
    """Whether no two elements share memory, as far as nested strides can show it."""
    if 0 in spec.shape:
        return True
    axes = sorted((abs(stride), extent) for stride, extent in zip(spec.strides, spec.shape, strict=True) if extent > 1)
    reach = 0
    for stride, extent in axes:
        if stride <= reach:
            return False
        reach += stride * (extent - 1)
    return True


def _byte_range(spec: Spec) -> tuple[int, int]:
    """Where the elements begin and end, in bytes from the array's address; the same twice if there are none."""
    if 0 in spec.shape:
        return 0, 0
    spans = [stride * (extent - 1) for stride, extent in zip(spec.strides, spec.shape, strict=True)]
    itemsize = ITEMSIZE[spec.dtype]
    return itemsize * sum(span for span in spans if span < 0), itemsize * (1 + sum(span for span in spans if span > 0))


def _check_overlap(function: str, arrays: Arrays, problem: Problem, written: int) -> None:
    """Refuse a result that shares memory with another array: it is written while those are still read."""
    specs = problem.memo.get("specs")
    if specs is None:
        specs = [None if layout is None else layout[0].spec(layout) for layout in arrays.layouts]
        problem.memo["specs"], problem.memo["ranges"] = specs, [spec and _byte_range(spec) for spec in specs]
    ranges, pointers, names = problem.memo["ranges"], arrays.pointers, NAMES[function]
    first, last = (pointers[written] + side for side in ranges[written])
    for index, extent in enumerate(ranges):
        if extent is None or index == written:
            continue
        pointer, name = pointers[index], names[index]
        apart = pointer + extent[0] >= last or first >= pointer + extent[1]
        if not apart and not _interleave(specs[written], specs[index], pointers[written] - pointer):
            own = names[written]
            raise ValueError(f"{function}: {own} overlaps {name}; pass one that shares no memory with the others.")


def _interleave(a: Spec, b: Spec, distance: int) -> bool:
    """Whether two views of one buffer take disjoint columns of equally long rows, as slices of a fused array do."""
    itemsize = ITEMSIZE[a.dtype]
    if itemsize != ITEMSIZE[b.dtype] or distance % itemsize or len(a.shape) != len(b.shape):
        return False
    step = math.gcd(*(stride for stride in (*a.strides[:-2], *b.strides[:-2])))
    if step == 0:
        return False
    width_a, width_b = (
        1 + sum(stride * (extent - 1) for stride, extent in zip(spec.strides[-2:], spec.shape[-2:], strict=True))
        for spec in (a, b)
    )
    if min(*a.strides[-2:], *b.strides[-2:]) < 0 or max(width_a, width_b) > step:
        return False
    gap = (distance // itemsize) % step  # where a's row begins in a period that begins with b's
    return width_b <= gap and gap + width_a <= step


def _check_offsets(function: str, arrays: Arrays) -> None:
    """Check the values of cu_seqlens and seqused_k. On a GPU reading them would make the host wait, so there the
    kernel clamps them to the packed arrays instead."""
    for index, total_of in ((6, 0), (7, 1)):
        name, offsets = VARLEN_NAMES[index], arrays.numpy(index)
        packed = arrays.numpy(total_of)
        assert offsets is not None and packed is not None
        if offsets[0] != 0:
            raise ValueError(f"{function}: {name} starts at {offsets[0]}; it must start at 0.")
        if (offsets[1:] < offsets[:-1]).any():
            raise ValueError(f"{function}: {name} decreases; offsets must not.")
        if offsets[-1] != packed.shape[0]:
            raise ValueError(
                f"{function}: {name} ends at {offsets[-1]} but {VARLEN_NAMES[total_of]} has {packed.shape[0]} rows; "
                "they must agree."
            )
    used, offsets = arrays.numpy(8), arrays.numpy(7)
    if used is not None and offsets is not None:
        lengths = offsets[1:] - offsets[:-1]
        if ((used < 0) | (used > lengths)).any():
            raise ValueError(f"{function}: seqused_k must lie between 0 and the lengths in cu_seqlens_k.")

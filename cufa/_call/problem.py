"""What is asked for: every argument checked, every message about it, and the facts that follow.

A `Problem` depends on the layouts of the arrays and on the options that are not late, never on addresses or values, so
one that was checked is remembered. Its `static` part is what decides the kernel; the rest are run-time facts of the
launch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, UnsupportedError
from . import options as _options
from . import overlap as _overlap
from .arrays import ALIGNMENT, CPU, Arrays, Key, Layout, Spec, contiguous, layouts_of
from .options import MAX_SEQLEN as MAX_SEQLEN
from .options import Options, Plain

if TYPE_CHECKING:
    from .._operations.operation import Operation, Result
    from .._terms.term import Term

MAX_HEAD_DIM = 256

LONG = 8192
"""Rows of q from which on a sequence counts as long."""

ROTARY = ("", "interleaved", "halves")
"""Ways in which rows can be rotated: not, in pairs of columns side by side, or in pairs halfway apart."""

FEW_KEYS = 128
"""Keys up to which a row sees them all in one small tile."""

CHAIN_ROWS = 1 << 14
"""Rows over which the tensor cores add up by themselves: ``chain_rows`` in cuda_src/tile/local.cuh."""

BASE_SHIFT = 24
"""What exponents of bfloat16 are lower by than need be: ``Softmax::shift`` in cuda_src/attention/softmax.cuh."""

LONG_ROWS = 128
"""Rows of an average sequence that are no different from more."""

MANY = 256
"""Packed sequences from which on there are many."""

MANY_ROWS, TAKEN_ROWS = 1 << 17, 1024
"""Rows of all heads of packed sequences, and of one on average, from which on tiles are so many and so long that thread
blocks had better take them as they come: eight rounds of tiles on 128 SMs. Measured far above that alone."""

SHORT_ROWS, SHORT_KEYS = (16, 32), (16, 32, 64)
"""Rows of q, and of k, of the tiles that short sequences may have to themselves; longer ones have usual tiles."""

MAX_PAGE_ROWS = 64
"""Rows of a page side by side that are no different from more."""

FEW_ROWS = (16, 32, 64)
"""Rows of the tiles that the heads that share a key head may fill together where q has few; more have usual tiles."""

KEYS_PER_ROW = 8
"""Keys for each of such rows from which on it is they that take the time. Reckoned, not measured."""

CLUSTER_ITEMS = 128
"""Tiles of few rows, all heads' counted, up to which a GPU holds a cluster of thread blocks for each."""

MAX_CLUSTER = 16
"""Thread blocks of the largest clusters, as far as a GPU holds `CLUSTER_BLOCKS` of all of them."""

CLUSTER_BLOCKS = 256
"""Thread blocks of all clusters, two on each of 128 SMs."""

CLUSTER_SHARE = 3 << 19
"""Keys and values up to which a thread block of a cluster reads its share no later than all SMs do that share them
evenly. On an H200 with 1 MB clusters were faster, with 4 MB slower."""

CLUSTERS_THAT_FILL = 8
"""Clusters that read as fast as a whole GPU. Reckoned, not measured."""

CLUSTER_BYTES = 4 << 20
"""Keys and values of a tile that fewer clusters read in less time than a second launch and sums in memory take.
Reckoned, not measured."""

FULL_ROWS, FULL_GPU_ROWS = 64, 4096
"""Rows of a tile of 128, and of all query heads together, from which on queries over caches have large tiles: where
their tensor cores, several times as fast, gain more than what is left empty or idle loses. Reckoned, not measured."""

FEW_TILES, FEW_TILE_ROWS = 32, 128
"""Tiles of so many rows, of all key heads together, that leave most SMs of a GPU without one. All SMs share their keys
then, in tiles of the last of `FEW_ROWS`, with instructions half as fast as those of the kernels for one architecture:
even at twice as many tiles that takes as long. Reckoned, not measured."""

MANY_KEYS, KEYS_PER_QUERY = 2048, 4
"""Keys, and keys for each query, from which on that pays: what is shared has to be put together, and tiles count as
alike, which beside many keys they are under a mask, too. Reckoned, not measured."""

MAX_SHORT_SEQUENCES = 1 << 29
"""Sequences, each head's counted, whose small tiles surely are few enough for one launch."""

MAX_MAP_STRIDE = 1 << 40
"""Bound of a stride in a tensor map, in bytes."""

GPU_DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
"""Storage dtypes on a GPU, and their names in CUDA."""
CPU_DTYPES = (*GPU_DTYPES, "float64")
CACHE_DTYPES = {"float8_e4m3fn": "e4m3"}
"""Dtypes that caches may have beside that of q, where that has 16 bits, and their names in CUDA."""
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int32": 4}
ITEMSIZE |= {"float8_e4m3fn": 1, "uint8": 1, "bool": 1}


class Static(NamedTuple):
    """What decides which kernel runs.

    Attributes
    ----------
    element : {'f16', 'bf16', 'f32'}
    head_dim, head_dim_v : int
    mask : {'none', 'causal', 'window'}
    terms : tuple of Term
        Score terms, in the order in which they are applied.
    sinks, varlen : bool
    copy_bytes : {16, 8, 4, 2, 1}
        Widest copy that the alignment of q, k and v, and of dout, allows; the size of an element copies them singly.
    store_bytes : {16, 8, 4, 2}
        The same for what is written.
    tma : bool
        Whether tensor maps can describe q, k and v, and dout.
    pack : int
        Query heads that share a key head and should share tiles, for want of rows; 1 if none.
    short : bool
        Whether sequences may be so short that what large tiles waste, along a causal mask's diagonal or behind the
        last key, counts.
    many : bool
        Whether packed sequences are so many that a thread block should not look for a single tile among them.
    chains : bool
        Whether there may be sums over so many rows that they would drift: see cuda_src/tile/local.cuh.
    out_copy_bytes : {16, 8, 4, 2}
        As copy_bytes, for the out that the gradients read; 16 in the forward.
    empty_rows : bool
        Whether some rows of dense arrays see no key, for the forward.
    short_rows, short_keys : int
        Where sequences, packed ones on average, are so short that usual tiles hold little but padding: the least of
        `SHORT_ROWS` and of `SHORT_KEYS` that hold one. Else 0.
    few_rows : int
        Where dense q has few rows and many keys: the least of `FEW_ROWS` that holds the rows of all heads that share a
        key head, or the last of them where more rows fill few tiles. With caches the same, packed sequences counting by
        their average, or the last of them if there are more rows. Else 0, and always for gradients.
    clusters : bool
        Whether a cluster of thread blocks should share the keys of each tile of few rows, since there are but few tiles
        and nothing else says how keys are divided.
    deterministic : bool
        Whether blocks that add to the same gradients do so in a fixed order.
    average_rows : int
        For gradients, rows of q that an average packed sequence has, as far as they matter: 0, or a power of 2 up to
        `LONG_ROWS`.
    page_rows : int
        Of caches in pages: the keys from each multiple of so many on lie in one page side by side; a power of 2 up to
        `MAX_PAGE_ROWS`. 0 where caches are contiguous.
    slots : bool
        Of caches in pages: whether a row of k and that of v are found by one number, the row's slot.
    rotary : str
        One of `ROTARY`: how rows of q and new ones of k are rotated.
    appends : bool
        Whether new rows of k and v are written into caches first.
    q_copy_bytes : {16, 8, 4, 2}
        As copy_bytes, for q, where that is of the caches alone; else 16.
    full_tiles : bool
        Whether queries over caches fill large tiles, and so many that these keep a GPU busy without parts of keys.
    kv_element : {'', 'e4m3'}
        Of caches, where it is not that of q.
    many_tiles : bool
        Whether packed sequences have so many tiles, and these so many keys, that thread blocks take them as they come.
    """

    element: str
    head_dim: int
    head_dim_v: int
    mask: str
    terms: tuple[Term, ...]
    sinks: bool
    varlen: bool
    copy_bytes: int
    store_bytes: int
    tma: bool
    short: bool
    pack: int = 1
    many: bool = False
    chains: bool = False
    out_copy_bytes: int = ALIGNMENT
    empty_rows: bool = False
    short_rows: int = 0
    short_keys: int = 0
    few_rows: int = 0
    clusters: bool = False
    deterministic: bool = False
    average_rows: int = LONG_ROWS
    page_rows: int = 0
    slots: bool = False
    rotary: str = ""
    appends: bool = False
    q_copy_bytes: int = ALIGNMENT
    full_tiles: bool = False
    kv_element: str = ""
    many_tiles: bool = False


class Made(NamedTuple):
    """A result: shape and dtype, its place among the arrays if it is given, and that of a contiguous array like it."""

    shape: tuple[int, ...]
    dtype: str
    given: int | None
    alike: int | None


@dataclass(frozen=True, eq=False)
class Problem:
    """A checked call.

    Attributes
    ----------
    operation : Operation
        Of which this is a call.
    options : Options
    static : Static or None
        None on the CPU.
    device : int
        CUDA ordinal, or `CPU`.
    dtype : str
    batch, seqlen_q, seqlen_k, num_heads_q, num_heads_k, head_dim, head_dim_v : int
        Of packed arrays, the lengths are the totals.
    specs : dict
        Every array but for its address, by name.
    softmax_scale, softcap : float
    window_left, window_right : int or None
        None is unbounded; causal is ``window_right = 0``.
    out_shape, lse_shape : tuple of int
    memo : dict
        What later steps derive from the problem and keep with it.
    """

    operation: Operation
    options: Options
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
    specs: dict[str, Spec]
    softmax_scale: float
    softcap: float
    window_left: int | None
    window_right: int | None
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def function(self) -> str:
        """Name of the public function, for messages."""
        return self.operation.name

    @property
    def varlen(self) -> bool:
        """Whether sequences lie end to end in q."""
        return "cu_seqlens_q" in self.specs

    @cached_property
    def written_indices(self) -> tuple[int, ...]:
        """Places of the given arrays that a call writes."""
        operation = self.operation
        written = (*operation.written, *(operation.changed if self.changes else ()))
        return tuple(operation.arrays.index(name) for name in written if name in self.specs)

    @property
    def changes(self) -> bool:
        """Whether a call changes the arrays that its operation may change."""
        return bool(self.operation.changed)

    def apart_by_pages(self, written: str, other: str, distance: int) -> bool:
        """Whether two arrays that share memory are pages of one pool, so that their tables decide what is shared."""
        return False

    @cached_property
    def results(self) -> tuple[Result, ...]:
        """What a call gives."""
        return self.operation.results(self)

    @cached_property
    def made(self) -> tuple[Made, ...]:
        """Where its results come from."""
        names, found = self.operation.arrays, []
        for _, shape, dtype, place in self.results:
            given = place if place is not None and names[place] in self.specs else None
            facts = shape, contiguous(shape), dtype
            alike = (name for name, spec in self.specs.items() if (spec.shape, spec.strides, spec.dtype) == facts)
            name = next(alike, None)
            found.append(Made(shape, dtype, given, None if name is None else names.index(name)))
        return tuple(found)

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """Its score terms, in the order in which they are applied."""
        return tuple(term for term in self.operation.terms if term.asked(self.specs, self.options))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of q, k or v."""
        rows, heads = (self.seqlen_q, self.num_heads_q) if name == "q" else (self.seqlen_k, self.num_heads_k)
        columns = self.head_dim_v if name == "v" else self.head_dim
        return (rows, heads, columns) if self.varlen else (self.batch, rows, heads, columns)

    def scoring(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """What happens to scores, by the keywords of the functions for the CPU.

        `arrays` are those of a call, and its late options, by name.
        """
        return {
            "softmax_scale": self.softmax_scale,
            "window_left": self.window_left,
            "window_right": self.window_right,
            "terms": [(term, self.given_to(term, arrays)) for term in self.terms],
            "sinks": arrays["sinks"],
        }

    def given_to(self, term: Term, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """What a score term is given on the CPU: its arrays and options, by name; `arrays` hold late options too."""
        return {name: arrays[name] for name in (*term.arrays, *term.late_names)} | term.options(self)

    @property
    def strides(self) -> dict[str, tuple[int, ...]]:
        """Of every array, by name, in elements."""
        return {name: spec.strides for name, spec in self.specs.items()}

    def of_other_memory(self, specs: dict[str, Spec]) -> Problem:
        """The same problem where some of the arrays that are read lie otherwise in memory."""
        assert self.static is not None
        specs = self.specs | specs
        static = self.static._replace(**access(self.operation, specs))
        return replace(self, static=static, specs=specs, memo={})

    @property
    def lse_dtype(self) -> str:
        """Of lse, and of dsinks."""
        return "float64" if self.dtype == "float64" else "float32"


def checked(operation: Operation, arrays: Arrays, options: Options) -> Problem:
    """The problem of a call: all of it is checked.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        In the order in which a user would want to hear of it.
    """
    problem = _checked(operation, arrays.key, options.lasting if options.late else options)
    if problem.written_indices:
        _check_overlap(operation, arrays, problem)
    if operation.check_values is not None and problem.device == CPU:
        operation.check_values(problem, arrays)
    return problem


def check(operation: Operation, arrays: Arrays, options: Options) -> Problem:
    """`checked` but for what depends on addresses or values of arrays."""
    return _checked(operation, arrays.key, options.lasting if options.late else options)


@lru_cache(maxsize=1024)
def _checked(operation: Operation, key: Key, options: Options) -> Problem:
    specs: dict[str, Spec] = {}
    for name, layout in zip(operation.arrays, layouts_of(key), strict=True):
        if layout is not None:
            try:
                specs[name] = layout[0].spec(layout)
            except UnsupportedError as error:
                raise UnsupportedError(f"{operation.name}: {name}: {error}") from None
    return operation.check(operation, specs, options)


def of_attention(operation: Operation, specs: dict[str, Spec], options: Options) -> Problem:
    """The checked problem of an operation that takes what attention takes, or its gradients."""
    return _CallCheck(operation, specs, options).problem()


def check_host(
    function: str, arrays: dict[str, NDArray[Any] | None], options: tuple[Any, ...], terms: tuple[Term, ...]
) -> Plain:
    """Check NumPy arrays by name as a call does, but for dtypes and limits of size; the options, plain.

    For what computes in float64 whatever it is given: the arrays need not agree in dtype, but must hold real numbers,
    and integers where offsets are expected.
    """
    plain = _options.plain(function, *options)
    specs = host_specs(arrays, terms)
    packed, gradient = function.startswith("attention_varlen"), function.endswith("_backward")
    found = AttentionCheck(function, specs, plain, terms, packed=packed, gradient=gradient, limited=False)
    found.inputs()
    if "dout" in specs:
        found.gradients_given()
    return plain  # offsets may hold anything: `cufa.reference` says how they are read


def host_specs(arrays: dict[str, NDArray[Any] | None], terms: tuple[Term, ...]) -> dict[str, Spec]:
    """What stands for arrays of whatever dtypes that hold real numbers, or integers where a call takes those."""
    single = ("sinks", "dlse", "k_descale", "v_descale", *(name for term in terms for name in term.arrays))
    return {name: _host_spec(name, array, single) for name, array in arrays.items() if array is not None}


INTEGERS = (
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_k"),
    *("cache_seqlens", "block_table", "cache_batch_idx", "cache_leftpad"),
)
"""Names of arrays of integers."""

BOOLEANS = ("mask",)
"""Names of arrays of booleans."""


def _host_spec(name: str, array: NDArray[Any], single: Sequence[str]) -> Spec:
    """What stands for an array of whatever dtype; `single` are the names of those that calls take in float32."""
    integers = name in INTEGERS
    if array.dtype.kind == "b" and name in BOOLEANS:
        return Spec("numpy", array.shape, array.strides, "bool", CPU, 0, True)
    wanted = "int32" if integers else "float32" if name in single else "float64"
    # Only the dtypes of ml_dtypes are of kind V and have a name of their own.
    right = array.dtype.kind in "iu" if integers else array.dtype.kind in "iufb" or "float" in array.dtype.name
    return Spec("numpy", array.shape, array.strides, wanted if right else array.dtype.name, CPU, 0, True)


class Check:
    """The checks of arrays and options that operations have in common; its methods refuse.

    `terms` are the score terms that there may be. `packed` is whether sequences lie end to end in q, and `limited`
    whether sizes must be such as the kernels support.

    Attributes
    ----------
    heads : tuple of str
        The names of the arrays that hold queries, keys and values.
    """

    heads: tuple[str, str, str] = ("q", "k", "v")

    def __init__(
        self,
        function: str,
        specs: dict[str, Spec],
        options: tuple[Any, ...],
        terms: tuple[Term, ...],
        *,
        packed: bool,
        limited: bool = True,
    ) -> None:
        self.function = function
        self.varlen = packed
        self.specs = specs
        self.options = options
        self.terms = terms
        self.limited = limited

    def out_shape(self) -> tuple[int, ...]:
        return (*self.specs["q"].shape[:-1], self.specs[self.heads[2]].shape[-1])

    def lse_shape(self) -> tuple[int, ...]:
        *batch, seqlen_q, num_heads_q, _ = self.specs["q"].shape
        return (*batch, num_heads_q, seqlen_q)

    def together(self) -> Sequence[str]:
        """The arrays that must agree in dtype, the first of which is never None."""
        return self.heads

    def lse_dtypes(self) -> tuple[str, ...]:
        return ("float64", "float32") if self.specs[self.together()[0]].dtype == "float64" else ("float32",)

    def batch(self) -> int:
        """How many sequences there are, as far as that is known before offsets are checked."""
        if not self.varlen:
            return self.specs["q"].shape[0]
        offsets = self.specs["cu_seqlens_q"].shape
        return max(0, offsets[0] - 1) if offsets else 0

    def asked(self) -> tuple[Term, ...]:
        """The score terms that the call has."""
        terms = (term for term in self.terms if term.asked(self.specs, self.options))  # type: ignore[arg-type]
        return tuple(term.specialised(self.specs, self.varlen) for term in terms)

    def pack(self, q: Spec) -> int:
        """Packing pays where it leaves at most three quarters of the tiles of 128 rows."""
        heads_k = self.specs[self.heads[1]].shape[-2]
        ratio = q.shape[-2] // heads_k if heads_k else 1
        per_head = "sinks" in self.specs or any(term.per_head for term in self.asked())
        if self.varlen or ratio not in (2, 4, 8, 16, 32, 64) or per_head:
            return 1
        rows = q.shape[1]
        return ratio if -(-rows * ratio // 128) <= 0.75 * ratio * -(-rows // 128) else 1

    def check_given(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.specs:
                self.type_error(f"{name} is None; pass an array.")

    def check_together(self) -> None:
        """One framework, one device, one dtype."""
        together = self.together()
        leading = together[0]
        first = self.specs[leading]
        for name, spec in self.specs.items():
            if spec.framework != first.framework:
                self.type_error(
                    f"{name} is a {spec.framework} array but {leading} is a {first.framework} one; pass arrays of one "
                    "framework."
                )
        for name, spec in self.specs.items():
            if spec.device != first.device:
                self.value_error(
                    f"{name} is on {device_name(spec.device)} but {leading} is on {device_name(first.device)}; pass "
                    "arrays on one device."
                )
        supported = CPU_DTYPES if first.device == CPU else tuple(GPU_DTYPES)
        for name in together:
            spec = self.specs[name]
            if spec.dtype not in CPU_DTYPES:
                self.value_error(f"{name} has dtype {spec.dtype}; pass {listed(supported)}.")
            if spec.dtype != first.dtype:
                self.value_error(
                    f"{name} has dtype {spec.dtype} but {leading} has {first.dtype}; {listed(together, 'and')} must "
                    "agree."
                )
        if first.dtype not in supported:
            self.unsupported(
                f"{first.dtype} on a GPU is not supported; pass {listed(supported)}, or NumPy arrays to compute on the "
                "CPU."
            )
        for name, spec in self.specs.items():
            itemsize = ITEMSIZE.get(spec.dtype, 1)
            if spec.device != CPU and spec.misalignment % itemsize and 0 not in spec.shape:
                self.unsupported(
                    f"{name} begins at an address that is no multiple of its {itemsize}-byte elements, which a GPU "
                    "cannot read; pass a copy of it."
                )

    def check_heads(self) -> None:
        """Heads and their widths, of arrays that have as many dimensions as they should."""
        names = self.heads
        q, k, v = (self.specs[name] for name in names)
        if k.shape[-2] != v.shape[-2]:
            self.value_error(
                f"{names[2]} has {v.shape[-2]} heads but {names[1]} has {k.shape[-2]}; {names[1]} and {names[2]} must "
                "agree."
            )
        if k.shape[-1] != q.shape[-1]:
            self.value_error(
                f"{names[1]} has head_dim {k.shape[-1]} but q has {q.shape[-1]}; q and {names[1]} must agree."
            )
        num_heads_q, num_heads_k = q.shape[-2], k.shape[-2]
        if num_heads_q % num_heads_k if num_heads_k else num_heads_q:
            self.value_error(
                f"q has {num_heads_q} heads and {names[1]} has {num_heads_k}; the heads of q must be a multiple of "
                f"those of {names[1]}."
            )

    def check_sizes(self, *lengths: tuple[str, int]) -> None:
        """Widths of heads, and how many rows arrays have, by name."""
        for name, dim in (("head_dim", self.specs["q"].shape[-1]), ("head_dim_v", self.specs[self.heads[2]].shape[-1])):
            if dim < 1:
                self.value_error(f"{name} is 0; it must be at least 1.")
            if self.limited and dim > MAX_HEAD_DIM:
                self.unsupported(f"{name} {dim} is not supported; it may be 1 to {MAX_HEAD_DIM}.")
        for name, length in lengths:
            if self.limited and length > MAX_SEQLEN:
                self.unsupported(f"{name} has {length} rows; sequences of at most {MAX_SEQLEN} are supported.")

    def check_terms(self) -> None:
        """Arrays of score terms, and sinks."""
        for term in self.terms:
            term.check(self)
        if "sinks" in self.specs:
            self.check_sinks(self.specs["sinks"], self.specs["q"])

    def check_sinks(self, sinks: Spec, q: Spec) -> None:
        num_heads_q = q.shape[-2]
        self.check_float32("sinks", sinks)
        if sinks.shape != (num_heads_q,):
            self.value_error(f"sinks has shape {sinks.shape}; ({num_heads_q},), that is (num_heads_q,), is expected.")

    def check_float32(self, name: str, spec: Spec) -> None:
        if spec.dtype != "float32" and not (spec.device == CPU and spec.dtype == "float64"):
            self.value_error(f"{name} has dtype {spec.dtype}; pass float32.")

    def check_int32(self, name: str, expected: str, rank: int = 1, least: int = 0) -> Spec | None:
        """An array of integers, if it is given: its dtype, how many dimensions it has and its least extent."""
        spec = self.specs.get(name)
        if spec is None:
            return None
        if spec.dtype != "int32":
            self.value_error(f"{name} has dtype {spec.dtype}; pass int32.")
        if len(spec.shape) != rank or spec.shape[0] < least:
            self.value_error(f"{name} has shape {spec.shape}; {expected} is expected.")
        return spec

    def check_like(self, name: str, shape: tuple[int, ...], *dtypes: str) -> None:
        """An array that is given, whose shape and dtype follow from others."""
        spec = self.specs[name]
        if spec.shape != shape:
            self.value_error(f"{name} has shape {spec.shape}; {shape} is expected.")
        if spec.dtype not in dtypes:
            self.value_error(f"{name} has dtype {spec.dtype}; pass {' or '.join(dtypes)}.")

    def check_written(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        spec = self.specs.get(name)
        if spec is None:
            return
        if spec.shape != shape:
            self.value_error(f"{name} has shape {spec.shape}; {shape} is expected.")
        if spec.dtype != dtype:
            self.value_error(f"{name} has dtype {spec.dtype} but {self.together()[0]} has {dtype}; they must agree.")
        if spec.copied:
            self.value_error(
                f"{name} exports a copy of its memory, so that what is written there would be lost; pass an array that "
                "exports its own."
            )
        if not spec.writable:
            self.value_error(f"{name} is read-only; pass an array that can be written.")
        shared = _overlap.overlaps_itself(_overlap.extent_of(spec, ITEMSIZE[dtype]))
        if shared is not False:
            so = "by which" if shared else "of which it is too hard to say whether"
            self.value_error(f"{name} has strides {spec.strides}, {so} its elements share memory; pass one without.")

    def value_error(self, text: str) -> NoReturn:
        raise ArgumentError(f"{self.function}: {text}")

    def type_error(self, text: str) -> NoReturn:
        raise TypeError(f"{self.function}: {text}")

    def unsupported(self, text: str) -> NoReturn:
        raise UnsupportedError(f"{self.function}: {text}")


class AttentionCheck(Check):
    """The checks of what attention takes, and its gradients, in the order in which a user would want to hear of them.

    `gradient` is whether there are arrays for the gradients; the other arguments are those of `Check`.
    """

    def __init__(self, *arguments: Any, gradient: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gradient = gradient

    def inputs(self) -> tuple[int | None, int | None, float, float]:
        """Check what is read by the forward; the options' values are those of `_options.check`."""
        self.check_given(("q", "k", "v", *(("cu_seqlens_q", "cu_seqlens_k") if self.varlen else ())))
        q, k, v = (self.specs[name] for name in "qkv")
        self.check_together()
        self.check_shapes(q, k, v)
        values = _options.check(self.function, self.options, q.shape[-1])
        self.check_terms()
        if self.varlen:
            self.check_offsets_arrays()
        return values

    def gradients_given(self) -> None:
        """Check the gradients by the results of the forward."""
        self.check_belonging("dout", self.out_shape(), self.specs["q"].dtype)
        if "dlse" in self.specs:
            self.check_belonging("dlse", self.lse_shape(), *self.lse_dtypes())

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
        self.check_heads()
        if self.gradient and k.shape[-2] and not q.shape[-2]:
            self.value_error(f"q has no heads but k has {k.shape[-2]}; there is nothing to differentiate.")
        self.check_sizes(("q", q.shape[-3]), ("k", k.shape[-3]))

    def check_offsets_arrays(self) -> None:
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            self.check_int32(name, "(batch + 1,)", least=1)
        seqused = self.check_int32("seqused_k", "(batch,)")
        rows = self.specs["cu_seqlens_q"].shape[0]
        if self.specs["cu_seqlens_k"].shape[0] != rows:
            self.value_error(
                f"cu_seqlens_k has {self.specs['cu_seqlens_k'].shape[0]} entries but cu_seqlens_q has {rows}; both "
                "need one more than there are sequences."
            )
        if seqused is not None and seqused.shape[0] != rows - 1:
            self.value_error(
                f"seqused_k has {seqused.shape[0]} entries; one for each of the {rows - 1} sequences is expected."
            )

    def check_belonging(self, name: str, shape: tuple[int, ...], *dtypes: str) -> None:
        """A result of the forward, or the gradient by one."""
        if name not in self.specs:
            self.type_error(f"{name} is None; pass what belongs to the forward's results.")
        self.check_like(name, shape, *dtypes)


class _CallCheck(AttentionCheck):
    """The checks of a call of an operation, and what follows from them."""

    options: Options

    def __init__(self, operation: Operation, specs: dict[str, Spec], options: Options) -> None:
        packed, gradient = operation.packed, operation.gradient
        known = all(type(extent) is int for spec in specs.values() for extent in spec.shape)
        # Symbols are not bounded: a program that is traced with them would be no good for all that they stand for.
        super().__init__(
            operation.name, specs, options, operation.terms, packed=packed, gradient=gradient, limited=known
        )
        self.operation = operation

    def problem(self) -> Problem:
        self.operation.owned.check(self.function, self.options.more)
        left, right, softmax_scale, softcap = self.inputs()
        q, k, v = (self.specs[name] for name in "qkv")
        batch = self.specs["cu_seqlens_q"].shape[0] - 1 if self.varlen else q.shape[0]
        seqlen_q, num_heads_q, head_dim = q.shape[-3:]
        if self.gradient:
            self.check_belonging("out", self.out_shape(), q.dtype)
            self.check_belonging("lse", self.lse_shape(), *self.lse_dtypes())
            self.gradients_given()
            for name in "qkv":
                self.check_written(f"d{name}", self.specs[name].shape, q.dtype)
        else:
            self.check_written("out", self.out_shape(), q.dtype)
        if self.options.deterministic and q.device != CPU:
            self.check_ordered()
        if left is None and right == 0 and seqlen_q == 1 and not self.varlen:
            right = None  # the only query is the last one, which sees every key
        return Problem(
            self.operation,
            self.options,
            None if q.device == CPU else self.static(q, v, left, right),
            q.device,
            q.dtype,
            batch,
            seqlen_q,
            k.shape[-3],
            num_heads_q,
            k.shape[-2],
            head_dim,
            v.shape[-1],
            self.specs,
            softmax_scale,
            softcap,
            left,
            right,
            self.out_shape(),
            self.lse_shape(),
        )

    def asked(self) -> tuple[Term, ...]:
        terms = super().asked()
        return tuple(term.in_order() for term in terms) if self.options.deterministic else terms

    def static(self, q: Spec, v: Spec, left: int | None, right: int | None) -> Static:
        itemsize = ITEMSIZE[q.dtype]
        backward = self.gradient
        row_bytes = math.gcd(v.shape[-1], q.shape[-1] if backward else 0) * itemsize
        # Lengths of packed sequences are not known; and no row's result may depend on its neighbours'.
        mask = mask_kind(left, right)
        short = mask == "causal" and (self.varlen or q.shape[1] < LONG)
        few_keys = not self.varlen and self.specs["k"].shape[1] <= FEW_KEYS
        stores = [widest_copy(self.specs[name], itemsize) for name in self.operation.written if name in self.specs]
        short_rows, short_keys = self.short_tile()
        few_rows = 0 if backward or short_rows else self.few_rows(q)
        heads_k, keys = self.specs["k"].shape[-2], self.specs["k"].shape[-3]
        in_one_tile = few_rows > 0 and q.shape[-3] * q.shape[-2] <= few_rows * heads_k
        key_bytes = (q.shape[-1] + v.shape[-1]) * itemsize
        listed = any(term.blocks is not None for term in self.asked())
        few_rows = 0 if listed else few_rows
        return Static(
            element=GPU_DTYPES[q.dtype],
            head_dim=q.shape[-1],
            head_dim_v=v.shape[-1],
            mask=mask,
            terms=self.asked(),
            sinks="sinks" in self.specs,
            varlen=self.varlen,
            **access(self.operation, self.specs),
            store_bytes=max(itemsize, min([*stores, math.gcd(row_bytes, ALIGNMENT)])),
            pack=1 if backward else self.pack(q),
            short=not backward and (short or few_keys or listed),
            many=not backward and self.varlen and self.specs["cu_seqlens_q"].shape[0] > MANY,
            chains=self.longest_sum(q, backward, left, right) > CHAIN_ROWS,
            empty_rows=not backward and not self.varlen and (listed or self.has_empty_rows(right)),
            short_rows=short_rows,
            short_keys=short_keys,
            few_rows=few_rows,
            clusters=not listed and in_one_tile and clusters_pay(q.shape[0] * heads_k, keys * key_bytes),
            deterministic=self.options.deterministic,
            average_rows=self.average_rows(q) if backward else LONG_ROWS,
            many_tiles=not backward and self.varlen and self.has_many_tiles(q),
        )

    def check_ordered(self) -> None:
        for term in self.asked():
            if term.has_gradient and not term.ordered:
                self.unsupported(
                    f"the gradients of {term.name} add up in no fixed order on a GPU, and so are not the same bits in "
                    "every run; pass deterministic=False."
                )
            term.check_order(self)

    def has_empty_rows(self, right: int | None) -> bool:
        """Whether the first row of a dense q, which sees the least of the first keys, sees none."""
        seqlen_q, seqlen_k = self.specs["q"].shape[-3], self.specs["k"].shape[-3]
        return seqlen_k == 0 or (right is not None and seqlen_k - seqlen_q + right < 0)

    def short_tile(self) -> tuple[int, int]:
        """Rows of q and of k that a tile needs to hold a short sequence; 0 and 0 if sequences are longer."""
        q, k = self.specs["q"].shape, self.specs["k"].shape
        batch, rows, keys = q[0], q[-3], k[-3]
        if self.varlen:
            batch = self.specs["cu_seqlens_q"].shape[0] - 1
            rows, keys = rows // max(1, batch), keys // max(1, batch)
        if rows > SHORT_ROWS[-1] or keys > SHORT_KEYS[-1] or batch * q[-2] > MAX_SHORT_SEQUENCES:
            return 0, 0
        return min(each for each in SHORT_ROWS if each >= rows), min(each for each in SHORT_KEYS if each >= keys)

    def few_rows(self, q: Spec) -> int:
        """Rows of a tile for those of all heads that share a key head, if they or their tiles are few and keys many."""
        keys, heads_k = self.specs["k"].shape[-3:-1]
        if self.varlen or heads_k == 0:
            return 0
        batch, queries = q.shape[:2]
        rows = queries * (q.shape[-2] // heads_k)
        if rows > FEW_ROWS[-1]:
            tiles = batch * heads_k * -(-rows // FEW_TILE_ROWS)
            return FEW_ROWS[-1] if tiles <= FEW_TILES and has_many_keys(queries, keys) else 0
        if rows == 0 or keys < KEYS_PER_ROW * rows or keys <= SHORT_KEYS[-1]:
            return 0
        return min(each for each in FEW_ROWS if each >= rows)

    def average_rows(self, q: Spec) -> int:
        """Rows of q that an average packed sequence has, as far as they matter."""
        rows, batch = q.shape[0], self.specs["cu_seqlens_q"].shape[0] - 1 if self.varlen else 0
        if not self.varlen or rows >= LONG_ROWS * batch:
            return LONG_ROWS
        return (1 << (rows // batch).bit_length()) >> 1

    def has_many_tiles(self, q: Spec) -> bool:
        """Whether packed sequences have so many tiles, and these so many keys, that blocks take them as they come."""
        least = TAKEN_ROWS * (self.specs["cu_seqlens_q"].shape[0] - 1)
        return q.shape[0] * q.shape[1] >= MANY_ROWS and min(q.shape[0], self.specs["k"].shape[0]) >= least

    def longest_sum(self, q: Spec, backward: bool, left: int | None, right: int | None) -> int:
        """Rows over which out is summed, or dq, and dk and dv: all that there are, or those of a window or a list."""
        k = self.specs["k"]
        seqlen_q, seqlen_k = q.shape[-3], k.shape[-3]
        if left is not None and right is not None:
            seqlen_q, seqlen_k = (min(seqlen, left + right + 1) for seqlen in (seqlen_q, seqlen_k))
        for term in self.asked():
            if term.spans is not None:
                seqlen_k, seqlen_q = min(seqlen_k, term.spans[0]), min(seqlen_q, term.spans[1])
        if not backward:
            return seqlen_k
        return max(seqlen_k, seqlen_q * (q.shape[-2] // max(1, k.shape[-2])))


def access(operation: Operation, specs: dict[str, Spec]) -> dict[str, Any]:
    """The members of Static that say how the arrays that are read can be."""
    tiles = [(specs[name], ITEMSIZE[specs[name].dtype]) for name in operation.tiles]
    out_itemsize = ITEMSIZE[specs["q"].dtype]
    return {
        "copy_bytes": min((widest_copy(*tile) for tile in tiles), default=ALIGNMENT),
        "tma": all(has_tensor_map(*tile) for tile in tiles),
        "out_copy_bytes": widest_copy(specs["out"], out_itemsize) if operation.gradient else ALIGNMENT,
    }


def clusters_pay(items: int, item_bytes: int) -> bool:
    """Whether thread block clusters, one for each tile of few rows, are faster than all SMs sharing all tiles' keys."""
    if not 0 < items <= CLUSTER_ITEMS:
        return False
    if items < CLUSTERS_THAT_FILL:
        return item_bytes <= CLUSTER_BYTES
    return item_bytes <= CLUSTER_SHARE * min(MAX_CLUSTER, 1 << (CLUSTER_BLOCKS // items).bit_length() - 1)


def has_many_keys(queries: int, keys: int) -> bool:
    """Whether keys are so many that all SMs should share those of tiles that are few."""
    return keys >= max(MANY_KEYS, KEYS_PER_QUERY * queries)


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
    if 0 in spec.shape:
        return True
    steps = (stride for extent, stride in zip(spec.shape[:-1], spec.strides[:-1], strict=True) if extent > 1)
    return widest_copy(spec, itemsize) == ALIGNMENT and all(0 <= step * itemsize < MAX_MAP_STRIDE for step in steps)


def device_name(device: int) -> str:
    """How messages name a device."""
    return "the CPU" if device == CPU else f"cuda:{device}"


def listed(words: Iterable[str], last: str = "or") -> str:
    """Words joined as in a sentence."""
    *others, final = words
    return f"{', '.join(others)} {last} {final}" if others else final


def _check_overlap(operation: Operation, arrays: Arrays, problem: Problem) -> None:
    """Refuse a result that shares memory with another array: it is written while those are still read."""
    memory = problem.memo.get("memory")
    if memory is None:
        memory = problem.memo["memory"] = _Memory(arrays.layouts, problem.written_indices)
    pointers = arrays.pointers
    for written, index, low, high in memory.pairs:
        if low < pointers[written] - pointers[index] < high:
            shared = memory.shared(written, index, pointers[written] - pointers[index])
            if shared is not False:
                name, other = operation.arrays[written], operation.arrays[index]
                if problem.apart_by_pages(name, other, pointers[written] - pointers[index]):
                    continue
                overlaps = "overlaps" if shared else "lies between the elements of, and may overlap,"
                raise ArgumentError(
                    f"{operation.name}: {name} {overlaps} {other}; pass one that shares no memory with the others."
                )


class _Memory:
    """Where the elements of a problem's arrays lie.

    Attributes
    ----------
    pairs : list of (int, int, int, int)
        Places of a written array and of another one that is given, each two of them once; and the bounds of the
        distances from the other to it, in bytes, between which their ranges of bytes meet.
    """

    MAX_KNOWN = 64

    def __init__(self, layouts: tuple[Layout | None, ...], written: tuple[int, ...]) -> None:
        specs = [None if layout is None else layout[0].spec(layout) for layout in layouts]
        self._extents = [spec and _overlap.extent_of(spec, ITEMSIZE[spec.dtype]) for spec in specs]
        spans = {index: extent.span() for index, extent in enumerate(self._extents) if extent is not None}
        self.pairs = [
            (one, other, spans[other][0] - spans[one][1], spans[other][1] - spans[one][0])
            for place, one in enumerate(written)
            for other in spans
            if other not in written[: place + 1]
        ]
        self._known: dict[tuple[int, int, int], bool | None] = {}

    def shared(self, a: int, b: int, distance: int) -> bool | None:
        """Whether arrays a and b, that many bytes behind it, share memory; None if that is too hard to say."""
        key = a, b, distance
        if key not in self._known:
            if len(self._known) >= self.MAX_KNOWN:
                self._known.clear()
            first, second = self._extents[a], self._extents[b]
            self._known[key] = None if first is None or second is None else _overlap.overlap(first, second, distance)
        return self._known[key]


def check_offsets(problem: Problem, arrays: Arrays) -> None:
    """Check the values of cu_seqlens and seqused_k.

    Where they are not checked, on a GPU, the kernel reads the running maximum of any offsets, clamped to the packed
    arrays.
    """
    operation = problem.operation
    function, names = operation.name, ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    cu_seqlens_q, cu_seqlens_k, seqused_k = (arrays.numpy(operation.arrays.index(name)) for name in names)
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    check_offsets_of(function, "q", problem.seqlen_q, cu_seqlens_q)
    check_offsets_of(function, "k", problem.seqlen_k, cu_seqlens_k)
    if seqused_k is not None:
        lengths = np.diff(np.maximum.accumulate(cu_seqlens_k))
        if ((seqused_k < 0) | (seqused_k > lengths)).any():
            raise ArgumentError(f"{function}: seqused_k must lie between 0 and the lengths in cu_seqlens_k.")
    for term in problem.terms:
        live = np.diff(np.maximum.accumulate(cu_seqlens_k)) if seqused_k is None else seqused_k
        longest_q = int(np.diff(np.maximum.accumulate(cu_seqlens_q)).max(initial=0))
        term.check_lengths(problem, longest_q, int(live.max(initial=0)))


def check_offsets_of(function: str, name: str, rows: int, offsets: NDArray[Any], argument: str | None = None) -> None:
    """Check the values of the offsets into an array of so many rows; `argument` is what they are called."""
    what = f"{function}: {argument or f'cu_seqlens_{name}'}"
    for value in (offsets.min(), offsets.max()):
        if not 0 <= value <= rows:
            raise ArgumentError(f"{what} holds {value}; offsets must lie between 0 and the {rows} rows of {name}.")
    _check_order(what, offsets)


def _check_order(what: str, offsets: NDArray[Any]) -> None:
    """Offsets begin with 0 and do not decrease, but for zeros behind the last: programs of fixed shapes pad so."""
    if offsets[0] != 0:
        raise ArgumentError(f"{what} starts at {offsets[0]}; it must start at 0.")
    last = int(np.argmax(offsets))
    behind = offsets[last:]
    if (offsets[1 : last + 1] < offsets[:last]).any() or ((behind != 0) & (behind != offsets[last])).any():
        raise ArgumentError(f"{what} decreases; offsets must not, but for zeros behind the last.")

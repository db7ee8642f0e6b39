"""Calls with key-value caches: their checks, the facts that follow, and what a plan of one was made for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from . import options as _options
from . import overlap as _overlap
from . import problem as _problem
from .arrays import ALIGNMENT, CPU, Arrays, Spec
from .options import Options
from .overlap import Extent
from .problem import (
    CACHE_DTYPES,
    CHAIN_ROWS,
    FEW_ROWS,
    FULL_GPU_ROWS,
    FULL_ROWS,
    GPU_DTYPES,
    ITEMSIZE,
    LONG,
    MANY,
    MAX_PAGE_ROWS,
    Check,
    Problem,
    Static,
)

if TYPE_CHECKING:
    from .._operations.operation import Operation
    from .._terms.term import Term

CACHES, DESCALES = ("k_cache", "v_cache"), ("k_descale", "v_descale")

MAX_SPLITS = 256
"""Parts into which a sequence's keys can be divided."""


class PlanFacts(NamedTuple):
    """What a plan was made for. A call that it is given to must be the same in all of it."""

    batch: int
    seqlen_q: int
    varlen: bool
    num_heads_q: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int
    dtype: str
    cache_dtype: str
    seqlen_k: int
    page_size: int
    seqlen_new: int
    window_left: int | None
    window_right: int | None
    leftpad: bool
    num_splits: int

    @classmethod
    def of(cls, problem: KVCacheProblem) -> PlanFacts:
        """Those of a call."""
        return cls(*(getattr(problem, name) for name in cls._fields))


_options.IMMUTABLE.add(PlanFacts)


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """How the work of calls with caches is divided over a GPU: what `cufa.decode_plan` gives.

    Attributes
    ----------
    memory : int32 array, (size,)
        On the device of the caches.
    facts : PlanFacts
        Of the calls that it serves.

    See Also
    --------
    cufa.decode_plan : Which has examples.
    """

    memory: Any
    facts: PlanFacts
    _make: Callable[..., object] = field(repr=False)

    def update(self, cache_seqlens: Any = None, *, cache_leftpad: Any = None, cu_seqlens_q: Any = None) -> None:
        """Make the plan again in its memory, as the lengths are now: for the next step, or within a CUDA graph.

        Parameters
        ----------
        cache_seqlens, cache_leftpad, cu_seqlens_q : int32 array, optional
            Instead of those that it was made of, and of the same shape; by default those, whatever they now hold.

        Raises
        ------
        TypeError, ValueError
            As `cufa.decode_plan`, and if the new arrays make it a plan for other calls.
        """
        given = {"cache_seqlens": cache_seqlens, "cache_leftpad": cache_leftpad, "cu_seqlens_q": cu_seqlens_q}
        self._make({name: array for name, array in given.items() if array is not None}, self)


def parts_of(function: str, plan: DecodePlan | None) -> tuple[Any, PlanFacts | None]:
    """The memory of a plan that a call is given, and what it was made for."""
    if plan is None:
        return None, None
    if not isinstance(plan, DecodePlan):
        raise TypeError(f"{function}: plan is a {type(plan).__name__}; pass what decode_plan gives, or None.")
    return plan.memory, plan.facts


def facts_of(function: str, name: str, given: Any) -> PlanFacts | None:
    """What a plan was made for, as a plain value."""
    if given is not None and not isinstance(given, PlanFacts):
        raise TypeError(f"{function}: {name} is a {type(given).__name__}; pass what decode_plan gives, or None.")
    return given


@dataclass(frozen=True, eq=False, kw_only=True)
class KVCacheProblem(Problem):
    """A checked call with caches. `seqlen_k` is the capacity: the keys for which a sequence has room.

    Attributes
    ----------
    num_caches : int
        Caches, or pages, that there are.
    page_size : int
        Rows of a page; 0 where caches are contiguous.
    seqlen_new : int
        New rows of k and v of a sequence; of packed arrays, all of them. 0 if there are none.
    leftpad : bool
        Whether the first keys of caches may be none.
    rotary_dim : int
        Columns that are rotated; 0 if none are.
    rotary_interleaved : bool
        Whether pairs of columns lie side by side; else halfway apart.
    num_splits : int
        Parts of each sequence's keys; 0 where the work is divided evenly over the GPU.
    """

    num_caches: int
    page_size: int
    seqlen_new: int
    leftpad: bool
    rotary_dim: int
    rotary_interleaved: bool
    num_splits: int

    @property
    def changes(self) -> bool:
        return "k" in self.specs

    def apart_by_pages(self, written: str, other: str, distance: int) -> bool:
        return {written, other} == {"k_cache", "v_cache"} and self.pages_between(distance) != 0

    def pages_between(self, distance: int) -> int:
        """How many pages so many bytes are where keys and values take turns in one pool; 0 if they do not.

        Some engines lay pages of keys, values and layers in turn, and give the whole pool from the first page of each
        on, so that all but a page of one array lies in the other too. Tables then name every so-manieth page.
        """
        pages = [_overlap.extent_of(self.specs[name], ITEMSIZE[self.cache_dtype]) for name in ("k_cache", "v_cache")]
        steps = {page.strides[0] for page in pages}
        step = steps.pop()
        if not self.page_size or steps or step <= 0 or distance % step:
            return 0
        within = (Extent(page.shape[1:], page.strides[1:], page.itemsize).span() for page in pages)
        return distance // step if all(0 <= first <= last <= step for first, last in within) else 0

    @property
    def cache_dtype(self) -> str:
        """That of keys and values."""
        return self.specs["k_cache"].dtype

    @property
    def rotary_advances(self) -> bool:
        """Whether row i of q is rotated for position cache_seqlens + i; else all rows are for cache_seqlens."""
        return self.window_left is not None or self.window_right is not None


def cache_dtype(function: str, name: str, given: Any) -> str | None:
    """What caches hold, as a plain value."""
    if given is not None and not isinstance(given, str):
        raise TypeError(f"{function}: {name} is a {type(given).__name__}; pass the name of a dtype, or None.")
    return None if given is None else str(given)


def of_kvcache(operation: Operation, specs: dict[str, Spec], options: Options) -> Problem:
    """The checked problem of attention with caches."""
    operation.owned.check(operation.name, options.more)
    return _KVCacheCheck(operation.name, specs, options, operation.terms).problem(operation)


def check_host(
    function: str, arrays: dict[str, NDArray[Any] | None], options: dict[str, Any], terms: tuple[Term, ...]
) -> Options:
    """Check NumPy arrays by name as a call does, but for values, dtypes and limits of size; the options, plain."""
    asked = (options[name] for name in ("causal", "window_size", "softmax_scale", "softcap"))
    interleaved = _options.flag(function, "rotary_interleaved", options["rotary_interleaved"])
    more = (("rotary_interleaved", interleaved), ("num_splits", 0), ("plan", None), ("cache_dtype", None))
    plain = Options(*_options.plain(function, *asked), False, False, more)
    specs = _problem.host_specs(arrays, terms)
    for name in CACHES:
        array = arrays[name]
        if array is not None and array.dtype.name in CACHE_DTYPES:
            specs[name] = specs[name]._replace(dtype=array.dtype.name)
    _KVCacheCheck(function, specs, plain, terms, limited=False).facts()
    return plain


class _Facts(NamedTuple):
    """What follows from the arrays and options of a call: members of `KVCacheProblem`."""

    seqlen_k: int
    softmax_scale: float
    softcap: float
    window_left: int | None
    window_right: int | None
    page_size: int
    seqlen_new: int
    rotary_dim: int
    num_splits: int


class Slots(NamedTuple):
    """How rows of pages are counted: row r of page p has slot p · page_slots + r · row_slots, in k and v alike.

    Attributes
    ----------
    page_slots, row_slots : int
    k_slot_bytes, v_slot_bytes : int
        How far apart slots are.
    """

    page_slots: int
    row_slots: int
    k_slot_bytes: int
    v_slot_bytes: int


NO_SLOTS = Slots(0, 0, 0, 0)


def slots_of(specs: Mapping[str, Spec]) -> Slots:
    """The slots of pages; `NO_SLOTS` where k and v have none in common, or not all that is counted has 32 bits."""
    k, v = (_steps(specs[name]) for name in ("k_cache", "v_cache"))
    k_bytes, v_bytes = (math.gcd(*steps) or 1 for steps in (k, v))
    page, row = k[0] // k_bytes, k[1] // k_bytes
    if v != (page * v_bytes, row * v_bytes):
        return NO_SLOTS
    pages, rows = specs["k_cache"].shape[:2]
    if max(abs(page) * max(1, pages) + abs(row) * rows, k_bytes, v_bytes) >= 1 << 31:
        return NO_SLOTS
    return Slots(page, row, k_bytes, v_bytes)


def _steps(spec: Spec) -> tuple[int, ...]:
    """Bytes from page to page, and from row to row of a page; 0 where there is but one."""
    extents, strides = spec.shape[:2], spec.strides[:2]
    return tuple(
        stride * ITEMSIZE[spec.dtype] if extent > 1 else 0 for extent, stride in zip(extents, strides, strict=True)
    )


class _KVCacheCheck(Check):
    """The checks of a call, in the order in which a user would want to hear of them, and what follows from them."""

    options: Options
    heads = ("q", "k_cache", "v_cache")

    def __init__(
        self, function: str, specs: dict[str, Spec], options: Options, terms: tuple[Term, ...], *, limited: bool = True
    ) -> None:
        super().__init__(function, dict(specs), options, terms, packed="cu_seqlens_q" in specs, limited=limited)

    def together(self) -> Sequence[str]:
        return ("q",) if self.specs["k_cache"].dtype in CACHE_DTYPES else self.heads

    def facts(self) -> _Facts:
        self.check_given(self.heads)
        self.check_cache_dtype()
        self.check_together()
        q, k_cache, v_cache = (self.specs[name] for name in self.heads)
        self.check_queries(q)
        page_size, capacity = self.check_caches(k_cache, v_cache)
        self.check_heads()
        for name in DESCALES:
            self.check_descale(name)
        self.check_sizes(("q", q.shape[-3]), ("a cache", capacity))
        left, right, softmax_scale, softcap = _options.check(self.function, self.options, q.shape[-1])
        self.check_terms()
        for name in ("cache_seqlens", "cache_leftpad"):
            self.check_per_sequence(name)
        seqlen_new = self.check_new(q)
        rotary_dim = self.check_rotary(q)
        self.check_written("out", self.out_shape(), q.dtype)
        if left is None and right == 0 and q.shape[-3] == 1 and not self.varlen:
            right = None  # the only query is the last one, which sees every key
        return _Facts(
            capacity, softmax_scale, softcap, left, right, page_size, seqlen_new, rotary_dim, self.check_num_splits()
        )

    def problem(self, operation: Operation) -> KVCacheProblem:
        facts = self.facts()
        q, k_cache, v_cache = (self.specs[name] for name in self.heads)
        found = KVCacheProblem(
            **facts._asdict(),
            operation=operation,
            options=self.options,
            static=None if q.device == CPU else self.static(operation, facts),
            device=q.device,
            dtype=q.dtype,
            batch=self.batch(),
            seqlen_q=q.shape[-3],
            num_heads_q=q.shape[-2],
            num_heads_k=k_cache.shape[-2],
            head_dim=q.shape[-1],
            head_dim_v=v_cache.shape[-1],
            specs=self.specs,
            out_shape=self.out_shape(),
            lse_shape=self.lse_shape(),
            num_caches=k_cache.shape[0],
            leftpad="cache_leftpad" in self.specs,
            rotary_interleaved=self.options.own("rotary_interleaved"),
        )
        self.check_plan(found)
        return found

    def check_cache_dtype(self) -> None:
        """The dtype of caches; those of bytes get that which the option says."""
        named, known = self.options.own("cache_dtype"), _problem.listed(CACHE_DTYPES)
        if named is not None and named not in CACHE_DTYPES:
            self.value_error(f"cache_dtype is {named!r}; pass {known}, or None where arrays have their own dtype.")
        for name in CACHES:
            spec = self.specs[name]
            if named is not None and spec.dtype not in ("uint8", named):
                self.value_error(f"cache_dtype is given, and {name} has dtype {spec.dtype}; it is for caches of uint8.")
            if named is None and spec.dtype == "uint8":
                self.value_error(f"{name} has dtype uint8; say by cache_dtype what the bytes are: {known}.")
            self.specs[name] = spec._replace(dtype=named or spec.dtype)
        dtypes = [self.specs[name].dtype for name in CACHES]
        if dtypes[0] != dtypes[1] and not CACHE_DTYPES.keys().isdisjoint(dtypes):
            self.value_error(f"v_cache has dtype {dtypes[1]} but k_cache has {dtypes[0]}; they must agree.")
        q = self.specs["q"]
        if q.dtype == "float32" and q.device != CPU and dtypes[0] in CACHE_DTYPES:
            self.unsupported(f"q has dtype float32 and k_cache {dtypes[0]}; pass q of float16 or bfloat16.")

    def check_descale(self, name: str) -> None:
        spec = self.specs.get(name)
        if spec is None:
            return
        heads_k, dtype = self.specs["k_cache"].shape[-2], self.specs["k_cache"].dtype
        if dtype not in CACHE_DTYPES:
            self.value_error(
                f"{name} is given, but k_cache has dtype {dtype}; only caches of {_problem.listed(CACHE_DTYPES)} are "
                "scaled."
            )
        self.check_float32(name, spec)
        if spec.shape not in ((), (heads_k,), (self.batch(), heads_k)):
            self.value_error(
                f"{name} has shape {spec.shape}; (), ({heads_k},) or ({self.batch()}, {heads_k}), that is (batch, "
                "num_heads_k), is expected."
            )

    def check_queries(self, q: Spec) -> None:
        rank, meaning = 4, "(batch, seqlen_q, num_heads_q, head_dim)"
        if self.varlen:
            rank, meaning = 3, "(total_q, num_heads_q, head_dim), as cu_seqlens_q is given,"
        if len(q.shape) != rank:
            self.value_error(f"q has shape {q.shape}; {rank} dimensions {meaning} are expected.")
        self.check_int32("cu_seqlens_q", "(batch + 1,)", least=1)

    def check_caches(self, k_cache: Spec, v_cache: Spec) -> tuple[int, int]:
        """The rows of a page, 0 if there are none, and those for which a sequence has room."""
        table = self.check_int32("block_table", "(batch, max_pages)", rank=2)
        meaning = "num_caches, capacity" if table is None else "num_pages, page_size"
        for name in ("k_cache", "v_cache"):
            shape = self.specs[name].shape
            if len(shape) != 4:
                self.value_error(
                    f"{name} has shape {shape}; 4 dimensions ({meaning}, num_heads_k, head_dim) are expected."
                )
        if k_cache.shape[:2] != v_cache.shape[:2]:
            self.value_error(
                f"k_cache and v_cache have shapes {k_cache.shape} and {v_cache.shape}; they must agree in {meaning}."
            )
        batch, count, rows = self.batch(), *k_cache.shape[:2]
        if table is None:
            self.check_per_sequence("cache_batch_idx")
            if "cache_batch_idx" not in self.specs and count != batch:
                self.value_error(
                    f"k_cache has {count} caches but there are {batch} sequences; pass as many, or cache_batch_idx."
                )
            self.check_any("caches", count, batch * rows)
            return 0, rows
        if "cache_batch_idx" in self.specs:
            self.value_error(
                "cache_batch_idx is given, but rows of block_table say where caches are; pass one of them."
            )
        if table.shape[0] != batch:
            self.value_error(
                f"block_table has {table.shape[0]} rows; one for each of the {batch} sequences is expected."
            )
        if rows < 1:
            self.value_error(f"k_cache has shape {k_cache.shape}, that is pages of no rows; a page must have some.")
        self.check_any("pages", count, math.prod(table.shape))
        return rows, table.shape[1] * rows

    def check_any(self, what: str, count: int, wanted: int) -> None:
        """Whatever numbers are read as needs a cache, or a page, to be read from."""
        if wanted and not count:
            self.value_error(f"k_cache has no {what}, but sequences have room for keys; pass at least one.")

    def check_per_sequence(self, name: str) -> None:
        spec, batch = self.check_int32(name, "(batch,)"), self.batch()
        if spec is not None and spec.shape[0] != batch:
            self.value_error(f"{name} has {spec.shape[0]} entries; one for each of the {batch} sequences is expected.")

    def check_new(self, q: Spec) -> int:
        """Rows of k that are appended: of each sequence, or of all packed ones."""
        given = [name for name in ("k", "v") if name in self.specs]
        if not given:
            return 0
        if len(given) == 1:
            self.type_error(f"{given[0]} is given alone; new rows have keys and values, so pass both k and v.")
        if "cache_seqlens" not in self.specs:
            self.type_error("k and v are given, but without cache_seqlens caches are full; pass it.")
        for name in given:
            spec, cache = self.specs[name], self.specs[f"{name}_cache"]
            tail = cache.shape[2:]
            meaning = (
                "(total_q, num_heads_k, head_dim), packed like q,"
                if self.varlen
                else ("(batch, seqlen_new, num_heads_k, head_dim)")
            )
            if len(spec.shape) != len(q.shape) or spec.shape[0] != q.shape[0] or spec.shape[-2:] != tail:
                self.value_error(
                    f"{name} has shape {spec.shape}, and q {q.shape} and {name}_cache {cache.shape}; {meaning} that "
                    "agrees with them is expected."
                )
            if cache.dtype in CACHE_DTYPES and spec.dtype != q.dtype:
                self.value_error(f"{name} has dtype {spec.dtype} but q has {q.dtype}; they must agree.")
            if cache.dtype not in CACHE_DTYPES and spec.dtype != cache.dtype:
                self.value_error(f"{name} has dtype {spec.dtype} but {name}_cache has {cache.dtype}; they must agree.")
            self.check_written(f"{name}_cache", cache.shape, cache.dtype)
        k, v = self.specs["k"], self.specs["v"]
        if k.shape[-3] != v.shape[-3]:
            self.value_error(f"v has {v.shape[-3]} rows but k has {k.shape[-3]}; k and v must agree.")
        self.check_sizes(("k", k.shape[-3]))
        return k.shape[-3]

    def check_rotary(self, q: Spec) -> int:
        """Columns that are rotated."""
        given = [name for name in ("rotary_cos", "rotary_sin") if name in self.specs]
        if not given:
            return 0
        if len(given) == 1:
            self.type_error(f"{given[0]} is given alone; pass both rotary_cos and rotary_sin.")
        if "k" not in self.specs:
            self.type_error("rotary_cos is given, but no k; keys are rotated when they are appended.")
        for name in given:
            spec = self.specs[name]
            if spec.dtype not in (q.dtype, "float32"):
                self.value_error(f"{name} has dtype {spec.dtype}; pass {q.dtype}, as k_cache has, or float32.")
            if len(spec.shape) != 2 or not 1 <= spec.shape[1] <= q.shape[-1] // 2:
                self.value_error(
                    f"{name} has shape {spec.shape}; (max_position, rotary_dim / 2) is expected, with a rotary_dim "
                    f"from 2 to head_dim, which is {q.shape[-1]}."
                )
        cos, sin = (self.specs[name] for name in given)
        if (cos.shape, cos.dtype) != (sin.shape, sin.dtype):
            self.value_error(
                f"rotary_cos is {cos.dtype} {cos.shape} but rotary_sin is {sin.dtype} {sin.shape}; they must agree."
            )
        if cos.shape[0] < 1:
            self.value_error("rotary_cos has no positions; pass one row for each.")
        return 2 * cos.shape[1]

    def check_num_splits(self) -> int:
        num_splits: int = self.options.own("num_splits")
        if not 0 <= num_splits <= MAX_SPLITS:
            self.value_error(
                f"num_splits is {num_splits}; pass 1 to {MAX_SPLITS}, or 0 to divide the work evenly over the GPU."
            )
        return num_splits

    def check_plan(self, problem: KVCacheProblem) -> None:
        facts: PlanFacts | None = self.options.own("plan")
        if facts is None:
            return
        self.check_int32("plan", "(size,)")
        for name, made, asked in zip(facts._fields, facts, PlanFacts.of(problem), strict=True):
            if made != asked:
                self.value_error(
                    f"plan was made for {name} {made}, and this call has {asked}; make one with decode_plan for calls "
                    "like this."
                )

    def static(self, operation: Operation, facts: _Facts) -> Static:
        q, head_dim_v = self.specs["q"], self.specs["v_cache"].shape[-1]
        itemsize = ITEMSIZE[q.dtype]
        out = [_problem.widest_copy(self.specs["out"], itemsize)] if "out" in self.specs else []
        rotary = "interleaved" if self.options.own("rotary_interleaved") else "halves"
        rotates = "rotary_cos" in self.specs
        access, pack = _problem.access(operation, self.specs), self.pack(q)
        full_tiles = self.full_tiles(q, pack, facts.num_splits)
        mask = _problem.mask_kind(facts.window_left, facts.window_right)
        access["tma"] = access["tma"] and (rotates or _problem.has_tensor_map(q, itemsize))
        return Static(
            element=GPU_DTYPES[q.dtype],
            head_dim=q.shape[-1],
            head_dim_v=head_dim_v,
            mask=mask,
            terms=self.asked(),
            sinks="sinks" in self.specs,
            varlen=self.varlen,
            **access,
            store_bytes=max(itemsize, min([*out, math.gcd(head_dim_v * itemsize, ALIGNMENT)])),
            short=full_tiles and mask == "causal" and self.queries(q) < LONG,
            pack=pack,
            many=self.varlen and self.batch() > MANY,
            chains=facts.seqlen_k > CHAIN_ROWS,
            few_rows=self.few_rows(q, facts.num_splits),
            clusters=not full_tiles and self.clusters(q, facts.seqlen_k, facts.num_splits),
            page_rows=self.page_rows(facts),
            slots=facts.page_size > 0 and slots_of(self.specs) != NO_SLOTS,
            rotary=rotary if rotates else "",
            appends="k" in self.specs,
            q_copy_bytes=_problem.widest_copy(q, itemsize),
            full_tiles=full_tiles,
            kv_element=CACHE_DTYPES.get(self.specs["k_cache"].dtype, ""),
        )

    def page_rows(self, facts: _Facts) -> int:
        """Keys that lie in one page side by side, from each multiple of so many on; padding moves the first key."""
        if facts.page_size == 0:
            return 0
        return 1 if "cache_leftpad" in self.specs else math.gcd(facts.page_size, MAX_PAGE_ROWS)

    def clusters(self, q: Spec, capacity: int, num_splits: int) -> bool:
        """Whether a cluster of thread blocks should share the keys of each tile: lengths may be up to the capacity.

        All of it follows from `PlanFacts`, so that where a plan has nothing to say, calls that are given it need none.
        """
        if self.varlen or num_splits:
            return False
        heads_k, head_dim_v = self.specs["v_cache"].shape[-2:]
        rows = q.shape[1] * (q.shape[-2] // max(1, heads_k))
        items = q.shape[0] * heads_k * -(-rows // self.few_rows(q, num_splits))
        itemsize = ITEMSIZE[self.specs["k_cache"].dtype]
        return _problem.clusters_pay(items, capacity * (q.shape[-1] + head_dim_v) * itemsize)

    def queries(self, q: Spec) -> int:
        """Rows of q of a sequence, on average if they are packed."""
        return -(-q.shape[0] // max(1, self.batch())) if self.varlen else q.shape[1]

    def full_tiles(self, q: Spec, pack: int, num_splits: int) -> bool:
        """Whether tiles are full and many; where results must not depend on the batch, this must not either."""
        full = self.queries(q) * pack >= FULL_ROWS
        if num_splits > 0:
            return full and num_splits == 1 and not self.varlen
        return full and self.batch() * self.queries(q) * q.shape[-2] >= FULL_GPU_ROWS

    def few_rows(self, q: Spec, num_splits: int) -> int:
        """The least of `FEW_ROWS` that holds the rows that a sequence has for a key head, or the last of them."""
        if self.varlen and num_splits:
            return FEW_ROWS[-1]  # results are to be the same whatever the average is
        rows = self.queries(q) * (q.shape[-2] // max(1, self.specs["k_cache"].shape[-2]))
        return next((each for each in FEW_ROWS if each >= rows), FEW_ROWS[-1])


def check_values(problem: Problem, arrays: Arrays) -> None:
    """Refuse lengths, and numbers of caches, pages and positions, that lie outside of what there is."""
    assert isinstance(problem, KVCacheProblem)
    _ValueCheck(problem, arrays).run()


class _ValueCheck:
    """The checks of values; no others are read than those of arrays of integers, and of scales."""

    def __init__(self, problem: KVCacheProblem, arrays: Arrays) -> None:
        self.problem = problem
        self.arrays = arrays

    def array(self, name: str) -> NDArray[Any] | None:
        return self.arrays.numpy(self.problem.operation.arrays.index(name))

    def run(self) -> None:
        problem = self.problem
        batch, capacity = problem.batch, problem.seqlen_k
        offsets = self.array("cu_seqlens_q")
        if offsets is not None:
            _problem.check_offsets_of(problem.function, "q", problem.seqlen_q, offsets)
        for name in DESCALES:
            self.check_descale(name)
        queries = self.rows(offsets, problem.seqlen_q)
        new = self.rows(offsets, problem.seqlen_new) if problem.changes else np.zeros(batch, np.int64)
        lengths = self.array("cache_seqlens")
        first = np.full(batch, capacity) if lengths is None else lengths.astype(np.int64)
        self.check_range("cache_seqlens", first, capacity, "the capacity")
        last = first + new
        if (last > capacity).any():
            b = int(np.argmax(last > capacity))
            self.error(
                f"sequence {b} has {first[b]} keys in its cache, and {new[b]} are appended, but there is room for "
                f"{capacity} only."
            )
        leftpad = self.array("cache_leftpad")
        skipped = np.zeros(batch, np.int64) if leftpad is None else leftpad.astype(np.int64)
        for b in np.flatnonzero((skipped < 0) | (skipped > last))[:1]:
            self.error(
                f"cache_leftpad is {skipped[b]} for sequence {b}; it must lie between 0 and its number of keys, "
                f"{last[b]}."
            )
        self.check_positions(first + np.maximum(queries if problem.rotary_advances else np.minimum(queries, 1), new))
        places = self.check_caches(np.minimum(skipped, first), last)
        self.check_apart(places, first, new)
        self.check_pool(places, np.minimum(skipped, first), first, last)

    def rows(self, offsets: NDArray[Any] | None, rows: int) -> NDArray[np.int64]:
        """How many rows each sequence has of packed arrays, or of arrays with so many rows for each."""
        if offsets is None:
            return np.full(self.problem.batch, rows)
        return np.maximum(np.diff(offsets.astype(np.int64)), 0)  # below 0 behind the last, where zeros pad

    def check_descale(self, name: str) -> None:
        descale = self.array(name)
        if descale is not None:
            for value in descale[~((descale >= 2.0**-126) & (descale <= 2.0**126))][:1]:
                self.error(f"{name} holds {value}; pass numbers from 2^-126 to 2^126.")

    def check_positions(self, stop: NDArray[np.int64]) -> None:
        cos = self.problem.specs.get("rotary_cos")
        if cos is not None and (stop > cos.shape[0]).any():
            self.error(f"rotary_cos has {cos.shape[0]} positions, but one of {int(stop.max()) - 1} is asked for.")

    def check_caches(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> list[NDArray[Any]]:
        """The caches of each sequence or its pages, those for rows from `first` to `last` checked."""
        problem, table, numbers = self.problem, self.array("block_table"), self.array("cache_batch_idx")
        count = problem.num_caches
        if table is None:
            if numbers is None:
                numbers = np.arange(problem.batch)
            self.check_range("cache_batch_idx", numbers, count - 1, "the last cache")
            return [*numbers[:, None]]
        size = problem.page_size
        for b, (begin, end) in enumerate(zip(first // size, -(-last // size), strict=True)):
            live = table[b, begin:end] if first[b] < last[b] else table[b, :0]
            for index in np.flatnonzero((live < 0) | (live >= count))[:1]:
                self.error(
                    f"block_table[{b}, {begin + index}] is {live[index]}, a page that sequence {b} uses; there are "
                    f"{count} pages."
                )
        return [*table]

    def check_apart(self, places: list[NDArray[Any]], first: NDArray[np.int64], new: NDArray[np.int64]) -> None:
        """Refuse two sequences that append into the same row."""
        if not new.any():
            return
        problem = self.problem
        size, what = (problem.page_size, "page") if problem.page_size else (problem.seqlen_k, "cache")
        rows = [np.arange(start, start + count) for start, count in zip(first, new, strict=True)]
        places = [
            own[each // size].astype(np.int64) * size + each % size for own, each in zip(places, rows, strict=True)
        ]
        written, counts = np.unique(np.concatenate(places), return_counts=True)
        for row in written[counts > 1][:1]:
            self.error(
                f"more than one sequence appends to row {row % size} of {what} {row // size}; pass places of their own."
            )

    def check_pool(
        self, tables: list[NDArray[Any]], begin: NDArray[np.int64], first: NDArray[np.int64], last: NDArray[np.int64]
    ) -> None:
        """Refuse rows that are appended to pages which hold both keys and values."""
        problem, pointers = self.problem, self.arrays.pointers
        k_cache, v_cache = (problem.operation.arrays.index(name) for name in ("k_cache", "v_cache"))
        apart = problem.pages_between(pointers[v_cache] - pointers[k_cache]) if problem.changes else 0
        if not apart:
            return

        def pages(start: NDArray[np.int64]) -> NDArray[Any]:
            bounds = zip(tables, start // problem.page_size, -(-last // problem.page_size), strict=True)
            own = (table[low:high].astype(np.int64) for table, low, high in bounds)
            return np.concatenate([np.zeros(0, np.int64), *own])  # of a batch without sequences too

        live, written = pages(begin), pages(first)
        for of_keys, of_values in ((written, live), (live, written)):
            for page in np.intersect1d(of_keys, of_values + apart)[:1]:
                self.error(f"page {page} of k_cache is page {page - apart} of v_cache; pass a pool with room for both.")

    def check_range(self, name: str, values: NDArray[Any], last: int, what: str) -> None:
        for b in np.flatnonzero((values < 0) | (values > last))[:1]:
            self.error(f"{name} is {values[b]} for sequence {b}; it must lie between 0 and {what}, {last}.")

    def error(self, text: str) -> None:
        raise ArgumentError(f"{self.problem.function}: {text}")

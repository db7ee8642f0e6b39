"""Which kernels calls will need, told without arrays: by operation, dtype, head_dim, features, and lengths.

A kernel is specialised by more than a caller says: by whether sequences are short, or sums so long that they are taken
over at intervals, by the heads that share a tile. So nothing here lists kernels. A `Kind` of calls is gone through over
a spread of lengths and heads, the problem of each is made as a call makes it, and what would serve it is collected.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from .._call import options as _options
from .._call.arrays import ALIGNMENT
from .._call.problem import (
    CHAIN_ROWS,
    CLUSTER_ITEMS,
    CLUSTERS_THAT_FILL,
    FEW_KEYS,
    FEW_ROWS,
    GPU_DTYPES,
    ITEMSIZE,
    LONG,
    LONG_ROWS,
    MANY,
    MANY_ROWS,
    MAX_HEAD_DIM,
    MAX_PAGE_ROWS,
    SHORT_KEYS,
    SHORT_ROWS,
    Problem,
    has_many_keys,
)
from .._compile.used import Use
from .._kernels import Plan, align, choose
from .._operations.asked import asked_by
from .._operations.call import chosen as chosen_kernel
from .._operations.operation import Operation, made
from .._operations.sketch import OPERATIONS, Layout, sketch

FEATURES = {
    "causal": "a query sees no later key",
    "window": "window_size: a query sees keys near it",
    "softcap": "scores are capped, at 128 at most",
    "large_softcap": "scores are capped, above 128",
    "alibi": "alibi_slopes are given",
    "sinks": "sinks are given",
    "deterministic": "gradients that are the same bits in every run",
    "unaligned": "arrays whose rows do not begin at multiples of 16 bytes",
    "paged": "caches are pages",
    "packed": "sequences that attend to caches lie end to end",
}
"""What calls may have, beside those of their operation, and in words."""

ARRAYS = {"alibi_slopes": "alibi", "sinks": "sinks"}
"""The arrays, of a number per head, that features stand for."""

WINDOW, SOFTCAPS = (1024, 0), {"softcap": 30.0, "large_softcap": 1000.0}
"""What stands for windows, and for softcaps: which ones does not matter."""


def features_of(operation: Operation) -> tuple[str, ...]:
    """What calls of an operation may have."""
    masks = ("causal", "window") if operation.terms else ()
    scores = (*SOFTCAPS, "alibi", "sinks") if operation.tiles else ()
    turns = ("deterministic",) if operation.gradient and operation.tiles else ()
    return (*masks, *scores, *turns, "unaligned", *(("paged", "packed") if has_caches(operation) else ()))


def has_caches(operation: Operation) -> bool:
    return "k_cache" in operation.arrays


class Kind(NamedTuple):
    """Calls of one kind, of whatever lengths.

    Attributes
    ----------
    operation : str
        One of `OPERATIONS`.
    dtype : str
    head_dim, head_dim_v : int
    features : tuple of str
        Of `FEATURES`, in their order.
    """

    operation: str
    dtype: str
    head_dim: int
    head_dim_v: int
    features: tuple[str, ...] = ()

    def __str__(self) -> str:
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}:{self.head_dim_v}"
        return " ".join([self.operation, self.dtype, dims, *self.features])


class Lengths(NamedTuple):
    """Sequences and heads of calls: how many there are, their rows of q and of k, and heads of q per head of k."""

    batch: int
    queries: int
    keys: int
    ratio: int


SOME = (1, 8)
MANY_TOO = (*SOME, MANY + 44)


FEW_OR_MANY = (1, CLUSTERS_THAT_FILL, CLUSTER_ITEMS + 1)
"""Numbers of dense sequences with few rows of q, or many keys; of others the number does not matter."""


class Cached(NamedTuple):
    """What calls with caches differ by besides: rows of a page, new keys, and whether those are rotated."""

    page_size: int = 0
    appends: bool = False
    rotates: bool = False


CONTIGUOUS = Cached()

PAGE_SIZES = tuple(1 << power for power in range(MAX_PAGE_ROWS.bit_length()))
"""All that matter."""

USUAL_PAGES = (16, 64)


class Region(NamedTuple):
    """Lengths of sequences that occur with each other.

    Attributes
    ----------
    rows, keys : tuple of int
    ratios : tuple of int
        Heads of q per head of k. For packed sequences they matter as far as sums of gradients are long by them, or
        tiles many.
    batches : tuple of int
        Numbers of sequences that are packed or have caches. Of others there may be any number.
    """

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    ratios: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = MANY_TOO


class Spread(NamedTuple):
    """Lengths that stand for all that calls may have: one at least for every specialisation that depends on them.

    Attributes
    ----------
    meaning : str
        Which calls they stand for.
    dense, packed : tuple of Region
        Of packed sequences the average lengths.
    fewer_keys : bool
        Whether a sequence may have fewer keys than queries where those see no later key, so that some see none.
    cached, cached_packed : tuple of Region
        Of calls with caches, whose keys are the capacity.
    page_sizes : tuple of int
    """

    meaning: str
    dense: tuple[Region, ...]
    packed: tuple[Region, ...]
    fewer_keys: bool = False
    cached: tuple[Region, ...] = ()
    cached_packed: tuple[Region, ...] = ()
    page_sizes: tuple[int, ...] = USUAL_PAGES

    def of(self, kind: Kind) -> Iterator[Lengths]:
        """Those of calls of a kind."""
        operation = OPERATIONS[kind.operation]
        if not operation.terms:  # they do not matter
            yield Lengths(1, 1, 1, 1)
            return
        packed, regions = operation.packed, self.packed if operation.packed else self.dense
        if has_caches(operation):
            regions = self.cached_packed if "packed" in kind.features else self.cached
        masked = "causal" in kind.features or "window" in kind.features
        for region in regions:
            for queries, keys in itertools.product(region.rows, region.keys):
                if queries <= keys or self.fewer_keys or not masked:
                    few = queries <= FEW_ROWS[-1] or has_many_keys(queries, keys)
                    dense = FEW_OR_MANY if few else (1,)
                    for ratio, batch in itertools.product(region.ratios, region.batches if packed else dense):
                        yield Lengths(batch, queries, keys, ratio)


USUAL, LONGER, LONGEST = 1024, LONG, 2 * CHAIN_ROWS
MOST_HEADS = 8
SHARED = (1, 2, 4, MOST_HEADS)
"""Heads of q that usually share a head of k, as far as they matter: numbers that are no power of 2 are as 1."""

MANY_HEADS = MANY_ROWS // USUAL
"""Heads of q with which a packed sequence of `USUAL` rows has many tiles."""

UNPAID = 48
"""Rows of q that fill a tile of 64, but for which copies do not pay."""

FEW = (1, 2, 4, 64)
"""Rows of q that fill each tile for few of them, with as many heads as usually share one of k."""

_ALL_ROWS = (1, *SHORT_ROWS, UNPAID, 64, USUAL, LONGER, LONGEST)
_ALL_KEYS = (*SHORT_KEYS, FEW_KEYS, USUAL, LONGER, LONGEST)

_EVERY_CACHED = (Region((*FEW, UNPAID, USUAL), (1, USUAL, LONGEST), (*SHARED, 16, 32, 64)),)

SPREADS = {
    "serving": Spread(
        f"up to {MOST_HEADS} heads of q share a head of k; prompts of any length, whole or in pieces, then one token "
        f"after the other; pieces of up to 64 tokens behind {CHAIN_ROWS} at most; packed sequences that have more than "
        f"{SHORT_KEYS[-1]} keys on average; over caches prompts in pieces of {USUAL // 2} tokens at least, then one "
        "token after the other, or packed sequences of any lengths, in pages of "
        f"{USUAL_PAGES[0]} rows or of a multiple of {USUAL_PAGES[1]}",
        (
            Region((1,), _ALL_KEYS, SHARED),
            Region((*SHORT_ROWS, 64), (*SHORT_KEYS, FEW_KEYS, USUAL), SHARED),
            Region((USUAL, LONGER, LONGEST), (USUAL, LONGER, LONGEST), SHARED),
        ),
        (Region(_ALL_ROWS, (FEW_KEYS, USUAL, LONGER, LONGEST), (1, MANY_HEADS)),),
        cached=(Region((1, USUAL), (USUAL, LONGEST), SHARED),),
        cached_packed=(Region((*FEW, USUAL), (USUAL, LONGEST), SHARED),),
    ),
    "usual": Spread(
        f"up to {MOST_HEADS} heads of q share a head of k; sequences of 512 to {CHAIN_ROWS} tokens, and then one token "
        f"after the other; up to {MANY} packed sequences, of at most {CHAIN_ROWS} tokens together",
        (Region((1,), (USUAL, LONGER), SHARED), Region((USUAL, LONGER), (USUAL, LONGER), SHARED)),
        (Region((USUAL,), (USUAL,), (1, MANY_HEADS), SOME),),
    ),
    "training": Spread(
        f"sequences of more than 64 tokens, and of 512 at least where heads of q share a head of k; packed ones of "
        f"{LONG_ROWS} at least on average",
        (Region((65, USUAL, LONGER, LONGEST), (65, USUAL, LONGER, LONGEST)),),
        (Region((LONG_ROWS, USUAL, LONGER, LONGEST), (LONG_ROWS, USUAL, LONGER, LONGEST), (1, MANY_HEADS)),),
    ),
    "every": Spread(
        "any lengths and heads",
        (Region(_ALL_ROWS, _ALL_KEYS, (*SHARED, 16, 32, 64)),),
        (Region(_ALL_ROWS, _ALL_KEYS, (1, LONGEST)),),
        fewer_keys=True,
        cached=_EVERY_CACHED,
        cached_packed=_EVERY_CACHED,
        page_sizes=PAGE_SIZES,
    ),
}


class Chosen(NamedTuple):
    """Kinds of calls, and the name of the spread of lengths that they may have."""

    spread: str
    kinds: tuple[Kind, ...]


def kinds_of(
    operations: Iterable[str],
    dtypes: Iterable[str],
    head_dims: Iterable[int | tuple[int, int]],
    *features: tuple[str, ...],
) -> tuple[Kind, ...]:
    """Every combination; `features` are those of a call, for each that there may be."""
    dims = [each if isinstance(each, tuple) else (each, each) for each in head_dims]
    return tuple(
        Kind(operation, dtype, *pair, each)
        for operation, dtype, pair, each in itertools.product(operations, dtypes, dims, features)
    )


ATTENTIONS = ("attention", "attention_varlen")
GRADIENTS = ("attention_backward", "attention_varlen_backward")
PLAIN: tuple[str, ...] = ()
CAUSAL = ("causal",)

CACHED = ("attention_with_kvcache",)
PAGED = ("causal", "paged")

_SERVED = (
    *kinds_of(ATTENTIONS, ("bfloat16",), (64, 128), PLAIN, CAUSAL),
    *kinds_of(ATTENTIONS, ("float16",), (128,), PLAIN, CAUSAL),
    *kinds_of(CACHED, ("bfloat16",), (64, 128), CAUSAL, PAGED, (*PAGED, "packed")),
    *kinds_of(CACHED, ("float16",), (128,), PAGED),
    *kinds_of(("decode_plan",), ("bfloat16",), (64, 128), PAGED),
    *kinds_of(("merge_states", "rotary"), ("bfloat16", "float16"), (128,), PLAIN),
)
_TRAINED = (
    *kinds_of((*ATTENTIONS, *GRADIENTS), ("bfloat16",), (64, 128), PLAIN, CAUSAL),
    *kinds_of((*ATTENTIONS, *GRADIENTS), ("float16",), (128,), PLAIN, CAUSAL),
)
_ALSO = (
    *kinds_of(ATTENTIONS, ("bfloat16",), (96, 256), PLAIN, CAUSAL),
    *kinds_of(GRADIENTS, ("bfloat16",), (256,), PLAIN, CAUSAL),
    *kinds_of(ATTENTIONS, ("bfloat16",), (128,), ("window",)),
    *kinds_of(ATTENTIONS, ("bfloat16",), (64,), ("causal", "sinks"), ("window", "sinks")),
    *kinds_of(("attention", "attention_backward"), ("float32",), (64,), PLAIN, CAUSAL),
)

PRESETS: dict[str, tuple[Chosen, ...]] = {
    "inference": (Chosen("serving", _SERVED),),
    "training": (Chosen("training", _TRAINED),),
    "full": (Chosen("serving", _SERVED), Chosen("training", _TRAINED), Chosen("usual", _ALSO)),
}


def plans_for(chosen: Iterable[Chosen], arch: int) -> list[Plan]:
    """The distinct kernels for GPUs of compute capability `arch`, always in the same order.

    The kernel that copies arrays is among them, so that calls with unaligned ones are served where copying pays.
    """
    found: dict[Plan, None] = {}
    for spread, kinds in chosen:
        for kind in kinds:
            found |= dict.fromkeys(plans_of(kind, SPREADS[spread], arch))
    return [*found, align.plan_for(arch)]


def plans_used(uses: Iterable[Use], arch: int) -> tuple[list[Plan], list[str]]:
    """The kernels that serve the calls of a record on GPUs of compute capability `arch`, and what cannot be told."""
    found: dict[Plan, None] = {}
    unknown: dict[str, None] = {}
    for use in uses:
        serving = (each.kernels for each in made())
        kernels = next((each for each in serving if use.kernel in [kernel.name for kernel in each]), None)
        if use.static is None and use.kernel == align.ALIGN.name:
            found[align.plan_for(arch)] = None
        elif use.static is None or kernels is None:
            unknown[f"there is no kernel {use.kernel}, which the record names; it is skipped."] = None
        else:
            found[choose(kernels, use.static, arch).bare] = None
    return list(found), list(unknown)


@lru_cache(maxsize=1024)
def plans_of(kind: Kind, spread: Spread, arch: int) -> dict[Plan, Lengths]:
    """The distinct kernels that calls of a kind need, each with the first lengths for which it serves."""
    found: dict[Plan, Lengths] = {}
    for lengths in spread.of(kind):
        for problem in problems_of(kind, lengths, spread.page_sizes):
            _, _, plan = chosen_kernel(problem, arch)
            found.setdefault(plan.bare, lengths)
    return found


def problems_of(kind: Kind, lengths: Lengths, page_sizes: tuple[int, ...] = PAGE_SIZES) -> Iterator[Problem]:
    """Calls of a kind with such lengths: one, but several where its arrays may lie in memory in several ways."""
    size = ITEMSIZE[kind.dtype]
    inputs: list[Layout | None] = [None]
    if (kind.head_dim * size | kind.head_dim_v * size) % ALIGNMENT:  # which rows may be padded to, or be alone
        inputs.append(Layout(0))
    results = [*inputs]
    if "unaligned" in kind.features:
        misaligned = [Layout(each) for each in (8, 4, 2) if each >= size]
        inputs += [Layout(0, backwards=True), *misaligned]
        results += misaligned
    for given, written in itertools.product(inputs, results):
        for cached in cached_of(kind, page_sizes):
            for interleaved in (True, False) if kind.operation == "rotary" else (True,):
                yield problem_of(kind, lengths, given, written, cached, interleaved)


def cached_of(kind: Kind, page_sizes: tuple[int, ...]) -> Iterator[Cached]:
    """What calls of a kind may differ by if they have caches."""
    operation = OPERATIONS[kind.operation]
    if not has_caches(operation):
        yield CONTIGUOUS
        return
    scored = bool(operation.tiles)  # a plan is made before anything is rotated
    for size in page_sizes if "paged" in kind.features else (0,):
        for appends, rotates in itertools.product((False, True), repeat=2):
            if not rotates or (appends and kind.head_dim > 1 and scored):
                yield Cached(size, appends, rotates)


def problem_of(
    kind: Kind,
    lengths: Lengths,
    inputs: Layout | None = None,
    results: Layout | None = None,
    cached: Cached = CONTIGUOUS,
    interleaved: bool = True,
) -> Problem:
    """A call of a kind with such lengths."""
    operation = OPERATIONS[kind.operation]
    features = {*kind.features} & {*features_of(operation)}
    ratio = lengths.ratio
    if has_caches(operation):
        shapes = _of_caches(kind, lengths, cached)
    elif operation.terms:
        shapes = _of_attention(kind, lengths)
    elif kind.operation == "rotary":
        q = (lengths.batch, lengths.queries, ratio, kind.head_dim)
        shapes = {"q": q, "k": q} | dict.fromkeys(("cos", "sin"), (lengths.queries, max(1, kind.head_dim // 2)))
    else:
        out, lse = (1, 1, ratio, kind.head_dim_v), (1, ratio, 1)
        shapes = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse}
    shapes |= {array: (ratio,) for array, feature in ARRAYS.items() if feature in features}
    options = {
        "causal": "causal" in features,
        "window_size": WINDOW if "window" in features else None,
        "softcap": next((SOFTCAPS[name] for name in SOFTCAPS if name in features), 0.0),
        "deterministic": "deterministic" in features,
        "num_splits": 0,
        "interleaved": interleaved,
        "inverse": False,
    }
    _, asked = asked_by(operation, options)
    made_of = _options.of(operation.name, asked, operation.owned)
    return sketch(operation, shapes, kind.dtype, made_of, inputs=inputs, results=results)


def _of_attention(kind: Kind, lengths: Lengths) -> dict[str, tuple[int, ...]]:
    packed = OPERATIONS[kind.operation].packed
    batch, queries, keys, ratio = lengths
    rows = [(batch * each,) if packed else (batch, each) for each in (queries, keys)]
    shapes: dict[str, tuple[int, ...]] = {
        "q": (*rows[0], ratio, kind.head_dim),
        "k": (*rows[1], 1, kind.head_dim),
        "v": (*rows[1], 1, kind.head_dim_v),
    }
    return shapes | (dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), (batch + 1,)) if packed else {})


def _of_caches(kind: Kind, lengths: Lengths, cached: Cached) -> dict[str, tuple[int, ...]]:
    batch, queries, keys, ratio = lengths
    packed = "packed" in kind.features
    rows = (batch * queries,) if packed else (batch, queries)
    shapes: dict[str, tuple[int, ...]] = {"q": (*rows, ratio, kind.head_dim), "cache_seqlens": (batch,)}
    places: tuple[int, ...] = (batch, keys)
    if cached.page_size:
        pages = -(-keys // cached.page_size)
        places, shapes["block_table"] = (batch * pages, cached.page_size), (batch, pages)
    for name, columns in (("k", kind.head_dim), ("v", kind.head_dim_v)):
        shapes[f"{name}_cache"] = (*places, 1, columns)
        if cached.appends:
            shapes[name] = (*rows, 1, columns)
    if packed:
        shapes["cu_seqlens_q"] = (batch + 1,)
    if cached.rotates:
        shapes |= dict.fromkeys(("rotary_cos", "rotary_sin"), (keys, kind.head_dim // 2))
    return shapes


def arch_of(text: str) -> int | None:
    """The compute capability that ``sm_90a``, ``90`` or ``9.0`` stand for, as 90; None if it is none.

    Which kernels need ``sm_90a``, and not ``sm_90``, they know themselves.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d{2,3})[af]?|(\d{1,2})\.(\d)", text.strip().lower(), re.ASCII)
    return None if match is None else int(match[1] or match[2] + match[3])


def asked_for(
    *,
    preset: str | None = None,
    operations: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    head_dims: Sequence[tuple[int, int]] = (),
    features: Sequence[str] = (),
) -> tuple[Chosen, ...]:
    """What a user asks for.

    Of a preset the others leave those calls whose operation, dtype and head_dim are among the given ones, and that have
    all of the features. Without a preset they are calls of any lengths that have just these features: of every given
    operation, dtype and head_dim, by default of all operations and in bfloat16.

    Raises
    ------
    ValueError
        If something is not known, or there are no such calls.
    """
    for what, given, known in (
        ("preset", [preset] if preset is not None else [], PRESETS),
        ("operation", operations, OPERATIONS),
        ("dtype", dtypes, GPU_DTYPES),
        ("feature", features, FEATURES),
    ):
        for each in given:
            if each not in known:
                raise ValueError(f"there is no {what} {each!r}; there are {', '.join(known)}.")
    for dim in itertools.chain(*head_dims):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim {dim} is not supported; it may be 1 to {MAX_HEAD_DIM}.")
    if preset is not None:
        return _narrowed(preset, operations, dtypes, head_dims, features)
    if not head_dims:
        raise ValueError("nothing says what to compile for; name a preset, a head_dim, or a record of what was used.")
    if {"causal", "window"} <= {*features}:
        raise ValueError("window and causal exclude each other here; a causal window is a window.")
    if {*SOFTCAPS} <= {*features}:
        raise ValueError("softcap and large_softcap exclude each other; ask for kernels with either apart.")
    ordered = tuple(feature for feature in FEATURES if feature in features)
    able = [name for name, operation in OPERATIONS.items() if {*features} <= {*features_of(operation)}]
    for name in operations:
        if "deterministic" in features and name not in GRADIENTS:
            raise ValueError(f"{name} is always deterministic; ask for that of {' or '.join(GRADIENTS)}.")
        if name not in able:
            others = ", ".join(features_of(OPERATIONS[name]))
            raise ValueError(f"calls of {name} may have no other features than {others}.")
    if not able:
        raise ValueError(f"no operation has calls with all of {', '.join(ordered)}; ask for some of them.")
    kinds = kinds_of(operations or able, dtypes or ("bfloat16",), head_dims, ordered)
    return (Chosen("every", kinds),)


def _narrowed(
    preset: str,
    operations: Sequence[str],
    dtypes: Sequence[str],
    head_dims: Sequence[tuple[int, int]],
    features: Sequence[str],
) -> tuple[Chosen, ...]:
    def is_asked(kind: Kind) -> bool:
        return (
            kind.operation in (operations or OPERATIONS)
            and kind.dtype in (dtypes or GPU_DTYPES)
            and (not head_dims or (kind.head_dim, kind.head_dim_v) in head_dims)
            and {*features} <= {*kind.features}
        )

    left = [Chosen(spread, tuple(filter(is_asked, kinds))) for spread, kinds in PRESETS[preset]]
    found = tuple(each for each in left if each.kinds)
    if not found:
        kinds = "; ".join(dict.fromkeys(str(kind) for _, kinds in PRESETS[preset] for kind in kinds))
        raise ValueError(f"the preset {preset} has no such calls; leave it out to compile them. It has: {kinds}.")
    return found


_TILED = (Region(_ALL_ROWS, _ALL_KEYS, batches=(8,)),)
_TILES = Spread("lengths with a tile of their own", _TILED, _TILED, cached=_TILED)
_WITH_TILES = tuple(name for name, operation in OPERATIONS.items() if operation.tiles)


def tiles(
    archs: Iterable[int],
    dtypes: Iterable[str],
    head_dims: Iterable[tuple[int, int]],
    masks: Mapping[str, tuple[str, ...]],
) -> list[tuple[Any, ...]]:
    """The tiles of all kernels, as rows of a table, with lengths for which each serves; `masks` are by name."""
    rows: dict[tuple[Any, ...], str] = {}
    for arch, dtype, dims, operation in itertools.product(archs, dtypes, head_dims, _WITH_TILES):
        for mask, features in masks.items():
            kind = asked_for(operations=[operation], dtypes=[dtype], head_dims=[dims], features=features)[0].kinds[0]
            for plan, lengths in plans_of(kind, _TILES, arch).items():
                config = plan.config
                tile = config.block_m, config.block_n, config.num_threads, config.smem_bytes
                row = (arch, plan.name, dtype, dims, config.mask, *tile)
                packed = "packed, " if config.varlen else ""
                if config.mask == mask:
                    rows.setdefault(row, f"{packed}{lengths.queries} × {lengths.keys}")
    return [(*row, example) for row, example in sorted(rows.items(), key=lambda item: item[0][:5])]

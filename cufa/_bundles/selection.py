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

from .._call.arrays import ALIGNMENT
from .._call.options import Options
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
    MAX_HEAD_DIM,
    SHORT_KEYS,
    SHORT_ROWS,
    Problem,
    has_many_keys,
)
from .._compile.used import Use
from .._kernels import Plan, align, choose
from .._operations.call import chosen as chosen_kernel
from .._operations.operation import made
from .._operations.sketch import OPERATIONS, Layout, sketch

FEATURES = {
    "causal": "a query sees no later key",
    "window": "window_size: a query sees keys near it",
    "softcap": "scores are capped",
    "alibi": "alibi_slopes are given",
    "sinks": "sinks are given",
    "deterministic": "gradients that are the same bits in every run",
    "unaligned": "arrays whose rows do not begin at multiples of 16 bytes",
}
"""What calls may have, beside those of their operation, and in words."""

ARRAYS = {"alibi_slopes": "alibi", "sinks": "sinks"}
"""The arrays, of a number per head, that features stand for."""

WINDOW, SOFTCAP = (1024, 0), 30.0
"""What stands for windows, and for softcaps: which ones does not matter."""


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


class Region(NamedTuple):
    """Lengths of sequences that occur with each other.

    Attributes
    ----------
    rows, keys : tuple of int
    ratios : tuple of int
        Heads of q per head of k. For packed sequences they do not matter.
    batches : tuple of int
        Numbers of packed sequences. Of dense ones there may be any number.
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
    """

    meaning: str
    dense: tuple[Region, ...]
    packed: tuple[Region, ...]
    fewer_keys: bool = False

    def of(self, kind: Kind) -> Iterator[Lengths]:
        """Those of calls of a kind."""
        packed = OPERATIONS[kind.operation].packed
        masked = "causal" in kind.features or "window" in kind.features
        for region in self.packed if packed else self.dense:
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

UNPAID = 48
"""Rows of q that fill a tile of 64, but for which copies do not pay."""

_ALL_ROWS = (1, *SHORT_ROWS, UNPAID, 64, USUAL, LONGER, LONGEST)
_ALL_KEYS = (*SHORT_KEYS, FEW_KEYS, USUAL, LONGER, LONGEST)

SPREADS = {
    "serving": Spread(
        f"up to {MOST_HEADS} heads of q share a head of k; prompts of any length, whole or in pieces, then one token "
        f"after the other; pieces of up to 64 tokens behind {CHAIN_ROWS} at most; packed sequences that have more than "
        f"{SHORT_KEYS[-1]} keys on average",
        (
            Region((1,), _ALL_KEYS, SHARED),
            Region((*SHORT_ROWS, 64), (*SHORT_KEYS, FEW_KEYS, USUAL), SHARED),
            Region((USUAL, LONGER, LONGEST), (USUAL, LONGER, LONGEST), SHARED),
        ),
        (Region(_ALL_ROWS, (FEW_KEYS, USUAL, LONGER, LONGEST)),),
    ),
    "usual": Spread(
        f"up to {MOST_HEADS} heads of q share a head of k; sequences of 512 to {CHAIN_ROWS} tokens, and then one token "
        f"after the other; up to {MANY} packed sequences, of at most {CHAIN_ROWS} tokens together",
        (Region((1,), (USUAL, LONGER), SHARED), Region((USUAL, LONGER), (USUAL, LONGER), SHARED)),
        (Region((USUAL,), (USUAL,), batches=SOME),),
    ),
    "training": Spread(
        f"sequences of more than 64 tokens, and of 512 at least where heads of q share a head of k; packed ones of "
        f"{LONG_ROWS} at least on average",
        (Region((65, USUAL, LONGER, LONGEST), (65, USUAL, LONGER, LONGEST)),),
        (Region((LONG_ROWS, USUAL, LONGER, LONGEST), (LONG_ROWS, USUAL, LONGER, LONGEST)),),
    ),
    "every": Spread(
        "any lengths and heads",
        (Region(_ALL_ROWS, _ALL_KEYS, (*SHARED, 16, 32, 64)),),
        (Region(_ALL_ROWS, _ALL_KEYS),),
        fewer_keys=True,
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

_SERVED = (
    *kinds_of(ATTENTIONS, ("bfloat16",), (64, 128), PLAIN, CAUSAL),
    *kinds_of(ATTENTIONS, ("float16",), (128,), PLAIN, CAUSAL),
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
        for problem in problems_of(kind, lengths):
            _, _, plan = chosen_kernel(problem, arch)
            found.setdefault(plan.bare, lengths)
    return found


def problems_of(kind: Kind, lengths: Lengths) -> Iterator[Problem]:
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
        yield problem_of(kind, lengths, given, written)


def problem_of(kind: Kind, lengths: Lengths, inputs: Layout | None = None, results: Layout | None = None) -> Problem:
    """A call of a kind with such lengths."""
    operation, features = OPERATIONS[kind.operation], kind.features
    batch, queries, keys, ratio = lengths
    rows = [(batch * each,) if operation.packed else (batch, each) for each in (queries, keys)]
    shapes = {
        "q": (*rows[0], ratio, kind.head_dim),
        "k": (*rows[1], 1, kind.head_dim),
        "v": (*rows[1], 1, kind.head_dim_v),
    }
    if operation.packed:
        shapes |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), (batch + 1,))
    shapes |= {array: (ratio,) for array, feature in ARRAYS.items() if feature in features}
    options = Options(
        causal="causal" in features,
        window_size=WINDOW if "window" in features else None,
        softmax_scale=None,
        softcap=SOFTCAP if "softcap" in features else 0.0,
        return_lse=False,
        deterministic="deterministic" in features and operation.gradient,
    )
    return sketch(operation, shapes, kind.dtype, options, inputs=inputs, results=results)


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
    ordered = tuple(feature for feature in FEATURES if feature in features)
    gradients_only = "deterministic" in features and not operations
    kinds = kinds_of(
        operations or (GRADIENTS if gradients_only else OPERATIONS), dtypes or ("bfloat16",), head_dims, ordered
    )
    for kind in kinds:
        if "deterministic" in features and not OPERATIONS[kind.operation].gradient:
            raise ValueError(f"{kind.operation} is always deterministic; ask for that of {' or '.join(GRADIENTS)}.")
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
_TILES = Spread("lengths with a tile of their own", _TILED, _TILED)


def tiles(
    archs: Iterable[int],
    dtypes: Iterable[str],
    head_dims: Iterable[tuple[int, int]],
    masks: Mapping[str, tuple[str, ...]],
) -> list[tuple[Any, ...]]:
    """The tiles of all kernels, as rows of a table, with lengths for which each serves; `masks` are by name."""
    rows: dict[tuple[Any, ...], str] = {}
    for arch, dtype, dims, operation in itertools.product(archs, dtypes, head_dims, OPERATIONS):
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

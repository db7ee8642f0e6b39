"""Random problems of every kind, forward and backward, held to float64 that is computed where the arrays are.

    python tests/soak.py [--count 20000] [--seed 0] [--seconds 360] [--kernels 150] [--without poison,...] [--workers 2]
    python tests/soak.py --repeat "Problem(...)"       what a failure printed
    python tests/soak.py --agree [--count 10000]       an sm_90 GPU's own kernel beside the one for every GPU
    python tests/soak.py --cpu --count 300             NumPy arrays

Needs CuPy, but for ``--cpu``. All kernels that the sampled kinds take are compiled before, side by side. A failure is
counted and the run goes on; at the end up to 20 are listed, by what they have in common, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import exact
import ml_dtypes
import numpy as np
from tqdm import tqdm

import cufa
from cufa._compile import jit as _jit
from cufa._kernels import Plan
from cufa._operations import call as operations
from cufa.testing import LAYOUTS, View
from cufa.testing._cases import SEQLENS

HANG_SECONDS = 90
LISTED = 20
KEPT_BYTES = 8 << 30
"""Of a GPU's memory that a process keeps for what comes."""
BATCH = 16
"""Problems that are under way before their results are looked at."""

MODES = (
    "long",  # lengths beyond 200
    "garbage",  # NaN, Inf and the largest numbers in removed keys, rows that see nothing, and what is not live
    "poison",  # NaN and Inf in rows that some see and others do not
    "infinite",  # infinite scores and sinks
    "huge",  # magnitudes that differ widely, up to what float32 holds of products
    "tiny",
    "constant",  # the same large number everywhere
    "largest",  # values next to the largest number
    "scale",  # softmax_scale far from usual
    "loss",  # dout as large as loss scaling makes it
    "padding",  # offsets that end early, and trailing ones that repeat zeros or the total
    "offsets",  # offsets and seqused_k of any content; on the CPU they are refused
    "wide",  # rows wider in memory than head_dim
    "fused",  # q, k and v in one array, and their gradients
    "twice",  # deterministic results, computed twice
)

DIMS = (64, 64, 64, 128, 128, 128, 256, 192, 96, 160, 32, 80, 1, 7, 20, 33, 57, 60, 65, 100, 127, 129, 200, 255)
PAIRS = ((64, 128), (192, 128), (40, 56), (128, 64), (20, 60), (100, 33))
WIDE = ("wide8", "wide16", "wide64")
"""Layouts of rows that are wider in memory than head_dim: up to a multiple of so many elements, and beyond it."""
FUSED = ("bshnd", "bsnhd", "bnshd", "bnhsd")
"""Axes of an array that holds q, k and v: n is which of them."""


class Kind(NamedTuple):
    """What makes another kernel. The layouts are those of q, k, v, out and dout, and of dq, dk and dv if given."""

    dtype: str
    head_dim: int
    head_dim_v: int
    varlen: bool
    mask: str
    softcap: bool
    alibi: int
    sinks: bool
    layouts: tuple[str, ...]
    results: tuple[str, ...]
    deterministic: bool
    fused: str = ""


class Problem(NamedTuple):
    """A kind with sizes and values; how it is described is how it is repeated."""

    kind: Kind
    seed: int
    modes: tuple[str, ...] = MODES


def sample_kind(rng: np.random.Generator, modes: Iterable[str]) -> Kind:
    """A kernel at random: most of them with 16-bit elements, aligned rows and few features."""
    head_dim = head_dim_v = int(rng.choice(DIMS))
    if rng.random() < 0.2:
        head_dim, head_dim_v = PAIRS[rng.integers(len(PAIRS))]
    aligned = ["contiguous"] * 4 + ["transposed", "fused", "broadcast"] + list(WIDE) * ("wide" in modes)
    names = aligned if rng.random() < 0.78 else list(LAYOUTS) + list(WIDE) * ("wide" in modes)
    layouts = [str(rng.choice(names)) for _ in range(5)]
    written = [name for name in names if name != "broadcast"]
    layouts[3] = str(rng.choice(written))
    results = [str(rng.choice(written)) for _ in range(3)] if rng.random() < 0.3 else []
    fused = ""
    if "fused" in modes and head_dim == head_dim_v and rng.random() < 0.15:
        fused = str(rng.choice(FUSED))
    return Kind(
        str(rng.choice(["float16", "bfloat16", "bfloat16", "float32"])),
        head_dim,
        head_dim_v,
        bool(rng.random() < 0.45),
        str(rng.choice(["none", "causal", "causal", "window"])),
        bool(rng.random() < 0.2),
        int(rng.choice([0, 0, 0, 1, 2])),
        bool(rng.random() < 0.25),
        tuple(layouts),
        tuple(results),
        bool(rng.random() < 0.35),
        fused,
    )


# --- memory -----------------------------------------------------------------------------------------


def view_of(shape: tuple[int, ...], layout: str) -> View:
    """`View.of`, and layouts of wide rows."""
    if layout not in WIDE:
        return View.of(shape, layout)
    step = int(layout[4:])
    width = -(-shape[-1] // step) * step
    width += step if width == shape[-1] else 0
    wide = View.of((*shape[:-1], width))
    return View(shape, wide.strides, 0, wide.size)


class Memory:
    """Arrays of NumPy or CuPy: values from a pool of random numbers, laid out among something else.

    `any_offsets` is whether packed sequences may have any offsets, which cufa refuses where it looks at them.
    """

    def __init__(self, xp: Any, any_offsets: bool | None = None) -> None:
        self.xp = xp
        self.any_offsets = xp is not np if any_offsets is None else any_offsets
        pool = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)
        self.pool = xp.asarray(pool)

    def normal(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
        """float32 numbers of the pool, from a random place on; it is repeated where it does not suffice."""
        size = math.prod(shape)
        start = int(rng.integers(self.pool.size))
        if start + size <= self.pool.size:
            return self.pool[start : start + size].reshape(shape)
        times = -(-size // self.pool.size) + 1
        return self.xp.tile(self.pool, times)[start : start + size].reshape(shape)

    def lay_out(self, values: Any, layout: str, dtype: str, fill: float) -> Any:
        """`values`, which may have one head for all, in storage of `dtype`, with `fill` between the elements."""
        view = view_of(values.shape, layout)
        flat = self.xp.full(view.size, fill, np.float32)
        self.on(view, flat)[...] = values
        return self.on(view, flat.astype(np.dtype(dtype)))

    def on(self, view: View, flat: Any) -> Any:
        strides = [stride * flat.itemsize for stride in view.strides]
        return self.xp.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides)


class Given(NamedTuple):
    """An array to write into, the flat memory under it, and what that holds everywhere."""

    array: Any
    view: View
    flat: Any
    fill: float


# --- problems ---------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Of a problem: lengths of the slots of each sequence, and how many keys of each are live."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    used: tuple[int, ...] | None
    heads_q: int
    heads_k: int

    @property
    def live_k(self) -> tuple[int, ...]:
        return self.lengths_k if self.used is None else self.used


def sample_sizes(rng: np.random.Generator, kind: Kind, modes: Iterable[str]) -> Sizes:
    heads_k = int(rng.integers(1, 5))
    heads_q = heads_k * int(rng.choice([1, 1, 2, 4, 5]))
    if kind.fused:
        heads_q = heads_k

    def length(top: int) -> int:
        if rng.random() < 0.3:
            near = [n for n in SEQLENS if n <= top]
            return int(rng.choice(near))
        return int(rng.integers(0 if rng.random() < 0.05 else 1, top))

    tops, most = [8, 70, 200], 1 << 17
    if "long" in modes:
        tops, most = [8, 70, 200, 400, 400, 1100], 1 << 22 if rng.random() < 0.9 else 1 << 24
    count = int(rng.integers(1, 9)) if kind.varlen else int(rng.integers(1, 4))
    if kind.varlen and rng.random() < 0.1:
        count, tops = int(rng.integers(9, 60)), [4, 20, 40]
    lengths_q = [length(int(rng.choice(tops))) for _ in range(count)]
    lengths_k = [length(int(rng.choice(tops))) for _ in range(count)]
    if not kind.varlen:
        lengths_q, lengths_k = lengths_q[:1] * count, lengths_k[:1] * count
    if kind.fused:
        lengths_k = lengths_q
    # Whole score matrices are held.
    while count * heads_q * max(lengths_q) * max(lengths_k) > most:
        lengths_q, lengths_k = ([-(-n // 2) for n in lengths] for lengths in (lengths_q, lengths_k))
    used = None
    if kind.varlen and rng.random() < 0.4:
        used = tuple(int(rng.integers(0, n + 1)) for n in lengths_k)
    return Sizes(tuple(lengths_q), tuple(lengths_k), used, heads_q, heads_k)


def offsets_of(lengths: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


class Values(NamedTuple):
    """How a problem's numbers are chosen: magnitudes are powers of two."""

    name: str
    magnitudes: tuple[int, int, int, int]  # of q, k, v and dout
    softmax_scale: float | None


def sample_values(rng: np.random.Generator, kind: Kind, modes: Iterable[str]) -> Values:
    names = ["plain"] * 6 + ["rows"] * 2
    names += [name for name in ("poison", "infinite", "huge", "tiny", "constant", "largest", "loss") if name in modes]
    name = str(rng.choice(names))
    if kind.fused and name in ("constant", "largest"):
        name = "plain"
    scale = None if rng.random() < 0.6 else float(rng.choice([0.02, 0.25, 1.0]))
    wide = kind.dtype != "float16"
    q = k = v = dout = 0
    if name == "huge":
        # q·k, before and after it is scaled, stays below 2^120; dout·v and what it adds up to far below that.
        q = int(rng.integers(-40 if wide else -6, 96 if wide else 12))
        k = int(rng.integers(-40 if wide else -6, min(96, 104 - q) if wide else 12))
        v = int(rng.integers(-20 if wide else -6, 80 if wide else 13))
        dout = int(rng.integers(-10, 10)) - (v + max(0, max(q, k) - 80) if wide else 0)
    elif name == "tiny":
        # Sums of products, before they are scaled, stay within float32's normal numbers.
        q, k, v, dout = (int(rng.integers(-least, 1)) for least in ((45, 45, 25, 25) if wide else (12,) * 4))
    elif name == "largest":
        dout = -100 if wide else -8
    elif name == "loss":
        dout = int(rng.integers(4, 12))
    if name in ("huge", "tiny") and rng.random() < 0.7:
        # Scores as they usually are.
        target = float(rng.choice([0.01, 1.0, 10.0]))
        scale = min(max(target * 2.0 ** -(q + k) * kind.head_dim**-0.5, 2.0**-126), 2.0**126)
    elif "scale" in modes and name in ("plain", "rows") and rng.random() < 0.1:
        scale = 2.0 ** int(rng.choice([-126, -125, -60, -20, 20, 60, 110]))
    return Values(name, (q, k, v, dout), scale)


class Case(NamedTuple):
    """A problem with its arrays.

    Attributes
    ----------
    arrays : dict
        q, k, v and what else the forward takes, by keyword; the offsets among them.
    options : dict
        Keywords that are no arrays.
    dout, dlse : array
        dlse may be None.
    out, gradients : Given or list of Given
        Where results are to be written; None and empty if they are new.
    sizes : Sizes
        As a kernel is to read them.
    rows_q, rows_k : array of int, (batch, longest)
        Where packed rows lie; None for dense arrays.
    values : Values
    strange : bool
        Whether inputs hold NaN or Inf on purpose.
    """

    kind: Kind
    arrays: dict[str, Any]
    options: dict[str, Any]
    dout: Any
    dlse: Any
    out: Given | None
    gradients: list[Given]
    sizes: Sizes
    rows_q: Any
    rows_k: Any
    values: Values
    strange: bool
    twice: bool


def window_of(rng: np.random.Generator, kind: Kind) -> dict[str, Any]:
    if kind.mask == "none":
        return {}
    if kind.mask == "causal":
        return {"causal": True} if rng.random() < 0.8 else {"window_size": (None, 0)}
    sides = [0, 1, 5, 16, 31, 64, 65, 150, 300]
    left, right = (int(rng.choice(sides)) for _ in range(2))
    if rng.random() < 0.25:
        return {"window_size": (left, right), "causal": True}
    if rng.random() < 0.2:
        return {"window_size": (left, None)} if rng.random() < 0.5 else {"window_size": (None, right + 1)}
    return {"window_size": (left, right)}


def sides_of(options: dict[str, Any]) -> tuple[int | None, int | None]:
    left, right = options.get("window_size", (None, None))
    return left, 0 if options.get("causal") else right


def seen_rows(sizes: Sizes, options: dict[str, Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each sequence: which rows of q see a key, and which keys of its slot are seen by a row."""
    left, right = sides_of(options)
    sees, seen = [], []
    for queries, slot, live in zip(sizes.lengths_q, sizes.lengths_k, sizes.live_k, strict=True):
        own = np.arange(queries) + live - queries
        first = np.zeros_like(own) if left is None else np.maximum(own - left, 0)
        last = np.full_like(own, live - 1) if right is None else np.minimum(own + right, live - 1)
        sees.append(first <= last)
        keys = np.zeros(slot + 1, np.int64)
        np.add.at(keys, first[sees[-1]], 1)
        np.add.at(keys, last[sees[-1]] + 1, -1)
        seen.append(np.cumsum(keys)[:slot] > 0)
    return sees, seen


def pad_offsets(rng: np.random.Generator, sizes: Sizes, total_q: int, total_k: int) -> tuple[Sizes, list[np.ndarray]]:
    """Offsets with trailing zeros or totals, which make sequences of no rows."""
    more = int(rng.integers(1, 6))
    offsets = []
    for lengths in (sizes.lengths_q, sizes.lengths_k):
        own = offsets_of(lengths)
        tail = rng.choice([0, int(own[-1])], more)
        offsets.append(np.concatenate([own, tail]))
    none = (0,) * more
    used = None if sizes.used is None else (*sizes.used, *none)
    return sizes._replace(lengths_q=sizes.lengths_q + none, lengths_k=sizes.lengths_k + none, used=used), offsets


def any_offsets(rng: np.random.Generator, sizes: Sizes, total_q: int, total_k: int) -> tuple[Sizes, list[Any]]:
    """Offsets and live lengths of any content, and the sizes that they mean.

    Rows before the first offset belong to no sequence; the running maximum, within the array, counts.
    """
    found, lengths = [], []
    for own, total in ((sizes.lengths_q, total_q), (sizes.lengths_k, total_k)):
        offsets = offsets_of(own)
        for _ in range(int(rng.integers(1, 4))):
            offsets[rng.integers(len(offsets))] = rng.choice([0, -5, total, total + 7, 1 << 30, total // 2, -(1 << 31)])
        found.append(offsets)
        lengths.append(np.clip(np.maximum.accumulate(offsets), 0, total))
    slots = np.diff(lengths[1])
    used = None
    if sizes.used is not None:
        used = tuple(int(n) for n in rng.choice([-3, 0, 1, 10, total_k, 1 << 30], len(slots)))
    clamped = None if used is None else tuple(np.clip(used, 0, slots).tolist())
    meant = sizes._replace(lengths_q=tuple(np.diff(lengths[0]).tolist()), lengths_k=tuple(slots.tolist()), used=clamped)
    return meant, [*found, *lengths, used]


def index_of(starts: np.ndarray, lengths: Iterable[int], total: int) -> np.ndarray:
    """Rows of a packed array by (sequence, place); places that a sequence does not have repeat some row."""
    longest = max(1, max(lengths))
    return np.clip(starts[: len(tuple(lengths)), None] + np.arange(longest), 0, max(total - 1, 0))


def begin(problem: Problem) -> tuple[np.random.Generator, Sizes, dict[str, Any], Values]:
    """Draw what is no array, and the generator to go on with."""
    rng, kind = np.random.default_rng(problem.seed), problem.kind
    sizes = sample_sizes(rng, kind, problem.modes)
    options = window_of(rng, kind)
    if kind.softcap:
        options["softcap"] = float(rng.choice([0.5, 5.0, 15.0, 50.0]))
    values = sample_values(rng, kind, problem.modes)
    if values.softmax_scale is not None:
        options["softmax_scale"] = values.softmax_scale
    return rng, sizes, options, values


def make_case(problem: Problem, memory: Memory) -> Case:
    """Draw sizes, options and values, and lay out the arrays."""
    xp, kind = memory.xp, problem.kind
    rng, sizes, options, values = begin(problem)
    arrays: dict[str, Any] = {}
    total_q, total_k = sum(sizes.lengths_q), sum(sizes.lengths_k)
    starts = offsets_of(sizes.lengths_q), offsets_of(sizes.lengths_k)
    if kind.varlen:
        spare = [int(rng.integers(1, 40)) if "padding" in problem.modes and rng.random() < 0.15 else 0] * 2
        total_q, total_k = total_q + spare[0], total_k + (spare[0] if kind.fused else spare[1])
        given, used = [*starts], sizes.used
        if "padding" in problem.modes and rng.random() < 0.2:
            sizes, given = pad_offsets(rng, sizes, total_q, total_k)
            used = sizes.used
            starts = offsets_of(sizes.lengths_q), offsets_of(sizes.lengths_k)
        elif "offsets" in problem.modes and memory.any_offsets and rng.random() < 0.1:
            sizes, (*given, first, second, used) = any_offsets(rng, sizes, total_q, total_k)
            starts = first, second
        for name, each in (("cu_seqlens_q", given[0]), ("cu_seqlens_k", given[1]), ("seqused_k", used)):
            if each is not None:
                arrays[name] = xp.asarray(np.asarray(each).astype(np.int32))
    rows_q = rows_k = None
    if kind.varlen:
        rows_q, rows_k = index_of(starts[0], sizes.lengths_q, total_q), index_of(starts[1], sizes.lengths_k, total_k)

    batch = len(sizes.lengths_q)
    leading_q = (total_q,) if kind.varlen else (batch, sizes.lengths_q[0])
    leading_k = (total_k,) if kind.varlen else (batch, sizes.lengths_k[0])
    shapes = {
        "q": (*leading_q, sizes.heads_q, kind.head_dim),
        "k": (*leading_k, sizes.heads_k, kind.head_dim),
        "v": (*leading_k, sizes.heads_k, kind.head_dim_v),
        "dout": (*leading_q, sizes.heads_q, kind.head_dim_v),
    }
    numbers = draw_numbers(rng, memory, kind, values, shapes)
    strange = spoil(rng, problem, memory, sizes, options, starts, numbers, values)
    fill = (
        float(rng.choice([0.0, np.nan, np.inf, -np.inf, largest_of(kind.dtype)])) if "garbage" in problem.modes else 0.0
    )
    layouts = dict(zip(("q", "k", "v", "out", "dout"), kind.layouts, strict=True))
    if kind.fused:
        arrays |= fuse(memory, kind, [numbers[name] for name in "qkv"])
    else:
        arrays |= {name: memory.lay_out(numbers[name], layouts[name], kind.dtype, fill) for name in "qkv"}
    dout = memory.lay_out(numbers["dout"], layouts["dout"], kind.dtype, fill)
    per_row = (sizes.heads_q, total_q) if kind.varlen else (batch, sizes.heads_q, sizes.lengths_q[0])
    dlse = None
    if rng.random() < 0.5:
        dlse = memory.normal(rng, per_row) * np.float32(2.0 ** (values.magnitudes[2] + values.magnitudes[3]))
        if "garbage" in problem.modes and not kind.sinks and rng.random() < 0.3:  # else it counts for the sink
            keep = xp.asarray(seen_mask(sizes, options, starts, per_row, kind.varlen))
            dlse = xp.where(keep, dlse, np.float32(rng.choice([np.nan, np.inf, -np.inf])))
        dlse = memory.lay_out(dlse, str(rng.choice(["contiguous", "strided"])), "float32", fill)
    if kind.alibi:
        shape = (batch, sizes.heads_q)[-kind.alibi :]
        arrays["alibi_slopes"] = xp.asarray(rng.uniform(0, 0.5, shape).astype(np.float32))
    if kind.sinks:
        sinks = 2 * rng.standard_normal(sizes.heads_q)
        if rng.random() < 0.1:
            sinks[rng.integers(len(sinks))] = rng.choice([-np.inf, 50.0, -80.0])
        if "infinite" in problem.modes and rng.random() < 0.05:
            sinks[rng.integers(len(sinks))] = np.inf
        if values.name == "infinite" and rng.random() < 0.5:
            sinks[rng.integers(len(sinks))] = np.inf
        arrays["sinks"] = xp.asarray(sinks.astype(np.float32))
    out, gradients = None, []
    if kind.results:
        given_fill = float(rng.choice([7.0, np.inf]))
        out = given_of(memory, shapes["dout"], layouts["out"], kind.dtype, given_fill)
        gradients = [
            given_of(memory, shapes[name], layout, kind.dtype, given_fill)
            for name, layout in zip("qkv", kind.results, strict=True)
        ]
        if kind.fused:
            gradients = fused_given(memory, kind, shapes["q"], given_fill)
    twice = "twice" in problem.modes and bool(rng.random() < 0.2)
    return Case(kind, arrays, options, dout, dlse, out, gradients, sizes, rows_q, rows_k, values, strange, twice)


def seen_mask(
    sizes: Sizes, options: dict[str, Any], starts: tuple[np.ndarray, np.ndarray], shape: tuple[int, ...], varlen: bool
) -> np.ndarray:
    """Which numbers of lse or dlse belong to rows that see a key."""
    keep = np.zeros(shape, bool)
    for n, each in enumerate(seen_rows(sizes, options)[0]):
        keep[(slice(None), slice(starts[0][n], starts[0][n] + len(each))) if varlen else n] = each
    return keep


def largest_of(dtype: str) -> float:
    return float(ml_dtypes.finfo(np.dtype(dtype)).max)


def draw_numbers(
    rng: np.random.Generator, memory: Memory, kind: Kind, values: Values, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """q, k, v and dout in float32. What is broadcast has one head for all."""
    xp = memory.xp
    layouts = dict(zip(("q", "k", "v", "out", "dout"), kind.layouts, strict=True))
    numbers = {}
    for (name, shape), power in zip(shapes.items(), values.magnitudes, strict=True):
        if layouts[name] == "broadcast" and not (kind.fused and name != "dout"):
            x = xp.broadcast_to(memory.normal(rng, (*shape[:-2], 1, shape[-1])), shape)
        else:
            x = memory.normal(rng, shape)
        # Far from normal, numbers stay within a few powers of two, so that products are where they are meant to be.
        if values.name in ("huge", "tiny"):
            x = xp.clip(x, -4, 4) * np.float32(2.0**power)
        elif values.name == "loss" and name == "dout":
            x = x * np.float32(2.0**power)
        elif values.name == "largest" and name in ("v", "dout"):
            top = np.float32(largest_of(kind.dtype) if name == "v" else 2.0**power)
            # Signs of dout at random: otherwise the roundings of out add up in delta.
            x = (1 - xp.clip(xp.abs(x), 0, 4) * np.float32(0.1)) * (top if name == "v" else xp.sign(x) * top)
        elif values.name == "constant" and name != "dout":
            x = xp.full(shape, {"float16": 6e4, "bfloat16": 133120.0, "float32": 133120.0}[kind.dtype], np.float32)
        elif values.name == "constant":
            x = x * np.float32(2.0**-14)
        elif values.name == "rows" and name == "q":
            x = x * xp.where(memory.normal(rng, (*shape[:-1], 1)) > 0.7, np.float32(16), np.float32(1))
        numbers[name] = x
    return numbers


def spoil(
    rng: np.random.Generator,
    problem: Problem,
    memory: Memory,
    sizes: Sizes,
    options: dict[str, Any],
    starts: tuple[np.ndarray, np.ndarray],
    numbers: dict[str, Any],
    values: Values,
) -> bool:
    """Put NaN, Inf and the largest numbers where they must not matter, and where they must; whether there are any."""
    xp, kind = memory.xp, problem.kind
    strange = False
    if "garbage" in problem.modes and rng.random() < 0.5:
        for names, places, own in zip((("q", "dout"), "kv"), seen_rows(sizes, options), starts, strict=True):
            keep = np.zeros(numbers[names[0]].shape[: 1 if kind.varlen else 2], bool)
            for n, each in enumerate(places):
                keep[slice(own[n], own[n] + len(each)) if kind.varlen else n] = each
            if keep.all():
                continue
            strange = True
            mask = xp.asarray(keep)[..., None, None]
            for name in names:
                filler = rng.choice([np.nan, np.inf, -np.inf, largest_of(kind.dtype), -largest_of(kind.dtype)])
                numbers[name] = xp.where(mask, numbers[name], np.float32(filler))
    if values.name in ("poison", "infinite"):
        strange = True
        names = ["q", "k", "v", "dout"] if values.name == "poison" else ["q", "k"]
        for name in {str(each) for each in rng.choice(names, int(rng.integers(1, 3)))}:
            x = xp.array(numbers[name])
            for _ in range(int(rng.integers(1, 4))):
                if x.size:
                    at = tuple(int(rng.integers(n)) for n in x.shape)
                    strange_numbers = [np.nan, np.inf, -np.inf]
                    if values.name == "poison" and name in "qk":
                        strange_numbers = [np.nan]
                    x[at] = np.float32(rng.choice(strange_numbers))
            numbers[name] = x
    return strange


def fused_axes(kind: Kind, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Callable[[Any, int], Any]]:
    """The shape of an array that holds three of `shape`, and how to take one of them out of it."""
    axes = kind.fused.replace("b", "") if kind.varlen else kind.fused
    sizes = dict(zip("shd" if kind.varlen else "bshd", shape, strict=True)) | {"n": 3}
    order = [axes.replace("n", "").index(axis) for axis in ("shd" if kind.varlen else "bshd")]

    def take(whole: Any, index: int) -> Any:
        one = whole[(slice(None),) * axes.index("n") + (index,)]
        return one.transpose(order)

    return tuple(sizes[axis] for axis in axes), take


def fuse(memory: Memory, kind: Kind, numbers: list[Any]) -> dict[str, Any]:
    """q, k and v as views of one array."""
    whole_shape, take = fused_axes(kind, numbers[0].shape)
    whole = memory.xp.empty(whole_shape, np.float32)
    for index, each in enumerate(numbers):
        take(whole, index)[...] = each
    whole = whole.astype(np.dtype(kind.dtype))
    return {name: take(whole, index) for index, name in enumerate("qkv")}


def fused_given(memory: Memory, kind: Kind, shape: tuple[int, ...], fill: float) -> list[Given]:
    whole_shape, take = fused_axes(kind, shape)
    whole = memory.xp.full(whole_shape, fill, np.float32).astype(np.dtype(kind.dtype))
    return [Given(take(whole, index), View.of(()), None, fill) for index in range(3)]


def given_of(memory: Memory, shape: tuple[int, ...], layout: str, dtype: str, fill: float) -> Given:
    view = view_of(shape, layout)
    flat = memory.xp.full(view.size, fill, np.float32).astype(np.dtype(dtype))
    return Given(memory.on(view, flat), view, flat, fill)


# --- results ----------------------------------------------------------------------------------------


class Result(NamedTuple):
    """A result beside what it should be, both in float64: arguments of `exact.badness`."""

    name: str
    got: Any
    exact: Any
    noise: Any
    largest: float
    live: Any = None
    strange: Any = None
    rows: bool = False
    whole: bool = True


class Frame:
    """Brings arrays of a case into the form of `exact.Padded`."""

    def __init__(self, case: Case, xp: Any) -> None:
        self.xp, self.case = xp, case
        sizes = case.sizes
        self.batch, self.heads_k = len(sizes.lengths_q), sizes.heads_k
        self.group = sizes.heads_q // sizes.heads_k
        self.seqlen_q, self.seqlen_k = (max(1, *lengths) for lengths in (sizes.lengths_q, sizes.lengths_k))
        self.lengths_q, self.lengths_k = (
            xp.asarray(np.array(lengths)[:, None, None, None]) for lengths in (sizes.lengths_q, sizes.live_k)
        )
        self.index = [None if rows is None else xp.asarray(rows) for rows in (case.rows_q, case.rows_k)]
        self.live_q = (xp.arange(self.group * self.seqlen_q) % self.seqlen_q)[:, None] < self.lengths_q
        self.live_k = xp.arange(self.seqlen_k)[:, None] < self.lengths_k

    def _tokens(self, x: Any, index: Any, seqlen: int) -> Any:
        """(batch, seqlen, heads, ·) in float64, with a row where there is none."""
        x = exact.in_float64(x)
        if x.size == 0:
            return self.xp.zeros((self.batch, seqlen, *x.shape[-2:]))
        return x if index is None else x[index]

    def by_row(self, x: Any) -> Any:
        x = self._tokens(x, self.index[0], self.seqlen_q)
        x = x.reshape(self.batch, self.seqlen_q, self.heads_k, self.group, x.shape[-1])
        return x.transpose(0, 2, 3, 1, 4).reshape(self.batch, self.heads_k, -1, x.shape[-1])

    def by_key(self, x: Any) -> Any:
        return self._tokens(x, self.index[1], self.seqlen_k).transpose(0, 2, 1, 3)

    def by_number(self, x: Any) -> Any:
        """Of lse and dlse."""
        x = (x[None] if self.case.kind.varlen else x).swapaxes(1, 2)[..., None]  # (·, rows, heads, 1)
        return self.by_row(x[0] if self.case.kind.varlen else x)

    def by_head(self, x: Any) -> Any:
        """Of slopes, (heads,) or (batch, heads), and sinks."""
        if x is None:
            return None
        x = exact.in_float64(x).reshape(-1, self.heads_k, self.group)
        return self.xp.repeat(x, self.seqlen_q, axis=2)[..., None]

    def padded(self, q: Any, k: Any, v: Any) -> exact.Padded:
        case = self.case
        left, right = sides_of(case.options)
        scale = case.options.get("softmax_scale")
        return exact.Padded(
            xp=self.xp,
            q=q,
            k=k,
            v=v,
            seqlen_q=self.seqlen_q,
            lengths_q=self.lengths_q,
            lengths_k=self.lengths_k,
            left=left,
            right=right,
            softmax_scale=case.kind.head_dim**-0.5 if scale is None else scale,
            softcap=case.options.get("softcap", 0.0),
            slopes=self.by_head(case.arrays.get("alibi_slopes")),
            sinks=self.by_head(case.arrays.get("sinks")),
            dtype=case.kind.dtype,
        )


def call_forward(case: Case) -> tuple[Any, Any]:
    function = cufa.attention_varlen if case.kind.varlen else cufa.attention
    into = {} if case.out is None else {"out": case.out.array}
    out, lse = function(**case.arrays, **case.options, **into, return_lse=True)
    assert case.out is None or out is case.out.array
    return out, lse


def call_backward(case: Case, out: Any, lse: Any) -> tuple[Any, ...]:
    function = cufa.attention_varlen_backward if case.kind.varlen else cufa.attention_backward
    into = {f"d{name}": each.array for name, each in zip("qkv", case.gradients, strict=False)}
    given = case.arrays | into | ({} if case.dlse is None else {"dlse": case.dlse})
    found: tuple[Any, ...] = function(
        case.dout, out=out, lse=lse, **given, **case.options, deterministic=case.kind.deterministic
    )
    return found


def differentiated(case: Case) -> bool:
    """Whether gradients mean anything: not where a lse in float32 holds no bits behind the point, from which and the
    scores probabilities are computed again."""
    if case.values.name == "constant":
        return False
    q, k, *_ = case.values.magnitudes
    scale = case.options.get("softmax_scale", case.kind.head_dim**-0.5)
    return "softcap" in case.options or q + k + math.log2(scale * case.kind.head_dim**0.5) <= LARGE_SCORES


LARGE_SCORES = 14
"""Power of two of scores beyond which gradients are not looked at."""


def results_of(case: Case, xp: Any) -> Iterator[Result]:
    """Call, and say what everything that came out should be."""
    out, lse = call_forward(case)
    gradients = call_backward(case, out, lse) if differentiated(case) else ()
    frame = Frame(case, xp)
    q, dout = frame.by_row(case.arrays["q"]), frame.by_row(case.dout)
    k, v = frame.by_key(case.arrays["k"]), frame.by_key(case.arrays["v"])
    spread = exact.Spread(*[None] * 6)
    poison = None
    if case.strange:
        if case.values.name == "poison":
            poison = exact.Poison(*(~xp.isfinite(x) for x in (q, k, v, dout)))
        if case.values.name != "infinite":
            q, k = (xp.where(xp.isfinite(x), x, 0) for x in (q, k))
        v, dout = (xp.where(xp.isfinite(x), x, 0) for x in (v, dout))
    padded = frame.padded(q, k, v)
    right = exact.forward(padded)
    if poison is not None:
        spread = exact.spread(xp, right.keep, poison)
    largest, largest32 = largest_of(case.kind.dtype), largest_of("float32")
    varied = case.values.name != "constant"  # otherwise all err alike
    known = right.out_noise, largest, frame.live_q, spread.out, varied, varied
    yield Result("out", frame.by_row(out), right.out, *known)
    known = right.lse_noise, largest32, frame.live_q, spread.lse, False, varied
    yield Result("lse", frame.by_number(lse), right.lse, *known)
    yield from rest(case, xp, "out", out, case.out, lse)
    if gradients:
        dlse = None if case.dlse is None else frame.by_number(case.dlse)
        if case.values.name == "infinite":
            padded, right, spread = exact.from_infinite_scores(padded, right)
        back = exact.backward(padded, right, dout, dlse)
        got = frame.by_row(gradients[0]), frame.by_key(gradients[1]), frame.by_key(gradients[2])
        lives = frame.live_q, frame.live_k, frame.live_k
        for name, found, each, around, live, strange in zip(
            ("dq", "dk", "dv"), got, back.exact, back.noise, lives, spread[2:], strict=False
        ):
            yield Result(name, found, each, around, largest, live, strange)
        if case.kind.sinks and not case.strange:
            yield sinks_result(frame, back, gradients[3], largest32)
        for name, found, given in zip("qkv", gradients, case.gradients or [None] * 3, strict=False):
            yield from rest(case, xp, f"d{name}", found, given)
    if case.twice:
        yield from again(case, xp, out, lse, gradients)


def sinks_result(frame: Frame, back: exact.Backward, found: Any, largest: float) -> Result:
    shape = frame.batch, frame.heads_k, frame.group, frame.seqlen_q
    total, noise = (frame.xp.where(frame.live_q, each[3], 0).reshape(shape) for each in (back.exact, back.noise))
    total = total.sum(axis=(0, 3)).ravel()
    noise = frame.xp.sqrt((noise**2).sum(axis=(0, 3))).ravel()
    noise = noise + exact.COMPUTE_UNIT * frame.xp.abs(total) + float(np.finfo(np.float32).tiny)
    return Result("dsinks", exact.in_float64(found), total, noise, largest)


def rest(case: Case, xp: Any, name: str, found: Any, given: Given | None, lse: Any = None) -> Iterator[Result]:
    """Rows that are no sequence's, which are 0 if new, and memory that is not the array's."""
    if case.kind.varlen and found.size:
        starts, lengths = (
            (case.rows_q, case.sizes.lengths_q)
            if name in ("out", "dq")
            else (
                case.rows_k,
                case.sizes.live_k,
            )
        )
        alone = np.ones(found.shape[0], bool)
        for row, length in zip(starts, lengths, strict=True):
            alone[row[:length]] = False
        if alone.any():
            value = given.fill if name == "out" and given is not None else 0.0
            alone = xp.asarray(alone)
            yield same(xp, f"{name} beyond", exact.in_float64(found), value, alone[:, None, None])
            if lse is not None:
                yield same(xp, "lse beyond", exact.in_float64(lse), -np.inf, alone)
    if given is not None and given.flat is not None:
        outside = xp.ones(given.view.size, bool)
        xp.lib.stride_tricks.as_strided(outside[given.view.offset :], given.view.shape, given.view.strides)[...] = False
        yield same(xp, f"memory around {name}", exact.in_float64(given.flat), given.fill, outside)


def same(xp: Any, name: str, found: Any, value: Any, where: Any = True) -> Result:
    """Equal, NaN to NaN."""
    equal = (found == value) | (xp.isnan(found) & xp.isnan(xp.asarray(value, np.float64)))
    wrong = (where & ~equal).astype(np.float64)
    return Result(name, wrong, xp.zeros_like(wrong), xp.full_like(wrong, 1e-9), 1.0)


def again(case: Case, xp: Any, out: Any, lse: Any, gradients: tuple[Any, ...]) -> Iterator[Result]:
    """The same bits, but for dq where they are not promised."""
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    first = [exact.in_float64(each) for each in (out, lse, *gradients)]  # copies: what is given is written again
    out, lse = call_forward(case)
    found = out, lse, *(call_backward(case, out, lse) if gradients else ())
    for name, once, twice in zip(names, first, found, strict=False):
        if name != "dq" or case.kind.deterministic:
            yield same(xp, f"{name} again", exact.in_float64(twice), once)


def measure(problem: Problem, memory: Memory) -> tuple[list[str], Any]:
    """Names of the results, and how bad each is; above 1 it is wrong."""
    case = make_case(problem, memory)
    if memory.xp is np:
        with np.errstate(all="ignore"):
            return _measure(case, np)
    return _measure(case, memory.xp)


def _measure(case: Case, xp: Any) -> tuple[list[str], Any]:
    names, found = [], []
    for name, *arguments, rows, whole in results_of(case, xp):
        names.append(name)
        found.append(exact.badness(xp, *arguments, rows=rows, whole=whole) if arguments[0].size else xp.zeros(()))
    return names, xp.stack(found)


def tell(problem: Problem, memory: Memory) -> str:
    """All about a problem: sizes, options, and the worst element of every result that is wrong."""
    xp = memory.xp
    case = make_case(problem, memory)
    lines = [str(problem), f"{case.sizes}", f"{case.options} {case.values} strange={case.strange}"]
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "sinks"):
        if name in case.arrays:
            lines.append(f"{name} {case.arrays[name].tolist()}")
    with np.errstate(all="ignore"):
        for name, got, right, noise, largest, live, strange, rows, whole in results_of(case, xp):
            if got.size == 0:
                continue
            bad = float(exact.badness(xp, got, right, noise, largest, live, strange, rows=rows, whole=whole))
            lines.append(f"{name}: {bad:.3g} of what is allowed")
            if not bad <= 1:
                z = xp.abs(got - right) / noise
                z = xp.where((got == right) | (xp.isnan(got) & xp.isnan(right)), 0, xp.where(xp.isnan(z), np.inf, z))
                if strange is not None:
                    z = xp.where(strange, xp.where(xp.isfinite(got), np.inf, 0), z)
                z = z if live is None else xp.where(live, z, 0)
                at = np.unravel_index(int(z.argmax()), z.shape)
                count = int((z > exact.limit(1)).sum())
                worst = ", ".join(
                    f"{x} {float(xp.broadcast_to(each, z.shape)[at]):.9g}"
                    for x, each in (
                        ("got", got),
                        ("expected", right),
                        ("noise", noise),
                        ("strange", xp.zeros(()) if strange is None else strange),
                    )
                )
                lines.append(f"  {count} of {z.size} elements; worst {[int(i) for i in at]} of {z.shape}: {worst}")
    return "\n".join(lines)


# --- kernels ----------------------------------------------------------------------------------------


class _Noted(Exception):
    def __init__(self, plan: Plan) -> None:
        self.plan = plan


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """Let calls end where they have chosen their kernel, with that in an exception."""
    kept = operations.choose

    def note(*arguments: Any) -> Plan:
        raise _Noted(kept(*arguments))

    operations.choose = note  # type: ignore[assignment]
    try:
        yield
    finally:
        operations.choose = kept


@contextlib.contextmanager
def generic() -> Iterator[None]:
    """Let calls be served by the kernel for every GPU."""
    kept = operations.choose
    operations.choose = lambda kernels, static, arch: kept(kernels, static._replace(tma=False), arch)
    try:
        yield
    finally:
        operations.choose = kept


def plans_of(problem: Problem, memory: Memory) -> list[Plan]:
    """The kernels that a problem takes; none that fails, since it fails again."""
    found = []
    case = make_case(problem, memory)
    xp = memory.xp
    lse = xp.empty(case.dout.shape[:-1], np.float32)
    lse = xp.empty(lse.swapaxes(-1, -2).shape, np.float32)
    out = memory.lay_out(xp.zeros(case.dout.shape, np.float32), case.kind.layouts[3], case.kind.dtype, 0.0)
    for call in (lambda: call_forward(case), lambda: call_backward(case, out, lse)):
        try:
            with noting():
                call()
        except _Noted as noted:
            found.append(noted.plan)
        except Exception:
            continue
    return found


def sample_kinds(rng: np.random.Generator, memory: Memory, kernels: int, modes: tuple[str, ...]) -> list[Kind]:
    """Kinds until they take so many kernels, which are compiled. Sizes decide too: several of every kind are asked."""
    if memory.xp is np:
        return [sample_kind(rng, modes) for _ in range(2 * kernels)]
    kinds: list[Kind] = []
    plans: dict[Plan, None] = {}
    while len(plans) < kernels and len(kinds) < 2 * kernels:
        kinds.append(sample_kind(rng, modes))
        for seed in range(8):
            plans |= dict.fromkeys(plans_of(Problem(kinds[-1], seed, modes), memory))
    workers = max(1, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool:
        list(
            tqdm(
                pool.map(lambda plan: _jit.entry_of(_jit.unit_of(plan)), plans),
                total=len(plans),
                desc="compile",
                disable=None,
            )
        )
    return kinds


def forget() -> None:
    """Drop the launches that are remembered with problems."""
    from cufa._call import problem as _problem

    _problem._checked.cache_clear()


# --- running ----------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """A problem that is wrong, and how."""

    problem: str
    what: str
    group: str


class Report(NamedTuple):
    count: int
    failures: list[Failure]

    def __str__(self) -> str:
        groups = collections.Counter(failure.group for failure in self.failures)
        lines = [f"{len(self.failures)} of {self.count} problems are wrong"]
        lines += [f"{number:6} {group}" for group, number in groups.most_common()]
        shown: collections.Counter[str] = collections.Counter()
        for failure in sorted(self.failures, key=lambda failure: -groups[failure.group]):
            shown[failure.group] += 1
            if shown[failure.group] <= max(1, LISTED // len(groups)) and sum(shown.values()) <= 2 * LISTED:
                lines += ["", failure.problem, f"  {failure.what}"]
        return "\n".join(lines)


def failure_of(problem: Problem, wrong: dict[str, float]) -> Failure:
    kind = problem.kind
    what = ", ".join(f"{name} {value:.3g}" for name, value in wrong.items())
    values = begin(problem)[-1].name
    return Failure(str(problem), f"times what is allowed: {what}", f"{' '.join(wrong)}: {values}, {kind.dtype}")


def soak(
    memory: Memory,
    count: int,
    seed: int,
    *,
    kernels: int = 150,
    modes: tuple[str, ...] = MODES,
    seconds: float = math.inf,
    share: tuple[int, int] = (0, 1),
    check: Callable[[Problem, Memory], tuple[list[str], Any]] = measure,
) -> Report:
    """Run `count` problems, or as many as there is time for; of several shares only one."""
    began = time.monotonic()
    rng = np.random.default_rng(seed)
    pending: list[tuple[Problem, list[str], Any]] = []
    at: list[Any] = [began, "compiling"]
    _watch(at, pending)
    kinds = sample_kinds(rng, memory, kernels, modes)
    seeds = rng.integers(0, 1 << 31, count)[share[0] :: share[1]]
    failures: list[Failure] = []
    done = 0
    for index, own in enumerate(tqdm(seeds, desc="problems", disable=None)):
        problem = Problem(kinds[(index * share[1] + share[0]) % len(kinds)], int(own), modes)
        at[:] = time.monotonic(), str(problem)
        try:
            pending.append((problem, *check(problem, memory)))
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            failures.append(Failure(str(problem), f"raises {text}", f"raises {text[:70]}"))
            end_if_the_gpu_is_lost(memory, problem, pending)
        if len(pending) == BATCH:
            failures += look(pending, memory)
            at[0] = time.monotonic()
            if memory.xp is not np:  # sizes differ so much that little is used again
                pool = memory.xp.get_default_memory_pool()
                if pool.total_bytes() > KEPT_BYTES:
                    pool.free_all_blocks()
        done += 1
        if time.monotonic() - began > seconds:
            break
    failures += look(pending, memory)
    at[1] = ""
    return Report(done, failures)


def look(pending: list[tuple[Problem, list[str], Any]], memory: Memory) -> list[Failure]:
    """Wait for results, and find those that are wrong."""
    failures = []
    for problem, names, found in pending:
        found = found if memory.xp is np else found.get()
        wrong = {name: float(value) for name, value in zip(names, found, strict=True) if not value <= 1}
        if wrong:
            failures.append(failure_of(problem, wrong))
            if memory.xp is not np:
                print(f"\n{failures[-1].problem}\n  {failures[-1].what}", file=sys.stderr, flush=True)
    pending.clear()
    return failures


def end_if_the_gpu_is_lost(memory: Memory, problem: Problem, pending: list[Any]) -> None:
    """After a fault on the GPU nothing works any more: say which problems were under way."""
    if memory.xp is np:
        return
    try:
        memory.xp.cuda.Device().synchronize()
    except Exception as error:
        running = "\n".join(str(each[0]) for each in [*pending, (problem,)])
        sys.exit(f"the GPU is lost: {error}\nOne of these did it:\n{running}")


def _watch(at: list[Any], pending: list[Any]) -> None:
    """End the process, saying which problems were under way, when nothing has gone on for too long."""

    def run() -> None:
        while at[1]:
            time.sleep(1)
            limit = 5 * HANG_SECONDS if at[1] == "compiling" else HANG_SECONDS
            if at[1] and time.monotonic() - at[0] > limit:
                running = "\n".join([*(str(each[0]) for each in pending), str(at[1])])
                os.write(2, f"\nOne of these hangs:\n{running}\n".encode())
                os._exit(70)

    threading.Thread(target=run, daemon=True).start()


# --- both kernels -----------------------------------------------------------------------------------

TOLERANCE = {"float16": 2e-3, "bfloat16": 1.2e-2}
"""Relative, by Frobenius' norm: both kernels round P and the output to the dtype, at different moments."""


def agreement(problem: Problem, memory: Memory) -> tuple[list[str], Any]:
    """A GPU's own kernel beside the one for every GPU: differences of out and lse over what is allowed."""
    xp = memory.xp
    case = make_case(problem, memory)
    if case.kind.dtype == "float32" or case.dout.size == 0:
        return [], xp.zeros(0)
    forget()
    out, lse = (exact.in_float64(each) for each in call_forward(case))
    with generic():
        forget()
        expected, expected_lse = (exact.in_float64(each) for each in call_forward(case))
    forget()
    norm = xp.linalg.norm(expected.ravel())
    apart = xp.linalg.norm((out - expected).ravel()) / (TOLERANCE[case.kind.dtype] * norm + 1e-6)
    elsewhere = 2 * (xp.isneginf(lse) != xp.isneginf(expected_lse)).astype(np.float64).max()
    gap = xp.nan_to_num(xp.abs(lse - expected_lse)).max() / 2e-3
    return ["out", "lse -inf", "lse"], xp.stack([apart, elsewhere, gap])


# --- command line -----------------------------------------------------------------------------------


def in_shares(arguments: argparse.Namespace, command: list[str], seconds: float) -> Report:
    """Let so many processes share the problems; kernels are compiled already."""
    command = [*command, "--seconds", str(max(1.0, seconds)), "--share"]
    runs = [
        subprocess.Popen([*command, f"{index}/{arguments.workers}"], stdout=subprocess.PIPE, text=True)
        for index in range(arguments.workers)
    ]
    count, failures = 0, []
    for run in runs:
        text, _ = run.communicate()
        try:
            found = json.loads(text.splitlines()[-1])
        except (IndexError, ValueError):
            failures.append(Failure("", f"a process ended with status {run.returncode}", "processes"))
            continue
        count += found["count"]
        failures += [Failure(*each) for each in found["failures"]]
    return Report(count, failures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop then; compiling counts")
    parser.add_argument("--kernels", type=int, default=150, help="how many to compile")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the problems")
    parser.add_argument("--without", default="", help=f"modes to leave out, by commas: {', '.join(MODES)}")
    parser.add_argument("--only", default="", help="modes to have, by commas, and no others; 'none' for none")
    parser.add_argument("--agree", action="store_true", help="hold the GPU's own kernel to the one for every GPU")
    parser.add_argument("--generic", action="store_true", help="let the kernel for every GPU serve all")
    parser.add_argument("--repeat", help="one problem, as a failure printed it")
    parser.add_argument("--cpu", action="store_true", help="NumPy arrays")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asked = set(filter(None, f"{arguments.without},{arguments.only}".split(","))) - {"none"}
    if asked - set(MODES):
        parser.error(f"there is no mode {sorted(asked - set(MODES))}; there are {', '.join(MODES)}")
    modes = tuple(
        mode
        for mode in MODES
        if mode not in arguments.without.split(",") and (not arguments.only or mode in arguments.only.split(","))
    )
    if arguments.agree:
        modes = tuple(mode for mode in modes if mode in ("wide", "padding", "tiny"))
    xp: Any = np
    if not arguments.cpu:
        import cupy as xp
    memory = Memory(xp)
    with generic() if arguments.generic else contextlib.nullcontext():
        if arguments.repeat:
            print(tell(eval(arguments.repeat, globals()), memory))
            return
        began = time.monotonic()
        check = agreement if arguments.agree else measure
        share = tuple(map(int, arguments.share.split("/"))) if arguments.share else (0, 1)
        if arguments.workers > 1 and not arguments.share:
            sample_kinds(np.random.default_rng(arguments.seed), memory, arguments.kernels, modes)
            command = [sys.executable, str(Path(__file__)), *sys.argv[1:]]
            report = in_shares(arguments, command, arguments.seconds - (time.monotonic() - began))
        else:
            report = soak(
                memory,
                arguments.count,
                arguments.seed,
                kernels=arguments.kernels,
                modes=modes,
                seconds=arguments.seconds,
                share=share,
                check=check,
            )
    if arguments.share:
        print(json.dumps(report._asdict()))
        return
    print(report)
    print(f"{report.count} problems in {time.monotonic() - began:.0f} s")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()

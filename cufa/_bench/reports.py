"""Rows of the benchmarks, and reports of what they measured: tables, CSV and plots. Nothing here needs a GPU."""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BASELINE = "FA2 (torch)"
LADDER_HEAD_DIMS = (64, 128, 256)
FORWARD_SEQLENS = (512, 2048, 8192, 16384)
BACKWARD_SEQLENS = (512, 2048, 8192)

COLORS = {
    "cufa": "C0",
    BASELINE: "C1",
    "cuDNN (torch)": "C2",
    "FA3": "C3",
    "cuDNN (JAX)*": "C4",
    "FlexAttention": "C5",
    "FA4": "C6",
    "flash-attn": "C7",
    "memory-efficient (torch)": "C8",
    "FA2, packed": "C9",
    "cufa, dense": "black",
    "cufa, plan": "navy",
    "cufa, prefix": "teal",
    "FA3, plan": "darkred",
    "cufa, function": "deepskyblue",
    "cufa, BlockMask": "blue",
    "cufa, packed": "mediumpurple",
    "cufa, plain": "silver",
}
"""The color of each peer in every panel of every plot."""

CEILING = "8192³ matmul"
"""The line of a large matrix product in the plots."""

NAME_INCHES = 2.4
"""What a name takes of a plot's width."""


class Row(NamedTuple):
    """One rung of the ladder.

    `window` keys before its own are seen by a row of q, beside causality; None is all of them. With `lengths` the
    sequences are packed, and batch and seqlen only tell how many there are and how long one is on average. There are
    as many keys as queries unless `seqlen_k` says otherwise; the last query then still sees the last key.
    """

    head_dim: int
    seqlen: int
    batch: int
    num_heads_q: int
    num_heads_k: int
    causal: bool
    window: int | None = None
    lengths: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    deterministic: bool = False
    seqlen_k: int | None = None

    @property
    def flop(self) -> float:
        """Floating-point operations of the forward."""
        lengths = self.lengths or (self.seqlen,) * self.batch
        if self.seqlen_k is None:
            pairs = sum(self._pairs(length) for length in lengths)
        else:
            pairs = self.batch * self._pairs_of(self.seqlen, self.seqlen_k)
        return 4.0 * pairs * self.num_heads_q * self.head_dim

    def _pairs(self, length: int) -> float:
        """Pairs of a query and a key it sees; half of all under a causal mask."""
        if self.window is None:
            return length**2 / 2 if self.causal else length**2
        reach = min(length, self.window + 1)
        return reach * (reach + 1) / 2 + (length - reach) * reach

    def _pairs_of(self, queries: int, keys: int) -> float:
        """The same where there are not as many keys as queries. Queries before the first key see nothing."""
        assert self.window is None
        if not self.causal:
            return queries * keys
        return keys**2 / 2 if keys <= queries else queries * (keys - queries / 2)

    @property
    def mask(self) -> str:
        if self.window is not None:
            return f"window {self.window}"
        return "causal" if self.causal else "full"

    @property
    def on_the_ladder(self) -> bool:
        return self in ladder((self.seqlen,))

    def __str__(self) -> str:
        packed = f" {self.batch} packed" if self.lengths else ""
        dtype = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        deterministic = " deterministic" if self.deterministic else ""
        heads = f"{self.num_heads_q}/{self.num_heads_k}"
        keys = "" if self.seqlen_k is None else f" over {self.seqlen_k}"
        return f"hd{self.head_dim} {self.seqlen}{keys}{packed} {heads} {self.mask}{dtype}{deterministic}"


Results = dict[Row, dict[str, float]]


def rungs(head_dims: Iterable[int], seqlens: Iterable[int], masks: Iterable[bool] = (False, True)) -> list[Row]:
    """About 16k tokens of hidden size 2048 at every length; `masks` are whether a row is causal."""
    return [
        Row(head_dim, seqlen, max(16384 // seqlen, 1), *(max(2048 // head_dim, 1),) * 2, causal)
        for head_dim, seqlen, causal in itertools.product(head_dims, seqlens, masks)
    ]


def ladder(seqlens: Iterable[int]) -> list[Row]:
    """The rungs of the ladder, and a grouped-head row."""
    return rungs(LADDER_HEAD_DIMS, seqlens) + [Row(128, 4096, 4, 32, 8, causal) for causal in (False, True)]


def beside_the_ladder() -> list[Row]:
    """Other head_dims, a sliding window, and packed sequences of mixed lengths with, for comparison, equal ones."""
    rows = [
        Row(head_dim, seqlen, 16384 // seqlen, heads, heads, causal)
        for head_dim, heads in ((96, 20), (192, 10))
        for seqlen in (2048, 8192)
        for causal in (False, True)
    ]
    rows += [Row(head_dim, 16384, 1, 2048 // head_dim, 2048 // head_dim, True, 1024) for head_dim in LADDER_HEAD_DIMS]
    rows += [Row(64, 32768, 1, 64, 8, True, 1024)]
    lengths = tuple(int(length) for length in np.random.default_rng(0).integers(100, 8000, 64))
    mean = sum(lengths) // 64
    for causal in (False, True):
        rows += [Row(128, mean, 64, 8, 8, causal, None, lengths), Row(128, mean, 64, 8, 8, causal)]
    return rows


def single_precision() -> list[Row]:
    """Rows in float32."""
    rungs_of = itertools.product(LADDER_HEAD_DIMS, (False, True))
    return [Row(head_dim, 4096, 2, 8, 8, causal, dtype="float32") for head_dim, causal in rungs_of]


def cliffs() -> list[Row]:
    """Shapes that are easily slow: rows without keys, short sequences, packed or not, and odd head_dims."""
    masks = (False, True)
    mixed = tuple(int(length) for length in np.random.default_rng(0).integers(1, 64, 4096))
    return [
        *(Row(128, 16384, 2, 16, 16, causal, seqlen_k=128) for causal in masks),
        *(Row(64, 16, 16384, 8, 8, causal, lengths=(16,) * 16384) for causal in masks),
        *(Row(head_dim, 2048, 4, 16, 16, causal) for head_dim in (33, 65, 100, 129) for causal in masks),
        *(Row(64, 16, 4096, 16, 16, causal) for causal in masks),
        *(Row(64, 16, 65536, 2, 2, causal) for causal in masks),
        *(Row(64, 2, 65536, 8, 8, causal) for causal in masks),
        Row(64, sum(mixed) // len(mixed), len(mixed), 8, 8, True, lengths=mixed),
        Row(64, 20, 2049, 8, 8, True, lengths=(8192, *(16,) * 2048)),
    ]


def split(results: Results) -> tuple[Results, Results, Results, Results]:
    """What is on the ladder, what is beside it in bfloat16, what is in float16 and what in float32."""
    parts: dict[str, Results] = {"ladder": {}, "bfloat16": {}, "float16": {}, "float32": {}}
    for row, speeds in results.items():
        parts["ladder" if row.on_the_ladder else row.dtype][row] = speeds
    return parts["ladder"], parts["bfloat16"], parts["float16"], parts["float32"]


# --- reports ----------------------------------------------------------------------------------------

LABELS = ("head_dim", "seqlen", "batch", "heads q/kv", "mask")


def labels(row: Row) -> list[str]:
    """What a table's line begins with, as LABELS say."""
    packed = f"{row.batch}, packed" if row.lengths else str(row.batch)
    seqlen = str(row.seqlen) if row.seqlen_k is None else f"{row.seqlen} over {row.seqlen_k}"
    return [str(row.head_dim), seqlen, packed, f"{row.num_heads_q}/{row.num_heads_k}", row.mask]


def markdown(head: list[str], lines: list[list[str]]) -> list[str]:
    text = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    return [text[0], "|" + "---|" * len(head), *text[1:]]


def cell(row: Row, name: str, speeds: dict[str, float], eager: set[tuple[Row, str]]) -> str:
    """A peer's TFLOP/s on a row, marked if it could not be captured."""
    return f"{speeds[name]:.0f}{'†' * ((row, name) in eager)}" if name in speeds else "–"


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def names_in(results: Results, peers: Collection[str]) -> list[str]:
    """Those of `peers` that were measured on any row."""
    return [name for name in peers if any(name in speeds for speeds in results.values())]


def table(results: Results, peers: Collection[str], eager: set[tuple[Row, str]]) -> str:
    """The rows as Markdown, with cufa over the baseline and over the best peer."""
    names = names_in(results, peers)
    lines = []
    to_baseline: list[float] = []
    to_best: list[float] = []
    for row, speeds in results.items():
        others = [value for name, value in speeds.items() if name != "cufa"]
        cells = [*labels(row), *(cell(row, name, speeds, eager) for name in names)]
        for base, ratios in ((speeds.get(BASELINE), to_baseline), (max(others, default=None), to_best)):
            if base is None or "cufa" not in speeds:
                cells.append("–")
                continue
            ratios.append(speeds["cufa"] / base)
            cells.append(f"{ratios[-1]:.2f}×")
        lines.append(cells)
    text = markdown([*LABELS, *names, f"cufa / {BASELINE}", "cufa / best peer"], lines)
    if to_baseline:
        text += [
            "",
            f"cufa / {BASELINE}: geometric mean {geometric_mean(to_baseline):.3f}×, least {min(to_baseline):.2f}×. "
            f"cufa / best peer: geometric mean {geometric_mean(to_best):.3f}×, least {min(to_best):.2f}×.",
        ]
    return "\n".join(text) + "\n"


def times(results: Results, peers: Collection[str], eager: set[tuple[Row, str]], work: float, limit: float) -> str:
    """The rows as Markdown, in microseconds, with cufa's time over that of the fastest peer but cufa itself."""
    names = names_in(results, peers)
    lines = []
    ratios: dict[Row, float] = {}
    for row, speeds in results.items():
        cells = labels(row)
        for name in names:
            time = (
                f"{work * row.flop / speeds[name] / 1e6:.1f}{'†' * ((row, name) in eager)}" if name in speeds else "–"
            )
            cells.append(time)
        others = [value for name, value in speeds.items() if not is_ours(name)]
        if others and "cufa" in speeds:
            ratios[row] = max(others) / speeds["cufa"]
        lines.append([*cells, f"{ratios[row]:.2f}×" if row in ratios else "–"])
    text = markdown([*LABELS, *names, "cufa / best peer, time"], lines)
    if ratios:
        above = sum(ratio > limit for ratio in ratios.values())
        text += ["", f"Greatest {max(ratios.values()):.2f}×; {above} of {len(ratios)} rows above {limit}×."]
    return "\n".join(text) + "\n"


def plot(results: Results, ceiling: float, title: str, path: Path) -> None:
    """Write `figure_of` of the ladder to a file."""
    figure = figure_of({row: speeds for row, speeds in results.items() if row.on_the_ladder}, ceiling, title)
    if figure is not None:
        figure.savefig(path, dpi=120)


def figure_of(results: Results, ceiling: float | None, title: str) -> Any:
    """TFLOP/s over seqlen, one panel a head_dim and mask; grouped heads are left out. A ceiling is a line across.

    Returns
    -------
    matplotlib.figure.Figure or None
        None if there is nothing to draw.
    """
    from matplotlib.figure import Figure

    results = {row: speeds for row, speeds in results.items() if row.num_heads_q == row.num_heads_k}
    head_dims = sorted({row.head_dim for row in results})
    if not head_dims:
        return None
    check_colors({name for speeds in results.values() for name in speeds})
    figure = Figure(figsize=(4 * len(head_dims), 7), layout="constrained")
    axes = figure.subplots(2, len(head_dims), sharex=True, sharey=True, squeeze=False)
    for line, causal in enumerate((False, True)):
        for column, head_dim in enumerate(head_dims):
            axis = axes[line][column]
            _draw(
                axis, {row: each for row, each in results.items() if (row.head_dim, row.causal) == (head_dim, causal)}
            )
            if ceiling is not None:
                axis.axhline(ceiling, color="grey", linestyle=":", label=CEILING)
            axis.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}")
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if line:
                axis.set_xlabel("seqlen (16k tokens in all)")
            if not column:
                axis.set_ylabel("TFLOP/s")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    shown = [name for name in (*COLORS, CEILING) if name in handles]
    columns = min(len(shown), max(1, int(figure.get_figwidth() / NAME_INCHES)))
    figure.legend([handles[name] for name in shown], shown, loc="outside lower center", ncols=columns)
    figure.suptitle(title)
    return figure


def _draw(axis: Any, results: Results) -> None:
    """A line for each peer, from the shortest sequences to the longest."""
    for name, color in COLORS.items():
        points = sorted((row.seqlen, speeds[name]) for row, speeds in results.items() if name in speeds)
        if points:
            width = 3 if name == "cufa" else 1.5
            axis.plot(*zip(*points, strict=True), marker="o", color=color, linewidth=width, label=name)


def is_ours(name: str) -> bool:
    """Whether what is measured under this name is cufa, in one way or another."""
    return name.startswith("cufa")


def check_colors(peers: Collection[str]) -> None:
    """Raise if a peer has no color: it would not be told apart in the plots."""
    for name in peers:
        if name not in COLORS:
            raise ValueError(f"the peer {name!r} has no color; give it one in COLORS.")


def write_rows(results: Results, peers: Collection[str], path: Path) -> None:
    """Results as CSV, a line a row."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["packed" if field == "lengths" else field for field in Row._fields] + [*peers])
        for row, speeds in results.items():
            fields = row._asdict() | {"lengths": row.lengths is not None}
            writer.writerow([*fields.values(), *(f"{speeds[name]:.2f}" if name in speeds else "" for name in peers)])


def read_rows(path: Path) -> Results:
    """What `write_rows` wrote, also by earlier versions; packed rows, whose lengths are not told, are left out."""
    results: Results = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            if line.pop("packed") == "True":
                continue
            fields = {name: _parsed(name, line.pop(name)) for name in Row._fields if name in line}
            results[Row(**fields)] = {name: float(speed) for name, speed in line.items() if speed}
    return results


def _parsed(field: str, text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    return text if field == "dtype" else int(text) if text else None

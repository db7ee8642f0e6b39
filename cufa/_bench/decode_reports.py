"""Few queries over long caches of keys, as in serving: cases, and reports of what was measured. No GPU is needed here.

The queries of a case are the last rows of their sequences. A call reads the keys and values of a cache once, so most
cases are measured in bytes, and held to what this GPU reads at best in the same run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .reports import COLORS, check_colors, is_ours, markdown

OWN_KEYS = 256
"""Keys of each sequence behind a shared prefix."""

MANY_ROWS = 64
"""From so many queries on, a case is measured in floating-point operations."""


class Case(NamedTuple):
    """Sequences of some `lengths`, all with `seqlen_q` queries, their keys in caches.

    `page_size` is 0 where the caches are contiguous; pages are shuffled. The first `prefix` keys are the same for all
    sequences, in the same pages.
    """

    lengths: tuple[int, ...]
    num_heads_q: int = 32
    num_heads_k: int = 8
    seqlen_q: int = 1
    page_size: int = 0
    prefix: int = 0
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def uniform(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def causal(self) -> bool:
        return self.seqlen_q > 1

    @property
    def kind(self) -> str:
        """The heading under which it is reported."""
        if self.prefix:
            return "A shared prefix"
        if self.seqlen_q > 1:
            return "Many query rows" if self.seqlen_q >= MANY_ROWS else "A few query rows"
        if not self.uniform:
            return "Mixed lengths"
        return "Pages" if self.page_size else "Contiguous caches"

    @property
    def bytes(self) -> int:
        """Of the keys and values that a call has to read at least: each once."""
        keys = self.prefix + sum(length - self.prefix for length in self.lengths)
        return keys * self.num_heads_k * 2 * self.head_dim * (4 if self.dtype == "float32" else 2)

    @property
    def flop(self) -> float:
        """Floating-point operations; a query sees the keys up to its own."""
        rows = self.seqlen_q
        pairs = sum(rows * length - rows * (rows - 1) / 2 for length in self.lengths)
        return 4.0 * pairs * self.num_heads_q * self.head_dim

    def __str__(self) -> str:
        longest = max(self.lengths)
        keys = _thousands(longest) if self.uniform else f"1–{_thousands(longest)}"
        if self.prefix:
            keys = f"({_thousands(self.prefix)} shared + {longest - self.prefix})"
        words = [f"{self.batch} × {keys}, {self.num_heads_q}/{self.num_heads_k}"]
        if self.seqlen_q > 1:
            words.append(f"{self.seqlen_q} rows")
        if self.page_size:
            words.append(f"pages of {self.page_size}")
        return ", ".join(words)


def _thousands(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def cases() -> list[Case]:
    """What a server meets, in the order in which it is measured."""
    k = 1024
    mixed = (*np.random.default_rng(1).integers(1, 32 * k, 63, endpoint=True).tolist(), 32 * k)
    four = (4 * k,) * 64
    return [
        Case((k,)),
        Case((8 * k,)),
        Case((8 * k,), 64),
        Case((128 * k,)),
        Case((4 * k,) * 16),
        Case(four),
        Case((2 * k,) * 128),
        Case((32 * k,) * 8),
        Case(four, 32, 32),
        *(Case(four, page_size=size) for size in (256, 64, 16, 1)),
        *(Case(mixed, page_size=size) for size in (0, 64)),
        *(Case(four, seqlen_q=rows) for rows in (4, 8)),
        *(Case((16 * k,) * 4, seqlen_q=512, page_size=size) for size in (0, 64)),
        Case((8 * k + OWN_KEYS,) * 64, page_size=64, prefix=8 * k),
    ]


def host_cases() -> list[Case]:
    """Small calls, of which the host's share is measured."""
    return [Case((1024,)), Case((1024,) * 4, page_size=16)]


def plan_cases() -> list[Case]:
    """Whose work is divided beforehand, which is measured."""
    mixed = next(case for case in cases() if not case.uniform)
    return [Case((4096,) * 64, page_size=64), mixed, Case((1024,) * 2048, page_size=16)]


# --- what was measured -------------------------------------------------------------------------------


class Measured(NamedTuple):
    """A peer on a case: `error` is relative, in the Frobenius norm; `captured` is whether a graph was replayed."""

    seconds: float
    error: float
    captured: bool


Results = dict[Case, dict[str, Measured]]


class Cost(NamedTuple):
    """What a call costs: the host until it returns, and the GPU, which is 0 where that is not what is asked."""

    host_seconds: float
    gpu_seconds: float


Costs = dict[Case, dict[str, Cost]]


class Report(NamedTuple):
    """What a run has measured so far."""

    title: str
    conditions: str
    read: float
    """Bytes a second that the GPU reads."""
    results: Results
    host: Costs
    plans: Costs

    def markdown(self) -> str:
        """Tables: a line a case."""
        text = [f"# {self.title}", "", self.conditions, ""]
        for kind, chosen in itertools.groupby(self.results, key=lambda case: case.kind):
            text += [f"## {kind}", "", *self._table(list(chosen)), ""]
        if self.host:
            head, rows = _cost_rows(self.host, lambda cost: f"{1e6 * cost.host_seconds:.1f}")
            text += ["## What a call costs the host", "", "µs until it returns.", "", *markdown(head, rows), ""]
        if self.plans:
            head, rows = _cost_rows(
                self.plans, lambda cost: f"{1e6 * cost.gpu_seconds:.1f} + {1e6 * cost.host_seconds:.1f}"
            )
            text += [
                "## What dividing the work costs",
                "",
                "µs of the GPU + of the host.",
                "",
                *markdown(head, rows),
                "",
            ]
        return "\n".join(text)

    def _table(self, chosen: list[Case]) -> list[str]:
        names = [name for name in COLORS if any(name in self.results[case] for case in chosen)]
        names.sort(key=is_ours, reverse=True)
        unit = "TFLOP/s" if chosen[0].seqlen_q >= MANY_ROWS else "GB/s"
        head = [
            "case",
            *(f"{name}, µs" for name in names),
            f"cufa, {unit}",
            "of the read rate",
            "error",
            "peers' least",
            "cufa / best peer",
        ]
        rows = []
        for case in chosen:
            found = self.results[case]
            cells = [f"{1e6 * found[name].seconds:.1f}{'' if found[name].captured else '†'}" if name in found else "–"
                     for name in names]  # fmt: skip
            ours = _fastest(found, ours=True)
            peer = _fastest(found, ours=False)
            rate, share, ratio = "–", "–", "–"
            if ours:
                amount = case.flop / 1e12 if unit == "TFLOP/s" else case.bytes / 1e9
                rate = f"{amount / ours.seconds:.0f}"
                share = f"{case.bytes / ours.seconds / self.read:.0%}" if unit == "GB/s" else "–"
            if ours and peer:
                ratio = f"{peer.seconds / ours.seconds:.2f}×"
            errors = [[each.error for name, each in found.items() if is_ours(name) == mine] for mine in (True, False)]
            told = (f"{pick(some):.1e}" if some else "–" for pick, some in zip((max, min), errors, strict=True))
            rows.append([str(case), *cells, rate, share, *told, ratio])
        return markdown(head, rows)

    def as_json(self) -> dict[str, Any]:
        """The same, with every peer's error and rate."""
        return {
            "title": self.title,
            "conditions": self.conditions,
            "read_gb_per_s": self.read / 1e9,
            "cases": [
                {
                    "case": str(case),
                    **case._asdict(),
                    "bytes": case.bytes,
                    "flop": case.flop,
                    "peers": {
                        name: {
                            "us": 1e6 * each.seconds,
                            "error": each.error,
                            "gb_per_s": case.bytes / each.seconds / 1e9,
                            "of_read": case.bytes / each.seconds / self.read,
                            "tflops": case.flop / each.seconds / 1e12,
                            "captured": each.captured,
                        }
                        for name, each in found.items()
                    },
                }
                for case, found in self.results.items()
            ],
            **{
                name: [
                    {
                        "case": str(case),
                        "host_us": 1e6 * cost.host_seconds,
                        "gpu_us": 1e6 * cost.gpu_seconds,
                        "peer": peer,
                    }
                    for case, found in costs.items()
                    for peer, cost in found.items()
                ]
                for name, costs in (("host", self.host), ("plans", self.plans))
            },
        }

    def write(self, stem: Path) -> None:
        """Write the tables as ``.md`` and the rows as ``.json``."""
        stem.with_suffix(".md").write_text(self.markdown())
        stem.with_suffix(".json").write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def figure(self) -> Any:
        """Per cent of the read rate that every peer reaches, a line a case; None if there is nothing to draw.

        Returns
        -------
        matplotlib.figure.Figure or None
        """
        from matplotlib.figure import Figure

        drawn = {case: found for case, found in self.results.items() if found and case.seqlen_q < MANY_ROWS}
        if not drawn:
            return None
        check_colors({name for found in drawn.values() for name in found})
        figure = Figure(figsize=(9, 1.6 + 0.32 * len(drawn)), layout="constrained")
        axis = figure.subplots()
        for name, color in COLORS.items():
            points = [
                (100 * case.bytes / found[name].seconds / self.read, place)
                for place, (case, found) in enumerate(drawn.items())
                if name in found
            ]
            if points:
                size = 9 if is_ours(name) else 6
                axis.plot(*zip(*points, strict=True), "o", color=color, markersize=size, alpha=0.8, label=name)
        axis.set_yticks(range(len(drawn)), [str(case) for case in drawn])
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_xlabel(f"keys and values read once, per cent of {self.read / 1e9:.0f} GB/s")
        axis.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=4)
        figure.suptitle(self.title)
        return figure


def _fastest(found: Mapping[str, Measured], ours: bool) -> Measured | None:
    """The fastest of cufa's ways, or of the others."""
    return min((each for name, each in found.items() if is_ours(name) == ours), default=None)


def _cost_rows(costs: Costs, cell: Callable[[Cost], str]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for found in costs.values() for name in found))
    rows = [
        [str(case), *(cell(found[name]) if name in found else "–" for name in names)] for case, found in costs.items()
    ]
    return ["case", *names], rows

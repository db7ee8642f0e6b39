"""Reports of what was measured of biases, score functions, dropout and masks. No GPU is needed here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from .reports import COLORS, check_colors, is_ours, markdown
from .variants_cases import Case

WORK = {"forward": 1.0, "backward": 2.5}
"""The directions, and what each computes in units of the forward: two matrix products, and five."""

PLAIN = "cufa, plain"
"""The same shape without the feature, causal where the feature hides at least what causality does."""


HEAD = ("case", "", "ms", "TFLOP/s", "of plain cufa", "of the best peer", "error")
"""Of the tables; the numbers are those of the forward and the backward."""


class Measured(NamedTuple):
    """A peer in one direction of a case.

    `error` is relative, in the Frobenius norm, and 0 of the plain call, which has nothing to be held to. `captured` is
    whether a graph was replayed.
    """

    seconds: float
    error: float
    captured: bool


Found = dict[str, Measured]
"""By peer."""

Results = dict[Case, dict[str, Found]]
"""By case and direction."""


def tflops(case: Case, direction: str, name: str, seconds: float) -> float:
    """TFLOP/s of the pairs that are seen; of the plain call, of those that it sees."""
    return WORK[direction] * (case.plain_flop if name == PLAIN else case.flop) / seconds / 1e12


class Report(NamedTuple):
    """What a run has measured so far."""

    title: str
    conditions: str
    results: Results
    starts: dict[str, dict[str, float]]
    """Seconds to the first result of a new process, by what is called and by what the cache on disk holds."""

    def markdown(self) -> str:
        """Tables: a line for every peer of a case."""
        text = [f"# {self.title}", "", self.conditions, ""]
        for kind in dict.fromkeys(case.kind for case in self.results):
            text += [f"## {kind}", ""]
            lines = [line for case in self.results if case.kind == kind for line in self._lines(case)]
            text += [*markdown([*HEAD], lines), ""]
        if self.starts:
            columns = list(dict.fromkeys(itertools.chain.from_iterable(self.starts.values())))
            lines = [[name, *(f"{found[each]:.2f}" for each in columns)] for name, found in self.starts.items()]
            text += ["## The first call of a new process", "", "Seconds from `import cufa` to the result.", ""]
            text += [*markdown(["call", *columns], lines), ""]
        return "\n".join(text)

    def _lines(self, case: Case) -> list[list[str]]:
        directions = self.results[case]
        names = [name for name in COLORS if any(name in found for found in directions.values())]
        names.sort(key=is_ours, reverse=True)
        lines: list[list[str]] = []
        for name in names:
            cells = zip(*(self._cells(case, direction, name) for direction in WORK), strict=True)
            lines.append(["" if lines else str(case), name, *map(" / ".join, cells)])
        return lines

    def _cells(self, case: Case, direction: str, name: str) -> list[str]:
        """What is told of a peer in one direction."""
        found = self.results[case].get(direction, {})
        if name not in found:
            return ["–"] * (len(HEAD) - 2)
        speeds = {each: tflops(case, direction, each, measured.seconds) for each, measured in found.items()}
        own, best = found[name], fastest_peer(found)
        to_plain = f"{speeds[name] / speeds[PLAIN]:.2f}×" if PLAIN in found and name != PLAIN else "–"
        to_best = f"{speeds[name] / speeds[best]:.2f}×" if best and is_ours(name) and name != PLAIN else "–"
        mark = "" if own.captured else "†"
        error = "–" if name == PLAIN else f"{own.error:.1e}"
        return [f"{1e3 * own.seconds:.3f}{mark}", f"{speeds[name]:.0f}", to_plain, to_best, error]

    def as_json(self) -> dict[str, Any]:
        """The same, a row for every peer of a direction of a case."""
        rows = [
            {
                "case": str(case),
                **case._asdict(),
                "direction": direction,
                "peer": name,
                "ms": 1e3 * each.seconds,
                "tflops": tflops(case, direction, name, each.seconds),
                "error": None if name == PLAIN else each.error,
                "captured": each.captured,
            }
            for case, directions in self.results.items()
            for direction, found in directions.items()
            for name, each in found.items()
        ]
        return {"title": self.title, "conditions": self.conditions, "rows": rows, "first_call_seconds": self.starts}

    def write(self, stem: Path) -> None:
        """Write the tables as ``.md`` and the rows as ``.json``."""
        stem.with_suffix(".md").write_text(self.markdown())
        stem.with_suffix(".json").write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def figure(self) -> Any:
        """TFLOP/s that every peer reaches, a line a case and a panel a direction; None if there is nothing to draw.

        Returns
        -------
        matplotlib.figure.Figure or None
        """
        from matplotlib.figure import Figure

        drawn = {case: found for case, found in self.results.items() if any(found.values())}
        if not drawn:
            return None
        check_colors({name for directions in drawn.values() for found in directions.values() for name in found})
        figure = Figure(figsize=(14, 1.8 + 0.32 * len(drawn)), layout="constrained")
        axes = figure.subplots(1, len(WORK), sharey=True)
        for axis, direction in zip(axes, WORK, strict=True):
            for name, color in COLORS.items():
                points = [
                    (tflops(case, direction, name, directions[direction][name].seconds), place)
                    for place, (case, directions) in enumerate(drawn.items())
                    if name in directions.get(direction, {})
                ]
                if points:
                    size, order = (9, 2) if is_ours(name) else (6, 3)
                    style = {"color": color, "markersize": size, "alpha": 0.8, "zorder": order}
                    axis.plot(*zip(*points, strict=True), "o", label=name, **style)
            axis.set_title(direction)
            axis.set_xlim(left=0)
            axis.set_xlabel("TFLOP/s of the pairs that are seen")
            axis.grid(alpha=0.3)
        axes[0].set_yticks(range(len(drawn)), [str(case) for case in drawn])
        axes[0].invert_yaxis()
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        shown = [name for name in COLORS if name in handles]
        figure.legend([handles[name] for name in shown], shown, loc="outside lower center", ncols=5)
        figure.suptitle(self.title)
        return figure


def fastest_peer(found: Found) -> str | None:
    """The fastest that is not cufa."""
    return min((name for name in found if not is_ours(name)), key=lambda name: found[name].seconds, default=None)

"""Draw the plots of benchmarks anew, from what their rows and tables tell.

    python benchmarks/reports.py benchmarks/results/forward-h200.csv ...

draws the plot of each file, beside it; what the file does not tell, its table (Markdown) of the same name does.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cufa._bench.reports import Results, figure_of, read_rows

NAME_INCHES = 2.4
"""What a name takes of a plot's width."""


def draw(results: Results, ceiling: float, title: str, path: Path) -> None:
    """Write the plot of the ladder's rows to a file."""
    figure = figure_of({row: speeds for row, speeds in results.items() if row.on_the_ladder}, ceiling, title)
    if figure is not None:
        (legend,) = figure.legends
        names = [text.get_text() for text in legend.get_texts()]
        legend.remove()
        columns = max(1, int(figure.get_figwidth() / NAME_INCHES))
        figure.legend(legend.legend_handles, names, loc="outside lower center", ncols=min(columns, len(names)))
        figure.savefig(path, dpi=120)


def plot_again(path: Path) -> Path:
    """Draw the plot that belongs to rows in CSV, with what the table of the same run says; where it was written."""
    text = path.with_suffix(".md").read_text()
    title, ceiling = re.search(r"^# (.*)", text), re.search(r"matrix product in the same run: (\d+) TFLOP/s", text)
    if title is None or ceiling is None:
        raise ValueError(f"{path.with_suffix('.md')} does not tell the run's title and the matrix product's speed.")
    draw(read_rows(path), float(ceiling[1]), title[1], path.with_suffix(".png"))
    return path.with_suffix(".png")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"wrote {plot_again(Path(argument))}")

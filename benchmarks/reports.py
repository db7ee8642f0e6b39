"""Draw the plots of benchmarks anew, from what their rows and tables tell.

    python benchmarks/reports.py benchmarks/results/forward-h200.csv ...

draws the plot of each file, beside it; what the file does not tell, its table (Markdown) of the same name does.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cufa._bench.reports import plot, read_rows


def plot_again(path: Path) -> Path:
    """Draw the plot that belongs to rows in CSV, with what the table of the same run says; where it was written."""
    text = path.with_suffix(".md").read_text()
    title, ceiling = re.search(r"^# (.*)", text), re.search(r"matrix product in the same run: (\d+) TFLOP/s", text)
    if title is None or ceiling is None:
        raise ValueError(f"{path.with_suffix('.md')} does not tell the run's title and the matrix product's speed.")
    plot(read_rows(path), float(ceiling[1]), title[1], path.with_suffix(".png"))
    return path.with_suffix(".png")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"wrote {plot_again(Path(argument))}")

"""What the benchmarks on a GPU share: their command line, and how a run begins and is written down."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from cufa._bench.frameworks import Torch
from cufa._bench.measure import captured, conditions, matmul_ceiling, take_turns
from cufa._bench.peers import COMPILED, Peer
from cufa._bench.reports import (
    BASELINE,
    COLORS,
    Results,
    Row,
    beside_the_ladder,
    check_colors,
    ladder,
    markdown,
    names_in,
    plot,
    write_rows,
)
from cufa._call import problem as _problem


def command_line(description: str | None, peers: dict[str, Peer]) -> argparse.Namespace:
    """Parse what every benchmark takes, and take the peers that are not wanted out of `peers`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for table, rows and plot")
    parser.add_argument("--ladder", action="store_true", help="nothing but the ladder")
    parser.add_argument("--quick", action="store_true", help="only the ladder's shorter rows")
    parser.add_argument("--without", default="", help="names of peers to leave out, separated by commas")
    parser.add_argument("--only", default="", help="regular expression that a row's name must contain")
    parser.add_argument(
        "--kernel",
        choices=("best", "sm80"),
        default="best",
        help=f"sm80: the kernel that serves every GPU, on the ladder, beside {BASELINE} alone",
    )
    parser.add_argument("--cliffs", action="store_true", help="nothing but the rows of shapes that are easily slow")
    arguments = parser.parse_args()
    check_colors(peers)
    unwanted = set(filter(None, arguments.without.split(",")))
    for name in unwanted:
        if name not in COLORS or name == "cufa":
            parser.error(f"{name!r} is no peer; there are {', '.join(COLORS)}")
    if arguments.kernel == "sm80":
        arguments.ladder = True
        unwanted |= peers.keys() - {"cufa", BASELINE}
        # It is what serves inputs of which no tensor map can be made.
        _problem.has_tensor_map = lambda *_: False
    for name in unwanted & peers.keys():
        del peers[name]
    return arguments


BESIDE = (
    "Under a window only the pairs it leaves count as work. 64 packed: sequences of 100 to 8000 tokens, and below them "
    "64 of their mean length. There FA2 is called below torch's scaled_dot_product_attention, which has neither."
)
"""What is to be known of the rows beside the ladder."""


def notes(results: Results, peers: Collection[str], eager: Collection[tuple[Row, str]]) -> list[str]:
    """What the marks in the tables say, as lines of Markdown."""
    text = []
    if names_in(results, COMPILED):
        text += [
            "(*) JAX's stream cannot be captured: the mean of calls in a row, without the flush. FlexAttention and "
            "JAX, which compile for long, are measured at head_dim 128 and 8k alone.",
            "",
        ]
    if eager:
        text += ["(†) Not captured: calls, of whose time on the host some may show.", ""]
    return text


def selected(arguments: argparse.Namespace, seqlens: Iterable[int], beside: Iterable[Row]) -> list[Row]:
    """The rows that the command line asks for, of the ladder with these lengths and of those `beside` it."""
    rows = ladder([seqlen for seqlen in seqlens if seqlen <= 2048 or not arguments.quick])
    if not (arguments.ladder or arguments.quick):
        rows += beside
    return [row for row in rows if re.search(arguments.only, str(row))]


def pairs(arguments: argparse.Namespace) -> list[tuple[Row, Row]]:
    """Windows with the causal mask, and sequences of mixed lengths with equal ones."""
    rows = selected(arguments, (), beside_the_ladder())
    windows = [(row, row._replace(window=None)) for row in rows if row.window is not None and row.seqlen == 16384]
    return windows + [(row, row._replace(lengths=None)) for row in rows if row.lengths is not None]


def per_flop(compared: Iterable[tuple[Row, Row]], make: Peer, framework: Torch, *, backward: bool = False) -> list[str]:
    """cufa's time for an operation of a row over that of another, as Markdown.

    Each row takes turns with the other: after calls of its own kind alone, or of slower libraries, the GPU has another
    temperature, and so another clock.
    """
    gpu = framework.clock()
    lines = []
    for pair in compared:
        with gpu.stream:
            given = [framework.inputs(row, 0)[: 4 if backward else 3] for row in pair]
            made = [make(framework, row, *arrays) for row, arrays in zip(pair, given, strict=True)]
            times = take_turns({str(row): captured(fn, gpu) or fn for row, fn in zip(pair, made, strict=True)}, gpu)
        one, other = (times[str(row)] / row.flop for row in pair)
        lines.append([*map(str, pair), f"{one / other:.2f}×"])
    if not lines:
        return []
    text = "What cufa takes for an operation of a row, over what it takes in another with which it takes turns."
    return ["## Beside each other", "", text, "", *markdown(["row", "beside", "time per operation"], lines), ""]


def start(framework: Torch) -> float:
    """Leave the default stream, which cannot be captured, for good, and measure and tell the GPU's ceiling."""
    torch.cuda.set_stream(torch.cuda.Stream())
    ceiling = matmul_ceiling(framework)
    print(f"# {framework.device_name()}, {conditions(framework, ceiling)}", flush=True)
    return ceiling


def stem_of(directory: Path, name: str) -> Path:
    """``<name>-<gpu>`` in a directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name().lower().replace("nvidia", "")
    return directory / f"{name}-{re.sub(r'[^a-z0-9]+', '-', gpu).strip('-')}"


def write(
    directory: Path, name: str, title: str, text: str, results: Results, peers: Collection[str], ceiling: float
) -> None:
    """Write a run's table, rows and plot, as ``<name>-<gpu>`` with the suffix of each."""
    stem = stem_of(directory, name)
    stem.with_suffix(".md").write_text(text)
    write_rows(results, peers, stem.with_suffix(".csv"))
    plot(results, ceiling, title, stem.with_suffix(".png"))
    print(f"# wrote {stem}.md, .csv and .png")

"""Biases, score functions, dropout and masks, beside every peer that can be imported, forward and backward.

    python benchmarks/variants.py [--out DIR] [--only REGEX] [--without NAMES] [--quick] [--seconds S] [--limit S]

Same inputs for all, in one run on one GPU: bfloat16, medians of CUDA-graph replays that take turns, with the L2 flushed
before each. Every result is held to float32, before the replays and after them. ``--out`` receives a table (Markdown)
and the rows (JSON) after every case, so that a run that is ended keeps what it has, and a plot (PNG) in the end.

FlexAttention compiles every case for 5 to 10 s: several processes do so first, while cufa compiles too, and leave what
they made in the cache on disk that torch keeps. ``--without FlexAttention`` saves that, and ``--without peers`` leaves
out all but cufa. Within four minutes on an H200 with 16 cores: ``--quick --seconds 200``.
"""

from __future__ import annotations

import argparse
import re
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from common import stem_of

from cufa._bench import variants_ahead, variants_measure, variants_start
from cufa._bench.frameworks import Torch
from cufa._bench.measure import say_on_stdout
from cufa._bench.reports import check_colors, is_ours
from cufa._bench.variants_cases import cases
from cufa._bench.variants_peers import FLEX, PEERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for table, rows and plot")
    parser.add_argument("--only", default="", help="regular expression that a case's name must contain")
    parser.add_argument(
        "--without", default="", help="names of peers to leave out, separated by semicolons; peers: all but cufa"
    )
    parser.add_argument("--quick", action="store_true", help="one shape of each feature, and fewer calls of each")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so long")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds a peer may take to a first result")
    parser.add_argument("--no-start", action="store_true", help="leave out the first calls of new processes")
    arguments = parser.parse_args()
    began = time.monotonic()
    unwanted = set(filter(None, arguments.without.split(";")))
    if "peers" in unwanted:
        unwanted = unwanted - {"peers"} | {name for name in PEERS if not is_ours(name)}
    if unknown := unwanted - PEERS.keys():
        parser.error(f"{', '.join(map(repr, unknown))}: there are {'; '.join(PEERS)}, and peers")
    peers = {name: make for name, make in PEERS.items() if name not in unwanted}
    check_colors(peers)
    chosen = [case for case in cases(quick=arguments.quick) if re.search(arguments.only, str(case))]
    if not chosen:
        parser.error(f"--only: no case's name contains {arguments.only!r}; there are {'; '.join(map(str, cases()))}")

    def left() -> float | None:
        return None if arguments.seconds is None else arguments.seconds - (time.monotonic() - began)

    compiling = variants_ahead.begin([case for case in chosen if case.kind != "Dropout"]) if FLEX in peers else []
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
    framework = Torch()
    variants_measure.compile_ahead(chosen, {name: make for name, make in peers.items() if is_ours(name)}, framework)
    if late := variants_ahead.finish(compiling, 600.0 if arguments.seconds is None else 0.4 * arguments.seconds):
        say_on_stdout(f"# {late} processes that compile FlexAttention were not done; the rest is compiled in turn")
    say_on_stdout(f"# compiled within {time.monotonic() - began:.0f} s")
    stem = None if arguments.out is None else stem_of(arguments.out, "variants")
    report = variants_measure.run(
        framework,
        peers,
        chosen,
        repeats=10 if arguments.quick else 30,
        seconds=left(),
        limit=arguments.limit,
        keep=lambda report: None if stem is None else report.write(stem),
    )
    if not arguments.no_start and (left() is None or left() > 0):
        library = "CuPy" if find_spec("cupy") else "torch"
        report.starts.update(variants_start.first_calls(library, warm_runs=1 if arguments.quick else 3))
    print(report.markdown())
    if stem is not None:
        report.write(stem)
        if (figure := report.figure()) is not None:
            figure.savefig(stem.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()

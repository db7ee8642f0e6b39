"""Few queries over long caches of keys, beside every peer that can be imported, and what such calls cost the host.

    python benchmarks/decode.py [--out DIR] [--only REGEX] [--without NAMES] [--quick]

Same inputs for all, in one run on one GPU: bfloat16, head_dim 128, medians of CUDA-graph replays that take turns, with
the L2 flushed before each by reading. Every result is held to float32, before the replays and after them. Rates count
the keys and values, each once, and stand beside what the GPU reads in a large sum in the same run. ``--out`` receives
a table (Markdown) and the rows (JSON) after every case, so that a run that is ended keeps what it has, and a plot (PNG)
in the end.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from common import stem_of

from cufa._bench import decode_measure
from cufa._bench.decode_peers import PEERS, PLANS
from cufa._bench.frameworks import Torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for table, rows and plot")
    parser.add_argument("--only", default="", help="regular expression that a case's name must contain")
    parser.add_argument("--without", default="", help="names of peers to leave out, separated by semicolons")
    parser.add_argument("--quick", action="store_true", help="fewer calls of each")
    arguments = parser.parse_args()
    unwanted = set(filter(None, arguments.without.split(";")))
    if unknown := unwanted - PEERS.keys():
        parser.error(f"{', '.join(map(repr, unknown))}: there are {'; '.join(PEERS)}")
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
    stem = None if arguments.out is None else stem_of(arguments.out, "decode")
    peers = {name: make for name, make in PEERS.items() if name not in unwanted}
    report = decode_measure.run(
        Torch(),
        peers,
        PLANS,
        wanted=re.compile(arguments.only),
        repeats=10 if arguments.quick else 30,
        keep=lambda report: None if stem is None else report.write(stem),
    )
    print(report.markdown())
    if stem is not None and (figure := report.figure()) is not None:
        figure.savefig(stem.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()

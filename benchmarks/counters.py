"""What cufa's kernels do with the GPU, and wait for: hardware counters of single launches, as a table.

    python benchmarks/counters.py [--out DIR] [--only REGEX] [--seconds S]

ncu (Nsight Compute), which has to be on the PATH, replays each launch and flushes caches before, at whatever clock the
GPU has: shares and bytes compare, times only roughly. The rows are those where something is to be gained; all of them
take some three minutes on an H200. A launch that does nothing stands before each row's, so that its kernels are found
among all.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cufa._bench.peers import BACKWARD, FORWARD, Call
from cufa._bench.reports import BASELINE, LADDER_HEAD_DIMS, Row, beside_the_ladder, ladder, markdown, rungs
from cufa._bench.variants_cases import Case
from cufa._bench.variants_cases import cases as variants

STALLED = "smsp__average_warps_issue_stalled_"
STALLS = {
    "wait": "fixed latencies",
    "long_scoreboard": "memory, mbarriers",
    "short_scoreboard": "shared memory",
    "barrier": "barriers",
    "gmma": "wgmma",
    "dispatch_stall": "dispatch",
    "math_pipe_throttle": "a busy unit",
    "mio_throttle": "the queue of shared memory",
    "lg_throttle": "the queue of global memory",
    "branch_resolving": "branches",
    "no_instruction": "instructions",
    "imc_miss": "constants",
    "drain": "stores at the end",
    "membar": "fences",
}
"""What a warp may wait for, as ncu calls it, and in words."""

COSTLY = ("bias per head", "bias per sequence", "dropout", "softcap", "documents", "prefix", "random blocks")
"""Features that take longer than one would wish."""

LEAST_US = 10.0
"""Launches that take less are left out: they have nothing to do, mostly."""

DURATION, ELAPSED, ACTIVE = "gpu__time_duration.sum", "sm__cycles_elapsed.max", "sm__cycles_active"
SHARES = {
    "tensor cores": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "exponentials": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "ALU": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "shared memory": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
}
"""Of which units the table tells how busy they are, and the counter of each."""

BYTES = {"DRAM, MB": ("dram__bytes_read.sum", "dram__bytes_write.sum"), "L2, MB": ("lts__t_bytes.sum",)}


class Profiled(NamedTuple):
    """A call to profile: the name of what it is, and how it is made.

    `alone`: none other may be made beside it, of which it would change the kernel.
    """

    name: str
    make: Callable[[Any], Call]
    alone: bool = False


def profiled() -> list[Profiled]:
    """The calls, forward and backward, and beside some of them that of FlashAttention-2."""
    beside = beside_the_ladder()
    windows = [row for row in beside if row.window is not None]
    mixed = [row for row in beside if row.lengths]
    (grouped,) = (row for row in ladder(()) if row.causal)
    full, causal = (False,), (True,)
    forward = [*rungs((64, 128), (512, 8192), full), *rungs((256,), (8192, 16384)), *windows]
    backward = [*rungs(LADDER_HEAD_DIMS, (8192,), full), *rungs((64, 128), (512, 2048), causal), *windows]
    backward += [row for row in beside if row.head_dim in (96, 192) and row.seqlen == 8192]
    backward += [*mixed, grouped, *(row._replace(deterministic=True) for row in (*mixed, grouped) if row.causal)]
    found = [_row_of(row, backward=False) for row in forward]
    found += [_every_gpu(row, name) for row in rungs((256,), (512, 2048), full) for name in ("cufa", BASELINE)]
    found += [_row_of(row, backward=True) for row in backward]
    narrow = [case for case in variants() if case.head_dim == 64 and not case.causal]
    for case in [case for case in variants(quick=True) if case.feature in COSTLY] + narrow:
        found += [_variant_of(case, backward=backward) for backward in (False, True)]
    return found


def _row_of(row: Row, *, backward: bool, name: str = "cufa") -> Profiled:
    peers = BACKWARD if backward else FORWARD

    def make(framework: Any) -> Call:
        return peers[name](framework, row, *framework.inputs(row, 0)[: 4 if backward else 3])

    return Profiled(f"{'backward' if backward else 'forward'} {row}", make)


def _every_gpu(row: Row, name: str) -> Profiled:
    """The forward of the kernel that serves every GPU, or that of a peer beside it."""
    plain = _row_of(row, backward=False, name=name)

    def make(framework: Any) -> Call:
        from cufa._call import problem

        call, has_tensor_map = plain.make(framework), problem.has_tensor_map

        def run() -> Any:
            problem.has_tensor_map = lambda *_: False
            try:
                return call()
            finally:
                problem.has_tensor_map = has_tensor_map

        return run

    return Profiled(f"{plain.name}, {'every GPU' if name == 'cufa' else name}", make, alone=True)


def _variant_of(case: Case, *, backward: bool) -> Profiled:
    name = "cufa, BlockMask" if case.masked else "cufa, function" if case.feature == "softcap" else "cufa"

    def make(framework: Any) -> Call:
        from cufa._bench.variants_measure import inputs
        from cufa._bench.variants_peers import PEERS

        ways = PEERS[name](framework, case, inputs(framework, case, 0))
        return ways.backward() if backward else ways.forward

    return Profiled(f"{'backward' if backward else 'forward'} {case}{name.removeprefix('cufa')}", make)


# --- calls --------------------------------------------------------------------------------------------


def compile_ahead(chosen: Collection[Profiled]) -> None:
    """Let cufa compile what the calls take, side by side where it can be, outside of ncu; the disk keeps it."""
    from cufa._bench.frameworks import Torch

    framework = Torch()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda each: each.make(framework)(), (each for each in chosen if not each.alone)))
    for each in chosen:
        if each.alone:
            each.make(framework)()
    framework.release()


def run_calls(only: str, seconds: float) -> None:
    """Make each call once, behind a launch whose name says which it is; begin none after so long."""
    import torch

    import cufa
    from cufa._bench.frameworks import Torch

    framework = Torch()
    chosen = [(index, each) for index, each in enumerate(profiled()) if re.search(only, each.name)]
    nothing = torch.zeros(1, dtype=torch.int32, device="cuda")
    began = time.monotonic()
    for index, each in chosen:
        if time.monotonic() - began > seconds:
            print(f"# left out for want of time: {each.name}", flush=True)
            continue
        call = each.make(framework)
        framework.release()
        for name in (f"row_{index}", "row_end"):
            source = f'extern "C" __global__ void {name}(const int* nothing) {{}}'
            cufa.jit(source, name)(nothing, grid=1, block=1)
            if name != "row_end":
                call()
            framework.release()
        print(f"# {each.name}", flush=True)


# --- the table ----------------------------------------------------------------------------------------


def launches_in(text: str) -> dict[int, list[Mapping[str, str]]]:
    """ncu's launches in CSV, by the index of the row that they belong to."""
    lines = text.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    found: dict[int, list[Mapping[str, str]]] = {}
    index: int | None = None
    for launch in csv.DictReader(io.StringIO("\n".join(lines[header:]))):
        if not launch["ID"]:  # units
            continue
        if (marker := re.match(r"row_(\w+)", launch["Kernel Name"])) is not None:
            index = None if marker[1] == "end" else int(marker[1])
        elif index is not None:
            found.setdefault(index, []).append(launch)
    return found


def cells_of(launch: Mapping[str, str]) -> list[str]:
    """A line of the table, but for the row's name."""

    def value(name: str) -> float:
        return float(launch[name].replace(",", ""))

    elapsed, nanoseconds = value(ELAPSED), value(DURATION)
    busy = (100 * value(f"{ACTIVE}.{which}") / elapsed for which in ("avg", "min"))
    stalls = {name: value(f"{STALLED}{name}_per_issue_active.ratio") for name in STALLS}
    worst = sorted(stalls, key=lambda name: -stalls[name])[:4]
    return [
        re.sub(r"^void |attention_|[<(].*", "", launch["Kernel Name"]),
        f"{nanoseconds / 1e3:.0f}",
        f"{elapsed / nanoseconds:.2f}",
        "{:.0f}, {:.0f}".format(*busy),
        *(f"{value(name):.0f}" for name in SHARES.values()),
        *(f"{sum(map(value, names)) / 1e6:.0f}" for names in BYTES.values()),
        ", ".join(f"{STALLS[name]} {stalls[name]:.1f}" for name in worst),
    ]


def table(names: Mapping[int, str], launches: Mapping[int, Iterable[Mapping[str, str]]]) -> list[str]:
    """All launches that take long as Markdown."""
    header = ["row", "kernel", "µs", "GHz", "SMs busy: mean, least", *SHARES, *BYTES, "what warps wait for"]
    lines = []
    for index, found in launches.items():
        name = names[index]
        for launch in found:
            cells = cells_of(launch)
            if float(cells[1]) >= LEAST_US:
                lines.append([name, *cells])
                name = ""
    return markdown(header, lines)


NOTES = """\
From `python benchmarks/counters.py`: one launch each, under ncu, with cold caches, at the clock that the GPU has then.
Units are busy for so many percent of the time that SMs are: tensor cores, the unit of exponentials, that of integers
and comparisons, and the slots in which warps issue; shared memory of all the time. Warps wait for so many cycles, on
average, for each instruction that is issued. Those that load wait most of the time, as they should.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for the table")
    parser.add_argument("--only", default="", help="regular expression that a row's name must contain")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so long under ncu")
    parser.add_argument("--calls", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.calls:
        run_calls(arguments.only, arguments.seconds)
        return
    chosen = {index: each for index, each in enumerate(profiled()) if re.search(arguments.only, each.name)}
    if not chosen:
        parser.error(f"--only: no row's name contains {arguments.only!r}; there are {[e.name for e in profiled()]}")
    compile_ahead(chosen.values())
    metrics = [DURATION, ELAPSED, *(f"{ACTIVE}.{which}" for which in ("avg", "min")), *SHARES.values()]
    metrics += [name for several in BYTES.values() for name in several]
    metrics += [f"{STALLED}{name}_per_issue_active.ratio" for name in STALLS]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "launches.csv"
        watch = ["ncu", "--clock-control", "none", "--kernel-name", "regex:^(attention_|row_|.*flash_fwd)"]
        watch += ["--metrics", ",".join(metrics), "--csv", "--page", "raw", "--print-units", "base"]
        watched = [sys.executable, __file__, "--calls", "--only", arguments.only, "--seconds", str(arguments.seconds)]
        done = subprocess.run([*watch, "--log-file", str(log), *watched])
        text = log.read_text() if log.exists() else ""
    if done.returncode or '"ID"' not in text:
        sys.exit(f"ncu ended with {done.returncode}: {text[-2000:]}")
    names = {index: each.name for index, each in chosen.items()}
    lines = ["# Counters", "", NOTES, *table(names, launches_in(text))]
    print("\n".join(lines))
    if arguments.out is not None:
        from common import stem_of

        stem_of(arguments.out, "counters").with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""What a new process takes until it has a compiled kernel, and what many processes at once do. No GPU is needed.

    python benchmarks/start.py [--ranks N] [--save PATH]

Not counted is what a process that uses a GPU has imported anyway: NumPy, cuda-pathfinder and the driver's bindings.
Loading the kernel into the GPU comes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = 15

START = """
import json, sys, time
import numpy, cuda.pathfinder
from cuda.bindings import driver
laps, last = {}, time.perf_counter()
def lap(name):
    global last
    now = time.perf_counter()
    laps[name], last = 1e3 * (now - last), now
import cufa
from cufa._compile import jit, nvrtc
from cufa._kernels import choose
from cufa._operations.forward import FORWARD
from cufa._call.problem import Static
lap("imports")
facts = Static("bf16", 128, 128, "causal", (), False, False, 16, 16, True, False)
unit = jit.unit_of(choose(FORWARD, facts, 90))
lap("source")
jit.bundled(unit)
lap("bundles")
jit.nvrtc()
lap("which NVRTC")
key = jit.key_of(unit)
lap("key")
entry = jit.cache().get(key)
lap("look-up")
laps["all"] = sum(laps.values())
def median(function):
    times = []
    for _ in range(200):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return 1e3 * sorted(times)[100]
if entry is None:
    jit.entry_of(unit)
else:
    from cufa._compile.cache import CubinCache
    laps["look-up, warm"] = median(lambda: CubinCache(jit.cache().path).get(key))
    def claim():
        with jit.cache().claim(jit._cache.digest({}), "nothing"):
            pass
    laps["lease"] = median(claim)
    laps["loaded"] = nvrtc._is_loaded()
    began = time.perf_counter()
    nvrtc._digest(nvrtc._files_of(jit.nvrtc().path))
    laps["reading NVRTC"] = 1e3 * (time.perf_counter() - began)
print(json.dumps(laps))
"""

RANK = """
import json, sys
from cufa._compile import jit
from cufa._kernels import choose
from cufa._operations.forward import FORWARD
from cufa._call.problem import Static
units = [
    jit.unit_of(choose(FORWARD, Static("bf16", dim, dim, "causal", (), False, False, 16, 16, True, False), 90))
    for dim in (64, 128)
]
print("ready", flush=True)
sys.stdin.readline()
for unit in units:
    jit.entry_of(unit)
stats = jit.cache().stats()
print(json.dumps([stats.writes, stats.damaged]))
"""


def child(script: str, cache: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUFA_")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment |= {"CUFA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "CUFA_PROGRESS": "0"}
    environment["PYTHONPYCACHEPREFIX"] = str(cache.parent / "pyc")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script], text=True, env=environment, **pipes)


def start(cache: Path) -> dict[str, float]:
    """Milliseconds of each step with a warm cache, medians of new processes."""
    child(START, cache).communicate()
    time.sleep(0.1)
    runs = [json.loads(child(START, cache).communicate()[0]) for _ in range(RUNS + 1)][1:]
    assert not any(run.pop("loaded") for run in runs), "NVRTC was loaded"
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def together(ranks: int, cache: Path) -> tuple[float, float, int]:
    """Seconds of processors, seconds, and kernels compiled by processes that begin at once."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    processes = [child(RANK, cache) for _ in range(ranks)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    began = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    told = [json.loads(process.communicate()[0]) for process in processes]
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert not any(damaged for _, damaged in told), "a torn entry"
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, seconds, sum(writes for writes, _ in told)


def report(ranks: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        steps = start(Path(folder, "start"))
        alone, many = Path(folder, "alone"), Path(folder, "many")
        cold = {count: together(count, cache) for count, cache in ((1, alone), (ranks, many))}
        warm = {count: together(count, cache) for count, cache in ((1, alone), (ranks, many))}
    path = ("imports", "source", "bundles", "which NVRTC", "key", "look-up", "all")
    lines = [
        f"A new process with a warm cache, medians of {RUNS}; Python {platform.python_version()}, "
        f"{os.cpu_count()} cores:",
        "",
        f"| {' | '.join(path)} |",
        f"|{'---|' * len(path)}",
        f"| {' | '.join(f'{steps[name]:.2f} ms' for name in path)} |",
        "",
        f"NVRTC is not loaded. Reading all of it, where nothing remembers its digest, takes "
        f"{steps['reading NVRTC']:.0f} ms, a look-up in a process that has made some {steps['look-up, warm']:.2f} ms, "
        f"and taking and giving back a lease {steps['lease']:.2f} ms.",
        "",
        "Two kernels, wanted at once by processes that find an empty cache; beyond what they take with a warm one:",
        "",
        "| processes | compiled | processors' time | time |",
        "|---|---|---|---|",
    ]
    for count, (used, seconds, compiled) in cold.items():
        lines.append(f"| {count} | {compiled} | {used - warm[count][0]:.2f} s | {seconds - warm[count][1]:.2f} s |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, default=64, help="how many processes begin at once")
    parser.add_argument("--save", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    text = "\n".join(report(arguments.ranks)) + "\n"
    print(text, end="")
    if arguments.save:
        arguments.save.write_text(text)


if __name__ == "__main__":
    main()

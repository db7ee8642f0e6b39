"""FlexAttention compiled ahead, in processes beside each other, into the cache on disk that torch keeps.

Compiling holds the interpreter, and takes seconds in each direction of a case. Whoever compiles the same afterwards
finds it there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .frameworks import Torch
from .variants_cases import Case, cases
from .variants_measure import inputs
from .variants_peers import FLEX, PEERS

PROCESSES = 6
"""At most: each has a context on the GPU, and arrays of a case at a time."""


def begin(chosen: Sequence[Case]) -> list[subprocess.Popen[bytes]]:
    """Begin to compile what cases take, divided among new processes."""
    count = min(PROCESSES, max((os.cpu_count() or 1) // 2, 1))
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    shares = [[str(case) for case in chosen[first::count]] for first in range(count)]
    return [
        subprocess.Popen(
            [sys.executable, "-m", __name__, *share],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for share in shares
        if share
    ]


def finish(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> int:
    """Wait for them, all together for so long, and end those that are not done: how many these are."""
    until = time.monotonic() + seconds
    late = 0
    for process in processes:
        try:
            process.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late += 1
    return late


def compile_all(names: Sequence[str]) -> None:
    """Compile what the cases of these names take."""
    framework = Torch()
    for case in cases():
        if str(case) in names:
            with suppress(Exception):  # what fails, fails again where it is told
                ways = PEERS[FLEX](framework, case, inputs(framework, case, 0))
                ways.forward()
                ways.backward()()
            framework.release()


if __name__ == "__main__":
    compile_all(sys.argv[1:])

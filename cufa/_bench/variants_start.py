"""What the first call of a new process takes, with score functions, masks and dropout."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .measure import Say, say_on_stdout

CALLS = {
    "plain": "cufa.attention(q, q, q)",
    "ALiBi, as a function": (
        "cufa.attention(q, q, q, score=lambda score, batch, head, query, key: score - 0.5 * abs(query - key))"
    ),
    "softcap, as a function": (
        "from cufa.functions import tanh; "
        "cufa.attention(q, q, q, score=lambda score, batch, head, query, key: 20 * tanh(score / 20))"
    ),
    "causality, as a function": "cufa.attention(q, q, q, mask=lambda batch, head, query, key: query >= key)",
    "dropout": "cufa.attention(q, q, q, dropout_p=0.1, seed=1)",
}
"""What is measured, as text."""

MAKE = {
    "torch": (
        "import torch; q = torch.zeros((1, 1024, 4, 128), dtype=torch.float16, device='cuda'); "
        "wait = torch.cuda.synchronize"
    ),
    "CuPy": (
        "import cupy; q = cupy.zeros((1, 1024, 4, 128), cupy.float16); wait = cupy.cuda.runtime.deviceSynchronize"
    ),
    "NumPy": "import numpy; q = numpy.zeros((1, 16, 1, 8), numpy.float32); wait = tuple",
}
"""How the arrays of a call come about, with the context of the GPU."""

SCRIPT = """
import time
{make}
wait()
began = time.perf_counter()
import cufa
{call}
wait()
print(time.perf_counter() - began)
"""


def first_calls(
    library: str, calls: Mapping[str, str] = CALLS, *, warm_runs: int = 3, say: Say = say_on_stdout
) -> dict[str, dict[str, float]]:
    """Seconds from ``import cufa`` to the result, with nothing in the cache on disk and with all that is needed.

    Parameters
    ----------
    library : {"torch", "CuPy", "NumPy"}
        Whose arrays are given.
    calls : dict of str to str
        What is called, as text, with an array `q`.
    warm_runs : int
        How many processes with a warm cache the median is of.
    say : callable
        Is given a line for every call that fails, which is left out.
    """
    found = {}
    for name, call in calls.items():
        try:
            found[name] = _first_call(library, call, warm_runs)
        except RuntimeError as reason:
            say(f"# the first call fails, {name}: {reason}")
    return found


def _first_call(library: str, call: str, warm_runs: int) -> dict[str, float]:
    script = SCRIPT.format(make=MAKE[library], call=call)
    with tempfile.TemporaryDirectory() as directory:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "CUFA_CACHE_DIR": directory, "CUFA_PROGRESS": "0", "PYTHONPATH": path}

        def once() -> float:
            run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(run.stderr.strip()[-500:])
            return float(run.stdout)

        return {"cold cache": once(), "warm cache": statistics.median(once() for _ in range(warm_runs))}
